"""The parts that the fault tests stand on do what they are there for."""

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import conveyor
import numpy as np
import pytest

from tests.fault.faults import Kind, in_random_order
from tests.fault.model import NAME, SIZE, digest, given, write_expected, write_model
from tests.fault.process import Process
from tests.fault.proxy import FaultProxy, Link
from tests.fault.resumes import quantile, resumes
from tests.fault.rig import Rig
from tests.fault.script import CLIENTS, Script, Settings
from tests.fault.trial import Weather, run
from tests.fault.valkey_server import ValkeyServer
from tests.support.by_hand import ByHand

pytestmark = pytest.mark.xdist_group("fault")


@pytest.fixture
def echo() -> Iterator[int]:
    """A port on which every connection gets back what it sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(connection: socket.socket) -> None:
            with connection:
                while data := _received(connection):
                    connection.sendall(data)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


@pytest.fixture
def link(echo: int) -> Iterator[Link]:
    with FaultProxy() as proxy:
        yield proxy.link("echo", echo)


@pytest.fixture
def end(link: Link) -> Iterator[socket.socket]:
    """A connection through the link, over which something went there and back."""
    with socket.create_connection(("127.0.0.1", link.port), timeout=5) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        yield connection


def test_a_link_hands_on_every_byte(end: socket.socket) -> None:
    sent = np.random.default_rng(1).bytes(3_000_000)
    threading.Thread(target=end.sendall, args=(sent,), daemon=True).start()
    got = b""
    while len(got) < len(sent):
        got += end.recv(1 << 16)
    assert got == sent


def test_a_link_that_is_cut_resets_its_connections_and_takes_new_ones(link: Link, end: socket.socket) -> None:
    assert link.connections == 1
    assert link.cut() == 1
    with pytest.raises(ConnectionResetError):
        end.recv(1)
    with socket.create_connection(("127.0.0.1", link.port), timeout=5) as again:
        again.sendall(b"again")
        assert again.recv(5) == b"again"


def test_a_link_that_is_slow_delays_each_way(link: Link, end: socket.socket) -> None:
    link.slow(0.1)
    began = time.monotonic()
    end.sendall(b"slow")
    assert end.recv(4) == b"slow"
    assert time.monotonic() - began >= 0.19


def test_a_link_that_is_stalled_loses_nothing(link: Link, end: socket.socket) -> None:
    link.stall()
    end.sendall(b"late")
    end.settimeout(0.2)
    with pytest.raises(TimeoutError):
        end.recv(4)
    link.flow()
    end.settimeout(5)
    assert end.recv(4) == b"late"


def test_the_end_of_a_connection_passes_through(end: socket.socket) -> None:
    end.shutdown(socket.SHUT_WR)
    assert end.recv(1) == b""


def test_a_link_to_nowhere_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with FaultProxy() as proxy:
        link = proxy.link("nowhere", port)
        # By then, or already while it connects.
        with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.0.1", link.port), timeout=5) as end:
            end.recv(1)


def test_a_process_that_is_frozen_goes_on_when_it_is_thawed(tmp_path: Path) -> None:
    clock = Process(["sh", "-c", "while :; do echo tick; sleep 0.02; done"], tmp_path / "clock.log")
    clock.start()
    try:
        clock.wait_until(lambda: "tick" in clock.tail(), 5)
        clock.freeze()
        time.sleep(0.1)
        before = clock.tail()
        time.sleep(0.2)
        assert clock.tail() == before
        clock.thaw()
        clock.wait_until(lambda: clock.tail() != before, 5)
        assert clock.resident_bytes > 0
    finally:
        clock.kill()
    assert not clock.running


def test_a_process_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    short = Process(["sh", "-c", "echo no; exit 3"], tmp_path / "short.log")
    short.start()
    with pytest.raises(AssertionError, match="ended\nno"):
        short.wait_until(lambda: False, 5)
    assert short.wait(1) == 3


def test_the_store_keeps_what_it_answered_for_when_it_is_killed(tmp_path: Path) -> None:
    def ask(server: ValkeyServer, command: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            return connection.recv(100)

    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    try:
        for number in range(50):
            assert ask(server, f"SET key {number}") == b"+OK\r\n"
        server.kill()
        server.start()
        assert ask(server, "GET key") == b"$2\r\n49\r\n"
    finally:
        server.kill()


def test_a_script_is_the_same_in_every_process_and_another_by_its_seed() -> None:
    settings = Settings(seed=4)
    assert Settings.from_json(settings.to_json()) == settings
    assert Script(settings).roles == Script(settings).roles
    assert Script(settings).roles != Script(Settings(seed=5)).roles


def test_a_script_has_every_kind_of_role() -> None:
    roles = Script(Settings(seed=4)).roles
    assert sum(len(role.ids) for role in roles) == 200
    assert {role.durability for role in roles} == {"sync", "async"}
    for trait in ("is_population", "own_stream", "pipelined", "hand_over_at", "flush_at"):
        assert {bool(getattr(role, trait)) for role in roles} == {True, False}, trait


def test_the_legs_of_a_role_are_all_of_its_steps() -> None:
    for role in Script(Settings(seed=4)).roles:
        legs = sorted(leg for client in range(CLIENTS) for leg in role.legs(client))
        assert legs[0][0] == 0
        assert legs[-1][1] == len(role.lengths)
        assert [after for after, _ in legs[1:]] == [up_to for _, up_to in legs[:-1]]


def test_the_model_never_forgets(tmp_path: Path) -> None:
    model = ByHand(write_model(tmp_path))
    one, other = model.begin(), model.begin()
    for step in range(1, 300):
        x = given(0, "s", step, 1)
        y = one.step(x)
        if step == 1:
            x[0, 0] += 1e-4
        assert other.step(x).tobytes() != y.tobytes(), f"step {step}"


def test_what_is_expected_is_the_file_stepped_by_hand(tmp_path: Path) -> None:
    script = Script(Settings(seed=2, sessions=11, steps=4))
    count = write_expected(write_model(tmp_path), script, tmp_path / "expected.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "expected.jsonl").read_text().splitlines()]
    assert len(lines) == count == 44
    [role] = [role for role in script.roles if "s-010" in role.ids]
    mine = [line for line in lines if line["session"] == "s-010"]
    assert [line["answer"] for line in mine] == [1, 2, 3, 4]
    inputs = [given(2, "s-010", step, length) for step, length in enumerate(role.lengths, 1)]
    assert [line["input"] for line in mine] == [digest(x) for x in inputs]
    answers = ByHand(tmp_path / NAME / "1" / "model.onnx").run(inputs)
    assert [line["output"] for line in mine] == [answer.tobytes().hex() for answer in answers]
    assert inputs[0].shape == (role.lengths[0], SIZE)


def test_every_fault_has_its_turn_before_one_comes_again() -> None:
    drawn = in_random_order(tuple(Kind), random.Random(1))
    rounds = [[next(drawn) for _ in Kind] for _ in range(2)]
    assert set(rounds[0]) == set(rounds[1]) == set(Kind)
    assert rounds[0] != rounds[1]


def test_a_resume_is_measured_from_the_fault_to_the_next_answer(tmp_path: Path) -> None:
    lines = [
        {"session": "a", "answer": 1, "asked_at": 9.0, "at": 9.5},
        {"session": "a", "answer": 2, "asked_at": 9.9, "at": 10.75},
        {"session": "b", "answer": 1, "asked_at": 10.5, "at": 11.0},
        {"session": "c", "note": "pauses", "at": 10.25},
        {"session": "c", "answer": 1, "asked_at": 14.0, "at": 14.5},
    ]
    (tmp_path / "client-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = resumes(tmp_path, [{"at": 10.0, "fault": "KILL", "held": ["a", "b", "c", "d"]}], "KILL")
    assert [(resume.after_s, resume.waited_s) for resume in found] == [(0.75, 0.75), (1.0, 0.5)]
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_a_session_is_found_by_its_id_and_nothing_else_is(plain: Rig) -> None:
    def places(port: int, client: int) -> dict[str, str]:
        with conveyor.connect(f"127.0.0.1:{port}") as connected:
            for number in range(20):
                name = f"place-{port}-{client}-{number}"
                connected.session(NAME, session_id=name, own_stream=True, detach_on_exit=True).detach()
        return {session: replica.name for replica in plain.replicas for session in _sessions(replica.port)}

    placed = places(plain.envoy.by_session, 1)
    assert len(set(placed.values())) == len(plain.replicas), "sessions are spread"
    with conveyor.connect(f"127.0.0.1:{plain.envoy.by_session}") as connected:
        for session in placed:
            connected.session(session_id=session, resume=True, own_stream=True).close()
    assert set(places(plain.envoy.round_robin, 2).values()) == {"r0", "r1", "r2"}


def _sessions(port: int) -> list[str]:
    with conveyor.connect(f"127.0.0.1:{port}") as connected:
        return [session.id for session in connected.sessions()]


def test_where_nothing_happens_the_parts_change_no_bit(plain: Rig, logs: Path) -> None:
    settings = Settings(seed=1, steps=25, pause_s=0.1, durable=False, idles=False)
    outcome = run(plain, settings, logs, Weather(kinds=()), link=plain.by_session, limit_s=100.0)
    assert outcome.verdict.good, outcome
    assert outcome.said == ""
    assert not outcome.faults
