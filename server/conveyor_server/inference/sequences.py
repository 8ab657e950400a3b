"""Sequences: correlation ids of the protocol, each an ordinary session.

A sequence begins with a request that says so, goes on with others of its id, and ends with one that says so. Its
session bears its name (`session_id`), and anyone may look at it, fork it or close it there; steps are numbered here.

Invariants: requests of a sequence are run and answered in the order in which they came, whatever stream or call each
came by; a request that cannot be used moves nothing and the sequence goes on; a sequence that is not here is refused
with the reason, and never begun from zeros; of a sequence without a request under way, nothing is kept but its session.
"""

import hashlib
import re
from collections import deque
from collections.abc import Sequence as Several

from conveyor_proto.codec import Array, WireError
from conveyor_proto.fingerprint import fingerprint
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.inference.answers import respond
from conveyor_server.inference.job import Job, take_back
from conveyor_server.inference.requests import Content
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.events import Answer, Closed
from conveyor_server.sessions.rules import stopping
from conveyor_server.sessions.session import Session, Submission

_MOST_ID = 128
_PLAIN = re.compile(r"[A-Za-z0-9._-]*")
# Of a START on a live sequence: how many steps the sequence had that it begins anew.
RESTARTED = "conveyor_restarted_after_steps"


def session_id(model: str, sequence: int | str) -> str:
    """The name of a sequence's session: `MODEL:42`, `MODEL:s:NAME`; what a name may not hold is written `:HEX`."""
    kind, text = ("s:", sequence) if isinstance(sequence, str) else ("", str(sequence))
    if not _PLAIN.fullmatch(text):
        text = "".join(char if _PLAIN.fullmatch(char) else f":{char.encode().hex()}" for char in text)
    name = f"{model}:{kind}{text}"
    if len(name) <= _MOST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: _MOST_ID - 33]}:{digest}"


class Sequences:
    """All sequences that have requests under way. Core thread only."""

    def __init__(self, core: Core, statistics: Statistics) -> None:
        self.core = core
        self.statistics = statistics
        self._busy: dict[str, _Sequence] = {}

    def run(self, job: Job) -> "Turn":
        """Takes a request of a model with state, which names its sequence; the core is to be kicked."""
        sequence = job.parameters.sequence
        if sequence is None:
            raise AssertionError("a request of no sequence")
        name = session_id(job.request.model_name, sequence)
        known = self._busy.get(name)
        if known is None:
            known = self._busy[name] = _Sequence(self, name, sequence)
        return known.add(job)

    def done(self, name: str) -> None:
        """The sequence has nothing under way."""
        del self._busy[name]


class Turn:
    """A request in its sequence's order. As a `reply_to`, it gets its step's answer.

    Attributes:
        job: the request.
        engine: of its session; None: not known yet.
        content: its tensors; None: not read yet, or they cannot be used.
        seq: of its step; 0: it is not submitted.
        result: outputs, or why there are none; None: not yet.
    """

    __slots__ = ("_sequence", "content", "engine", "job", "result", "seq")

    def __init__(self, sequence: "_Sequence", job: Job) -> None:
        self._sequence = sequence
        self.job = job
        self.engine: Engine | None = None
        self.content: Content | None = None
        self.seq = 0
        self.result: Several[Array] | Fault | None = None

    def answered(self, answer: Answer) -> None:
        """Its step is answered."""
        self.result = answer.outputs if answer.fault is None else answer.fault
        self._sequence.answered(self)

    def closed(self, _: Closed) -> None:
        """The session that ends with it is gone."""
        self._sequence.gone()

    def cancel(self) -> None:
        """The caller is gone. What has not run and has nothing behind it is taken back; else it is run for nobody."""
        self._sequence.cancel(self)


