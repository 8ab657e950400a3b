"""Client SDK of Conveyor: numpy in, numpy out, the state stays on the server.

One session, token by token:

    import conveyor

    with conveyor.connect("localhost:50051") as client:
        with client.session("charlm") as s:
            y = s.step(x)                    # x: one time step [*shape], or a chunk [time, *shape]
            for y in s.stream(chunks):       # several on their way at once, answered in order
                ...

A session outlives its connection. The SDK resumes it by itself after a cut, and applies no input twice; another process
resumes it by its id:

    s = client.session("charlm", session_id="user-7", resume="or-create", detach_on_exit=True)

It outlives its server too, where that has a store. What the store does not have yet when a server dies, the SDK sends
again to the one that takes over; nothing is lost, and no answer comes twice:

    s = client.session("charlm", durability="async")
    for y in s.stream(chunks):               # across kill -9, deploys and failovers
        ...
    s.flush()                                # every step so far is in the store

A gateway's whole population of sessions steps in one call, over one stream, in columns:

    with client.population("telemetry", 500) as p:
        y = p.step(x)                        # [500, *shape] in, [500, *shape] out
        y = p.step(x[:3], rows=[7, 1, 44])   # some of them
        try:
            y = p.step(list_of_chunks)       # of any lengths
        except conveyor.RowsFailed as error:
            error.errors, error.outputs      # which rows failed; what the others answered

Branch a session, or carry it elsewhere:

    twin = s.fork()
    later = client.restore(s.snapshot())

Errors are classes, not codes: `SessionExpired`, `InvalidInput`, `Overloaded` ... all of them `ConveyorError` with
`.reason`, `.metadata` and `.retry_s`. The same client for asyncio is `conveyor.aio`.
"""

from collections.abc import Sequence
from importlib.metadata import version as _version
from typing import Any

from conveyor import aio
from conveyor._blocking.client import Client
from conveyor._blocking.population import Population
from conveyor._blocking.session import Session
from conveyor._client import AsyncClient
from conveyor._info import BatchPolicy, Migration, Model, RunTime, SessionInfo
from conveyor._io.blocking import BlockingIo as _BlockingIo
from conveyor._io.channel import TLS
from conveyor._population import AsyncPopulation
from conveyor._session import AsyncSession
from conveyor._settings import Settings as _Settings
from conveyor._settings import Token as _Token
from conveyor.errors import (
    CallTimeout,
    ClientClosed,
    ConnectionLost,
    ConveyorError,
    CreditExceeded,
    Draining,
    InvalidInput,
    InvalidSessionId,
    ModelFailed,
    ModelInUse,
    ModelInvalid,
    ModelMismatch,
    ModelNotFound,
    ModelNotReady,
    NotDurable,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    RecordInvalid,
    RowsFailed,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SessionsExhausted,
    SessionTakenOver,
    SnapshotInvalid,
    StateNonFinite,
    StepAborted,
    StepAnswerEvicted,
    StepCancelled,
    StepConflict,
    StepFailed,
    StepGap,
    StepTimeout,
    StoreUnavailable,
    Unauthenticated,
)

__version__ = _version("conveyor")

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncPopulation",
    "AsyncSession",
    "BatchPolicy",
    "CallTimeout",
    "Client",
    "ClientClosed",
    "ConnectionLost",
    "ConveyorError",
    "CreditExceeded",
    "Draining",
    "InvalidInput",
    "InvalidSessionId",
    "Migration",
    "Model",
    "ModelFailed",
    "ModelInUse",
    "ModelInvalid",
    "ModelMismatch",
    "ModelNotFound",
    "ModelNotReady",
    "NotDurable",
    "Overloaded",
    "PermissionDenied",
    "Population",
    "ProtocolError",
    "RecordInvalid",
    "RowsFailed",
    "RunTime",
    "Session",
    "SessionClosed",
    "SessionExists",
    "SessionExpired",
    "SessionInfo",
    "SessionNotFound",
    "SessionTakenOver",
    "SessionsExhausted",
    "SnapshotInvalid",
    "StateNonFinite",
    "StepAborted",
    "StepAnswerEvicted",
    "StepCancelled",
    "StepConflict",
    "StepFailed",
    "StepGap",
    "StepTimeout",
    "StoreUnavailable",
    "Unauthenticated",
    "__version__",
    "aio",
    "connect",
]


def connect(
    target: str,
    *,
    tls: TLS | None = None,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 5.0,
    resume_timeout_s: float = 30.0,
    resend_buffer_bytes: int = 8 << 20,
    streams_per_client: int = 1,
    keepalive_s: float | None = 30.0,
    token: _Token | None = None,
    metadata: Sequence[tuple[str, str]] = (),
    channel_options: Sequence[tuple[str, Any]] = (),
) -> Client:
    """A client of the server at `target`. Returns at once; the first call connects.

    Args:
        target: `host:port`, or any gRPC target.
        tls: None: not encrypted.
        timeout_s: bounds each unary call, opening a session, and waiting for an answer over a standing connection.
        connect_timeout_s: for how long an unreachable server is tried, before it was first reached.
        resume_timeout_s: for how long a lost connection is tried again before whoever waits gets ConnectionLost; and a
            server's store that does not answer, before StoreUnavailable.
        resend_buffer_bytes: inputs of one session, or population, that are kept here until the server has stored their
            steps (durability `async`), and 4096 steps at most. A step that finds the buffer full waits until more is
            stored; the last one may exceed it.
        streams_per_client: gRPC streams that sessions share; more than one helps only above some 10,000 steps a second.
        keepalive_s: time of silence after which a ping finds out whether the connection is dead; None: never.
        token: shown to the server with every call (`authorization: Bearer ...`): text, or a function that gives the one
            in force, which is asked whenever a stream is opened or a call made, on whichever thread does that. Without
            `tls` it can be read on its way.
        metadata: sent with every call.
        channel_options: gRPC channel options, over the SDK's own.

    Raises:
        ValueError: a setting that cannot be meant.
    """
    settings = _Settings(
        tls=tls,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        resume_timeout_s=resume_timeout_s,
        resend_buffer_bytes=resend_buffer_bytes,
        streams_per_client=streams_per_client,
        keepalive_s=keepalive_s,
        token=token,
        metadata=metadata,
        channel_options=channel_options,
    )
    return Client(AsyncClient(_BlockingIo(target, tls, settings.options), settings))


for _name in __all__:
    # Public names say where to import them from, not where they happen to live.
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
