"""A step's fingerprint: equal content has equal ones, and other content almost never has.

Multilinear hashing over 64-bit words, modulo 2^64 (Lemire and Kaser, "Strongly universal string hashing is fast", The
Computer Journal 57:11, 2014), which numpy does for the steps of a whole batch at once. The weights are fixed and odd,
so that a change of one word always shows, and so that a fingerprint means the same in every process; it guards against
mistakes of clients, not against an adversary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from conveyor_proto.codec import Array

_weights: NDArray[np.uint64] = np.empty(0, np.uint64)
# Between two tensors of a step, so that exchanging them shows.
_STEP_INT = 0x9E3779B97F4A7C15
_STEP = np.uint64(_STEP_INT)
_MASK = (1 << 64) - 1


def fingerprints(inputs: Sequence[Array]) -> NDArray[np.uint64]:
    """Fingerprints `[steps]` of steps beside each other. Any thread.

    Args:
        inputs: one for each of ModelSpec.inputs, C order: `[steps, ...]`.
    """
    total: NDArray[np.uint64] | None = None
    for array in inputs:
        words = _words(array)
        own = (words @ weights(words.shape[1])) + np.uint64(array.nbytes // len(array))
        total = own if total is None else total * _STEP + own
    return np.zeros(0, np.uint64) if total is None else total


def fingerprint(inputs: Sequence[Array]) -> int:
    """The fingerprint of one step, of inputs `[time, *shape]` or `[*shape]`. Any thread."""
    total = 0
    for array in inputs:
        size = array.nbytes
        if size % 8 or not array.flags.c_contiguous or not array.ndim:
            return int(fingerprints([array[np.newaxis] for array in inputs])[0])
        words = array.reshape(-1).view(np.uint64)
        total = (total * _STEP_INT + int(words.dot(weights(len(words)))) + size) & _MASK
    return total


def _words(array: Array) -> NDArray[np.uint64]:
    """The rows' bytes as `[steps, words]`, zeros behind the last."""
    rows = len(array)
    row_bytes = array.nbytes // rows
    flat = np.ascontiguousarray(array).reshape(rows, -1)
    if not row_bytes % 8:
        return flat.view(np.uint64)
    padded = np.zeros((rows, row_bytes + 8 - row_bytes % 8), np.uint8)
    padded[:, :row_bytes] = flat.view(np.uint8)
    return padded.view(np.uint64)


def weights(words: int) -> NDArray[np.uint64]:
    """What the first `words` 64-bit words of a tensor weigh, `[words]`: odd, and the same everywhere. Any thread."""
    global _weights  # noqa: PLW0603 - the same numbers however long the list has grown
    if len(_weights) < words:
        generator = np.random.Generator(np.random.PCG64(20_260))
        _weights = generator.integers(0, 1 << 64, max(words, 1024), np.uint64) | np.uint64(1)
    return _weights[:words]
