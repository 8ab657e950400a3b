# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A turn's steps taken at once, compiled: read, judged, put before the model, recorded and answered, row by row.

What `intake` and `sessions.express` do with arrays, for the usual case alone: one-token steps, alone or in frames, each
its session's next, of one model. Between the arrival of a turn's messages and its answers it touches each session's two
lines of the table, each message, and the run's own buffers, and next to no code: whatever lies unused for some hundred
microseconds has left the processor's caches, so code that is not there is what makes small turns fast.

Invariants: a step moves its session only if nothing about it is unusual; whatever is goes the way of arrays, which judges
each step, and holds up nobody but its sender. What is left behind here is to the bit what would be left behind there (a
test compares the two). No offset is taken from a message that was not checked against its size. Core thread only.
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

cdef struct Column:
    # A tensor of a run: the first row's first time step, bytes from row to row, and bytes of a time step.
    uint8_t* data
    Py_ssize_t stride
    Py_ssize_t size

cdef struct Row:
    # One step of the turn: whose it is, its numbers as they came, its fingerprint, and where its answer is kept.
    int64_t row
    uint32_t handle
    int64_t seq
    int64_t acked_seq
    int64_t holder
    uint64_t fingerprint
    int64_t position

cdef struct Message:
    # A message of the turn: its rows, and of a step where handle and seq lie with their tags.
    Py_ssize_t first
    Py_ssize_t count
    const uint8_t* label


cdef class Columns:
    """Tensors of rows that lie beside each other; see Staging.

    Args:
        arrays: uint8 `[rows, bytes]`, writable, C order.
        sizes: bytes of one time step of a row, the first of each.
    """

    cdef Column columns[_MOST]
    cdef Py_ssize_t count
    cdef Py_ssize_t rows
    cdef list _kept

    def __init__(self, list arrays, list sizes):
        cdef uint8_t[:, ::1] view
        cdef Py_ssize_t index
        if len(arrays) != len(sizes) or len(arrays) > _MOST:
            raise ValueError(f"{len(arrays)} tensors of {len(sizes)} sizes; {_MOST} at most")
        self.count = len(arrays)
        self.rows = min([len(array) for array in arrays], default=0)
        self._kept = arrays
        for index in range(self.count):
            view = arrays[index]
            if not 0 < sizes[index] <= view.shape[1]:
                raise ValueError(f"a time step of {sizes[index]} bytes in rows of {view.shape[1]}")
            self.columns[index].data = &view[0, 0]
            self.columns[index].stride = view.shape[1]
            self.columns[index].size = sizes[index]


cdef class Staging:
    """The buffers of a run of one time step, where a turn is put and its outputs are found.

    Args:
        rows: of the run.
        inputs, outputs: of the model, with at least so many rows.
        lengths: int32, ones.
        sources, destinations: int64, at least `rows` each: see runner.base.Run.
        finite: uint8, rows whose new state is finite; None: they all are.
        initial_slot: the source of a fresh row.
        frame: the runner's own.
    """

    cdef readonly Py_ssize_t rows
    cdef readonly object frame
    cdef Columns inputs
    cdef Columns outputs
    cdef int64_t[::1] sources
    cdef int64_t[::1] destinations
    cdef int32_t[::1] lengths
    cdef uint8_t[::1] finite
    cdef bint has_finite
    cdef int64_t initial_slot

    def __init__(self, rows, Columns inputs, Columns outputs, lengths, sources, destinations, finite, initial_slot, frame):
        self.rows = rows
        self.inputs, self.outputs = inputs, outputs
        self.lengths, self.sources, self.destinations = lengths, sources, destinations
        self.has_finite = finite is not None
        if self.has_finite:
            self.finite = finite
        if min(inputs.rows, outputs.rows, len(lengths), len(sources), len(destinations)) < rows or (
            self.has_finite and len(finite) < rows
        ):
            raise ValueError(f"buffers of fewer than {rows} rows")
        self.initial_slot = initial_slot
        self.frame = frame


