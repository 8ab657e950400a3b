"""More than a turn takes."""

import asyncio

from conveyor_server.transport.completion import server as completion


async def test_no_event_is_lost_where_a_turn_takes_only_so_many(server, monkeypatch) -> None:
    """What is polled must be taken: a stream whose message or permission to send went astray waits forever."""
    monkeypatch.setattr(completion, "_MOST_EVENTS", 3)
    streams = [server.stream() for _ in range(40)]
    for stream in streams:
        await stream.attached(0)
    for seq in range(1, 9):
        answers = await asyncio.wait_for(asyncio.gather(*(stream.answer(0, seq, 1.0) for stream in streams)), 20)
        assert answers == [[10.0 + seq]] * len(streams)
    for stream in streams:
        await stream.end()
