"""What a servicer asks of whoever drives the core, and how it waits for an answer.

Invariant: a servicer runs on the core thread, so it may call the directory directly; what it caused is carried out
after `kick`, and what it waits for comes through a Waiter.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from conveyor_proto.codec import Array
from google.protobuf.timestamp_pb2 import Timestamp

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused
from conveyor_server.keeper.beat import Beat
from conveyor_server.repository import Repository
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.events import Answer, Attachment, Closed, Detached, Slept
from conveyor_server.sessions.flight import Offer
from conveyor_server.sessions.session import Submission
from conveyor_server.tracing import CallTrace, Tracing, current

if TYPE_CHECKING:
    from conveyor_server.compiled import Turn


class Core(Protocol):
    """The core and its driver. Core thread only."""

    @property
    def directory(self) -> Directory:
        """All sessions."""

    @property
    def repository(self) -> Repository[Engine]:
        """All models."""

    @property
    def store(self) -> Beat | None:
        """Where sessions are kept; None: in memory alone."""

    @property
    def says_durable(self) -> bool:
        """Answers say up to where their session is in the store."""

    @property
    def max_time_steps(self) -> int:
        """Time steps that one step may hold."""

    @property
    def tracing(self) -> Tracing | None:
        """Traces calls and steps; None: nobody does."""

    @property
    def pressed(self) -> bool:
        """A run is to come before the next turn, in which nobody is answered: a part of a long step, say."""

    def add(self, engine: Engine, step_s: Mapping[tuple[int, int], float]) -> None:
        """Runs an engine's steps from now on; `step_s`: seconds that a run of (rows, time steps) took."""

    async def remove(self, engine: Engine) -> None:
        """Stops running an engine that takes part no more; returns once it has nothing left to run."""

    def now(self) -> float:
        """Seconds of the driver's clock."""

    def wall(self, at: float) -> float:
        """The unix seconds of a moment of the driver's clock."""

    def timestamp(self, at: float) -> Timestamp:
        """The wall-clock time of a moment of the driver's clock."""

    def kick(self) -> None:
        """Has events routed and ready steps run, once everything that arrived in this turn is in."""

    def run_now(self, offer: Offer) -> bool:
        """Runs and answers an offer that is all that this turn has, where nothing is before it; else False.

        Then nothing has happened, and the directory is to be offered it.
        """

    def run_one_now(self, seat: Attachment, step: Submission, reply: Callable[[Sequence[Array]], None]) -> bool:
        """Runs a valid step that is all that this turn has, where nothing is before it; else False.

        `reply` gets its outputs, `[time, *shape]`, or `[*shape]` without time. Where it is False, nothing has happened,
        and the step is to be submitted.
        """

    def run_turn(self, turn: "Turn", tell: Callable[[list[bytes]], None]) -> bool:
        """Runs a turn that the compiled part has read, where nothing is before its steps; else False.

        `tell` gets the answers, for the turn's senders in order. Where it is False, nothing has happened.
        """

    def catch_up(self) -> None:
        """Hands out the events so far, if there are some.

        Before steps are read by rows of the session table: a session that has left may have its row given to another
        already, and its stream is to know.
        """

    def route(self) -> None:
        """Hands the events so far to whom they are for, now."""

    def before_turns(self, gather: Callable[[], bool]) -> None:
        """Calls `gather` at the beginning of every turn.

        True: all that it found is answered already, and nothing was submitted.
        """

    def after_removal(self, forget: Callable[[Engine], None]) -> None:
        """Calls `forget` with every engine that takes part no more."""

    def after_routing(self, flush: Callable[[], None]) -> None:
        """Calls `flush` once, when the events at hand have all been handed out."""


class ReplyTo(Protocol):
    """Who waits for a step or a close."""

    def answered(self, answer: Answer) -> None:
        """A step is answered."""

    def closed(self, event: Closed) -> None:
        """The session that was asked to close is gone."""


def trace_of(address: object) -> CallTrace | None:
    """The trace of the call that an answer goes to, or that holds a session: a stream, a Waiter, any `reply_to`."""
    return getattr(address, "trace", None)


class Holder(Protocol):
    """Who holds sessions: the owner of an Attachment."""

    def detached(self, event: Detached) -> None:
        """A session left."""

    def slept(self, event: Slept) -> None:
        """A session's state is in the store alone."""


class Waiter:
    """A unary call that waits for one event. A caller that is gone is no error.

    Attributes:
        trace: of the call.
    """

    def __init__(self) -> None:
        self.trace = current()
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._closed: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()

    def answered(self, answer: Answer) -> None:
        """The step's answer is here."""
        if not self._answer.done():
            self._answer.set_result(answer)

    def closed(self, event: Closed) -> None:
        """The session is gone."""
        if not self._closed.done():
            self._closed.set_result(event)

    async def answer(self) -> Answer:
        """The answer, with outputs or with a fault."""
        return await self._answer

    async def close(self) -> Closed:
        """The end of the session.

        Raises:
            Refused: SESSION_TAKEN_OVER: it is another server's, where it lives on.
        """
        event = await self._closed
        if event.fault is not None:
            raise Refused(event.fault)
        return event
