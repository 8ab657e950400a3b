"""Where a tritonclient's requests end otherwise than they should: too late, behind a failure, idle, full, stopping."""

import signal
import time

import conveyor
import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from by_hand import ByHand
from grpc_health.v1 import health_pb2, health_pb2_grpc
from triton_user import WAIT_S, Replies, answer, arrived, given, parameters, refused

from tests.e2e.conftest import FEATURES

X = np.random.default_rng(41).standard_normal((8, FEATURES)).astype(np.float32)
# Of a step that takes a second or more where a run takes one time step of it.
LONG = np.random.default_rng(42).standard_normal((10_000, FEATURES)).astype(np.float32)
SLOW = ("--quantum", "1", "--max-time-steps", str(len(LONG)))
INVALID, UNAVAILABLE = "INVALID_ARGUMENT", "UNAVAILABLE"


@pytest.fixture
def client(start_server, transport):
    server = start_server(*SLOW)
    with grpcclient.InferenceServerClient(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def hand(nets):
    return ByHand(nets.folder / "lstm" / "1" / "model.onnx")


def test_a_request_that_waits_too_long_is_unavailable_and_moves_nothing(client, hand):
    client.infer("lstm", given(X[:1]), sequence_id=16, sequence_start=True)
    ahead = Replies()
    client.async_infer("lstm", given(LONG), ahead, sequence_id=16)
    arrived(client, "lstm", 2)
    late, behind = Replies(), Replies()
    client.async_infer("lstm", given(X[1:2]), late, sequence_id=16, timeout=200_000)
    arrived(client, "lstm", 3)
    client.async_infer("lstm", given(X[3:4]), behind, sequence_id=16)
    error = late.error()
    assert error.status() == "StatusCode.UNAVAILABLE"
    assert "timeout of the corresponding sequence has been expired" in error.message()
    # It would have been applied to another state than was meant.
    error = behind.error()
    assert error.status() == "StatusCode.ABORTED"
    assert "was not applied because" in error.message()
    np.testing.assert_array_equal(answer(ahead.result()), hand.run([X[:1], LONG])[1], strict=True)
    got = answer(client.infer("lstm", given(X[2:3]), sequence_id=16, sequence_end=True))
    np.testing.assert_array_equal(got, hand.run([X[:1], LONG, X[2:3]])[2], strict=True)


def test_what_is_behind_a_step_that_failed_in_the_model_is_aborted_and_the_sequence_lives_on(client, nets):
    spell = ByHand(nets.folder / "speller" / "1" / "model.onnx")
    long = np.random.default_rng(31).integers(0, 11, len(LONG))
    token = [long, *(np.array([number], np.int64) for number in (99, 4, 5))]
    replies = Replies()
    client.start_stream(replies)
    for index, x in enumerate(token[:3]):
        client.async_stream_infer("speller", given(x, "token"), sequence_id=17, sequence_start=index == 0)
    want = spell.run([token[0], token[3]])
    np.testing.assert_array_equal(answer(replies.result()), want[0], strict=True)
    failed, behind = replies.error(), replies.error()
    assert "model speller version 1 failed on this step" in failed.message()
    assert "was not applied because" in behind.message()
    client.async_stream_infer("speller", given(token[3], "token"), sequence_id=17)
    np.testing.assert_array_equal(answer(replies.result()), want[1], strict=True)
    client.stop_stream()


def test_a_sequence_that_idled_out_is_told_and_never_begun_again(start_server, transport, hand):
    server = start_server("--idle-timeout-s", "1")
    with grpcclient.InferenceServerClient(server.target) as client, conveyor.connect(server.target) as sdk:
        client.infer("lstm", given(X[:1]), sequence_id=18, sequence_start=True)
        until = time.monotonic() + WAIT_S
        while any(info.id == "lstm:18" for info in sdk.sessions("lstm")):
            assert time.monotonic() < until
            time.sleep(0.05)
        for end in (False, True):
            with refused(INVALID, "sequence 18", "must specify the START flag", "It was here and is gone", "idle"):
                client.infer("lstm", given(X[1:2]), sequence_id=18, sequence_end=end)
        again = client.infer("lstm", given(X[1:2]), sequence_id=18, sequence_start=True)
        assert parameters(again) == {}
        np.testing.assert_array_equal(answer(again), hand.run([X[1:2]])[0], strict=True)


def test_a_server_that_is_full_begins_no_sequence_and_keeps_those_it_has(start_server, transport, hand):
    server = start_server("--max-sessions", "2", "--in-flight", "2", "--max-in-flight", "2", *SLOW)
    with grpcclient.InferenceServerClient(server.target) as client:
        for number in (1, 2):
            client.infer("lstm", given(X[:1]), sequence_id=number, sequence_start=True)
        with refused("RESOURCE_EXHAUSTED", "no free sequence slot is available"):
            client.infer("lstm", given(X[:1]), sequence_id=3, sequence_start=True)
        went_on = answer(client.infer("lstm", given(X[1:2]), sequence_id=1, sequence_end=True))
        np.testing.assert_array_equal(went_on, hand.run([X[:1], X[1:2]])[1], strict=True)
        ahead, behind = Replies(), Replies()
        client.async_infer("lstm", given(LONG), ahead, sequence_id=2)
        arrived(client, "lstm", 4)
        client.async_infer("lstm", given(X[1:2]), behind, sequence_id=2)
        arrived(client, "lstm", 5)
        refusal = Replies()
        client.async_infer("lstm", given(X[2:3]), refusal, sequence_id=2)
        want = hand.run([X[:1], LONG, X[1:2]])
        np.testing.assert_array_equal(answer(ahead.result()), want[1], strict=True)
        np.testing.assert_array_equal(answer(behind.result()), want[2], strict=True)
        error = refusal.error()
        assert error.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert "Exceeds maximum queue size" in error.message()


def test_a_server_that_stops_answers_what_it_took_and_is_then_unavailable(start_server, transport, hand):
    server = start_server(*SLOW)
    with grpcclient.InferenceServerClient(server.target) as client, grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        assert client.is_server_ready()
        replies = Replies()
        client.start_stream(replies)
        client.async_stream_infer("lstm", given(LONG), sequence_id=1, sequence_start=True)
        arrived(client, "lstm", 1)
        server.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        health.cancel()
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("lstm")
        with refused(UNAVAILABLE, "Server is stopping"):
            client.infer("lstm", given(X[:1]), sequence_id=2, sequence_start=True)
        client.async_stream_infer("lstm", given(X[:1]), sequence_id=3, sequence_start=True)
        told = [replies.either() for _ in range(3)]
        client.stop_stream()
    assert server.process.wait(WAIT_S) == 0
    ((result,), errors) = ([result for result, _ in told if result], [error for _, error in told if error])
    np.testing.assert_array_equal(answer(result), hand.run([LONG])[0], strict=True)
    assert "Server is stopping" in errors[0].message()
    assert errors[1].status() == "StatusCode.UNAVAILABLE"
