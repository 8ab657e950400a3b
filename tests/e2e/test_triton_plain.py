"""tritonclient against the real server with a model without state that another tool wrote: batches in and out."""

import itertools

import conveyor
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpcclient
from onnx import TensorProto, helper, numpy_helper
from triton_user import Replies, answer, given, refused

from tests.e2e.conftest import serving

HIDDEN = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of 6 numbers in, scores of 3 out, by a layer that is large enough for others to come while it runs."""
    rng = np.random.default_rng(5)
    sizes = (6, HIDDEN, HIDDEN, 3)
    nodes, weights, value = [], [], "row"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        matrix = rng.standard_normal((rows, columns)) / np.sqrt(rows)
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"linear{layer}"]))
        value = "score" if layer == len(sizes) - 2 else f"hidden{layer}"
        nodes.append(helper.make_node("Tanh", [f"linear{layer}"], [value]))
    graph = helper.make_graph(
        nodes,
        "scorer",
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder = tmp_path_factory.mktemp("models")
    (folder / "scorer" / "1").mkdir(parents=True)
    onnx.save(model, folder / "scorer" / "1" / "model.onnx")
    return folder


@pytest.fixture
def server(folder, tmp_path, transport):
    with serving(folder, tmp_path, "--transport", transport, "--max-sessions", "1000") as server:
        yield server


@pytest.fixture
def client(server):
    with grpcclient.InferenceServerClient(server.target) as client:
        yield client


def test_a_model_without_state_has_the_axes_of_its_file(client):
    metadata = client.get_model_metadata("scorer")
    assert [(item.name, list(item.shape)) for item in metadata.inputs] == [("row", [-1, 6])]
    assert [(item.name, list(item.shape)) for item in metadata.outputs] == [("score", [-1, 3])]
    config = client.get_model_config("scorer").config
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert [(item.name, list(item.dims)) for item in config.input] == [("row", [6])]
    assert [(item.name, list(item.dims)) for item in config.output] == [("score", [3])]


@pytest.mark.parametrize(
    ("shape", "texts"),
    [((0, 6), ("a batch of at least 1", "got [0,6]")), ((6,), ("got [6]",)), ((2, 5), ("[-1,6]", "got [2,5]"))],
)
def test_a_shape_that_it_does_not_take_is_told_as_it_came(client, shape, texts):
    with refused("INVALID_ARGUMENT", "unexpected shape for input 'row' for model 'scorer'", *texts):
        client.infer("scorer", given(np.zeros(shape, np.float32), "row"))


def test_a_batch_that_is_larger_than_the_server_has_room_for(client):
    with refused("RESOURCE_EXHAUSTED", "no free sequence slot is available", "--max-sessions"):
        client.infer("scorer", given(np.zeros((1001, 6), np.float32), "row"))
    whole = client.infer("scorer", given(np.zeros((1000, 6), np.float32), "row"))
    assert answer(whole, "score").shape == (1000, 3)


def test_statistics_count_requests_and_their_rows(client):
    for size in (4, 1, 7):
        client.infer("scorer", given(np.zeros((size, 6), np.float32), "row"))
    with refused("INVALID_ARGUMENT", "unexpected inference input"):
        client.infer("scorer", given(np.zeros((1, 6), np.float32), "nope"))
    (told,) = client.get_inference_statistics("scorer").model_stats
    assert (told.inference_count, told.execution_count) == (12, 3)
    assert [(item.batch_size, item.compute_infer.count) for item in told.batch_stats] == [(1, 1), (4, 1), (7, 1)]
    assert (told.inference_stats.success.count, told.inference_stats.fail.count) == (3, 1)


def test_a_model_without_state_answers_batches_of_concurrent_calls(client, server, folder):
    """Rows of many callers share runs; each gets its own back, near what its batch gives alone."""
    alone = ort.InferenceSession(str(folder / "scorer" / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(6)
    batches = [rng.standard_normal((size, 6)).astype(np.float32) for size in rng.integers(1, 8, 200)]
    told = [Replies() for _ in batches]
    for batch, reply in zip(batches, told, strict=True):
        client.async_infer("scorer", given(batch, "row"), reply)
    for batch, reply in zip(batches, told, strict=True):
        got = answer(reply.result(), "score")
        (want,) = alone.run(["score"], {"row": batch})
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    (statistics,) = client.get_inference_statistics("scorer").model_stats
    rows = sum(map(len, batches))
    assert sum(item.batch_size * item.compute_infer.count for item in statistics.batch_stats) == rows
    assert statistics.inference_count == rows
    assert statistics.execution_count < len(batches)
    assert max(item.batch_size for item in statistics.batch_stats) > 7
    with conveyor.connect(server.target) as sdk:
        helpers = [info.id for info in sdk.sessions("scorer")]
    assert helpers
    assert all(name.startswith("scorer:row:") for name in helpers)
