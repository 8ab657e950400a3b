"""What tests of sessions in a store have in common."""

import asyncio
from typing import Any

from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.keeper.policy import KeeperPolicy

ASYNC, SYNC, NONE = pb.DURABILITY_ASYNC, pb.DURABILITY_SYNC, pb.DURABILITY_NONE


def policy(replica: str = "r1", **fields: Any) -> KeeperPolicy:
    """Of a server that is in a hurry to write."""
    return KeeperPolicy(replica, "a runtime", **{"checkpoint_s": 0.02, **fields})


def options(durability: pb.Durability.ValueType, **fields: Any) -> pb.SessionOptions:
    """What a session asks for."""
    return pb.SessionOptions(durability=durability, **fields)


async def durable_seq(stream: Any, handle: int) -> int:
    """Has a session written, and returns what it is told."""
    await stream.send(flush=pb.FlushSession(handle=handle))
    durable = await stream.expect("durable")
    assert int.from_bytes(durable.handles, "little") == handle
    return int.from_bytes(durable.seqs, "little")


async def turn() -> None:
    """Lets the server do something."""
    await asyncio.sleep(0.001)
