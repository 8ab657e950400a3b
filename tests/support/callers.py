"""Clients of hand-driven replicas, and the history of what they asked and what they were told.

Invariants: a caller asks for one thing at a time of each step number of an attachment, so that every answer is some
operation's; what it was not told stays of unknown outcome; a refusal that says that nothing moved is no operation.
"""

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2
from conveyor_server.errors import Refused
from linear import CONFLICT, DONE, EXISTS, FENCED, GAP, GONE, Operation, Result
from replicas import MODEL, Replica

_REASONS = {
    e.ERROR_REASON_SESSION_EXISTS: EXISTS,
    e.ERROR_REASON_SESSION_NOT_FOUND: GONE,
    e.ERROR_REASON_SESSION_CLOSED: GONE,
    e.ERROR_REASON_SESSION_TAKEN_OVER: FENCED,
    e.ERROR_REASON_STEP_GAP: GAP,
    e.ERROR_REASON_STEP_CONFLICT: CONFLICT,
}
# They say that nothing moved, and nothing of the session.
_NOTHING = {
    e.ERROR_REASON_SESSIONS_EXHAUSTED,
    e.ERROR_REASON_STEP_ABORTED,
    e.ERROR_REASON_STEP_TIMEOUT,
    e.ERROR_REASON_CREDIT_EXCEEDED,
    e.ERROR_REASON_HANDLE_UNKNOWN,
}


# Of a session that has left the stream already.
_OF_THE_GONE = {
    e.ERROR_REASON_HANDLE_UNKNOWN,
    e.ERROR_REASON_SESSION_CLOSED,
    e.ERROR_REASON_SESSION_TAKEN_OVER,
}


class History:
    """What was asked of each session, and told, by one clock that counts.

    Attributes:
        operations: of each session.
        told: how often what was told, by operation and result.
        durable: of each session, the last step that was said to be in the store.
    """

    def __init__(self) -> None:
        self.operations: dict[str, list[Operation]] = {}
        self.told: Counter[str] = Counter()
        self.durable: Counter[str] = Counter()
        self._moments = itertools.count(1)

    def call(self, session_id: str, kind: str, **fields: object) -> Operation:
        op = Operation(kind, next(self._moments), **fields)  # type: ignore[arg-type]
        self.operations.setdefault(session_id, []).append(op)
        return op

    def answer(self, op: Operation, result: Result) -> None:
        assert op.result is None, "an operation was answered twice"
        op.answered, op.result = next(self._moments), result
        self.told[f"{op.kind} {result.kind}"] += 1

    def refuse(self, session_id: str, op: Operation, fault: Fault) -> None:
        said = _REASONS.get(fault.reason)
        if fault.reason in _NOTHING or (said is not None and self._is_moot(session_id, op, said)):
            self.told[f"{op.kind} {fault.reason_name} without effect"] += 1
            if op.kind == "resume":
                # It may have come as far as the store.
                op.kind = "touch"
                self.end(op)
            else:
                self.operations[session_id].remove(op)
        elif said is not None:
            self.answer(op, Result(said))
        else:
            assert fault.reason == e.ERROR_REASON_STORE_UNAVAILABLE, fault
            self.told[f"{op.kind} {fault.reason_name}"] += 1

    def end(self, op: Operation) -> None:
        """If it was done, that was before now."""
        op.answered = next(self._moments)

    def _is_moot(self, session_id: str, op: Operation, said: str) -> bool:
        """It was refused for something whose own outcome is unknown: another content, or a close."""
        open_ones = [other for other in self.operations[session_id] if other.result is None and other is not op]
        if said == CONFLICT:
            return any(other.kind == "step" and other.seq == op.seq and other.x != op.x for other in open_ones)
        return said == GONE and any(other.kind == "close" for other in open_ones)


@dataclass(eq=False)
class Seat:
    """A session that a caller's stream holds, as far as the caller knows.

    Attributes:
        opened: the create or resume.
        applied: the last step that it knows to be applied.
        sent: by seq, what it has sent.
        open: operations that are not answered yet; 0: the close or detach.
    """

    session_id: str
    handle: int
    opened: Operation
    epoch: int
    applied: int
    sent: dict[int, float] = field(default_factory=dict)
    open: dict[int, Operation] = field(default_factory=dict)
    leaving: bool = False


