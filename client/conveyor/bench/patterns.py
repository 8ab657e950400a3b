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
    """Each session sends as soon as it has an answer, and always has as many steps on their way as it may.

    One that was refused, and told when to try again, waits until then.
    """

    def __init__(self, spec: LoadSpec, conversation: Conversation) -> None:
        self._all = np.arange(spec.sessions)
        self._in_flight = spec.in_flight
        self._conversation = conversation

    @property
    def next_ns(self) -> float:
        """When the first of the waiting sessions may try again."""
        return min(self._conversation.resting.values(), default=_NEVER)

    def begin(self, now_ns: int) -> None:
        """Sends all that may be on its way."""
        for _ in range(self._in_flight):
            self._conversation.send(self._all, now_ns)

    def turn(self, now_ns: int, freed: Integers) -> None:
        """Sends a step for each that came back."""
        resting = self._conversation.resting
        if self._in_flight == 1 and not resting:
            self._conversation.send(np.sort(freed), now_ns)
            return
        sessions = np.unique(np.concatenate([freed, rested(resting, now_ns)]))
        if resting:
            sessions = sessions[[session not in resting for session in sessions.tolist()]]
        self._conversation.send(np.repeat(sessions, self._conversation.ledger.room(sessions)), now_ns)

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Nothing is left over."""


class ClosedFrames:
    """Each stream sends a frame of all its sessions as soon as all rows of the last one but `in_flight` are back.

    Sessions that were refused sit out until nothing of theirs is on its way, and until they were told to try again.
    """

    def __init__(self, spec: LoadSpec, conversation: Conversation) -> None:
        self._in_flight = spec.in_flight
        self._conversation = conversation
        topology = conversation.topology
        self._stream = topology.stream
        self._first = topology.first_session

    @property
    def next_ns(self) -> float:
        """When the first of the waiting sessions may try again."""
        return min(self._conversation.resting.values(), default=_NEVER)

    def begin(self, now_ns: int) -> None:
        """Sends all frames that may be on their way."""
        everyone = np.arange(len(self._stream))
        for _ in range(self._in_flight):
            self._conversation.send(everyone, now_ns)

    def turn(self, now_ns: int, freed: Integers) -> None:
        """Sends a frame for each that came back whole."""
        resting, ledger = self._conversation.resting, self._conversation.ledger
        if resting:
            freed = np.concatenate([freed, rested(resting, now_ns)])
        for stream in np.unique(self._stream[freed]).tolist():
            going = np.arange(self._first[stream], self._first[stream + 1])
            if ledger.failing or resting:
                going = going[(ledger.failed[going] == 0) & [session not in resting for session in going.tolist()]]
            for _ in range(int(ledger.room(going).min()) if going.size else 0):
                self._conversation.send(going, now_ns)

    def end(self, now_ns: int, result: LoadResult) -> None:
        """Nothing is left over."""


def rested(resting: dict[int, int], now_ns: int) -> Integers:
    """Takes out the sessions that have waited for long enough."""
    found = [session for session, until_ns in resting.items() if until_ns <= now_ns]
    for session in found:
        del resting[session]
    return np.array(found, np.int64)


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
        result.unsent, result.shed = self._arrivals.waiting, self._arrivals.shed
        if result.unsent:
            result.unsent_oldest_s = (now_ns - self._arrivals.oldest_ns()) / 1e9


def pattern_of(spec: LoadSpec, conversation: Conversation, start_ns: int, rng: np.random.Generator) -> Pattern:
    """The pattern that a spec asks for."""
    if spec.pattern is not Kind.CLOSED:
        return Open(spec, conversation, start_ns, rng)
    return ClosedFrames(spec, conversation) if spec.frames else Closed(spec, conversation)
