"""What is wrong with a request, in words that a user of other servers searches for."""

import asyncio

import grpc
import pytest
from conveyor_server.inference import job
from conveyor_server.inference.requests import read_content

from tests.unit.inference.conftest import request, totals, until
from tests.unit.transport.test_intake import FIRST

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def altered(change):
    message = request(1.0, sequence=5, start=True, id="x")
    change(message)
    return message


def _set(message, name: str, **kind: object) -> None:
    for key, value in kind.items():
        setattr(message.parameters[name], key, value)


WRONG = {
    "no model": (lambda m: m.ClearField("model_name"), INVALID, "model_name is needed"),
    "unknown model": (lambda m: setattr(m, "model_name", "zip"), NOT_FOUND, "unknown model: 'zip' is not found"),
    "unknown version": (lambda m: setattr(m, "model_version", "9"), NOT_FOUND, "no version 9 of model 'sum'"),
    "no correlation id": (
        lambda m: m.parameters.clear(),
        INVALID,
        "must specify a non-zero or non-empty correlation ID",
    ),
    "correlation id 0": (
        lambda m: _set(m, "sequence_id", int64_param=0),
        INVALID,
        "must specify a non-zero or non-empty correlation ID",
    ),
    "correlation id of text without any": (
        lambda m: _set(m, "sequence_id", string_param=""),
        INVALID,
        "must specify a non-zero or non-empty correlation ID",
    ),
    "correlation id that is too long": (
        lambda m: _set(m, "sequence_id", string_param="x" * 129),
        INVALID,
        "string correlation ID for model 'sum' has 129 bytes",
    ),
    "correlation id of another kind": (
        lambda m: _set(m, "sequence_id", double_param=1.5),
        INVALID,
        "parameter 'sequence_id' takes int or str, and double_param came",
    ),
    "a start that is a number": (
        lambda m: _set(m, "sequence_start", int64_param=1),
        INVALID,
        "parameter 'sequence_start' takes bool",
    ),
    "batch of two": (
        lambda m: (m.inputs[0].shape.__setitem__(0, 2), m.raw_input_contents.__setitem__(0, bytes(16))),
        INVALID,
        "must specify batch-size 1 due to requirements of sequence batcher",
    ),
    "batch of none": (
        lambda m: (m.inputs[0].shape.__setitem__(0, 0), m.raw_input_contents.__setitem__(0, b"")),
        INVALID,
        "batch-size 1",
    ),
    "input name": (
        lambda m: setattr(m.inputs[0], "name", "y"),
        INVALID,
        "unexpected inference input 'y' for model 'sum'",
    ),
    "no input": (
        lambda m: (m.ClearField("inputs"), m.ClearField("raw_input_contents")),
        INVALID,
        "expected 1 inputs but got 0 inputs for model 'sum'",
    ),
    "an input twice": (
        lambda m: (m.inputs.add().CopyFrom(m.inputs[0]), m.raw_input_contents.append(bytes(8))),
        INVALID,
        "input 'x' for model 'sum' came twice",
    ),
    "datatype": (
        lambda m: setattr(m.inputs[0], "datatype", "FP32"),
        INVALID,
        "inference input 'x' data-type is 'FP32', but model 'sum' expects 'FP64'",
    ),
    "bytes": (
        lambda m: setattr(m.inputs[0], "datatype", "BYTES"),
        INVALID,
        "inference input 'x' data-type is 'BYTES', but model 'sum' expects 'FP64'",
    ),
    "shape": (
        lambda m: (m.inputs[0].shape.__setitem__(2, 3), m.raw_input_contents.__setitem__(0, bytes(24))),
        INVALID,
        "unexpected shape for input 'x' for model 'sum'. Expected [1,-1,1] or [-1,1], got [1,1,3]",
    ),
    "negative shape": (
        lambda m: m.inputs[0].shape.__setitem__(1, -1),
        INVALID,
        "unexpected shape for input 'x' for model 'sum'",
    ),
    "a shape that is larger than memory": (
        lambda m: m.inputs[0].shape.__setitem__(1, 1 << 62),
        INVALID,
        "4611686018427387904 time steps and one step takes 64",
    ),
    "more axes than an array has": (
        lambda m: m.inputs[0].ClearField("shape") or m.inputs[0].shape.extend([1] * 100),
        INVALID,
        "unexpected shape for input 'x' for model 'sum'. Expected [1,-1,1] or [-1,1], got [1,1,1",
    ),
    "a million axes": (
        lambda m: m.inputs[0].ClearField("shape") or m.inputs[0].shape.extend([(1 << 62) + 1] * 1_000_000),
        INVALID,
        ",...]",
    ),
    "none of more than there can be": (
        lambda m: (
            m.inputs[0].ClearField("shape") or m.inputs[0].shape.extend([1, 0, 1 << 62]),
            m.raw_input_contents.__setitem__(0, b""),
        ),
        INVALID,
        "unexpected shape for input 'x'",
    ),
    "a datatype that fills the message": (
        lambda m: setattr(m.inputs[0], "datatype", "F" * 1_000_000),
        INVALID,
        f"data-type is '{'F' * 32}', but",
    ),
    "no time steps": (
        lambda m: (m.inputs[0].shape.__setitem__(1, 0), m.raw_input_contents.__setitem__(0, b"")),
        INVALID,
        "no time steps",
    ),
    "too many time steps": (
        lambda m: (m.inputs[0].shape.__setitem__(1, 65), m.raw_input_contents.__setitem__(0, bytes(8 * 65))),
        INVALID,
        "65 time steps and one step takes 64",
    ),
    "size": (
        lambda m: m.raw_input_contents.__setitem__(0, bytes(7)),
        INVALID,
        "unexpected total byte size 7 for input 'x' of model 'sum', expecting 8",
    ),
    "no contents": (
        lambda m: m.ClearField("raw_input_contents"),
        INVALID,
        "unexpected number of elements 0 for input 'x'",
    ),
    "raw and typed contents": (
        lambda m: m.inputs[0].contents.fp64_contents.append(1.0),
        INVALID,
        "contents field must not be specified when using raw_input_contents for 'x'",
    ),
    "more raw contents than inputs": (
        lambda m: m.raw_input_contents.append(b""),
        INVALID,
        "2 raw_input_contents came for 1 inputs",
    ),
    "NaN": (
        lambda m: m.raw_input_contents.__setitem__(0, b"\xff" * 8),
        INVALID,
        "holds NaN or infinity",
    ),
    "output": (lambda m: m.outputs.add(name="z"), INVALID, "unexpected inference output 'z' for model 'sum'"),
    "shared memory": (
        lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r"),
        grpc.StatusCode.UNIMPLEMENTED,
        "'shared_memory_region' is not supported",
    ),
    "shared memory for an output": (
        lambda m: setattr(m.outputs.add(name="last").parameters["shared_memory_region"], "string_param", "r"),
        grpc.StatusCode.UNIMPLEMENTED,
        "the output 'last''s parameter 'shared_memory_region' is not supported",
    ),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_said_and_nothing_moves(client, server, what) -> None:
    change, code, text = WRONG[what]
    message = altered(change)
    got, said = await client.refused(message)
    assert got is code
    assert text in said
    assert not server.directory.sessions
    # On a stream the same words, and the stream lives on.
    stream = client.stream()
    await stream.call.write(message)
    identifier, told = await stream.answer()
    assert (identifier, told) == ("x", said)
    await stream.send(1.0, sequence=5, start=True, id="y")
    assert await stream.answer() == ("y", [FIRST + 1])
    await stream.end()


async def test_a_request_that_waits_too_long_is_unavailable_and_moves_nothing(client, server) -> None:
    await client.infer(1.0, sequence=5, start=True)
    await client.infer(1.0, sequence=6, start=True)
    server.runner.gate.clear()
    server.runner.entered.clear()
    busy = asyncio.create_task(client.infer(1.0, sequence=6))
    await server.run_entered()
    message = request(1.0, sequence=5)
    message.parameters["timeout"].int64_param = 20_000
    code, text = await client.refused(message)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "timeout of the corresponding sequence has been expired" in text
    server.runner.gate.set()
    await busy
    assert totals(await client.infer(1.0, sequence=5)) == [FIRST + 2]


async def test_more_than_a_sequence_may_have_unanswered_is_refused(make_server, connect_to) -> None:
    server = await make_server(max_in_flight=4)
    client = connect_to(server)
    stream = client.stream()
    server.runner.gate.clear()
    for number in range(6):
        await stream.send(1.0, sequence=5, start=number == 0, id=str(number))
    # Refused at once: so all that was sent before it has been read.
    await stream.send(1.0, sequence=6, id="last")
    assert (await stream.answer())[0] == "last"
    server.runner.gate.set()
    answers = [await stream.answer() for _ in range(6)]
    assert [told for _, told in answers[:4]] == [[FIRST + number] for number in range(1, 5)]
    assert [identifier for identifier, _ in answers] == [str(number) for number in range(6)]
    assert all("Exceeds maximum queue size" in told for _, told in answers[4:])
    await stream.end()


async def test_what_is_kept_of_a_sender_that_does_not_listen_is_bounded(make_server, connect_to) -> None:
    server = await make_server(max_in_flight=4)
    client = connect_to(server)
    stream = client.stream()
    server.runner.gate.clear()
    await stream.send(1.0, sequence=5, start=True, id="first")
    await server.run_entered()
    # Each would begin the sequence anew, once the one before it is answered.
    for number in range(20):
        await stream.send(1.0, sequence=5, start=True, id=str(number))
    early = [await stream.answer() for _ in range(13)]
    assert [identifier for identifier, _ in early] == [str(number) for number in range(7, 20)]
    assert all("has over 8 requests unanswered" in told for _, told in early)
    server.runner.gate.set()
    assert [await stream.answer() for _ in range(8)] == [
        (identifier, [FIRST + 1]) for identifier in ("first", *map(str, range(7)))
    ]
    await stream.end()


@pytest.mark.parametrize("waiting", [False, True])
async def test_what_cannot_be_read_for_a_defect_is_its_senders_alone(client, server, monkeypatch, waiting) -> None:
    """Also where it is read only once another's answer is handed out: the server goes on."""
    stream = client.stream()
    await stream.send(1.0, sequence=5, start=True, id="0")
    await stream.answer()

    def failing(request, *args, **kwargs):
        if request.id == "bad":
            raise ValueError("secret")
        return read_content(request, *args, **kwargs)

    monkeypatch.setattr(job, "read_content", failing)
    if waiting:
        server.runner.gate.clear()
        server.runner.entered.clear()
        await stream.send(1.0, sequence=5, id="1")
        await server.run_entered()
    await stream.send(1.0, sequence=5, start=True, id="bad")
    await stream.send(1.0, sequence=5, id="2")
    server.runner.gate.set()
    if waiting:
        assert await stream.answer() == ("1", [FIRST + 2])
    identifier, told = await stream.answer()
    assert identifier == "bad"
    assert "cannot be read: incident" in told
    assert "secret" not in told
    assert await stream.answer() == ("2", [FIRST + (3 if waiting else 2)])
    assert not server.driver.failed.done()
    await stream.end()


async def test_a_caller_that_goes_away_takes_back_what_has_not_run(client, server) -> None:
    for sequence in (5, 6):
        await client.infer(1.0, sequence=sequence, start=True)
    server.runner.gate.clear()
    server.runner.entered.clear()
    busy = asyncio.create_task(client.infer(1.0, sequence=6))
    await server.run_entered()
    gone = asyncio.create_task(client.infer(100.0, sequence=5))
    await until(lambda: server.directory.sessions["sum:5"].accepted_seq >= 2)
    gone.cancel()
    await until(lambda: server.directory.sessions["sum:5"].accepted_seq <= 1)
    server.runner.gate.set()
    await busy
    response = await client.infer(1.0, sequence=5)
    assert server.directory.sessions["sum:5"].applied_seq == 2
    assert response.outputs
