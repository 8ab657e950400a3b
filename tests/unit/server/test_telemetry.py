"""What a server tells a collector: spans of calls and steps, and its metrics. A whole App, on either transport."""

import asyncio
import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from collector import Collector, attributes, collecting
from conveyor_proto.inference import service_pb2 as infer_pb
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc, tensor_pb2
from conveyor_server import app as app_module
from conveyor_server.app import App
from conveyor_server.coherence import check_together
from conveyor_server.errors import StartError
from conveyor_server.exposition import TABLE
from conveyor_server.logs import JsonFormat
from conveyor_server.metrics import LATENCY_BUCKETS_S
from conveyor_server.servicers.session import SessionServicer
from conveyor_server.settings import Settings
from conveyor_server.telemetry.figures import unit
from conveyor_server.transport.stream import StreamCall
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
STREAM = "conveyor.v1.SessionService/Stream"
FROM = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))


@pytest.fixture(autouse=True)
def opened(monkeypatch, runner):
    monkeypatch.setattr(app_module, "open_runner", lambda path, **options: runner)
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@contextlib.asynccontextmanager
async def serving(models, collector: Collector, **fields):
    """The stub of a server that tells the collector; it has told all at the end."""
    given = {"traces": True, "trace_steps": 1, "otlp_endpoint": collector.endpoint, **fields}
    small = {"port": 0, "metrics_port": 0, "max_sessions": 8, "max_batch": 8, "drain_s": 5.0}
    app = App(Settings(models=models, **{**small, **given}))
    run = asyncio.create_task(app.run())
    await asyncio.wait_for(app.warm.wait(), 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        stub.app, stub.channel = app, channel
        yield stub
    app.stop()
    assert await run == 0


class Talk:
    """One stream with the session `a` under handle 1."""

    def __init__(self, stub, metadata=FROM) -> None:
        self.call = stub.Stream(metadata=metadata)

    async def say(self, **kind) -> str:
        await self.call.write(pb.StreamRequest(**kind))
        return (await asyncio.wait_for(self.call.read(), 20)).WhichOneof("kind")

    async def attach(self) -> str:
        return await self.say(
            attach=pb.AttachSession(handle=1, session_id="a", mode=pb.AttachSession.MODE_CREATE, model="last")
        )

    async def step(self, seq: int, time_steps: int = 1) -> str:
        return await self.say(step=pb.Step(handle=1, seq=seq, inputs=[x(time_steps)]))

    async def end(self) -> None:
        await self.call.done_writing()
        while await asyncio.wait_for(self.call.read(), 20) is not grpc.aio.EOF:
            pass
        assert await self.call.code() is grpc.StatusCode.OK


def x(time_steps: int = 1) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data=np.ones((time_steps, 2), np.float32).tobytes())


def frame(seq: int, *handles: int) -> pb.StepFrame:
    return pb.StepFrame(
        handles=np.array(handles, np.uint32).tobytes(),
        seqs=np.full(len(handles), seq, np.uint64).tobytes(),
        columns=[np.ones((len(handles), 2), np.float32).tobytes()],
    )


def times(span: Span) -> tuple[int, int]:
    return span.start_time_unix_nano, span.end_time_unix_nano


def check_step(collector: Collector, step: Span, *, rows: int) -> None:
    """Queue, batch and reply follow each other, and the model ran within the batch."""
    parts = collector.children(step)
    assert parts.keys() == {"queue", "batch", "reply"}
    assert times(parts["queue"])[0] == times(step)[0]
    assert times(parts["queue"])[1] == times(parts["batch"])[0]
    assert times(parts["batch"])[1] == times(parts["reply"])[0]
    assert times(parts["reply"])[1] == times(step)[1]
    runs = collector.children(parts["batch"])
    assert runs.keys() == {"run"}
    assert times(parts["batch"])[0] <= times(runs["run"])[0] < times(runs["run"])[1] <= times(parts["batch"])[1]
    assert attributes(parts["batch"])["conveyor.batch.rows"] == rows


