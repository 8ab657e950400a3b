"""A request's tensors as the model takes them, and how its axes map.

A sequence's request holds one step: `[time, *shape]` or `[1, time, *shape]` of an input with time, where time may be 1;
`[*shape]` or `[1, *shape]` of one without. A request to a model without state holds a batch: `[batch, time, *shape]`,
or `[batch, *shape]` (of an input with time: one time step each). The answer's axes are those of the request.

Invariant: what passes has the model's names, types and shapes, one batch, one length, and only finite numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conveyor_proto.codec import Array, WireError, to_numpy_dtype
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import spec_pb2

from conveyor_server.errors import refuse
from conveyor_server.inference.datatypes import bad_shape, is_text, read_tensor, read_text
from conveyor_server.inference.parameters import refuse_memory
from conveyor_server.inputs import all_finite, non_finite, wrong_length


@dataclass(frozen=True, slots=True)
class Content:
    """What a request holds.

    Attributes:
        inputs: one for each of ModelSpec.inputs: `[batch, time, *shape]`, or `[batch, *shape]` without time.
        batch: rows.
        length: time steps of each row.
        batched: the answer has a batch axis before its time axis.
        timed: the answer has a time axis where the output has time; False: one time step of each row, without one.
        outputs: indices into ModelSpec.outputs, each once, in the order asked for.
    """

    inputs: Sequence[Array]
    batch: int
    length: int
    batched: bool
    timed: bool
    outputs: Sequence[int]


def read_content(
    request: pb.ModelInferRequest, spec: spec_pb2.ModelSpec, model: str, *, max_time_steps: int
) -> Content:
    """Reads and checks a request's tensors.

    Args:
        request: as it came.
        spec: the model's.
        model: its name, for the text of a refusal.
        max_time_steps: of one row.

    Raises:
        WireError: one of the INPUT_ reasons.
        Refused: OUTPUT_UNKNOWN, NOT_OFFERED or MESSAGE_INVALID.
    """
    outputs = _outputs(request, spec, model)
    tensors = _by_name(request, spec, model)
    reading = _Reading(spec, model, max_time_steps)
    arrays = [
        reading.rows(item, tensor, raw) for item, (tensor, raw) in ((item, tensors[item.name]) for item in spec.inputs)
    ]
    return Content(arrays, reading.batch, reading.length or 1, reading.batched, reading.timed, outputs)


class _Reading:
    """Finds out what all inputs of a request must agree on: batch, time steps, and which axes are there."""

    def __init__(self, spec: spec_pb2.ModelSpec, model: str, max_time_steps: int) -> None:
        self.batch = 0
        self.length = 0
        # Of the first input with time; without one, an answer has the batch axis that its inputs have.
        self.batched = True
        self.timed = any(item.has_time for item in spec.inputs)
        self._seen_time = False
        self._stateful = bool(spec.states)
        self._finite = not spec.allow_non_finite_inputs
        self._model = model
        self._max_time_steps = max_time_steps

    def rows(
        self, item: spec_pb2.TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None
    ) -> Array:
        """The input as `[batch, time, *shape]`, or `[batch, *shape]` without time.

        Its shape is judged before anything is made of its contents: they may be many.
        """
        text = read_text(tensor, raw, item, self._model) if is_text(tensor, item) else None
        shape = tuple(tensor.shape) if text is None else text.shape
        batched, timed = self._axes(item, shape)
        self._agree_batch(item, shape, shape[0] if batched else 1)
        if item.has_time:
            self._agree(item, shape[batched] if timed else 1)
            if not self._seen_time:
                self._seen_time, self.batched, self.timed = True, batched, timed
        elif not self._seen_time:
            self.batched = batched
        array = read_tensor(tensor, raw, item, self._model) if text is None else text.astype(to_numpy_dtype(item.dtype))
        if not batched:
            array = array[None]
        if item.has_time and not timed:
            array = array[:, None]
        if self._finite and not all_finite(array):
            raise WireError(non_finite(item))
        return array

    def _axes(self, item: spec_pb2.TensorSpec, shape: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether there is a batch axis, and a time axis."""
        row = tuple(item.shape)
        beyond = len(shape) - len(row)
        if beyond not in range(2 + item.has_time) or shape[beyond:] != row or min(shape, default=0) < 0:
            raise bad_shape(item, self._model, shape, self._expected(item))
        if beyond == 2:
            return True, True
        if beyond == 1:
            # One axis: of a sequence's input with time it is time; else the batch.
            return (False, True) if item.has_time and self._stateful else (True, False)
        if item.has_time or not self._stateful:
            raise bad_shape(item, self._model, shape, self._expected(item))
        return False, False

    def _agree_batch(self, item: spec_pb2.TensorSpec, shape: tuple[int, ...], batch: int) -> None:
        if self._stateful and batch != 1:
            raise refuse(
                e.ERROR_REASON_SEQUENCE_INVALID,
                f"inference request to model '{self._model}' must specify batch-size 1 due to requirements of sequence "
                f"batcher: input '{item.name}' has a batch of {batch}; send one request for each sequence",
                model=self._model,
                sequence_id="",
            )
        if self.batch and batch != self.batch:
            raise bad_shape(item, self._model, shape, f"the batch of {self.batch} that the inputs before it have")
        if batch == 0:
            raise bad_shape(item, self._model, shape, "a batch of at least 1")
        self.batch = batch

    def _agree(self, item: spec_pb2.TensorSpec, length: int) -> None:
        if not 0 < length <= self._max_time_steps:
            raise WireError(wrong_length(length, item, self._max_time_steps))
        if self.length and length != self.length:
            raise WireError(
                Fault(
                    e.ERROR_REASON_INPUT_SHAPE,
                    f"input '{item.name}' of model '{self._model}' has {length} time steps and another has "
                    f"{self.length}: all must agree",
                    {"input": item.name, "expected": f"{self.length} time steps", "got": f"{length} time steps"},
                )
            )
        self.length = length

    def _expected(self, item: spec_pb2.TensorSpec) -> str:
        row = ",".join(map(str, item.shape))
        first = "1" if self._stateful else "-1"
        if item.has_time and self._stateful:
            forms = [f"[{first},-1,{row}]", f"[-1,{row}]"]
        elif item.has_time:
            forms = [f"[{first},-1,{row}]", f"[{first},{row}]"]
        else:
            forms = [f"[{first},{row}]", *([f"[{row}]"] if self._stateful else [])]
        return " or ".join(form.replace(",]", "]") for form in forms)


