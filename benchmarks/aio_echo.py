"""The bare echo on asyncio: what grpc.aio alone costs for the same messages.

A request's own bytes come back. In this contract StepResult and ResultFrame have the fields of Step and StepFrame, and
SessionAttached the handle of AttachSession, so the echo of a request reads as its answer and the client's loop is the
same, whoever answers. Nothing is decoded here.
"""

import asyncio
from typing import Any

import grpc.aio

_SERVICE = "conveyor.v1.SessionService"


async def _echo(_requests: Any, context: Any) -> None:
    # read() and write() cost a little less than async generators.
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


async def main() -> None:
    """Serves until the process is ended; prints its port."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Stream": grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