# Runs at once, and batches on the engine's thread.
@pytest.mark.parametrize("inline_run_s", [1.0, 0.0])
async def test_a_stream_and_its_steps(models, collector, inline_run_s) -> None:
    async with serving(models, collector, inline_run_s=inline_run_s) as stub:
        talk = Talk(stub)
        assert await talk.attach() == "attached"
        # By itself first, then as the compiled part knows it; in a frame; and longer than one run takes.
        assert [await talk.step(seq) for seq in (1, 2, 3)] == ["result"] * 3
        assert await talk.say(frame=frame(4, 1)) == "frame"
        assert await talk.step(5, time_steps=40) == "result"
        assert await talk.step(9) == "error"
        await talk.end()
    stream = collector.one(STREAM)
    assert (stream.trace_id.hex(), stream.parent_span_id.hex()) == (TRACE, PARENT)
    assert (stream.kind, stream.trace_state) == (Span.SPAN_KIND_SERVER, "vendor=1")
    assert attributes(stream) == {
        "rpc.system.name": "grpc",
        "rpc.method": STREAM,
        "rpc.response.status_code": "OK",
        "conveyor.sessions": 1,
        "conveyor.steps": 5,
        "conveyor.refused": 1,
    }
    (event,) = stream.events
    assert (event.name, attributes(event)) == ("refused", {"conveyor.reason": "STEP_GAP", "conveyor.count": 1})
    steps = sorted(collector.named("step"), key=times)
    assert [attributes(step)["conveyor.step.seq"] for step in steps] == [1, 2, 3, 4, 5]
    assert [attributes(step)["conveyor.step.time_steps"] for step in steps] == [1, 1, 1, 1, 40]
    for step in steps:
        assert (step.trace_id.hex(), step.parent_span_id) == (TRACE, stream.span_id)
        known = attributes(step)
        assert (known["conveyor.model"], known["conveyor.version"], known["conveyor.session.id"]) == ("last", "1", "a")
        assert times(stream)[0] <= times(step)[0] < times(step)[1] <= times(stream)[1]
        check_step(collector, step, rows=1)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


@pytest.mark.parametrize("inline_run_s", [1.0, 0.0])
async def test_each_step_of_a_frame_is_its_own_sessions(models, collector, inline_run_s) -> None:
    async with serving(models, collector, inline_run_s=inline_run_s) as stub:
        talk = Talk(stub)
        for handle in (1, 2, 3):
            attach = pb.AttachSession(handle=handle, session_id=f"s{handle}", model="last")
            attach.mode = pb.AttachSession.MODE_CREATE
            assert await talk.say(attach=attach) == "attached"
        # By arrays, and once they are known by the compiled part; the sessions are not in one order.
        for seq, handles in enumerate(((1, 2, 3), (3, 1, 2), (2, 3, 1)), start=1):
            assert await talk.say(frame=frame(seq, *handles)) == "frame"
        await talk.end()
    steps = collector.named("step")
    which = {(attributes(step)["conveyor.session.id"], attributes(step)["conveyor.step.seq"]) for step in steps}
    assert which == {(f"s{handle}", seq) for handle in (1, 2, 3) for seq in (1, 2, 3)}
    assert len(steps) == 9
    for step in steps:
        check_step(collector, step, rows=3)
    assert attributes(collector.one(STREAM))["conveyor.steps"] == 9


async def test_inference_calls_and_their_steps(models, collector) -> None:
    request = infer_pb.ModelInferRequest(model_name="last")
    request.parameters["sequence_id"].int64_param = 7
    request.parameters["sequence_start"].bool_param = True
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1, 2])
    request.raw_input_contents.append(np.ones((1, 1, 2), np.float32).tobytes())
    async with serving(models, collector) as stub:
        infer = stub.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=infer_pb.ModelInferRequest.SerializeToString,
            response_deserializer=infer_pb.ModelInferResponse.FromString,
        )
        await infer(request, metadata=FROM)
    call = collector.one("inference.GRPCInferenceService/ModelInfer")
    assert (call.parent_span_id.hex(), attributes(call)["rpc.response.status_code"]) == (PARENT, "OK")
    step = collector.one("step")
    assert step.parent_span_id == call.span_id
    check_step(collector, step, rows=1)


