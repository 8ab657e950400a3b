"""What the compiled turn makes of inputs of any size: the same fingerprints, and the same idea of what is finite."""

import math

import numpy as np
import pytest
from conveyor_proto.fingerprint import fingerprints, weights
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server import compiled
from conveyor_server.sessions.table import APPLIED_SEQ, CREDIT, FIRST_SEQ, GATE, RECORD, SessionTable
from conveyor_server.slab import SlotPool

ROWS, STREAM, NUMBER = 3, 7, 5


class Book:
    """A record of one output of a byte."""

    def __init__(self) -> None:
        self.prints = np.zeros(ROWS, np.uint64)
        self.outputs = np.zeros((ROWS, 1), np.uint8)

    def plane(self, position: int):
        assert position == 0
        return [self.outputs], self.prints

    def trim_one(self, row: int, acked_seq: int) -> None:
        raise AssertionError("nothing is kept")


class Sender:
    def __init__(self) -> None:
        self.number, self.handle, self.row = STREAM, -1, -1
        self.rows = dict(enumerate(range(ROWS)))


def taken(arrays: list[np.ndarray], *, finite: bool = True) -> np.ndarray | None:
    """The fingerprints that are recorded of rows `[ROWS, ...]` of these inputs; None: they are not usable."""
    table, slots, book = SessionTable(ROWS), SlotPool(2 * ROWS), Book()
    for row in range(ROWS):
        table.cells[row, [GATE, RECORD, APPLIED_SEQ, CREDIT, FIRST_SEQ]] = STREAM, NUMBER, 0, 2, 1
    sizes = [array.nbytes // ROWS for array in arrays]
    kinds = [array.dtype.itemsize if finite and array.dtype.kind == "f" else 0 for array in arrays]
    inputs, words = list(zip(sizes, kinds, strict=True)), weights(max(sizes) // 8 + 1)
    model = compiled.Model(NUMBER, None, ROWS, ROWS, np.zeros(ROWS, np.int64), slots, book, inputs, [1], words)
    turn = compiled.Turn(table.cells, ROWS)
    turn.add_model(model)
    frame = pb.StepFrame(
        handles=np.arange(ROWS, dtype=np.uint32).tobytes(),
        seqs=np.ones(ROWS, np.uint64).tobytes(),
        columns=[array.tobytes() for array in arrays],
    )
    if not turn.read([Sender()], [pb.StreamRequest(frame=frame).SerializeToString()]):
        assert [len(messages) for _, messages in (turn.aside, turn.later, turn.others)] == [1, 0, 0]
        return None
    staging = compiled.Staging(
        ROWS,
        compiled.Columns([np.zeros((ROWS, size), np.uint8) for size in sizes], sizes),
        compiled.Columns([np.array([[1], [2], [3]], np.uint8)], [1]),
        np.zeros(ROWS, np.int32),
        np.zeros(ROWS, np.int64),
        np.zeros(ROWS, np.int64),
        None,
        0,
        None,
    )
    assert turn.fill(staging)
    assert turn.commit(staging, 1.0)
    assert book.outputs.tolist() == [[1], [2], [3]]
    return book.prints


@pytest.mark.parametrize("size", [*range(1, 26), 256, 1000, 8191])
def test_a_fingerprint_is_the_same_for_any_size(size: int) -> None:
    rng = np.random.default_rng(size)
    one = rng.integers(0, 256, (ROWS, size), np.uint8)
    two = rng.integers(-(1 << 30), 1 << 30, (ROWS, 1 + size % 5), np.int32)
    for arrays in ([one], [one, two], [two, one]):
        assert taken(arrays).tolist() == fingerprints(arrays).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(0, 0), (1, 3), (2, 6)])
def test_what_is_not_finite_is_seen_wherever_it_is(dtype, value: float, at: tuple[int, int]) -> None:
    limits = np.finfo(dtype)
    good = np.array([[limits.max, limits.min, limits.tiny, -0.0, 0.0, limits.smallest_subnormal, 1.0]] * ROWS, dtype)
    assert taken([good]).tolist() == fingerprints([good]).tolist()
    bad = good.copy()
    bad[at] = value
    assert taken([bad]) is None
    assert taken([bad], finite=False).tolist() == fingerprints([bad]).tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: compiled.Columns([np.zeros((2, 4), np.uint8)], [5]),
        lambda: compiled.Columns([np.zeros((2, 4), np.uint8)], [0]),
        lambda: compiled.Columns([np.zeros((2, 4), np.uint8)] * 17, [4] * 17),
        lambda: form(message=bytes(300), mask=b"\xff" * 257 + bytes(43)),
        lambda: form(inputs=[40]),
        lambda: form(numbers=[(0, 1), (1, 2), (3, 99)]),
        lambda: form(label=(4, 99)),
        lambda: form(outputs=[50]),
        lambda: form(answer_label=49),
        lambda: form(durable=43),
        lambda: form(durable=-2),
        lambda: compiled.Turn(SessionTable(ROWS).cells, ROWS, np.zeros(ROWS, np.int64)),
    ],
)
def test_places_outside_of_what_they_are_of_are_refused(make) -> None:
    """Nothing is read or written by an offset that was not checked once."""
    with pytest.raises(ValueError, match=r"\w"):
        make()


def form(**changed) -> "compiled.Form":
    model = compiled.Model(
        NUMBER, None, ROWS, ROWS, np.zeros(ROWS, np.int64), SlotPool(8), Book(), [(8, 4)], [1], weights(1)
    )
    whole = {
        "message": bytes(40),
        "mask": b"\xff" * 8 + bytes(32),
        "numbers": [(0, 1), (1, 2), (2, 2)],
        "inputs": [8],
        "label": (0, 2),
        "answer": bytes(50),
        "answer_label": 0,
        "outputs": [10],
        "durable": -1,
    }
    return compiled.Form(model, *{**whole, **changed}.values())


@pytest.mark.parametrize("durable", [-1, 0, 42])
def test_the_form_that_the_others_are_broken_from_is_whole(durable: int) -> None:
    assert form(durable=durable) is not None


@pytest.mark.parametrize("says", [False, True])
def test_a_form_that_says_something_else_than_its_server_is_refused(says: bool) -> None:
    """It would be read from, or written to, where nothing is."""
    table = SessionTable(ROWS)
    turn = compiled.Turn(table.cells, ROWS, table.durable_seq if says else None)
    turn.add_form(form(durable=42 if says else -1))
    with pytest.raises(ValueError, match="durable_seq"):
        turn.add_form(form(durable=-1 if says else 42))
