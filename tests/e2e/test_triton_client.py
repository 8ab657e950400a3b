"""tritonclient, as its maker publishes it, against the real server: sequences by calls and by streams.

The truth is the same file in bare onnxruntime, one sequence at a time; an LSTM's and a GRU's answers are its bits.
"""

import concurrent.futures
import contextlib
import json
import re
import subprocess
import sys

import conveyor
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from by_hand import ByHand
from triton_user import Replies, answer, given, interleaved, parameters, scripts

from tests.e2e.conftest import FEATURES, serving

KINDS = ("lstm", "gru")
X = np.random.default_rng(17).standard_normal((12, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def target(nets, tmp_path_factory, transport):
    """One server of each transport for the module: each test has sequences of its own."""
    with serving(nets.folder, tmp_path_factory.mktemp("server"), "--transport", transport) as server:
        yield server


@pytest.fixture
def client(target):
    with grpcclient.InferenceServerClient(target.target) as client:
        yield client


@pytest.fixture(scope="module")
def hand(nets):
    return {kind: ByHand(nets.folder / kind / "1" / "model.onnx") for kind in (*KINDS, "rnn", "speller")}


@contextlib.contextmanager
def stream(client, **options):
    """A stream that is open, and what it is told; left when every answer is there."""
    replies = Replies()
    client.start_stream(replies, **options)
    yield replies
    client.stop_stream()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_by_unary_calls_is_the_file_stepped_by_hand(client, hand, kind):
    want = hand[kind].run([X[index : index + 1] for index in range(8)])
    for index in range(8):
        result = client.infer(
            kind,
            given(X[index : index + 1]),
            request_id=f"r{index}",
            sequence_id=101,
            sequence_start=index == 0,
            sequence_end=index == 7,
        )
        response = result.get_response()
        assert (response.model_name, response.model_version, response.id) == (kind, "1", f"r{index}")
        assert parameters(result) == {}
        np.testing.assert_array_equal(answer(result), want[index], strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_that_are_interleaved_on_one_stream(client, hand, kind):
    everyone = scripts([*range(1000, 1020), *(f"user-{number}" for number in range(10))], FEATURES, seed=1)
    plan = interleaved(everyone, seed=2)
    by_request = {f"{script.id!r}/{index}": script for script, index in plan}
    with stream(client) as replies:
        for script, index in plan:
            client.async_stream_infer(kind, **script.request(index))
        for _ in plan:
            result = replies.result()
            assert parameters(result) == {"triton_final_response": True}
            script = by_request[result.get_response().id]
            # In the order of its requests.
            assert result.get_response().id == f"{script.id!r}/{len(script.answers)}"
            script.answers.append(answer(result))
    assert replies.empty()
    for script in everyone:
        for got, want in zip(script.answers, hand[kind].run(script.steps), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_over_many_streams(target, hand, kind):
    def one(number):
        (script,) = scripts([2000 + number], FEATURES, seed=number)
        with grpcclient.InferenceServerClient(target.target) as client, stream(client) as replies:
            for index in range(len(script.steps)):
                client.async_stream_infer(kind, **script.request(index))
            script.answers = [answer(replies.result()) for _ in script.steps]
        return script

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for script in pool.map(one, range(16)):
            for got, want in zip(script.answers, hand[kind].run(script.steps), strict=True):
                np.testing.assert_array_equal(got, want, strict=True)


def test_a_sequence_goes_on_over_another_stream_and_by_a_call(client, target, hand):
    want = hand["gru"].run([X[:1], X[1:4], X[4:5], X[5:6]])
    with stream(client) as replies:
        client.async_stream_infer("gru", given(X[:1]), sequence_id="walker", sequence_start=True)
        got = [answer(replies.result())]
    got.append(answer(client.infer("gru", given(X[1:4]), sequence_id="walker")))
    with grpcclient.InferenceServerClient(target.target) as other, stream(other) as replies:
        other.async_stream_infer("gru", given(X[4:5]), sequence_id="walker")
        got.append(answer(replies.result()))
    got.append(answer(client.infer("gru", given(X[5:6]), sequence_id="walker", sequence_end=True)))
    for one, truth in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, truth, strict=True)


def test_a_plain_rnn_is_right_too(client, nets):
    got = [
        answer(client.infer("rnn", given(X[index : index + 1]), sequence_id=3, sequence_start=index == 0))
        for index in range(len(X))
    ]
    np.testing.assert_allclose(np.concatenate(got), nets.truth("rnn", X), atol=1e-6, rtol=0)


def test_an_integer_and_a_string_of_the_same_digits_are_two_sequences(client, hand):
    number, name = hand["lstm"].run([X[:1], X[1:2]]), hand["lstm"].run([X[2:3], X[3:4]])
    for index in range(2):
        start = index == 0
        got = client.infer("lstm", given(X[index : index + 1]), sequence_id=5, sequence_start=start)
        np.testing.assert_array_equal(answer(got), number[index], strict=True)
        got = client.infer("lstm", given(X[2 + index : 3 + index]), sequence_id="5", sequence_start=start)
        np.testing.assert_array_equal(answer(got), name[index], strict=True)


def test_the_same_id_on_two_models_is_two_sequences(client, hand):
    for index in range(2):
        for kind in KINDS:
            client.infer(kind, given(X[index : index + 1]), sequence_id=6, sequence_start=index == 0)
    for kind in KINDS:
        got = answer(client.infer(kind, given(X[2:3]), sequence_id=6))
        np.testing.assert_array_equal(got, hand[kind].run([X[:1], X[1:2], X[2:3]])[2], strict=True)


@pytest.mark.parametrize(
    ("sent", "came"), [((1, 4), (1, 3)), ((5, 4), (5, 3)), ((1, 5, 4), (1, 5, 3)), ((1, 1, 4), (1, 1, 3))]
)
def test_an_answer_has_the_axes_of_its_request(client, hand, sent, came):
    x = X[: sent[-2]]
    result = client.infer("lstm", given(x.reshape(sent)), sequence_id=7, sequence_start=True, sequence_end=True)
    got = answer(result)
    assert got.shape == came
    np.testing.assert_array_equal(got.reshape(-1, 3), hand["lstm"].run([x])[0], strict=True)


def test_token_ids_and_outputs_by_name(client, hand):
    tokens = np.array([3, 1, 4, 1, 5], np.int64)
    asked = [grpcclient.InferRequestedOutput("output")]
    result = client.infer("speller", given(tokens, "token"), sequence_id=8, sequence_start=True, outputs=asked)
    assert [output.name for output in result.get_response().outputs] == ["output"]
    np.testing.assert_array_equal(answer(result), hand["speller"].run([tokens])[0], strict=True)


def test_compressed_messages_and_parameters_that_only_help(client, hand):
    want = hand["lstm"].run([X[:1], X])
    extra = {"priority": 3, "parameters": {"mine": "only"}}
    first = client.infer(
        "lstm", given(X[:1]), sequence_id=21, sequence_start=True, compression_algorithm="gzip", **extra
    )
    np.testing.assert_array_equal(answer(first), want[0], strict=True)
    with stream(client, compression_algorithm="gzip") as replies:
        client.async_stream_infer(
            "lstm", given(X), sequence_id=21, sequence_end=True, enable_empty_final_response=True, **extra
        )
        np.testing.assert_array_equal(answer(replies.result()), want[1], strict=True)


def test_a_start_on_a_live_sequence_begins_it_afresh_and_says_so(client, hand):
    client.infer("gru", given(X[:1]), sequence_id=9, sequence_start=True)
    client.infer("gru", given(X[1:2]), sequence_id=9)
    again = client.infer("gru", given(X[2:3]), sequence_id=9, sequence_start=True)
    assert parameters(again) == {"conveyor_restarted_after_steps": 2}
    after = client.infer("gru", given(X[3:4]), sequence_id=9)
    assert parameters(after) == {}
    for got, want in zip((again, after), hand["gru"].run([X[2:3], X[3:4]]), strict=True):
        np.testing.assert_array_equal(answer(got), want, strict=True)


def test_starts_and_ends_one_after_the_other_on_a_stream_never_mix(client, hand):
    """Three lives of one id, sent at once: each from zeros."""
    lives = scripts([11, 11, 11], FEATURES, seed=4)
    with stream(client) as replies:
        for script in lives:
            for index in range(len(script.steps)):
                client.async_stream_infer("lstm", **script.request(index))
        for script in lives:
            for want in hand["lstm"].run(script.steps):
                result = replies.result()
                assert "conveyor_restarted_after_steps" not in parameters(result)
                np.testing.assert_array_equal(answer(result), want, strict=True)


def test_a_request_of_many_is_answered_to_its_own_caller(target, hand):
    """Unary calls of 32 sequences at once, one client for all: who gets whose answer is never mixed up."""
    with (
        grpcclient.InferenceServerClient(target.target) as client,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):

        def one(script):
            return [answer(client.infer("lstm", **script.request(index))) for index in range(len(script.steps))]

        everyone = scripts(range(3000, 3032), FEATURES, seed=5)
        for script, answers in zip(everyone, pool.map(one, everyone), strict=True):
            for got, want in zip(answers, hand["lstm"].run(script.steps), strict=True):
                np.testing.assert_array_equal(got, want, strict=True)


def test_sequences_are_sessions_that_the_command_and_the_sdk_see(client, target, hand):
    ours = {"lstm:4001", "lstm:s:room-7", "lstm:s:a:2fb"}
    for name in (4001, "room-7", "a/b"):
        client.infer("lstm", given(X[:2]), sequence_id=name, sequence_start=True)
        client.infer("lstm", given(X[2:3]), sequence_id=name)
    with conveyor.connect(target.target) as sdk:
        found = {info.id: info for info in sdk.sessions("lstm") if info.id in ours}
        assert {name: (info.applied_seq, info.applied_time_steps) for name, info in found.items()} == dict.fromkeys(
            ours, (2, 3)
        )
        # The same session by the SDK, and on by the other client.
        with sdk.session("lstm", session_id="lstm:4001", resume=True, detach_on_exit=True) as session:
            third = session.step(X[3])
    fourth = answer(client.infer("lstm", given(X[4:5]), sequence_id=4001, sequence_end=True))
    want = hand["lstm"].run([X[:2], X[2:3], X[3:4], X[4:5]])
    np.testing.assert_array_equal(third, want[2][0], strict=True)
    np.testing.assert_array_equal(fourth, want[3], strict=True)

    listed = _conveyor("sessions", "--target", target.target, "--model", "lstm")
    assert not re.search(r"\blstm:4001\b", listed)
    assert re.search(r"\blstm:s:room-7\b", listed)
    assert re.search(r"\blstm:s:a:2fb\b", listed)
    as_json = json.loads(_conveyor("sessions", "--target", target.target, "--model", "lstm", "--json"))
    assert ours - {"lstm:4001"} <= {item["id"] for item in as_json}


def _conveyor(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "conveyor.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