class _Sequence:
    """The requests of one sequence that are under way."""

    __slots__ = ("_all", "_ending", "_id", "_name", "_session", "_turns", "_waiting")

    def __init__(self, sequences: Sequences, name: str, sequence: int | str) -> None:
        self._all = sequences
        self._name = name
        self._id = sequence
        self._session: Session | None = None
        # Unanswered, in the order in which they came; and behind them those that wait for the end of the session.
        self._turns: deque[Turn] = deque()
        self._waiting: deque[Turn] = deque()
        self._ending = False

    def add(self, job: Job) -> Turn:
        turn = Turn(self, job)
        if self._must_wait(turn):
            self._waiting.append(turn)
        else:
            self._take(turn)
            self.advance()
        return turn

    def advance(self) -> None:
        """Tells what is answered, in order, and takes what waited for that."""
        while True:
            while self._turns and self._turns[0].result is not None:
                _tell(self._turns.popleft())
            if not self._waiting or self._ending or (self._turns and self._waiting[0].job.parameters.start):
                break
            self._take(self._waiting.popleft())
        if not self._turns and not self._waiting and not self._ending:
            self._all.done(self._name)

    def gone(self) -> None:
        """The session that was to end is gone."""
        self._ending = False
        self._session = None
        self.advance()
        self._all.core.kick()

    def cancel(self, turn: Turn) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
            self.advance()
        elif turn.seq and turn.result is None and self._session is not None:
            if not take_back(self._all.core, self._session, turn.seq, turn):
                return
            self._turns.remove(turn)
            self._ending = False
            self.advance()

    def answered(self, turn: Turn) -> None:
        """A step is answered; if it was the last and did what it should, the session ends with it."""
        if turn.job.parameters.end:
            if isinstance(turn.result, Fault) or self._session is None:
                self._ending = False
            else:
                self._all.core.directory.close(self._session, turn, self._all.core.now())
                self._all.core.kick()
        self.advance()

    # ------------------------------------------------------------ within

    def _must_wait(self, turn: Turn) -> bool:
        return bool(self._waiting) or self._ending or bool(turn.job.parameters.start and self._turns)

    def _take(self, turn: Turn) -> None:
        self._turns.append(turn)
        try:
            self._submit(turn)
        except (Refused, WireError) as refusal:
            turn.result = refusal.fault

    def _submit(self, turn: Turn) -> None:
        job, core = turn.job, self._all.core
        live = None if job.parameters.start else self._live(job)
        engine = turn.engine = live.engine if live is not None else self._served(job)
        # Before anything moves: a request that cannot be used does not begin the sequence anew either.
        content = turn.content = job.read(engine, self._all.statistics, max_time_steps=core.max_time_steps)
        session = self._session = self._begin(job, engine) if live is None else live
        turn.seq = session.accepted_seq + 1
        (inputs,) = content.rows
        limits = core.directory.limits
        core.directory.submit(
            session,
            Submission(
                turn.seq,
                turn,
                inputs,
                content.length,
                fingerprint(inputs),
                timeout_s=job.parameters.timeout_s or limits.step_timeout_s,
                # The answers before are told, and nobody will ask for them again.
                acked_seq=session.applied_seq,
            ),
            core.now(),
        )
        self._ending = job.parameters.end

    def _begin(self, job: Job, engine: Engine) -> Session:
        directory, now = self._all.core.directory, self._all.core.now()
        former = directory.sessions.get(self._name)
        if former is not None and former.closing is None:
            if directory.draining:
                # It is not ended for one that cannot begin.
                raise Refused(stopping(directory.limits.retry_s))
            if former.applied_seq:
                job.notes[RESTARTED] = former.applied_seq
            directory.close(former, _NOBODY, now)
        return directory.create(engine, now, session_id=self._name, max_in_flight=directory.limits.max_in_flight)

    def _live(self, job: Job) -> Session:
        """The live session of the sequence.

        Raises:
            Refused: SEQUENCE_INVALID, with the reason why there is none.
        """
        try:
            session = self._all.core.directory.lookup(self._name)
        except Refused as refusal:
            self._served(job)
            raise Refused(self._not_begun(job, refusal.fault)) from refusal
        if job.request.model_version not in {"", session.engine.version}:
            raise Refused(
                Fault(
                    e.ERROR_REASON_SEQUENCE_INVALID,
                    f"sequence {self._id} of model '{job.request.model_name}' is on version {session.engine.version}, "
                    f"and the request asks for version {job.request.model_version}: leave it out, or begin anew",
                    {"model": job.request.model_name, "sequence_id": str(self._id)},
                )
            )
        return session

    def _served(self, job: Job) -> Engine:
        """Of the version that the request asks for.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY or MODEL_INVALID.
        """
        return self._all.core.repository.find(job.request.model_name, job.request.model_version).serving

    def _not_begun(self, job: Job, why: Fault) -> Fault:
        model = job.request.model_name
        message = (
            f"inference request for sequence {self._id} to model '{model}' must specify the START flag on the first "
            "request of the sequence"
        )
        if why.reason != e.ERROR_REASON_SESSION_NOT_FOUND:
            # It was here: nobody is left to wonder whether its state is still what it was.
            message += f". It was here and is gone: {why.message}"
        metadata = {"model": model, "sequence_id": str(self._id)}
        if why.reason == e.ERROR_REASON_SESSION_EXPIRED:
            metadata["idle_timeout_s"] = why.metadata.get("idle_timeout_s", "")
        return Fault(e.ERROR_REASON_SEQUENCE_INVALID, message, metadata)


def _tell(turn: Turn) -> None:
    job, result = turn.job, turn.result
    if isinstance(result, Fault):
        job.reply(result)
    elif result is None or turn.engine is None or turn.content is None:
        raise AssertionError("told before it was answered")
    else:
        job.reply(respond(job, turn.engine, turn.content, [result]))


class _Nobody:
    """Whom nothing is told."""

    def answered(self, answer: Answer) -> None:
        """Nobody waits for it."""

    def closed(self, event: Closed) -> None:
        """Nobody waits for it."""


_NOBODY = _Nobody()
