# Of _turn.pyx: StepFrames found in their messages, and what is left of them as messages; protobuf's encoding.

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
