"""What a server does only where its settings allow it: answer by the transport alone, and run a model that is none."""

import grpc
import numpy as np
import pytest
from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb

PATH = "/conveyor.v1.SessionService/Stream"


def raw(server, *metadata: tuple[str, str]) -> grpc.aio.StreamStreamCall:
    """A Stream call of bytes."""
    return server.channel.stream_stream(PATH)(metadata=metadata)


@pytest.fixture
async def diagnosed(make_server, wire_options):
    return await make_server(wire=wire_options(diagnostics=True))


async def test_an_echo_sends_every_message_back_as_it_came(diagnosed) -> None:
    call = raw(diagnosed, ("conveyor-diagnostics", "echo"))
    for message in (b"", b"\x12\x00", b"no message of any kind", b"x" * 100_000):
        await call.write(message)
        assert await call.read() == message
    assert diagnosed.metrics.streams == 1
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await diagnosed.no_streams()


async def test_an_echo_ends_when_the_server_drains(diagnosed) -> None:
    call = raw(diagnosed, ("conveyor-diagnostics", "echo"))
    await call.write(b"x")
    assert await call.read() == b"x"
    now = diagnosed.driver.now()
    assert await diagnosed.grpc.drain(now + 20.0, now)
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(("allowed", "value"), [(False, "echo"), (True, "ECHO"), (True, "")])
async def test_others_are_served_as_any(make_server, wire_options, allowed, value) -> None:
    """A server that does not allow it, and a stream that asks for something else."""
    server = await make_server(wire=wire_options(diagnostics=allowed))
    call = raw(server, ("conveyor-diagnostics", value))
    attach = pb.AttachSession(handle=1, mode=pb.AttachSession.MODE_CREATE, model="sum")
    await call.write(pb.StreamRequest(attach=attach).SerializeToString())
    assert pb.StreamResponse.FromString(await call.read()).HasField("attached")
    call.cancel()


async def test_a_twin_of_each_model_runs_nothing(diagnosed) -> None:
    models = (await diagnosed.models.ListModels(model_pb2.ListModelsRequest())).models
    assert [model.name for model in models] == ["other", "other.null", "sum", "sum.null"]
    stream = diagnosed.stream()
    attached = await stream.attached(1, model="sum.null")
    assert attached.session.state_bytes == 0
    for seq in (1, 2):
        assert await stream.answer(1, seq, 1.0, 2.0) == [0.0, 0.0]
    await stream.frame([1], [3], [[1.0]])
    frame = await stream.expect("frame")
    assert np.frombuffer(frame.columns[0], np.float64).tolist() == [0.0]
    assert diagnosed.runner.rows == []
    # Its sessions keep to all rules.
    await stream.step(1, 5, 1.0)
    assert (await stream.fault())[2].reason_name == "STEP_GAP"
    await stream.end()


async def test_a_server_without_diagnostics_has_no_twins(server) -> None:
    models = (await server.models.ListModels(model_pb2.ListModelsRequest())).models
    assert [model.name for model in models] == ["other", "sum"]
