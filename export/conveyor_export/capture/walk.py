"""The ground that a walk over a traced graph stands on: facts by node, shapes, refusals, rewrites found so far."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule, Node

from conveyor_export.capture.errors import CaptureError
from conveyor_export.capture.facts import Fact, TimeSymbol, path_of
from conveyor_export.capture.rewrite import Rewrites

_ADVICE = "Only what depends on past time steps can be streamed"
AHEAD = "so an answer would need later steps"


class Walk:
    """One walk over one traced graph.

    Args:
        graph: the trace, time dynamic.
        time: T and the batch.
        lengths: name of the placeholder of lengths.
        outputs: names of the user's outputs, the first that the graph returns.
    """

    def __init__(self, graph: GraphModule, time: TimeSymbol, lengths: str, outputs: Sequence[str]) -> None:
        self.graph = graph
        self.time = time
        self.lengths = lengths
        self.outputs = outputs
        self.facts: dict[Node, Fact] = {}
        self.ordinals: Counter[tuple[str, str]] = Counter()
        self.rewrites: Rewrites = {}
        # Recurrent layers by path and contexts by node, as they run.
        self.order: list[str] = []

    def fact(self, item: Any) -> Fact:
        """What is known of an argument; nothing of time is in what is no node."""
        return self.facts.get(item, Fact()) if isinstance(item, Node) else Fact()

    def refuse(self, node: Node, reason: str, advice: str = _ADVICE) -> NoReturn:
        """Refuses the module on account of one node."""
        raise CaptureError(reason, path=path_of(node), advice=advice)

    def refuse_position(self, fact: Fact) -> None:
        """Refuses a value that depends on the absolute time step."""
        if fact.position is not None:
            self.refuse(
                fact.position,
                "it uses the absolute time step (as a positional encoding does), which a chunk does not know",
            )

    def offset(self, index: Any, fact: Fact) -> int | None:
        """An index into a time axis counted from its end, -1 is the last element; None where it is not."""
        if isinstance(index, Node):
            surplus = self.time.surplus(index.meta["val"])
            return None if surplus is None or fact.extra is None else surplus - fact.extra
        return index if isinstance(index, int) and index < 0 else None

    def axes(self, node: Node) -> tuple[int, ...]:
        """Axes of a node's value whose size depends on the number of time steps."""
        return self.time.axes(node.meta.get("val"))

    def surplus(self, node: Node, axes: tuple[int, ...]) -> int | None:
        """Size of the first of these axes minus T."""
        return self.time.surplus(node.meta["val"].shape[axes[0]]) if axes else 0

    def batch_axis(self, node: Node, source: Node) -> int:
        """The axis of rows of `source`, which `node` looks back in."""
        axis = self.time.batch_axis(source.meta["val"])
        if axis is None:
            self.refuse(node, "it reads back over time in a tensor whose rows are merged with another axis")
        return axis


def is_tensor(node: Node) -> bool:
    """True for a node whose value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def rank(node: Any) -> int:
    """Number of axes of a node's value; 0 for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0
