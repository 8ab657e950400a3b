"""The server of the transport's tests, spoken to in the Open Inference Protocol."""

import asyncio
import contextlib

import grpc.aio
import numpy as np
import pytest
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.runner.base import Run, RunResult

from tests.unit.transport.conftest import (
    RUNNERS,
    SumRunner,
    make_server,
    pytest_asyncio_loop_factories,
    server,
    store,
    until,
)

__all__ = ["make_server", "pytest_asyncio_loop_factories", "server", "store", "until"]
SERVICE = "/inference.GRPCInferenceService/"


class PlainRunner(SumRunner):
    """Twice `x`, and `x` summed over its two columns: a model without state."""

    def __init__(self, capacity: int, digest: str, *, timed: bool = False) -> None:
        super().__init__(capacity, digest, timed=timed)
        self.spec = spec_pb2.ModelSpec(spec_version=1, name="plain", digest=digest)
        self.spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2])
        self.spec.outputs.add(name="twice", dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2])
        self.spec.outputs.add(name="sum", dtype=tensor_pb2.DATA_TYPE_FLOAT32)

    def step(self, run: Run) -> RunResult:
        self.entered.set()
        assert self.gate.wait(20)
        (x,) = run.inputs
        self.rows.append(len(x))
        return RunResult([2 * x, x.sum(axis=1)], np.ones(len(x), np.bool_))

    def read_rows(self, slots):
        return []

    def write_rows(self, slots, states) -> None:
        assert not states


RUNNERS["plain"] = PlainRunner


def request(
    *values: float,
    sequence: int | str | None = None,
    start: bool = False,
    end: bool = False,
    model: str = "sum",
    shape: tuple[int, ...] | None = None,
    **fields: object,
) -> pb.ModelInferRequest:
    """A request of the model `sum`: one time step for each value."""
    message = pb.ModelInferRequest(model_name=model, **fields)
    message.inputs.add(name="x", datatype="FP64", shape=shape or (1, len(values), 1))
    message.raw_input_contents.append(np.array(values, np.float64).tobytes())
    if isinstance(sequence, str):
        message.parameters["sequence_id"].string_param = sequence
    elif sequence is not None:
        message.parameters["sequence_id"].int64_param = sequence
    if start:
        message.parameters["sequence_start"].bool_param = True
    if end:
        message.parameters["sequence_end"].bool_param = True
    return message


def totals(response: pb.ModelInferResponse) -> list[float]:
    """`total` of each time step; the other output is the last of them."""
    total, last = (np.frombuffer(raw, np.float64) for raw in response.raw_output_contents)
    assert [output.name for output in response.outputs] == ["total", "last"]
    assert last.tolist() == total[-1:].tolist()
    return total.tolist()


class Client:
    """Calls by bytes: no stub, and no other client's messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def call(self, method: str, message: object):
        kind = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method].output_type.name
        answer = getattr(pb, kind)
        stub = self.channel.unary_unary(
            SERVICE + method,
            request_serializer=lambda item: item.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return await asyncio.wait_for(stub(message), 20)

    async def infer(self, *values: float, **fields: object) -> pb.ModelInferResponse:
        return await self.call("ModelInfer", request(*values, **fields))

    async def refused(self, message: pb.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call("ModelInfer", message)
        return caught.value.code(), caught.value.details()

    def stream(self, *metadata: tuple[str, str]) -> "Stream":
        return Stream(self.channel, metadata)


class Stream:
    """A ModelStreamInfer call, message by message."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.call = channel.stream_stream(
            SERVICE + "ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )(metadata=metadata)

    async def send(self, *values: float, **fields: object) -> None:
        await self.call.write(request(*values, **fields))

    async def receive(self) -> pb.ModelStreamInferResponse:
        response = await asyncio.wait_for(self.call.read(), 20)
        assert response is not grpc.aio.EOF, "the stream ended"
        return response

    async def answer(self) -> tuple[str, list[float] | str]:
        """The id of the next response, and its totals or its error."""
        response = await self.receive()
        assert response.infer_response.parameters["triton_final_response"].bool_param
        if response.error_message:
            return response.infer_response.id, response.error_message
        return response.infer_response.id, totals(response.infer_response)

    async def end(self) -> None:
        await self.call.done_writing()
        await self.ended(grpc.StatusCode.OK)

    async def ended(self, code: grpc.StatusCode) -> str:
        """Nothing more comes; returns what the status says."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert await asyncio.wait_for(self.call.read(), 20) is grpc.aio.EOF
        assert await self.call.code() is code
        return await self.call.details()


@pytest.fixture
async def client(server) -> Client:
    return Client(server.channel)


@pytest.fixture
def connect_to():
    return lambda server: Client(server.channel)
