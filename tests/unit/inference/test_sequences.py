"""Sequences of the Open Inference Protocol: begin, go on, end; in order, and never begun from zeros unasked."""

import grpc
import pytest
from conveyor_proto.v1 import session_pb2 as sessions
from conveyor_server.inference.names import session_id

from tests.unit.inference.conftest import request, totals, until
from tests.unit.transport.test_intake import FIRST

START = "must specify the START flag on the first request of the sequence"


async def test_a_sequence_goes_on_from_request_to_request(client) -> None:
    first = await client.infer(1.0, sequence=5, start=True, id="a", model_version="1")
    assert (first.id, first.model_name, first.model_version, totals(first)) == ("a", "sum", "1", [FIRST + 1])
    assert totals(await client.infer(2.0, 3.0, sequence=5)) == [FIRST + 3, FIRST + 6]
    assert totals(await client.infer(4.0, sequence=5, end=True)) == [FIRST + 10]


async def test_an_answers_axes_are_its_requests(client) -> None:
    for start, shape, total, last in (
        (True, (1, 2, 1), [1, 2, 1], [1, 1]),
        (False, (2, 1), [2, 1], [1, 1]),
        (False, (1, 1), [1, 1], [1, 1]),
        (False, (1, 1, 1), [1, 1, 1], [1, 1]),
    ):
        values = [1.0] * max(shape)
        response = await client.infer(*values, sequence=1, start=start, shape=shape)
        assert [list(output.shape) for output in response.outputs] == [total, last], shape
        assert [output.datatype for output in response.outputs] == ["FP64", "FP64"]


async def test_only_the_outputs_that_are_asked_for_come_in_that_order(client) -> None:
    message = request(1.0, 1.0, sequence=1, start=True)
    for name in ("last", "total", "last"):
        message.outputs.add(name=name)
    response = await client.call("ModelInfer", message)
    assert [output.name for output in response.outputs] == ["last", "total"], "each once, however often it is asked for"
    assert [len(raw) for raw in response.raw_output_contents] == [8, 16]


async def test_a_number_and_a_text_are_two_sequences_and_so_are_two_models_of_one_number(client, server) -> None:
    assert totals(await client.infer(1.0, sequence=5, start=True)) == [FIRST + 1]
    assert totals(await client.infer(2.0, sequence="5", start=True)) == [FIRST + 2]
    assert totals(await client.infer(3.0, sequence=5, start=True, model="other")) == [FIRST + 3]
    for sequence, model, total in ((5, "sum", 2), ("5", "sum", 3), (5, "other", 4)):
        assert totals(await client.infer(1.0, sequence=sequence, model=model)) == [FIRST + total]
    assert set(server.directory.sessions) == {"sum:5", "sum:s:5", "other:5"}


async def test_a_number_of_either_kind_is_the_same_sequence(client) -> None:
    await client.infer(1.0, sequence=7, start=True)
    message = request(1.0)
    message.parameters["sequence_id"].uint64_param = 7
    assert totals(await client.call("ModelInfer", message)) == [FIRST + 2]


@pytest.mark.parametrize(
    ("model", "sequence", "name"),
    [
        ("m", 42, "m:42"),
        ("m", -1, "m:-1"),
        ("m", "a.b-C_1", "m:s:a.b-C_1"),
        ("m", "a/b é", "m:s:a:2fb:20:c3a9"),
        ("m", "a:2fb", "m:s:a:3a2fb"),
    ],
)
def test_a_sequences_session_bears_its_name(model, sequence, name) -> None:
    assert session_id(model, sequence) == name


def test_long_names_are_shortened_and_still_differ() -> None:
    names = {session_id("m" * 64, f"{'x' * 120}{number}") for number in range(50)}
    assert len(names) == 50
    assert {len(name) for name in names} == {128}


async def test_an_ended_sequence_is_gone_and_says_so(client, server) -> None:
    await client.infer(1.0, sequence=5, start=True, end=True)
    assert not server.directory.sessions
    code, text = await client.refused(request(1.0, sequence=5))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert START in text
    assert "is closed" in text
    # And may begin again.
    assert totals(await client.infer(1.0, sequence=5, start=True)) == [FIRST + 1]
    server.engine.slots.check([session.lane.slot for session in server.directory.sessions.values()])