cdef class Model:
    """What a turn touches of one model version.

    Args:
        number: of its Record.
        engine: what runs it, opaque.
        most_rows: of a run.
        most_later: rows that may wait for later turns.
        held: int64, of its Lanes.
        slots: its SlotPool.
        record: its Record.
        inputs: (bytes, kind) of a time step of each of ModelSpec.inputs: kind is the size of its floats that must be
            finite, 0 where anything may come.
        outputs: bytes of a time step of each of ModelSpec.outputs.
        weights: uint64, of the fingerprint, as many as the longest input has words.
    """

    cdef readonly object engine
    cdef int64_t number
    cdef Py_ssize_t most_rows
    cdef Py_ssize_t most_later
    cdef int64_t[::1] held
    cdef int32_t[::1] stack
    cdef object slots
    cdef object record
    cdef Py_ssize_t input_count
    cdef Py_ssize_t input_sizes[_MOST]
    cdef int kinds[_MOST]
    cdef Py_ssize_t output_count
    cdef Py_ssize_t output_sizes[_MOST]
    cdef Py_ssize_t output_bytes
    cdef uint64_t[::1] weights
    # By position: the Columns of the outputs, and the fingerprints.
    cdef list planes
    cdef list prints

    def __init__(self, number, engine, most_rows, most_later, held, slots, record, list inputs, list outputs, weights):
        cdef Py_ssize_t index
        if len(inputs) > _MOST or len(outputs) > _MOST:
            raise ValueError(f"more than {_MOST} inputs or outputs")
        self.number, self.engine, self.held, self.slots, self.record = number, engine, held, slots, record
        self.most_rows, self.most_later = most_rows, most_later
        self.stack = slots.stack
        self.weights = weights
        self.input_count, self.output_count = len(inputs), len(outputs)
        for index in range(self.input_count):
            self.input_sizes[index], self.kinds[index] = inputs[index]
            if (self.input_sizes[index] + 7) // 8 > len(weights):
                raise ValueError("too few weights")
        self.output_bytes = 0
        for index in range(self.output_count):
            self.output_sizes[index] = outputs[index]
            self.output_bytes += outputs[index]
        self.planes, self.prints = [], []

    cdef int make(self, Py_ssize_t positions) except -1:
        """Sees to it that there are so many planes."""
        cdef Py_ssize_t position
        for position in range(len(self.planes), positions):
            outputs, prints = self.record.plane(position)
            self.planes.append(Columns(outputs, [self.output_sizes[index] for index in range(self.output_count)]))
            self.prints.append(prints)
        return 0


