"""ModelSpec in a file and in numpy terms: the JSON that the ONNX metadata holds, sizes, and initial rows.

Nobody re-describes a model: exporter, server and clients all read it through here.
"""

import math

import numpy as np
from google.protobuf import json_format

from conveyor_proto.codec import Array, to_numpy_dtype
from conveyor_proto.v1 import spec_pb2

# Key in ONNX metadata_props.
METADATA_KEY = "conveyor.spec"
SPEC_VERSION = 1
# What no recurrent model comes near, and what a file that says more would have allocated.
MAX_TENSORS = 256
MAX_RANK = 16
MAX_NAME = 256
MAX_ROW_BYTES = 1 << 30
MAX_TEXT = 64 << 20


class SpecError(ValueError):
    """A ModelSpec that cannot be read; the message says which field and what to do."""


def dump_spec(spec: spec_pb2.ModelSpec) -> str:
    """The JSON text that goes into the file: proto field names, map keys sorted."""
    return json_format.MessageToJson(spec, preserving_proto_field_name=True, sort_keys=True, indent=None)


def parse_spec(text: str) -> spec_pb2.ModelSpec:
    """Reads and checks the JSON that `dump_spec` wrote.

    Raises:
        SpecError: not JSON of a ModelSpec, another version, duplicate names, an initial row of the wrong size, or more
            than any model needs.
    """
    if len(text) > MAX_TEXT:
        raise SpecError(f"metadata {METADATA_KEY} has more than {MAX_TEXT} characters")
    try:
        spec = json_format.Parse(text, spec_pb2.ModelSpec())
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"metadata {METADATA_KEY} is not a ModelSpec: {error}") from error
    check_spec(spec)
    return spec


def check_spec(spec: spec_pb2.ModelSpec) -> None:
    """Raises SpecError where a spec contradicts itself."""
    if spec.spec_version != SPEC_VERSION:
        raise SpecError(f"spec_version {spec.spec_version} is not {SPEC_VERSION}: export the model again")
    if not spec.inputs or not spec.outputs:
        raise SpecError("a model needs at least one input and one output")
    if not any(item.has_time for item in spec.inputs):
        raise SpecError("a model needs at least one input with a time axis")
    _check_sizes(spec)
    graph_inputs = [item.name for item in spec.inputs] + [state.input_name for state in spec.states]
    if spec.lengths_input:
        graph_inputs.append(spec.lengths_input)
    graph_outputs = [item.name for item in spec.outputs] + [state.output_name for state in spec.states]
    for what, names in (
        ("graph input", graph_inputs),
        ("graph output", graph_outputs),
        ("state", [state.name for state in spec.states]),
    ):
        for name in names:
            if not name or names.count(name) > 1:
                raise SpecError(f"{what} name {name!r} is {'used twice' if name else 'empty'}")
    shaped: list[spec_pb2.TensorSpec | spec_pb2.StateSpec] = [*spec.inputs, *spec.outputs, *spec.states]
    for item in shaped:
        if any(dimension < 1 for dimension in item.shape):
            raise SpecError(f"{item.name!r} has shape {list(item.shape)}: every dimension must be at least 1")
        to_numpy_dtype(item.dtype)
    for state in spec.states:
        if state.initial and len(state.initial) != state_row_bytes(state):
            got = len(state.initial)
            raise SpecError(f"state {state.name!r}: initial row of {got} bytes, {state_row_bytes(state)} expected")
    if spec.state_bytes != sum(map(state_row_bytes, spec.states)):
        raise SpecError(f"state_bytes {spec.state_bytes} is not the sum over the states")


def _check_sizes(spec: spec_pb2.ModelSpec) -> None:
    """Raises SpecError for more than any model needs, before anything is made of it."""
    for what, count in (("inputs", len(spec.inputs)), ("outputs", len(spec.outputs)), ("states", len(spec.states))):
        if count > MAX_TENSORS:
            raise SpecError(f"{count} {what} are more than {MAX_TENSORS}")
    for state in spec.states:
        for name in (state.input_name, state.output_name):
            _check_name(name)
    shaped: list[spec_pb2.TensorSpec | spec_pb2.StateSpec] = [*spec.inputs, *spec.outputs, *spec.states]
    for item in shaped:
        _check_name(item.name)
        if len(item.shape) > MAX_RANK:
            raise SpecError(f"{item.name!r} has {len(item.shape)} axes, more than {MAX_RANK}")
        if math.prod(item.shape) * to_numpy_dtype(item.dtype).itemsize > MAX_ROW_BYTES:
            raise SpecError(f"{item.name!r} has shape {list(item.shape)}: a row of more than {MAX_ROW_BYTES} bytes")


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise SpecError(f"the name {name[:MAX_NAME]!r}... has more than {MAX_NAME} characters")


def state_row_bytes(state: spec_pb2.StateSpec) -> int:
    """Bytes of one session's row of a state."""
    return math.prod(state.shape) * to_numpy_dtype(state.dtype).itemsize


def initial_row(state: spec_pb2.StateSpec) -> Array:
    """A fresh session's row `[*shape]` of a state, writable."""
    dtype, shape = to_numpy_dtype(state.dtype), tuple(state.shape)
    if not state.initial:
        return np.zeros(shape, dtype)
    return np.frombuffer(state.initial, dtype).reshape(shape).copy()
