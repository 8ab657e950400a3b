"""Binds a servicer's methods to a gRPC service: one place where a refusal becomes a status.

Invariant: a caller is told a Fault, or a fixed sentence with an incident's id; never what an exception says.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from conveyor_proto.codec import WireError
from conveyor_proto.reasons import DOMAIN, Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2

from conveyor_server import tracing
from conveyor_server.errors import Refused
from conveyor_server.identity import caller
from conveyor_server.identity.gate import Gate
from conveyor_server.incidents import record
from conveyor_server.metrics import Metrics
from conveyor_server.servicers.core import Core
from conveyor_server.transport.door import Door, metadata_of
from conveyor_server.transport.ends import Opener

STATUS_DETAILS_KEY = "grpc-status-details-bin"

Method: TypeAlias = Callable[[Any], Awaitable[Any]]
Wording: TypeAlias = Callable[[Fault], status_pb2.Status]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Calls:
    """Unary calls under way, so that a drain can wait for them."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self._count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if self._count == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Returns when none is under way."""
        await self._idle.wait()


def unary_handlers(
    service: ServiceDescriptor, servicer: object, calls: Calls, metrics: Metrics, *, gate: Gate, core: Core
) -> dict[str, "grpc.RpcMethodHandler[Any, Any]"]:
    """A handler for every unary method of a service, for grpc.aio: `CreateSession` is `create_session`."""

    def guard(door: Door, method: Method) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            answer = _entered(door, context)
            if answer is not None:
                metrics.refused(answer)
            else:
                with _Traced(core, door, context) as traced:
                    answer = await _answer(method, request, calls, metrics, wording(servicer))
                    traced.answered(answer)
            return await abort(context, answer) if isinstance(answer, status_pb2.Status) else answer

        return call

    return _handlers(service, servicer, gate, guard)


