"""Snapshots: a session's state as bytes that say whether they are whole.

Invariant: what `read` accepts is what `take` wrote, bit for bit; what `states_for` accepts fits the engine's model,
whose digest is the snapshot's, and is finite. What is sealed (see seal) is a serialized Snapshot.
"""

from collections.abc import Sequence

import numpy as np
from conveyor_proto.codec import Array, WireError, decode, encode, to_numpy_dtype
from conveyor_proto.spec import initial_row
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import refuse
from conveyor_server.seal import Seal, invalid
from conveyor_server.sessions.session import Session

FORMAT = 1
PLAIN = Seal()


def take(session: Session, at: Timestamp, seal: Seal = PLAIN) -> bytes:
    """The session's committed state; a fresh session's is its model's initial rows. Core thread only."""
    engine = session.engine
    rows = engine.read(session.lane)
    if rows is None:
        rows = [initial_row(state) for state in engine.spec.states]
    content = session_pb2.Snapshot(
        format=FORMAT,
        model=engine.model,
        version=engine.version,
        model_digest=engine.spec.digest,
        applied_seq=session.applied_seq,
        applied_time_steps=session.applied_time_steps,
        states=[encode(row, state.name) for row, state in zip(rows, engine.spec.states, strict=True)],
        taken_at=at,
    )
    return seal.close(content.SerializeToString(deterministic=True))


def read(data: bytes, seal: Seal = PLAIN) -> session_pb2.Snapshot:
    """The content of what `take` gave.

    Raises:
        Refused: SNAPSHOT_INVALID.
    """
    try:
        content = session_pb2.Snapshot.FromString(seal.open(data))
    except DecodeError:
        raise invalid("cannot be read") from None
    if content.format != FORMAT:
        raise invalid(f"has format {content.format}, and this server reads {FORMAT}")
    return content


def states_for(content: session_pb2.Snapshot, engine: Engine) -> Sequence[Array]:
    """The snapshot's states for that engine: one `[*shape]` array for each of ModelSpec.states.

    Raises:
        Refused: MODEL_MISMATCH, for another model; SNAPSHOT_INVALID, where states do not fit or are not finite.
    """
    spec = engine.spec
    if content.model_digest != spec.digest:
        raise refuse(
            e.ERROR_REASON_MODEL_MISMATCH,
            f"the snapshot is of model {content.model} version {content.version}, and {engine.model} version "
            f"{engine.version} is another model: load the model it was taken of, or name its version",
            model=engine.model,
            version=engine.version,
            digest=spec.digest,
            snapshot_digest=content.model_digest,
        )
    if len(content.states) != len(spec.states):
        raise invalid(f"has {len(content.states)} states, and the model has {len(spec.states)}")
    return [_state(tensor, state) for tensor, state in zip(content.states, spec.states, strict=True)]


def _state(tensor: tensor_pb2.Tensor, state: spec_pb2.StateSpec) -> Array:
    try:
        array = decode(tensor)
    except WireError as error:
        raise invalid(f"has a broken state {state.name!r}: {error.fault.message}") from None
    if tensor.name != state.name or array.dtype != to_numpy_dtype(state.dtype) or array.shape != tuple(state.shape):
        raise invalid(f"has {tensor.name!r} {array.dtype} {list(array.shape)} in the place of state {state.name!r}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise invalid(f"holds a state {state.name!r} that is not finite")
    return array
