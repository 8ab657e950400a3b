"""ModelService: what is served, and what should be. Translates only."""

from conveyor_proto.reasons import to_status
from conveyor_proto.v1 import model_pb2 as pb

from conveyor_server.engine.engine import Engine
from conveyor_server.identity.caller import of_call
from conveyor_server.repository import ModelVersion, Prepared
from conveyor_server.servicers.convert import missing, sessions_on
from conveyor_server.servicers.core import Core
from conveyor_server.servicers.loader import Loader

# Settings that the contract names otherwise: durations end in `_s` here and in `_seconds` there.
_GIVEN = {"inline_run_s": "inline_run_seconds"}


class ModelServicer:
    """One method for each unary call, named as it is. Core thread only."""

    def __init__(self, core: Core, loader: Loader) -> None:
        self._core = core
        self._loader = loader

    async def list_models(self, _: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Every version that is there for the caller, those that failed to load and those that leave included."""
        uses = of_call().uses
        return pb.ListModelsResponse(
            models=[
                self._model(item)
                for item in (*self._core.repository.versions(), *self._core.repository.leaving())
                if uses(item.name)
            ]
        )

    async def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """Describes a version."""
        repository, uses = self._core.repository, of_call().uses
        named = uses(request.name) and request.digest
        item = repository.with_digest(request.name, request.version, request.digest) if named else None
        return pb.GetModelResponse(model=self._model(item or repository.find(request.name, request.version, uses)))

    async def load_model(self, request: pb.LoadModelRequest) -> pb.LoadModelResponse:
        """Loads, warms and checks a version from the folder."""
        item = await self._loader.load(request.name, request.version, again=request.reload)
        return pb.LoadModelResponse(model=self._model(item))

    async def unload_model(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        """Takes a version out of service."""
        if not request.version:
            raise missing("version", "is needed to unload a model")
        closed = await self._loader.unload(request.name, request.version, force=request.force)
        return pb.UnloadModelResponse(closed_sessions=closed)

    async def migrate_sessions(self, request: pb.MigrateSessionsRequest) -> pb.MigrateSessionsResponse:
        """Moves sessions to another version of their model."""
        if not request.name:
            raise missing("name", "is needed to migrate sessions")
        moved, version = self._loader.migrate(request.name, request.from_version, request.to_version)
        return pb.MigrateSessionsResponse(migrated_sessions=moved, to_version=version)

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
            model.checked_vectors = item.prepared.checked
            model.batch_policy.CopyFrom(_policy(item.prepared))
        return model


def _policy(prepared: Prepared) -> pb.BatchPolicy:
    policy = prepared.policy
    return pb.BatchPolicy(
        max_batch=policy.max_batch,
        quantum=policy.quantum,
        max_batch_time_steps=policy.max_batch_time_steps,
        inline_run_seconds=policy.inline_run_s,
        inline_rows=policy.inline_rows,
        given=[_GIVEN.get(name, name) for name in sorted(policy.given)],
        measured=[
            pb.RunTime(rows=rows, time_steps=time_steps, seconds=run_s)
            for (rows, time_steps), run_s in sorted(prepared.step_s.items())
        ],
    )
