"""What waits to be written on a stream of the asyncio transport."""

import asyncio

import pytest
from conveyor_server.transport.outbox import Outbox, StreamFailed
from google.rpc import code_pb2, status_pb2

pytestmark = pytest.mark.asyncio(loop_factories=["aio"])


async def test_messages_leave_in_order_and_none_after_the_last() -> None:
    box = Outbox(100)
    for message in (b"a", b"bb", b""):
        box.put(message)
    box.close()
    box.put(b"late")
    assert (len(box), box.bytes) == (3, 3)
    assert [await box.take() for _ in range(5)] == [b"a", b"bb", b"", None, None]
    assert (len(box), box.bytes) == (0, 0)


async def test_whoever_takes_waits_for_a_message_or_the_end() -> None:
    box = Outbox(100)
    for put, expected in ((lambda: box.put(b"x"), b"x"), (box.close, None)):
        taking = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        assert not taking.done()
        put()
        assert await asyncio.wait_for(taking, 20) == expected


async def test_there_is_room_up_to_the_limit_and_again_below_it() -> None:
    box = Outbox(4)
    box.put(b"1234")
    await asyncio.wait_for(box.room(), 20)
    box.put(b"5")
    waiting = asyncio.create_task(box.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await box.take() == b"1234"
    await asyncio.wait_for(waiting, 20)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_failure_comes_before_what_is_queued_and_stays(waits) -> None:
    box = Outbox(100)
    taking = asyncio.create_task(box.take()) if waits else None
    await asyncio.sleep(0)
    if not waits:
        box.put(b"never sent")
    box.fail(status_pb2.Status(code=code_pb2.INTERNAL, message="the first"))
    box.fail(status_pb2.Status(code=code_pb2.ABORTED, message="a second"))
    for attempt in (taking, None):
        with pytest.raises(StreamFailed, match=r"^the first$") as caught:
            await (attempt or box.take())
        assert caught.value.status.code == code_pb2.INTERNAL