class Caller:
    """One client: a stream to each replica, and unary calls.

    Attributes:
        seats: that it holds, by replica and handle.
        epochs: the last of each session that it was told.
    """

    def __init__(self, history: History, durability: pb.Durability.ValueType) -> None:
        self.history = history
        self.seats: dict[tuple[Replica, int], Seat] = {}
        self.epochs: Counter[str] = Counter()
        self.pending_calls: dict[Replica, int] = {}
        self._durability = durability
        self._streams: dict[Replica, tuple[object, object]] = {}
        self._opening: dict[tuple[Replica, int], tuple[str, Operation, int]] = {}
        self._handles = itertools.count(1)

    # ------------------------------------------------------------ asks

    def create(self, replica: Replica, session_id: str) -> None:
        options = pb.SessionOptions(durability=self._durability)
        attach = pb.AttachSession(mode=pb.AttachSession.MODE_CREATE, model=MODEL, options=options)
        self._open(replica, session_id, self.history.call(session_id, "create"), attach)

    def resume(self, replica: Replica, session_id: str, *, guarded: bool) -> None:
        max_epoch = self.epochs[session_id] if guarded else 0
        attach = pb.AttachSession(mode=pb.AttachSession.MODE_RESUME, max_epoch=max_epoch)
        op = self.history.call(session_id, "resume", max_epoch=max_epoch)
        self._open(replica, session_id, op, attach)

    def step(self, replica: Replica, seat: Seat, seq: int, x: float) -> None:
        assert seq not in seat.open
        seat.sent[seq] = x
        seat.open[seq] = self.history.call(seat.session_id, "step", holder=seat.opened, seq=seq, x=x)
        self._send(replica, step=pb.Step(handle=seat.handle, seq=seq, inputs=[_tensor(x)]))

    def close(self, replica: Replica, seat: Seat) -> None:
        seat.leaving = True
        seat.open[0] = self.history.call(seat.session_id, "close", holder=seat.opened)
        self._send(replica, close=pb.CloseAttachedSession(handle=seat.handle))

    def detach(self, replica: Replica, seat: Seat) -> None:
        seat.leaving = True
        self._send(replica, detach=pb.DetachSession(handle=seat.handle))

    def flush(self, replica: Replica, seat: Seat) -> None:
        self._send(replica, flush=pb.FlushSession(handle=seat.handle))

    def cut(self, replica: Replica) -> None:
        """The stream breaks."""
        self.forget(replica)
        call, _ = self._streams.pop(replica)
        call.broken()

    def step_alone(self, replica: Replica, session_id: str, seq: int, x: float) -> None:
        """A unary call."""
        op = self.history.call(session_id, "step", seq=seq, x=x)

        async def step() -> None:
            request = pb.StepRequest(session_id=session_id, seq=seq, inputs=[_tensor(x)])
            response = await replica.unary.step(request)
            self._say_durable(session_id, response.durable_seq)
            self.history.answer(op, Result(DONE, total=_total(response)))

        self._call_alone(replica, session_id, op, step)

    def close_alone(self, replica: Replica, session_id: str) -> None:
        """A unary call."""
        op = self.history.call(session_id, "close")

        async def close() -> None:
            await replica.unary.close_session(pb.CloseSessionRequest(session_id=session_id))
            self.history.answer(op, Result(DONE))

        self._call_alone(replica, session_id, op, close)

    # ------------------------------------------------------------ is told

    def forget(self, replica: Replica) -> None:
        """Nothing more comes from there: what is not answered may have been done, or not."""
        for key in [key for key in (*self.seats, *self._opening) if key[0] is replica]:
            self.seats.pop(key, None)
            self._opening.pop(key, None)

    @property
    def waits(self) -> bool:
        """It was not told all that it has asked for."""
        return bool(self._opening) or any(seat.open or seat.leaving for seat in self.seats.values())

    def read(self, replica: Replica) -> None:
        """Takes what has come from a replica."""
        if replica not in self._streams:
            return
        _, sink = self._streams[replica]
        messages, sink.messages = sink.messages, []
        for data in messages:
            response = pb.StreamResponse.FromString(data)
            kind = response.WhichOneof("kind")
            getattr(self, f"_{kind}")(replica, getattr(response, kind))

    def _attached(self, replica: Replica, attached: pb.SessionAttached) -> None:
        session_id, op, _ = self._opening.pop((replica, attached.handle))
        info = attached.session
        self.epochs[session_id] = max(self.epochs[session_id], info.epoch)
        self.seats[replica, attached.handle] = Seat(session_id, attached.handle, op, info.epoch, info.applied_seq)
        self._say_durable(session_id, info.durable_seq)
        self.history.answer(op, Result(DONE, info.epoch, info.applied_seq))

    def _result(self, replica: Replica, result: pb.StepResult) -> None:
        seat = self.seats[replica, result.handle]
        seat.applied = max(seat.applied, result.seq)
        self._say_durable(seat.session_id, result.durable_seq)
        self.history.answer(seat.open.pop(result.seq), Result(DONE, total=_total(result)))

    def _error(self, replica: Replica, error: pb.StepError) -> None:
        key, fault = (replica, error.handle), from_status(error.status)
        if key in self._opening:
            session_id, op, _ = self._opening.pop(key)
            self.history.refuse(session_id, op, fault)
            return
        seat = self.seats.get(key)
        if seat is None:
            # It was sent before the caller knew that the session is gone, and after the server did.
            assert fault.reason in _OF_THE_GONE, fault
            self.history.told[f"{fault.reason_name} of a session that is gone"] += 1
            return
        if error.seq or 0 in seat.open:
            self.history.refuse(seat.session_id, seat.open.pop(error.seq), fault)
        if not error.seq:
            seat.leaving = False

    def _detached(self, replica: Replica, detached: pb.SessionDetached) -> None:
        seat = self.seats.pop((replica, detached.handle))
        close = seat.open.pop(0, None)
        assert not seat.open or detached.cause != pb.DETACH_CAUSE_DETACHED, "a step was not answered"
        if close is not None:
            taken = detached.cause == pb.DETACH_CAUSE_TAKEN_OVER
            self.history.answer(close, Result(FENCED if taken else DONE))
        if detached.cause == pb.DETACH_CAUSE_DETACHED:
            self._say_durable(seat.session_id, detached.applied_seq)

    def _durable(self, replica: Replica, durable: pb.DurableSteps) -> None:
        handles, seqs = np.frombuffer(durable.handles, "<u4"), np.frombuffer(durable.seqs, "<u8")
        for handle, seq in zip(handles.tolist(), seqs.tolist(), strict=True):
            self._say_durable(self.seats[replica, handle].session_id, seq)

    # ------------------------------------------------------------ within

    def _say_durable(self, session_id: str, seq: int) -> None:
        self.history.durable[session_id] = max(self.history.durable[session_id], seq)

    def _open(self, replica: Replica, session_id: str, op: Operation, attach: pb.AttachSession) -> None:
        attach.handle, attach.session_id = next(self._handles), session_id
        self._opening[replica, attach.handle] = session_id, op, self.history.durable[session_id]
        self._send(replica, attach=attach)

    def _send(self, replica: Replica, **kind: object) -> None:
        if replica not in self._streams:
            self._streams[replica] = replica.stream()
        self._streams[replica][0].receive(pb.StreamRequest(**kind).SerializeToString())

    def _call_alone(
        self, replica: Replica, session_id: str, op: Operation, what: Callable[[], Awaitable[None]]
    ) -> None:
        # A session that is not there is taken, and its epoch rises.
        touch = self.history.call(session_id, "touch")

        async def call() -> None:
            try:
                await what()
            except Refused as refusal:
                self.history.refuse(session_id, op, refusal.fault)
            self.history.end(touch)

        replica.call(call())


def _tensor(x: float) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data=np.array([x]).tobytes())


def _total(result: pb.StepResult | pb.StepResponse) -> float:
    (output,) = result.outputs
    return float(np.frombuffer(output.data)[-1])
