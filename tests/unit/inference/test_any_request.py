"""Whatever a message holds: it is answered once, with a response or a refusal of its own, and the sequence goes on."""

import random

import numpy as np
import pytest
from conveyor_proto.inference import service_pb2 as pb
from google.protobuf.message import DecodeError

from tests.unit.inference.conftest import request, totals
from tests.unit.transport.test_intake import FIRST

SIZES = [-1, 0, 1, 1, 1, 2, 3, 65, 1 << 31, 1 << 62]


def any_request(choose: random.Random) -> pb.ModelInferRequest:
    """A good request with some of it made otherwise."""
    message = request(*[1.0] * choose.choice([1, 1, 3]), sequence=choose.choice([7, 8, "text"]), id="any")
    for _ in range(choose.randrange(4)):
        tensor = choose.choice(message.inputs) if message.inputs else message.inputs.add()
        kind = choose.randrange(11)
        if kind == 0:
            del tensor.shape[:]
            tensor.shape.extend(choose.choice(SIZES) for _ in range(choose.choice([0, 1, 2, 3, 4, 70])))
        elif kind == 1:
            tensor.datatype = choose.choice(["", "FP64", "FP32", "BYTES", "INT8", "x" * 5000])
        elif kind == 2:
            tensor.name = choose.choice(["", "x", "y", "\n"])
        elif kind == 3:
            message.raw_input_contents.append(choose.randbytes(choose.choice([0, 1, 8, 24])))
        elif kind == 4:
            del message.raw_input_contents[:]
        elif kind == 5:
            field = choose.choice(["fp64_contents", "fp32_contents", "int_contents", "bool_contents"])
            getattr(tensor.contents, field).extend([1] * choose.choice([0, 1, 3]))
        elif kind == 6:
            message.inputs.add().CopyFrom(tensor)
        elif kind == 7:
            message.outputs.add(name=choose.choice(["total", "last", "", "z"]))
        elif kind == 8:
            name = choose.choice(["sequence_id", "sequence_start", "sequence_end", "timeout", "priority", "mine"])
            parameter = message.parameters[name]
            setattr(parameter, *choose.choice([("bool_param", True), ("int64_param", -5), ("string_param", "a b")]))
        elif kind == 9:
            message.model_version = choose.choice(["", "1", "2", "-1", "v" * 5000])
        else:
            message.model_name = choose.choice(["", "sum", "plain", "other", "m" * 5000])
    return message


def cut(choose: random.Random, message: pb.ModelInferRequest) -> pb.ModelInferRequest | None:
    """The message with some bytes changed; None: it is none any more."""
    data = bytearray(message.SerializeToString())
    for _ in range(choose.randrange(1, 4)):
        data[choose.randrange(len(data))] = choose.randrange(256)
    try:
        return pb.ModelInferRequest.FromString(bytes(data))
    except DecodeError:
        return None


@pytest.mark.parametrize("seed", range(4))
async def test_any_request_is_answered_once_and_harms_no_other(client, server, seed) -> None:
    choose = random.Random(seed)
    server.add_model("plain")
    await server.loader.load("plain")
    await client.infer(1.0, sequence=5, start=True)
    stream = client.stream()
    sent = 0
    for _ in range(500):
        message = any_request(choose)
        if choose.random() < 0.3:
            message = cut(choose, message)
        if message is not None:
            await stream.call.write(message)
            sent += 1
    for _ in range(sent):
        response = await stream.receive()
        assert "incident" not in response.error_message, response.error_message
        assert len(response.error_message) < 6000
        for output, raw in zip(
            response.infer_response.outputs, response.infer_response.raw_output_contents, strict=True
        ):
            assert len(raw) == np.prod(list(output.shape), dtype=int) * {"FP64": 8, "FP32": 4}[output.datatype]
    await stream.end()
    assert totals(await client.infer(1.0, sequence=5)) == [FIRST + 2]
    assert not server.driver.failed.done()
    assert not server.metrics.errors["INTERNAL"]
