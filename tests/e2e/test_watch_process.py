"""A real server watches its folder under traffic: a better model comes in, bad ones do not, and nobody notices."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import conveyor
import numpy as np
import onnx
import pytest
import torch
from conveyor.cli import main as cli
from conveyor_export import export
from conveyor_proto.spec import METADATA_KEY, dump_spec, parse_spec
from onnx import numpy_helper

from tests.e2e.conftest import FEATURES, Nets, Tagger, serving
from tests.e2e.test_workers import StartWorkers, start_workers

__all__ = ["start_workers"]

Change = Callable[[bytes], bytes]


def publish(folder: Path, content: bytes) -> None:
    """As docs/models.md says: written beside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".model.onnx"
    draft.write_bytes(content)
    draft.replace(folder / "model.onnx")


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_weights(content: bytes) -> bytes:
    """Whole, and described as it is; its vectors alone tell that it computes something else."""
    proto = onnx.load_model_from_string(content)
    weights = max(proto.graph.initializer, key=lambda item: len(item.raw_data))
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * 1.01, weights.name))
    return proto.SerializeToString()


def other_spec(content: bytes) -> bytes:
    """It describes an output of another size than it has."""
    proto = onnx.load_model_from_string(content)
    [prop] = [item for item in proto.metadata_props if item.key == METADATA_KEY]
    spec = parse_spec(prop.value)
    spec.outputs[0].shape[0] += 1
    prop.value = dump_spec(spec)
    return proto.SerializeToString()


BAD: dict[str, tuple[Change, str]] = {
    "3": (truncated, "is cut short"),
    "4": (other_weights, "differs by"),
    "5": (other_spec, "is not what its ModelSpec says"),
}


class Traffic:
    """One session that is stepped without a pause, by a thread and a client of its own."""

    def __init__(self, target: str, session_id: str) -> None:
        self.inputs: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []
        self._target, self._session_id = target, session_id
        self._stop = threading.Event()
        self._begun = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._begun.wait(20)

    def _run(self) -> None:
        rng = np.random.default_rng(5)
        try:
            with (
                conveyor.connect(self._target) as client,
                client.session("lstm", session_id=self._session_id, detach_on_exit=True) as session,
            ):
                while not self._stop.is_set():
                    self.inputs.append(rng.standard_normal(FEATURES).astype(np.float32))
                    self.answers.append(session.step(self.inputs[-1]))
                    self._begun.set()
        except BaseException as error:
            self.error = error
            self._begun.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)

    def check(self, client: conveyor.Client, version: str) -> None:
        """Every answer is that of a session that nothing happened to, to the bit."""
        assert len(self.answers) == len(self.inputs) > 20
        with client.session("lstm", version=version) as session:
            undisturbed = list(session.stream(np.array(self.inputs)))
        assert all(map(np.array_equal, self.answers, undisturbed))


@pytest.fixture
def later(tmp_path: Path) -> tuple[Tagger, bytes]:
    """Another model of the same form, and its file."""
    torch.manual_seed(8)
    module = Tagger("lstm").eval()
    file = tmp_path / "later.onnx"
    export(module, torch.zeros(2, 3, FEATURES), file, quiet=True)
    return module, file.read_bytes()


@pytest.fixture
def traffic() -> Iterator[Callable[[str, str], Traffic]]:
    running: list[Traffic] = []

    def begin(target: str, session_id: str) -> Traffic:
        running.append(Traffic(target, session_id))
        return running[-1]

    yield begin
    for item in running:
        item.stop()


def seen(client: conveyor.Client, version: str, condition: Callable[[conveyor.Model], object]) -> conveyor.Model:
    """The version, once it is so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for model in client.models():
            if model.version == version and condition(model):
                return model
        time.sleep(0.02)
    raise AssertionError(f"version {version} did not come to it: {client.models()}")


def test_a_good_model_is_swapped_in_under_traffic_and_bad_ones_are_not(
    nets: Nets, tmp_path: Path, later: tuple[Tagger, bytes], traffic: Callable[[str, str], Traffic]
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(nets.folder / "lstm" / "1", folder / "lstm" / "1")
    module, good = later
    with (
        serving(folder, tmp_path, "--watch", "0.05", "--max-sessions", "64") as server,
        conveyor.connect(server.target) as client,
    ):
        first = traffic(server.target, "first")
        publish(folder / "lstm" / "2", good)
        model = seen(client, "2", lambda model: model.status == "ready" and model.latest)
        assert model.checked_vectors == 4
        second = traffic(server.target, "second")
        for version, (change, _) in BAD.items():
            publish(folder / "lstm" / version, change(good))
        for version, (_, why) in BAD.items():
            assert why in seen(client, version, lambda model: model.status == "failed").failure
        # And in the place of a good one.
        for change, why in BAD.values():
            publish(folder / "lstm" / "2", change(good))
            model = seen(client, "2", lambda model, why=why: why in model.failure)
            assert (model.status, model.latest) == ("ready", True)
        publish(folder / "lstm" / "2", good)
        seen(client, "2", lambda model: not model.failure)
        # By hand, without a version: the highest in the folder, which is bad as before.
        assert cli.main(["models", "--target", server.target, "load", "lstm"]) == 1
        assert cli.main(["models", "--target", server.target, "load", "lstm", "--version", "2", "--reload"]) == 0
        first.stop()
        second.stop()
        assert (first.error, second.error) == (None, None)
        assert {session.id: session.version for session in client.sessions()} == {"first": "1", "second": "2"}
        first.check(client, "1")
        second.check(client, "2")
        with torch.no_grad():
            truth = module(torch.from_numpy(np.array(second.inputs))[None])[0].numpy()
        np.testing.assert_allclose(np.array(second.answers), truth, atol=1e-4)
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_each_worker_watches_by_itself(
    nets: Nets, tmp_path: Path, later: tuple[Tagger, bytes], start_workers: StartWorkers
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(nets.folder / "lstm" / "1", folder / "lstm" / "1")
    group = start_workers("--models", str(folder), "--watch", "0.05")
    group.workers(2)
    publish(folder / "lstm" / "2", later[1])
    group.heard(r"serving lstm/2 on cpu: .* checked by 4 verifier vectors", 2)
    shutil.rmtree(folder / "lstm" / "1")
    group.heard(r"lstm/1 is served no more: its file is gone", 2)
