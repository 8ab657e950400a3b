"""The demo and the small examples, whole, with a training that is too short to be any good."""

import re
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import conveyor
import pytest
import torch
from conveyor_export import package


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[Path]:
    """An empty current folder, from which the examples can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root))
    from examples import charlm, co2

    monkeypatch.setattr(charlm, "STEPS", 4)
    monkeypatch.setattr(co2, "STEPS", 4)
    threads, chance = torch.get_num_threads(), torch.get_rng_state()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_rng_state(chance)


def test_the_demo_tells_its_story_and_leaves_its_models(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from examples import demo
    from examples._demo.recipes import TOLERANCE

    assert demo.main() == 0
    first = capfd.readouterr()
    assert first.err == ""
    for what in (
        "1. Train",
        "2. Export",
        "3. Serve",
        "4. Stream text",
        "as last week",
        "conveyor_batch_rows",
        "Where to",
    ):
        assert what in first.out
    worst = [float(number) for number in re.findall(r"^  (?:charlm|co2), .* (\S+)$", first.out, re.MULTILINE)]
    assert len(worst) == 3
    assert max(worst) <= TOLERANCE
    for name in ("charlm", "co2"):
        spec, _ = package.read(folder / "models" / name / "1")
        assert spec.name == name

    assert demo.main() == 0
    second = capfd.readouterr()
    assert second.out.count("trained earlier") == 2
    assert "step 4 of" not in second.out


def test_models_are_prepared_once_and_streamed_to_until_it_is_enough(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples import prepare, traffic
    from examples._demo.server import Server

    models = folder / "models"
    prepare.prepare(models)
    capfd.readouterr()
    written = {path: path.stat().st_mtime_ns for path in models.rglob("model.onnx")}
    prepare.prepare(models)
    assert capfd.readouterr().out.count("already in") == len(written) == 2
    assert {path: path.stat().st_mtime_ns for path in models.rglob("model.onnx")} == written

    stop = threading.Event()
    asked: list[str] = []
    monkeypatch.setattr(traffic, "PACE_S", 0.001)
    for name in ("crowd", "reader"):
        one = getattr(traffic, name)

        def once(*given: object, name: str = name, one: Callable[..., int] = one) -> int:
            steps = one(*given)
            asked.append(name)
            # Both kinds were answered to their end: enough.
            if {"crowd", "reader"} <= set(asked):
                stop.set()
            return steps

        monkeypatch.setattr(traffic, name, once)
    with Server(models, folder / "log") as server:
        assert traffic.stream(server.target, stop) > 100


def test_a_demo_that_cannot_go_on_says_why_and_stops_its_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from examples import demo
    from examples._demo.server import Server

    broken = folder / "models" / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    started: list[Server] = []
    monkeypatch.setattr(demo, "Server", lambda *where: started.append(Server(*where)) or started[0])

    def fail(*_: object) -> float:
        raise conveyor.ModelNotFound("there is no charlm here")

    monkeypatch.setattr(demo, "stream_text", fail)
    assert demo.main() == 1
    said = capfd.readouterr()
    assert said.err.strip() == "demo: ModelNotFound: there is no charlm here"
    assert "Traceback" not in said.out
    assert started[0]._process.returncode == 0


def test_a_server_that_does_not_start_is_told_with_what_it_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from examples import demo

    monkeypatch.setenv("CONVEYOR_MAX_BATCH", "none")
    assert demo.main() == 1
    said = capfd.readouterr().err
    assert "the server exited with 2" in said
    assert "max_batch" in said


def test_the_quickstart_streams_from_a_running_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from examples._demo.server import Server

    connect = conveyor.connect
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "server.log") as server:
        monkeypatch.setattr(conveyor, "connect", lambda _: connect(server.target))
        runpy.run_module("examples.quickstart")
    difference = float(capfd.readouterr().out.strip().split()[-1])
    assert difference <= 1e-5


def test_another_servers_client_streams_from_a_running_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from examples._demo.server import Server

    connect = conveyor.connect
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "server.log") as server:
        monkeypatch.setattr(conveyor, "connect", lambda _: connect(server.target))
        runpy.run_module("examples.quickstart")
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["triton_client", server.target])
        runpy.run_module("examples.triton_client")
    counts, *sequences = capfd.readouterr().out.splitlines()
    # The quickstart's steps, and 50 of each sequence.
    assert counts.startswith("tagger has answered 250 steps in ")
    # Untrained, an LSTM: in company and alone, its answers are the same bits.
    assert sequences == [
        f"sequence {name!r}: 50 steps, largest difference from Conveyor's own client 0.0e+00"
        for name in ("kitchen", "garage", 7)
    ]
