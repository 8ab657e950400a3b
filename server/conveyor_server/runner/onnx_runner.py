"""Runs a step model in onnxruntime; the state of all sessions stays in slabs that the graph itself updates.

Invariant: a run changes the rows `destinations` and the runner's own scratch row, and no other. A row's outputs and
new state do not depend on its neighbours or on their number (bit for bit, on the CPU, for the operators in `graph`).
An adopted file runs with as many rows as there are: what it gives a row in company is what `conveyor adopt` has proved.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from conveyor_proto.codec import Array
from conveyor_proto.spec import initial_row
from conveyor_proto.v1 import spec_pb2, vectors_pb2

from conveyor_server import compiled
from conveyor_server.runner import graph
from conveyor_server.runner.base import Run, RunFailed, Runner, RunResult
from conveyor_server.runner.budget import Lease, StateBudget
from conveyor_server.runner.facts import ADOPTED
from conveyor_server.runner.frame import Frame, FrameShape
from conveyor_server.runner.provider import DeviceUnavailable, Host, cuda_is_offered, open_session
from conveyor_server.runner.slabs import DeviceSlabs, HostSlabs, Slabs
from conveyor_server.runner.staging import can_be_staged
from conveyor_server.runner.step_file import StepFile, read_step_file

# Rows of the slab beyond the slots: one that holds the initial state and is never written, one that a padding row
# may write to and that is never read.
_OWN_ROWS = 2
# Buffers of all batch shapes seen, together; past it they are made anew.
_MAX_BUFFER_BYTES = 64 << 20
_NUMBER = re.compile(r"[-+]?\d[\d.e+-]*")
_log = logging.getLogger(__name__)


def open_runner(
    path: Path,
    *,
    device: Literal["cpu", "cuda", "auto"],
    threads: int,
    capacity: int,
    budget: StateBudget | None = None,
) -> Runner:
    """Loads a step model. Any thread; blocks for as long as reading and optimising takes.

    Args:
        path: the file `model.onnx`.
        device: `cuda` refuses to fall back; `auto` takes CUDA where it really is there, and logs which it took.
        threads: threads of one operator on the CPU, at least 1.
        capacity: slots, at least 1. The slab takes `capacity * state_bytes`; on the host only as rows are used.
        budget: of all slabs; None: any number of bytes.

    Raises:
        RunnerUnavailable: the file, the device or the provider; the message says what to do.
        ValueError: threads or capacity below 1.
    """
    if threads < 1 or capacity < 1:
        raise ValueError(f"threads ({threads}) and capacity ({capacity}) must be at least 1")
    file = read_step_file(path)
    lease = (budget or StateBudget()).take(file.spec.state_bytes, capacity + _OWN_ROWS)
    try:
        runner = _opened(file, device, threads, capacity)
    except BaseException:
        lease.release()
        raise
    runner.lease = lease
    return runner


def _opened(file: StepFile, device: Literal["cpu", "cuda", "auto"], threads: int, capacity: int) -> "OnnxRunner":
    if device != "auto":
        return OnnxRunner(file, Host.of(device, threads), capacity)
    if cuda_is_offered():
        try:
            runner = OnnxRunner(file, Host.of("cuda", threads), capacity)
        except DeviceUnavailable as error:
            _log.info("device auto: cpu, because CUDA is not usable: %s", error)
        else:
            _log.info("device auto: cuda")
            return runner
    else:
        _log.info("device auto: cpu, because this onnxruntime has no CUDA")
    return OnnxRunner(file, Host.of("cpu", threads), capacity)


class OnnxRunner:
    """A Runner on onnxruntime. See base.Runner for who may call what, and when.

    Attributes:
        lease: of its slab; given back when it is closed.
    """

    def __init__(self, file: StepFile, host: Host, capacity: int) -> None:
        self.lease: Lease | None = None
        self._spec = file.spec
        self._vectors = file.vectors
        self._host = host
        self._capacity = capacity
        self._min_rows = file.spec.min_rows or (2 if graph.needs_company(file.proto) else 1)
        one_step = file.spec.max_time_steps_per_run == 1
        self._min_time = 2 if graph.needs_two_time_steps(file.proto) and not one_step else 1
        inexact = [] if file.spec.max_rows == 1 else graph.inexact_operators(file.proto)
        if inexact and file.spec.provenance.form == ADOPTED:
            told = "%s: %s may change the last bit of a row with its company; the head of model.yaml says if they do"
            _log.info(told, file.spec.name, ", ".join(inexact))
        elif inexact:
            _log.warning("%s: %s may change the last bit of a row with its company", file.spec.name, ", ".join(inexact))
        model = graph.wrap(file) if file.spec.states else file.proto
        self._session = open_session(model, host, folder=file.path.parent, name=file.path.name)
        self._slabs: Slabs = (
            HostSlabs(file.spec.states, capacity + _OWN_ROWS)
            if host.shares_memory
            else DeviceSlabs(file.spec, capacity + _OWN_ROWS, host)
        )
        self._slabs.write([capacity], [initial_row(state)[np.newaxis] for state in file.spec.states])
        self._first_with_time = next(index for index, item in enumerate(file.spec.inputs) if item.has_time)
        self._can_be_staged = can_be_staged(file.spec)
        self._frames: dict[tuple[int, int], Frame] = {}
        # By rows, of frames of one time step.
        self._stagings: dict[int, compiled.Staging] = {}
        self._buffer_bytes = 0

    @property
    def spec(self) -> spec_pb2.ModelSpec:
        """The model's description, with the digest."""
        return self._spec

    @property
    def vectors(self) -> vectors_pb2.VerifierVectors | None:
        """See base.Runner."""
        return self._vectors

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the state lives."""
        return self._host.device

    @property
    def capacity(self) -> int:
        """Rows of the slab; slots are 0 to capacity - 1."""
        return self._capacity

    def step(self, run: Run) -> RunResult:
        """Gathers the sources, runs the model, scatters into the destinations.

        Raises:
            RunFailed: the model raised, or the batch is empty or not of the model's shapes. The destinations hold
                anything; no other row changed.
        """
        try:
            batch, time = run.inputs[self._first_with_time].shape[:2]
            if not batch or not time:
                raise RunFailed("an empty batch was to be run, which ends the process inside onnxruntime")
            frame = self._frames.get((batch, time)) or self._add_frame(batch, time)
            frame.put(run)
        except (IndexError, TypeError, ValueError) as error:
            raise RunFailed("a batch that is not of the model's inputs, shapes and dtypes") from error
        self._run(frame, batch, time)
        return frame.take()

    def staging(self, rows: int) -> "compiled.Staging | None":
        """See base.Runner."""
        known = self._stagings.get(rows)
        if known is None and self._can_be_staged:
            frame = self._frames.get((rows, 1)) or self._add_frame(rows, 1)
            known = self._stagings[rows] = frame.staging()
        return known

    def run_staged(self, staging: "compiled.Staging") -> None:
        """See base.Runner."""
        frame: Frame = staging.frame
        frame.feed()
        self._run(frame, staging.rows, 1)

    def read_rows(self, slots: Sequence[int]) -> list[Array]:
        """Copies of the rows: one `[rows, *shape]` array for each of ModelSpec.states.

        Raises:
            IndexError: a slot that the slab does not have.
        """
        self._check_slots(slots)
        return self._slabs.read(slots)

    def write_rows(self, slots: Sequence[int], states: Sequence[Array]) -> None:
        """Writes `[rows, *shape]` arrays, one for each of ModelSpec.states, into the slots.

        Raises:
            IndexError: a slot that the slab does not have.
            ValueError: a state of another shape or dtype; nothing was written.
        """
        self._check_slots(slots)
        self._slabs.write(slots, states)

    @property
    def slab_devices(self) -> list[str]:
        """Where onnxruntime says that each slab lies: `cpu` or `cuda`."""
        return [value.device_name() for value in self._slabs.values]

    def end_profiling(self) -> Path:
        """Ends the profile that Host.profile began, and returns its file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Frees the session and the slab. The runner is not used again."""
        self._frames.clear()
        self._stagings.clear()
        del self._session, self._slabs
        if self.lease is not None:
            self.lease.release()

    def _run(self, frame: Frame, batch: int, time: int) -> None:
        try:
            self._session.run_with_iobinding(frame.binding)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            # Its words quote the input, in numbers: they say enough without.
            _log.debug("a run failed: %s", _NUMBER.sub("#", str(error)))
            raise RunFailed(f"onnxruntime failed on {batch} rows of up to {time} time steps") from error

    def _check_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self._capacity:
                raise IndexError(f"slot {slot} is not one of 0 to {self._capacity - 1}")

    def _add_frame(self, batch: int, time: int) -> Frame:
        if self._buffer_bytes > _MAX_BUFFER_BYTES:
            self._frames.clear()
            self._stagings.clear()
            self._buffer_bytes = 0
        rows, steps = max(batch, self._min_rows), max(time, self._min_time)
        frame = Frame(
            self._session.io_binding(),
            self._spec,
            self._slabs.values,
            FrameShape(batch, time, rows, steps),
            initial_slot=self._capacity,
            scratch_slot=self._capacity + 1,
            shares_memory=self._host.shares_memory,
        )
        self._frames[batch, time] = frame
        self._buffer_bytes += frame.buffer_bytes
        return frame
