# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A turn's steps taken at once, compiled: read, judged, put before the model, recorded and answered, row by row.

What `intake` and `sessions.express` do with arrays, for the usual case alone: one-token steps, alone or in frames, each
its session's next, of one model. Between the arrival of a turn's messages and its answers it touches each session's two
lines of the table (with a store also its durable_seq), each message, and the run's own buffers, and next to no code:
whatever lies unused for some hundred microseconds has left the processor's caches, so code that is not there is what
makes small turns fast.

Invariants: a step moves its session only if nothing about it is unusual; whatever is goes the way of arrays, which judges
each step, and holds up nobody but its sender. What is left behind here is to the bit what would be left behind there (a
test compares the two). No offset is taken from a message that was not checked against its size. Core thread only.

The parts, each a file beside this one (`_turn_*.pxi`): buffers, what is known of a model, frames on the wire, the reading
of a turn's messages. Here is what moves.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

# Inputs or outputs of a model, and bytes of a Step message that are no data; what has more goes by arrays alone.
MOST_TENSORS = 16
MOST_HEAD_BYTES = 256
cdef enum:
    _MOST = 16
    _MOST_HEAD = 256
    # Columns of SessionTable.cells; a test compares them.
    _GATE = 0
    _RECORD = 1
    _APPLIED_SEQ = 2
    _AHEAD = 3
    _CREDIT = 4
    _FAILED_SEQ = 6
    _FIRST_SEQ = 8
    _LAST_SEQ = 9
    _BASE_SEQ = 10
    _KEPT = 11
    _APPLIED_TIME_STEPS = 12
    _LAST_USED_AT = 13
    _STEP_TAG = 0x12
    _FRAME_TAG = 0x1A
    _HANDLES_TAG = 0x0A
    _SEQS_TAG = 0x12
    _COLUMN_TAG = 0x22
    _TIMEOUT_TAG = 0x28
    _ACKED_TAG = 0x32
    _DURABLE_TAG = 0x32
    # Larger frames of results are split, which is for arrays to do (result_wire.MAX_FRAME_BYTES).
    _MOST_FRAME_BYTES = 1 << 20
    # Rows that wait for a later turn, for each that goes now: more are for the sessions to know of.
    _MOST_LATER = 16
    # Layouts that are remembered for messages of one size, and sizes.
    _MOST_FORMS = 8
    _MOST_SIZES = 256
    # What becomes of a message that was read: all of it goes now, or some of its rows, or it goes later, with another
    # model's, or by arrays.
    _GOES = 0
    _PARTED = 1
    _LATER = 2
    _OTHER = 3
    _UNUSUAL = 4
    _UNKNOWN = 5
CELLS = {
    "GATE": _GATE, "RECORD": _RECORD, "APPLIED_SEQ": _APPLIED_SEQ, "AHEAD": _AHEAD, "CREDIT": _CREDIT,
    "FAILED_SEQ": _FAILED_SEQ, "FIRST_SEQ": _FIRST_SEQ, "LAST_SEQ": _LAST_SEQ, "BASE_SEQ": _BASE_SEQ, "KEPT": _KEPT,
    "APPLIED_TIME_STEPS": _APPLIED_TIME_STEPS, "LAST_USED_AT": _LAST_USED_AT,
}  # fmt: skip
cdef uint64_t _STEP = 0x9E3779B97F4A7C15

include "_turn_buffers.pxi"
include "_turn_model.pxi"
include "_turn_frame.pxi"
include "_turn_reading.pxi"


