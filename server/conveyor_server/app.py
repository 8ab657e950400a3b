"""The composition root: what is made of what, in which order it starts, and how it stops.

Invariant: the server is ready only while every model that could be loaded is warm and nothing drains; it stops in the
order health, doors, streams, calls, runs, ports, so that nothing accepted is lost while there is time.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator

from conveyor_proto.inference import service_pb2
from conveyor_proto.v1 import model_pb2, session_pb2

from conveyor_server import compiled
from conveyor_server.banner import banner, offers_admin
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.errors import StartError
from conveyor_server.http import MetricsServer
from conveyor_server.identity.gate import Gate
from conveyor_server.inference.service import InferenceServicer
from conveyor_server.keeper.beat import Beat
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.metrics import Metrics, Sample
from conveyor_server.repository import Overrides, Prepared, Repository
from conveyor_server.repository.policy import INLINE_RUN_S, MAX_BATCH
from conveyor_server.runner.budget import StateBudget
from conveyor_server.runner.fingerprint import fingerprint
from conveyor_server.runner.onnx_runner import open_runner
from conveyor_server.runner.provider import why_no_cuda
from conveyor_server.seal import Seal
from conveyor_server.servicers.loader import Loader
from conveyor_server.servicers.models import ModelServicer
from conveyor_server.servicers.session import SessionServicer
from conveyor_server.servicers.watch import Watch
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.settings import Settings
from conveyor_server.store.opening import open_store
from conveyor_server.telemetry.opening import Telemetry, open_telemetry
from conveyor_server.transport.certificates import Tls
from conveyor_server.transport.choice import Transport, after_sending, deferral, open_transport
from conveyor_server.transport.expiry import Expiry
from conveyor_server.transport.loop import Driver
from conveyor_server.transport.port import WireOptions

_log = logging.getLogger("conveyor")
_SESSIONS = session_pb2.DESCRIPTOR.services_by_name["SessionService"]
_INFERENCE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_MODELS = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What the ports and threads get for their own end, at most, out of drain_s.
_LAST_S = 0.5
# With a store: how long a thread may keep the interpreter from another that waits for it. The store's thread needs it
# for some microseconds at a time, and at the default, 5 ms, each of these waited as long as a whole turn of the core's:
# one commit of 120 sessions took 3.8 ms instead of 3.1, and sync answered a fifth fewer tokens.
_SWITCH_S = 1e-4


class App:
    """A server in one process. Made and run on one event loop, whose thread is the core thread.

    Args:
        shared_port: the gRPC port is held by other processes of this server too.
    """

    def __init__(self, settings: Settings, *, shared_port: bool = False) -> None:
        self.settings = settings
        self.shared_port = shared_port
        self.metrics = Metrics()
        self.directory = Directory(_session_limits(settings))
        self.repository = _repository(settings)
        self.driver = Driver(
            self.directory,
            self.repository,
            self.metrics,
            inline_run_s=INLINE_RUN_S if settings.inline_run_s is None else settings.inline_run_s,
            max_time_steps=settings.max_time_steps,
            defer=deferral(),
            afterwards=after_sending(),
        )
        self.driver.store = _beat(settings, self.driver, one_of_many=shared_port)
        self.loader = Loader(
            self.driver,
            self.metrics,
            diagnostics=settings.diagnostics,
            on_new_version=settings.on_new_version,
        )
        self.gate = Gate(settings.access, admin=offers_admin(settings))
        self.grpc = self._grpc()
        self._expiry = Expiry(_tls(settings))
        self.port = 0
        self.pages: MetricsServer | None = None
        self._telemetry: Telemetry | None = None
        # Set once every model that can be served is warm.
        self.warm = asyncio.Event()
        # A run did not come back: its thread still holds the model.
        self.stuck = False
        self._watching: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Serves until `stop`, SIGTERM or SIGINT; returns the exit status. A second signal ends the process at once.

        Raises:
            StartError: a port is taken, the models' folder is not there, none of its models can be served, or CUDA was
                asked for and does not work.
        """
        self.driver.failed.add_done_callback(lambda _: self._fail())
        with self._signals():
            starting = asyncio.create_task(self.start())
            stopping = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    _calm_the_collector()
                    if self.driver.store is not None:
                        sys.setswitchinterval(_SWITCH_S)
                    await stopping
            finally:
                for task in (starting, stopping):
                    task.cancel()
                await asyncio.wait((starting, stopping))
                await self.close()
        return 1 if self._failed else 0

    def stop(self) -> None:
        """Begins to drain."""
        self._stop.set()

    async def start(self) -> None:
        """Opens the ports, loads all models and turns ready."""
        settings = self.settings
        # Not sooner: a transport that cannot be used says so before.
        self._telemetry = open_telemetry(
            settings, _replica(settings, one_of_many=self.shared_port), now=self.driver.now, sample=self._sample
        )
        if self._telemetry.tracing is not None:
            self.driver.trace(self._telemetry.tracing)
        await self.grpc.say(serving=False)
        if not self.shared_port:
            await self._open_port()
        self.pages = MetricsServer(
            settings.metrics_host or settings.host,
            settings.metrics_port,
            gate=self.gate,
            loop=asyncio.get_running_loop(),
            sample=self._sample,
            not_ready=self._not_ready,
        )
        self.pages.start()
        if not compiled.BUILT:
            _log.warning(
                "the compiled part was not built, so steps go by arrays, which costs up to twice as much CPU: install "
                "the server where there is a C compiler, or from a wheel for this platform"
            )
        await self._load()
        if self.shared_port:
            # Not before: the kernel would send it new connections that a ready process could serve.
            await self._open_port()
        self.warm.set()
        if self.settings.watch:
            self._watching = asyncio.create_task(Watch(self.repository, self.loader, self.settings.watch).run())
        await self.grpc.say(serving=True)
        _log.info(
            "ready: grpc on %s:%d%s, metrics on %s:%d",
            settings.host,
            self.port,
            " (TLS)" if settings.tls_key else "",
            settings.metrics_host or settings.host,
            self.pages.port,
        )
        for line in banner(settings, self.gate.access):
            _log.info("%s", line)

    async def close(self) -> None:
        """Drains for up to drain_s and lets go of everything."""
        if self._watching is not None:
            self._watching.cancel()
        await self.grpc.say(serving=False)
        self.metrics.leaving = True
        if self.settings.drain_notice_s and self.warm.is_set() and not self._failed:
            await asyncio.sleep(self.settings.drain_notice_s)
        now = self.driver.now()
        stops_at = now + max(0.0, self.settings.drain_s - _LAST_S)
        # In one turn with the streams' GoAway, so that a client is told before a step of its is refused.
        self.directory.draining = True
        if self.warm.is_set():
            _log.info("draining: %d streams, %d sessions", self.metrics.streams, len(self.directory.sessions))
        if not self._failed and not await self.grpc.drain(stops_at, now):
            _log.warning("the drain time is over: what is left is cut off, and clients resume elsewhere or later")
        if self.driver.store is not None and not await self.driver.store.stop(
            max(_LAST_S, stops_at - self.driver.now())
        ):
            _log.warning("the store did not answer in time")
        await self.grpc.stop()
        self.loader.stop()
        if await self.driver.stop(_LAST_S / 2):
            for item in (*self.repository.versions(), *self.repository.leaving()):
                if item.engine is not None:
                    item.engine.runner.close()
        else:
            self.stuck = True
            _log.warning("a run of a model did not come back: it is left behind")
        if self.pages is not None:
            await asyncio.to_thread(self.pages.stop)
        if self._telemetry is not None:
            await self._telemetry.close(self._sample(), max(_LAST_S, stops_at - self.driver.now()))
        _log.info("stopped")

    # ------------------------------------------------------------ within

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT begins to drain, the second has its default effect: the process ends."""
        loop = asyncio.get_running_loop()

        def first() -> None:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            self.stop()

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, first)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    async def _open_port(self) -> None:
        self.port = self.grpc.listen(self.settings.host, self.settings.port, _tls(self.settings))
        await self.grpc.start()

    def _sample(self) -> Sample:
        self.metrics.certificate_expires_at = self._expiry.at()
        return self.metrics.sample(self.directory)

    async def _load(self) -> None:
        # Asked here, too, because a folder without models would not find it out.
        if self.settings.device == "cuda" and (why := await asyncio.to_thread(why_no_cuda)):
            raise StartError(why)
        try:
            await self.loader.load_all()
        except OSError as error:
            raise StartError(
                f"cannot read the models' folder {self.settings.models}: {error.strerror}; export a model into it with "
                "conveyor export, or name another with --models"
            ) from error
        versions = self.repository.versions()
        if not versions:
            _log.warning("no model in %s: export one and load it with LoadModel", self.settings.models)
        elif all(item.engine is None for item in versions):
            raise StartError("none of the models can be served; each says why above")

    def _not_ready(self) -> str:
        if self.metrics.leaving or self.directory.draining:
            return "draining"
        return "" if self.warm.is_set() else "loading models"

    def _fail(self) -> None:
        self._failed = True
        self._stop.set()

    def _grpc(self) -> Transport:
        servicers = {
            _SESSIONS: SessionServicer(self.driver, Seal(self.settings.snapshot_keys)),
            _MODELS: ModelServicer(self.driver, self.loader),
            _INFERENCE: InferenceServicer(self.driver, self.loader, self.metrics, self._not_ready),
        }
        options = WireOptions(
            max_message_bytes=self.settings.max_message_bytes,
            max_outgoing_bytes=self.settings.max_outgoing_bytes,
            max_streams_per_connection=self.settings.max_streams_per_connection,
            handshake_s=self.settings.handshake_timeout_s,
            messages_per_s=self.settings.max_messages_per_s,
            shared=self.shared_port,
            diagnostics=self.settings.diagnostics,
            reflection=self.settings.reflection,
        )
        return open_transport(self.driver, self.metrics, servicers, self.gate, options)


def _calm_the_collector() -> None:
    """Keeps the cyclic garbage collector away from what lives as long as the process, and rare.

    Steps and answers hold no cycles, so a collection frees next to nothing and stops the loop while it looks; at the
    default thresholds it ran so often that the 99th percentile of a frame's round trip doubled.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def _repository(settings: Settings) -> Repository[Engine]:
    return Repository(
        settings.models,
        open_runner=functools.partial(
            open_runner,
            device=settings.device,
            threads=settings.threads,
            budget=StateBudget(settings.max_state_bytes),
            # The slab is made before the model is measured, so it has room for the largest batch that may be chosen.
            capacity=EngineLimits(max_batch=settings.max_batch or MAX_BATCH).capacity(settings.max_sessions),
        ),
        make_engine=_engine,
        overrides=Overrides(
            max_batch=settings.max_batch,
            quantum=settings.quantum,
            max_batch_time_steps=settings.max_batch_time_steps,
            inline_run_s=settings.inline_run_s,
        ),
    )