async def test_a_sequence_that_never_began_is_refused(client) -> None:
    code, text = await client.refused(request(1.0, sequence="nobody"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert START in text
    assert "gone" not in text


async def test_a_sequence_that_idled_out_is_told(make_server, connect_to) -> None:
    server = await make_server(default_idle_timeout_s=0.05)
    client = connect_to(server)
    await client.infer(1.0, sequence=5, start=True)
    await until(lambda: not server.directory.sessions)
    code, text = await client.refused(request(1.0, sequence=5))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert START in text
    assert "was idle for 0.05 s and expired after step 1" in text


async def test_a_start_on_a_live_sequence_begins_afresh_and_says_so(client, server) -> None:
    for start in (True, False, False):
        await client.infer(1.0, sequence=5, start=start)
    again = await client.infer(1.0, sequence=5, start=True)
    assert totals(again) == [FIRST + 1]
    assert again.parameters["conveyor_restarted_after_steps"].int64_param == 3
    assert totals(await client.infer(1.0, sequence=5)) == [FIRST + 2]
    first = await client.infer(1.0, sequence=6, start=True)
    assert not first.parameters
    assert len(server.directory.sessions) == 2


async def test_a_start_that_cannot_be_used_begins_nothing(client) -> None:
    await client.infer(1.0, sequence=5, start=True)
    code, _ = await client.refused(request(1.0, sequence=5, start=True, shape=(1, 1, 2)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert totals(await client.infer(1.0, sequence=5)) == [FIRST + 2]


async def test_an_end_that_cannot_be_run_ends_nothing(client, server) -> None:
    await client.infer(1.0, sequence=5, start=True)
    code, _ = await client.refused(request(server.runner.POISON, sequence=5, end=True))
    assert code is grpc.StatusCode.INTERNAL
    code, _ = await client.refused(request(1.0, sequence=5, end=True, shape=(1, 1, 2)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert totals(await client.infer(1.0, sequence=5, end=True)) == [FIRST + 2]
    assert not server.directory.sessions


async def test_requests_of_a_sequence_that_come_together_keep_their_order(client, server) -> None:
    """By calls of their own: the end of one life, and all of the next, while the model is busy."""
    await client.infer(1.0, sequence=5, start=True)
    stream = client.stream()
    server.runner.gate.clear()
    await stream.send(1.0, sequence=5, id="1")
    await server.run_entered()
    await stream.send(1.0, sequence=5, id="2", end=True)
    await stream.send(1.0, sequence=5, id="3", start=True)
    await stream.send(1.0, sequence=5, id="4")
    await stream.send(1.0, sequence=5, id="5", end=True)
    await stream.send(1.0, sequence=5, id="6")
    await stream.send(1.0, sequence=5, id="7", start=True)
    await stream.send(1.0, sequence=5, id="8", start=True)
    server.runner.gate.set()
    answers = [await stream.answer() for _ in range(8)]
    assert answers[:5] == [("1", [12.0]), ("2", [13.0]), ("3", [11.0]), ("4", [12.0]), ("5", [13.0])]
    assert answers[5][0] == "6"
    assert START in answers[5][1]
    assert answers[6:] == [("7", [11.0]), ("8", [11.0])]
    await stream.end()
    assert list(server.directory.sessions) == ["sum:5"]


async def test_an_error_waits_for_the_answers_before_it(client, server) -> None:
    stream = client.stream()
    await stream.send(1.0, sequence=5, start=True, id="0")
    await stream.answer()
    server.runner.gate.clear()
    await stream.send(1.0, sequence=5, id="1")
    await server.run_entered()
    await stream.send(1.0, sequence=5, id="2", shape=(1, 1, 2))
    await stream.send(1.0, sequence=5, id="3")
    # Neither another model's sequence nor another sequence's refusal waits for them.
    await stream.send(1.0, sequence=5, start=True, id="other", model="other")
    await stream.send(1.0, sequence=6, id="unknown")
    early = dict([await stream.answer(), await stream.answer()])
    assert early.keys() == {"other", "unknown"}
    assert early["other"] == [FIRST + 1]
    assert START in early["unknown"]
    server.runner.gate.set()
    answers = [await stream.answer() for _ in range(3)]
    assert [answers[0], answers[2]] == [("1", [FIRST + 2]), ("3", [FIRST + 3])]
    assert answers[1][0] == "2"
    assert "unexpected shape for input 'x'" in answers[1][1]
    await stream.end()


async def test_a_session_can_be_closed_by_its_name(client, server) -> None:
    await client.infer(1.0, sequence=5, start=True)
    await server.stub.CloseSession(sessions.CloseSessionRequest(session_id="sum:5"))
    code, text = await client.refused(request(1.0, sequence=5))
    assert (code, START in text, "is closed" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True, True)


async def test_a_sequence_stays_on_its_version(client, server) -> None:
    await client.infer(1.0, sequence=5, start=True)
    server.add_model("sum", "2")
    await server.loader.load("sum", "2")
    assert (await client.infer(1.0, sequence=5)).model_version == "1"
    assert (await client.infer(1.0, sequence=5, model_version="1")).model_version == "1"
    code, text = await client.refused(request(1.0, sequence=5, model_version="2"))
    assert (code, "is on version 1" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert (await client.infer(1.0, sequence=6, start=True)).model_version == "2"
    assert (await client.infer(1.0, sequence=5, start=True)).model_version == "2"


async def test_a_session_of_another_model_that_bears_the_name_is_nobodys_sequence(client, server) -> None:
    theirs = server.stream()
    await theirs.attached(1, "sum:5", model="other")
    await theirs.answer(1, 1, 1.0)
    code, text = await client.refused(request(1.0, sequence=5))
    assert (code, START in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert "is of another model" in text
    code, text = await client.refused(request(1.0, sequence=5, start=True))
    assert (code, "exists" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)
    assert await theirs.answer(1, 2, 1.0) == [FIRST + 2], "it is neither stepped nor closed"
    await theirs.end()
