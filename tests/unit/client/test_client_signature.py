"""What a step may be given: shapes by rank, dtypes by meaning, names, and the same for many rows."""

import numpy as np
import pytest
from conveyor._core.batch import Form, Piece, pick_rows, prepare_batch, present_batch
from conveyor._core.signature import Signature, signature_of
from conveyor.errors import InvalidInput, ProtocolError
from conveyor_proto.v1 import spec_pb2
from conveyor_proto.v1 import tensor_pb2 as t


@pytest.fixture
def one(specs):
    return Signature(specs["sum"])


@pytest.fixture
def mix(specs):
    return Signature(specs["mix"])


def single(dtype, shape=()):
    tensor = spec_pb2.TensorSpec(name="x", dtype=dtype, shape=shape, has_time=True)
    return Signature(spec_pb2.ModelSpec(name="m", inputs=[tensor], outputs=[tensor]))


def test_the_rank_alone_says_token_or_chunk(one):
    token, chunk = one.prepare(np.zeros(2)), one.prepare(np.zeros((5, 2)))
    assert (token.one, token.time_steps, len(token.data[0])) == (True, 1, 8)
    assert (chunk.one, chunk.time_steps, len(chunk.data[0])) == (False, 5, 40)
    scalar = single(t.DATA_TYPE_INT64)
    assert scalar.prepare(3).one
    assert scalar.prepare([3]).time_steps == 1
    assert not scalar.prepare([3]).one


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1, 2), ()])
def test_any_other_shape_is_refused_with_what_is_expected(one, shape):
    with pytest.raises(InvalidInput) as error:
        one.prepare(np.zeros(shape))
    expected = "float32 [2] for one time step or float32 [time, 2] for a chunk"
    assert str(error.value) == f"input 'x' takes {expected}, and shape {list(shape)} came"
    assert error.value.reason == "INPUT_SHAPE"
    assert error.value.metadata["expected"] == expected


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (t.DATA_TYPE_FLOAT32, 1),
        (t.DATA_TYPE_FLOAT32, 1.5),
        (t.DATA_TYPE_FLOAT32, np.float64(0.1)),
        (t.DATA_TYPE_FLOAT32, True),
        (t.DATA_TYPE_FLOAT32, np.float32(np.nan)),
        (t.DATA_TYPE_FLOAT16, 65504.0),
        (t.DATA_TYPE_FLOAT64, np.float32(2)),
        (t.DATA_TYPE_INT64, 7),
        (t.DATA_TYPE_INT64, np.int8(-7)),
        (t.DATA_TYPE_UINT8, 255),
        (t.DATA_TYPE_INT8, np.int64(-128)),
        (t.DATA_TYPE_BOOL, True),
    ],
)
def test_what_means_the_same_is_cast(dtype, value):
    signature = single(dtype)
    (data,) = signature.prepare(value).data
    assert data == np.asarray(value).astype(signature.inputs[0].dtype).tobytes()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (t.DATA_TYPE_INT64, 1.0),
        (t.DATA_TYPE_UINT8, 256),
        (t.DATA_TYPE_UINT8, -1),
        (t.DATA_TYPE_INT32, 1 << 40),
        (t.DATA_TYPE_INT64, np.uint64(1 << 63)),
        (t.DATA_TYPE_FLOAT16, 1e6),
        (t.DATA_TYPE_FLOAT32, 1e300),
        (t.DATA_TYPE_FLOAT32, 1 + 2j),
        (t.DATA_TYPE_FLOAT32, "1"),
        (t.DATA_TYPE_FLOAT32, None),
        (t.DATA_TYPE_BOOL, 1),
    ],
)
def test_what_would_be_lost_or_is_of_another_kind_is_refused(dtype, value):
    with pytest.raises(InvalidInput) as error:
        single(dtype).prepare(value)
    assert error.value.reason == "INPUT_DTYPE"


def test_uneven_lists_are_refused(one):
    with pytest.raises(InvalidInput, match="uneven"):
        one.prepare([[1, 2], [3]])


def test_a_chunk_of_nothing_is_refused(one):
    with pytest.raises(InvalidInput) as error:
        one.prepare(np.zeros((0, 2)))
    assert error.value.reason == "INPUT_EMPTY"


def test_memory_order_and_foreign_views_do_not_matter(one):
    columns = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    assert list(one.prepare(columns).data) == [np.ascontiguousarray(columns).tobytes()]
    (data,) = one.prepare(np.arange(4, dtype=">f4")[::2]).data
    assert np.frombuffer(data, "<f4").tolist() == [0, 2]


def test_several_inputs_go_by_name_in_the_models_order(mix):
    prepared = mix.prepare({"gain": 2, "token": [1, 2, 3], "x": np.ones((3, 2))})
    assert [len(data) for data in prepared.data] == [3 * 8, 3 * 8, 4]
    assert prepared.time_steps == 3


@pytest.mark.parametrize(
    ("given", "reason", "words"),
    [
        (np.ones((3, 2)), "INPUT_MISSING", "a dict with 'x', 'token', 'gain'"),
        ({"x": np.ones(2), "token": 1}, "INPUT_MISSING", "'gain'"),
        ({"x": np.ones(2), "token": 1, "gain": 1, "y": 1}, "INPUT_UNKNOWN", "'y'"),
        ({"x": np.ones((3, 2)), "token": [1, 2], "gain": 1}, "INPUT_SHAPE", "3 time steps"),
        ({"x": np.ones(2), "token": [1], "gain": 1}, "INPUT_SHAPE", "one time step"),
        ({"x": np.ones(2), "token": 1, "gain": [1]}, "INPUT_SHAPE", "float32 []"),
    ],
)
def test_what_does_not_fit_together_is_refused(mix, given, reason, words):
    with pytest.raises(InvalidInput, match=words.replace("[]", r"\[\]")) as error:
        mix.prepare(given)
    assert error.value.reason == reason


