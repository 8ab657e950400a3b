"""A stream's rules as a client meets them: attach, step, detach, close, half-close, and refusals that harm no other."""

import grpc
import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2

CREATE = pb.AttachSession.MODE_CREATE
RESUME = pb.AttachSession.MODE_RESUME
RESUME_OR_CREATE = pb.AttachSession.MODE_RESUME_OR_CREATE


async def test_attach_step_and_half_close(server) -> None:
    stream = server.stream()
    attached = await stream.attached(7, "a")
    assert not attached.resumed
    assert (attached.session.session_id, attached.session.model, attached.session.epoch) == ("a", "sum", 1)
    assert attached.session.attached
    assert await stream.answer(7, 1, 1.0) == [11.0]
    assert await stream.answer(7, 2, 1.0, 2.0) == [12.0, 14.0]
    await stream.end()
    assert server.directory.sessions["a"].attachment is None


async def test_sessions_of_one_stream_keep_their_own_state(server) -> None:
    stream = server.stream()
    for handle in range(3):
        await stream.attached(handle)
    for handle in range(3):
        await stream.step(handle, 1, float(handle))
    results = [await stream.expect("result") for _ in range(3)]
    assert {result.handle: result.seq for result in results} == {0: 1, 1: 1, 2: 1}
    for handle in range(3):
        assert await stream.answer(handle, 2, 1.0) == [11.0 + handle]
    await stream.end()


