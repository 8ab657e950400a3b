"""The command line: what it prints, what it says when something is wrong, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import conveyor
import numpy as np
import pytest
from conveyor.cli import main as cli
from conveyor.cli.table import duration, size, table
from conveyor_proto.v1 import model_pb2


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def ran(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ran


@pytest.fixture
def at(grpc_server):
    return ("--target", grpc_server.target)


@pytest.fixture
def bring(monkeypatch):
    """Makes one command be brought by another part."""

    def brought(name, value):
        point = EntryPoint(name=name, value=value, group=cli.GROUP)
        monkeypatch.setattr(cli, "entry_points", lambda group: [point] if group == cli.GROUP else [])

    return brought


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("models", "sessions", "step", "serve", "export", "inspect"):
        assert f"\n    {command} " in out
    assert "130 interrupted" in out


def test_version(run):
    assert run("--version")[:2] == (0, f"conveyor {conveyor.__version__}\n")


def test_models(run, at):
    code, out, _ = run("models", *at)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["MODEL", "VERSION", "STATUS", "DEVICE", "SESSIONS", "STATE", "INPUTS", "OUTPUTS"]
    assert lines[1].startswith("sum    1 (latest)  ready   cpu")
    assert "x float32 [time, 2], token int64 [time], gain float32 []" in lines[2]
    assert len(lines) == 3, "a server that says no batch policy"
    code, out, _ = run("models", "--json", *at)
    assert [(model["name"], model["spec"]["inputs"][0]["shape"]) for model in json.loads(out)] == [
        ("sum", ["2"]),
        ("mix", ["2"]),
    ]


def test_the_batch_policy_of_models(run, at, grpc_server, monkeypatch):
    took = ((1, 1, 32e-6), (1, 16, 0.4e-3), (128, 1, 1.4e-3))
    policy = model_pb2.BatchPolicy(
        max_batch=128,
        quantum=16,
        max_batch_time_steps=256,
        inline_run_seconds=0.001,
        inline_rows=64,
        given=["inline_run_seconds", "quantum"],
        measured=[model_pb2.RunTime(rows=rows, time_steps=steps, seconds=seconds) for rows, steps, seconds in took],
    )
    bare = grpc_server._model

    def described(name):
        model = bare(name)
        if name == "sum":
            model.batch_policy.CopyFrom(policy)
        return model

    monkeypatch.setattr(grpc_server, "_model", described)
    lines = run("models", *at)[1].splitlines()
    assert [" ".join(line.split()) for line in lines[4:]] == [
        "MODEL VERSION MAX BATCH QUANTUM TIME STEPS INLINE SESSIONS: ONE RUN",
        "sum 1 128 16 (given) 256 up to 64 (given) 1: 32 us, 128: 1.4 ms",
    ], "of the one that has a policy"
    said, none = (model["batch_policy"] for model in json.loads(run("models", "--json", *at)[1]))
    assert (said["max_batch"], said["given"], none) == (128, ["inline_run_s", "quantum"], None)
    assert said["measured"][1] == {"rows": 1, "time_steps": 16, "run_s": 0.0004}


def test_sessions(run, at, grpc_server):
    assert run("sessions", *at)[1] == "no sessions\n"
    with conveyor.connect(grpc_server.target) as client, client.session("sum", session_id="seen") as s:
        s.step([1, 2])
        code, out, _ = run("sessions", *at)
        assert code == 0
        assert out.splitlines()[1].split()[:5] == ["seen", "sum", "1", "1", "0"]
        assert json.loads(run("sessions", "--json", *at)[1])[0]["applied_seq"] == 1
        assert run("sessions", "--model", "mix", *at)[1] == "no sessions\n"


def test_step_prints_each_answer(run, at, grpc_server):
    code, out, _ = run("step", "sum", "--input", "[1, 2]", *at)
    assert (code, out) == (0, "step 1 float32 [2]\n  [1. 2.]\n")
    code, out, _ = run("step", "sum", "--json", *at, stdin="[1, 2]\n\n[[1, 0], [1, 0]]\n")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"step": 1, "output": [1, 2]},
        {"step": 2, "output": [[2, 2], [3, 2]]},
    ]
    assert grpc_server.fake.sessions == {}


def test_a_named_session_is_kept(run, at, grpc_server):
    for expected in ("[1. 2.]", "[2. 4.]"):
        code, out, _ = run("step", "sum", "--session", "mine", "--input", "[1, 2]", *at)
        assert (code, out.splitlines()[1].strip()) == (0, expected)
    assert grpc_server.fake.sessions["mine"].applied == 2


def test_inputs_from_files_and_by_name(run, at, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    code, out, _ = run("step", "sum", "--file", str(tmp_path / "x.npy"), *at)
    assert code == 0
    assert out.startswith("step 1 float32 [3, 2]\n")
    np.savez(tmp_path / "x.npz", x=np.ones(2), token=np.array(5), gain=np.array(2.0))
    code, out, _ = run("step", "mix", "--file", str(tmp_path / "x.npz"), *at)
    assert out == "step 1 y float32 [2]\n  [2. 2.]\nstep 1 last int64 []\n  5\n"


@pytest.mark.parametrize(
    ("argv", "stdin", "code", "words"),
    [
        (["step", "nope", "--input", "[1]"], "", 1, "[MODEL_NOT_FOUND]"),
        (["step", "sum", "--input", "[1]"], "", 1, "float32 [2] for one time step"),
        (["step", "sum", "--input", "[1"], "", 2, "--input is not JSON"),
        (["step", "sum"], "[1, 2]\nnonsense\n", 2, "line 2 is not JSON"),
        (["step", "sum", "--file", "/does/not/exist.npy"], "", 2, "/does/not/exist.npy"),
        (["models", "--cert", "/does/not/exist.pem"], "", 2, "together"),
        (["models", "--ca", "/does/not/exist.pem"], "", 2, "/does/not/exist.pem"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, at, argv, stdin, code, words):
    got, _, err = run(*argv, *at, stdin=stdin)
    assert got == code
    assert words in err
    assert err.startswith("conveyor: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [[], ["nope"], ["models", "--timeout-s", "0"], ["step", "m", "--input", "1", "--file", "x"]]
)
def test_usage_errors_exit_2(run, argv):
    code, _, err = run(*argv)
    assert code == 2
    assert "usage: conveyor" in err


def test_no_server_is_told_soon(run):
    code, _, err = run("models", "--target", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in err


def test_the_target_comes_from_the_environment(run, grpc_server, monkeypatch):
    monkeypatch.setenv("CONVEYOR_TARGET", grpc_server.target)
    assert run("models")[0] == 0


def test_an_interrupt_exits_130(run, at, monkeypatch):
    class Interrupted(io.StringIO):
        def __next__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    monkeypatch.setattr(cli.commands, "_inputs", lambda arguments: iter(Interrupted()))
    assert run("step", "sum", *at)[0] == 130


def test_commands_of_other_parts_get_the_rest_of_the_line(run, bring, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "stand_in", lambda argv: seen.append(argv) or 7, raising=False)
    bring("bake", "conveyor.cli.main:stand_in")
    assert run("bake", "--hot", "x")[0] == 7
    assert seen == [["--hot", "x"]]
    assert "bake" in run("--help")[1]


@pytest.mark.parametrize(("name", "words"), [("serve", "pip install 'conveyor[server]'"), ("bake", "not installed")])
def test_a_part_that_is_not_installed_is_named(run, bring, name, words):
    bring(name, "no_such_package.anywhere:main")
    code, _, err = run(name)
    assert code == 2
    assert words in err


def test_a_reader_that_leaves_early_is_no_error(grpc_server):
    environment = os.environ | {"CONVEYOR_TARGET": grpc_server.target}
    code = f"{sys.executable} -m conveyor.cli.main models --json | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stderr == ""


def test_tables_are_aligned():
    assert table(("A", "LONG"), [("xx", 1), ("y", 100)], right=("LONG",)) == "A   LONG\nxx     1\ny    100"
    assert [size(n) for n in (0, 999, 1500, 2e6, 3e15)] == ["0 B", "999 B", "1.5 KB", "2 MB", "3e+03 TB"]
    assert [duration(s) for s in (0, 0.5, 90, 7200, 200_000)] == ["0 s", "0.5 s", "2 min", "2 h", "2 d"]
    assert [duration(s) for s in (32e-6, 1.43e-3, 0.0999)] == ["32 us", "1.43 ms", "99.9 ms"]
