"""A snapshot is read as it was taken, or refused with the reason."""

import numpy as np
import pytest
from conveyor_proto.codec import encode
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2
from conveyor_server import snapshot
from conveyor_server.errors import Refused
from google.protobuf.timestamp_pb2 import Timestamp

NOW = Timestamp(seconds=1_800_000_000)


def sealed(content: session_pb2.Snapshot) -> bytes:
    return snapshot.PLAIN.close(content.SerializeToString())


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def session(engine, directory):
    states = [np.array([1.5, -2.0], np.float32), np.array(7, np.int64)]
    return directory.restore(engine, states, 0.0, applied_seq=3, applied_time_steps=9)


def test_round_trip(session, engine) -> None:
    content = snapshot.read(snapshot.take(session, NOW))
    assert (content.model, content.version, content.model_digest) == ("last", "1", "d1")
    assert (content.applied_seq, content.applied_time_steps, content.taken_at) == (3, 9, NOW)
    last, count = snapshot.states_for(content, engine)
    assert last.dtype == np.float32
    np.testing.assert_array_equal(last, [1.5, -2.0])
    assert (count.dtype, count.shape, int(count)) == (np.int64, (), 7)


def test_a_fresh_session_has_its_initial_state(engine, directory) -> None:
    content = snapshot.read(snapshot.take(directory.create(engine, 0.0), NOW))
    assert content.applied_seq == 0
    last, count = snapshot.states_for(content, engine)
    np.testing.assert_array_equal(last, [0, 0])
    assert int(count) == 0


def test_a_snapshot_is_a_copy(session, engine, runner) -> None:
    data = snapshot.take(session, NOW)
    runner.last[:] = 99
    np.testing.assert_array_equal(snapshot.states_for(snapshot.read(data), engine)[0], [1.5, -2.0])


def test_every_changed_byte_is_seen(session) -> None:
    data = snapshot.take(session, NOW)
    for index in range(len(data)):
        broken = bytearray(data)
        broken[index] ^= 0x40
        assert refused(lambda broken=broken: snapshot.read(bytes(broken))) == e.ERROR_REASON_SNAPSHOT_INVALID


@pytest.mark.parametrize("length", [0, 3, 35, 36, -1])
def test_a_cut_snapshot(session, length) -> None:
    data = snapshot.take(session, NOW)[:length]
    assert refused(lambda: snapshot.read(data)) == e.ERROR_REASON_SNAPSHOT_INVALID


def test_of_another_format(session) -> None:
    content = snapshot.read(snapshot.take(session, NOW))
    content.format = 2
    assert refused(lambda: snapshot.read(sealed(content))) == e.ERROR_REASON_SNAPSHOT_INVALID


def test_of_what_is_no_message() -> None:
    data = b"\xff\xff\xff"
    whole = snapshot.PLAIN.close(data)
    assert refused(lambda: snapshot.read(whole)) == e.ERROR_REASON_SNAPSHOT_INVALID


def test_of_another_model(session, make_engine) -> None:
    content = snapshot.read(snapshot.take(session, NOW))
    other = make_engine("d2", "other")
    with pytest.raises(Refused) as caught:
        snapshot.states_for(content, other)
    fault = caught.value.fault
    assert fault.reason == e.ERROR_REASON_MODEL_MISMATCH
    assert fault.metadata == {"model": "other", "version": "1", "digest": "d2", "snapshot_digest": "d1"}


@pytest.mark.parametrize(
    "state",
    [
        encode(np.zeros(3, np.float32), "last"),
        encode(np.zeros(2, np.float64), "last"),
        encode(np.zeros(2, np.float32), "other"),
        encode(np.array([1, np.nan], np.float32), "last"),
        encode(np.array([np.inf, 1], np.float32), "last"),
        session_pb2.Snapshot().states.add(name="last", dtype=1, shape=[2], data=b"1234567"),
    ],
    ids=["shape", "dtype", "name", "nan", "infinite", "bytes"],
)
def test_states_that_do_not_fit(session, engine, state) -> None:
    content = snapshot.read(snapshot.take(session, NOW))
    content.states[0].CopyFrom(state)
    assert refused(lambda: snapshot.states_for(content, engine)) == e.ERROR_REASON_SNAPSHOT_INVALID


def test_states_missing(session, engine) -> None:
    content = snapshot.read(snapshot.take(session, NOW))
    del content.states[1]
    assert refused(lambda: snapshot.states_for(content, engine)) == e.ERROR_REASON_SNAPSHOT_INVALID


def refused(call) -> int:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.fault.reason
