"""Bodies of records: what is written comes back bit for bit, and nothing else does."""

import numpy as np
import pytest
from conveyor_proto.v1 import spec_pb2, tensor_pb2
from conveyor_server.keeper.body import ANSWER, HEAD, BodyInvalid, Piece, decode, encode, seed
from hypothesis import given
from hypothesis import strategies as st

FLOAT, INT, HALF = tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_INT64, tensor_pb2.DATA_TYPE_FLOAT16


def spec_of(states: int = 2) -> spec_pb2.ModelSpec:
    spec = spec_pb2.ModelSpec(digest="d")
    spec.states.add(name="h", dtype=FLOAT, shape=[3])
    if states > 1:
        spec.states.add(name="n", dtype=INT, shape=[])
    spec.outputs.add(name="y", dtype=FLOAT, shape=[2], has_time=True)
    spec.outputs.add(name="last", dtype=HALF, shape=[1])
    return spec


def piece_of(rows: int, answers: int, *, length: int = 1, fresh: bool = False) -> Piece:
    random = np.random.default_rng(rows * 100 + answers)
    seqs = np.arange(rows) + answers + 1
    return Piece(
        [seed(f"s{row}", "d") for row in range(rows)],
        seqs,
        seqs * 2,
        np.full(rows, 1.5e9),
        [] if fresh else [random.standard_normal((rows, 3)).astype(np.float32), random.integers(0, 9, rows)],
        [
            (
                seqs - answers + 1 + turn,
                random.integers(0, 1 << 63, rows, np.uint64),
                length,
                [
                    random.standard_normal((rows, length, 2)).astype(np.float32),
                    random.standard_normal((rows, 1)).astype(np.float16),
                ],
            )
            for turn in range(answers)
        ],
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("answers", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_what_is_written_comes_back(rows: int, answers: int, length: int) -> None:
    piece = piece_of(rows, answers, length=length)
    data, size = encode(piece)
    assert len(data) == rows * size
    for row in range(rows):
        body = decode(data[row * size : (row + 1) * size], seed(f"s{row}", "d"), spec_of())
        assert (body.seq, body.time_steps, body.last_used) == (piece.seqs[row], piece.time_steps[row], 1.5e9)
        assert body.states is not None
        for state, states in zip(body.states, piece.states, strict=True):
            assert state.tobytes() == states[row].tobytes()
            assert state.shape == states[row].shape
        assert len(body.answers) == answers
        for answer, (seqs, prints, _, outputs) in zip(body.answers, piece.answers, strict=True):
            assert (answer.seq, answer.fingerprint, answer.length) == (seqs[row], prints[row], length)
            for output, all_of_them in zip(answer.outputs, outputs, strict=True):
                assert output.tobytes() == all_of_them[row].tobytes()
                assert output.shape == all_of_them[row].shape


def test_a_fresh_session_has_no_state() -> None:
    piece = piece_of(1, 0, fresh=True)
    piece.seqs[0] = 0
    data, _ = encode(piece)
    assert decode(data, seed("s0", "d"), spec_of()).states is None


@given(at=st.integers(0), flip=st.integers(1, 255))
def test_every_changed_byte_is_found_out(at: int, flip: int) -> None:
    data = bytearray(encode(piece_of(1, 2))[0])
    data[at % len(data)] ^= flip
    with pytest.raises(BodyInvalid):
        decode(bytes(data), seed("s0", "d"), spec_of())


@given(st.integers(0))
def test_every_cut_is_found_out(length: int) -> None:
    data = encode(piece_of(1, 2))[0]
    with pytest.raises(BodyInvalid):
        decode(data[: length % len(data)], seed("s0", "d"), spec_of())


@pytest.mark.parametrize(("session_id", "digest"), [("s1", "d"), ("s0", "e")])
def test_a_body_of_another_session_or_model_is_refused(session_id: str, digest: str) -> None:
    data = encode(piece_of(1, 1))[0]
    with pytest.raises(BodyInvalid, match="another session or model"):
        decode(data, seed(session_id, digest), spec_of())


def test_a_body_that_does_not_fit_the_model_is_refused() -> None:
    data = encode(piece_of(1, 1))[0]
    with pytest.raises(BodyInvalid, match="bytes of state"):
        decode(data, seed("s0", "d"), spec_of(1))


def test_the_layout_is_as_documented() -> None:
    assert (HEAD.itemsize, ANSWER.itemsize) == (48, 24)
