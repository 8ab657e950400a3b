"""tritonclient against the real server: what it is told of models, what it loads and unloads."""

import json
import shutil
import time

import conveyor
import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from by_hand import ByHand
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from triton_user import Replies, answer, given, scripts
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import FEATURES, serving

X = np.random.default_rng(37).standard_normal((8, FEATURES)).astype(np.float32)


@pytest.fixture
def folder(nets, tmp_path):
    """A models folder of the test's own."""
    for kind in ("lstm", "gru"):
        shutil.copytree(nets.folder / kind, tmp_path / "models" / kind)
    return tmp_path / "models"


@pytest.fixture
def server(folder, tmp_path, transport):
    with serving(folder, tmp_path, "--transport", transport, "--max-sessions", "500") as server:
        yield server


@pytest.fixture
def client(server):
    with grpcclient.InferenceServerClient(server.target) as client:
        yield client


def index(client):
    return {(item.name, item.version): item.state for item in client.get_model_repository_index().models}


def test_the_server_and_its_models_are_described(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    server = client.get_server_metadata()
    assert (server.name, server.version) == ("conveyor", conveyor.__version__)
    assert {"sequence", "statistics", "model_configuration", "model_repository"} <= set(server.extensions)
    assert client.is_model_ready("lstm")
    assert client.is_model_ready("lstm", "1")
    assert not client.is_model_ready("lstm", "2")
    assert not client.is_model_ready("nope")
    assert client.get_model_metadata("lstm", as_json=True) == {
        "name": "lstm",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "-1", "4"]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": ["-1", "-1", "3"]}],
    }
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.get_model_metadata("nope")


def test_a_configuration_has_the_settings_in_force(client, nets):
    config = client.get_model_config("lstm").config
    assert (config.name, config.backend, config.platform) == ("lstm", "onnxruntime", "onnxruntime_onnx")
    assert [(item.name, list(item.dims)) for item in config.input] == [("x", [-1, 4])]
    assert [(item.name, list(item.dims)) for item in config.output] == [("output", [-1, 3])]
    assert not config.model_transaction_policy.decoupled
    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds == 600_000_000
    assert batching.WhichOneof("strategy_choice") == "oldest"
    assert batching.oldest.max_candidate_sequences == 500
    assert not batching.control_input
    spec = ByHand(nets.folder / "lstm" / "1" / "model.onnx").spec
    assert [(item.input_name, item.output_name, list(item.dims)) for item in batching.state] == [
        (state.input_name, state.output_name, [16]) for state in spec.states
    ]
    assert config.parameters["conveyor_digest"].string_value == spec.digest
    assert 1 <= config.max_batch_size == batching.oldest.preferred_batch_size[0]


def test_statistics_count_what_was_done(client):
    began_ms = time.time_ns() // 1_000_000
    everyone = scripts(range(1, 9), FEATURES, seed=1)
    replies = Replies()
    client.start_stream(replies)
    sent = 0
    for position in range(max(len(script.steps) for script in everyone)):
        for script in everyone:
            if position < len(script.steps):
                client.async_stream_infer("lstm", **script.request(position))
                sent += 1
    for _ in range(sent):
        replies.result()
    for wrong in ({"sequence_id": 99}, {}):
        client.async_stream_infer("lstm", given(X[:1]), **wrong)
        replies.error()
    client.stop_stream()

    (told,) = client.get_inference_statistics("lstm").model_stats
    assert (told.name, told.version) == ("lstm", "1")
    assert told.inference_count == sent
    stats = told.inference_stats
    assert stats.success.count == stats.queue.count == stats.compute_input.count == sent
    assert stats.fail.count == 2
    assert min(stats.success.ns, stats.fail.ns, stats.compute_input.ns, stats.compute_infer.ns) > 0
    assert 1 <= told.execution_count == sum(item.compute_infer.count for item in told.batch_stats)
    # A chunk may take several runs, and never less than one row of one.
    assert sent <= sum(item.batch_size * item.compute_infer.count for item in told.batch_stats)
    assert max(item.batch_size for item in told.batch_stats) <= 8
    assert began_ms <= told.last_inference <= time.time_ns() // 1_000_000
    (untouched,) = client.get_inference_statistics("gru").model_stats
    assert (untouched.inference_count, untouched.execution_count, untouched.last_inference) == (0, 0, 0)
    assert [item.name for item in client.get_inference_statistics().model_stats] == ["gru", "lstm"]
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.get_inference_statistics("nope")


