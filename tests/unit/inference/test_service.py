"""What the protocol tells of the server and its models, and what it does to them."""

import grpc
import pytest
from conveyor_proto.inference import service_pb2 as pb
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.unit.inference.conftest import SERVICE, until
from tests.unit.transport.test_intake import FIRST

NAME = "inference.GRPCInferenceService"


async def test_the_server_says_what_it_is_and_whether_it_is_ready(client, server) -> None:
    assert (await client.call("ServerLive", pb.ServerLiveRequest())).live
    assert (await client.call("ServerReady", pb.ServerReadyRequest())).ready
    told = await client.call("ServerMetadata", pb.ServerMetadataRequest())
    assert told.name == "conveyor"
    assert {"sequence", "statistics", "model_configuration", "model_repository"} == set(told.extensions)
    for name, version, ready in (("sum", "", True), ("sum", "1", True), ("sum", "2", False), ("zip", "", False)):
        answer = await client.call("ModelReady", pb.ModelReadyRequest(name=name, version=version))
        assert answer.ready is ready, (name, version)
    server.directory.draining = True
    assert not (await client.call("ServerReady", pb.ServerReadyRequest())).ready
    assert not (await client.call("ModelReady", pb.ModelReadyRequest(name="sum"))).ready


async def test_a_models_metadata_has_its_batch_and_time_axes(client, server) -> None:
    server.add_model("sum", "2")
    await server.loader.load("sum", "2")
    told = await client.call("ModelMetadata", pb.ModelMetadataRequest(name="sum"))
    assert (told.name, list(told.versions), told.platform) == ("sum", ["1", "2"], "onnxruntime_onnx")
    assert [(item.name, item.datatype, list(item.shape)) for item in told.inputs] == [("x", "FP64", [-1, -1, 1])]
    assert [(item.name, list(item.shape)) for item in told.outputs] == [("total", [-1, -1, 1]), ("last", [-1, 1])]


async def test_a_models_configuration_has_the_settings_in_force(client, server) -> None:
    config = (await client.call("ModelConfig", pb.ModelConfigRequest(name="sum"))).config
    assert (config.name, config.max_batch_size, config.backend) == ("sum", 64, "onnxruntime")
    assert [(item.name, list(item.dims)) for item in config.input] == [("x", [-1, 1])]
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds == 600_000_000
    assert batching.oldest.max_candidate_sequences == 512
    (state,) = batching.state
    # It begins at 10, which this message cannot say; a state of zeros is told as such.
    assert (state.input_name, state.output_name, list(state.dims), list(state.initial_state)) == ("s", "s2", [1], [])
    assert not config.model_transaction_policy.decoupled
    server.add_model("plain")
    await server.loader.load("plain")
    config = (await client.call("ModelConfig", pb.ModelConfigRequest(name="plain"))).config
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


async def test_statistics_count_what_was_done(client, server) -> None:
    await client.infer(1.0, sequence=1, start=True)
    stream = client.stream()
    server.runner.gate.clear()
    server.runner.entered.clear()
    await stream.send(1.0, sequence=1)
    await server.run_entered()
    for sequence in range(2, 7):
        await stream.send(1.0, 1.0, sequence=sequence, start=True)
    await until(lambda: server.engine.ready >= 5)
    server.runner.gate.set()
    for _ in range(6):
        await stream.answer()
    await stream.send(1.0, sequence=99, id="unknown")
    await stream.answer()
    # Steps of the other protocol are steps too.
    own = server.stream()
    await own.attached(1)
    assert await own.answer(1, 1, 1.0) == [FIRST + 1]
    (told,) = (await client.call("ModelStatistics", pb.ModelStatisticsRequest(name="sum"))).model_stats
    stats = told.inference_stats
    assert (told.name, told.version, told.inference_count, told.execution_count) == ("sum", "1", 8, 4)
    assert (stats.success.count, stats.fail.count) == (8, 1)
    assert (stats.queue.count, stats.compute_infer.count, stats.compute_output.count) == (8, 8, 8)
    assert stats.compute_input.count == 7, "requests of this protocol whose tensors were read"
    assert stats.success.ns == pytest.approx(stats.queue.ns + stats.compute_infer.ns + stats.compute_output.ns, abs=3)
    assert {item.batch_size: item.compute_infer.count for item in told.batch_stats} == {1: 3, 5: 1}
    assert all(item.compute_infer.ns > 0 for item in told.batch_stats)
    assert told.last_inference > 1_700_000_000_000
    both = (await client.call("ModelStatistics", pb.ModelStatisticsRequest())).model_stats
    assert [item.name for item in both] == ["other", "sum"]
    await own.end()
    await stream.end()


