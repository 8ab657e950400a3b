"""The unary twins, and how a refusal reaches a caller."""

import asyncio
import logging

import grpc
import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from refusals import refusal


async def create(server, session_id: str = "", **fields) -> pb.SessionInfo:
    request = pb.CreateSessionRequest(**{"model": "sum", "session_id": session_id, **fields})
    return (await server.stub.CreateSession(request)).session


async def test_a_session_by_unary_calls(server, make_tensor) -> None:
    info = await create(server, "a")
    assert (info.session_id, info.model, info.version, info.model_digest) == ("a", "sum", "1", "digest of sum")
    assert (info.epoch, info.applied_seq, info.attached, info.state_bytes) == (0, 0, False, 8)
    response = await server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(1.0, 2.0)]))
    assert (response.seq, response.replayed, [item.name for item in response.outputs]) == (1, False, ["total", "last"])
    again = await server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(1.0, 2.0)]))
    assert again.replayed
    assert again.outputs == response.outputs
    info = (await server.stub.GetSession(pb.GetSessionRequest(session_id="a"))).session
    assert (info.applied_seq, info.applied_time_steps, info.oldest_replayable_seq) == (1, 2, 1)
    assert info.created_at.ToNanoseconds() <= info.last_used_at.ToNanoseconds()
    closed = await server.stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
    assert closed.applied_seq == 1
    code, fault = await refusal(server.stub.GetSession(pb.GetSessionRequest(session_id="a")))
    assert (code, fault.reason) == (grpc.StatusCode.NOT_FOUND, e.ERROR_REASON_SESSION_CLOSED)
    assert fault.metadata == {"session_id": "a", "cause": "closed"}


async def test_refusals_carry_reason_and_metadata(server, make_tensor) -> None:
    await create(server, "a")
    code, fault = await refusal(create(server, "a"))
    assert (code, fault.reason) == (grpc.StatusCode.ALREADY_EXISTS, e.ERROR_REASON_SESSION_EXISTS)
    code, fault = await refusal(create(server, model=""))
    assert (code, fault.reason) == (grpc.StatusCode.INVALID_ARGUMENT, e.ERROR_REASON_MESSAGE_INVALID)
    code, fault = await refusal(server.stub.Step(pb.StepRequest(session_id="a", seq=3, inputs=[make_tensor(1.0)])))
    assert (code, fault.reason) == (grpc.StatusCode.OUT_OF_RANGE, e.ERROR_REASON_STEP_GAP)
    assert fault.metadata == {"session_id": "a", "seq": "3", "next_seq": "1"}
    code, fault = await refusal(server.stub.Step(pb.StepRequest(session_id="a", seq=1)))
    assert (code, fault.reason) == (grpc.StatusCode.INVALID_ARGUMENT, e.ERROR_REASON_INPUT_MISSING)
    code, fault = await refusal(server.stub.Step(pb.StepRequest(session_id="a", inputs=[make_tensor(1.0)])))
    assert fault.reason == e.ERROR_REASON_MESSAGE_INVALID
    assert server.metrics.errors == {
        "SESSION_EXISTS": 1,
        "MESSAGE_INVALID": 2,
        "STEP_GAP": 1,
        "INPUT_MISSING": 1,
    }


async def test_full_is_told_with_a_delay(make_server) -> None:
    server = await make_server(max_sessions=1)
    await create(server)
    code, fault = await refusal(create(server))
    assert (code, fault.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, e.ERROR_REASON_SESSIONS_EXHAUSTED)
    assert fault.retry_s == 1.0


async def test_a_step_that_its_caller_gave_up_is_taken_back(server, make_tensor) -> None:
    await create(server, "a")
    await create(server, "b")
    server.runner.gate.clear()
    running = server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(1.0)]))
    running_task = asyncio.ensure_future(running)
    await server.run_entered()
    waiting = server.stub.Step(pb.StepRequest(session_id="b", seq=1, inputs=[make_tensor(1.0)]))
    waiting_task = asyncio.ensure_future(waiting)
    while not server.directory.sessions["b"].pending:
        # Each look is a round trip, which gives the step time to arrive.
        await server.stub.GetSession(pb.GetSessionRequest(session_id="b"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting_task
    while server.directory.sessions["b"].pending:
        await server.stub.GetSession(pb.GetSessionRequest(session_id="b"))
    server.runner.gate.set()
    await running_task
    info = (await server.stub.GetSession(pb.GetSessionRequest(session_id="b"))).session
    assert (info.applied_seq, info.pending_steps) == (0, 0)
    await server.stub.Step(pb.StepRequest(session_id="b", seq=1, inputs=[make_tensor(2.0)]))


async def test_a_unary_step_can_be_fenced(server, make_tensor) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    step = pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(1.0)], epoch=7)
    code, fault = await refusal(server.stub.Step(step))
    assert (code, fault.reason) == (grpc.StatusCode.ABORTED, e.ERROR_REASON_SESSION_TAKEN_OVER)
    step.epoch = 1
    await server.stub.Step(step)
    assert await stream.answer(1, 2, 1.0) == [12.0]
    await stream.end()