def test_statistics_count_steps_that_came_by_the_sdk_too(client, server):
    with conveyor.connect(server.target) as sdk, sdk.session("gru") as session:
        for x in X:
            session.step(x)
    (told,) = client.get_inference_statistics("gru").model_stats
    assert told.inference_count == told.execution_count == len(X)
    assert [(item.batch_size, item.compute_infer.count) for item in told.batch_stats] == [(1, len(X))]


def test_models_are_unloaded_and_loaded_and_their_sequences_are_told(client, folder, nets):
    hand = ByHand(nets.folder / "gru" / "1" / "model.onnx")
    client.infer("gru", given(X[:1]), sequence_id=1, sequence_start=True)
    client.unload_model("gru")
    assert not client.is_model_ready("gru")
    assert ("gru", "1") not in index(client)
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'gru' is not found"):
        client.infer("gru", given(X[1:2]), sequence_id=1)
    client.load_model("gru")
    assert index(client)["gru", "1"] == "READY"
    with pytest.raises(InferenceServerException, match=r"START flag.*It was here and is gone.*unloaded"):
        client.infer("gru", given(X[1:2]), sequence_id=1)
    got = answer(client.infer("gru", given(X[1:2]), sequence_id=1, sequence_start=True))
    np.testing.assert_array_equal(got, hand.run([X[1:2]])[0], strict=True)


def test_a_new_version_is_loaded_and_live_sequences_stay_on_theirs(client, folder, nets):
    old, new = (ByHand(nets.folder / kind / "1" / "model.onnx") for kind in ("lstm", "gru"))
    client.infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    shutil.copytree(folder / "gru" / "1", folder / "lstm" / "2")
    client.load_model("lstm")
    assert {key: state for key, state in index(client).items() if key[0] == "lstm"} == {
        ("lstm", "1"): "READY",
        ("lstm", "2"): "READY",
    }
    went_on = client.infer("lstm", given(X[1:2]), sequence_id=1)
    begun = client.infer("lstm", given(X[1:2]), sequence_id=2, sequence_start=True)
    by_version = client.infer("lstm", given(X[1:2]), model_version="1", sequence_id=3, sequence_start=True)
    assert [item.get_response().model_version for item in (went_on, begun, by_version)] == ["1", "2", "1"]
    np.testing.assert_array_equal(answer(went_on), old.run([X[:1], X[1:2]])[1], strict=True)
    np.testing.assert_array_equal(answer(begun), new.run([X[1:2]])[0], strict=True)
    np.testing.assert_array_equal(answer(by_version), old.run([X[1:2]])[0], strict=True)


def test_a_file_that_cannot_be_served_is_listed_with_the_reason(client, folder):
    broken = folder / "broken" / "1" / "model.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no model")
    with pytest.raises(InferenceServerException) as refused:
        client.load_model("broken")
    assert refused.value.status() == "StatusCode.FAILED_PRECONDITION"
    (listed,) = [item for item in client.get_model_repository_index().models if item.name == "broken"]
    assert listed.state == "UNAVAILABLE"
    assert listed.reason
    for call in (lambda: client.load_model("nope"), lambda: client.unload_model("nope")):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == "StatusCode.NOT_FOUND"


NOT_OFFERED = {
    "load parameters": lambda client: client.load_model("gru", config=json.dumps({"max_batch_size": 4})),
    "system memory": lambda client: client.get_system_shared_memory_status(),
    "register": lambda client: client.register_system_shared_memory("region", "/key", 16),
    "unregister": lambda client: client.unregister_system_shared_memory(),
    "cuda memory": lambda client: client.get_cuda_shared_memory_status(),
    "register cuda": lambda client: client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 16),
    "unregister cuda": lambda client: client.unregister_cuda_shared_memory(),
    "trace": lambda client: client.get_trace_settings(),
    "set trace": lambda client: client.update_trace_settings(settings={"trace_rate": "1"}),
    "log": lambda client: client.get_log_settings(),
    "set log": lambda client: client.update_log_settings({"log_verbose_level": 1}),
}


def test_what_is_not_offered_is_unimplemented_with_a_sentence(client):
    told = {}
    for name, call in NOT_OFFERED.items():
        with pytest.raises(InferenceServerException, match="not supported") as refused:
            call(client)
        told[name] = refused.value.status()
    assert told == dict.fromkeys(NOT_OFFERED, "StatusCode.UNIMPLEMENTED")


def test_the_service_is_found_by_reflection_and_has_its_own_health(server):
    with grpc.insecure_channel(server.target) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in found.get_services()
        file = found.FindFileContainingSymbol("inference.GRPCInferenceService")
        assert {"ModelInfer", "ModelStreamInfer"} <= {method.name for method in file.service[0].method}
        request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