async def test_models_come_and_go(client, server) -> None:
    async def index(**fields: object) -> list[tuple[str, str, str]]:
        told = await client.call("RepositoryIndex", pb.RepositoryIndexRequest(**fields))
        return [(item.name, item.version, item.state) for item in told.models]

    await client.infer(1.0, sequence=5, start=True)
    await client.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="sum"))
    assert await index() == [("other", "1", "READY")]
    assert not server.directory.sessions
    await client.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="sum"))
    assert await index(ready=True) == [("other", "1", "READY"), ("sum", "1", "READY")]
    server.add_model("bad", content="broken")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="bad"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert ("bad", "1", "UNAVAILABLE") in await index()
    assert ("bad", "1", "UNAVAILABLE") not in await index(ready=True)


@pytest.mark.parametrize(
    ("method", "message", "code", "text"),
    [
        ("ModelMetadata", pb.ModelMetadataRequest(name="zip"), "NOT_FOUND", "unknown model: 'zip'"),
        ("ModelConfig", pb.ModelConfigRequest(name="sum", version="4"), "NOT_FOUND", "no version 4"),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="zip"), "NOT_FOUND", "unknown model: 'zip'"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="zip"), "NOT_FOUND", "'zip'"),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(), "INVALID_ARGUMENT", "model_name is needed"),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="zip"), "NOT_FOUND", "'zip'"),
        (
            "RepositoryModelLoad",
            pb.RepositoryModelLoadRequest(
                model_name="sum", parameters={"config": pb.ModelRepositoryParameter(string_param="{}")}
            ),
            "UNIMPLEMENTED",
            "parameters of a load are not supported (config)",
        ),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(), "UNIMPLEMENTED", "shared memory is not"),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(), "UNIMPLEMENTED", "shared memory is not"),
        ("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(), "UNIMPLEMENTED", "shared memory is not"),
        ("TraceSetting", pb.TraceSettingRequest(), "UNIMPLEMENTED", "trace settings are not supported"),
        ("LogSettings", pb.LogSettingsRequest(), "UNIMPLEMENTED", "--log-level"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else None,
)
async def test_what_cannot_be_done_is_said(client, method, message, code, text) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.call(method, message)
    assert caught.value.code().name == code
    assert text in caught.value.details()


async def test_reflection_gives_the_files_of_both_services(server) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    request = reflection_pb2.ServerReflectionRequest
    call = stub.ServerReflectionInfo()
    await call.write(request(list_services=""))
    names = {item.name for item in (await call.read()).list_services_response.service}
    assert {NAME, "conveyor.v1.SessionService"} <= names
    for symbol in (NAME, "inference.ModelConfig", "conveyor.v1.SessionService"):
        await call.write(request(file_containing_symbol=symbol))
        pool = DescriptorPool()
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        # Each file is followed by those that it imports.
        for data in reversed(files):
            pool.Add(FileDescriptorProto.FromString(data))
        assert pool.FindFileContainingSymbol(symbol).name.startswith("conveyor_proto/")
    await call.done_writing()


def test_other_clients_messages_can_be_in_the_same_process() -> None:
    from tritonclient.grpc import service_pb2

    theirs = service_pb2.ModelInferRequest(model_name="m", id="7")
    theirs.parameters["sequence_id"].uint64_param = 5
    ours = pb.ModelInferRequest.FromString(theirs.SerializeToString())
    assert (ours.model_name, ours.id, ours.parameters["sequence_id"].uint64_param) == ("m", "7", 5)


def test_names_and_numbers_are_those_of_the_other_clients() -> None:
    """Field by field: what they know, we know under the same name, number and type."""
    from conveyor_proto.inference import model_config_pb2
    from tritonclient.grpc import model_config_pb2 as their_config
    from tritonclient.grpc import service_pb2 as their_service

    checked = 0
    for ours, theirs in ((pb, their_service), (model_config_pb2, their_config)):
        for name, message in theirs.DESCRIPTOR.message_types_by_name.items():
            checked += _same(ours.DESCRIPTOR.message_types_by_name[name], message)
        for name, kind in theirs.DESCRIPTOR.enum_types_by_name.items():
            assert _values(ours.DESCRIPTOR.enum_types_by_name[name]) == _values(kind)
    assert checked > 200
    methods = {
        method.name: (method.input_type.full_name, method.client_streaming, method.server_streaming)
        for method in their_service.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    }
    assert methods == {
        method.name: (method.input_type.full_name, method.client_streaming, method.server_streaming)
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    }
    assert f"/{NAME}/" == SERVICE


def _same(ours, theirs) -> int:
    assert ours.full_name == theirs.full_name
    assert _fields(ours) == _fields(theirs), ours.full_name
    for name, nested in theirs.nested_types_by_name.items():
        _same(ours.nested_types_by_name[name], nested)
    for name, kind in theirs.enum_types_by_name.items():
        assert _values(ours.enum_types_by_name[name]) == _values(kind)
    return len(theirs.fields)


def _fields(message) -> dict[str, tuple[object, ...]]:
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.containing_oneof.name if field.containing_oneof else "",
            field.message_type.full_name if field.message_type else "",
        )
        for field in message.fields
    }


def _values(kind) -> dict[str, int]:
    return {value.name: value.number for value in kind.values}
