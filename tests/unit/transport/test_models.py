"""Models in and out of service while others are served."""

from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2 as pb
from conveyor_proto.v1 import session_pb2
from conveyor_server.repository.policy import INLINE_RUN_S
from refusals import refusal


async def test_list_and_get(server) -> None:
    stream = server.stream()
    await stream.attached(1)
    models = (await server.models.ListModels(pb.ListModelsRequest())).models
    assert [(item.name, item.version, item.latest, item.sessions) for item in models] == [
        ("other", "1", True, 0),
        ("sum", "1", True, 1),
    ]
    model = (await server.models.GetModel(pb.GetModelRequest(name="sum"))).model
    assert (model.status, model.device, model.spec.digest) == (pb.MODEL_STATUS_READY, "cpu", "digest of sum")
    assert model.spec.inputs[0].name == "x"
    assert model.load_seconds > 0
    policy = model.batch_policy
    assert policy.max_batch >= policy.inline_rows >= 1
    assert (policy.quantum >= 1, policy.max_batch_time_steps >= policy.max_batch) == (True, True)
    assert (policy.inline_run_seconds, list(policy.given)) == (INLINE_RUN_S, [])
    assert {(1, 1), (8, 1), (1, 16)} <= {(item.rows, item.time_steps) for item in policy.measured}
    assert all(item.seconds > 0 for item in policy.measured)
    assert model.loaded_at.seconds > 1_700_000_000
    assert (await refusal(server.models.GetModel(pb.GetModelRequest(name="no"))))[1].reason == (
        e.ERROR_REASON_MODEL_NOT_FOUND
    )
    await stream.end()


def failed(server) -> dict[tuple[str, str], int]:
    """Which versions the metrics say are there and cannot be served."""
    return {key: figures.failed for key, figures in server.metrics.models.items()}


async def test_a_newer_version_takes_new_sessions_and_old_ones_stay(server) -> None:
    stream = server.stream()
    await stream.attached(1, "old")
    server.add_model("sum", "2")
    loaded = (await server.models.LoadModel(pb.LoadModelRequest(name="sum"))).model
    assert (loaded.version, loaded.latest, loaded.status) == ("2", True, pb.MODEL_STATUS_READY)
    assert (await stream.attached(2)).session.version == "2"
    assert (await stream.attached(3, version="1")).session.version == "1"
    for handle in (1, 2, 3):
        assert await stream.answer(handle, 1, 1.0) == [11.0]
    again = (await server.models.LoadModel(pb.LoadModelRequest(name="sum", version="2"))).model
    assert again.loaded_at == loaded.loaded_at
    await stream.end()


async def test_a_broken_file_is_told_and_harms_no_other(server) -> None:
    server.add_model("sum", "2", "broken")
    _, fault = await refusal(server.models.LoadModel(pb.LoadModelRequest(name="sum", version="2")))
    assert fault.reason == e.ERROR_REASON_MODEL_INVALID
    assert "the file is broken" in fault.message
    model = (await server.models.GetModel(pb.GetModelRequest(name="sum", version="2"))).model
    assert model.status == pb.MODEL_STATUS_FAILED
    assert from_status(model.failure).reason == e.ERROR_REASON_MODEL_INVALID
    assert failed(server) == {("other", "1"): 0, ("sum", "1"): 0, ("sum", "2"): 1}
    stream = server.stream()
    assert (await stream.attached(1)).session.version == "1"
    await stream.end()
    await server.models.UnloadModel(pb.UnloadModelRequest(name="sum", version="2"))
    assert failed(server) == {("other", "1"): 0, ("sum", "1"): 0, ("sum", "2"): 0}


async def test_a_file_that_was_mended_has_not_failed(server) -> None:
    server.add_model("sum", "2", "broken")
    await refusal(server.models.LoadModel(pb.LoadModelRequest(name="sum", version="2")))
    (server.folder / "sum" / "2" / "model.onnx").write_text("")
    await server.models.LoadModel(pb.LoadModelRequest(name="sum", version="2"))
    assert failed(server) == {("other", "1"): 0, ("sum", "1"): 0, ("sum", "2"): 0}


async def test_load_what_is_not_there(server) -> None:
    for request in (pb.LoadModelRequest(name="no"), pb.LoadModelRequest(name="sum", version="9")):
        assert (await refusal(server.models.LoadModel(request)))[1].reason == e.ERROR_REASON_MODEL_NOT_FOUND
    # And names that strangers ask for become no labels.
    assert failed(server) == {("other", "1"): 0, ("sum", "1"): 0}


async def test_unload_needs_force_while_sessions_live(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    runner = server.runner
    _, fault = await refusal(server.models.UnloadModel(pb.UnloadModelRequest(name="sum", version="1")))
    assert (fault.reason, fault.metadata["sessions"]) == (e.ERROR_REASON_MODEL_IN_USE, "1")
    response = await server.models.UnloadModel(pb.UnloadModelRequest(name="sum", version="1", force=True))
    assert response.closed_sessions == 1
    assert runner.closed
    detached = await stream.expect("detached")
    assert detached.cause == session_pb2.DETACH_CAUSE_MODEL_UNLOADED
    await stream.attach(2)
    assert (await stream.fault())[2].reason == e.ERROR_REASON_MODEL_NOT_FOUND
    await server.models.LoadModel(pb.LoadModelRequest(name="sum"))
    await stream.attached(3)
    assert await stream.answer(3, 1, 1.0) == [11.0]
    await stream.end()


async def test_unload_waits_for_the_run_that_is_out(server) -> None:
    stream = server.stream()
    await stream.attached(1, "a")
    await stream.attached(2, "b")
    runner = server.runner
    runner.gate.clear()
    await stream.step(1, 1, *[1.0] * 20)
    await server.run_entered()
    await stream.step(2, 1, 1.0)
    await stream.send(detach=session_pb2.DetachSession(handle=9))
    await stream.fault()
    unload = server.models.UnloadModel(pb.UnloadModelRequest(name="sum", version="1", force=True))
    _, seq, fault = await stream.fault()
    assert (seq, fault.reason) == (1, e.ERROR_REASON_SESSION_CLOSED)
    assert (await stream.expect("detached")).handle == 2
    assert not runner.closed
    runner.gate.set()
    # Three quanta: the first was out, the others follow before the session goes.
    assert (await stream.expect("result")).handle == 1
    assert (await stream.expect("detached")).handle == 1
    assert (await unload).closed_sessions == 2
    assert runner.closed
    await stream.end()


async def test_unload_needs_a_version(server) -> None:
    assert (await refusal(server.models.UnloadModel(pb.UnloadModelRequest(name="sum"))))[1].reason == (
        e.ERROR_REASON_MESSAGE_INVALID
    )
    _, fault = await refusal(server.models.UnloadModel(pb.UnloadModelRequest(name="sum", version="3")))
    assert fault.reason == e.ERROR_REASON_MODEL_NOT_FOUND
