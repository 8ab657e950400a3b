# Of _turn.pyx: what a turn touches of a model, and where everything lies in its Step messages and their answers.

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
        durable: start of the eight bytes of the durable_seq there; -1: it is not said.
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
    cdef Py_ssize_t durable

    def __init__(
        self,
        Model model,
        bytes message,
        bytes mask,
        numbers,
        inputs,
        label,
        bytes answer,
        answer_label,
        outputs,
        durable,
    ):
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
        self.durable = durable
        if not -1 <= self.durable <= len(answer) - 8:
            raise ValueError("a durable_seq that lies outside the answer")

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