async def test_closing_tells_the_stream_that_holds_the_session(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    await server.stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
    assert (await stream.expect("detached")).cause == pb.DETACH_CAUSE_CLOSED
    await stream.end()


async def test_pages_hold_every_session_once(server) -> None:
    names = sorted(f"s{index:02}" for index in range(25))
    for name in reversed(names):
        await create(server, name)
    await create(server, "zz", model="other")
    seen: list[str] = []
    token = ""
    while True:
        page = await server.stub.ListSessions(pb.ListSessionsRequest(page_size=10, page_token=token, model="sum"))
        assert page.total_size == 25
        seen += [item.session_id for item in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert seen == names
    everything = await server.stub.ListSessions(pb.ListSessionsRequest())
    assert (len(everything.sessions), everything.next_page_token) == (26, "")


async def test_fork_goes_its_own_way(server, make_tensor) -> None:
    await create(server, "a", options=pb.SessionOptions(max_in_flight=3))
    await server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(5.0)]))
    fork = (await server.stub.ForkSession(pb.ForkSessionRequest(session_id="a", new_session_id="b"))).session
    assert (fork.session_id, fork.applied_seq, fork.applied_time_steps, fork.max_in_flight) == ("b", 1, 1, 3)
    for name, value in (("a", 1.0), ("b", 2.0)):
        await server.stub.Step(pb.StepRequest(session_id=name, seq=2, inputs=[make_tensor(value)]))
    answers = [
        await server.stub.Step(pb.StepRequest(session_id=name, seq=3, inputs=[make_tensor(0.0)])) for name in "ab"
    ]
    assert [answer.outputs[1].data for answer in answers] == [make_tensor(16.0).data, make_tensor(17.0).data]


async def test_snapshot_and_restore(server, make_tensor) -> None:
    await create(server, "a")
    await server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(5.0, 1.0)]))
    taken = await server.stub.SnapshotSession(pb.SnapshotSessionRequest(session_id="a"))
    assert taken.applied_seq == 1
    request = pb.RestoreSessionRequest(snapshot=taken.snapshot, session_id="b")
    info = (await server.stub.RestoreSession(request)).session
    assert (info.session_id, info.model, info.applied_seq, info.applied_time_steps) == ("b", "sum", 1, 2)
    answer = await server.stub.Step(pb.StepRequest(session_id="b", seq=2, inputs=[make_tensor(1.0)]))
    assert answer.outputs[1].data == make_tensor(17.0).data
    code, fault = await refusal(
        server.stub.RestoreSession(pb.RestoreSessionRequest(snapshot=taken.snapshot, model="other"))
    )
    assert (code, fault.reason) == (grpc.StatusCode.FAILED_PRECONDITION, e.ERROR_REASON_MODEL_MISMATCH)
    code, fault = await refusal(
        server.stub.RestoreSession(pb.RestoreSessionRequest(snapshot=taken.snapshot[:-1] + b"x"))
    )
    assert (code, fault.reason) == (grpc.StatusCode.INVALID_ARGUMENT, e.ERROR_REASON_SNAPSHOT_INVALID)


async def test_a_defect_is_told_by_its_incident_only(server, monkeypatch, caplog) -> None:
    def broken(session_id: str) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(server.directory, "lookup", broken)
    with caplog.at_level(logging.ERROR, "conveyor"):
        code, fault = await refusal(server.stub.GetSession(pb.GetSessionRequest(session_id="a")))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in fault.message
    assert fault.metadata["reason"] == "INTERNAL"
    assert fault.metadata["incident"] in caplog.text
    assert "secret" in caplog.text


async def test_a_drain_waits_for_unary_calls(server, make_tensor) -> None:
    await create(server, "a")
    server.runner.gate.clear()
    step = asyncio.ensure_future(server.stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[make_tensor(1.0)])))
    await server.run_entered()
    server.directory.draining = True
    now = server.driver.now()
    drain = asyncio.create_task(server.grpc.drain(now + 20.0, now))
    code, fault = await refusal(create(server))
    assert (code, fault.reason) == (grpc.StatusCode.UNAVAILABLE, e.ERROR_REASON_DRAINING)
    assert not drain.done()
    server.runner.gate.set()
    assert (await step).seq == 1
    assert await drain is True


async def test_what_is_no_message_is_refused_as_that(server, caplog: pytest.LogCaptureFixture) -> None:
    call = server.channel.unary_unary("/conveyor.v1.SessionService/Step")
    _, fault = await refusal(call(b"\xff\xff\xff"))
    assert (fault.reason, fault.metadata) == (e.ERROR_REASON_MESSAGE_INVALID, {"field": "message"})
    assert "StepRequest" in fault.message
    assert not caplog.records, "whoever sends such could fill the log"
    assert await create(server, "a")
