"""What can be set, each field with its documentation.

Invariant: every field is documented here and nowhere else. Where values come from is configuration's, and what cannot
be set together is coherence's.
"""

import dataclasses
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

# How a switch is written, off first, and a number that the server is to choose.
SWITCH = ("off", "on")
AUTO = "auto"
Device: TypeAlias = Literal["cpu", "cuda", "auto"]
Transport: TypeAlias = Literal["auto", "aio", "cq"]
Durability: TypeAlias = Literal["none", "async", "sync"]
AutoDurability: TypeAlias = Literal["auto", "none", "async", "sync"]
OnNewVersion: TypeAlias = Literal["pin", "migrate", "close"]
Admin: TypeAlias = Literal["auto", "on", "off"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "json", "text"]


@dataclass(frozen=True, slots=True)
class _Doc:
    help: str
    least: float = 0.0
    # None is spelled `auto`.
    auto: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """A server's settings; the text of each is its documentation."""

    models: Annotated[Path, _Doc("folder of NAME/VERSION/model.onnx")] = Path("models")
    host: Annotated[str, _Doc("address to listen on; this machine only unless given: containers need 0.0.0.0")] = (
        "127.0.0.1"
    )
    port: Annotated[int, _Doc("port of the gRPC services; 0 takes one that is free", 0)] = 50051
    metrics_port: Annotated[int, _Doc("port of /metrics, /healthz and /readyz; 0 takes one that is free", 0)] = 9464
    metrics_host: Annotated[str, _Doc("address of the metrics port. Empty: host")] = ""
    tls_certificate: Annotated[
        Path | None,
        _Doc("PEM file of the certificate chain; with tls_key, the gRPC port is TLS. Read anew when it changes"),
    ] = None
    tls_key: Annotated[
        Path | None, _Doc("PEM file of the certificate's private key, without a password. Read anew when it changes")
    ] = None
    tls_client_ca: Annotated[
        Path | None, _Doc("PEM file of the authority whose clients alone are let in. Read anew when it changes")
    ] = None
    access: Annotated[
        Path | None,
        _Doc(
            "TOML file of who may call: tokens, certificates, JWT issuer, roles, tenants (docs/security.md). Read anew "
            "when it changes. Without one, nobody is asked who they are"
        ),
    ] = None
    allow_anonymous: Annotated[
        bool,
        _Doc("without access and tls_client_ca: listen where other machines can reach the port, and let anybody call"),
    ] = False
    admin: Annotated[
        Admin,
        _Doc(
            "whether calls that change what is served (LoadModel and the like) are answered. auto: where callers are "
            "asked who they are, or are on this machine"
        ),
    ] = "auto"
    snapshot_keys: Annotated[
        Path | None,
        _Doc(
            "file of keys that snapshots are signed with: the first signs, all are accepted, and nothing else is then. "
            "Read anew when it changes. Without one, snapshots have a checksum, and a client could make one up"
        ),
    ] = None
    reflection: Annotated[bool, _Doc("whether the gRPC port says which services it has, for tools such as grpcurl")] = (
        True
    )
    device: Annotated[Device, _Doc("where models run; cuda refuses to start without a CUDA provider that works")] = (
        "auto"
    )
    threads: Annotated[int, _Doc("threads of one operator on the CPU", 1)] = 1
    max_sessions: Annotated[int, _Doc("sessions of all models together; each model's slab has room for so many", 1)] = (
        10_000
    )
    max_state_bytes: Annotated[
        int,
        _Doc("memory for all models' states together, each at max_sessions; a model beyond it is refused; 0: any", 0),
    ] = 0
    idle_timeout_s: Annotated[float, _Doc("idle time after which a session that asks for none is closed", 0.001)] = (
        600.0
    )
    max_idle_timeout_s: Annotated[float, _Doc("the longest idle time that a session may ask for", 0.001)] = 86_400.0
    in_flight: Annotated[int, _Doc("unanswered steps of a session that asks for none", 1)] = 16
    max_in_flight: Annotated[int, _Doc("the most unanswered steps that a session may ask for", 1)] = 256
    step_timeout_s: Annotated[float, _Doc("how long a step may wait before it begins, if it does not say", 0.001)] = (
        30.0
    )
    max_queue_s: Annotated[float, _Doc("a step that would wait longer, by what past runs took, is refused", 0.001)] = (
        2.0
    )
    pipeline_queue_s: Annotated[
        float,
        _Doc(
            "a session with two messages unanswered (one that runs, and one to follow it) gets no third one accepted "
            "while the model has more work than this, or than two full runs take; 0.01 keeps latencies low where "
            "senders do not slow down by themselves. Many sessions that come at once are not refused by it",
            0.001,
        ),
    ] = 1.0
    max_batch: Annotated[
        int | None, _Doc("sessions in one run of a model. auto: by what its runs take when it is loaded", 1, auto=True)
    ] = None
    max_batch_time_steps: Annotated[
        int | None, _Doc("sessions times time steps in one run of a model. auto: as max_batch", 1, auto=True)
    ] = None
    quantum: Annotated[
        int | None,
        _Doc("time steps of one session in one run; longer steps take several. auto: as max_batch", 1, auto=True),
    ] = None
    max_time_steps: Annotated[int, _Doc("time steps of one step", 1)] = 4096
    max_message_bytes: Annotated[int, _Doc("size of one request; a larger one ends its call", 1024)] = 16 << 20
    max_streams_per_connection: Annotated[
        int, _Doc("calls that one connection may have open; more wait at the client", 1)
    ] = 10_000
    handshake_timeout_s: Annotated[
        float, _Doc("how long a new connection may take until it speaks HTTP/2, TLS included; then it is dropped", 0.1)
    ] = 20.0
    max_messages_per_s: Annotated[
        float,
        _Doc(
            "messages a second that are read of a tenant's streams together, and of no tenant's each; more wait "
            "unread, and nothing is refused for it. 0: any number",
            0,
        ),
    ] = 0.0
    max_outgoing_bytes: Annotated[int, _Doc("unsent answers of a stream beyond which no request is read", 1024)] = (
        4 << 20
    )
    inline_run_s: Annotated[
        float | None, _Doc("runs up to this long run on the core thread, longer on their own. auto: 4 ms", 0, auto=True)
    ] = None
    store: Annotated[
        str,
        _Doc(
            "where sessions are kept: memory; sqlite:PATH, a file on this machine; or valkey://HOST:PORT/DB (Redis 7 "
            "too), for several servers"
        ),
    ] = "memory"
    durability: Annotated[
        AutoDurability,
        _Doc("what outlives the process of a session that does not say. auto: none with memory, async with a store"),
    ] = "auto"
    min_durability: Annotated[Durability, _Doc("the least durable that a session is; less is raised to it")] = "none"
    max_durability: Annotated[
        AutoDurability,
        _Doc("the most durable that a session may ask to be. auto: none with memory, sync with a store"),
    ] = "auto"
    checkpoint_ms: Annotated[int, _Doc("async: milliseconds after which a session that was stepped is written", 1)] = (
        250
    )
    checkpoint_steps: Annotated[int, _Doc("async: steps after which a session is written, if it is not before", 1)] = 64
    max_undurable_s: Annotated[
        float, _Doc("async: how long sessions go on while the store is away; then their steps are refused", 0)
    ] = 30.0
    sync_patience_s: Annotated[
        float, _Doc("sync: how long an answer waits for the store before its step is refused as unavailable", 0)
    ] = 2.0
    store_timeout_s: Annotated[float, _Doc("how long the store may take to answer before it counts as away", 0.01)] = (
        1.0
    )
    passivate_after_s: Annotated[
        float,
        _Doc(
            "with a store: idle time after which a session's state leaves memory, and comes back with its next step", 0
        ),
    ] = 60.0
    session_ttl_s: Annotated[
        float, _Doc("how long a session in a store is kept that nobody uses; sessions may ask for less", 0.001)
    ] = 2_592_000.0
    max_stored_sessions: Annotated[int, _Doc("sessions that the store may hold; 0: any number", 0)] = 0
    max_sessions_per_model: Annotated[int, _Doc("sessions of one model that the store may hold; 0: any number", 0)] = 0
    max_sessions_per_tenant: Annotated[
        int,
        _Doc(
            "sessions of one tenant in the store, and in this server's memory, unless access says another number for "
            "it; 0: any number",
            0,
        ),
    ] = 0
    on_new_version: Annotated[
        OnNewVersion,
        _Doc(
            "what becomes of a model's sessions when a newer version of it is loaded, or their version's file is "
            "replaced or gone: pin, they stay on theirs until they end; migrate, they move, where inputs, outputs and "
            "states are equal; close, they are closed"
        ),
    ] = "pin"
    watch: Annotated[
        float,
        _Doc(
            "seconds between looks at the models' folder, to take up what is new, changed or gone while serving "
            "(docs/models.md); 0: it is looked at when the server starts, and when LoadModel asks",
            0,
        ),
    ] = 0.0
    replica: Annotated[
        str, _Doc("this server's name among those that share a store, for people. Empty: made of host and process")
    ] = ""
    workers: Annotated[
        int,
        _Doc(
            "processes that share the gRPC port, each with its own models, its own sessions in memory (max_sessions is "
            "of each) and its own metrics port (metrics_port, the next, ...). With a store, each takes over another's "
            "sessions as other servers do",
            1,
        ),
    ] = 1
    transport: Annotated[
        Transport,
        _Doc("cq, the fast one on grpcio's completion queue; aio, on its public API; auto: cq where it works"),
    ] = "auto"
    diagnostics: Annotated[
        bool, _Doc("for load tests: echo streams, and a twin NAME.null of each model that runs nothing")
    ] = False
    drain_notice_s: Annotated[
        float,
        _Doc(
            "after SIGTERM, time between health turning NOT_SERVING and streams being sent away, so that proxies have "
            "stopped sending by then",
            0,
        ),
    ] = 0.0
    drain_s: Annotated[float, _Doc("time to finish what is in flight after SIGTERM", 0)] = 20.0
    log_level: Annotated[LogLevel, _Doc("what is logged to standard error")] = "info"
    traces: Annotated[
        bool,
        _Doc(
            "spans of calls and of sampled steps go to an OpenTelemetry collector; needs conveyor[otel]. Which calls "
            "are traced says OTEL_TRACES_SAMPLER: all, but those of which their caller says otherwise"
        ),
    ] = False
    trace_steps: Annotated[
        int, _Doc("of the calls that are traced, one step in so many has spans of its own, by chance; 0: none", 0)
    ] = 1000
    otlp_metrics: Annotated[
        bool, _Doc("what /metrics has goes to an OpenTelemetry collector too, in the same names; needs conveyor[otel]")
    ] = False
    otlp_endpoint: Annotated[
        str,
        _Doc(
            "the collector: http://HOST:4317, or https:// for TLS. Empty: OTEL_EXPORTER_OTLP_ENDPOINT, or "
            "http://localhost:4317"
        ),
    ] = ""
    log_format: Annotated[
        LogFormat,
        _Doc("how it is logged: json, an object a line; text, for people; auto: text on a terminal, json elsewhere"),
    ] = "auto"


