"""What a runner in numpy needs to be filled in place: its `step`, over buffers."""

import numpy as np
from conveyor_proto.codec import to_numpy_dtype
from conveyor_server import compiled
from conveyor_server.runner.base import Run
from conveyor_server.runner.staging import can_be_staged, stage

_FRESH = -1


class Staged:
    """Joins a class that has `spec`, `capacity` and `step`. See runner.base.Runner."""

    vectors = None

    def staging(self, rows: int) -> "compiled.Staging | None":
        known = self.__dict__.setdefault("stagings", {})
        if rows not in known and can_be_staged(self.spec):
            inputs, outputs = (
                [
                    np.zeros((rows, *((1,) if item.has_time else ()), *item.shape), to_numpy_dtype(item.dtype))
                    for item in items
                ]
                for items in (self.spec.inputs, self.spec.outputs)
            )
            control = [np.zeros(rows, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int64)]
            finite = np.ones(rows, np.bool_)
            frame = (inputs, outputs, control, finite)
            known[rows] = stage(self.spec, inputs, outputs, control, finite, initial_slot=_FRESH, frame=frame)
        return known.get(rows)

    def run_staged(self, staging: "compiled.Staging") -> None:
        inputs, outputs, (lengths, sources, destinations), finite = staging.frame
        fresh = sources == _FRESH
        # Arrays of its own, as any Run has.
        run = Run(np.where(fresh, 0, sources), destinations.copy(), fresh, lengths.copy(), [x.copy() for x in inputs])
        result = self.step(run)
        for buffer, array in zip(outputs, result.outputs, strict=True):
            buffer[...] = array
        finite[...] = result.finite
