"""Calls and sampled steps as spans of OpenTelemetry.

Invariant: a span's times are those at which things happened, whenever it is made. Each call fixes once how far the wall
clock is from the driver's, so that what is in it lies within it.
"""

import time
from collections.abc import Callable, Mapping

from google.rpc import code_pb2, error_details_pb2, status_pb2
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from conveyor_server.tracing import StepSampler, TracedStep

# After so many refusals a call counts them only: who floods is not to be paid for in events.
MOST_EVENTS = 32
# What a server's span calls an error, by the conventions for gRPC: the others are the caller's doing.
_FAILURES = {
    code_pb2.UNKNOWN,
    code_pb2.DEADLINE_EXCEEDED,
    code_pb2.UNIMPLEMENTED,
    code_pb2.INTERNAL,
    code_pb2.UNAVAILABLE,
    code_pb2.DATA_LOSS,
}
_CANCELLED = status_pb2.Status(code=code_pb2.CANCELLED)


class Spans:
    """Makes spans. See tracing.Tracing.

    Args:
        tracer: of OpenTelemetry.
        trace_steps: one step in so many is traced; 0: none.
        now: the driver's clock. Any thread.
    """

    def __init__(self, tracer: Tracer, trace_steps: int, now: Callable[[], float]) -> None:
        self.steps = StepSampler(trace_steps)
        self._tracer = tracer
        self._now = now

    def begin(self, method: str, metadata: Mapping[str, str]) -> "CallSpan":
        """A call has come; of its caller's trace, if it says one."""
        at = time.time_ns()
        span = self._tracer.start_span(
            method,
            propagate.extract(metadata, Context()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
            start_time=at,
        )
        return CallSpan(self._tracer, span, at - round(self._now() * 1e9))


class CallSpan:
    """The span of a call. See tracing.CallTrace.

    Args:
        tracer: of OpenTelemetry.
        span: has begun.
        wall_ns: what the wall clock is ahead of the driver's, in nanoseconds.
    """

    def __init__(self, tracer: Tracer, span: Span, wall_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._wall_ns = wall_ns
        self._refused = self._events = 0
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id)
        self.span_id = trace.format_span_id(context.span_id)
        self.recorded = span.is_recording()

    def step(self, step: TracedStep) -> None:
        """A step, with what it waited for."""
        at = step.times
        batch = {"conveyor.batch.rows": step.rows}
        whole = self._child(
            self._span,
            "step",
            (at.accepted_at, at.told_at),
            {
                "conveyor.model": step.model,
                "conveyor.version": step.version,
                "conveyor.session.id": step.session_id,
                "conveyor.step.seq": step.seq,
                "conveyor.step.time_steps": step.time_steps,
                **batch,
                **({"error.type": step.reason} if step.reason else {}),
            },
            failed=bool(step.reason),
        )
        self._child(whole, "queue", (at.accepted_at, at.taken_at))
        self._child(self._child(whole, "batch", (at.taken_at, at.done_at), batch), "run", (at.ran_from, at.ran_to))
        self._child(whole, "reply", (at.done_at, at.told_at))

    def refused(self, status: status_pb2.Status, count: int = 1) -> None:
        """Counts it, and tells of the first ones."""
        self._refused += count
        if self._events < MOST_EVENTS:
            self._events += 1
            self._span.add_event("refused", {"conveyor.reason": _reason(status), "conveyor.count": count})

    def counted(self, sessions: int, steps: int) -> None:
        """What the call was used for."""
        self._span.set_attributes({"conveyor.sessions": sessions, "conveyor.steps": steps})

    def end(self, status: status_pb2.Status | None) -> None:
        """The call has ended; by its client, who does not say, is as good as cancelled."""
        status = _CANCELLED if status is None else status
        span, code = self._span, code_pb2.Code.Name(code_pb2.Code.ValueType(status.code))
        span.set_attribute("rpc.response.status_code", code)
        if self._refused:
            span.set_attribute("conveyor.refused", self._refused)
        if status.details:
            span.set_attribute("conveyor.reason", _reason(status))
        if status.code in _FAILURES:
            # The message is the caller's: it may name what nobody else is to know.
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", code)
        span.end()

    def _child(
        self,
        parent: Span,
        name: str,
        times: tuple[float, float],
        attributes: Mapping[str, str | int] | None = None,
        *,
        failed: bool = False,
    ) -> Span:
        """A span that is over. Its parent may be, too: a call can end before what was in it is told."""
        began, ended = (self._wall_ns + round(at * 1e9) for at in times)
        context = trace.set_span_in_context(parent, Context())
        span = self._tracer.start_span(name, context, SpanKind.INTERNAL, attributes, start_time=began)
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)
        return span


def _reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")
