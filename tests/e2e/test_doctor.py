"""`conveyor doctor` as a program: beside a server that serves, and of one that could not."""

import json
import subprocess
import sys

import conveyor
import numpy as np
from conveyor_server.doctor.checks import CHECKS


def doctor(*flags):
    code = "import sys; from conveyor_server.doctor.command import command; sys.exit(command(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *flags], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_beside_a_server_that_serves(start_server, nets, tmp_path):
    store = f"sqlite:{tmp_path / 's.db'}"
    server = start_server("--store", store)
    asked = ("--models", str(nets.folder), "--port", str(server.port), "--metrics-port", str(server.metrics_port))
    with conveyor.connect(server.target) as client, client.session("lstm", session_id="mine") as session:
        first = session.step(np.ones(4, np.float32))
        status, out, error = doctor("--json", "--store", store, "--max-sessions", "50", *asked)
        rows = json.loads(out)
        assert (status, error) == (max(row["level"] == "warning" for row in rows), ""), "a slow disk is to be looked at"
        assert {row["check"] for row in rows} == set(CHECKS)
        told = [row["what"] for row in rows]
        assert sum("in use by a conveyor that runs" in what for what in told) == 2
        assert sum(what.startswith(("lstm/1:", "gru/1:", "rnn/1:", "speller/1:")) for what in told) == 4
        assert [session.id for session in client.sessions()] == ["mine"], "nothing is left in the store"
        assert (session.step(np.ones(4, np.float32)) != first).any()
        session.flush()
    assert server.stop() == 0


def test_of_a_server_that_could_not_serve(tmp_path):
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "1" / "model.onnx").write_bytes(b"nonsense")
    (tmp_path / "chain.pem").write_text("nonsense")
    flags = {
        "models": tmp_path / "models",
        "tls-certificate": tmp_path / "chain.pem",
        "tls-key": tmp_path / "key.pem",
        "access": tmp_path / "access.toml",
        "device": "cuda",
        "store": f"sqlite:{tmp_path / 'gone' / 's.db'}",
        "host": "192.0.2.1",
        "max-sessions": 1_000_000,
    }
    status, out, error = doctor(*(f"--{name}={value}" for name, value in flags.items()))
    assert (status, error) == (2, "")
    broken = {line.split()[1] for line in out.splitlines() if line.startswith("FIX ")}
    assert broken == {"ports", "certificates", "access", "models", "device", "store"}
    assert [line.split()[1] for line in out.splitlines() if line.startswith("LOOK ")].count("limits") == 1
    for line, following in zip(out.splitlines(), out.splitlines()[1:], strict=False):
        if line.startswith(("FIX ", "LOOK ")):
            assert following.strip().startswith("-> ")
