"""Turns as the compiled part takes them, which is told of models and forms of messages when it meets a new one.

Invariant: it knows no engine that takes part no more, whose memory it would keep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from conveyor_proto.codec import WireError, to_numpy_dtype
from conveyor_proto.fingerprint import weights
from conveyor_proto.v1 import session_pb2, spec_pb2
from google.protobuf.message import DecodeError

from conveyor_server import compiled
from conveyor_server.engine.engine import Engine
from conveyor_server.frame_inputs import read_numbers
from conveyor_server.runner.staging import can_be_staged, time_step_bytes
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.record import Record
from conveyor_server.transport.result_wire import ResultWriter
from conveyor_server.transport.sinks import durable_seqs_of
from conveyor_server.transport.step_layout import STEP_TAG
from conveyor_server.transport.step_parts import Forms, Sender

# Rows of a turn, whatever a run of its model takes.
_MOST_ROWS = 4096
# A model that runs nothing takes no time.
_FASTEST_ROW_S = 1e-7
# Messages of a size that taught nothing, after which only one in so many of that size is looked at (some are as long as
# others' that do teach); and such sizes.
_MANY_FAILURES = 64
_MOST_SIZES = 256

# Senders, and a message of each.
Mail: TypeAlias = tuple[list[Sender], list[bytes]]


@dataclass(frozen=True, slots=True)
class Remains:
    """What of a turn was not answered.

    Attributes:
        later: waits for the next turn, before what comes in it.
        aside: for arrays, behind all else of its senders.
        rest: for arrays, behind nothing.
        whole: `rest` is all that there was.
    """

    later: Mail
    aside: Mail
    rest: Mail
    whole: bool


class TurnReader:
    """Has the compiled part take whole turns, and teaches it. Core thread only.

    Args:
        core: knows the sessions.
        forms: finds the layout of a message.
        writer: what writes the results of an engine's model.
    """

    def __init__(self, core: Core, forms: Forms, writer: Callable[[Engine], ResultWriter]) -> None:
        self._core = core
        self._forms = forms
        self._writer = writer
        self._turn = compiled.Turn(core.directory.table.cells, _MOST_ROWS, durable_seqs_of(core))
        self._numbers: dict[Engine, int] = {}
        self._failures: dict[int, int] = {}
        core.after_removal(self._forget)

    def take(self, senders: list[Sender], messages: list[bytes]) -> Remains:
        """Runs and answers what can be of a turn's messages, model by model; nothing of them is kept."""
        later: Mail = ([], [])
        aside: Mail = ([], [])
        whole = True
        # Rows that may go at once although others of their sessions went: as many again.
        again: int | None = None
        while messages:
            turn = self._read(senders, messages)
            if turn is None or not self._core.run_turn(turn, partial(_tell, turn.senders)):
                # What was tried in vain is not tried again: each step is judged by itself.
                whole = whole and turn is None
                break
            whole = False
            _add(aside, turn.aside)
            mail, (senders, messages) = turn.later, turn.others
            again = turn.rows if again is None else again - turn.rows
            if 0 < len(mail[0]) <= again and self._core.pressed:
                # The next turn comes after a run that takes as long as several of these.
                senders, messages = mail[0] + senders, mail[1] + messages
            else:
                _add(later, mail)
        self._turn.done()
        return Remains(later, aside, (senders, messages), whole=whole)

    def _read(self, senders: list[Sender], messages: list[bytes]) -> "compiled.Turn | None":
        """What can be tried of a turn, and where the rest is to go; None: all is for arrays."""
        turn = self._turn
        some = turn.read(senders, messages)
        if turn.stranger is not None:
            # For the next turn; in this one, it goes by arrays.
            self._learn(*turn.stranger)
        return turn if some else None

    def _learn(self, sender: Sender, message: bytes) -> None:
        size = len(message)
        failures = self._failures.get(size, 0)
        if failures >= _MANY_FAILURES and failures % _MANY_FAILURES:
            self._failures[size] = failures + 1
            return
        if self._learn_form(sender, message) if message[0] == STEP_TAG else self._learn_model(sender, message):
            self._failures.pop(size, None)
            return
        if len(self._failures) > _MOST_SIZES:
            self._failures.clear()
        self._failures[size] = failures + 1

    def _learn_form(self, sender: Sender, message: bytes) -> bool:
        form = self._forms.new(sender, message)
        layout = None if form is None else form.layout
        if form is None or layout is None or layout.length != 1 or layout.label_at is None:
            return False
        if len(layout.mask) - layout.mask.count(0) > compiled.MOST_HEAD_BYTES:
            return False
        model = self._model(form.engine, form.record)
        if model is None:
            return False
        answer, label, outputs, durable = self._writer(form.engine).shape(layout.label_sizes, 1)
        self._turn.add_form(
            compiled.Form(
                model,
                layout.message,
                layout.mask,
                layout.numbers_at,
                layout.inputs_at,
                layout.label_at,
                answer,
                label,
                outputs,
                durable,
            )
        )
        return True

    def _learn_model(self, sender: Sender, message: bytes) -> bool:
        """Learns the model of a frame's first session, if it is not known yet."""
        try:
            handle = int(read_numbers(session_pb2.StreamRequest.FromString(message).frame).handles[0])
        except (DecodeError, WireError):
            return False
        row = sender.rows.get(handle)
        session = None if row is None else self._core.directory.table.sessions[row]
        return session is not None and self._model(session.engine, session.record) is not None

    def _model(self, engine: Engine, record: Record) -> "compiled.Model | None":
        known = self._turn.model_of(record.number)
        spec = engine.spec
        if known is not None or not can_be_staged(spec) or engine.staging(1) is None:
            return known
        inputs = [(time_step_bytes(item), _float_bytes(item, spec)) for item in spec.inputs]
        model = compiled.Model(
            record.number,
            engine,
            min(engine.limits.max_batch, engine.limits.max_batch_time_steps),
            self._most_later(engine),
            engine.lanes.held,
            engine.slots,
            record,
            inputs,
            [time_step_bytes(item) for item in spec.outputs],
            weights(max(size for size, _ in inputs) // 8 + 1),
        )
        self._turn.add_model(model)
        self._numbers[engine] = record.number
        return model

    def _most_later(self, engine: Engine) -> int:
        """Steps that may wait for a later turn, unknown to their sessions: no more than would be accepted (rules)."""
        rows = engine.limits.max_batch
        row_s = max(engine.full_run_s / rows, _FASTEST_ROW_S)
        return max(2 * rows, int(self._core.directory.limits.pipeline_queue_s / row_s))

    def _forget(self, engine: Engine) -> None:
        number = self._numbers.pop(engine, None)
        if number is not None:
            self._turn.forget(number)


def _float_bytes(item: spec_pb2.TensorSpec, spec: spec_pb2.ModelSpec) -> int:
    """Bytes of a number that must be finite; 0: anything may come."""
    dtype = to_numpy_dtype(item.dtype)
    return dtype.itemsize if dtype.kind == "f" and not spec.allow_non_finite_inputs else 0


def _tell(senders: Sequence[Sender], answers: Sequence[bytes]) -> None:
    for sender, answer in zip(senders, answers, strict=True):
        sender.outlet.put(answer)


def _add(mail: Mail, more: Mail) -> None:
    mail[0].extend(more[0])
    mail[1].extend(more[1])
