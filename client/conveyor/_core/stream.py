"""One stream shared by many sessions: dispatches by handle, survives cuts, knows when to try again and when to stop.

Invariant: every member hears of each stream's beginning and end, so what it believes to be on the server is what it
has sent since the last beginning. Messages are written in order; steps are made into messages when they are written, so
that those of many sessions share one.
"""

from collections.abc import Callable

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.frame import decode_frame
from conveyor._core.gather import gather
from conveyor._core.member import Member, Stepper
from conveyor._core.retry import PASSING, Backoff, RetryPolicy, is_cut
from conveyor.errors import ClientClosed, ConnectionLost, ConveyorError, Draining, ProtocolError, from_rpc_status


class StreamCore:
    """The client's half of one stream, through all its reconnections. Every call is under one lock.

    Attributes:
        open: a stream is open.
        finishing: this stream takes nothing more: half-close it, and open another when it has ended.
        closed: the client was closed; nothing is opened again.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.open = False
        self.finishing = False
        self.closed = False
        self._outgoing: list[pb.StreamRequest] = []
        # Who has steps to send, in the order in which they came.
        self._ready: dict[Stepper, None] = {}
        self._members: dict[int, Member] = {}
        self._next_handle = 1
        self._backoff = Backoff(policy)
        # Steps were unanswered when the stream was lost: being attached again is no progress, only answers are.
        self._owes_answers = False
        self._resting = False
        # An answer has come since the stream was lost last.
        self._progresses = False
        # Why this stream had to be ended, where a refusal is why.
        self._refusal: ConveyorError | None = None

    # ------------------------------------------------------------ asked by the client

    @property
    def member_count(self) -> int:
        """Handles in use."""
        return len(self._members)

    @property
    def wanted(self) -> bool:
        """A stream should be open. After giving up, only for somebody who waits."""
        if self.closed or not self._members:
            return False
        return not self._resting or any(member.busy for member in set(self._members.values()))

    def reserve(self, count: int) -> range:
        """Fresh handles; none is used twice in the life of a client."""
        if self.closed:
            raise ClientClosed("the client is closed")
        first, self._next_handle = self._next_handle, self._next_handle + count
        return range(first, first + count)

    def add(self, member: Member) -> None:
        """Puts a member on the stream, now or with the next one."""
        for handle in member.handles:
            self._members[handle] = member
        if self.open and not self.finishing:
            member.attach()

    def send(self, request: pb.StreamRequest) -> None:
        """Queues a message of a member; drops it where the stream takes no more, as the next one starts afresh."""
        if self.open and not self.finishing:
            self._outgoing.append(request)

    def offer(self, stepper: Stepper) -> None:
        """Asks a member for steps when the next message is written; not where the stream takes no more."""
        if self.open and not self.finishing:
            self._ready[stepper] = None

    @property
    def has_outgoing(self) -> bool:
        """There is something to be written, or the stream is to be half-closed."""
        return bool(self._outgoing or self._ready or self.finishing or self.closed)

    def take_outgoing(self) -> list[pb.StreamRequest]:
        """What is to be written now, in order."""
        if not self._outgoing and not self._ready:
            return []
        outgoing, self._outgoing = self._outgoing, []
        while self._ready:
            ready, self._ready = self._ready, {}
            outgoing += gather([parcel for stepper in ready if (parcel := stepper.take()) is not None])
            # What a member has to say behind its steps.
            outgoing += self._outgoing
            self._outgoing.clear()
        return outgoing

    def close(self, error: ConveyorError) -> None:
        """Ends every member with `error`."""
        self.closed = True
        for member in list(self._each()):
            member.end(error)
        self._members.clear()

    def forget_if_gone(self, member: Member) -> None:
        """Frees the handles of a member that has ended."""
        if member.gone:
            for handle in member.handles:
                self._members.pop(handle, None)

    # ------------------------------------------------------------ told by the wire

    def opened(self) -> None:
        """A new stream is open: everybody attaches."""
        self.open = True
        self.finishing = False
        self._resting = False
        for member in list(self._each()):
            member.attach()

    def receive(self, message: pb.StreamResponse) -> None:
        """Handles one message from the server.

        Raises:
            ProtocolError: the message makes no sense; the stream cannot be trusted any more.
        """
        kind = message.WhichOneof("kind")
        handler = self._HANDLERS.get(kind or "")
        if handler is None:
            raise ProtocolError(f"the server sent a message of a kind that this version does not know: {kind}")
        handler(self, message)

    def lost(self, error: ConveyorError, now_s: float, chance: float) -> float | None:
        """The stream has ended, in order or not.

        Args:
            error: how it ended.
            now_s: any clock that does not go back.
            chance: 0 to 1, drawn anew for each call.

        Returns:
            Seconds to wait before opening the next one; None: it was given up, and whoever waited was told.
        """
        self.open = self._progresses = False
        self._outgoing.clear()
        self._ready.clear()
        for member in list(self._each()):
            member.suspend()
        self._drop_gone()
        self._owes_answers = any(member.unanswered for member in self._each())
        if self._refusal is not None:
            # The stream was ended because of it, so that is what to say, and what to wait for.
            error, self._refusal = self._refusal, None
        hint_s = error.retry_s or 0.0
        if isinstance(error, ProtocolError) or not is_cut(error.code, error.reason):
            self._give_up(error)
            return None
        delay_s = self._backoff.failed(now_s, chance, at_least_s=hint_s)
        if delay_s is None:
            text = f"gave up after {self._backoff.bound_s:g} s without an answer: {error}"
            kind = Draining if isinstance(error, Draining) else ConnectionLost
            self._give_up(kind(text, reason=error.reason, code=error.code, metadata=error.metadata))
        return delay_s

    # ------------------------------------------------------------ messages

    def _attached(self, message: pb.StreamResponse) -> None:
        member = self._members.get(message.attached.handle)
        if member is not None:
            member.attached(message.attached)
            if not self._owes_answers:
                self._backoff.progressed()
            self.forget_if_gone(member)

    def _result(self, message: pb.StreamResponse) -> None:
        self._progressed()
        member = self._members.get(message.result.handle)
        if member is not None:
            member.result(message.result)

    def _frame(self, message: pb.StreamResponse) -> None:
        self._progressed()
        frame = decode_frame(message.frame)
        if not frame.rows:
            return
        member = self._members.get(int.from_bytes(frame.handle_bytes[:4], "little"))
        if member is not None and member.owns(frame):
            member.rows(frame, None)
            self.forget_if_gone(member)
            return
        shares: dict[Member, list[int]] = {}
        for row, handle in enumerate(frame.handles.tolist()):
            if (member := self._members.get(handle)) is not None:
                shares.setdefault(member, []).append(row)
        for member, rows in shares.items():
            member.rows(frame, rows)
            self.forget_if_gone(member)

    def _error(self, message: pb.StreamResponse) -> None:
        self._refused(message.error.handle, message.error.seq, from_rpc_status(message.error.status))

    def _errors(self, message: pb.StreamResponse) -> None:
        refused = decode_frame(pb.ResultFrame(handles=message.errors.handles, seqs=message.errors.seqs))
        error = from_rpc_status(message.errors.status)
        for handle, seq in zip(refused.handles.tolist(), refused.seqs.tolist(), strict=True):
            self._refused(handle, seq, error)

    def _refused(self, handle: int, seq: int, error: ConveyorError) -> None:
        member = self._members.get(handle)
        if member is None:
            if handle == 0 and not self.finishing:
                raise ProtocolError(f"the server refused a message: {error}", reason=error.reason, code=error.code)
            return
        if member.failed(handle, seq, error):
            if error.reason in PASSING:
                self._refusal = error
            self._finish()
        elif seq:
            self._progressed()
        self.forget_if_gone(member)

    def _detached(self, message: pb.StreamResponse) -> None:
        member = self._members.get(message.detached.handle)
        if member is not None:
            member.detached(message.detached)
            self.forget_if_gone(member)

    def _go_away(self, _message: pb.StreamResponse) -> None:
        self._finish()

    def _end(self, _message: pb.StreamResponse) -> None:
        self._finish()

    _HANDLERS: dict[str, Callable[["StreamCore", pb.StreamResponse], None]] = {  # noqa: RUF012 - never changed
        "attached": _attached,
        "result": _result,
        "frame": _frame,
        "error": _error,
        "errors": _errors,
        "detached": _detached,
        "go_away": _go_away,
        "end": _end,
    }

    # ------------------------------------------------------------ helpers

    def _each(self) -> dict[Member, None]:
        """The members, each once, in the order in which they came."""
        return dict.fromkeys(self._members.values())

    def _progressed(self) -> None:
        if not self._progresses:
            self._progresses = True
            self._owes_answers = False
            self._backoff.progressed()

    def _finish(self) -> None:
        if not self.finishing:
            self.finishing = True
            for member in list(self._each()):
                member.hold()

    def _give_up(self, error: ConveyorError) -> None:
        self._resting = True
        self._backoff.restart()
        for member in list(self._each()):
            member.abandon(error)
        self._drop_gone()

    def _drop_gone(self) -> None:
        for member in list(self._each()):
            self.forget_if_gone(member)
