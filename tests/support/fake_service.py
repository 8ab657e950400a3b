"""A server of the session rules, small enough to be read at once, without I/O: what a client has to get along with.

Its models add: `sum` answers the running sum of what a session was given, so that a token applied twice, lost or out of
order shows in every later answer. With a FakeStore, sessions outlive their server, as far as the store has them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from conveyor_proto.codec import decode_column, decode_input, decode_integers
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import spec_pb2
from conveyor_proto.v1 import tensor_pb2 as t
from fake_store import DURABILITIES, FakeRecord, FakeStore

SUM = spec_pb2.ModelSpec(
    spec_version=1,
    name="sum",
    inputs=[spec_pb2.TensorSpec(name="x", dtype=t.DATA_TYPE_FLOAT32, shape=[2], has_time=True)],
    outputs=[spec_pb2.TensorSpec(name="y", dtype=t.DATA_TYPE_FLOAT32, shape=[2], has_time=True)],
    digest="5" * 64,
)
MIX = spec_pb2.ModelSpec(
    spec_version=1,
    name="mix",
    inputs=[
        spec_pb2.TensorSpec(name="x", dtype=t.DATA_TYPE_FLOAT32, shape=[2], has_time=True),
        spec_pb2.TensorSpec(name="token", dtype=t.DATA_TYPE_INT64, shape=[], has_time=True),
        spec_pb2.TensorSpec(name="gain", dtype=t.DATA_TYPE_FLOAT32, shape=[], has_time=False),
    ],
    outputs=[
        spec_pb2.TensorSpec(name="y", dtype=t.DATA_TYPE_FLOAT32, shape=[2], has_time=True),
        spec_pb2.TensorSpec(name="last", dtype=t.DATA_TYPE_INT64, shape=[], has_time=False),
    ],
    digest="7" * 64,
)
SPECS = {"sum": SUM, "mix": MIX}


class Refused(Exception):
    """A fault on its way to the client."""

    def __init__(self, reason: int, retry_s: float | None = None, **metadata: str) -> None:
        name = e.ErrorReason.Name(reason)
        super().__init__(name)
        self.status = to_status(Fault(reason, f"refused: {name}", metadata, retry_s))


@dataclass
class FakeSession:
    session_id: str
    model: str
    state: np.ndarray = field(default_factory=lambda: np.zeros(2, np.float32))
    applied: int = 0
    epoch: int = 0
    credit: int = 4
    failed_seq: int | None = None
    answers: dict[int, list[bytes]] = field(default_factory=dict)
    contents: dict[int, list[bytes]] = field(default_factory=dict)
    holder: "FakeStream | None" = None
    handle: int = 0
    durability: int = pb.DURABILITY_NONE
    durable: int = 0
    history: list[list[bytes]] = field(default_factory=list)

    @property
    def stored(self) -> bool:
        return self.durability != pb.DURABILITY_NONE

    def acknowledge(self, seq: int) -> None:
        """Forgets what the client has, and sees that it claims to have no more than there was."""
        assert seq <= self.applied, f"{seq} is acknowledged, and {self.applied} was applied here"
        for old in [old for old in self.answers if old <= seq]:
            del self.answers[old], self.contents[old]

    def info(self) -> pb.SessionInfo:
        return pb.SessionInfo(
            session_id=self.session_id,
            model=self.model,
            version="1",
            model_digest=SPECS[self.model].digest,
            epoch=self.epoch,
            applied_seq=self.applied,
            max_in_flight=self.credit,
            durability=self.durability,
            durable_seq=self.durable,
            resident=True,
        )

    def step(self, seq: int, inputs: list[np.ndarray]) -> tuple[list[bytes], bool]:
        """Outputs as bytes, and whether they were replayed."""
        content = [array.tobytes() for array in inputs]
        if seq <= self.applied:
            if seq not in self.answers:
                raise Refused(e.ERROR_REASON_STEP_ANSWER_EVICTED, session_id=self.session_id, seq=str(seq))
            if self.contents[seq] != content:
                raise Refused(e.ERROR_REASON_STEP_CONFLICT, session_id=self.session_id, seq=str(seq))
            return self.answers[seq], True
        following = {"session_id": self.session_id, "seq": str(seq), "next_seq": str(self.applied + 1)}
        if seq > self.applied + 1:
            aborted = self.failed_seq is not None and seq > self.failed_seq
            raise Refused(e.ERROR_REASON_STEP_ABORTED if aborted else e.ERROR_REASON_STEP_GAP, **following)
        x = inputs[0]
        y = self.state + np.cumsum(x, axis=0, dtype=np.float32)
        outputs = [y.tobytes()]
        if self.model == "mix":
            outputs = [(y * inputs[2]).astype(np.float32).tobytes(), inputs[1][-1].tobytes()]
        self.state, self.applied, self.failed_seq = y[-1], seq, None
        self.answers[seq], self.contents[seq] = outputs, content
        self.history.append(content)
        return outputs, False


class FakeServer:
    """All sessions, and what to do wrong.

    Attributes:
        failures: (session id, seq) -> what to refuse it with, once.
        refuse_attach: what to refuse the next attaches with, one each.
        form: how steps are answered: "asked" (as they were sent), "alone" or "framed".
        store: where durable sessions are; None: there are none.
        durability: of sessions that ask for none.
        patient: resident sessions go on while the store is away; otherwise their steps are refused.
        resume_tokens: of all attaches so far that had one.
        flushes: sessions that were to be stored, in order.
    """

    def __init__(self, store: FakeStore | None = None, durability: str = "none") -> None:
        self.store = store
        self.durability = DURABILITIES[durability]
        self.patient = True
        self.resume_tokens: list[str] = []
        self.flushes: list[str] = []
        self.sessions: dict[str, FakeSession] = {}
        self.gone: dict[str, int] = {}
        self.failures: dict[tuple[str, int], Refused] = {}
        self.refuse_attach: list[Refused] = []
        self.credit = 4
        self.steps_received = 0
        self.draining = False
        self.form = "asked"

    def find(self, session_id: str) -> FakeSession:
        if session_id in self.gone:
            raise Refused(self.gone[session_id], session_id=session_id, cause="closed", idle_timeout_s="1")
        if session_id not in self.sessions:
            raise Refused(e.ERROR_REASON_SESSION_NOT_FOUND, session_id=session_id)
        return self.sessions[session_id]

    def create(self, session_id: str, model: str, durability: int = pb.DURABILITY_UNSPECIFIED) -> FakeSession:
        if model not in SPECS:
            raise Refused(e.ERROR_REASON_MODEL_NOT_FOUND, model=model, available="sum, mix")
        if session_id in self.sessions:
            raise Refused(e.ERROR_REASON_SESSION_EXISTS, session_id=session_id)
        durability = durability or self.durability
        if durability != pb.DURABILITY_NONE:
            if self.store is None:
                raise Refused(e.ERROR_REASON_NOT_DURABLE, durability="async", most="none")
            self.reach_store(session_id)
            if session_id in self.store.records:
                raise Refused(e.ERROR_REASON_SESSION_EXISTS, session_id=session_id)
            self.store.records[session_id] = FakeRecord(model, durability, self.credit)
        self.gone.pop(session_id, None)
        self.sessions[session_id] = FakeSession(session_id, model, credit=self.credit, durability=durability)
        return self.sessions[session_id]

    def reach_store(self, session_id: str) -> None:
        """Nothing of the store can be done while it is away."""
        if self.store is not None and self.store.away:
            raise Refused(e.ERROR_REASON_STORE_UNAVAILABLE, retry_s=0.01, session_id=session_id)

    def checkpoint(self, session: FakeSession) -> None:
        """Writes a session to the store, or learns that it is another server's."""
        self.reach_store(session.session_id)
        if not self.store.put(session):
            self.sessions.pop(session.session_id, None)
            if session.holder is not None:
                session.holder._let_go(session.handle, pb.DETACH_CAUSE_TAKEN_OVER)
            raise Refused(e.ERROR_REASON_SESSION_TAKEN_OVER, session_id=session.session_id, epoch="0")

    def crash(self) -> None:
        """The process is killed, and another begins."""
        self.sessions.clear()
        self.gone.clear()

    def attach(self, attach: pb.AttachSession) -> tuple[FakeSession, bool]:
        """The session that is meant, and whether it was there before; its epoch has risen."""
        if attach.resume_token:
            self.resume_tokens.append(attach.resume_token)
        record = self.store.records.get(attach.session_id) if self.store is not None else None
        if record is not None:
            self.reach_store(attach.session_id)
        resumed = record is not None or attach.session_id in self.sessions
        if attach.mode == attach.MODE_CREATE or (attach.mode == attach.MODE_RESUME_OR_CREATE and not resumed):
            resumed = False
            session = self.create(attach.session_id, attach.model, attach.options.durability)
            record = self.store.records.get(attach.session_id) if self.store is not None else None
        elif record is None:
            session = self.find(attach.session_id)
        else:
            fresh = FakeSession(attach.session_id, record.model, credit=record.credit, durability=record.durability)
            session = self.sessions.setdefault(attach.session_id, fresh)
        epoch = session.epoch if record is None else record.epoch
        if attach.max_epoch and epoch > attach.max_epoch:
            raise Refused(e.ERROR_REASON_SESSION_TAKEN_OVER, session_id=attach.session_id, epoch=str(epoch))
        if record is not None:
            if session.epoch != record.epoch or not session.epoch:
                self.store.load(session)
            record.epoch += 1
        session.epoch = epoch + 1
        return session, resumed

    def close(self, session_id: str, reason: int = e.ERROR_REASON_SESSION_CLOSED) -> FakeSession:
        session = self.find(session_id)
        if session.stored:
            self.reach_store(session_id)
            del self.store.records[session_id]
        del self.sessions[session_id]
        self.gone[session_id] = reason
        return session