async def test_a_unary_call_and_its_step(models, collector) -> None:
    async with serving(models, collector) as stub:
        await stub.CreateSession(pb.CreateSessionRequest(model="last", session_id="a"))
        await stub.Step(pb.StepRequest(session_id="a", seq=1, inputs=[x()]), metadata=FROM)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetSession(pb.GetSessionRequest(session_id="none"))
    create = collector.one("conveyor.v1.SessionService/CreateSession")
    # Nobody's: a trace of its own.
    assert create.parent_span_id == b""
    assert create.trace_id.hex() != TRACE
    call = collector.one("conveyor.v1.SessionService/Step")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
    step = collector.one("step")
    assert step.parent_span_id == call.span_id
    check_step(collector, step, rows=1)
    refused = collector.one("conveyor.v1.SessionService/GetSession")
    known = attributes(refused)
    assert (known["rpc.response.status_code"], known["conveyor.reason"]) == ("NOT_FOUND", "SESSION_NOT_FOUND")
    # The caller's doing is no error of the server's.
    assert refused.status.code == Status.STATUS_CODE_UNSET


async def test_a_step_that_fails_says_why(models, collector, runner, monkeypatch) -> None:
    step = type(runner).step

    def not_finite(run):
        result = step(runner, run)
        result.finite[:] = False
        return result

    async with serving(models, collector, inline_run_s=0.0) as stub:
        talk = Talk(stub)
        await talk.attach()
        monkeypatch.setattr(runner, "step", not_finite)
        assert await talk.step(1) == "error"
        monkeypatch.undo()
        await talk.end()
    failed = collector.one("step")
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert attributes(failed)["error.type"] == "STATE_NON_FINITE"
    assert attributes(collector.one(STREAM))["conveyor.steps"] == 0


async def test_who_is_not_sampled_costs_nothing(models, collector) -> None:
    async with serving(models, collector) as stub:
        talk = Talk(stub, (("traceparent", f"00-{TRACE}-{PARENT}-00"),))
        await talk.attach()
        await talk.step(1)
        await talk.end()
    assert not collector.spans


async def test_a_stream_whose_client_went_is_cancelled(models, collector) -> None:
    async with serving(models, collector, trace_steps=0) as stub:
        talk = Talk(stub)
        await talk.attach()
        await talk.step(1)
        talk.call.cancel()
        async with asyncio.timeout(20):
            while stub.app.metrics.streams:  # noqa: ASYNC110 - the server notices when it does
                await asyncio.sleep(0.001)
    known = attributes(collector.one(STREAM))
    assert (known["rpc.response.status_code"], known["conveyor.steps"]) == ("CANCELLED", 1)
    assert not collector.named("step")


async def test_metrics_in_the_same_names(models, collector, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    async with serving(models, collector, traces=False, otlp_metrics=True) as stub:
        talk = Talk(stub)
        await talk.attach()
        for seq in (1, 2, 3):
            await talk.step(seq)
        await talk.end()
        await stub.CloseSession(pb.CloseSessionRequest(session_id="a"))
        sample = stub.app.metrics.sample(stub.app.directory)
        exposed = {row.name for row in TABLE if list(row.read(sample))}
    assert not collector.spans
    assert collector.resource["service.name"] == "ours"
    assert collector.resource["deployment.environment.name"] == "test"
    assert collector.resource["service.instance.id"]
    # Those that have something to say: of stores and errors there is nothing.
    assert collector.metrics.keys() == exposed
    kinds = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}
    for row in TABLE:
        metric = collector.metrics.get(row.name)
        if metric is not None:
            assert (metric.WhichOneof("data"), metric.description) == (kinds[row.kind], row.help)
            for point in getattr(metric, kinds[row.kind]).data_points:
                assert attributes(point).keys() == set(row.labels)
    steps = collector.metrics["conveyor_steps_total"].sum
    assert (steps.is_monotonic, [point.as_int for point in steps.data_points]) == (True, [3])
    queue = collector.metrics["conveyor_step_queue_seconds"]
    (point,) = queue.histogram.data_points
    assert queue.unit == "s"
    assert tuple(point.explicit_bounds) == LATENCY_BUCKETS_S
    assert (point.count, sum(point.bucket_counts), len(point.bucket_counts)) == (3, 3, len(LATENCY_BUCKETS_S) + 1)
    assert not point.HasField("min")


