"""Fingerprints: the same alone and among others, and another for other content."""

import subprocess
import sys

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from conveyor_proto.fingerprint import fingerprint, fingerprints
from hypothesis import given

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.int16)
ARRAYS = st.tuples(
    st.sampled_from(DTYPES), hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9), st.integers(1, 5)
).flatmap(lambda drawn: hnp.arrays(drawn[0], (drawn[2], *drawn[1])))


@given(st.integers(1, 4).flatmap(lambda rows: st.lists(inputs_of(rows), min_size=1, max_size=3)))
def test_alone_and_among_others_it_is_the_same(inputs):
    together = fingerprints(inputs)
    assert together.dtype == np.uint64
    assert [fingerprint([array[row] for array in inputs]) for row in range(len(inputs[0]))] == together.tolist()


def inputs_of(rows: int) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=9)
    return st.tuples(st.sampled_from(DTYPES), shapes).flatmap(lambda drawn: hnp.arrays(drawn[0], (rows, *drawn[1])))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_rows_that_fill_no_whole_word(count):
    """A byte at the end counts, and so does how many there are."""
    row = np.arange(1, count + 1, dtype=np.uint8)
    prints = {fingerprint([row]), fingerprint([np.append(row, np.uint8(0))])}
    for place in range(count):
        other = row.copy()
        other[place] += 100
        prints.add(fingerprint([other]))
    assert len(prints) == count + 2


@given(ARRAYS, st.data())
def test_one_changed_byte_shows(array, data):
    step = array[0]
    other = np.frombuffer(step.tobytes(), np.uint8).copy()
    place = data.draw(st.integers(0, len(other) - 1))
    other[place] ^= data.draw(st.integers(1, 255))
    assert fingerprint([np.frombuffer(step.tobytes(), np.uint8)]) != fingerprint([other])


def test_inputs_that_change_places_show():
    a, b = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    assert fingerprint([a, b]) != fingerprint([b, a])
    # And so does a value that moves from the end of one to the beginning of the next.
    assert fingerprint([np.array([1.0, 2.0]), np.array([3.0])]) != fingerprint([np.array([1.0]), np.array([2.0, 3.0])])
    assert fingerprint([np.zeros(2), np.zeros(1)]) != fingerprint([np.zeros(1), np.zeros(2)])


def test_memory_order_is_no_content():
    x = np.arange(24.0).reshape(2, 3, 4)
    turned = np.asfortranarray(x)
    assert fingerprint([x]) == fingerprint([turned]) == fingerprint([x[::1]])
    assert fingerprints([x]).tolist() == fingerprints([turned]).tolist()
    assert fingerprint([x[0, :, ::2]]) == fingerprint([x[0, :, ::2].copy()])


def test_an_input_without_dimensions():
    assert fingerprint([np.float64(3.0).reshape(())]) == fingerprint([np.array([3.0])])
    assert fingerprints([np.array([3.0, 4.0])]).tolist() == [fingerprint([np.array(value)]) for value in (3.0, 4.0)]


def test_zero_and_its_negative_are_other_content():
    """Equal content is equal bits: -0.0 gives other answers than 0.0."""
    assert fingerprint([np.array([0.0])]) != fingerprint([np.array([-0.0])])


def test_longer_steps_before_do_not_change_it():
    """The weights grow with the longest step so far, and another process begins from the start."""
    short = fingerprint([np.arange(5.0)])
    long = fingerprint([np.arange(50_000.0)])
    assert fingerprint([np.arange(5.0)]) == short
    code = (
        "import numpy as np; from conveyor_proto.fingerprint import fingerprint;"
        f"assert fingerprint([np.arange(50_000.0)]) == {long}; assert fingerprint([np.arange(5.0)]) == {short}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