def test_answers_come_in_the_inputs_form_and_are_writable(mix):
    y, last = np.arange(6, dtype=np.float32), np.array(9)
    outputs = [y.tobytes(), last.tobytes()]
    chunk = mix.present(outputs, 3, one=False)
    assert chunk["y"].tolist() == y.reshape(3, 2).tolist()
    assert chunk["last"] == 9
    chunk["y"][0] = 7
    with pytest.raises(ProtocolError, match="'y'"):
        mix.present(outputs, 2, one=False)
    with pytest.raises(ProtocolError, match="1 outputs"):
        mix.present(outputs[:1], 3, one=False)
    token = mix.present([memoryview(y[:2].tobytes()), outputs[1]], 1, one=True)
    assert token["y"].shape == (2,)


def test_a_description_with_an_unknown_type_is_a_protocol_error():
    tensor = spec_pb2.TensorSpec(name="x", dtype=t.DATA_TYPE_UNSPECIFIED)
    with pytest.raises(ProtocolError, match="model 'odd'"):
        signature_of(spec_pb2.ModelSpec(name="odd", inputs=[tensor]))


ROWS = 3
TOKENS = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize(
    ("given", "form", "lengths"),
    [
        (TOKENS, Form.ONE, None),
        (TOKENS.tolist(), Form.ONE, None),
        (list(TOKENS), Form.ONE, None),
        (np.repeat(TOKENS[:, None], 4, axis=1), Form.CHUNK, [4, 4, 4]),
        ([TOKENS[:1], TOKENS[:2], TOKENS], Form.LIST, [1, 2, 3]),
        ([TOKENS[:2]] * 3, Form.LIST, [2, 2, 2]),
        ((TOKENS[[0, 0, 1, 2]], [2, 1, 1]), Form.PACKED, [2, 1, 1]),
    ],
)
def test_the_forms_in_which_rows_may_come(one, given, form, lengths):
    batch = prepare_batch(one, given, ROWS)
    assert batch.form is form
    assert (None if batch.lengths is None else batch.lengths.tolist()) == lengths
    assert len(batch.columns[0]) == (ROWS if lengths is None else sum(lengths)) * 8


@pytest.mark.parametrize(
    "given",
    [
        TOKENS[:2],
        np.zeros((3, 5)),
        np.zeros((4, 2, 2)),
        np.zeros((3, 0, 2)),
        [TOKENS, TOKENS],
        [TOKENS, TOKENS, TOKENS[:0]],
        [TOKENS, TOKENS, np.zeros((2, 3))],
        (TOKENS, [1, 1]),
        (TOKENS, [1, 1, 2]),
        (TOKENS, [1.0, 1.0, 1.0]),
        (TOKENS, [3, 0, 0]),
        (TOKENS, [1, 1, 1], None),
        [[1, 2], [3]],
    ],
)
def test_rows_that_do_not_fit_are_refused(one, given):
    with pytest.raises(InvalidInput):
        prepare_batch(one, given, ROWS)


def test_rows_of_several_inputs_agree_on_their_time_steps(mix):
    given = {"x": [TOKENS[:1], TOKENS[:2], TOKENS], "token": ([0] * 6, [1, 2, 3]), "gain": [1, 2, 3]}
    with pytest.raises(InvalidInput, match="the other inputs"):
        prepare_batch(mix, given, ROWS)
    given["token"] = [np.zeros(1, int), np.zeros(2, int), np.zeros(3, int)]
    batch = prepare_batch(mix, given, ROWS)
    columns, lengths = pick_rows(batch, np.array([2, 0]))
    assert np.frombuffer(lengths, np.uint32).tolist() == [3, 1]
    assert np.frombuffer(columns[0], np.float32).reshape(-1, 2).tolist() == [*TOKENS.tolist(), TOKENS[0].tolist()]
    assert np.frombuffer(columns[2], np.float32).tolist() == [3, 1]


def test_rows_are_put_together_from_pieces_in_any_order(one):
    batch = prepare_batch(one, [TOKENS[:1], TOKENS[:2], TOKENS], ROWS)
    column = np.array([[5, 5], [5, 6], [5, 7], [9, 9]], np.float32).tobytes()
    piece = Piece(np.array([0, 2]), np.array([1, 0]), np.array([3, 1], np.uint32), [column])
    got = present_batch(one, batch, [piece])
    assert [part.tolist() for part in got] == [[[9, 9]], [[0, 0], [0, 0]], [[5, 5], [5, 6], [5, 7]]]
    with pytest.raises(ProtocolError, match="result frame"):
        present_batch(one, batch, [Piece(np.array([0]), np.array([0]), None, [column[:7]])])


def test_packed_rows_come_back_packed(one):
    batch = prepare_batch(one, (TOKENS, [2, 0 + 1]), 2)
    data, lengths = present_batch(one, batch, [])
    assert data.shape == (3, 2)
    assert lengths.tolist() == [2, 1]
