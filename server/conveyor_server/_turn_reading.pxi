# Of _turn.pyx: the messages of a turn, read and judged.

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


cdef class Reading:
    """Which steps of a turn go now, and where the others go. See Turn.

    Args:
        cells: SessionTable.cells.
        most_rows: of a run of any model.
        durable: SessionTable.durable_seq, which answers say; None: they say nothing of it.

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
    cdef const int64_t[::1] durable
    cdef bint says_durable
    # Bytes of a row in a frame of results, beside its outputs.
    cdef Py_ssize_t label_bytes

    def __cinit__(self, int64_t[:, ::1] cells not None, Py_ssize_t most_rows, const int64_t[::1] durable=None):
        self.says_durable = durable is not None
        if self.says_durable and durable.shape[0] < cells.shape[0]:
            raise ValueError(f"durable_seqs of {durable.shape[0]} rows of {cells.shape[0]}")
        self.durable = durable
        self.label_bytes = 20 if self.says_durable else 12
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
        if (form.durable >= 0) != self.says_durable:
            raise ValueError("a form whose answers say the durable_seq and others here do not, or the other way round")
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

    def where(self, Py_ssize_t index):
        """The row of the table and the seq of a step that goes now, from 0. For who looks closer at a few."""
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return self.at[index].row, self.at[index].seq

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
        if parts.columns != model.input_count or count * (model.output_bytes + self.label_bytes) > _MOST_FRAME_BYTES:
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