cdef class Form:
    """Where everything lies in Step messages of one layout, and in their answers.

    Args:
        model: whose steps they are.
        message: one of the layout.
        mask: what of a message is compared with it: a byte for each of its bytes.
        numbers: (start, stop) of handle, seq and acked_seq; the same twice where there is none.
        inputs: start of each of ModelSpec.inputs.
        label: (start, stop) of handle and seq with their tags.
        answer: a StreamResponse whose handle and seq take as many bytes.
        answer_label: start of handle and seq there.
        outputs: start of each of ModelSpec.outputs there.
    """

    cdef Model model
    cdef Py_ssize_t size
    cdef Py_ssize_t head
    cdef int32_t at[_MOST_HEAD]
    cdef uint8_t mask[_MOST_HEAD]
    cdef uint8_t wanted[_MOST_HEAD]
    cdef Py_ssize_t starts[3]
    cdef Py_ssize_t stops[3]
    cdef Py_ssize_t inputs[_MOST]
    cdef Py_ssize_t label
    cdef Py_ssize_t label_size
    cdef bytes answer
    cdef Py_ssize_t answer_label
    cdef Py_ssize_t outputs[_MOST]

    def __init__(self, Model model, bytes message, bytes mask, numbers, inputs, label, bytes answer, answer_label, outputs):
        cdef Py_ssize_t index
        self.model = model
        self.size = len(message)
        self.head = 0
        for index in range(self.size):
            if mask[index]:
                if self.head == _MOST_HEAD:
                    raise ValueError(f"a head of over {_MOST_HEAD} bytes")
                self.at[self.head] = index
                self.mask[self.head] = mask[index]
                self.wanted[self.head] = message[index] & mask[index]
                self.head += 1
        for index in range(3):
            self.starts[index], self.stops[index] = numbers[index]
            if not 0 <= self.starts[index] <= self.stops[index] <= self.size:
                raise ValueError("a number that lies outside the message")
        if len(inputs) != model.input_count or len(outputs) != model.output_count or len(mask) != self.size:
            raise ValueError("a form of another model")
        for index in range(model.input_count):
            self.inputs[index] = inputs[index]
            if not 0 <= inputs[index] <= self.size - model.input_sizes[index]:
                raise ValueError("an input that lies outside the message")
        self.label, stop = label
        self.label_size = stop - self.label
        self.answer, self.answer_label = answer, answer_label
        if not 0 <= self.label <= stop <= self.size or not 0 <= answer_label <= len(answer) - self.label_size:
            raise ValueError("a label that lies outside the message")
        for index in range(model.output_count):
            self.outputs[index] = outputs[index]
            if not 0 <= outputs[index] <= len(answer) - model.output_sizes[index]:
                raise ValueError("an output that lies outside the answer")

    cdef bint matches(self, const uint8_t* message) noexcept:
        cdef Py_ssize_t index
        for index in range(self.head):
            if message[self.at[index]] & self.mask[index] != self.wanted[index]:
                return False
        return True

    cdef int64_t number(self, const uint8_t* message, Py_ssize_t which) noexcept:
        cdef int64_t value = 0
        cdef Py_ssize_t at = self.stops[which]
        while at > self.starts[which]:
            at -= 1
            value = (value << 7) | (message[at] & 0x7F)
        return value


