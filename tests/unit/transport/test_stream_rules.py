"""A stream's rules as a client meets them: attach, step, detach, close, half-close, and refusals that harm no other."""

from conveyor_proto.v1 import session_pb2 as pb

RESUME = pb.AttachSession.MODE_RESUME


async def test_attach_step_and_half_close(server) -> None:
    stream = server.stream()
    attached = await stream.attached(7, "a")
    assert not attached.resumed
    assert (attached.session.session_id, attached.session.model, attached.session.epoch) == ("a", "sum", 1)
    assert attached.session.attached
    assert await stream.answer(7, 1, 1.0) == [11.0]
    assert await stream.answer(7, 2, 1.0, 2.0) == [12.0, 14.0]
    await stream.end()
    assert server.directory.sessions["a"].attachment is None
