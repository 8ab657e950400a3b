"""A call belongs to the trace of whoever makes it, where the app uses OpenTelemetry; else nothing of it is loaded."""

import subprocess
import sys

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
PARENT = f"00-{TRACE:032x}-{SPAN:016x}-01"


def active():
    """A span of the app's is active."""
    context = SpanContext(TRACE, SPAN, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return trace.use_span(NonRecordingSpan(context))


async def test_streams_and_calls_are_of_the_callers_trace(api, grpc_server) -> None:
    async with api.entered(api.connect(grpc_server.target)) as client:
        with active():
            async with api.entered(client.session("sum")) as session:
                await api.value(session.step([1, 0]))
                await api.value(session.refresh())
        assert [metadata["traceparent"] for metadata in grpc_server.metadata] == [PARENT]
        assert PARENT in {metadata.get("traceparent") for metadata in grpc_server.unary_metadata}


async def test_a_stream_after_a_cut_is_of_the_same_trace(api, grpc_server) -> None:
    async with api.entered(api.connect(grpc_server.target)) as client:
        with active():
            grpc_server.cut_after = 2
            async with api.entered(client.session("sum")) as session:
                for _ in range(4):
                    await api.value(session.step([1, 0]))
    assert len(grpc_server.metadata) > 1
    assert {metadata.get("traceparent") for metadata in grpc_server.metadata} == {PARENT}


async def test_without_a_span_nothing_is_said(api, grpc_server) -> None:
    async with api.entered(api.connect(grpc_server.target)) as client, api.entered(client.session("sum")) as session:
        await api.value(session.step([1, 0]))
        await api.value(session.refresh())
    assert not any("traceparent" in metadata for metadata in grpc_server.metadata + grpc_server.unary_metadata)


async def test_what_connect_was_told_goes_before(api, grpc_server) -> None:
    mine = (("traceparent", f"00-{1:032x}-{2:016x}-01"),)
    async with api.entered(api.connect(grpc_server.target, metadata=mine)) as client:
        with active():
            async with api.entered(client.session("sum")) as session:
                await api.value(session.refresh())
    said = [metadata.get("traceparent") for metadata in grpc_server.metadata + grpc_server.unary_metadata]
    assert set(said) <= {mine[0][1], None}
    assert mine[0][1] in said


def test_the_sdk_loads_nothing_of_it() -> None:
    code = (
        "import sys, conveyor, conveyor.aio, conveyor._trace as t\n"
        "assert t.of_caller() == ()\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
