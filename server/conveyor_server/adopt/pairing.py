"""Which output is the new value of which input: by what was said, by recurrent operators, by names; else a question.

Invariant: a pair is found only where nothing else could be one. Two states of one shape are told apart by what the
graph does with them or by their names, and never by the order in which they stand.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conveyor_server.adopt.answers import Answers
from conveyor_server.runner.adopting import may_be_state
from conveyor_server.runner.foreign import Tensor
from conveyor_server.runner.lineage import Lineage

# Words that say before or after, and nothing of what it is.
_MARKS = frozenset(
    {"in", "input", "prev", "previous", "past", "old", "init", "initial", "last"}
    | {"out", "output", "next", "new", "present", "updated", "final"}
)
# Letters and digits that may say it too, at a name's end: h0 and hn, state and stateN.
_MAY_SAY_BEFORE, _MAY_SAY_AFTER = frozenset({"0"}), frozenset({"n"})
# What is said of memory. `audio_in` and `audio_out` are a pair of names, and no state.
_MEMORY = re.compile(
    r"states?|hidden\w*|cells?|caches?|cached|mem|memory|memories|buf|buffers?|ctx|contexts?|rnn|lstm|gru|[hc]|hc|hx|cx|lens?"
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True, slots=True)
class Pairing:
    """Inputs by what they are.

    Attributes:
        states: input -> output, in the graph's order.
        inputs: what is no state, constant or start, in the graph's order.
        reasons: input -> why it is a state of that output.
    """

    states: Mapping[str, str]
    inputs: tuple[str, ...]
    reasons: Mapping[str, str]


def pair(
    inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], lineage: Lineage, answers: Answers, ask: list[str]
) -> Pairing:
    """Tells states from inputs.

    Args:
        inputs: the graph's.
        outputs: the graph's.
        lineage: what its recurrent operators tell.
        answers: what was said.
        ask: gets a question for each input that could be either.
    """
    left = [name for name in inputs if name not in answers.constants and name not in answers.starts]
    # No state has a window or an axis of time steps.
    sent = answers.inputs.union(answers.windows, answers.time_axes)
    states, reasons = dict(answers.states), dict.fromkeys(answers.states, "as said")
    undecided = [name for name in left if name not in states and name not in sent and not answers.stateless]
    free = [name for name in outputs if name not in states.values()]
    candidates = {
        name: [
            target
            for target in free
            if may_be_state(inputs[name], outputs[target]) and not lineage.denies(name, target)
            # What clients get is a new state as well only where the graph or a person says so.
            if target not in answers.outputs or lineage.takes.get(name)
        ]
        for name in undecided
    }
    for name in undecided:
        found = _settled(name, candidates, lineage)
        if found is not None:
            states[name], reasons[name] = found
    for name in undecided:
        targets = [target for target in candidates[name] if target not in states.values()]
        if name in states:
            continue
        if targets:
            ask.append(_question(inputs[name], [outputs[target] for target in targets]))
        elif lineage.takes.get(name):
            ports = " and ".join(sorted(map(str, lineage.takes[name])))
            ask.append(
                f"input {inputs[name]} is {ports}, and no output could be its new value: make the file anew with that "
                f"as an output; or say that clients send it with every step, --input {name}, or that every step begins "
                f"with the same, --constant {name}=0"
            )
    ordered = {name: states[name] for name in inputs if name in states}
    return Pairing(ordered, tuple(name for name in left if name not in states), reasons)


def _settled(name: str, candidates: Mapping[str, list[str]], lineage: Lineage) -> tuple[str, str] | None:
    """The one output that is an input's new value, and why; None where another could be too, or none."""
    confirmed = _only(name, candidates, lineage.confirms)
    named = _only(name, candidates, _same_name)
    if confirmed is not None and (named is None or named == confirmed):
        ports = lineage.takes[name]
        return confirmed, f"{next(iter(ports))}" if len(ports) == 1 else "as the graph's recurrent operators use it"
    if named is not None and confirmed is None:
        return named, "by name"
    return None


def _only(name: str, candidates: Mapping[str, list[str]], fits: Callable[[str, str], bool]) -> str | None:
    """The candidate that fits, if it is the only one, and fits no other input."""
    fitting = [target for target in candidates[name] if fits(name, target)]
    if len(fitting) != 1:
        return None
    rivals = [other for other, targets in candidates.items() if fitting[0] in targets and fits(other, fitting[0])]
    return fitting[0] if rivals == [name] else None


def _same_name(source: str, target: str) -> bool:
    """True where two names are of one thing before and after, and it is something that is remembered."""
    shared = _readings(source, _MAY_SAY_BEFORE) & _readings(target, _MAY_SAY_AFTER)
    return any(_MEMORY.fullmatch(word) for core in shared for word in core)


def _readings(name: str, may_say: frozenset[str]) -> set[tuple[str, ...]]:
    """What a name may be the name of: its words without marks, and once more without a last one that may be a mark.

    `stateN` may be of `state`, and `h0` of `h`; or of `state n` and `h 0`, because both may count states as well.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if words and len(words[-1]) == 2 and words[-1][1] in may_say:
        words = [*words[:-1], *words[-1]]  # hn
    core = tuple(word for word in words if word not in _MARKS)
    return {core, core[:-1]} if core and core[-1] in may_say else {core}


def _question(source: Tensor, targets: list[Tensor]) -> str:
    flags = " or ".join(f"--state {source.name}={target.name}" for target in targets)
    return (
        f"is input {source} a state, and which output is its new value: {', '.join(map(str, targets))}? "
        f"Say {flags}; or --input {source.name} if clients send it"
    )