cdef class Turn:
    """The steps of one turn. `read`, `fill`, the run, `commit` and `answers` follow each other; see each.

    Args:
        cells: SessionTable.cells.
        most_rows: of a run of any model.

    Attributes:
        rows: steps that go now.
        model: whose they are; None: none was read yet.
        senders: of the messages of which some go now.
        later: senders and messages that are to come again in the next turn, before those that come in it.
        others: senders and messages of another model, to be read once these were run.
        aside: senders and messages that are for arrays, once these were run.
        stranger: sender and message of a form or model that is not known here; None: all were known.
    """

    cdef readonly Py_ssize_t rows
    cdef readonly Model model
    cdef readonly list senders
    cdef readonly tuple later
    cdef readonly tuple others
    cdef readonly tuple aside
    cdef readonly tuple stranger
    cdef int64_t[:, ::1] cells
    # By row of the table: the last turn that had a step of it.
    cdef int64_t* stamps
    cdef int64_t stamp
    cdef Py_ssize_t most_rows
    cdef Py_ssize_t later_rows
    # Senders of which something goes later; of which all that follows does; of which all that follows goes aside.
    cdef set behind
    cdef set waiting
    cdef set odd
    cdef dict models
    cdef dict forms
    cdef Form last
    # Of each row, and of each row's inputs, of which a model has up to _MOST.
    cdef Row* at
    cdef const uint8_t** data
    cdef Message* messages
    # Of each message, None for a frame; and the bytes that all pointers point into.
    cdef list message_forms
    cdef list held

    def __cinit__(self, int64_t[:, ::1] cells not None, Py_ssize_t most_rows):
        self.stamps = <int64_t*> calloc(cells.shape[0], sizeof(int64_t))
        self.at = <Row*> calloc(most_rows, sizeof(Row))
        self.data = <const uint8_t**> calloc(most_rows * _MOST, sizeof(uint8_t*))
        self.messages = <Message*> calloc(most_rows, sizeof(Message))
        if self.stamps == NULL or self.at == NULL or self.data == NULL or self.messages == NULL:
            raise MemoryError
        self.cells = cells
        self.most_rows = most_rows
        self.stamp = 0
        self.models, self.forms = {}, {}
        self.begin([])

    def __dealloc__(self):
        free(self.stamps)
        free(self.at)
        free(self.data)
        free(self.messages)

    def add_model(self, Model model not None):
        """Steps of this model can be read from now on."""
        self.models[model.number] = model

    def add_form(self, Form form not None):
        """Step messages of this form can be read from now on. Of each size, and of sizes, the last few are kept."""
        forms = self.forms.setdefault(form.size, [])
        forms.insert(0, form)
        del forms[_MOST_FORMS:]
        if len(self.forms) > _MOST_SIZES:
            self.forms = {form.size: forms}

    def model_of(self, number):
        """The model of that Record, or None."""
        return self.models.get(number)

    def forget(self, number):
        """A model version is gone. Not between `read` and `answers`."""
        self.models.pop(number, None)
        self.forms.clear()
        self.last = self.model = None

    def read(self, list senders not None, list messages not None):
        """Reads a turn's messages, each a Step or a StepFrame, in the order in which they came.

        What goes now is of one model, each step is its session's next, and each session has one. Whatever else a sender
        sent goes elsewhere, and never before what it sent earlier.

        Returns:
            Whether anything goes now. False: all is for arrays, whatever the lists say.
        """
        cdef Py_ssize_t index
        cdef object sender
        self.begin(messages)
        for index in range(len(messages)):
            sender = senders[index]
            if self.waiting and sender in self.waiting:
                self.put_later(sender, messages[index])
                self.later_rows += 1
            elif self.odd and sender in self.odd:
                self.put(self.aside, sender, messages[index])
            else:
                self.read_one(sender, messages[index])
        return self.rows > 0 and self.later_rows <= min(_MOST_LATER * self.rows, self.model.most_later)

    def done(self):
        """Keeps nothing of the turn: senders and messages may be gone before the next one comes."""
        self.begin([])

    cdef int begin(self, list messages) except -1:
        self.rows = self.later_rows = 0
        self.model, self.stranger = None, None
        self.senders, self.message_forms, self.held = [], [], messages
        self.later, self.others, self.aside = ([], []), ([], []), ([], [])
        self.behind, self.waiting, self.odd = set(), set(), set()
        self.stamp += 1
        return 0

    cdef int put(self, tuple lists, object sender, bytes message) except -1:
        (<list> lists[0]).append(sender)
        (<list> lists[1]).append(message)
        return 0

    cdef int put_later(self, object sender, bytes message) except -1:
        self.behind.add(sender)
        return self.put(self.later, sender, message)

    cdef int read_one(self, object sender, bytes message) except -1:
        cdef const uint8_t* start = <const uint8_t*> PyBytes_AS_STRING(message)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(message)
        cdef int taken
        if size and start[0] == _FRAME_TAG:
            taken = self.read_frame(sender, start, size)
        else:
            taken = self.read_step(sender, start, size)
        if taken <= _PARTED:
            self.senders.append(sender)
        if taken == _LATER:
            self.put_later(sender, message)
        elif taken == _OTHER:
            self.put(self.others, sender, message)
        elif taken >= _UNUSUAL:
            if not self.rows and not self.later_rows:
                # Whose model this turn is of is for others to say.
                self.model = None
            if taken == _UNKNOWN and self.stranger is None:
                self.stranger = (sender, message)
            if sender in self.behind:
                # It may be of a session that has a step there.
                self.waiting.add(sender)
                self.put_later(sender, message)
                self.later_rows += 1
            else:
                self.odd.add(sender)
                self.put(self.aside, sender, message)
        return 0

    cdef int read_step(self, object sender, const uint8_t* start, Py_ssize_t size) except -1:
        cdef Form form = self.last
        cdef int64_t handle, row
        cdef Py_ssize_t index
        cdef Row* mine
        if form is None or form.size != size or not form.matches(start):
            form = self.form_of(start, size)
            if form is None:
                return _UNKNOWN
        handle = form.number(start, 0)
        row = _row(sender, handle)
        if row < 0:
            return _UNUSUAL
        if self.cells[row, _RECORD] != form.model.number:
            # The same layout may be another model's too.
            form = self.form_of(start, size, self.cells[row, _RECORD])
            if form is None:
                return _UNKNOWN
        self.last = form
        if self.model is None:
            self.model = form.model
        elif self.model is not form.model:
            return _OTHER
        if self.stamps[row] == self.stamp or self.rows == min(self.most_rows, self.model.most_rows):
            self.stamps[row] = self.stamp
            self.later_rows += 1
            return _LATER
        mine = &self.at[self.rows]
        mine.row, mine.handle, mine.holder = row, <uint32_t> handle, sender.number
        mine.seq, mine.acked_seq = form.number(start, 1), form.number(start, 2)
        for index in range(self.model.input_count):
            self.data[self.rows * _MOST + index] = start + form.inputs[index]
        if not self.usable(self.rows):
            return _UNUSUAL
        self.stamps[row] = self.stamp
        self.add_message(form, 1, start + form.label)
        return _GOES

    cdef bint usable(self, Py_ssize_t index) noexcept:
        """The step is its session's next, nothing is before it, and its numbers are finite where they must be."""
        cdef Py_ssize_t tensor
        if not self.is_next(index):
            return False
        for tensor in range(self.model.input_count):
            if self.model.kinds[tensor] and not _finite(
                self.data[index * _MOST + tensor], self.model.input_sizes[tensor], self.model.kinds[tensor]
            ):
                return False
        return True

    cdef bint is_next(self, Py_ssize_t index) noexcept:
        cdef Row* mine = &self.at[index]
        cdef int64_t* cell = &self.cells[mine.row, 0]
        return (
            cell[_GATE] == mine.holder
            and cell[_APPLIED_SEQ] == mine.seq - 1
            and cell[_AHEAD] == 0
            and cell[_CREDIT] >= 1
            and cell[_RECORD] == self.model.number
        )

    cdef Form form_of(self, const uint8_t* start, Py_ssize_t size, int64_t number=-1):
        """The form of a message; with a number, of that model."""
        cdef Form form
        for form in self.forms.get(size, ()):
            if form.matches(start) and (number < 0 or form.model.number == number):
                return form
        return None

    cdef int read_frame(self, object sender, const uint8_t* start, Py_ssize_t size) except -1:
        cdef Parts parts
        cdef Model model
        cdef Row* mine
        cdef int64_t row, number
        cdef Py_ssize_t turn, index, count, most, taken = 0, left = 0
        cdef uint32_t handle, last
        cdef uint8_t* stays
        if not _cut(start, size, &parts):
            return _UNUSUAL
        count = parts.count
        memcpy(&handle, parts.handles, 4)
        memcpy(&last, parts.handles + 4 * (count - 1), 4)
        row = _row(sender, handle)
        if row < 0 or (count > 1 and handle == last):
            # Steps of one session behind each other run as one longer one.
            return _UNUSUAL
        model = self.models.get(self.cells[row, _RECORD])
        if model is None:
            return _UNKNOWN
        if self.model is None:
            self.model = model
        elif self.model is not model:
            return _OTHER
        if parts.columns != model.input_count or count * (model.output_bytes + 12) > _MOST_FRAME_BYTES:
            return _UNUSUAL
        for index in range(parts.columns):
            if parts.sizes[index] != count * model.input_sizes[index]:
                return _UNUSUAL
        most = min(self.most_rows, model.most_rows)
        number = sender.number
        stays = <uint8_t*> calloc(count, 1)
        if stays == NULL:
            raise MemoryError
        try:
            for turn in range(count):
                memcpy(&handle, parts.handles + 4 * turn, 4)
                row = _row(sender, handle)
                if row < 0 or self.cells[row, _RECORD] != model.number:
                    return _UNUSUAL
                if self.stamps[row] == self.stamp or self.rows + taken == most:
                    # What comes behind it for its session stays behind it.
                    self.stamps[row] = self.stamp
                    stays[turn] = 1
                    left += 1
                    continue
                mine = &self.at[self.rows + taken]
                mine.row, mine.handle, mine.holder, mine.acked_seq = row, handle, number, 0
                memcpy(&mine.seq, parts.seqs + 8 * turn, 8)
                if parts.acked_seqs != NULL:
                    memcpy(&mine.acked_seq, parts.acked_seqs + 8 * turn, 8)
                for index in range(parts.columns):
                    self.data[(self.rows + taken) * _MOST + index] = parts.data[index] + turn * model.input_sizes[index]
                if mine.acked_seq < 0 or not self.usable(self.rows + taken):
                    return _UNUSUAL
                self.stamps[row] = self.stamp
                taken += 1
            self.later_rows += left
            if not taken:
                return _LATER
            self.add_message(None, taken, NULL)
            if not left:
                return _GOES
            self.put_later(sender, _rest(&parts, stays, count, left, model))
            return _PARTED
        finally:
            free(stays)

    cdef int add_message(self, Form form, Py_ssize_t count, const uint8_t* label) except -1:
        cdef Message* message = &self.messages[len(self.message_forms)]
        message.first, message.count, message.label = self.rows, count, label
        self.message_forms.append(form)
        self.rows += count
        return 0

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
        cdef Py_ssize_t index, tensor, free_slots, most = 0
        cdef int64_t* cell
        cdef int64_t held, base
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
            plane, prints = model.planes[mine.position], model.prints[mine.position]
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
        """The StreamResponse that answers each message that went, in the order of `senders`."""
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
        return answer


