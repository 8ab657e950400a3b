"""Which recurrent operator a state goes into and comes out of, where the graph tells.

Invariant: what is found holds; where the graph does not tell, nothing is found. A state is followed only through
operators that move values and change none, so that an initial hidden state is never taken for an initial cell.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import onnx

_T = TypeVar("_T")
# They move values, or give them another shape or dtype; a value's own origin stays what it was.
_MOVES = frozenset(
    """Identity Squeeze Unsqueeze Transpose Reshape Flatten Slice Gather Split Concat SplitToSequence Expand Cast
    Dropout""".split()  # noqa: SIM905 - as a list it would be fourteen lines
)
_JOINS = frozenset({"Concat"})
_PLACES = {"LSTM": ((5, "hidden"), (6, "cell")), "GRU": ((5, "hidden"),), "RNN": ((5, "hidden"),)}
# Y is the hidden state of every time step, so what is cut out of it is one.
_RESULTS = {
    "LSTM": ((0, "hidden"), (1, "hidden"), (2, "cell")),
    "GRU": ((0, "hidden"), (1, "hidden")),
    "RNN": ((0, "hidden"), (1, "hidden")),
}


@dataclass(frozen=True, slots=True)
class Port:
    """The hidden or the cell state of one recurrent operator.

    Attributes:
        layer: the operator's name, or where it has none that of its first output.
        kind: `hidden` or `cell`.
    """

    layer: str
    kind: str

    def __str__(self) -> str:
        return f"the {self.kind} state of {self.layer}"


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the graph tells of its inputs and outputs.

    Attributes:
        takes: graph input -> the states that it is the initial value of.
        gives: graph output -> the states that it is a value of, at the end of a run or in every time step of it.
        ends: graph output -> those that it is the value of at the end of a run. An output of every time step is here
            only where the graph has no output of the end.
    """

    takes: Mapping[str, frozenset[Port]] = field(default_factory=dict)
    gives: Mapping[str, frozenset[Port]] = field(default_factory=dict)
    ends: Mapping[str, frozenset[Port]] = field(default_factory=dict)

    def denies(self, source: str, target: str) -> bool:
        """True where an output is the new value of other states than those that an input is the initial value of."""
        takes, gives = self.takes.get(source), self.gives.get(target)
        return bool(takes and gives and takes.isdisjoint(gives))

    def confirms(self, source: str, target: str) -> bool:
        """True where an output is the new value of exactly the states that an input is the initial value of."""
        takes = self.takes.get(source)
        return bool(takes) and takes == self.ends.get(target)

    def successors(self, source: str) -> list[str]:
        """The outputs that an input is confirmed with."""
        return [target for target in self.ends if self.confirms(source, target)]


def trace(graph: onnx.GraphProto) -> Lineage:
    """Follows graph inputs to initial states, and new states to graph outputs; what subgraphs do is not seen."""
    origins: dict[str, set[str]] = {item.name: {item.name} for item in graph.input}
    results: dict[str, set[Port]] = {}
    ends: dict[str, set[Port]] = {}
    takes: defaultdict[str, set[Port]] = defaultdict(set)
    for node in graph.node:
        layer = node.name or node.output[0]
        for index, kind in _PLACES.get(node.op_type, ()):
            if len(node.input) > index:
                for source in origins.get(node.input[index], ()):
                    takes[source].add(Port(layer, kind))
        for index, kind in _RESULTS.get(node.op_type, ()):
            if len(node.output) > index and node.output[index]:
                results[node.output[index]] = {Port(layer, kind)}
                if index:
                    ends[node.output[index]] = {Port(layer, kind)}
        if node.op_type in _MOVES and node.domain in ("", "ai.onnx"):
            moved = node.input if node.op_type in _JOINS else node.input[:1]
            _pass_on(origins, moved, node.output)
            _pass_on(results, moved, node.output)
            _pass_on(ends, moved, node.output)
    gives = {item.name: frozenset(results[item.name]) for item in graph.output if item.name in results}
    given = {item.name: frozenset(ends[item.name]) for item in graph.output if item.name in ends}
    ended = frozenset().union(*given.values())
    given |= {name: ports for name, ports in gives.items() if name not in given and ports.isdisjoint(ended)}
    return Lineage({name: frozenset(ports) for name, ports in takes.items()}, gives, given)


def _pass_on(known: dict[str, set[_T]], moved: Iterable[str], outputs: Iterable[str]) -> None:
    found: set[_T] = set().union(*(known.get(name, ()) for name in moved))
    if found:
        for name in outputs:
            known[name] = found