@dataclass(frozen=True, slots=True)
class Field:
    """A setting.

    Attributes:
        name: of the field of Settings; the flag and the variable are made of it.
        type: of its values.
        default: its value where nothing is said.
        doc: what it is for, and the least that it may be.
    """

    name: str
    type: Any
    default: Any
    doc: _Doc

    @property
    def flag(self) -> str:
        """On the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> Any:
        """The type of a value that is not None."""
        return next((kind for kind in get_args(self.type) if kind in {int, float}), self.type)

    @property
    def choices(self) -> Sequence[str]:
        """The words that it can be; none: it is no word."""
        return [choice for choice in get_args(self.type) if isinstance(choice, str)]

    @property
    def metavar(self) -> str:
        """What stands for its value in a command line's help."""
        words = self.choices or (SWITCH if self.type is bool else ())
        return "|".join(words) or self.name.rpartition("_")[2].upper()

    def text(self, value: object) -> str:
        """A value as it is written on a command line; "": it is not set."""
        if value is None:
            return AUTO if self.doc.auto else ""
        return SWITCH[value] if isinstance(value, bool) else str(value)


def is_loopback(host: str) -> bool:
    """Only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fields() -> Iterator[Field]:
    for field in dataclasses.fields(Settings):
        base, doc = get_args(field.type)
        yield Field(field.name, base, field.default, doc)


FIELDS = {field.name: field for field in _fields()}
