"""What the proof feeds: time steps of the user's own, or random ones.

Invariant: the same file and the same example give the same samples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from conveyor_proto.codec import Array

from conveyor_server.adopt.answers import Refused
from conveyor_server.runner.layout import Layout

_SEED = 20
# Loud enough to move a state, and within what audio and normalised features are.
_SCALE = 0.5


class Samples:
    """Time steps for some sessions, each at another place.

    Args:
        layouts: of the inputs.
        example: graph input -> `[time, *shape]`; what is not there is random.

    Raises:
        Refused: an example of another name, shape or dtype.
    """

    def __init__(self, layouts: Sequence[Layout], example: Mapping[str, Array]) -> None:
        self._layouts = layouts
        self._rng = np.random.default_rng(_SEED)
        known = [layout.name for layout in layouts]
        for name in example:
            if name not in known:
                raise Refused(f"the example has {name!r}, and the inputs are {', '.join(known)}")
        self._example = {
            layout.name: _fitting(layout, example[layout.name]) for layout in layouts if layout.name in example
        }

    def draw(self) -> dict[str, Array]:
        """One time step of each input, `[*shape]`."""
        return {layout.name: self._one(layout) for layout in self._layouts}

    def _one(self, layout: Layout) -> Array:
        given = self._example.get(layout.name)
        if given is not None:
            return np.asarray(given[int(self._rng.integers(len(given)))])
        if layout.dtype.kind == "f":
            loud = self._rng.uniform(0, 2 * _SCALE)
            return (self._rng.standard_normal(layout.shape) * loud).astype(layout.dtype)
        # Token ids, flags: a vocabulary has at least two.
        return self._rng.integers(0, 2, layout.shape).astype(layout.dtype)


def read_example(path: Path, inputs: Sequence[str]) -> dict[str, Array]:
    """Examples by input from .npz, or of the only input from .npy.

    Args:
        path: the file.
        inputs: names of the inputs.

    Raises:
        Refused: it cannot be read, or is .npy where there are several inputs.
    """
    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as .npy or .npz: {error}") from error
    if isinstance(content, np.ndarray):
        if len(inputs) != 1:
            raise Refused(
                f"{path} is one array, and the inputs are {', '.join(inputs)}: write an .npz with their names"
            )
        return {inputs[0]: content}
    with content:
        return {name: content[name] for name in content.files}


def _fitting(layout: Layout, given: Array) -> Array:
    if given.dtype != layout.dtype or given.shape[1:] != layout.shape or not len(given):
        raise Refused(
            f"the example of {layout.name!r} is {given.dtype} {list(given.shape)}; {layout.dtype} "
            f"[{', '.join(['time', *map(str, layout.shape)])}] is wanted"
        )
    return given
