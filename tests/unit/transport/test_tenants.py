"""Who calls, over the wire: a tenant's sessions and models are there for it alone, whichever call it asks by."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from conveyor_proto.inference import service_pb2
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, session_pb2_grpc
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.identity.gate import Gate
from conveyor_server.transport import guests
from flaky_store import FlakyStore
from google.rpc import status_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

MODES = pb.AttachSession
Metadata = tuple[tuple[str, str], ...]


def entry(name: str, tenant: str, *roles: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f'[[tokens]]\nname = "{name}"\nsha256 = "{digest}"\ntenant = "{tenant}"\nroles = {json.dumps(roles)}\n'


def by(name: str) -> Metadata:
    return (("authorization", f"Bearer {name}"),)


EVERYBODY = (
    entry("acme", "acme", "infer")
    + entry("rival", "rival", "infer")
    + entry("operator", "*", "infer", "admin", "observe")
    + entry("viewer", "acme", "observe")
    + '[tenants.rival]\nmodels = ["oth*"]\n'
)
ACME, RIVAL, OPERATOR, VIEWER = map(by, ("acme", "rival", "operator", "viewer"))


@pytest.fixture
def access(tmp_path: Path) -> Path:
    path = tmp_path / "access.toml"
    path.write_text(EVERYBODY)
    return path


@pytest.fixture
def bounded(access: Path) -> Path:
    """The same, and one of the tenants has a number of sessions of its own."""
    access.write_text(EVERYBODY + "[tenants.acme]\nmax_sessions = 2\n")
    return access


@pytest.fixture(params=["memory", "store"])
async def guarded(request: pytest.FixtureRequest, make_server: Callable, access: Path, store: FlakyStore):
    return await make_server(gate=Gate(access), folder="models", store=store if request.param == "store" else None)


def stream_of(server, metadata: Metadata):
    stub = session_pb2_grpc.SessionServiceStub(server.channel)  # type: ignore[no-untyped-call]
    return type(server.stream())(stub.Stream(metadata=metadata))


async def reason(call: Awaitable[Any]) -> str:
    """Why a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return why(caught.value)


def why(error: grpc.aio.AioRpcError) -> str:
    return reason_in(error.trailing_metadata())


def reason_in(trailing: Any) -> str:
    fault = from_status(status_pb2.Status.FromString(dict(trailing)["grpc-status-details-bin"]))
    assert fault.message
    return e.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")


