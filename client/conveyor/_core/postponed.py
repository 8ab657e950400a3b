"""What was refused for now, and when to ask for it again: each handle by itself, on the stream that is open.

Invariant: a handle's time runs from its first refusal until it is answered; a refusal of one costs no other anything.
"""

from collections.abc import Iterable, Mapping

from conveyor._core.member import Member
from conveyor._core.retry import Backoff, RetryPolicy
from conveyor.errors import ConnectionLost, ConveyorError, Draining, StoreUnavailable


def gave_up(error: ConveyorError, bound_s: float) -> ConveyorError:
    """The error for whoever waited for so long in vain."""
    text = f"gave up after {bound_s:g} s without an answer: {error}"
    kind = type(error) if isinstance(error, (Draining, StoreUnavailable)) else ConnectionLost
    return kind(text, reason=error.reason, code=error.code, metadata=error.metadata, retry_s=error.retry_s)


class Postponed:
    """One stream's handles that were refused something for now."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        # Refused since the last `schedule`.
        self._fresh: dict[int, ConveyorError] = {}
        self._due: dict[int, float] = {}
        self._backoffs: dict[int, Backoff] = {}

    def __bool__(self) -> bool:
        """Some handle waits to be answered after a refusal."""
        return bool(self._backoffs)

    @property
    def fresh(self) -> bool:
        """`schedule` has something to do."""
        return bool(self._fresh)

    def concerns(self, handles: range) -> bool:
        """One of these waits to be answered after a refusal."""
        return any(handle in handles for handle in self._backoffs)

    def add(self, handle: int, error: ConveyorError) -> None:
        """A handle was refused something, and shall ask again: once for all that it was refused."""
        if handle not in self._due:
            self._fresh[handle] = error

    def schedule(self, members: Mapping[int, Member], now_s: float, chance: float) -> None:
        """Says when those that were added shall ask again.

        Args:
            members: who holds the handles.
            now_s: any clock that does not go back.
            chance: 0 to 1, drawn anew for each call.
        """
        fresh, self._fresh = self._fresh, {}
        for handle, error in fresh.items():
            member = members.get(handle)
            if member is None or member.gone:
                continue
            backoff = self._backoffs.setdefault(handle, Backoff(self._policy))
            if member.opened.done:
                backoff.bound_s = self._policy.total_s
            at_least_s = error.retry_s or 0.0
            delay_s = backoff.failed(now_s, chance, at_least_s=at_least_s) if member.busy else None
            if delay_s is None:
                if member.busy:
                    member.give_up(handle, gave_up(error, backoff.bound_s))
                # Nobody waits now, so there is no haste; and who comes later has all his time before him.
                backoff.restart()
                delay_s = max(at_least_s, self._policy.longest_s)
            self._due[handle] = now_s + delay_s

    def take_due(self, now_s: float) -> list[int]:
        """Those whose time has come."""
        due = [handle for handle, at_s in self._due.items() if at_s <= now_s]
        for handle in due:
            del self._due[handle]
        return due

    def next_s(self, now_s: float) -> float | None:
        """Seconds until `take_due` gives something; None: nothing is due."""
        return max(0.0, min(self._due.values()) - now_s) if self._due else None

    def progressed(self, handles: Iterable[int]) -> None:
        """They were answered: their next refusal is a first one."""
        for handle in handles:
            self._backoffs.pop(handle, None)

    def stream_ended(self) -> None:
        """The next stream is asked for everything anyway."""
        self._fresh.clear()
        self._due.clear()

    def forget(self, handles: Iterable[int]) -> None:
        """They are free."""
        for handle in handles:
            for table in (self._fresh, self._due, self._backoffs):
                table.pop(handle, None)
