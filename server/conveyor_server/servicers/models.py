"""ModelService: what is served, and what should be. Translates only."""

from conveyor_proto.reasons import to_status
from conveyor_proto.v1 import model_pb2 as pb

from conveyor_server.engine.engine import Engine
from conveyor_server.repository import ModelVersion
from conveyor_server.servicers.convert import missing, sessions_on
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.loader import Loader


class ModelServicer:
    """One method for each unary call, named as it is. Core thread only."""

    def __init__(self, core: Core, loader: Loader) -> None:
        self._core = core
        self._loader = loader

    async def list_models(self, _: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Every version that is known, those that failed to load included."""
        return pb.ListModelsResponse(models=[self._model(item) for item in self._core.repository.versions()])

    async def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """Describes a version."""
        return pb.GetModelResponse(model=self._model(self._core.repository.find(request.name, request.version)))

    async def load_model(self, request: pb.LoadModelRequest) -> pb.LoadModelResponse:
        """Loads and warms a version from the folder."""
        return pb.LoadModelResponse(model=self._model(await self._loader.load(request.name, request.version)))

    async def unload_model(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        """Takes a version out of service."""
        if not request.version:
            raise missing("version", "is needed to unload a model")
        closed = await self._loader.unload(request.name, request.version, force=request.force)
        return pb.UnloadModelResponse(closed_sessions=closed)

    def _model(self, item: ModelVersion[Engine]) -> pb.Model:
        model = pb.Model(
            name=item.name,
            version=item.version,
            status=item.status,
            latest=self._core.repository.is_latest(item),
            spec=item.spec,
            sessions=sessions_on(item.engine, self._core.directory),
            failure=None if item.failure is None else to_status(item.failure),
        )
        if item.prepared is not None:
            model.device = item.prepared.runner.device
            model.loaded_at.FromNanoseconds(round(item.prepared.loaded_at * 1e9))
            model.load_seconds = item.prepared.load_s
        return model