def _by_name(
    request: pb.ModelInferRequest, spec: spec_pb2.ModelSpec, model: str
) -> Mapping[str, tuple[pb.ModelInferRequest.InferInputTensor, bytes | None]]:
    names = [item.name for item in spec.inputs]
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise refuse(
            e.ERROR_REASON_MESSAGE_INVALID,
            f"{len(raw)} raw_input_contents came for {len(request.inputs)} inputs of model '{model}': send one for "
            "each, in their order, or none and typed contents",
            field="raw_input_contents",
        )
    found: dict[str, tuple[pb.ModelInferRequest.InferInputTensor, bytes | None]] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in names:
            raise _input_fault(
                e.ERROR_REASON_INPUT_UNKNOWN,
                f"unexpected inference input '{name[:128]}' for model '{model}'; it takes "
                + ", ".join(f"'{known}'" for known in names),
                name[:128],
                ", ".join(names),
            )
        if name in found:
            raise _input_fault(
                e.ERROR_REASON_INPUT_REPEATED, f"input '{name}' for model '{model}' came twice", name, name
            )
        refuse_memory(tensor.parameters, f"input '{name}'")
        if raw and tensor.contents.ListFields():
            raise refuse(
                e.ERROR_REASON_MESSAGE_INVALID,
                f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'",
                field="contents",
            )
        found[name] = (tensor, raw[index] if raw else None)
    if len(found) != len(names):
        missing = [name for name in names if name not in found]
        raise _input_fault(
            e.ERROR_REASON_INPUT_MISSING,
            f"expected {len(names)} inputs but got {len(found)} inputs for model '{model}'. Missing input(s) "
            + ", ".join(f"'{name}'" for name in missing),
            missing[0],
            ", ".join(names),
        )
    return found


def _outputs(request: pb.ModelInferRequest, spec: spec_pb2.ModelSpec, model: str) -> Sequence[int]:
    names = [item.name for item in spec.outputs]
    if not request.outputs:
        return range(len(names))
    indices: dict[int, None] = {}
    for output in request.outputs:
        if output.name not in names:
            raise refuse(
                e.ERROR_REASON_OUTPUT_UNKNOWN,
                f"unexpected inference output '{output.name[:128]}' for model '{model}'; it has "
                + ", ".join(f"'{name}'" for name in names),
                model=model,
                output=output.name[:128],
            )
        refuse_memory(output.parameters, f"output '{output.name}'")
        # One that is asked for twice comes once, as in Triton: an answer is no larger than the model makes it.
        indices[names.index(output.name)] = None
    return list(indices)


def _input_fault(reason: e.ErrorReason.ValueType, message: str, name: str, expected: str) -> WireError:
    return WireError(Fault(reason, message, {"input": name, "expected": expected}))