# An applied step: handle, seq, time steps, outputs and whether they were replayed.
Row = tuple[int, int, int, list[bytes], bool]


class FakeStream:
    """The server's end of one stream; `out` takes what it sends."""

    def __init__(self, server: FakeServer, out: Callable[[pb.StreamResponse], None]) -> None:
        self.server = server
        self.out = out
        self.handles: dict[int, FakeSession] = {}
        self.dead = False

    def receive(self, request: pb.StreamRequest) -> None:
        if self.dead:
            return
        kind = request.WhichOneof("kind")
        message = getattr(request, kind)
        try:
            getattr(self, "_" + kind)(message)
        except Refused as refused:
            self._error(getattr(message, "handle", 0), getattr(message, "seq", 0), refused)

    def end(self) -> None:
        """The client half-closed."""
        for handle, session in list(self.handles.items()):
            if session.stored and not self.server.store.away:
                with contextlib.suppress(Refused):
                    self.server.checkpoint(session)
            if handle in self.handles:
                self._let_go(handle, pb.DETACH_CAUSE_DETACHED)
        self.out(pb.StreamResponse(end=pb.StreamEnd()))

    def broken(self) -> None:
        """The connection is gone, and with it whatever would be sent."""
        self.dead = True
        self.out = lambda message: None
        for session in self.handles.values():
            session.holder = None
        self.handles.clear()

    def go_away(self, token: str = "") -> None:
        self.out(pb.StreamResponse(go_away=pb.GoAway(resume_token=token)))

    def _error(self, handle: int, seq: int, refused: Refused) -> None:
        self.out(pb.StreamResponse(error=pb.StepError(handle=handle, seq=seq, status=refused.status)))

    def _attach(self, attach: pb.AttachSession) -> None:
        if self.server.refuse_attach:
            raise self.server.refuse_attach.pop(0)
        if self.server.draining:
            raise Refused(e.ERROR_REASON_DRAINING, retry_s=0.01)
        session, resumed = self.server.attach(attach)
        if session.holder is not None:
            session.holder._let_go(session.handle, pb.DETACH_CAUSE_TAKEN_OVER)
        session.holder, session.handle = self, attach.handle
        self.handles[attach.handle] = session
        attached = pb.SessionAttached(handle=attach.handle, session=session.info(), resumed=resumed)
        self.out(pb.StreamResponse(attached=attached))

    def _step(self, step: pb.Step) -> None:
        self.server.steps_received += 1
        session = self._held(step.handle)
        specs = SPECS[session.model].inputs
        arrays = [decode_input(tensor, spec) for tensor, spec in zip(step.inputs, specs, strict=True)]
        outputs, replayed = self._apply(session, step.seq, arrays, step.acked_seq)
        row = (step.handle, step.seq, max(array.shape[0] for array in arrays if array.ndim), outputs, replayed)
        if self.server.form == "framed":
            self._answer_framed([row])
        else:
            self._answer_alone(row)

    def _frame(self, frame: pb.StepFrame) -> None:
        handles = decode_integers(frame.handles, np.uint32, -1, "handles")
        rows = len(handles)
        seqs = decode_integers(frame.seqs, np.uint64, rows, "seqs")
        lengths = np.ones(rows, np.uint32)
        if frame.lengths:
            lengths = decode_integers(frame.lengths, np.uint32, rows, "lengths")
        acked = [0] * rows
        if frame.acked_seqs:
            acked = decode_integers(frame.acked_seqs, np.uint64, rows, "acked_seqs").tolist()
        held = [self.handles[handle] for handle in handles.tolist() if handle in self.handles]
        spec = SPECS[held[0].model] if held else SUM
        self.server.steps_received += rows
        counts = [int(lengths.sum()) if item.has_time else rows for item in spec.inputs]
        columns = [decode_column(*args) for args in zip(frame.columns, spec.inputs, counts, strict=True)]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        done: list[Row] = []
        for row, (handle, seq) in enumerate(zip(handles.tolist(), seqs.tolist(), strict=True)):
            arrays = [
                column[starts[row] : starts[row + 1]] if item.has_time else column[row]
                for column, item in zip(columns, spec.inputs, strict=True)
            ]
            try:
                outputs, replayed = self._apply(self._held(handle), seq, arrays, acked[row])
            except Refused as refused:
                self._error(handle, seq, refused)
            else:
                done.append((handle, seq, int(lengths[row]), outputs, replayed))
        if self.server.form == "alone":
            for row in done:
                self._answer_alone(row)
        else:
            self._answer_in_two(done)

    def _answer_in_two(self, done: list[Row]) -> None:
        """Two frames, the later handles' first: rows may be answered in any company, those of a handle in order."""
        handles = list(dict.fromkeys(row[0] for row in done))
        if len(handles) > 1:
            late = set(handles[len(handles) // 2 :])
            done = [row for row in done if row[0] in late] + [row for row in done if row[0] not in late]
        half = (len(done) + 1) // 2
        for part in (done[:half], done[half:]):
            if part:
                self._answer_framed(part)

    def _answer_alone(self, row: Row) -> None:
        handle, seq, _, outputs, replayed = row
        names = [spec.name for spec in SPECS[self.handles[handle].model].outputs]
        tensors = [t.Tensor(name=name, data=data) for name, data in zip(names, outputs, strict=True)]
        result = pb.StepResult(handle=handle, seq=seq, outputs=tensors, replayed=replayed)
        if self.server.store is not None:
            result.durable_seq = self.handles[handle].durable
        self.out(pb.StreamResponse(result=result))

    def _answer_framed(self, part: list[Row]) -> None:
        handles, seqs, lengths, outputs, replayed = zip(*part, strict=True)
        frame = pb.ResultFrame(
            handles=np.array(handles, np.uint32).tobytes(),
            seqs=np.array(seqs, np.uint64).tobytes(),
            lengths=b"" if set(lengths) == {1} else np.array(lengths, np.uint32).tobytes(),
            columns=[b"".join(column) for column in zip(*outputs, strict=True)],
            replayed_rows=np.flatnonzero(replayed).astype(np.uint32).tobytes(),
        )
        if self.server.store is not None:
            durables = [self.handles[handle].durable for handle in handles]
            frame.durable_seqs = np.array(durables, np.uint64).tobytes()
        self.out(pb.StreamResponse(frame=frame))

    def _apply(self, session: FakeSession, seq: int, arrays: list[np.ndarray], acked: int) -> tuple[list[bytes], bool]:
        refused = self.server.failures.pop((session.session_id, seq), None)
        if refused is not None and seq > session.applied:
            session.failed_seq = seq
            raise refused
        if session.stored:
            session.acknowledge(acked)
            if session.durability == pb.DURABILITY_ASYNC and not self.server.patient and seq == session.applied + 1:
                self._need_store(session, seq)
        answer = session.step(seq, arrays)
        if session.durability == pb.DURABILITY_SYNC and session.durable < seq:
            self._need_store(session, seq)
            self.server.checkpoint(session)
        return answer

    def _need_store(self, session: FakeSession, seq: int) -> None:
        try:
            self.server.reach_store(session.session_id)
        except Refused:
            session.failed_seq = seq
            raise

    def _held(self, handle: int) -> FakeSession:
        if handle not in self.handles:
            raise Refused(e.ERROR_REASON_HANDLE_UNKNOWN, handle=str(handle))
        return self.handles[handle]

    def _flush(self, flush: pb.FlushSession) -> None:
        session = self._held(flush.handle)
        if not session.stored:
            raise Refused(e.ERROR_REASON_NOT_DURABLE, session_id=session.session_id, durability="none", most="sync")
        self.server.flushes.append(session.session_id)
        self.server.checkpoint(session)
        durable = pb.DurableSteps(handles=np.uint32(flush.handle).tobytes(), seqs=np.uint64(session.durable).tobytes())
        self.out(pb.StreamResponse(durable=durable))

    def _detach(self, detach: pb.DetachSession) -> None:
        session = self._held(detach.handle)
        if session.stored:
            self.server.checkpoint(session)
        self._let_go(detach.handle, pb.DETACH_CAUSE_DETACHED)

    def _close(self, close: pb.CloseAttachedSession) -> None:
        self.server.close(self._held(close.handle).session_id)
        self._let_go(close.handle, pb.DETACH_CAUSE_CLOSED)

    def _let_go(self, handle: int, cause: int) -> None:
        session = self.handles.pop(handle)
        session.holder = None
        detached = pb.SessionDetached(
            handle=handle, cause=cause, session_id=session.session_id, applied_seq=session.applied
        )
        self.out(pb.StreamResponse(detached=detached))
