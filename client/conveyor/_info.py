"""What the server says about sessions and models, and what it is asked for, in Python's own types."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from conveyor_proto.v1 import model_pb2, spec_pb2
from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf import timestamp_pb2

Durability = Literal["none", "async", "sync"]
DURABILITIES: Mapping[Durability, pb.Durability.ValueType] = {
    "none": pb.DURABILITY_NONE,
    "async": pb.DURABILITY_ASYNC,
    "sync": pb.DURABILITY_SYNC,
}
_NAMES: Mapping[pb.Durability.ValueType, Durability] = {value: name for name, value in DURABILITIES.items()}


def session_options(
    max_in_flight: int | None = None, idle_timeout_s: float | None = None, durability: Durability | None = None
) -> pb.SessionOptions:
    """The contract's message of a session's options; what is None is left to the server.

    Raises:
        ValueError: no such durability.
    """
    options = pb.SessionOptions(max_in_flight=max_in_flight or 0)
    if idle_timeout_s is not None:
        options.idle_timeout.FromNanoseconds(round(idle_timeout_s * 1e9))
    if durability is not None:
        if durability not in DURABILITIES:
            raise ValueError(f"durability is one of {', '.join(DURABILITIES)}, not {durability!r}")
        options.durability = DURABILITIES[durability]
    return options


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as the server described it at one moment.

    Attributes:
        id: the session's id.
        model: name of its model.
        version: version of its model.
        model_digest: digest of the function that the model computes.
        epoch: rises by one whenever a stream attaches the session; of a stored one, from the time of its creation on.
        applied_seq: steps applied.
        applied_time_steps: time steps applied; a chunk of k counts k.
        max_in_flight: steps that may be unanswered at once.
        idle_timeout_s: idle time after which the server closes the session.
        created_at: UTC.
        last_used_at: UTC.
        attached: a stream holds the session.
        oldest_replayable_seq: answers from this step on can still be replayed; 0: none.
        state_bytes: size of its hidden and cell state.
        pending_steps: steps accepted and not yet applied.
        durability: what outlives the server's process, as granted: `none`, `async` or `sync`.
        durable_seq: the last step whose state is in the server's store; 0 without one.
        resident: its state is in the server's memory; otherwise it lies in the store until the next step.
    """

    id: str
    model: str
    version: str
    model_digest: str
    epoch: int
    applied_seq: int
    applied_time_steps: int
    max_in_flight: int
    idle_timeout_s: float
    created_at: datetime
    last_used_at: datetime
    attached: bool
    oldest_replayable_seq: int
    state_bytes: int
    pending_steps: int
    durability: Durability
    durable_seq: int
    resident: bool

    @classmethod
    def of(cls, message: pb.SessionInfo) -> "SessionInfo":
        """Reads the contract's message."""
        return cls(
            id=message.session_id,
            model=message.model,
            version=message.version,
            model_digest=message.model_digest,
            epoch=message.epoch,
            applied_seq=message.applied_seq,
            applied_time_steps=message.applied_time_steps,
            max_in_flight=message.max_in_flight,
            idle_timeout_s=message.idle_timeout.ToNanoseconds() / 1e9,
            created_at=_utc(message.created_at),
            last_used_at=_utc(message.last_used_at),
            attached=message.attached,
            oldest_replayable_seq=message.oldest_replayable_seq,
            state_bytes=message.state_bytes,
            pending_steps=message.pending_steps,
            # A server of before there was durability says nothing.
            durability=_NAMES.get(message.durability, "none"),
            durable_seq=message.durable_seq,
            resident=message.resident,
        )


@dataclass(frozen=True, slots=True)
class Migration:
    """Sessions that have moved to another version of their model.

    Attributes:
        sessions: how many, of those in the server's memory.
        version: where they are.
    """

    sessions: int
    version: str


@dataclass(frozen=True, slots=True)
class RunTime:
    """How long a run of a size took when the model was loaded, the fastest of some.

    Attributes:
        rows: sessions in the run.
        time_steps: of each row.
        run_s: seconds of the run.
    """

    rows: int
    time_steps: int
    run_s: float


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How large the runs of a model may be, chosen by measurement when it was loaded.

    Attributes:
        max_batch: sessions in one run.
        quantum: time steps of one session in one run; longer steps take several.
        max_batch_time_steps: sessions times padded time steps of one run.
        inline_run_s: a run that is expected to take at most this long runs on the thread that serves all streams.
        inline_rows: sessions in a run of one time step that is expected to be so short; 0: not even one.
        given: names of the attributes above that the server's settings gave; the others were chosen.
        measured: what it was chosen by.
    """

    max_batch: int
    quantum: int
    max_batch_time_steps: int
    inline_run_s: float
    inline_rows: int
    given: tuple[str, ...]
    measured: tuple[RunTime, ...]

    @classmethod
    def of(cls, message: model_pb2.BatchPolicy) -> "BatchPolicy":
        """Reads the contract's message."""
        return cls(
            max_batch=message.max_batch,
            quantum=message.quantum,
            max_batch_time_steps=message.max_batch_time_steps,
            inline_run_s=message.inline_run_seconds,
            inline_rows=message.inline_rows,
            given=tuple(name.replace("_seconds", "_s") for name in message.given),
            measured=tuple(RunTime(item.rows, item.time_steps, item.seconds) for item in message.measured),
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model version on the server.

    Attributes:
        name: the model's name.
        version: its version.
        status: `loading`, `ready`, `failed`, or `leaving`: its file was replaced or taken away, and it goes with the
            last of its sessions.
        latest: new sessions that name no version get this one.
        device: `cpu` or `cuda`.
        loaded_at: UTC; None before it is loaded.
        load_s: how long loading and warming took.
        sessions: how many live on it.
        failure: why it could not be loaded; of a ready one, why the file that was put in its place is not served. Empty
            otherwise.
        spec: inputs, outputs, states, layers, provenance and the verifier's figures, as the exporter wrote them.
        batch_policy: how large its runs may be; None before it is loaded.
        checked_vectors: verifier vectors that it was checked by when it was loaded; 0: its file holds none.
    """

    name: str
    version: str
    status: str
    latest: bool
    device: str
    loaded_at: datetime | None
    load_s: float
    sessions: int
    failure: str
    spec: spec_pb2.ModelSpec
    batch_policy: BatchPolicy | None
    checked_vectors: int = 0

    @classmethod
    def of(cls, message: model_pb2.Model) -> "Model":
        """Reads the contract's message."""
        return cls(
            name=message.name,
            version=message.version,
            status=model_pb2.ModelStatus.Name(message.status).removeprefix("MODEL_STATUS_").lower(),
            latest=message.latest,
            device=message.device,
            loaded_at=_utc(message.loaded_at) if message.HasField("loaded_at") else None,
            load_s=message.load_seconds,
            sessions=message.sessions,
            failure=message.failure.message,
            spec=message.spec,
            batch_policy=BatchPolicy.of(message.batch_policy) if message.HasField("batch_policy") else None,
            checked_vectors=message.checked_vectors,
        )


def _utc(moment: timestamp_pb2.Timestamp) -> datetime:
    return moment.ToDatetime(tzinfo=UTC)
