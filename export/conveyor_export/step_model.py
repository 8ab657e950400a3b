"""The step model: what capture makes, the verifier judges and the packager writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from conveyor_proto.v1 import spec_pb2
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Reference:
    """What PyTorch says of one batch of whole sequences.

    Attributes:
        outputs: ModelSpec.outputs by name, `[batch, time, *shape]` or `[batch, *shape]`.
        states: ModelSpec.states by name, `[batch, *shape]`, after the last time step.
    """

    outputs: Arrays
    states: Arrays


@dataclass(frozen=True, slots=True)
class StepModel:
    """A captured module as an ONNX graph with explicit state, not yet verified.

    The graph's inputs are ModelSpec.inputs (`[batch, time, *shape]`, or `[batch, *shape]` without time), each state's
    `input_name` (`[batch, *shape]`) and `lengths_input` (`[batch]` int32, valid time steps of each row, 0 or more);
    its outputs are ModelSpec.outputs and each state's `output_name`. Batch and time are dynamic. Padding beyond a
    row's length influences nothing, and a row of length 0 keeps its state.

    Attributes:
        proto: the graph, weights inline as constants.
        spec: everything but `verification`, `digest` and `external_data`, which are set when the file is written.
        reference: runs the original module in eval mode on whole sequences from fresh state, inputs by name; thread of
            the caller. The original module and its parameters are left as they were.
        example: the user's example inputs by name, `[batch, time, *shape]` or `[batch, *shape]`.
    """

    proto: onnx.ModelProto
    spec: spec_pb2.ModelSpec
    reference: Callable[[Arrays], Reference]
    example: Arrays