def calls_about(server, session_id: str, metadata: Metadata) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every unary call about a session that is not a creation."""
    stub = server.stub
    step = pb.StepRequest(session_id=session_id, seq=1)
    return {
        "Step": lambda: stub.Step(step, metadata=metadata),
        "GetSession": lambda: stub.GetSession(pb.GetSessionRequest(session_id=session_id), metadata=metadata),
        "ForkSession": lambda: stub.ForkSession(pb.ForkSessionRequest(session_id=session_id), metadata=metadata),
        "SnapshotSession": lambda: stub.SnapshotSession(
            pb.SnapshotSessionRequest(session_id=session_id), metadata=metadata
        ),
        "CloseSession": lambda: stub.CloseSession(pb.CloseSessionRequest(session_id=session_id), metadata=metadata),
    }


async def test_a_tenants_session_is_not_there_for_another(guarded) -> None:
    mine = stream_of(guarded, ACME)
    await mine.attached(1, "shared")
    assert await mine.answer(1, 1, 2.0)
    for name in ("shared", "acme/shared"):
        for call in calls_about(guarded, name, RIVAL).values():
            assert await reason(call()) == "SESSION_NOT_FOUND"
        other = stream_of(guarded, RIVAL)
        await other.attach(1, name, mode=MODES.MODE_RESUME, model="")
        assert (await other.fault())[2].reason == e.ERROR_REASON_SESSION_NOT_FOUND
    # Nothing of all that fenced or closed it.
    assert await mine.answer(1, 2, 3.0)


async def test_two_tenants_call_their_sessions_alike(guarded) -> None:
    mine, theirs = stream_of(guarded, ACME), stream_of(guarded, RIVAL)
    await mine.attached(1, "s", model="other")
    attached = await theirs.attached(1, "s", model="other")
    assert attached.session.session_id == "s"
    first, second = await mine.answer(1, 1, 2.0), await theirs.answer(1, 1, 5.0)
    assert second[0] - first[0] == 3.0
    for metadata in (ACME, RIVAL):
        listed = await guarded.stub.ListSessions(pb.ListSessionsRequest(), metadata=metadata)
        assert [session.session_id for session in listed.sessions] == ["s"]
        assert (listed.total_size, listed.next_page_token) == (1, "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await guarded.stub.CreateSession(pb.CreateSessionRequest(model="other", session_id="s"), metadata=metadata)
        assert why(caught.value) == "SESSION_EXISTS"
    await theirs.send(close=pb.CloseAttachedSession(handle=1))
    assert (await theirs.expect("detached")).session_id == "s"
    assert await mine.answer(1, 2, 2.0)


async def test_whoever_acts_for_no_tenant_sees_all_under_their_full_names(guarded) -> None:
    for metadata in (ACME, RIVAL):
        for name in ("a", "b"):
            await guarded.stub.CreateSession(pb.CreateSessionRequest(model="other", session_id=name), metadata=metadata)
    await guarded.stub.CreateSession(pb.CreateSessionRequest(model="sum", session_id="own"), metadata=OPERATOR)
    listed: list[str] = []
    token = ""
    while True:
        request = pb.ListSessionsRequest(page_size=2, page_token=token)
        page = await guarded.stub.ListSessions(request, metadata=OPERATOR)
        assert page.total_size == 5
        listed += [session.session_id for session in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert listed == ["acme/a", "acme/b", "own", "rival/a", "rival/b"]
    pages = []
    for token in ("", "a"):
        request = pb.ListSessionsRequest(page_size=1, page_token=token)
        page = await guarded.stub.ListSessions(request, metadata=ACME)
        pages.append(([session.session_id for session in page.sessions], page.next_page_token, page.total_size))
    assert pages == [(["a"], "a", 2), (["b"], "", 2)]
    found = await guarded.stub.GetSession(pb.GetSessionRequest(session_id="acme/a"), metadata=OPERATOR)
    assert found.session.session_id == "acme/a"
    for_acme = (*OPERATOR, ("x-tenant-id", "acme"))
    found = await guarded.stub.GetSession(pb.GetSessionRequest(session_id="a"), metadata=for_acme)
    assert found.session.session_id == "a"
    assert await reason(calls_about(guarded, "own", for_acme)["GetSession"]()) == "SESSION_NOT_FOUND"
    await guarded.stub.CloseSession(pb.CloseSessionRequest(session_id="acme/a"), metadata=OPERATOR)
    assert await reason(calls_about(guarded, "a", ACME)["GetSession"]()) == "SESSION_CLOSED"


async def test_a_copy_and_a_snapshot_are_the_tenants_too(guarded) -> None:
    stub = guarded.stub
    await stub.CreateSession(pb.CreateSessionRequest(model="other", session_id="a"), metadata=ACME)
    copied = await stub.ForkSession(pb.ForkSessionRequest(session_id="a", new_session_id="b"), metadata=ACME)
    taken = await stub.SnapshotSession(pb.SnapshotSessionRequest(session_id="a"), metadata=ACME)
    restored = await stub.RestoreSession(
        pb.RestoreSessionRequest(snapshot=taken.snapshot, session_id="c"), metadata=ACME
    )
    assert [copied.session.session_id, restored.session.session_id] == ["b", "c"]
    # By whoever acts for any tenant, it stays its tenant's.
    await stub.ForkSession(pb.ForkSessionRequest(session_id="acme/a", new_session_id="d"), metadata=OPERATOR)
    listed = await stub.ListSessions(pb.ListSessionsRequest(), metadata=ACME)
    assert [session.session_id for session in listed.sessions] == ["a", "b", "c", "d"]


async def test_models_are_there_for_those_who_may_use_them(guarded) -> None:
    found = await guarded.models.ListModels(model_pb2.ListModelsRequest(), metadata=RIVAL)
    assert {model.name for model in found.models} == {"other"}
    request = model_pb2.GetModelRequest(name="sum")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guarded.models.GetModel(request, metadata=RIVAL)
    assert why(caught.value) == "MODEL_NOT_FOUND"
    assert "sum/1" not in caught.value.details()
    other = stream_of(guarded, RIVAL)
    await other.attach(1, "s", model="sum")
    fault = (await other.fault())[2]
    assert fault.reason == e.ERROR_REASON_MODEL_NOT_FOUND
    assert fault.metadata["available"] == "other/1"
    request = pb.CreateSessionRequest(model="sum")
    assert await reason(guarded.stub.CreateSession(request, metadata=RIVAL)) == "MODEL_NOT_FOUND"
    assert len((await guarded.models.ListModels(model_pb2.ListModelsRequest(), metadata=ACME)).models) == 2


async def test_what_roles_do_not_hold_is_refused(guarded) -> None:
    load = model_pb2.LoadModelRequest(name="sum", version="1")
    assert await reason(guarded.models.LoadModel(load, metadata=ACME)) == "ROLE_MISSING"
    assert (await guarded.models.LoadModel(load, metadata=OPERATOR)).model.name == "sum"
    assert await reason(guarded.stub.CreateSession(pb.CreateSessionRequest(model="sum"), metadata=VIEWER)) == (
        "ROLE_MISSING"
    )
    await guarded.stub.CreateSession(pb.CreateSessionRequest(model="sum", session_id="a"), metadata=ACME)
    listed = await guarded.stub.ListSessions(pb.ListSessionsRequest(), metadata=VIEWER)
    assert [session.session_id for session in listed.sessions] == ["a"]
    for metadata in ((), by("nobody")):
        assert await reason(guarded.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)) == (
            "CALLER_UNKNOWN"
        )
    assert guarded.metrics.errors["ROLE_MISSING"] == 2
    assert guarded.metrics.errors["CALLER_UNKNOWN"] == 2


@pytest.mark.parametrize(("metadata", "expected"), [((), "CALLER_UNKNOWN"), (VIEWER, "ROLE_MISSING")])
async def test_a_stream_that_may_not_is_ended_before_it_begins(guarded, metadata: Metadata, expected: str) -> None:
    stream = stream_of(guarded, metadata)
    # It is told before it says anything.
    assert reason_in(await stream.call.trailing_metadata()) == expected
    assert await stream.call.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
    assert not guarded.directory.sessions
    assert guarded.metrics.streams == 0
    # The connection goes on.
    assert await stream_of(guarded, ACME).attached(1, "s")


async def test_a_tenant_has_so_many_sessions_in_memory_and_others_have_theirs(
    make_server: Callable, bounded: Path
) -> None:
    server = await make_server(gate=Gate(bounded), folder="models", max_per_tenant=1)
    mine, theirs = stream_of(server, ACME), stream_of(server, RIVAL)
    await mine.attached(1, "a")
    request = pb.CreateSessionRequest(model="other")
    made = (await server.stub.CreateSession(request, metadata=ACME)).session.session_id
    await mine.attach(2, "b")
    fault = (await mine.fault())[2]
    assert fault.reason == e.ERROR_REASON_SESSIONS_EXHAUSTED
    assert fault.metadata == {"max_sessions": "2", "quota": "tenant:acme"}
    assert fault.retry_s
    assert await reason(server.stub.CreateSession(request, metadata=ACME)) == "SESSIONS_EXHAUSTED"
    fork = pb.ForkSessionRequest(session_id="a")
    assert await reason(server.stub.ForkSession(fork, metadata=ACME)) == "SESSIONS_EXHAUSTED"
    # Others have the server's own number, and whoever acts for nobody has none.
    await theirs.attached(1, "a", model="other")
    await theirs.attach(2, "b", model="other")
    assert (await theirs.fault())[2].metadata["max_sessions"] == "1"
    for _ in range(3):
        await server.stub.CreateSession(request, metadata=OPERATOR)
    await server.stub.CloseSession(pb.CloseSessionRequest(session_id=made), metadata=ACME)
    await mine.attached(2, "b")
    assert server.directory.table.of_tenant == {"acme": 2, "rival": 1}


def infer(sequence: str, value: float, **flags: bool) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="sum")
    request.inputs.add(name="x", datatype="FP64", shape=[1, 1, 1]).contents.fp64_contents.append(value)
    request.parameters["sequence_id"].string_param = sequence
    for name, flag in flags.items():
        request.parameters[name].bool_param = flag
    return request


async def test_sequences_are_their_tenants_too(guarded) -> None:
    call = guarded.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    await call(infer("q", 1.0, sequence_start=True), metadata=ACME)
    await call(infer("q", 1.0), metadata=ACME)
    third = (*OPERATOR, ("x-tenant-id", "third"))
    for metadata, code in (
        # To the one, the model is not there; to the other, the sequence.
        (RIVAL, grpc.StatusCode.NOT_FOUND),
        (third, grpc.StatusCode.INVALID_ARGUMENT),
        (VIEWER, grpc.StatusCode.PERMISSION_DENIED),
        ((), grpc.StatusCode.UNAUTHENTICATED),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(infer("q", 1.0), metadata=metadata)
        assert caught.value.code() is code
    await call(infer("q", 1.0, sequence_start=True), metadata=third)
    names = set(guarded.directory.sessions)
    assert names == {"acme/sum:s:q", "third/sum:s:q"}


async def test_a_stream_ends_when_what_opened_it_no_longer_counts(
    make_server: Callable, access: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_LOOK_S", 0.02)
    monkeypatch.setattr("conveyor_server.identity.gate._LOOK_S", 0.0)
    server = await make_server(gate=Gate(access), folder="models")
    mine, theirs = stream_of(server, ACME), stream_of(server, RIVAL)
    await mine.attached(1, "s")
    await theirs.attached(1, "s", model="other")
    assert await mine.answer(1, 1, 2.0)
    new = access.with_suffix(".new")
    new.write_text(EVERYBODY.replace('name = "acme"', 'name = "acme again"').replace('["oth*"]', '["other"]'))
    new.replace(access)
    # In order: told, let go of, ended; and the session lives.
    assert (await mine.receive()).HasField("go_away")
    assert (await mine.receive()).detached.cause == pb.DETACH_CAUSE_DETACHED
    await theirs.expect("go_away")
    again = stream_of(server, ACME)
    attached = await again.attached(1, "s", mode=MODES.MODE_RESUME, model="")
    assert attached.session.applied_seq == 1
    assert await again.answer(1, 2, 2.0)


async def test_a_stream_of_somebody_who_is_still_known_goes_on(
    make_server: Callable, access: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_LOOK_S", 0.01)
    monkeypatch.setattr("conveyor_server.identity.gate._LOOK_S", 0.0)
    gate = Gate(access)
    server = await make_server(gate=gate, folder="models")
    mine = stream_of(server, ACME)
    await mine.attached(1, "s")
    new = access.with_suffix(".new")
    new.write_text(EVERYBODY + entry("one more", "acme", "infer"))
    new.replace(access)
    async with asyncio.timeout(20):
        while gate.generation == 0:  # noqa: ASYNC110 - it is a timer of the server's that looks
            await asyncio.sleep(0.01)
    for seq in range(1, 4):
        assert await mine.answer(1, seq, 1.0)


@pytest.mark.parametrize("on", [True, False])
async def test_reflection_can_be_off(make_server: Callable, wire_options, on: bool) -> None:
    server = await make_server(wire=wire_options(reflection=on))
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    if on:
        answer = await call.read()
        assert "conveyor.v1.SessionService" in {item.name for item in answer.list_services_response.service}
    assert await call.code() is (grpc.StatusCode.OK if on else grpc.StatusCode.UNIMPLEMENTED)
