"""One stream shared by many sessions: dispatches by handle, survives cuts, knows when to try again and when to stop.

Invariant: every member hears of each stream's beginning and end, so what it believes to be on the server is what it
has sent since the last beginning. Messages are written in order; steps are made into messages when they are written, so
that those of many sessions share one. What one member is refused for now is asked again for that one alone.
"""

from collections.abc import Callable, Sequence

from conveyor_proto.v1 import session_pb2 as pb

from conveyor._core.frame import Frame, decode_frame, decode_pairs
from conveyor._core.gather import gather
from conveyor._core.member import Leaving, Member, Stepper
from conveyor._core.postponed import Postponed, gave_up
from conveyor._core.retry import PASSING, Backoff, RetryPolicy, is_cut
from conveyor._core.ticket import Ticket
from conveyor.errors import ClientClosed, ConveyorError, ProtocolError, from_rpc_status


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
        self._postponed = Postponed(policy)
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

    def postpone(self, handle: int, error: ConveyorError) -> None:
        """Has a member ask again later for what a handle was refused now."""
        self._postponed.add(handle, error)

    @property
    def has_postponed(self) -> bool:
        """Somebody was refused something: `schedule` says when it is asked for again."""
        return self._postponed.fresh

    def schedule(self, now_s: float, chance: float) -> None:
        """Plans the next tries of those who were refused something; arguments as of `lost`."""
        self._postponed.schedule(self._members, now_s, chance)
        self._drop_gone()

    def retry(self, now_s: float) -> float | None:
        """Has those ask again whose time has come. Returns seconds until the next one's; None: there is none."""
        due: dict[Member, list[int]] = {}
        for handle in self._postponed.take_due(now_s):
            due.setdefault(self._members[handle], []).append(handle)
        for member, handles in due.items():
            member.retry(handles)
        return self._postponed.next_s(now_s)

    def retries(self, member: Member) -> bool:
        """The member was refused something for now, and waits to be answered."""
        return self._postponed.concerns(member.handles)

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

    def leave_unstored(self) -> list[Ticket[None]]:
        """Detaches from all sessions of which the server's store lacks steps; the tickets settle when that is done."""
        return [member.leave(Leaving.DETACH) for member in self._each() if member.unstored]

    def close(self, error: ConveyorError) -> None:
        """Ends every member with `error`."""
        self.closed = True
        for member in list(self._each()):
            member.end(error)
            self._postponed.forget(member.handles)
        self._members.clear()

    def forget_if_gone(self, member: Member) -> None:
        """Frees the handles of a member that has ended."""
        if member.gone:
            self._postponed.forget(member.handles)
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
        self._postponed.stream_ended()
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
            self._give_up(gave_up(error, self._backoff.bound_s))
        return delay_s

    # ------------------------------------------------------------ messages

    def _attached(self, message: pb.StreamResponse) -> None:
        member = self._members.get(message.attached.handle)
        if member is not None:
            owes = self._owes_answers or member.unanswered
            member.attached(message.attached)
            if not self._owes_answers:
                self._backoff.progressed()
            if not owes:
                self._postponed.progressed((message.attached.handle,))
            self.forget_if_gone(member)

    def _result(self, message: pb.StreamResponse) -> None:
        self._progressed()
        member = self._members.get(message.result.handle)
        if member is not None:
            member.result(message.result)
            if self._postponed:
                self._postponed.progressed((message.result.handle,))

    def _frame(self, message: pb.StreamResponse) -> None:
        self._progressed()
        frame = decode_frame(message.frame)
        if not frame.rows:
            return
        member = self._members.get(int.from_bytes(frame.handle_bytes[:4], "little"))
        if member is not None and member.owns(frame):
            self._rows(member, frame, None)
            return
        shares: dict[Member, list[int]] = {}
        for row, handle in enumerate(frame.handles.tolist()):
            if (member := self._members.get(handle)) is not None:
                shares.setdefault(member, []).append(row)
        for member, rows in shares.items():
            self._rows(member, frame, rows)

    def _rows(self, member: Member, frame: Frame, rows: Sequence[int] | None) -> None:
        member.rows(frame, rows)
        if self._postponed:
            self._postponed.progressed((frame.handles if rows is None else frame.handles[rows]).tolist())
        self.forget_if_gone(member)

    def _durable(self, message: pb.StreamResponse) -> None:
        handles, seqs = decode_pairs(message.durable.handles, message.durable.seqs)
        shares: dict[Member, list[int]] = {}
        for row, handle in enumerate(handles.tolist()):
            if (member := self._members.get(handle)) is not None:
                shares.setdefault(member, []).append(row)
        for member, rows in shares.items():
            member.stored(handles[rows], seqs[rows])
            if not member.unanswered:
                self._postponed.progressed(handles[rows].tolist())
            self.forget_if_gone(member)

    def _error(self, message: pb.StreamResponse) -> None:
        self._refused(message.error.handle, message.error.seq, from_rpc_status(message.error.status))

    def _errors(self, message: pb.StreamResponse) -> None:
        handles, seqs = decode_pairs(message.errors.handles, message.errors.seqs)
        error = from_rpc_status(message.errors.status)
        for handle, seq in zip(handles.tolist(), seqs.tolist(), strict=True):
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

    def _go_away(self, message: pb.StreamResponse) -> None:
        if message.go_away.resume_token:
            for member in self._each():
                member.move(message.go_away.resume_token)
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
        "durable": _durable,
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