cdef struct Parts:
    # A StepFrame's fields within its message.
    Py_ssize_t count
    const uint8_t* handles
    const uint8_t* seqs
    const uint8_t* acked_seqs
    Py_ssize_t columns
    const uint8_t* data[_MOST]
    Py_ssize_t sizes[_MOST]
    int64_t timeout_ms


cdef bytes _rest(Parts* parts, const uint8_t* stays, Py_ssize_t count, Py_ssize_t left, Model model):
    """A StreamRequest with a frame of the rows that stay, `left` of them."""
    cdef Py_ssize_t body, index
    cdef bytes rest
    cdef uint8_t* to
    body = 2 + _varint_size(4 * left) + _varint_size(8 * left) + 12 * left
    for index in range(parts.columns):
        body += 1 + _varint_size(model.input_sizes[index] * left) + model.input_sizes[index] * left
    if parts.timeout_ms:
        body += 1 + _varint_size(parts.timeout_ms)
    if parts.acked_seqs != NULL:
        body += 1 + _varint_size(8 * left) + 8 * left
    rest = PyBytes_FromStringAndSize(NULL, 1 + _varint_size(body) + body)
    to = _put_head(<uint8_t*> PyBytes_AS_STRING(rest), _FRAME_TAG, body)
    to = _put_staying(to, _HANDLES_TAG, parts.handles, stays, count, left, 4)
    to = _put_staying(to, _SEQS_TAG, parts.seqs, stays, count, left, 8)
    for index in range(parts.columns):
        to = _put_staying(to, _COLUMN_TAG, parts.data[index], stays, count, left, model.input_sizes[index])
    if parts.timeout_ms:
        to = _put_head(to, _TIMEOUT_TAG, parts.timeout_ms)
    if parts.acked_seqs != NULL:
        _put_staying(to, _ACKED_TAG, parts.acked_seqs, stays, count, left, 8)
    return rest


