"""From a graph and what is known of it to a description, without its outputs.

Invariant: it speaks of every input of the graph; all that could be otherwise is asked in one go.
"""

from dataclasses import dataclass, replace

import onnx

from conveyor_server.adopt.answers import Answers, Asked, Refused
from conveyor_server.adopt.axes import Axes
from conveyor_server.adopt.pairing import pair
from conveyor_server.runner.description import Description
from conveyor_server.runner.foreign import Tensor, inputs_of, outputs_of
from conveyor_server.runner.lineage import trace


@dataclass(frozen=True, slots=True)
class Proposal:
    """A description to be completed and proved.

    Attributes:
        description: its outputs are missing.
        outputs: names of what clients get.
        reasons: graph input -> why it is a state of its output.
        one_row: why a run is one row; empty: it takes any number.
    """

    description: Description
    outputs: tuple[str, ...]
    reasons: dict[str, str]
    one_row: str


def propose(proto: onnx.ModelProto, answers: Answers) -> Proposal:
    """Describes a graph.

    Args:
        proto: the file's own graph.
        answers: what is known besides.

    Raises:
        Asked: something could be otherwise.
        Refused: an answer speaks of what the graph has not, or nothing is left to send or to give.
        RunnerUnavailable: the graph has inputs or outputs that cannot be served.
    """
    inputs, outputs = inputs_of(proto), outputs_of(proto)
    _check(answers, inputs, outputs)
    ask: list[str] = []
    pairing = pair(inputs, outputs, trace(proto.graph), answers, ask)
    sized = {name: _sized(inputs[name], outputs[target]) for name, target in pairing.states.items()}
    tensors = [*(inputs[name] for name in pairing.inputs), *sized.values()]
    axes = Axes(tensors, answers, ask)
    description = Description(
        inputs=tuple(axes.of_input(inputs[name]) for name in pairing.inputs),
        outputs=(),
        states=tuple(axes.of_state(tensor, pairing.states[name]) for name, tensor in sized.items()),
        constants=tuple(
            replace(item, batch_axis=answers.batch_axes.get(name, item.batch_axis))
            for name, item in answers.constants.items()
        ),
        starts=tuple(answers.starts.values()),
        batch=axes.batch,
    )
    given = answers.outputs or tuple(name for name in outputs if name not in pairing.states.values())
    if not pairing.inputs:
        told = ", ".join(f"{name} <- {target}" for name, target in pairing.states.items())
        ask.append(
            f"no input is left that clients send; states were found to be {told}: which is none? Say --input NAME"
        )
    if not given:
        ask.append(
            f"every output is the new value of a state: which of {', '.join(outputs)} do clients get as well? Say "
            "--output NAME"
        )
    if ask:
        raise Asked(ask)
    return Proposal(description, given, dict(pairing.reasons), axes.one_row)


def _sized(source: Tensor, target: Tensor) -> Tensor:
    """The input, with sizes that only the output says."""
    if source.dims is None or target.dims is None or len(source.dims) != len(target.dims):
        return source
    # An open axis of the input may be that of rows, where the output's size tells nothing.
    open_axes = [axis for axis, dim in enumerate(source.dims) if not isinstance(dim, int)]
    if len(open_axes) < 2:
        return source
    dims = [
        other if not isinstance(dim, int) and isinstance(other, int) and other != 1 else dim
        for dim, other in zip(source.dims, target.dims, strict=True)
    ]
    return Tensor(source.name, source.dtype, tuple(dims))


def _check(answers: Answers, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    of_inputs = {
        "--state": answers.states,
        "--input": answers.inputs,
        "--time-axis": answers.time_axes,
        "--shape": answers.shapes,
        "--batch-axis": answers.batch_axes,
        "--window": answers.windows,
        "--constant": answers.constants,
        "--initial": answers.initial,
        "a control input": answers.starts,
    }
    for flag, names in of_inputs.items():
        for name in names:
            if name not in inputs:
                raise Refused(f"{flag} names {name!r}, and the graph takes {', '.join(map(str, inputs.values()))}")
    for flag, names in {"--state": list(answers.states.values()), "--output": list(answers.outputs)}.items():
        for name in names:
            if name not in outputs:
                raise Refused(f"{flag} names {name!r}, and the graph gives {', '.join(map(str, outputs.values()))}")
