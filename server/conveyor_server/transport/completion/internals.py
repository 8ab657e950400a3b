"""What is used of grpcio beyond its public API, looked for before anything is begun.

Invariant: these tables name all that this package uses of the module, of cygrpc and of a server's state, and nothing
else: a test compares them with its source.
"""

from typing import Any

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # no types are published for it

from conveyor_server.transport.selftest import Unusable

TESTED = ("1.85.1", "1.85.3")
OF_MODULE = (
    *("_CANCELLED", "_SHUTDOWN_TAG", "_GenericMethod", "_RegisteredMethod", "_ServerStage", "_handle_call"),
    *("_is_rpc_state_active", "_on_call_completed", "_stop_serving"),
)
OF_CYGRPC = (
    *("CompletionType", "ReceiveMessageOperation", "SendInitialMetadataOperation", "SendMessageOperation"),
    *("SendStatusFromServerOperation", "StatusCode"),
)
OF_STATE = (
    *("active_rpc_count", "completion_queue", "due", "generic_handlers", "interceptor_pipeline", "lock"),
    *("registered_method_handlers", "rpc_states", "server", "stage", "thread_pool"),
)


def state_of(server: grpc.Server) -> Any:
    """The state of a server that was made by grpc.server.

    Raises:
        Unusable: this grpcio lacks something; the message says what.
    """
    state = getattr(server, "_state", None)
    for what, where, names in (
        ("grpc._server", _server, OF_MODULE),
        ("cygrpc", cygrpc, OF_CYGRPC),
        ("grpc.server's state", state, OF_STATE),
    ):
        missing = [name for name in names if not hasattr(where, name)]
        if missing:
            raise Unusable(f"{what} of grpcio {grpc.__version__} has no {', '.join(missing)}")
    return state
