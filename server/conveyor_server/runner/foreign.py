"""What an ONNX graph that Conveyor did not export takes and gives, as its file declares it.

Invariant: only what the file says is here, nothing that is guessed: an open dimension is open, and what no file says is
None.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
from conveyor_proto import codec
from onnx import helper

from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.nodes import inferred_outputs, kind_name

# A size, a symbol, or None: open without a name.
Dim: TypeAlias = "int | str | None"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A graph input or output.

    Attributes:
        name: of the value.
        dtype: of its elements.
        dims: its dimensions; None: not even their number is known.
    """

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[Dim, ...] | None

    def __str__(self) -> str:
        """`state float32 [2, batch, 128]`."""
        return f"{self.name} {self.dtype} {show_dims(self.dims)}"


def inputs_of(proto: onnx.ModelProto) -> dict[str, Tensor]:
    """The graph's inputs by name, in its order, without those that have a value in the file.

    Raises:
        RunnerUnavailable: one is no tensor, or of a dtype that no client can send.
    """
    weights = {item.name for item in proto.graph.initializer}
    weights.update(item.values.name for item in proto.graph.sparse_initializer)
    return _tensors("input", (item for item in proto.graph.input if item.name not in weights))


def outputs_of(proto: onnx.ModelProto) -> dict[str, Tensor]:
    """The graph's outputs by name, in its order; what the file does not say of them is inferred where it can be.

    Raises:
        RunnerUnavailable: one is no tensor, or of a dtype that no client can be sent.
    """
    declared = list(proto.graph.output)
    if any(not item.type.tensor_type.HasField("shape") for item in declared):
        declared = inferred_outputs(proto)
    return _tensors("output", declared)


def agree(one: Sequence[Dim], other: Sequence[Dim]) -> bool:
    """True where two shapes may be the same: as many dimensions, and no two sizes that differ."""
    return len(one) == len(other) and all(
        first == second or not (isinstance(first, int) and isinstance(second, int))
        for first, second in zip(one, other, strict=True)
    )


def show_dims(dims: Sequence[Dim] | None) -> str:
    """`[2, batch, ?]`."""
    if dims is None:
        return "of unknown shape"
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in dims) + "]"


def _tensors(what: str, infos: Iterable[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    return {item.name: _tensor(what, item) for item in infos}


def _tensor(what: str, info: onnx.ValueInfoProto) -> Tensor:
    if not info.type.HasField("tensor_type"):
        raise RunnerUnavailable(f"{what} {info.name!r} is not a tensor: sequences, maps and optionals cannot be served")
    element = info.type.tensor_type
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(element.elem_type))
        codec.to_data_type(dtype)
    except (KeyError, codec.WireError):
        kind = kind_name(element.elem_type)
        raise RunnerUnavailable(f"{what} {info.name!r} is of {kind}, which cannot be sent or kept as state") from None
    if not element.HasField("shape"):
        return Tensor(info.name, dtype, None)
    return Tensor(info.name, dtype, tuple(_dim(dim) for dim in element.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return dim.dim_value
    return dim.dim_param or None
