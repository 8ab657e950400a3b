"""What the real server refuses a tritonclient, in words that its users search for; and what a refusal leaves alone."""

import dataclasses
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from by_hand import ByHand
from triton_user import WAIT_S, Replies, answer, given, refused
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import FEATURES, serving

X = np.random.default_rng(29).standard_normal((8, FEATURES)).astype(np.float32)
MOST = 1000
INVALID, NOT_FOUND = "INVALID_ARGUMENT", "NOT_FOUND"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A request, beside a live sequence 1 of the model, and what it is told."""

    status: str
    texts: tuple[str, ...]
    x: np.ndarray = dataclasses.field(default_factory=lambda: X[:1])
    name: str = "x"
    model: str = "lstm"
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"sequence_id": 1})

    @property
    def request(self) -> dict[str, Any]:
        return {"model_name": self.model, "inputs": given(self.x, self.name), **self.options}


def in_memory():
    tensor = grpcclient.InferInput("x", [1, FEATURES], "FP32")
    tensor.set_shared_memory("region", 16)
    return [tensor]


TABLE = {
    "no start": Refusal(
        INVALID,
        ("sequence 12", "'lstm'", "must specify the START flag on the first request of the sequence"),
        options={"sequence_id": 12},
    ),
    "no id": Refusal(INVALID, ("must specify a non-zero or non-empty correlation ID",), options={}),
    "a long id": Refusal(INVALID, ("correlation ID", "128"), options={"sequence_id": "n" * 129}),
    "batch": Refusal(
        INVALID, ("must specify batch-size 1 due to requirements of sequence batcher",), X[:2].reshape(2, 1, FEATURES)
    ),
    "input name": Refusal(INVALID, ("unexpected inference input 'nope' for model 'lstm'", "'x'"), name="nope"),
    "no input": Refusal(
        INVALID,
        ("expected 1 inputs but got 0 inputs for model 'lstm'", "'x'"),
        options={"sequence_id": 1, "inputs": []},
    ),
    "features": Refusal(
        INVALID,
        ("unexpected shape for input 'x' for model 'lstm'", "[1,-1,4] or [-1,4]", "[1,5]"),
        np.zeros((1, 5), np.float32),
    ),
    "axes": Refusal(INVALID, ("unexpected shape for input 'x'",), X[:1].reshape(1, 1, 1, FEATURES)),
    "datatype": Refusal(
        INVALID, ("'x' data-type is 'FP64', but model 'lstm' expects 'FP32'",), X[:1].astype(np.float64)
    ),
    "strings": Refusal(
        INVALID, ("'x' data-type is 'BYTES', but model 'lstm' expects 'FP32'",), np.full((1, 4), b"text", np.object_)
    ),
    "no time steps": Refusal(INVALID, ("'x'", "time step"), X[:0]),
    "too many time steps": Refusal(INVALID, ("'x'", str(MOST)), np.zeros((MOST + 1, FEATURES), np.float32)),
    "not finite": Refusal(INVALID, ("'x'",), np.full((1, FEATURES), np.nan, np.float32)),
    "output": Refusal(
        INVALID,
        ("unexpected inference output 'nope' for model 'lstm'", "'output'"),
        options={"sequence_id": 1, "outputs": [grpcclient.InferRequestedOutput("nope")]},
    ),
    "classes": Refusal(
        "UNIMPLEMENTED",
        ("'classification' is not supported",),
        options={"sequence_id": 1, "outputs": [grpcclient.InferRequestedOutput("output", class_count=2)]},
    ),
    "shared memory": Refusal(
        "UNIMPLEMENTED",
        ("'shared_memory_region' is not supported",),
        options={"sequence_id": 1, "inputs": in_memory()},
    ),
    "model": Refusal(NOT_FOUND, ("Request for unknown model: 'nope' is not found",), model="nope"),
    "version": Refusal(
        NOT_FOUND,
        ("Request for unknown model: 'lstm' is not found", "9"),
        options={"sequence_id": 12, "sequence_start": True, "model_version": "9"},
    ),
    "version of a live sequence": Refusal(
        INVALID, ("sequence 1", "version 1", "version 9"), options={"sequence_id": 1, "model_version": "9"}
    ),
}


@pytest.fixture(scope="module")
def target(nets, tmp_path_factory, transport):
    """One server of each transport for the table."""
    with serving(
        nets.folder, tmp_path_factory.mktemp("server"), "--transport", transport, "--max-time-steps", str(MOST)
    ) as server:
        yield server


@pytest.fixture
def client(target):
    with grpcclient.InferenceServerClient(target.target) as client:
        yield client


@pytest.fixture(scope="module")
def hand(nets):
    return ByHand(nets.folder / "lstm" / "1" / "model.onnx")


def goes_on(client, hand):
    """The live sequence 1, which has had X[:1], answers X[1:2] as if nothing had been between."""
    got = answer(client.infer("lstm", given(X[1:2]), sequence_id=1, sequence_end=True))
    np.testing.assert_array_equal(got, hand.run([X[:1], X[1:2]])[1], strict=True)


@pytest.mark.parametrize("end", [False, True], ids=["", "with-end"])
@pytest.mark.parametrize("refusal", TABLE.values(), ids=TABLE.keys())
def test_a_call_that_cannot_be_served_says_why_and_moves_nothing(client, hand, refusal, end):
    client.infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    with refused(refusal.status, *refusal.texts):
        client.infer(**refusal.request, sequence_end=end)
    goes_on(client, hand)


@pytest.mark.parametrize("refusal", TABLE.values(), ids=TABLE.keys())
def test_in_a_stream_the_error_belongs_to_its_request_and_the_stream_goes_on(client, hand, refusal):
    replies = Replies()
    client.start_stream(replies)
    client.async_stream_infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    client.async_stream_infer(**refusal.request)
    client.async_stream_infer("lstm", given(X[1:2]), sequence_id=1, sequence_end=True)
    told = [replies.either() for _ in range(3)]
    client.stop_stream()
    ((position, error),) = ((position, error) for position, (_, error) in enumerate(told) if error is not None)
    # In the order of the sequence's requests; a refusal of another sequence, or of none, waits for nobody.
    assert position == 1 or refusal.options.get("sequence_id") != 1 or refusal.model != "lstm"
    for text in refusal.texts:
        assert text in error.message()
    got = [answer(result) for result, _ in told if result is not None]
    for one, want in zip(got, hand.run([X[:1], X[1:2]]), strict=True):
        np.testing.assert_array_equal(one, want, strict=True)


def test_an_error_in_a_stream_bears_the_id_of_its_request(target):
    request = service_pb2.ModelInferRequest(model_name="lstm", id="which")
    request.parameters["sequence_id"].int64_param = 13
    with grpc.insecure_channel(target.target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (reply,) = stub.ModelStreamInfer(iter([request]), timeout=WAIT_S)
    assert "START flag" in reply.error_message
    assert reply.infer_response.id == "which"
    assert reply.infer_response.parameters["triton_final_response"].bool_param is True


NONSENSE = {
    "more than was sent": ([1, 1 << 40, FEATURES], b"\0" * 16, "1099511627776 time steps and one step takes"),
    "an overflow": ([1 << 32, 1 << 32, FEATURES], b"", "must specify batch-size 1"),
    "none of more than there can be": ([0, 1 << 62, FEATURES], b"", "must specify batch-size 1"),
    "more axes than an array has": ([1] * 100, b"\0" * 4, "unexpected shape"),
    "negative": ([-1, FEATURES], b"\0" * 16, "unexpected shape"),
    "nothing": ([], b"\0" * 4, "unexpected shape"),
}


@pytest.mark.parametrize(("shape", "raw", "text"), NONSENSE.values(), ids=NONSENSE.keys())
def test_a_shape_that_the_bytes_do_not_have(target, client, hand, shape, raw, text):
    client.infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    request = service_pb2.ModelInferRequest(model_name="lstm", raw_input_contents=[raw])
    request.parameters["sequence_id"].int64_param = 1
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    with grpc.insecure_channel(target.target) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in caught.value.details()
    goes_on(client, hand)


def test_bytes_that_are_no_request_end_their_stream_and_nothing_else(target, client, hand):
    client.infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    with grpc.insecure_channel(target.target) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b"\xff\xff\xff"]), timeout=WAIT_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no ModelInferRequest" in caught.value.details()
    goes_on(client, hand)


def test_a_stream_that_asks_for_statuses_ends_with_the_first_error(client, hand):
    replies = Replies()
    client.start_stream(replies, headers={"triton_grpc_error": "true"})
    client.async_stream_infer("lstm", given(X[:1]), sequence_id=1, sequence_start=True)
    np.testing.assert_array_equal(answer(replies.result()), hand.run([X[:1]])[0], strict=True)
    client.async_stream_infer("lstm", given(X[:1]), sequence_id=14)
    error = replies.error()
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "must specify the START flag" in error.message()
    with pytest.raises(InferenceServerException, match="no longer in valid state"):
        client.async_stream_infer("lstm", given(X[:1]), sequence_id=1)
    client.stop_stream()
    goes_on(client, hand)


def test_a_sequence_that_ended_is_not_begun_again_unasked(client):
    client.infer("lstm", given(X[:1]), sequence_id=15, sequence_start=True, sequence_end=True)
    with refused(INVALID, "must specify the START flag", "It was here and is gone", "closed"):
        client.infer("lstm", given(X[:1]), sequence_id=15)
