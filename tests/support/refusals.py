"""What a call that is refused ends with."""

from collections.abc import Awaitable

import grpc
import pytest
from conveyor_proto.reasons import Fault, from_status
from google.rpc import status_pb2


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, Fault]:
    """The code and fault that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return error.code(), from_status(status)