def test_units() -> None:
    names = (
        "conveyor_step_run_seconds",
        "conveyor_store_written_bytes_total",
        "conveyor_batch_ready_ratio",
        "conveyor",
    )
    assert [unit(name) for name in names] == ["s", "By", "1", ""]


async def test_what_a_call_logs_names_its_trace(models, collector, monkeypatch) -> None:
    async def broken(self, request):
        raise ValueError("a defect")

    def falls(self, data):
        raise ValueError("a defect")

    monkeypatch.setattr(SessionServicer, "get_session", broken)
    monkeypatch.setattr(StreamCall, "receive", falls)
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setFormatter(JsonFormat(None))
    logging.getLogger("conveyor").addHandler(handler)
    try:
        async with serving(models, collector) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await stub.GetSession(pb.GetSessionRequest(session_id="a"), metadata=FROM)
            call = stub.Stream(metadata=FROM)
            await call.write(pb.StreamRequest())
            with pytest.raises(grpc.aio.AioRpcError) as stream:
                assert await asyncio.wait_for(call.read(), 20) is not None
    finally:
        logging.getLogger("conveyor").removeHandler(handler)
    incidents = [record for record in map(json.loads, heard.getvalue().splitlines()) if "incident" in record]
    spans = [collector.one("conveyor.v1.SessionService/GetSession"), collector.one(STREAM)]
    assert [(record["trace_id"], record["span_id"]) for record in incidents] == [
        (TRACE, span.span_id.hex()) for span in spans
    ]
    for caught, record, span in zip((unary, stream), incidents, spans, strict=True):
        info = error_details_pb2.ErrorInfo()
        details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
        assert status_pb2.Status.FromString(details).details[0].Unpack(info)
        assert info.metadata == {"incident": record["incident"], "trace_id": TRACE}
        assert "a defect" not in caught.value.details()
        assert "a defect" in record["exception"]
        assert span.status.code == Status.STATUS_CODE_ERROR
        # What went wrong is in the log, and in no trace.
        assert "a defect" not in str(span)


async def test_a_server_stops_without_its_collector(models, collector) -> None:
    with collecting() as gone:
        pass
    async with serving(models, gone, otlp_metrics=True, drain_s=1.0) as stub:
        talk = Talk(stub)
        await talk.attach()
        await talk.step(1)
        await talk.end()


@pytest.mark.parametrize("fields", [{"traces": True}, {"otlp_metrics": True}])
async def test_without_the_extra_it_says_what_to_install(models, monkeypatch, fields) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    app = App(Settings(models=models, port=0, metrics_port=0, **fields))
    with pytest.raises(StartError, match=r"pip install 'conveyor\[otel\]'"):
        await app.run()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon", "not one of grpc, http/protobuf"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon", "no number of milliseconds above 0"),
    ],
)
async def test_variables_that_cannot_be_used(models, monkeypatch, name, value, message) -> None:
    monkeypatch.setenv(name, value)
    app = App(Settings(models=models, port=0, metrics_port=0, otlp_metrics=True))
    with pytest.raises(StartError, match=message):
        await app.run()


async def test_disabled_as_everywhere(models, collector, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with serving(models, collector, otlp_metrics=True) as stub:
        await stub.CreateSession(pb.CreateSessionRequest(model="last"))
    assert not collector.spans
    assert not collector.metrics


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(StartError, match="--otlp-endpoint is a URL"):
        check_together(Settings(otlp_endpoint="collector:4317"))
