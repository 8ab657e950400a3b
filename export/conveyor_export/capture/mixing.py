"""Operators that mix time steps: which of them needs the whole sequence, and how to say so.

Works on the operators that torch.export writes, before decomposition. An operator that is not known here is taken to
work on each time step alone as long as it keeps the time axis; the verifier has the last word.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

# Operators that reduce an axis, in the words of a refusal.
REDUCTIONS = {
    "mean": "mean",
    "sum": "sum",
    "max": "maximum",
    "min": "minimum",
    "amax": "maximum",
    "amin": "minimum",
    "argmax": "argmax",
    "argmin": "argmin",
    "prod": "product",
    "var": "variance",
    "std": "standard deviation",
    "var_mean": "variance",
    "std_mean": "standard deviation",
    "norm": "norm",
    "linalg_vector_norm": "norm",
    "logsumexp": "log-sum-exp",
    "median": "median",
    "any": "any()",
    "all": "all()",
    "quantile": "quantile",
    "nansum": "sum",
    "nanmean": "mean",
}
# Operators that keep the axis `dim` and mix along it.
_ALONG = {
    "softmax": "softmax",
    "_softmax": "softmax",
    "log_softmax": "log-softmax",
    "_log_softmax": "log-softmax",
    "cumsum": "cumulative sum (cumsum)",
    "cumprod": "cumulative product (cumprod)",
    "cummax": "cumulative maximum (cummax)",
    "cummin": "cumulative minimum (cummin)",
    "logcumsumexp": "cumulative log-sum-exp",
    "flip": "reversal (flip)",
    "roll": "rotation (roll)",
    "sort": "sort",
    "argsort": "sort",
    "topk": "top-k",
    "renorm": "norm",
    "repeat_interleave": "repetition",
    "fft_rfft": "Fourier transform",
    "fft_fft": "Fourier transform",
}
PRODUCTS = {"matmul", "bmm", "mm", "mv", "dot", "baddbmm", "addmm", "addbmm", "einsum", "tensordot", "chain_matmul"}
_ATTENTION = "attention over time: every step reads all others"
_WHOLE = ", which needs the whole sequence"


def operator_of(node: Node) -> str:
    """`conv1d` of `aten.conv1d.default`; the function's name for Python functions."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments by the operator's own parameter names, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    values = {}
    for position, parameter in enumerate(schema.arguments):
        if position < len(node.args) and not parameter.kwarg_only:
            values[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            values[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            values[parameter.name] = parameter.default_value
    return values


def mixing_reason(  # noqa: PLR0911  one return for each family of operators
    node: Node, time_axes: Mapping[Node, Sequence[int]], ranks: Mapping[Node, int]
) -> str | None:
    """Why this node needs more than one time step, or None.

    Args:
        node: the node.
        time_axes: time axes of it and its inputs.
        ranks: their ranks.
    """
    operator, given = operator_of(node), arguments_of(node)
    first = given.get("self", given.get("input"))
    axes = time_axes.get(first, ()) if isinstance(first, Node) else ()
    rank = ranks.get(first, 0) if isinstance(first, Node) else 0
    if operator == "scaled_dot_product_attention":
        query = given["query"]
        return _ATTENTION if ranks[query] - 2 in time_axes.get(query, ()) else None
    if "attention" in operator or "transformer_encoder" in operator:
        return _ATTENTION
    if operator in PRODUCTS:
        return _product_reason(node, given, time_axes, ranks)
    if not axes:
        return None
    if operator in REDUCTIONS and _reduces(given, axes, rank):
        return f"it takes the {REDUCTIONS[operator]} over time{_WHOLE}"
    if operator in _ALONG and _reduces(given, axes, rank):
        return f"it takes the {_ALONG[operator]} over time{_WHOLE}"
    if operator == "linear" and rank - 1 in axes:
        return f"its linear layer mixes time steps{_WHOLE}"
    return _norm_reason(operator, given, axes, rank) or _window_reason(operator, axes, rank)


def _reduces(given: Mapping[str, Any], axes: Sequence[int], rank: int) -> bool:
    if "other" in given:  # the larger of two tensors, element by element
        return False
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return True
    listed = dims if isinstance(dims, list | tuple) else [dims]
    return any(isinstance(dim, int) and dim % rank in axes for dim in listed)


def _product_reason(
    node: Node, given: Mapping[str, Any], time_axes: Mapping[Node, Sequence[int]], ranks: Mapping[Node, int]
) -> str | None:
    operands = [item for item in node.all_input_nodes if time_axes.get(item)]
    output_axes = time_axes.get(node, ())
    if len(output_axes) > 1 or (operands and not output_axes):
        return _ATTENTION
    left = given.get("self")
    if isinstance(left, Node) and ranks.get(left, 0) - 1 in time_axes.get(left, ()):
        if len(operands) > 1:
            return _ATTENTION
        return f"its matrix product mixes time steps{_WHOLE}"
    return None


def _norm_reason(operator: str, given: Mapping[str, Any], axes: Sequence[int], rank: int) -> str | None:
    over = f"it normalises with statistics over time{_WHOLE}"
    if operator in {"layer_norm", "native_layer_norm", "rms_norm"}:
        return over if max(axes) >= rank - len(given["normalized_shape"]) else None
    if operator == "group_norm":
        return over if max(axes) >= 2 else None
    if operator == "instance_norm":
        return over if given["use_input_stats"] and max(axes) >= 2 else None
    if operator in {"batch_norm", "_batch_norm_with_update"} and given.get("training", True):
        return "it normalises with statistics of the batch and of time (no running statistics in eval mode)"
    return None


def _window_reason(operator: str, axes: Sequence[int], rank: int) -> str | None:
    """Pooling and resampling, which work on the trailing axes."""
    for word, what in (("pool", "pools"), ("upsample", "resamples"), ("conv_transpose", "convolves backwards")):
        if word in operator:
            trailing = next((int(digit) for digit in "123" if f"{digit}d" in operator), 1)
            if max(axes) >= rank - trailing:
                return f"it {what} over time, across the steps of a window that is not all in the past"
    return None
