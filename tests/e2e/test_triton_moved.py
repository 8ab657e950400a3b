"""A model of a Triton repository, moved over by `conveyor adopt --triton`: its client gets the answers that it got."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpcclient
from onnx import TensorProto, helper, numpy_helper
from triton_user import Replies, answer, given, interleaved, refused, scripts

from tests.e2e.conftest import serving

FEATURES, HIDDEN = 4, 8
CONFIG = """
name: "meter"
backend: "onnxruntime"
max_batch_size: 16
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  oldest { max_candidate_sequences: 64 max_queue_delay_microseconds: 1000 }
  state [
    {
      input_name: "h_in" output_name: "h_out" data_type: TYPE_FP32 dims: [ 8 ]
      initial_state { name: "zeros" data_type: TYPE_FP32 dims: [ 8 ] zero_data: true }
    }
  ]
}
instance_group [ { count: 2 kind: KIND_CPU } ]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A step of a plain recurrence: [batch, 4] and the state [batch, 8] in, [batch, 3] and the new state out."""
    rng = np.random.default_rng(8)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 2, name)
        for name, shape in (("w", (FEATURES, HIDDEN)), ("u", (HIDDEN, HIDDEN)), ("v", (HIDDEN, 3)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["driven"]),
        helper.make_node("MatMul", ["h_in", "u"], ["kept"]),
        helper.make_node("Add", ["driven", "kept"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_out"]),
        helper.make_node("MatMul", ["h_out", "v"], ["y"]),
    ]
    values = {"x": FEATURES, "h_in": HIDDEN, "y": 3, "h_out": HIDDEN}
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in values.items()
    }
    graph = helper.make_graph(
        nodes, "meter", [infos["x"], infos["h_in"]], [infos["y"], infos["h_out"]], initializer=weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder = tmp_path_factory.mktemp("triton")
    (folder / "meter" / "1").mkdir(parents=True)
    onnx.save(model, folder / "meter" / "1" / "model.onnx")
    (folder / "meter" / "config.pbtxt").write_text(CONFIG)
    return folder


@pytest.fixture
def server(repository, tmp_path, transport):
    models = tmp_path / "models"
    done = subprocess.run(
        [sys.executable, "-m", "conveyor.cli.main", "adopt", "--triton", repository / "meter", "--models", models],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with serving(models, tmp_path, "--transport", transport) as server:
        yield server


@pytest.fixture
def client(server):
    with grpcclient.InferenceServerClient(server.target) as client:
        yield client


@pytest.fixture
def by_hand(repository):
    session = ort.InferenceSession(str(repository / "meter" / "1" / "model.onnx"), providers=["CPUExecutionProvider"])

    def run(steps):
        state, answers = np.zeros((1, HIDDEN), np.float32), []
        for x in steps:
            y, state = session.run(["y", "h_out"], {"x": x, "h_in": state})
            answers.append(y)
        return answers

    return run


def test_its_sequences_over_a_stream_are_the_file_stepped_by_hand(client, by_hand):
    everyone = scripts([*range(1, 20), "a", "b"], FEATURES, seed=3)
    for script in everyone:
        script.steps = [row for chunk in script.steps for row in np.split(chunk, len(chunk))]
    plan = interleaved(everyone, seed=4)
    by_request = {f"{script.id!r}/{index}": script for script, index in plan}
    replies = Replies()
    client.start_stream(replies)
    for script, index in plan:
        client.async_stream_infer("meter", **script.request(index))
    for _ in plan:
        result = replies.result()
        by_request[result.get_response().id].answers.append(answer(result, "y"))
    client.stop_stream()
    for script in everyone:
        for got, want in zip(script.answers, by_hand(script.steps), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


def test_it_refuses_what_its_client_knows_to_be_refused(client):
    x = np.zeros((1, FEATURES), np.float32)
    with refused("INVALID_ARGUMENT", "must specify the START flag on the first request of the sequence"):
        client.infer("meter", given(x), sequence_id=5)
    with refused("INVALID_ARGUMENT", "must specify a non-zero or non-empty correlation ID"):
        client.infer("meter", given(x))
    with refused("INVALID_ARGUMENT", "unexpected shape for input 'x' for model 'meter'"):
        client.infer("meter", given(np.zeros((1, 5), np.float32)), sequence_id=5, sequence_start=True)


def test_its_axes_and_states_are_those_of_its_configuration(client):
    metadata = client.get_model_metadata("meter")
    assert [(item.name, list(item.shape)) for item in metadata.inputs] == [("x", [-1, 4])]
    assert [(item.name, list(item.shape)) for item in metadata.outputs] == [("y", [-1, 3])]
    config = client.get_model_config("meter").config
    assert [(item.name, list(item.dims)) for item in config.input] == [("x", [4])]
    assert [(item.name, list(item.dims)) for item in config.output] == [("y", [3])]
    (state,) = config.sequence_batching.state
    assert (list(state.dims), state.initial_state[0].zero_data) == ([8], True)
