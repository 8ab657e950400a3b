"""GRPCInferenceService: the Open Inference Protocol beside our own service, on the same port. Translates only."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.metadata import version

from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2
from google.rpc import status_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import Caller, of_call
from conveyor_server.inference import describe, faults
from conveyor_server.inference.call import InferCall
from conveyor_server.inference.infer import Inference
from conveyor_server.inference.parameters import not_offered
from conveyor_server.inference.statistics import Statistics
from conveyor_server.inference.stream import InferStream
from conveyor_server.metrics import Metrics
from conveyor_server.repository import ModelVersion
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.loader import Loader
from conveyor_server.tracing import current
from conveyor_server.transport.ends import Outlet

# Looked up once: it is read from the disk.
_VERSION = version("conveyor")
_EXTENSIONS = ("sequence", "statistics", "model_configuration", "model_repository")
_STATES = {
    model_pb2.MODEL_STATUS_READY: "READY",
    model_pb2.MODEL_STATUS_LOADING: "LOADING",
    model_pb2.MODEL_STATUS_FAILED: "UNAVAILABLE",
}


class InferenceServicer:
    """One method for each call, named as it is. Core thread only.

    Args:
        core: what drives the sessions.
        loader: loads and unloads.
        metrics: what is counted.
        not_ready: why the server is not ready; empty: it is.
    """

    def __init__(self, core: Core, loader: Loader, metrics: Metrics, not_ready: Callable[[], str]) -> None:
        self._core = core
        self._loader = loader
        self._metrics = metrics
        self._not_ready = not_ready
        self._statistics = Statistics(metrics)
        self._inference = Inference(core, self._statistics)

    def to_status(self, fault: Fault) -> status_pb2.Status:
        """A refusal in this protocol's words."""
        return faults.to_status(fault)

    # ------------------------------------------------------------ inference

    async def model_infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """One step of a sequence, or a batch of a model without state.

        A caller that goes away takes back what has not run, unless more of its sequence is behind it.
        """
        answered: asyncio.Future[pb.ModelInferResponse | Fault] = asyncio.get_running_loop().create_future()

        def told(answer: pb.ModelInferResponse | Fault) -> None:
            if not answered.done():
                answered.set_result(answer)

        under_way = self._inference.infer(request, told, of_call(), current())
        try:
            answer = await answered
        except asyncio.CancelledError:
            if under_way is not None:
                under_way.cancel()
            raise
        if isinstance(answer, Fault):
            raise Refused(answer)
        return answer

    def model_infer_call(self, outlet: Outlet, _: Mapping[str, str], caller: Caller) -> InferCall:
        """`model_infer`, for a transport that serves calls as tags."""
        return InferCall(self._inference, self._metrics, outlet, caller)

    def model_stream_infer(self, outlet: Outlet, metadata: Mapping[str, str], caller: Caller) -> InferStream:
        """A stream of requests begins."""
        return InferStream(self._inference, self._metrics, outlet, metadata, caller)

    # ------------------------------------------------------------ server and models

    async def server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """The process answers."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Every model that can be served is warm, and nothing drains."""
        return pb.ServerReadyResponse(ready=not self._not_ready())

    async def server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Which server this is."""
        return pb.ServerMetadataResponse(name="conveyor", version=_VERSION, extensions=_EXTENSIONS)

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Whether a version is served; one that is not known is not."""
        try:
            ready = self._found(request.name, request.version).engine is not None
        except Refused:
            ready = False
        return pb.ModelReadyResponse(ready=ready and not self._core.directory.draining)

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Inputs, outputs and versions of a model."""
        item = self._served(request.name, request.version)
        return describe.metadata(item, [other.version for other in self._versions(item.name)])

    async def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """The settings in force for a model."""
        item = self._served(request.name, request.version)
        return pb.ModelConfigResponse(config=describe.config(item, self._core.directory.limits))

    async def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Counts and durations of a version, of a model's, or of all."""
        if request.name:
            # Refused where it is not known.
            self._found(request.name, request.version)
        return pb.ModelStatisticsResponse(
            model_stats=[
                self._statistics.message(item.serving)
                for item in self._versions(request.name)
                if request.version in {"", item.version}
            ]
        )

    # ------------------------------------------------------------ repository

    async def repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version that is known; with `ready`, those that are served."""
        uses = of_call().uses
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=item.name,
                    version=item.version,
                    state=_STATES[item.status],
                    reason="" if item.failure is None else item.failure.message,
                )
                for item in self._core.repository.versions()
                if uses(item.name) and (item.engine is not None or not request.ready)
            ]
        )

    async def repository_model_load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads the newest version of a model in the folder."""
        if request.parameters:
            raise not_offered(
                "load parameters",
                f"parameters of a load are not supported ({', '.join(sorted(request.parameters))[:200]}): put the "
                "model's files into the server's model folder",
            )
        await self._loader.load(_name(request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Takes all versions of a model out of service, and ends their sequences."""
        name = _name(request.model_name)
        repository = self._core.repository
        items = [item for item in (*repository.versions(), *repository.leaving()) if item.name == name]
        if not items:
            repository.find(name)
        for number in dict.fromkeys(item.version for item in items):
            await self._loader.unload(name, number, force=True)
        return pb.RepositoryModelUnloadResponse()

    # ------------------------------------------------------------ not offered

    async def _no_shared_memory(self, _: object) -> object:
        raise not_offered("shared memory", "shared memory is not supported: send and receive tensors in the messages")

    system_shared_memory_status = _no_shared_memory
    system_shared_memory_register = _no_shared_memory
    system_shared_memory_unregister = _no_shared_memory
    cuda_shared_memory_status = _no_shared_memory
    cuda_shared_memory_register = _no_shared_memory
    cuda_shared_memory_unregister = _no_shared_memory

    async def trace_setting(self, _: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        """Not offered."""
        raise not_offered("trace settings", "trace settings are not supported by this server")

    async def log_settings(self, _: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        """Not offered."""
        raise not_offered(
            "log settings", "log settings are not supported over the wire: start the server with --log-level"
        )

    # ------------------------------------------------------------ within

    def _served(self, name: str, version: str) -> ModelVersion[Engine]:
        item = self._found(name, version)
        # Refused where it is not ready.
        _ = item.serving
        return item

    def _found(self, name: str, version: str) -> ModelVersion[Engine]:
        return self._core.repository.find(name, version, of_call().uses)

    def _versions(self, name: str) -> list[ModelVersion[Engine]]:
        """Versions of a model that are READY, newest last; of all that are there for the caller without a name."""
        uses = of_call().uses
        return [
            item
            for item in self._core.repository.versions()
            if name in {"", item.name} and item.engine is not None and uses(item.name)
        ]


def _name(name: str) -> str:
    if not name:
        raise refuse(e.ERROR_REASON_MESSAGE_INVALID, "model_name is needed: which model is meant?", field="model_name")
    return name
