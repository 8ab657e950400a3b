"""Silero VAD, a file that nobody exported with Conveyor: adopted by the command, served, and streamed real speech.

The truth is the wrapper that its makers publish with it, one stream after the other; served together, all bits are its.
"""

import concurrent.futures
import re
import subprocess
import sys
from pathlib import Path

import conveyor
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpcclient
from conveyor.cli.main import main
from foreign import Graph, cell
from silero import Silero, fetch
from triton_user import Replies, answer, given

SESSIONS, STEPS = 24, 50
ADOPT = ["--window", "input=64", "--shape", "input=512"]


@pytest.fixture(scope="module")
def silero() -> Silero:
    return fetch()


@pytest.fixture(scope="module")
def streams(silero: Silero) -> np.ndarray:
    """Speech from different places of one recording: `[sessions, time steps, 512]`."""
    speech = silero.speech()
    starts = np.linspace(0, len(speech) - STEPS, SESSIONS).astype(int)
    return np.stack([speech[start : start + STEPS] for start in starts])


@pytest.fixture(scope="module")
def truth(silero: Silero, streams: np.ndarray) -> np.ndarray:
    """`[sessions, time steps, 1]`."""
    wrapper = silero.wrapper()
    answers = np.stack([wrapper.run(steps) for steps in streams])
    assert answers.max() > 0.95, "somebody speaks"
    assert answers.min() < 0.05, "and pauses"
    return answers


def adopt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "conveyor.cli.main", "adopt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def models(silero: Silero, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file as most use it, one whose batch is fixed at 1, one without state, and one that says too little."""
    folder = tmp_path_factory.mktemp("models")
    constant = ("--constant", "sr=16000")
    done = adopt(silero.onnx(), "--models", folder, "--name", "vad", *ADOPT, *constant, "--batch-axis", "input=0")
    assert done.returncode == 0, done.stderr
    assert "Proved: 256 sessions, 2560 time steps in batches of 1, 2, 3, 5, 8, 16, 32, 64, 128, 256, and" in done.stdout
    assert "the same bits." in done.stdout
    done = adopt(silero.onnx("silero_vad_openvino_16k.onnx"), "--models", folder, "--name", "vad-one", *ADOPT)
    assert done.returncode == 0, done.stderr
    assert "Row by row: the file fixes input float32 [1, 576], state float32 [2, 1, 128]." in done.stdout
    done = adopt(
        *(silero.onnx("silero_vad_16k_sequence.onnx"), "--models", folder, "--name", "vad-hc"),
        *("--window", "input=64@1", "--time-axis", "input=0"),
    )
    assert done.returncode == 0, done.stderr
    plain = Graph()
    plain.input("x", np.float32, ["N", 4])
    plain.output(plain.node("ReduceMax", ["x"], "y", axes=[1]), np.float32, ["N", 1])
    plain.save(folder / "plain" / "1" / "model.onnx")
    cell(["a"], ["b"]).save(folder / "unsaid" / "1" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, transport: str):
    from tests.e2e.conftest import serving

    with serving(models, tmp_path_factory.mktemp("server"), "--transport", transport) as server:
        yield server


def test_the_documents_show_what_is_written(models: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "adopt.md").read_text()
    assert (models / "vad" / "model.yaml").read_text() in page


def test_what_cannot_be_guessed_is_asked(silero: Silero, tmp_path: Path) -> None:
    done = adopt(silero.onnx(), "--models", tmp_path)
    assert done.returncode == 2
    assert "nothing is guessed, so 3 questions first" in done.stderr
    assert "sr int64 [] has no axis of rows, so it is the same for all: --constant sr=VALUE" in done.stderr
    assert not list(tmp_path.iterdir())
    assert done.stderr in (Path(__file__).resolve().parents[2] / "docs" / "adopt.md").read_text()


def test_many_sessions_at_different_places_at_once(server, streams: np.ndarray, truth: np.ndarray) -> None:
    """Each is stepped by a thread of its own, so that every run has another company."""
    with conveyor.connect(server.target) as client:

        def follow(index: int) -> np.ndarray:
            with client.session("vad") as session:
                return np.array(list(session.stream(streams[index])))

        with concurrent.futures.ThreadPoolExecutor(SESSIONS) as pool:
            answers = np.stack(list(pool.map(follow, range(SESSIONS))))
    assert answers.tobytes() == truth.tobytes()
    assert 'conveyor_batch_rows_count{model="vad"' in server.get("/metrics")[1]


def test_in_chunks_and_one_by_one(server, streams: np.ndarray, truth: np.ndarray) -> None:
    with conveyor.connect(server.target) as client, client.session("vad") as session:
        parts = [session.step(streams[0][:7]), session.step(streams[0][7])[np.newaxis], session.step(streams[0][8:])]
    assert np.concatenate(parts).tobytes() == truth[0].tobytes()


def test_a_population_that_comes_and_goes(server, streams: np.ndarray, truth: np.ndarray) -> None:
    rng, at = np.random.default_rng(4), np.zeros(SESSIONS, int)
    with conveyor.connect(server.target) as client, client.population("vad", SESSIONS) as population:
        while (at < STEPS).any():
            rows = rng.permutation(np.flatnonzero(at < STEPS))[: rng.integers(1, SESSIONS + 1)]
            answers = population.step(streams[rows, at[rows]], rows=rows.tolist())
            assert answers.tobytes() == truth[rows, at[rows]].tobytes()
            at[rows] += 1