def _engine(prepared: Prepared) -> Engine:
    policy = prepared.policy
    limits = EngineLimits(
        max_batch=policy.max_batch, quantum=policy.quantum, max_batch_time_steps=policy.max_batch_time_steps
    )
    return Engine(prepared.runner, model=prepared.name, version=prepared.version, limits=limits)


def _session_limits(settings: Settings) -> SessionLimits:
    return SessionLimits(
        max_sessions=settings.max_sessions,
        max_per_tenant=settings.max_sessions_per_tenant,
        max_in_flight=settings.max_in_flight,
        default_in_flight=settings.in_flight,
        max_idle_timeout_s=settings.max_idle_timeout_s,
        default_idle_timeout_s=settings.idle_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        max_queue_s=settings.max_queue_s,
        pipeline_queue_s=settings.pipeline_queue_s,
    )


def _replica(settings: Settings, *, one_of_many: bool) -> str:
    """This process's name among those that share the store."""
    if not settings.replica:
        return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
    return f"{settings.replica}:{os.getpid()}" if one_of_many else settings.replica


def _beat(settings: Settings, driver: Driver, *, one_of_many: bool) -> Beat | None:
    """What keeps sessions in the store; None: they live in memory alone."""
    store = open_store(settings.store, timeout_s=settings.store_timeout_s)
    if store is None:
        return None
    levels = {
        "none": session_pb2.DURABILITY_NONE,
        "async": session_pb2.DURABILITY_ASYNC,
        "sync": session_pb2.DURABILITY_SYNC,
    }
    policy = KeeperPolicy(
        replica=_replica(settings, one_of_many=one_of_many),
        runtime=fingerprint(),
        default=levels.get(settings.durability, session_pb2.DURABILITY_ASYNC),
        least=levels[settings.min_durability],
        most=levels.get(settings.max_durability, session_pb2.DURABILITY_SYNC),
        checkpoint_s=settings.checkpoint_ms / 1e3,
        checkpoint_steps=settings.checkpoint_steps,
        max_undurable_s=settings.max_undurable_s,
        sync_patience_s=settings.sync_patience_s,
        passivate_after_s=settings.passivate_after_s,
        ttl_s=settings.session_ttl_s,
        max_stored=settings.max_stored_sessions,
        max_per_model=settings.max_sessions_per_model,
        max_per_tenant=settings.max_sessions_per_tenant,
    )
    return Beat(
        store,
        driver.directory,
        driver.repository,
        policy,
        driver.metrics,
        wall=driver.wall,
        kick=driver.kick,
        fail=driver.fail,
    )


def _tls(settings: Settings) -> Tls | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
