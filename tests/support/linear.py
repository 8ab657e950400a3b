"""One session as it would be if everything happened one thing at a time, and whether a history could have been that.

Invariant: a history is good where its operations can be put in an order in which each lies between the moments of its
call and of its answer, and each answer is what `outcomes` gives there (Herlihy and Wing). An operation of unknown
outcome lies anywhere behind its call, or nowhere. The search is that of Wing and Gong; what was tried in vain from one
state with the same operations done is not tried again (Lowe).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FRESH = 10.0
DONE, EXISTS, GONE, FENCED, GAP, CONFLICT = "done", "exists", "gone", "fenced", "gap", "conflict"


class Result(NamedTuple):
    """What a caller is told.

    Attributes:
        kind: DONE, or why nothing moved.
        epoch, applied: of a create and a resume that are done.
        total: of a step that is done: of it and all before it.
    """

    kind: str
    epoch: int = 0
    applied: int = 0
    total: float = 0.0


@dataclass(slots=True, eq=False)
class Operation:
    """What one caller asked of one session.

    Attributes:
        kind: "create", "resume", "step", "close", or "touch": a call without a stream may raise the epoch.
        called: when.
        holder: of a step or a close: the create or resume that it goes on from; None: whatever holds the session.
        max_epoch: of a resume; 0: any.
        seq, x: of a step.
        answered: when; infinity: never.
        result: None: it may have been done, or not, before it was answered.
    """

    kind: str
    called: int
    holder: "Operation | None" = None
    max_epoch: int = 0
    seq: int = 0
    x: float = 0.0
    answered: float = math.inf
    result: Result | None = None

    def __str__(self) -> str:
        asked = {"max_epoch": self.max_epoch, "seq": self.seq, "x": self.x}
        of = f" of {self.holder.called}" if self.holder is not None else ""
        with_what = "".join(f" {name}={value}" for name, value in asked.items() if value)
        told = "?" if self.result is None else " ".join(str(value) for value in self.result if value)
        return f"{self.called}: {self.kind}{of}{with_what} -> {told} at {self.answered}"


Steps = tuple[float, ...]


class State(NamedTuple):
    """The session; `past` is what each that has held it had when it lost it, `made` how often it was created."""

    made: int = 0
    lives: bool = False
    epoch: int = 0
    holder: Operation | None = None
    steps: Steps = ()
    past: tuple[tuple[Operation | None, Steps], ...] = ()


Outcome = tuple[State, Result]


def outcomes(state: State, op: Operation, births: Sequence[int]) -> Iterator[Outcome]:
    """What can become of the session, and what the caller is told then. What is not DONE moves nothing.

    Args:
        state: before.
        op: what is asked for.
        births: first epochs of the sessions that were created, one after the other, under the name.
    """
    past = (*state.past, (state.holder, state.steps)) if state.lives else state.past
    if op.kind == "create":
        if state.lives:
            yield state, Result(EXISTS)
        elif state.made < len(births):
            epoch = births[state.made]
            yield State(state.made + 1, True, epoch, op, (), past), Result(DONE, epoch)
    elif op.kind in {"resume", "touch"}:
        if not state.lives:
            yield state, Result(GONE)
        elif op.max_epoch and state.epoch > op.max_epoch:
            yield state, Result(FENCED)
        else:
            holder, epoch = op if op.kind == "resume" else None, state.epoch + 1
            taken = State(state.made, True, epoch, holder, state.steps, past)
            yield taken, Result(DONE, epoch, len(state.steps))
            if op.kind == "touch":
                # On the server of whoever holds it, who goes on.
                yield taken._replace(holder=state.holder, past=state.past), Result(DONE, epoch)
            # Somebody else has taken it before this one was told.
            yield taken, Result(FENCED)
    elif state.lives and op.holder in {None, state.holder}:
        yield (State(state.made, past=past), Result(DONE)) if op.kind == "close" else _step(state, op)
        if op.kind == "close":
            # It was done, the store did not say so, and the name was somebody else's when it was asked again.
            yield State(state.made, past=past), Result(FENCED)
    elif not state.lives:
        yield state, Result(GONE)
        if op.kind == "close" and state.past:
            # What was asked for is so, whoever has done it.
            yield state, Result(DONE)
    if op.kind in {"step", "close"} and (op.holder is None or op.holder is not state.holder or not state.lives):
        yield state, Result(FENCED)
        if op.kind == "step" and _runs_still(state, op) and _known(state.steps, op) is None:
            yield _step(state, op)
        # Who has lost the session and does not know it yet is told again what was so when it lost it.
        for holder, steps in state.past if op.kind == "step" else ():
            if op.holder in {None, holder} and (known := _known(steps, op)) is not None:
                yield state, known


def _runs_still(state: State, op: Operation) -> bool:
    """It ran when its holder lost the session to somebody on the same server, and is finished."""
    lost_last = bool(state.past) and state.past[-1][0] is op.holder
    return state.lives and lost_last and state.holder is not None and op.called < state.holder.answered


def _step(state: State, op: Operation) -> Outcome:
    known = _known(state.steps, op)
    if known is not None:
        return state, known
    steps = (*state.steps, op.x)
    return state._replace(steps=steps), Result(DONE, total=FRESH + sum(steps))


def _known(steps: Steps, op: Operation) -> Result | None:
    """What is told of a step that is not the next; None: it is."""
    if op.seq > len(steps):
        return Result(GAP) if op.seq > len(steps) + 1 else None
    if steps[op.seq - 1] != op.x:
        return Result(CONFLICT)
    return Result(DONE, total=FRESH + sum(steps[: op.seq]))


def is_linearisable(history: Sequence[Operation], births: Sequence[int]) -> bool:
    """The history of one name could have been that of `outcomes`, from where there is no session."""
    seen: set[tuple[int, State]] = set()
    told = sum(1 << index for index, op in enumerate(history) if op.result is not None)

    def search(done: int, state: State) -> bool:
        if done & told == told:
            return True
        if (done, state) in seen:
            return False
        seen.add((done, state))
        left = [(index, op) for index, op in enumerate(history) if not done >> index & 1]
        first = min(op.answered for _, op in left if op.result is not None)
        last = max((op.called for index, op in enumerate(history) if done >> index & 1), default=0)
        return any(
            search(done | 1 << index, after)
            for index, op in left
            if op.called < first and op.answered > last
            for after, result in outcomes(state, op, births)
            if (op.result == result if op.result is not None else after is not state)
        )

    return search(0, State())
