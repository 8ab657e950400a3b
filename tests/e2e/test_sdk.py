"""The SDK against the real server: what a stranger's first program does, and what goes wrong."""

import json
import subprocess
import sys
import threading

import conveyor
import conveyor.aio
import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

X = np.random.default_rng(9).standard_normal((40, 4)).astype(np.float32)
KINDS = ("rnn", "lstm", "gru")


@pytest.fixture(scope="module")
def target(nets, tmp_path_factory, transport):
    """One server of each transport for the module: each test has sessions of its own."""
    from tests.e2e.conftest import serving

    with serving(nets.folder, tmp_path_factory.mktemp("server"), "--transport", transport) as server:
        yield server


@pytest.fixture
def client(target):
    with conveyor.connect(target.target) as client:
        yield client


def close_to(got, want):
    return got.shape == want.shape and np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_and_in_chunks(client, nets, kind):
    whole = nets.truth(kind, X)
    with client.session(kind) as s:
        assert close_to(np.array([s.step(x) for x in X[:10]]), whole[:10])
        assert close_to(s.step(X[10:25]), whole[10:25])
        assert close_to(np.array(list(s.stream(X[25:]))), whole[25:])
        assert s.applied_seq == 10 + 1 + 15


@pytest.mark.parametrize("kind", KINDS)
async def test_the_same_with_asyncio(target, nets, kind):
    whole = nets.truth(kind, X)
    async with conveyor.aio.connect(target.target) as client, client.session(kind) as s:
        assert close_to(np.array([await s.step(x) for x in X[:10]]), whole[:10])
        assert close_to(np.array([y async for y in s.stream(X[10:])]), whole[10:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_population_in_columnar_frames(client, nets, kind):
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((64, 12, 4)).astype(np.float32)
    truth = np.array([nets.truth(kind, x) for x in inputs])
    with client.population(kind, 64) as p:
        assert close_to(np.array([p.step(inputs[:, t]) for t in range(5)]), truth[:, :5].swapaxes(0, 1))
        rows = [3, 40, 7]
        assert close_to(p.step(inputs[rows, 5], rows=rows), truth[rows, 5])


def test_fork_snapshot_and_restore(client, nets):
    whole = nets.truth("lstm", X)
    with client.session("lstm") as s:
        s.step(X[:10])
        snapshot = s.snapshot()
        with s.fork() as twin:
            assert close_to(twin.step(X[10:]), whole[10:])
        s.step(X[::-1].copy())
        with client.restore(snapshot) as again:
            assert again.id != s.id
            assert close_to(again.step(X[10:]), whole[10:])
    with pytest.raises(conveyor.SnapshotInvalid):
        client.restore(snapshot[:-1]).__enter__()
    with pytest.raises(conveyor.ModelMismatch):
        client.restore(snapshot, model="gru").__enter__()


def test_another_client_goes_on_where_the_first_left(target, nets):
    whole = nets.truth("gru", X)
    with conveyor.connect(target.target) as first:
        s = first.session("gru", session_id="handed-over", detach_on_exit=True)
        with s:
            s.step(X[:7])
    with conveyor.connect(target.target) as second:
        with second.session("gru", session_id="handed-over", resume=True) as s:
            assert close_to(s.step(X[7:]), whole[7:])
        with pytest.raises(conveyor.SessionClosed):
            second.session("gru", session_id="handed-over", resume=True).__enter__()


def test_of_two_that_resume_at_once_one_goes_on_and_the_other_is_told(target, nets):
    whole = nets.truth("lstm", X)
    with conveyor.connect(target.target) as a, conveyor.connect(target.target) as b:
        mine = a.session("lstm", session_id="contested").__enter__()
        mine.step(X[0])
        theirs = b.session("lstm", session_id="contested", resume=True).__enter__()
        with pytest.raises(conveyor.SessionTakenOver):
            mine.step(X[1])
        assert theirs.applied_seq == 1
        assert close_to(theirs.step(X[1:]), whole[1:])
        theirs.close()


def test_concurrent_resumes_leave_exactly_one_holder(target):
    clients = [conveyor.connect(target.target) for _ in range(6)]
    try:
        with clients[0].session("gru", session_id="race", detach_on_exit=True) as s:
            s.step(X[0])
        holders = []

        def resume(client):
            holders.append(client.session("gru", session_id="race", resume=True).__enter__())

        threads = [threading.Thread(target=resume, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcomes = []
        for holder in holders:
            try:
                holder.step(X[1])
                outcomes.append("applied")
            except conveyor.SessionTakenOver:
                outcomes.append("fenced")
        assert sorted(outcomes) == ["applied"] + ["fenced"] * 5
        winner = holders[outcomes.index("applied")]
        assert winner.refresh().applied_seq == 2
        winner.close()
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        (np.zeros((2, 3), np.float32), "4"),
        (np.zeros((1, 1, 1, 4), np.float32), "4"),
        (np.array([np.nan, 0, 0, 0], np.float32), "NaN"),
        (np.array(["a", "b", "c", "d"]), "float32"),
        (np.zeros((0, 4), np.float32), "time step"),
        ({"nope": X[0]}, "nope"),
    ],
)
def test_bad_input_says_what_to_do_and_the_session_goes_on(client, nets, inputs, error):
    whole = nets.truth("lstm", X)
    with client.session("lstm") as s:
        assert close_to(s.step(X[0]), whole[0])
        with pytest.raises((conveyor.InvalidInput, ValueError, TypeError), match=error):
            s.step(inputs)
        assert close_to(s.step(X[1]), whole[1])


def test_what_is_not_there(client):
    with pytest.raises(conveyor.ModelNotFound, match="gru"):
        client.session("grru").__enter__()
    with pytest.raises(conveyor.SessionNotFound):
        client.session("gru", session_id="ghost", resume=True).__enter__()
    with pytest.raises(conveyor.ModelNotFound):
        client.model("lstm", "99")


def test_models_and_sessions_are_listed(client):
    names = [model.name for model in client.models()]
    assert names == ["gru", "lstm", "rnn", "speller"]
    with client.session("lstm", session_id="seen") as s:
        s.step(X[0])
        listed = {info.id: info for info in client.sessions(model="lstm")}
        assert listed["seen"].applied_seq == 1
        assert not any(info.id == "seen" for info in client.sessions(model="gru"))


def test_a_model_can_be_unloaded_and_loaded_again(client):
    with client.session("speller", session_id="on-it") as s:
        with pytest.raises(conveyor.ModelInUse):
            client.unload_model("speller", "1")
        assert client.unload_model("speller", "1", force=True) == 1
        with pytest.raises(conveyor.SessionClosed, match="unloaded"):
            s.step(np.int64(3))
    with pytest.raises(conveyor.ConveyorError):
        client.session("speller").__enter__()
    assert client.load_model("speller").name == "speller"
    with client.session("speller") as s:
        assert s.step(np.int64(3)).shape == (8,)


def test_reflection_describes_both_services(target):
    with grpc.insecure_channel(target.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"conveyor.v1.SessionService", "conveyor.v1.ModelService", "grpc.health.v1.Health"} <= services
        assert database.FindFileContainingSymbol("conveyor.v1.SessionService").package == "conveyor.v1"


def command(target, *arguments, **options):
    full = [sys.executable, "-m", "conveyor.cli.main", *arguments, "--target", target.target]
    return subprocess.run(full, capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_command_line(target, nets):
    models = command(target, "models")
    assert models.returncode == 0, models.stderr
    assert "lstm" in models.stdout
    assert json.loads(command(target, "models", "--json").stdout)
    step = command(target, "step", "lstm", "--input", json.dumps(X[0].tolist()), "--json")
    assert step.returncode == 0, step.stderr
    sessions = command(target, "sessions")
    assert sessions.returncode == 0
    missing = command(target, "step", "nope", "--input", "[0]")
    assert missing.returncode != 0
    assert "nope" in missing.stderr
    assert "Traceback" not in missing.stderr