async def test_half_close_answers_what_was_accepted(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    server.runner.gate.clear()
    for seq in (1, 2, 3):
        await stream.step(1, seq, 1.0)
    await server.run_entered()
    await stream.call.done_writing()
    server.runner.gate.set()
    assert [(await stream.expect("result")).seq for _ in range(3)] == [1, 2, 3]
    detached = await stream.expect("detached")
    assert (detached.handle, detached.cause, detached.session_id, detached.applied_seq) == (
        1,
        pb.DETACH_CAUSE_DETACHED,
        "a",
        3,
    )
    await stream.expect("end")
    await stream.ended()


async def test_an_empty_stream_ends_in_order(server) -> None:
    stream = server.stream()
    await stream.end()


@pytest.mark.parametrize("mode", [RESUME, RESUME_OR_CREATE])
async def test_resume_goes_on_where_the_session_is(server, mode) -> None:
    first = server.stream()
    await first.attached(1, "a")
    await first.answer(1, 1, 5.0)
    await first.end()
    second = server.stream()
    attached = await second.attached(9, "a", mode=mode)
    assert attached.resumed
    assert (attached.session.epoch, attached.session.applied_seq, attached.session.oldest_replayable_seq) == (2, 1, 1)
    assert await second.answer(9, 2, 1.0) == [16.0]
    await second.end()


async def test_resume_or_create_creates(server) -> None:
    stream = server.stream()
    attached = await stream.attached(1, "new", mode=RESUME_OR_CREATE)
    assert not attached.resumed
    await stream.end()


@pytest.mark.parametrize(
    ("fields", "reason", "metadata"),
    [
        ({"mode": 0}, e.ERROR_REASON_MESSAGE_INVALID, {"field": "attach.mode"}),
        ({"mode": 77}, e.ERROR_REASON_MESSAGE_INVALID, {"field": "attach.mode"}),
        ({"model": ""}, e.ERROR_REASON_MESSAGE_INVALID, {"field": "attach.model"}),
        ({"model": "nope"}, e.ERROR_REASON_MODEL_NOT_FOUND, {"model": "nope"}),
        ({"version": "9"}, e.ERROR_REASON_MODEL_NOT_FOUND, {"version": "9"}),
        ({"session_id": "a b"}, e.ERROR_REASON_SESSION_ID_INVALID, {"session_id": "a b"}),
        ({"session_id": "taken"}, e.ERROR_REASON_SESSION_EXISTS, {"session_id": "taken"}),
        ({"mode": RESUME}, e.ERROR_REASON_MESSAGE_INVALID, {"field": "attach.session_id"}),
        ({"mode": RESUME, "session_id": "x"}, e.ERROR_REASON_SESSION_NOT_FOUND, {"session_id": "x"}),
        ({"mode": RESUME, "session_id": "taken", "model": "other"}, e.ERROR_REASON_MODEL_MISMATCH, {"model": "sum"}),
        ({"mode": RESUME, "session_id": "taken", "version": "2"}, e.ERROR_REASON_MODEL_MISMATCH, {"version": "1"}),
        (
            {"options": pb.SessionOptions(idle_timeout={"seconds": -1})},
            e.ERROR_REASON_MESSAGE_INVALID,
            {"field": "options.idle_timeout"},
        ),
    ],
)
async def test_attach_refused(server, fields, reason, metadata) -> None:
    stream = server.stream()
    await stream.attached(1, "taken")
    await stream.attach(2, **fields)
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (2, 0, reason)
    assert metadata.items() <= fault.metadata.items()
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.end()


async def test_a_handle_in_use_is_refused_and_keeps_its_session(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.attach(1, "other")
    assert (await stream.fault())[2].reason == e.ERROR_REASON_HANDLE_IN_USE
    assert "other" not in server.directory.sessions
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.end()


async def test_options_are_granted_up_to_the_limits(make_server) -> None:
    server = await make_server(max_in_flight=8, max_idle_timeout_s=100.0)
    stream = server.stream()
    options = pb.SessionOptions(max_in_flight=1000, idle_timeout={"seconds": 1000})
    granted = (await stream.attached(1, options=options)).session
    assert (granted.max_in_flight, granted.idle_timeout.ToSeconds()) == (8, 100)
    options = pb.SessionOptions(max_in_flight=3, idle_timeout={"seconds": 7})
    granted = (await stream.attached(2, options=options)).session
    assert (granted.max_in_flight, granted.idle_timeout.ToSeconds()) == (3, 7)
    await stream.end()


@pytest.mark.parametrize(
    "kind",
    [
        {"step": pb.Step(handle=5, seq=1)},
        {"detach": pb.DetachSession(handle=5)},
        {"close": pb.CloseAttachedSession(handle=5)},
    ],
)
async def test_an_unknown_handle_is_refused_and_the_stream_goes_on(server, kind) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.send(**kind)
    handle, _, fault = await stream.fault()
    assert (handle, fault.reason, fault.metadata["handle"]) == (5, e.ERROR_REASON_HANDLE_UNKNOWN, "5")
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.end()


@pytest.mark.parametrize("data", [b"", b"\x9a\x06\x03abc"], ids=["empty", "from a newer client"])
async def test_a_message_without_a_known_kind(server, data) -> None:
    stream = server.stream()
    await stream.call.write(pb.StreamRequest.FromString(data))
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (0, 0, e.ERROR_REASON_MESSAGE_INVALID)
    await stream.attached(1)
    await stream.end()


async def test_detach_lets_go_after_the_answers_and_the_handle_can_be_used_again(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    await stream.send(detach=pb.DetachSession(handle=1))
    await stream.step(1, 2, 1.0)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_HANDLE_UNKNOWN
    server.runner.gate.set()
    assert (await stream.expect("result")).seq == 1
    detached = await stream.expect("detached")
    assert (detached.cause, detached.applied_seq) == (pb.DETACH_CAUSE_DETACHED, 1)
    assert (await stream.attached(1, "a", mode=RESUME)).session.applied_seq == 1
    assert await stream.answer(1, 2, 1.0) == [12.0]
    await stream.end()


async def test_close_frees_the_session_after_the_answers(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    await stream.step(1, 1, 1.0)
    await stream.send(close=pb.CloseAttachedSession(handle=1))
    assert (await stream.expect("result")).seq == 1
    detached = await stream.expect("detached")
    assert (detached.cause, detached.session_id, detached.applied_seq) == (pb.DETACH_CAUSE_CLOSED, "a", 1)
    await stream.attach(1, "a", mode=RESUME)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_SESSION_CLOSED
    await stream.end()


async def test_numbering_replay_gap_conflict_and_abort(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.answer(1, 1, 1.0)
    await stream.step(1, 1, 1.0)
    replayed = await stream.expect("result")
    assert replayed.replayed
    assert replayed.seq == 1
    await stream.step(1, 1, 2.0)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_STEP_CONFLICT
    await stream.step(1, 4, 1.0)
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason, fault.metadata["next_seq"]) == (4, e.ERROR_REASON_STEP_GAP, "2")
    await stream.send(step=pb.Step(handle=1, seq=2, inputs=[tensor_pb2.Tensor(data=b"xyz")]))
    await stream.step(1, 3, 1.0)
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason, fault.metadata["input"]) == (2, e.ERROR_REASON_INPUT_SIZE, "x")
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason, fault.metadata["next_seq"]) == (3, e.ERROR_REASON_STEP_ABORTED, "2")
    assert await stream.answer(1, 2, 1.0) == [12.0]
    await stream.end()


async def test_credit(server) -> None:
    stream = server.stream()
    await stream.attached(1, options=pb.SessionOptions(max_in_flight=2))
    server.runner.gate.clear()
    for seq in (1, 2, 3):
        await stream.step(1, seq, 1.0)
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason, fault.metadata["max_in_flight"]) == (3, e.ERROR_REASON_CREDIT_EXCEEDED, "2")
    server.runner.gate.set()
    assert [(await stream.expect("result")).seq for _ in range(2)] == [1, 2]
    assert await stream.answer(1, 3, 1.0) == [13.0]
    await stream.end()


async def test_a_run_that_fails_harms_its_own_step_alone(server) -> None:
    stream = server.stream()
    for handle in (1, 2, 3):
        await stream.attached(handle)
    server.runner.gate.clear()
    await stream.step(1, 1, 0.0)
    await server.run_entered()
    for handle, value in ((1, 1.0), (2, server.runner.POISON), (3, 3.0)):
        await stream.step(handle, 2 if handle == 1 else 1, value)
    server.runner.gate.set()
    got = {}
    for _ in range(4):
        response = await stream.receive()
        kind = response.WhichOneof("kind")
        got[getattr(response, kind).handle, getattr(response, kind).seq] = kind
    assert got == {(1, 1): "result", (1, 2): "result", (2, 1): "error", (3, 1): "result"}
    assert await stream.answer(2, 1, 1.0) == [11.0]
    await stream.end()


async def test_a_defect_in_a_run_is_told_by_its_incident_only(server, caplog) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.step(1, 1, server.runner.BUG)
    fault = (await stream.fault())[2]
    assert fault.reason == e.ERROR_REASON_MODEL_FAILED
    assert "secret" not in fault.message
    incident = fault.message.partition("incident ")[2].partition(" ")[0]
    assert any(incident in record.getMessage() and record.exc_info for record in caplog.records)
    assert await stream.answer(1, 1, 1.0) == [11.0]
    await stream.end()


async def test_step_timeout(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    await stream.attached(2)
    server.runner.gate.clear()
    await stream.step(1, 1, 1.0)
    await server.run_entered()
    await stream.step(2, 1, 1.0, timeout_ms=20)
    handle, seq, fault = await stream.fault()
    assert (handle, seq, fault.reason) == (2, 1, e.ERROR_REASON_STEP_TIMEOUT)
    server.runner.gate.set()
    assert (await stream.expect("result")).handle == 1
    assert await stream.answer(2, 1, 1.0) == [11.0]
    await stream.end()


async def test_an_idle_session_expires_and_its_stream_is_told(make_server) -> None:
    server = await make_server(default_idle_timeout_s=0.05)
    stream = server.stream()
    await stream.attached(1, "a")
    detached = await stream.expect("detached")
    assert (detached.handle, detached.cause) == (1, pb.DETACH_CAUSE_EXPIRED)
    await stream.attach(1, "a", mode=RESUME)
    fault = (await stream.fault())[2]
    assert fault.reason == e.ERROR_REASON_SESSION_EXPIRED
    assert fault.metadata == {"session_id": "a", "idle_timeout_s": "0.05"}
    await stream.end()


async def test_an_oversize_message_ends_the_call_and_sessions_live_on(make_server, wire_options) -> None:
    server = await make_server(wire=wire_options(max_message_bytes=4096))
    stream = server.stream()
    await stream.attached(1, "a")
    await stream.answer(1, 1, 1.0)
    await stream.step(1, 2, *[0.0] * 1000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.receive()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    again = server.stream()
    assert (await again.attached(1, "a", mode=RESUME)).session.applied_seq == 1
    assert await again.answer(1, 2, 1.0) == [12.0]
    await again.end()


async def test_everything_that_arrives_during_a_run_forms_the_next_batch(server) -> None:
    streams = [server.stream() for _ in range(8)]
    for handle, stream in enumerate(streams):
        await stream.attached(handle)
    server.runner.gate.clear()
    await streams[0].step(0, 1, 1.0)
    await server.run_entered()
    for handle, stream in enumerate(streams[1:], 1):
        await stream.step(handle, 1, 1.0)
    # Every one is accepted once each stream has answered something that was sent after it.
    for handle, stream in enumerate(streams[1:], 1):
        await stream.send(detach=pb.DetachSession(handle=100 + handle))
        await stream.fault()
    server.runner.gate.set()
    for handle, stream in enumerate(streams):
        assert (await stream.expect("result")).handle == handle
    assert server.runner.rows == [1, 7]
    for stream in streams:
        await stream.end()