cdef uint8_t* _put_staying(
    uint8_t* to,
    uint8_t tag,
    const uint8_t* data,
    const uint8_t* stays,
    Py_ssize_t count,
    Py_ssize_t left,
    Py_ssize_t size,
) noexcept:
    cdef Py_ssize_t row
    to = _put_head(to, tag, size * left)
    for row in range(count):
        if stays[row]:
            memcpy(to, data + size * row, size)
            to += size
    return to


cdef bint _cut(const uint8_t* start, Py_ssize_t size, Parts* parts) noexcept:
    """Finds a StepFrame of one-token rows in a message that holds it and nothing else; False: it is something else."""
    cdef Py_ssize_t at = 1, handles = -1, seqs = -1, acked = -1
    cdef int64_t length
    cdef uint8_t tag
    memset(parts, 0, sizeof(Parts))
    if not _varint(start, size, &at, &length) or length != size - at:
        return False
    while at < size:
        tag = start[at]
        at += 1
        if not _varint(start, size, &at, &length):
            return False
        if tag == _TIMEOUT_TAG:
            parts.timeout_ms = length
            continue
        if length > size - at:
            return False
        if tag == _HANDLES_TAG and handles < 0:
            parts.handles, handles = start + at, length
        elif tag == _SEQS_TAG and seqs < 0:
            parts.seqs, seqs = start + at, length
        elif tag == _ACKED_TAG and acked < 0:
            parts.acked_seqs, acked = start + at, length
        elif tag == _COLUMN_TAG and parts.columns < _MOST:
            parts.data[parts.columns], parts.sizes[parts.columns] = start + at, length
            parts.columns += 1
        else:
            return False
        at += length
    parts.count = handles // 4
    if acked == 0:
        parts.acked_seqs, acked = NULL, -1
    return handles > 0 and handles % 4 == 0 and seqs == 2 * handles and (acked < 0 or acked == seqs)