cdef class Turn(Reading):
    """The steps of one turn. `read`, `fill`, the run, `commit` and `answers` follow each other; see each."""

    def fill(self, Staging staging not None):
        """Puts the steps before the model, whose run of `rows` rows it is.

        Returns:
            Whether each is still its session's next. False: nothing has moved, and the buffers hold anything.
        """
        cdef Model model = self.model
        cdef Py_ssize_t index, tensor, free_slots
        cdef int64_t held
        cdef Row* mine
        cdef Column* column
        cdef uint8_t* to
        cdef uint64_t total
        if staging.rows != self.rows or staging.inputs.count != model.input_count:
            raise ValueError(f"buffers of {staging.rows} rows and {self.rows} are wanted")
        free_slots = model.slots.free
        if free_slots < self.rows:
            return False
        for index in range(self.rows):
            mine = &self.at[index]
            # Once more: what waited was run since it was read.
            if not self.is_next(index):
                return False
            held = model.held[mine.row]
            staging.sources[index] = held - 1 if held else staging.initial_slot
            staging.destinations[index] = model.stack[free_slots - self.rows + index]
            staging.lengths[index] = 1
            total = 0
            for tensor in range(model.input_count):
                column = &staging.inputs.columns[tensor]
                to = column.data + index * column.stride
                memcpy(to, self.data[index * _MOST + tensor], model.input_sizes[tensor])
                total = total * _STEP + _print(to, model.input_sizes[tensor], &model.weights[0])
            mine.fingerprint = total
        return True

    def commit(self, Staging staging not None, double now):
        """After the run: the sessions have moved, and keep their answers.

        Args:
            staging: as filled.
            now: seconds of the driver's clock.

        Returns:
            False: a new state is not finite, and nothing has moved.
        """
        cdef Model model = self.model
        cdef Py_ssize_t index, tensor, free_slots, most = 0, position = -1
        cdef int64_t* cell
        cdef int64_t held
        cdef Row* mine
        cdef Columns plane
        cdef uint64_t[::1] prints
        if staging.has_finite:
            for index in range(self.rows):
                if not staging.finite[index]:
                    return False
        for index in range(self.rows):
            mine = &self.at[index]
            cell = &self.cells[mine.row, 0]
            mine.position = 0
            if cell[_FIRST_SEQ] <= cell[_LAST_SEQ] and cell[_LAST_SEQ] == mine.seq - 1 and not (
                min(mine.acked_seq, cell[_APPLIED_SEQ]) >= cell[_LAST_SEQ]
            ):
                mine.position = (mine.seq - cell[_BASE_SEQ]) % cell[_CREDIT]
            most = max(most, mine.position)
        model.make(most + 1)
        free_slots = model.slots.free - self.rows
        for index in range(self.rows):
            mine = &self.at[index]
            held = model.held[mine.row]
            model.held[mine.row] = staging.destinations[index] + 1
            if held:
                model.stack[free_slots] = <int32_t> (held - 1)
                free_slots += 1
            cell = &self.cells[mine.row, 0]
            # As Record.acknowledge and Record.add, of one row.
            if mine.acked_seq:
                cell[_FIRST_SEQ] = max(cell[_FIRST_SEQ], min(mine.acked_seq, cell[_APPLIED_SEQ]) + 1)
            if cell[_LAST_SEQ] < cell[_FIRST_SEQ] or cell[_LAST_SEQ] != mine.seq - 1:
                cell[_FIRST_SEQ] = cell[_BASE_SEQ] = mine.seq
            cell[_FIRST_SEQ] = max(cell[_FIRST_SEQ], mine.seq - cell[_CREDIT] + 1)
            cell[_LAST_SEQ] = cell[_APPLIED_SEQ] = mine.seq
            cell[_APPLIED_TIME_STEPS] += 1
            cell[_FAILED_SEQ] = 0
            (<double*> cell)[_LAST_USED_AT] = now
            if mine.position != position:
                # Nearly all rows have the same one, and to ask an array for its memory costs more than a row.
                position = mine.position
                plane, prints = model.planes[position], model.prints[position]
            prints[mine.row] = mine.fingerprint
            for tensor in range(model.output_count):
                memcpy(
                    plane.columns[tensor].data + mine.row * plane.columns[tensor].stride,
                    staging.outputs.columns[tensor].data + index * staging.outputs.columns[tensor].stride,
                    model.output_sizes[tensor],
                )
            if cell[_KEPT]:
                model.record.trim_one(mine.row, min(mine.acked_seq, mine.seq - 1))
        model.slots.free = free_slots
        return True

    def answers(self, Staging staging not None):
        """The StreamResponse that answers each message that went, in the order of `senders`.

        Where the server has a store, they say up to where the sessions are there now.
        """
        cdef Py_ssize_t index
        cdef list answers = []
        for index in range(len(self.message_forms)):
            form = self.message_forms[index]
            if form is None:
                answers.append(self.answer_frame(staging, &self.messages[index]))
            else:
                answers.append(self.answer_step(staging, &self.messages[index], form))
        return answers

    cdef bytes answer_step(self, Staging staging, Message* message, Form form):
        cdef bytes answer = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(form.answer))
        cdef uint8_t* to = <uint8_t*> PyBytes_AS_STRING(answer)
        cdef Column* column
        cdef Py_ssize_t tensor
        memcpy(to, PyBytes_AS_STRING(form.answer), PyBytes_GET_SIZE(form.answer))
        memcpy(to + form.answer_label, message.label, form.label_size)
        for tensor in range(staging.outputs.count):
            column = &staging.outputs.columns[tensor]
            memcpy(to + form.outputs[tensor], column.data + message.first * column.stride, column.size)
        if form.durable >= 0:
            memcpy(to + form.durable, &self.durable[self.at[message.first].row], 8)
        return answer

    cdef bytes answer_frame(self, Staging staging, Message* message):
        cdef Py_ssize_t count = message.count, tensor, row, body
        cdef bytes answer
        cdef uint8_t* to
        cdef uint8_t* from_
        cdef Column* column
        body = 2 + _varint_size(4 * count) + _varint_size(8 * count) + 12 * count
        for tensor in range(staging.outputs.count):
            column = &staging.outputs.columns[tensor]
            body += 1 + _varint_size(column.size * count) + column.size * count
        if self.says_durable:
            body += 1 + _varint_size(8 * count) + 8 * count
        answer = PyBytes_FromStringAndSize(NULL, 1 + _varint_size(body) + body)
        to = _put_head(<uint8_t*> PyBytes_AS_STRING(answer), _FRAME_TAG, body)
        to = _put_head(to, _HANDLES_TAG, 4 * count)
        for row in range(count):
            memcpy(to + 4 * row, &self.at[message.first + row].handle, 4)
        to = _put_head(to + 4 * count, _SEQS_TAG, 8 * count)
        for row in range(count):
            memcpy(to + 8 * row, &self.at[message.first + row].seq, 8)
        to += 8 * count
        for tensor in range(staging.outputs.count):
            column = &staging.outputs.columns[tensor]
            from_ = column.data + message.first * column.stride
            to = _put_head(to, _COLUMN_TAG, column.size * count)
            for row in range(count):
                memcpy(to, from_ + row * column.stride, column.size)
                to += column.size
        if self.says_durable:
            to = _put_head(to, _DURABLE_TAG, 8 * count)
            for row in range(count):
                memcpy(to + 8 * row, &self.durable[self.at[message.first + row].row], 8)
        return answer
