"""Unary calls: one row per call, retried where repeating them is harmless."""

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

from conveyor_proto.v1 import model_pb2
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf.message import Message

from conveyor._core.retry import Backoff
from conveyor._io.base import Io
from conveyor._settings import Settings
from conveyor._trace import joined, of_caller
from conveyor.errors import ConnectionLost, Draining, StoreUnavailable

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[R]):
    """One unary method.

    Attributes:
        name: its name in the contract.
        response: type of its answer.
        service: the service that has it.
        package: of the service.
    """

    name: str
    response: type[R]
    service: str = "SessionService"
    package: str = "conveyor.v1"


LIST_MODELS = Method("ListModels", model_pb2.ListModelsResponse, "ModelService")
GET_MODEL = Method("GetModel", model_pb2.GetModelResponse, "ModelService")
LOAD_MODEL = Method("LoadModel", model_pb2.LoadModelResponse, "ModelService")
UNLOAD_MODEL = Method("UnloadModel", model_pb2.UnloadModelResponse, "ModelService")
MIGRATE_SESSIONS = Method("MigrateSessions", model_pb2.MigrateSessionsResponse, "ModelService")
GET_SESSION = Method("GetSession", pb.GetSessionResponse)
LIST_SESSIONS = Method("ListSessions", pb.ListSessionsResponse)
FORK_SESSION = Method("ForkSession", pb.ForkSessionResponse)
SNAPSHOT_SESSION = Method("SnapshotSession", pb.SnapshotSessionResponse)
RESTORE_SESSION = Method("RestoreSession", pb.RestoreSessionResponse)
CLOSE_SESSION = Method("CloseSession", pb.CloseSessionResponse)


class Calls:
    """Makes unary calls for one client."""

    def __init__(self, io: Io, settings: Settings) -> None:
        self._io = io
        self._settings = settings

    async def __call__(
        self,
        method: Method[R],
        request: Message,
        *,
        session_id: str = "",
        timeout_s: float | None = None,
        repeatable: bool = True,
    ) -> R:
        """Calls, and calls again while no server or no store of its is there, for `connect_timeout_s`.

        Args:
            method: what to call.
            request: its message.
            session_id: travels as metadata, so that a proxy can find the session's server.
            timeout_s: of each try; None: the client's.
            repeatable: calling twice does no more than calling once.

        Raises:
            ConveyorError: by the server's reason.
        """
        backoff = Backoff(self._settings.policy)
        path = f"/{method.package}.{method.service}/{method.name}"
        bound_s = self._settings.timeout_s if timeout_s is None else timeout_s
        while True:
            try:
                metadata = joined(self._settings.headers(session_id), of_caller())
                return await self._io.call(path, request, method.response, bound_s, metadata)
            except (ConnectionLost, Draining, StoreUnavailable) as error:
                chance = random.random()  # noqa: S311 - jitter, no secret
                delay_s = backoff.failed(self._io.now_s(), chance, at_least_s=error.retry_s or 0.0)
                if delay_s is None or not repeatable:
                    raise
            await self._io.signal().wait(delay_s)
