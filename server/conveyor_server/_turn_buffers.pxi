# Of _turn.pyx: the buffers of a run, as bytes row by row.

cdef struct Column:
    # A tensor of a run: the first row's first time step, bytes from row to row, and bytes of a time step.
    uint8_t* data
    Py_ssize_t stride
    Py_ssize_t size


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