def test_a_snapshot_holds_the_window_too(server, streams: np.ndarray, truth: np.ndarray) -> None:
    with conveyor.connect(server.target) as client, client.session("vad") as session:
        session.step(streams[3][:20])
        with client.restore(session.snapshot()) as again:
            assert again.step(streams[3][20:]).tobytes() == truth[3, 20:].tobytes()


def by_hand(file: Path, steps: np.ndarray, **states: tuple[int, ...]) -> np.ndarray:
    """Plain onnxruntime on a file whose batch is 1, with the 64 samples in front: `[time steps]`.

    Args:
        file: its first output is the answer, the others are the states' new values, in the order of `states`.
        steps: of one stream.
        states: shapes of the states by graph input.
    """
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    values = {name: np.zeros(shape, np.float32) for name, shape in states.items()}
    before, answers = np.zeros((1, 64), np.float32), []
    for step in steps:
        x = np.concatenate([before, step[np.newaxis]], axis=1)
        y, *new = session.run(None, {"input": x, **values})
        values, before = dict(zip(states, new, strict=True)), x[:, -64:]
        answers.append(y.ravel())
    return np.concatenate(answers)


@pytest.mark.parametrize(
    ("name", "file", "states"),
    [
        ("vad-one", "silero_vad_openvino_16k.onnx", {"state": (2, 1, 128)}),
        ("vad-hc", "silero_vad_16k_sequence.onnx", {"h": (1, 1, 128), "c": (1, 1, 128)}),
    ],
)
def test_a_batch_fixed_at_one_is_served_row_by_row(name, file, states, server, silero: Silero, streams, capsys) -> None:
    """One has its state in one tensor, one in two of the same shape."""
    truth = np.stack([by_hand(silero.onnx(file), steps, **states) for steps in streams[:4]])
    with conveyor.connect(server.target) as client, client.population(name, 4) as population:
        answers = np.array([population.step(streams[:4, at]).ravel() for at in range(STEPS)]).T
        (model,) = (item for item in client.models() if item.name == name)
    assert answers.tobytes() == truth.tobytes()
    assert (model.spec.max_rows, model.spec.max_time_steps_per_run) == (1, 1)
    pairs = {state.input_name: state.output_name for state in model.spec.states if state.input_name in states}
    assert pairs == ({"h": "hn", "c": "cn"} if name == "vad-hc" else {"state": "stateN"})
    assert main(["models", "--target", server.target]) == 0
    (bounds,) = re.findall(rf"^{name} +1 +(\d.*)$", capsys.readouterr().out, re.MULTILINE)
    assert bounds.startswith("1 (its most)  1 (its most)  ")
    log = server.log.read_text()
    assert f"{name}: adopted as model.yaml says: states " in log
    assert "row by row, because it says `batch: one`" in log
    assert "max_batch 1 (the model's most), quantum 1 (the model's most)" in log


def test_beside_it_a_file_without_state_and_one_that_says_too_little(server) -> None:
    with conveyor.connect(server.target) as client:
        with client.session("plain") as session:
            assert session.step(np.array([1, 5, 2, 3], np.float32)).tolist() == [5]
        with pytest.raises(conveyor.ConveyorError) as caught, client.session("unsaid") as session:
            session.step(np.zeros(1, np.float32))
    assert "cannot be served: model.onnx has no conveyor.spec" in str(caught.value)
    assert "write its model.yaml with `conveyor adopt unsaid/1/model.onnx`" in str(caught.value)


def test_another_protocols_client_with_all_streams_in_one(server, streams: np.ndarray, truth: np.ndarray) -> None:
    """The unmodified tritonclient: sequences that begin one after the other and end while others are under way."""
    replies, got = Replies(), np.full(truth.shape, np.nan, np.float32)
    with grpcclient.InferenceServerClient(server.target) as client:
        (item,) = client.get_model_metadata("vad").inputs
        assert (item.name, item.datatype, list(item.shape)) == ("input", "FP32", [-1, 512])
        client.start_stream(replies)
        for now in range(STEPS + SESSIONS):
            for index in range(SESSIONS):
                at = now - index
                if not 0 <= at < STEPS:
                    continue
                client.async_stream_infer(
                    "vad",
                    given(streams[index, at][np.newaxis], "input"),
                    request_id=f"{index}-{at}",
                    sequence_id=index + 1 if index % 2 else f"stream-{index}",
                    sequence_start=at == 0,
                    sequence_end=at == STEPS - 1,
                )
        for _ in range(SESSIONS * STEPS):
            result, error = replies.either()
            assert error is None, error
            index, at = map(int, result.get_response().id.split("-"))
            got[index, at] = answer(result)[0]
        client.stop_stream()
        call = []
        for at, step in enumerate(streams[0]):
            told = client.infer("vad", given(step[np.newaxis], "input"), sequence_id="call", sequence_start=at == 0)
            call.append(answer(told)[0])
    assert got.tobytes() == truth.tobytes()
    assert np.stack(call).tobytes() == truth[0].tobytes()