def threaded_handlers(
    service: ServiceDescriptor,
    servicer: object,
    calls: Calls,
    metrics: Metrics,
    *,
    gate: Gate,
    core: Core,
    loop: asyncio.AbstractEventLoop,
) -> dict[str, "grpc.RpcMethodHandler[Any, Any]"]:
    """The same for grpc.server: a call's thread waits for what the core's loop answers."""

    def guard(door: Door, method: Method) -> Callable[[Any, grpc.ServicerContext], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            # The coroutine takes this thread's context along.
            answer = _entered(door, context)
            if answer is not None:
                loop.call_soon_threadsafe(metrics.refused, answer)
            else:
                with _Traced(core, door, context) as traced:
                    answering = _answer(method, request, calls, metrics, wording(servicer))
                    future = asyncio.run_coroutine_threadsafe(answering, loop)
                    # A caller that is gone waits for nothing; once there is an answer, this does nothing.
                    context.add_callback(lambda: _forget(future))
                    answer = future.result()
                    traced.answered(answer)
            if isinstance(answer, status_pb2.Status):
                context.set_trailing_metadata(((STATUS_DETAILS_KEY, answer.SerializeToString()),))
                context.abort(_CODES[answer.code], answer.message)
            return answer

        return call

    return _handlers(service, servicer, gate, guard)


def wording(servicer: object) -> Wording:
    """How a service says no: its servicer's own `to_status`, or everyone's."""
    words: Wording = getattr(servicer, "to_status", to_status)
    return words


def openers(service: ServiceDescriptor, servicer: object) -> dict[str, Opener]:
    """What serves each method of a service that streams both ways: `ModelStreamInfer` is `model_stream_infer`."""
    return {
        method.name: getattr(servicer, _snake(method.name))
        for method in service.methods
        if method.client_streaming and method.server_streaming and hasattr(servicer, _snake(method.name))
    }


def call_openers(service: ServiceDescriptor, servicer: object) -> dict[str, Opener]:
    """What serves unary methods that need no thread of their own: `ModelInfer` is `model_infer_call`, where it is one.

    On the wire such a call is a stream of one message each way.
    """
    return {
        method.name: getattr(servicer, f"{_snake(method.name)}_call")
        for method in service.methods
        if not (method.client_streaming or method.server_streaming) and hasattr(servicer, f"{_snake(method.name)}_call")
    }


def path_of(service: ServiceDescriptor, method: str) -> str:
    """Of a method on the wire."""
    return f"/{service.full_name}/{method}"


def _entered(door: Door, context: Any) -> status_pb2.Status | None:
    """Lets a unary call in, for the rest of this context; or the status to end it with, which is to be counted."""
    guest = door.ask(context)
    if isinstance(guest, status_pb2.Status):
        return guest
    caller.enter(guest.admitted.caller)
    return None


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _handlers(
    service: ServiceDescriptor, servicer: object, gate: Gate, guard: Callable[[Door, Method], Callable[..., Any]]
) -> dict[str, "grpc.RpcMethodHandler[Any, Any]"]:
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        if method.client_streaming or method.server_streaming:
            continue
        door = Door(gate, path_of(service, method.name), wording(servicer))
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            guard(door, getattr(servicer, _snake(method.name))),
            request_deserializer=_reader(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return handlers


class _Traced:
    """A unary call, while it runs in this context; where calls are traced, one of them.

    Args:
        core: says whether they are.
        door: of its method.
        context: of either kind.
    """

    def __init__(self, core: Core, door: Door, context: Any) -> None:
        tracer = core.tracing
        self._trace: tracing.CallTrace | None = None
        self._status: status_pb2.Status | None = None
        if tracer is not None:
            self._trace = tracer.begin(door.method, metadata_of(context))

    def __enter__(self) -> "_Traced":
        tracing.enter(self._trace)
        return self

    def answered(self, answer: object) -> None:
        """The method has answered, or refused; else its caller is gone."""
        self._status = answer if isinstance(answer, status_pb2.Status) else tracing.OK

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:
            tracing.enter(None)
            self._trace.end(self._status)


class _Unreadable:
    """What stands for a message that is none: gRPC would log its own exception, and answer that the server failed."""

    def __init__(self, kind: str) -> None:
        self.fault = Fault(
            e.ERROR_REASON_MESSAGE_INVALID,
            f"the call's message is no {kind}: send what the contract describes",
            {"field": "message"},
        )


async def _refuse(message: _Unreadable) -> NoReturn:
    raise Refused(message.fault)


def _reader(kind: type[Message]) -> Callable[[bytes], Message | _Unreadable]:
    def read(data: bytes) -> Message | _Unreadable:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _Unreadable(kind.DESCRIPTOR.name)

    return read


def _forget(future: "futures.Future[Any]") -> None:
    future.cancel()


async def _answer(method: Method, request: Any, calls: Calls, metrics: Metrics, words: Wording) -> Any:
    """What the method answers, or the Status of its refusal."""
    with calls:
        try:
            return await (_refuse(request) if isinstance(request, _Unreadable) else method(request))
        except (Refused, WireError) as refusal:
            status = words(refusal.fault)
        except Exception as error:  # a defect: logged whole, told by its id
            status = incident_status(error)
    metrics.refused(status)
    return status


def incident_status(error: BaseException) -> status_pb2.Status:
    """What a caller is told of a defect; the log holds the rest."""
    incident = record("a call failed", error)
    status = status_pb2.Status(
        code=code_pb2.INTERNAL, message=f"the server failed unexpectedly: incident {incident} in its log"
    )
    metadata = {"incident": incident}
    call = tracing.current()
    if call is not None:
        metadata["trace_id"] = call.trace_id
    detail = PackedAny()
    detail.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata=metadata))
    status.details.append(detail)
    return status


async def abort(context: Context, status: status_pb2.Status) -> None:
    """Ends a call with a rich status. Always raises grpc.aio.AbortError."""
    trailers = ((STATUS_DETAILS_KEY, status.SerializeToString()),)
    await context.abort(_CODES[status.code], status.message, trailers)
