"""Which roles may call what.

Invariant: where callers are asked who they are, a method that is not in the table can be called by nobody; a test
compares the table with the contracts.
"""

from collections.abc import Mapping

from conveyor_server.identity.caller import Role

_SESSIONS, _MODELS, _INFERENCE = (
    "/conveyor.v1.SessionService/",
    "/conveyor.v1.ModelService/",
    "/inference.GRPCInferenceService/",
)
_INFER = frozenset({Role.INFER})
_LOOK = frozenset({Role.INFER, Role.OBSERVE, Role.ADMIN})
_ADMIN = frozenset({Role.ADMIN})
METRICS = "/metrics"

_TABLE = (
    (_INFER, _SESSIONS, "Stream CreateSession Step ForkSession SnapshotSession RestoreSession"),
    (frozenset({Role.INFER, Role.ADMIN}), _SESSIONS, "CloseSession"),
    (_LOOK, _SESSIONS, "GetSession ListSessions"),
    (_LOOK, _MODELS, "ListModels GetModel"),
    (_ADMIN, _MODELS, "LoadModel UnloadModel MigrateSessions"),
    (_INFER, _INFERENCE, "ModelInfer ModelStreamInfer"),
    (
        _LOOK,
        _INFERENCE,
        "ServerMetadata ModelReady ModelMetadata ModelConfig ModelStatistics RepositoryIndex "
        "SystemSharedMemoryStatus CudaSharedMemoryStatus",
    ),
    (
        _ADMIN,
        _INFERENCE,
        "RepositoryModelLoad RepositoryModelUnload SystemSharedMemoryRegister SystemSharedMemoryUnregister "
        "CudaSharedMemoryRegister CudaSharedMemoryUnregister TraceSetting LogSettings",
    ),
)
# Whoever may call each method, by its path; one of the roles is enough.
ROLES: Mapping[str, frozenset[Role]] = {
    METRICS: frozenset({Role.OBSERVE, Role.ADMIN}),
    **{service + method: roles for roles, service, methods in _TABLE for method in methods.split()},
}
# What anybody may ask, as of grpc.health.v1: whoever balances load has no token.
OPEN = frozenset({_INFERENCE + "ServerLive", _INFERENCE + "ServerReady"})
# What changes the server for everybody.
ADMIN_METHODS = frozenset(path for path, roles in ROLES.items() if roles is _ADMIN)
