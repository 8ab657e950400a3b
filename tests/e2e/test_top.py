"""`conveyor top` against real servers: once, as scripts have it, and in a terminal, as people do."""

import contextlib
import hashlib
import json
import os
import pty
import select
import subprocess
import sys
import threading

import conveyor
import numpy as np
import pytest

ONE = np.zeros(4, np.float32)


def top(*arguments):
    command = [sys.executable, "-W", "error", "-m", "conveyor.cli.main", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextlib.contextmanager
def stepping(target, name):
    """A session that steps until the end."""
    ended = threading.Event()

    def step():
        with conveyor.connect(target) as client, client.session("lstm", session_id=name) as session:
            while not ended.is_set():
                session.step(ONE)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(20)


def test_one_look_at_two_servers_says_what_they_do(start_server, tmp_path):
    stored = start_server("--store", f"sqlite:{tmp_path / 's.db'}", "--checkpoint-ms", "20")
    plain = start_server()
    where = [each for server in (stored, plain) for each in ("--target", server.target)]
    where += [each for server in (stored, plain) for each in ("--metrics", f"127.0.0.1:{server.metrics_port}")]
    with stepping(stored.target, "stored-one"), stepping(plain.target, "plain-one"):
        with conveyor.connect(plain.target) as client, pytest.raises(conveyor.SessionNotFound):
            client.session(session_id="nobody", resume=True)
        done = top("--json", "--interval", "1", *where)
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert [server["health"] for server in shown["servers"]] == ["serving", "serving"]
    assert [server["store"] for server in shown["servers"]] == ["ok", "none"]
    assert all(server["steps_per_s"] > 0 and server["resident_bytes"] > 0 for server in shown["servers"])
    models = {model["name"]: model for model in shown["models"]}
    assert set(models) == {"lstm", "gru", "rnn", "speller"}
    lstm = models["lstm"]
    assert (lstm["status"], lstm["sessions"]) == ("ready", 2)
    assert lstm["steps_per_s"] == pytest.approx(sum(server["steps_per_s"] for server in shown["servers"]))
    assert sum(lstm["batches"].values()) == pytest.approx(1.0)
    assert 0 < lstm["run_p50_s"] <= lstm["run_p99_s"]
    assert {session["id"] for session in shown["sessions"]} == {"stored-one", "plain-one"}
    assert all(session["steps_per_s"] > 0 for session in shown["sessions"])
    assert shown["store"]["written_per_s"] > 0
    assert shown["errors"]["SESSION_NOT_FOUND"][1] == 1


def test_a_server_that_is_not_there_is_said_and_the_other_is_shown(start_server):
    server = start_server()
    page = f"127.0.0.1:{server.metrics_port}"
    done = top(
        "--once",
        "--interval",
        "0.2",
        "--target",
        server.target,
        "--target",
        "127.0.0.1:1",
        "--metrics",
        page,
        "--metrics",
        "none",
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(server.target in line and "serving" in line for line in lines)
    assert any("127.0.0.1:1 " in line and "away" in line for line in lines)
    assert any(line.startswith("lstm") and "ready cpu" in line for line in lines)


def test_who_may_observe_sees_all_and_others_are_told_why_not(start_server, tmp_path):
    file = tmp_path / "access.toml"
    digest = hashlib.sha256(b"eyes").hexdigest()
    file.write_text(f'[[tokens]]\nname = "eyes"\nsha256 = "{digest}"\ntenant = "*"\nroles = ["observe"]\n')
    server = start_server("--access", str(file))
    where = ("--target", server.target, "--metrics", f"127.0.0.1:{server.metrics_port}", "--interval", "0.2")
    refused = json.loads(top("--json", *where).stdout)["servers"][0]
    assert (refused["health"], refused["steps_per_s"]) == ("serving", None)
    assert any("CALLER_UNKNOWN" in trouble for trouble in refused["troubles"])
    assert any("401, the call shows no token" in trouble for trouble in refused["troubles"])
    (tmp_path / "token").write_text("eyes\n")
    seen = json.loads(top("--json", "--token-file", str(tmp_path / "token"), *where).stdout)
    assert (seen["servers"][0]["steps_per_s"], seen["servers"][0]["troubles"]) == (0, [])
    assert len(seen["models"]) == 4


def test_keys_in_a_terminal(start_server):
    server = start_server()
    parent, child = pty.openpty()
    command = [sys.executable, "-W", "error", "-m", "conveyor.cli.main", "top", "--interval", "60"]
    command += ["--target", server.target, "--metrics", f"127.0.0.1:{server.metrics_port}"]
    sized = {**os.environ, "COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=sized) as process:
        os.close(child)
        for key, shown in ((b"", b"by: active"), (b"s", b"by: idle"), (b" ", b"PAUSED"), (b"+", b"every 30 s")):
            os.write(parent, key)
            assert shown in _read_until(parent, shown)
        os.write(parent, b"q")
        _read_until(parent, None)
        assert process.wait(20) == 0
    os.close(parent)


def _read_until(parent, words):
    """What the terminal gets until it has got `words`; None: until nobody writes to it any more."""
    seen = b""
    while words is None or words not in seen:
        assert select.select([parent], [], [], 30)[0], seen
        try:
            seen += os.read(parent, 65536)
        except OSError:
            # Linux says so when the other end is closed.
            break
    return seen
