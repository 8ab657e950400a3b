"""What every session of a run does, from a seed: how it is opened, what it is given, when it pauses and changes hands.

Invariant: a script is a pure function of its settings, so that each process makes its own and all have the same.
"""

import dataclasses
import json
import random
from dataclasses import dataclass
from typing import Self

CLIENTS = 2
# Rows of a population.
_ROWS = 10
_POPULATIONS_SHARE = 0.2
_OWN_STREAM_SHARE = 0.3
_PIPELINED_SHARE = 0.4
_SYNC_SHARE = 0.35
_HAND_OVER_SHARE = 0.2
_IDLE_SHARE = 0.25
_FLUSH_SHARE = 0.3
# Longer than a replica keeps an idle session in memory.
IDLE_S = (3.0, 5.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a script.

    Attributes:
        seed: decides everything that is not said here.
        sessions: in all.
        steps: of each.
        pause_s: between two steps of a session, on average.
        durable: the servers have a store: sessions say how durable they are, are flushed, and may be anybody's next.
            False: only sessions that a proxy finds by their ids change hands.
        affine: every session has a stream of its own, so that it is found by its id after a cut.
        idles: some sessions pause for so long that they leave the servers' memory.
        prefix: of the sessions' ids.
    """

    seed: int
    sessions: int = 200
    steps: int = 90
    pause_s: float = 0.35
    durable: bool = True
    affine: bool = False
    idles: bool = True
    prefix: str = "s"

    def to_json(self) -> str:
        """For the command line of a client."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` gave."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Role:
    """What one session does, or a population of them.

    Attributes:
        ids: of the sessions: one, or the rows of a population.
        client: the process that begins it; the next one goes on after a change of hands.
        durability: `async` or `sync`.
        own_stream: it shares its stream with nobody.
        pipelined: several steps are on their way at once, where there is time.
        lengths: time steps of each step.
        pauses_s: before each step.
        hand_over_at: steps after which another process goes on; 0: none.
        flush_at: steps after which it waits until they are in the store.
    """

    ids: tuple[str, ...]
    client: int
    durability: str
    own_stream: bool
    pipelined: bool
    lengths: tuple[int, ...]
    pauses_s: tuple[float, ...]
    hand_over_at: int
    flush_at: frozenset[int]

    @property
    def name(self) -> str:
        """The first of its ids."""
        return self.ids[0]

    @property
    def is_population(self) -> bool:
        """Its sessions step together."""
        return len(self.ids) > 1

    def legs(self, client: int) -> list[tuple[int, int]]:
        """The steps that a client process takes: (after step, up to step), at most one pair."""
        whole, at = len(self.lengths), self.hand_over_at
        if not at:
            return [(0, whole)] if client == self.client else []
        return [(0, at)] if client == self.client else [(at, whole)] if client == (self.client + 1) % CLIENTS else []


class Script:
    """What all sessions do.

    Attributes:
        seed: of the settings; the inputs follow from it too.
        roles: who does what.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seed = settings.seed
        chance = random.Random(f"script {settings.seed}")
        left = [f"{settings.prefix}-{number:03d}" for number in range(settings.sessions)]
        self.roles: list[Role] = []
        populations = 0 if settings.affine else round(settings.sessions * _POPULATIONS_SHARE / _ROWS)
        for _ in range(populations):
            rows, left = left[:_ROWS], left[_ROWS:]
            self.roles.append(self._role(tuple(rows), len(self.roles) % CLIENTS, chance))
        for session in left:
            self.roles.append(self._role((session,), len(self.roles) % CLIENTS, chance))

    def _role(self, ids: tuple[str, ...], client: int, chance: random.Random) -> Role:
        settings, steps = self.settings, self.settings.steps
        population = len(ids) > 1
        own_stream = settings.affine or (not population and chance.random() < _OWN_STREAM_SHARE)
        pauses = [chance.uniform(0.0, 2 * settings.pause_s) for _ in range(steps)]
        if settings.idles and chance.random() < _IDLE_SHARE:
            pauses[chance.randrange(1, steps)] = chance.uniform(*IDLE_S)
        hands_over = chance.random() < _HAND_OVER_SHARE and (settings.durable or (own_stream and not population))
        flushes = settings.durable and chance.random() < _FLUSH_SHARE
        return Role(
            ids=ids,
            client=client,
            durability="sync" if chance.random() < _SYNC_SHARE else "async",
            own_stream=own_stream,
            pipelined=chance.random() < _PIPELINED_SHARE,
            # All rows of a population have one length here; ragged ones are the unit tests'.
            lengths=tuple(chance.choice((1, 1, 1, 2, 5)) for _ in range(steps)),
            pauses_s=tuple(pauses),
            hand_over_at=chance.randrange(steps // 4, 3 * steps // 4) if hands_over else 0,
            flush_at=frozenset(chance.sample(range(1, steps), 2)) if flushes else frozenset(),
        )
