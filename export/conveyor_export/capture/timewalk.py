"""Walks the traced graph and follows the time axis: refuses what needs later steps, and finds what must be rewritten.

The walk reads the graph only. It returns the nodes that the step graph computes otherwise: looking back over time needs
a context, and "the last step" is each row's own.
"""

from torch.fx import Node

from conveyor_export.capture.facts import Fact, path_of
from conveyor_export.capture.mixing import REDUCTIONS, arguments_of, mixing_reason, operator_of
from conveyor_export.capture.rewrite import Rewrites
from conveyor_export.capture.timerules import RULES
from conveyor_export.capture.walk import AHEAD, Walk, is_tensor, rank

# Operators that fill a tensor with one number, whatever their input holds; None: the number is an argument.
_FILLS = {
    "zeros": 0.0,
    "new_zeros": 0.0,
    "zeros_like": 0.0,
    "ones": 1.0,
    "new_ones": 1.0,
    "ones_like": 1.0,
    "full": None,
    "new_full": None,
    "full_like": None,
}
# Operators that keep a filled tensor filled.
_MOVES = {"slice", "select", "expand", "unsqueeze", "squeeze", "view", "reshape", "transpose", "permute", "contiguous"}
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson", "exponential")
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
# Operators that are told the sizes of their result.
_SIZED = {"view", "reshape", "_unsafe_view", "expand", "unflatten"}
_ARITHMETIC = {"add", "sub", "mul", "div", "pow", "rsub", "remainder", "floor_divide"}


class TimeWalk(Walk):
    """Follows the time axis from the inputs to the outputs."""

    def run(self) -> Rewrites:
        """Rewrites by node name.

        Raises:
            CaptureError: a node needs steps that are not there yet.
        """
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                fact = Fact(axes=self.axes(node), lengths=node.name == self.lengths)
                self.facts[node] = fact
            elif node.op == "call_function":
                self.facts[node] = self._visit(node)
            elif node.op == "output":
                self._check_outputs(node)
        return self.rewrites

    def _visit(self, node: Node) -> Fact:
        operator = operator_of(node)
        if operator in _FILLS:
            return self._filled(node, _fill(node, operator))
        if operator in _MOVES and (fill := self.fact(node.args[0]).fill) is not None:
            return self._filled(node, fill)
        if node.users and all(operator_of(user) in _FILLS for user in node.users):
            # Read for its shape alone, as in zeros_like(x[:, :1]).
            return Fact()
        handler = RULES.get(operator)
        axes = {item: self.facts[item].axes for item in [*node.all_input_nodes] if item in self.facts}
        ranks = {item: rank(item) for item in [node, *node.all_input_nodes]}
        reason = mixing_reason(node, axes | {node: self.axes(node)}, ranks)
        if reason:
            self.refuse(node, reason)
        if node.users and (operator.startswith(_RANDOM) or self._drops_out(node, operator)):
            self.refuse(node, "it draws random numbers", "Let forward() be deterministic in eval mode")
        if operator == "squeeze" and "dim" not in arguments_of(node) and rank(node.args[0]) > 1:
            reason = "it squeezes all axes of size 1, which takes the batch away where there is one row"
            self.refuse(node, reason, "Name the axis: squeeze(-1)")
        key = (operator, path_of(node))
        fact = handler(self, node) if handler else None
        self.ordinals[key] += 1
        return fact if fact is not None else self._plain(node, operator)

    def _filled(self, node: Node, fill: float | None) -> Fact:
        axes = self.axes(node)
        return Fact(axes, self.surplus(node, axes), fill=fill)

    @staticmethod
    def _drops_out(node: Node, operator: str) -> bool:
        return "dropout" in operator and bool(arguments_of(node).get("train"))

    # ------------------------------------------------------------ operators without a rule of their own

    def _plain(self, node: Node, operator: str) -> Fact:
        """An operator that works on each time step alone."""
        axes = self.axes(node)
        inputs = [self.facts[item] for item in node.all_input_nodes if item in self.facts]
        timed = [fact for fact in inputs if fact.axes]
        last = any(fact.last for fact in inputs)
        lengths = any(fact.lengths for fact in inputs)
        position = next((fact.position for fact in inputs if fact.position is not None), None)
        shift = max((fact.shift for fact in timed), default=0)
        if not is_tensor(node):
            return Fact(shift=shift, last=last, lengths=lengths, position=position)
        if len(axes) > 1:
            self.refuse(node, "it compares every time step with every other (attention over time)")
        if timed and not axes:
            self._refuse_lost(node, operator)
        if axes and last:
            self.refuse(node, f"it uses the value of the last time step at every step, {AHEAD}")
        if operator in _COMPARISONS and lengths:
            position = None
        if axes and not timed:
            return self._made(node, operator, axes, position)
        if not axes:
            return Fact(last=last, position=position, lengths=lengths)
        self._check_scalars(node, operator)
        extra = self.surplus(node, axes)
        self._check_steps(node, operator, timed, extra)
        return Fact(axes, extra, shift, last, position, lengths)

    def _check_steps(self, node: Node, operator: str, timed: list[Fact], extra: int | None) -> None:
        """Every step of the operator's inputs must still be there, alone, and at the same place in all of them."""
        if len({fact.excess for fact in timed}) > 1:
            self.refuse(node, "it joins tensors whose time axes are padded differently")
        if extra is None or any(fact.extra is None for fact in timed):
            if extra not in {0, None} or any(fact.extra not in {0, None} or fact.excess for fact in timed):
                self.refuse(node, "it merges a time axis that is padded or cut with another axis")
        elif any(fact.extra != extra for fact in timed):
            self.refuse(node, f"its operator {operator} gives another number of time steps than it takes")
        if operator in _SIZED and any(fact.excess for fact in timed):
            self.refuse(node, "it reshapes a tensor whose time axis is padded at its end")

    def _made(self, node: Node, operator: str, axes: tuple[int, ...], position: Node | None) -> Fact:
        """A time axis out of nothing: constant along time, counted, or drawn at random."""
        constant = operator in {"expand", "repeat", "expand_as", "empty_like"}
        return Fact(axes, self.surplus(node, axes), position=position if constant else node)

    def _check_scalars(self, node: Node, operator: str) -> None:
        if operator in _ARITHMETIC and any(self.time.depends(item.meta.get("val")) for item in node.all_input_nodes):
            self.refuse(node, "it computes with the number of time steps, which differs from chunk to chunk")

    def _refuse_lost(self, node: Node, operator: str) -> None:
        if operator in REDUCTIONS:
            self.refuse(node, f"it takes the {REDUCTIONS[operator]} over time, which needs the whole sequence")
        if operator in {"view", "reshape", "flatten", "_unsafe_view"}:
            self.refuse(node, "it reshapes the time axis away, which needs all time steps at once")
        self.refuse(node, f"its operator {operator} takes the time axis away, which needs the whole sequence")

    def _check_outputs(self, node: Node) -> None:
        for name, item in zip(self.outputs, node.args[0], strict=False):  # type: ignore[arg-type]
            fact = self.fact(item) if isinstance(item, Node) else Fact()
            if isinstance(item, Node) and fact.axes and not fact.aligned:
                self.refuse(item, f"output {name!r} is not aligned with the input's time steps, {AHEAD}")
            self.refuse_position(fact)


def _fill(node: Node, operator: str) -> float | None:
    """The number that fills a tensor that is made by `zeros`, `ones` or `full`."""
    value = _FILLS[operator]
    if value is None:
        value = arguments_of(node)["fill_value"]
    return float(value) if isinstance(value, int | float) else None
