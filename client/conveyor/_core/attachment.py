"""One session's claim to a place on a stream: how it is attached the first time, and again after every cut.

Invariant: a session that was stepped is only ever attached again with MODE_RESUME and `max_epoch`, so that it is never
restarted from its initial state and never taken back from a client that resumed it meanwhile.
"""

from dataclasses import dataclass
from enum import Enum

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb

from conveyor.errors import ConnectionLost, ConveyorError, from_fault


class Opening(Enum):
    """How a session is opened the first time."""

    CREATE = pb.AttachSession.MODE_CREATE
    RESUME = pb.AttachSession.MODE_RESUME
    RESUME_OR_CREATE = pb.AttachSession.MODE_RESUME_OR_CREATE


@dataclass(frozen=True, slots=True)
class Claim:
    """Which session is wanted.

    Attributes:
        session_id: never empty; the client chooses one, so that an attach whose answer was lost can be repeated.
        model: may be empty where the session is resumed.
        version: empty: the latest that is ready.
        opening: how it is opened the first time.
        options: what it is created with.
    """

    session_id: str
    model: str = ""
    version: str = ""
    opening: Opening = Opening.CREATE
    options: pb.SessionOptions | None = None


class Attachment:
    """What is needed to attach one session to a stream, now or later.

    Attributes:
        handle: the session's number on this client's streams.
        info: what the server said at the last attach, or None.
        resume_token: what a server said that let go of the session; goes with the attaches until one is granted.
    """

    __slots__ = ("_claim", "_unanswered", "handle", "info", "resume_token")

    def __init__(self, handle: int, claim: Claim) -> None:
        self.handle = handle
        self.info: pb.SessionInfo | None = None
        self._claim = claim
        self.resume_token = ""
        self._unanswered = 0

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self._claim.session_id

    @property
    def creates(self) -> bool:
        """The session is created by this client, and nobody else's."""
        return self._claim.opening is Opening.CREATE

    def request(self, answered_seq: int = 0) -> pb.StreamRequest:
        """The message that attaches the session to a new stream, where answers up to that step were had."""
        attach = pb.AttachSession(handle=self.handle, session_id=self.session_id, model=self._claim.model)
        if self.resume_token:
            # The next server waits until the last one has written so far.
            attach.resume_token, attach.answered_seq = self.resume_token, answered_seq
        if self.info is not None:
            attach.mode = pb.AttachSession.MODE_RESUME
            # Attaches whose answers were lost in a cut, or in the server's store, may have raised the epoch.
            attach.max_epoch = self.info.epoch + self._unanswered
        else:
            attach.mode = self._claim.opening.value
            attach.version = self._claim.version
            if self._claim.options is not None:
                attach.options.CopyFrom(self._claim.options)
            if self._unanswered and self._claim.opening is Opening.CREATE:
                # The create may have been done and only its answer lost; `accept` checks that it is ours.
                attach.mode = pb.AttachSession.MODE_RESUME_OR_CREATE
        self._unanswered += 1
        return pb.StreamRequest(attach=attach)

    def accept(self, message: pb.SessionAttached) -> ConveyorError | None:
        """Takes the server's answer. An error: the session that is attached now is not this client's to step."""
        session, before = message.session, self.info
        sent, self._unanswered = self._unanswered, 0
        self.resume_token = ""
        if before is None:
            self.info = session
            if self._claim.opening is Opening.CREATE and message.resumed and session.applied_seq > 0:
                text = f"session {self.session_id!r} exists already: choose another id, or open it with resume=True"
                return from_fault(Fault(e.ERROR_REASON_SESSION_EXISTS, text, {"session_id": self.session_id}))
            return None
        self.info = session
        if session.epoch > before.epoch + sent:
            return self.taken_over()
        return None

    def taken_over(self) -> ConveyorError:
        """The error for a session that another client has resumed."""
        text = f"session {self.session_id!r} was resumed by another client: it lives there, and not here"
        epoch = str(self.info.epoch) if self.info is not None else "0"
        metadata = {"session_id": self.session_id, "epoch": epoch}
        return from_fault(Fault(e.ERROR_REASON_SESSION_TAKEN_OVER, text, metadata))

    def check_progress(self, applied: int, kept_from: int, answered: int, sent: int) -> ConveyorError | None:
        """Whether a session that was resumed is where this client left it, or where it can be brought back from.

        Args:
            applied: the step that the server has it at.
            kept_from: the first of the answered steps that can be sent again; `answered + 1` where none is kept.
            answered: the last step whose answer came.
            sent: the last step that was sent and not refused.
        """
        if kept_from - 1 <= applied <= sent:
            return None
        if applied > sent:
            return self.taken_over()
        lost = f"steps {applied + 1} to {kept_from - 1}" if applied + 1 < kept_from - 1 else f"step {applied + 1}"
        text = (
            f"the server has session {self.session_id!r} at step {applied}, and answers up to step {answered} were "
            f"given out: it lost some. No more is kept here of {lost}, which the server was to keep. Restore a "
            "snapshot, or open a new session"
        )
        metadata = {"session_id": self.session_id, "seq": str(answered + 1), "next_seq": str(applied + 1)}
        return from_fault(Fault(e.ERROR_REASON_STEP_GAP, text, metadata))

    def unrepeatable(self, seq: int, error: ConveyorError) -> ConveyorError:
        """The error for a step that was answered, is lacking on the server that has the session now, and stays so."""
        text = (
            f"step {seq} of session {self.session_id!r} was answered by a server that is gone, and cannot be applied "
            f"again: {error}. The session is at step {seq - 1}: resume it and go on from there, or restore a snapshot"
        )
        metadata = {"session_id": self.session_id, "seq": str(seq), "next_seq": str(seq)}
        return from_fault(Fault(e.ERROR_REASON_STEP_GAP, text, metadata))

    def not_durable(self) -> ConveyorError:
        """The error for asking that a session be stored which is not kept in a store."""
        text = f"session {self.session_id!r} is not kept in a store: open it with durability='async' or 'sync'"
        metadata = {"session_id": self.session_id, "durability": "none", "most": "none"}
        return from_fault(Fault(e.ERROR_REASON_NOT_DURABLE, text, metadata))

    def aborted(self, seq: int, next_seq: int) -> ConveyorError:
        """The error for a step that was sent after one that was refused."""
        text = f"step {seq} was not applied: step {next_seq} before it failed"
        metadata = {"session_id": self.session_id, "seq": str(seq), "next_seq": str(next_seq)}
        return from_fault(Fault(e.ERROR_REASON_STEP_ABORTED, text, metadata))

    def lost(self, cause: pb.DetachCause.ValueType) -> ConveyorError:
        """The error for a session that the server took from the stream without being asked."""
        if cause == pb.DETACH_CAUSE_TAKEN_OVER:
            return self.taken_over()
        if cause == pb.DETACH_CAUSE_DETACHED:
            return ConnectionLost(f"the server let go of session {self.session_id!r}: resume it")
        if cause == pb.DETACH_CAUSE_EXPIRED:
            idle_s = self.info.idle_timeout.ToNanoseconds() / 1e9 if self.info is not None else 0.0
            text = f"session {self.session_id!r} was idle for longer than {idle_s:g} s and is gone"
            metadata = {"session_id": self.session_id, "idle_timeout_s": f"{idle_s:g}"}
            return from_fault(Fault(e.ERROR_REASON_SESSION_EXPIRED, text, metadata))
        name = pb.DetachCause.Name(cause).removeprefix("DETACH_CAUSE_").lower()
        text = f"session {self.session_id!r} is gone: {name.replace('_', ' ')}"
        return from_fault(Fault(e.ERROR_REASON_SESSION_CLOSED, text, {"session_id": self.session_id, "cause": name}))

    def flush(self) -> pb.StreamRequest:
        """The message that has the session's state written to the store."""
        return pb.StreamRequest(flush=pb.FlushSession(handle=self.handle))

    def goodbye(self, *, close: bool) -> pb.StreamRequest:
        """The message that closes the session, or detaches from it."""
        if close:
            return pb.StreamRequest(close=pb.CloseAttachedSession(handle=self.handle))
        return pb.StreamRequest(detach=pb.DetachSession(handle=self.handle))
