"""Steps on their way: as many as may be, answered in order, never one pulled that cannot be sent."""

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from conveyor._core.ticket import Ticket
from conveyor._io.base import Source


class _Sent(Protocol):
    @property
    def ticket(self) -> Ticket[Any]: ...


I = TypeVar("I")  # noqa: E741 - an item
O = TypeVar("O")  # noqa: E741 - its outcome
S = TypeVar("S", bound=_Sent)


async def pipeline(
    source: Source[I],
    *,
    send: Callable[[I], Awaitable[S | None]],
    may_send: Callable[[int], bool],
    answer: Callable[[S], Awaitable[O]],
    pending: deque[S],
) -> AsyncGenerator[O, None]:
    """Yields the outcome of each item of `source`, in order.

    Args:
        source: where items come from; closed at the end.
        send: sends one, once `may_send` said so; None: it was not sent, because something pending has failed.
        may_send: whether one more may be sent, given how many are pending.
        answer: waits for the outcome of one that was sent.
        pending: what is on its way; the caller's, to look into after an error.
    """
    exhausted = False
    try:
        while True:
            while pending and (pending[0].ticket.done or exhausted or not may_send(len(pending))):
                yield await answer(pending.popleft())
            if exhausted:
                return
            # An answer that comes while the source takes its time is handed out first.
            pulled = await source.pull(pending[0].ticket if pending else None)
            exhausted = pulled == ()
            for item in pulled or ():
                sent = await send(item)
                if sent is not None:
                    pending.append(sent)
    finally:
        await source.close()
