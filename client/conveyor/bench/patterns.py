"""Which sessions step next: as they are answered (closed loop), or as their steps fall due (open loop)."""

import math
from typing import Protocol

import numpy as np

from conveyor.bench.arrivals import Arrivals
from conveyor.bench.conversation import Conversation
from conveyor.bench.ledger import Integers
from conveyor.bench.result import LoadResult
from conveyor.bench.spec import LoadSpec
from conveyor.bench.spec import Pattern as Kind

_NEVER = math.inf


class Pattern(Protocol):
    """Decides what is sent in one run.

    Attributes:
        next_ns: when it has something to send even if nothing comes.
    """

    @property
    def next_ns(self) -> float:
        """See the class."""

    def begin(self, now_ns: int) -> None:
        """The run begins."""

    def turn(self, now_ns: int, freed: Integers) -> None:
        """These sessions were answered, one as often as it was."""

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Nothing more is sent; tells what was left over."""


class Closed:
    """Each session sends as soon as it has an answer, and always has as many steps on their way as it may."""

    next_ns = _NEVER

    def __init__(self, spec: LoadSpec, conversation: Conversation) -> None:
        self._all = np.arange(spec.sessions)
        self._in_flight = spec.in_flight
        self._conversation = conversation

    def begin(self, now_ns: int) -> None:
        """Sends all that may be on its way."""
        for _ in range(self._in_flight):
            self._conversation.send(self._all, now_ns)

    def turn(self, now_ns: int, freed: Integers) -> None:
        """Sends a step for each that came back."""
        ledger = self._conversation.ledger
        if self._in_flight == 1:
            self._conversation.send(np.sort(freed), now_ns)
        elif freed.size:
            sessions = np.unique(freed)
            self._conversation.send(np.repeat(sessions, ledger.room(sessions)), now_ns)

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Nothing is left over."""


class ClosedFrames:
    """Each stream sends a frame of all its sessions as soon as all rows of the last one but `in_flight` are back."""

    next_ns = _NEVER

    def __init__(self, spec: LoadSpec, conversation: Conversation) -> None:
        self._in_flight = spec.in_flight
        self._conversation = conversation
        topology = conversation.topology
        self._stream = topology.stream
        self._first = topology.first_session

    def begin(self, now_ns: int) -> None:
        """Sends all frames that may be on their way."""
        everyone = np.arange(len(self._stream))
        for _ in range(self._in_flight):
            self._conversation.send(everyone, now_ns)

    def turn(self, now_ns: int, freed: Integers) -> None:
        """Sends a frame for each that came back whole."""
        if not freed.size:
            return
        ledger = self._conversation.ledger
        for stream in np.unique(self._stream[freed]).tolist():
            sessions = np.arange(self._first[stream], self._first[stream + 1])
            # A session whose step was refused waits until nothing of it is on its way, and then comes in again.
            going = sessions[ledger.failed[sessions] == 0]
            for _ in range(int(ledger.room(going).min()) if going.size else 0):
                self._conversation.send(going, now_ns)

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Nothing is left over."""


class Open:
    """Steps are sent as they fall due, by messages or by a frame for each stream."""

    def __init__(self, spec: LoadSpec, conversation: Conversation, start_ns: int, rng: np.random.Generator) -> None:
        self._arrivals = Arrivals(spec, start_ns, rng)
        self._conversation = conversation

    @property
    def next_ns(self) -> float:
        """When the next step falls due."""
        return self._arrivals.next_ns

    def begin(self, now_ns: int) -> None:
        """Nothing is due yet."""

    def turn(self, now_ns: int, freed: Integers) -> None:
        """Sends what is due and has room."""
        self._conversation.send(*self._arrivals.due(now_ns, freed, self._conversation.ledger))

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Steps that waited for their session are left over."""
        result.unsent = self._arrivals.waiting
        if result.unsent:
            result.unsent_oldest_s = (now_ns - self._arrivals.oldest_ns()) / 1e9


def pattern_of(spec: LoadSpec, conversation: Conversation, start_ns: int, rng: np.random.Generator) -> Pattern:
    """The pattern that a spec asks for."""
    if spec.pattern is not Kind.CLOSED:
        return Open(spec, conversation, start_ns, rng)
    return ClosedFrames(spec, conversation) if spec.frames else Closed(spec, conversation)
