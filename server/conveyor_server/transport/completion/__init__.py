"""grpcio's completion queue, driven by the core's own thread: the one place that leans on grpcio's internals.

The public `grpc.server` keeps the ports, unary calls and their threads, health, reflection, interceptors and
`stop(grace)`. What differs: no thread of grpcio's serves its queue, `turn` does; 64 accepts are posted instead of one,
so that streams that are opened by the thousand at once are all taken; and a Stream call, marked non-blocking as
grpcio's own health service marks `Watch`, never gets a thread: its reads and writes are tags of the same queue.

What is used beyond the public API: `Server._state` with `completion_queue`, `server`, `lock`, `rpc_states`, `due`,
`stage`, `thread_pool`, `generic_handlers` and `registered_method_handlers`; `_server._handle_call` with these
arguments; `_RequestIterator._state` and `._call`; a call's `due`, `callbacks`, `statused` and `condition`;
`experimental_non_blocking` and `experimental_thread_pool` on a behaviour; cygrpc's operations,
`Call.start_server_batch`, `Server.request_call` and `request_registered_call`. TESTED names the versions that the tests
of this project have run on; on any version, the self-test decides.

Invariants: one send and one receive of a call are under way at most; an exception in a stream ends that stream only; a
call is let go once its last tag has come back.
"""

from conveyor_server.transport.completion.internals import TESTED
from conveyor_server.transport.completion.server import CompletionServer
from conveyor_server.transport.completion.stream import Stream

__all__ = ["TESTED", "CompletionServer", "Stream"]