cdef bint _varint(const uint8_t* start, Py_ssize_t size, Py_ssize_t* at, int64_t* value) noexcept:
    """Reads one of up to nine bytes, which fits an int64."""
    cdef int shift = 0
    cdef uint8_t byte
    value[0] = 0
    while at[0] < size and shift < 63:
        byte = start[at[0]]
        at[0] += 1
        value[0] |= (<int64_t> (byte & 0x7F)) << shift
        if byte < 0x80:
            return True
        shift += 7
    return False


cdef Py_ssize_t _varint_size(Py_ssize_t value) noexcept:
    cdef Py_ssize_t size = 1
    while value > 0x7F:
        value >>= 7
        size += 1
    return size


cdef uint8_t* _put_head(uint8_t* to, uint8_t tag, Py_ssize_t size) noexcept:
    to[0] = tag
    to += 1
    while size > 0x7F:
        to[0] = (size & 0x7F) | 0x80
        size >>= 7
        to += 1
    to[0] = <uint8_t> size
    return to + 1


cdef int64_t _row(object sender, int64_t handle) except -2:
    """The row of the table of a session that the sender holds under that handle; -1: it holds none."""
    if <int64_t> sender.handle == handle:
        return <int64_t> sender.row
    row = (<dict> sender.rows).get(handle)
    return -1 if row is None else <int64_t> row


cdef uint64_t _print(const uint8_t* data, Py_ssize_t size, const uint64_t* weights) noexcept:
    """See conveyor_proto.fingerprint: of one tensor of a step."""
    cdef uint64_t total = 0, word
    cdef Py_ssize_t index
    for index in range(size // 8):
        memcpy(&word, data + 8 * index, 8)
        total += word * weights[index]
    if size % 8:
        word = 0
        memcpy(&word, data + size - size % 8, size % 8)
        total += word * weights[size // 8]
    return total + <uint64_t> size


cdef bint _finite(const uint8_t* data, Py_ssize_t size, int kind) noexcept:
    """No NaN and no infinity: neither has an exponent that is not all ones. `kind`: bytes of a number."""
    cdef uint16_t half
    cdef uint32_t single
    cdef uint64_t double_
    cdef Py_ssize_t index
    cdef int bad = 0
    if kind == 4:
        for index in range(size // 4):
            memcpy(&single, data + 4 * index, 4)
            bad |= (single & 0x7F800000U) == 0x7F800000U
    elif kind == 8:
        for index in range(size // 8):
            memcpy(&double_, data + 8 * index, 8)
            bad |= (double_ & 0x7FF0000000000000U) == 0x7FF0000000000000U
    else:
        for index in range(size // 2):
            memcpy(&half, data + 2 * index, 2)
            bad |= (half & 0x7C00U) == 0x7C00U
    return not bad
