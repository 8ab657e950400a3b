"""One sequence: its requests that are under way, in the order in which they came.

Invariants: a request that cannot be used moves nothing, and the sequence goes on; one that would begin a live sequence
anew, or that follows its end, waits for what is before it; what is kept of a sender that does not listen is bounded.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several

import numpy as np
from conveyor_proto.codec import Array, WireError
from conveyor_proto.fingerprint import fingerprint
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2
from google.rpc import code_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.identity.caller import public_name
from conveyor_server.inference import coming
from conveyor_server.inference.answers import respond
from conveyor_server.inference.job import Job, take_back
from conveyor_server.inference.requests import Content
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.creation import Wanted
from conveyor_server.sessions.events import Answer, Closed
from conveyor_server.sessions.refusals import stopping
from conveyor_server.sessions.session import Session, Submission
from conveyor_server.tracing import CallTrace
from conveyor_server.transport.seat import NOBODY

# Requests of one sequence that are kept, in multiples of a session's credit: steps, and what waits or was refused.
_MOST_CREDITS = 2
# Of a START on a live sequence: how many steps the sequence had that it begins anew.
RESTARTED = "conveyor_restarted_after_steps"


class Place:
    """A request in its sequence's order. As a `reply_to`, it gets its step's answer.

    Attributes:
        job: the request.
        engine: of its session; None: not known yet.
        content: its tensors; None: not read yet, or they cannot be used.
        seq: of its step; 0: it is not submitted.
        result: outputs, or why there are none; None: not yet.
    """

    __slots__ = ("_sequence", "content", "engine", "job", "result", "seq")

    def __init__(self, sequence: "Sequence", job: Job) -> None:
        self._sequence = sequence
        self.job = job
        self.engine: Engine | None = None
        self.content: Content | None = None
        self.seq = 0
        self.result: Several[Array] | Fault | None = None

    @property
    def trace(self) -> CallTrace | None:
        """Of the call that it came with."""
        return self.job.trace

    def answered(self, answer: Answer) -> None:
        """Its step is answered; what it tells of may have to be in the store first."""
        self._sequence.wait_for_store(self, answer)

    def told(self, result: Several[Array] | Fault) -> None:
        """Its step is answered, and its caller may know."""
        self.result = result
        self._sequence.answered(self)

    def closed(self, _: Closed) -> None:
        """The session that ends with it is gone."""
        self._sequence.gone()

    def cancel(self) -> None:
        """The caller is gone. What has not run and has nothing behind it is taken back; else it is run for nobody."""
        self._sequence.cancel(self)


class Sequence:
    """The requests of one sequence that are under way. Core thread only.

    Args:
        core: what drives the sessions.
        statistics: counts what is read.
        sequence: its correlation id.
        name: its session's full name.
        done: called with the name, once nothing is under way.
    """

    __slots__ = (
        *("_awaits", "_core", "_done", "_ending", "_id", "_name", "_places", "_session", "_statistics"),
        *("_taking", "_waiting"),
    )

    def __init__(
        self, core: Core, statistics: Statistics, sequence: int | str, name: str, done: Callable[[str], None]
    ) -> None:
        self._core = core
        self._statistics = statistics
        self._done = done
        self._name = name
        self._id = sequence
        self._session: Session | None = None
        # Unanswered, in the order in which they came; and behind them those that wait for the end of the session.
        self._places: deque[Place] = deque()
        self._waiting: deque[Place] = deque()
        self._ending = False
        # The session is awaited from the store.
        self._awaits = False
        # What happens now is told by whoever takes a request, once it is taken.
        self._taking = False

    def add(self, job: Job) -> Place:
        """Takes a request, or has it wait for what is before it.

        Raises:
            Refused: CREDIT_EXCEEDED, where too much of the sequence is under way.
        """
        place = Place(self, job)
        if len(self._places) + len(self._waiting) >= _MOST_CREDITS * self._core.directory.limits.max_in_flight:
            raise Refused(self._too_many(job))
        if self._must_wait(place):
            self._waiting.append(place)
        else:
            self._take(place)
            self.advance()
        return place

    def advance(self) -> None:
        """Tells what is answered, in order, and takes what waited for that."""
        while True:
            while self._places and self._places[0].result is not None:
                _tell(self._places.popleft())
            if not self._waiting or self._ending or self._awaits:
                break
            if self._places and self._waiting[0].job.parameters.start:
                break
            self._take(self._waiting.popleft())
        if not self._places and not self._waiting and not self._ending:
            self._done(self._name)

    def wait_for_store(self, place: Place, answer: Answer) -> None:
        """Tells a place its answer, once the store has what a SYNC session's tells of."""
        store, session = self._core.store, answer.session
        if answer.fault is not None:
            place.told(answer.fault)
        elif store is None or session.durability < session_pb2.DURABILITY_SYNC:
            place.told(answer.outputs)
        else:
            store.when_durable(session, lambda fault: place.told(answer.outputs if fault is None else fault))

    def gone(self) -> None:
        """The session that was to end is gone."""
        self._ending = False
        self._session = None
        self.advance()
        self._core.kick()

    def cancel(self, place: Place) -> None:
        """See Place.cancel."""
        if place in self._waiting:
            self._waiting.remove(place)
            self.advance()
        elif place.seq and place.result is None and self._session is not None:
            if not take_back(self._core, self._session, place.seq, place):
                return
            self._places.remove(place)
            self._ending = False
            self.advance()

    def answered(self, place: Place) -> None:
        """A step is answered; if it was the last and did what it should, the session ends with it."""
        if place.job.parameters.end:
            if isinstance(place.result, Fault) or self._session is None:
                self._ending = False
            else:
                self._core.directory.close(self._session, place, self._core.now())
                self._core.kick()
        self.advance()

    # ------------------------------------------------------------ within

    def _must_wait(self, place: Place) -> bool:
        return bool(self._waiting) or self._ending or self._awaits or bool(place.job.parameters.start and self._places)

    def _take(self, place: Place) -> None:
        self._places.append(place)
        self._taking = True
        try:
            self._submit(place)
        except (Refused, WireError) as refusal:
            place.result = refusal.fault
        except Exception:
            # A defect, for whoever called: no other request is to wait behind what will never be answered.
            self._places.remove(place)
            self.advance()
            raise
        finally:
            self._taking = False

    def _submit(self, place: Place) -> None:
        job, store = place.job, self._core.store
        if job.parameters.start:
            engine = place.engine = self._served(job)
            # Before anything moves: a request that cannot be used does not begin the sequence anew either.
            self._read(place, engine)
            if store is None:
                self._step(place, self._begin(job, engine))
            else:
                self._awaits = True
                limits = self._core.directory.limits
                coming.begin(
                    self._core,
                    store,
                    Wanted(
                        engine,
                        session_id=public_name(self._name),
                        max_in_flight=limits.max_in_flight,
                        tenant=job.caller.tenant,
                        max_sessions=job.caller.max_sessions,
                    ),
                    replaced=lambda former: self._note_restart(job, former),
                    then=lambda come: self._come(place, come),
                )
        elif store is None or self._name in self._core.directory.sessions:
            self._go_on(place, self._live(job))
        else:
            self._awaits = True
            coming.find(self._core, store, self._name, lambda come: self._come(place, come))

    def _come(self, place: Place, come: Session | Fault) -> None:
        """The session that a request awaits is here, or it is known why not."""
        self._awaits = False
        try:
            if place.job.parameters.start:
                self._step(place, _here(come))
            else:
                self._go_on(place, self._checked(place.job, come))
        except (Refused, WireError) as refusal:
            place.result = refusal.fault
        if not self._taking:
            self.advance()
            self._core.kick()

    def _go_on(self, place: Place, session: Session) -> None:
        place.engine = session.engine
        self._read(place, session.engine)
        self._step(place, session)

    def _read(self, place: Place, engine: Engine) -> None:
        place.content = place.job.read(engine, self._statistics, max_time_steps=self._core.max_time_steps)

    def _step(self, place: Place, session: Session) -> None:
        job, core, content = place.job, self._core, place.content
        if content is None:
            raise AssertionError("a request that was not read")
        self._session = session
        place.seq = session.accepted_seq + 1
        inputs = [array[0] for array in content.inputs]
        limits = core.directory.limits
        core.directory.submit(
            session,
            Submission(
                place.seq,
                place,
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
        directory, now = self._core.directory, self._core.now()
        former = directory.sessions.get(self._name)
        # Whoever gave his own session that name keeps it: `create` says so.
        if former is not None and former.closing is None and former.engine.model == job.request.model_name:
            if directory.draining:
                # It is not ended for one that cannot begin.
                raise Refused(stopping(directory.limits.retry_s))
            self._note_restart(job, former)
            directory.close(former, NOBODY, now)
        return directory.create(
            engine,
            now,
            session_id=public_name(self._name),
            tenant=job.caller.tenant,
            max_of_tenant=job.caller.max_sessions,
            max_in_flight=directory.limits.max_in_flight,
        )

    @staticmethod
    def _note_restart(job: Job, former: Session) -> None:
        if former.applied_seq:
            job.notes[RESTARTED] = former.applied_seq

    def _live(self, job: Job) -> Session:
        """The live session of the sequence, in memory.

        Raises:
            Refused: SEQUENCE_INVALID, with the reason why there is none.
        """
        try:
            session = self._core.directory.lookup(self._name)
        except Refused as refusal:
            return self._checked(job, refusal.fault)
        return self._checked(job, session)

    def _checked(self, job: Job, session: Session | Fault) -> Session:
        """The session, if it is one that the request can go on with.

        Raises:
            Refused: SEQUENCE_INVALID, with the reason why there is none; or why that is not known.
        """
        if isinstance(session, Fault):
            if session.code != code_pb2.NOT_FOUND:
                raise Refused(session)
            self._served(job)
            raise Refused(self._not_begun(job, session))
        if session.engine.model != job.request.model_name:
            self._served(job)
            raise Refused(self._not_begun(job, None))
        if job.request.model_version not in {"", session.engine.version}:
            raise Refused(
                Fault(
                    e.ERROR_REASON_SEQUENCE_INVALID,
                    f"sequence {self._id} of model '{job.request.model_name}' is on version {session.engine.version}, "
                    f"and the request asks for version {job.request.model_version[:32]}: leave it out, or begin anew",
                    {"model": job.request.model_name, "sequence_id": str(self._id)},
                )
            )
        return session

    def _served(self, job: Job) -> Engine:
        """Of the version that the request asks for.

        Raises:
            Refused: MODEL_NOT_FOUND, MODEL_NOT_READY or MODEL_INVALID.
        """
        return self._core.repository.find(job.request.model_name, job.request.model_version).serving

    def _too_many(self, job: Job) -> Fault:
        """Told at once, before others of its sequence: what is kept of a sender that does not listen is bounded."""
        most = self._core.directory.limits.max_in_flight
        return Fault(
            e.ERROR_REASON_CREDIT_EXCEEDED,
            f"sequence {self._id} of model '{job.request.model_name}' has over {_MOST_CREDITS * most} requests "
            "unanswered: wait for answers",
            {"session_id": public_name(self._name), "seq": "0", "max_in_flight": str(most)},
        )

    def _not_begun(self, job: Job, why: Fault | None) -> Fault:
        model = job.request.model_name
        message = (
            f"inference request for sequence {self._id} to model '{model}' must specify the START flag on the first "
            "request of the sequence"
        )
        metadata = {"model": model, "sequence_id": str(self._id)}
        if why is None:
            message += f". Session {public_name(self._name)!r} is of another model, and not this sequence's"
        elif why.reason != e.ERROR_REASON_SESSION_NOT_FOUND:
            # It was here: nobody is left to wonder whether its state is still what it was.
            message += f". It was here and is gone: {why.message}"
            if why.reason == e.ERROR_REASON_SESSION_EXPIRED:
                metadata["idle_timeout_s"] = why.metadata.get("idle_timeout_s", "")
        return Fault(e.ERROR_REASON_SEQUENCE_INVALID, message, metadata)


def _here(come: Session | Fault) -> Session:
    if isinstance(come, Fault):
        raise Refused(come)
    return come


def _tell(place: Place) -> None:
    job, result = place.job, place.result
    if isinstance(result, Fault):
        job.reply(result)
    elif result is None or place.engine is None or place.content is None:
        raise AssertionError("told before it was answered")
    else:
        job.reply(respond(job, place.engine, place.content, [array[np.newaxis] for array in result]))
