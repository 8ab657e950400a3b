"""The fake service of tests/support: bare for the core, behind gRPC for the clients."""

import asyncio
import contextlib
import inspect
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures

import conveyor
import conveyor.aio
import grpc
import numpy as np
import pytest
import trustme
from conveyor._core.attachment import Attachment, Claim, Opening
from conveyor._core.population import PopulationCore
from conveyor._core.retry import RetryPolicy
from conveyor._core.session import SessionCore
from conveyor._core.signature import Signature
from conveyor._core.stream import StreamCore
from conveyor._core.unstored import RESEND_BUFFER_BYTES
from conveyor.errors import ConnectionLost
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, model_pb2_grpc, session_pb2_grpc
from conveyor_proto.v1 import session_pb2 as pb
from fake_service import SPECS, SUM, FakeServer, FakeStream, Refused
from fake_store import FakeStore


class GrpcServer(session_pb2_grpc.SessionServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """The fake behind real gRPC on a local port, with a hand on its cables.

    Attributes:
        fake: the rules and their state.
        cut_after: cut a stream after so many more answers.
        mute: receive and never answer.
        metadata: invocation metadata of every stream so far.
    """

    _stream_type = FakeStream

    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.fake = FakeServer()
        self.lock = threading.Lock()
        self.cut_after: int | None = None
        self.mute = False
        self.metadata: list[dict[str, str]] = []
        self.unary_metadata: list[dict[str, str]] = []
        self.unavailable = 0
        self.stream_status: tuple[grpc.StatusCode, str] | None = None
        self._streams: dict[FakeStream, queue.SimpleQueue] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.target = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self.cut()
        self._server.stop(None).wait()

    def cut(self) -> None:
        """Breaks all streams."""
        with self.lock:
            for stream, out in list(self._streams.items()):
                stream.broken()
                out.put("cut")

    def go_away(self, token: str = "") -> None:
        with self.lock:
            for stream in self._streams:
                stream.go_away(token)

    def crash(self) -> None:
        """Breaks all streams, and forgets whatever is not in the store."""
        with self.lock:
            self.fake.crash()
        self.cut()

    def Stream(self, requests: Iterator[pb.StreamRequest], context: grpc.ServicerContext):
        self.metadata.append(dict(context.invocation_metadata()))
        if self.stream_status is not None:
            context.abort(*self.stream_status)
        out: queue.SimpleQueue = queue.SimpleQueue()
        stream = FakeStream(self.fake, out.put)
        with self.lock:
            self._streams[stream] = out

        def read() -> None:
            try:
                for request in requests:
                    with self.lock:
                        stream.receive(request)
                with self.lock:
                    stream.end()
            except grpc.RpcError:
                with self.lock:
                    stream.broken()
            out.put(None)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            while (message := out.get()) is not None:
                if message == "cut" or self._cuts_now(stream):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "cable cut")
                if not self.mute:
                    yield message
        finally:
            with self.lock:
                self._streams.pop(stream, None)

    def _cuts_now(self, stream: FakeStream) -> bool:
        if self.cut_after is None:
            return False
        self.cut_after -= 1
        if self.cut_after >= 0:
            return False
        self.cut_after = None
        with self.lock:
            stream.broken()
        return True

    def _unary(self, context: grpc.ServicerContext, answer: Callable[[], object]):
        self.unary_metadata.append(dict(context.invocation_metadata()))
        if self.unavailable:
            self.unavailable -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not there")
        try:
            with self.lock:
                return answer()
        except Refused as refused:
            status = refused.status
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
            context.abort(code, status.message)

    def GetSession(self, request, context):
        return self._unary(context, lambda: pb.GetSessionResponse(session=self.fake.find(request.session_id).info()))

    def CloseSession(self, request, context):
        return self._unary(
            context, lambda: pb.CloseSessionResponse(applied_seq=self.fake.close(request.session_id).applied)
        )

    def ListSessions(self, request, context):
        def answer():
            infos = [s.info() for s in self.fake.sessions.values() if request.model in ("", s.model)]
            start = int(request.page_token or 0)
            page = infos[start : start + 2]
            token = str(start + 2) if start + 2 < len(infos) else ""
            return pb.ListSessionsResponse(sessions=page, next_page_token=token, total_size=len(infos))

        return self._unary(context, answer)

    def ForkSession(self, request, context):
        def answer():
            old = self.fake.find(request.session_id)
            new = self.fake.create(request.new_session_id, old.model, request.options.durability)
            new.state, new.applied = old.state.copy(), old.applied
            self._store(new)
            return pb.ForkSessionResponse(session=new.info())

        return self._unary(context, answer)

    def SnapshotSession(self, request, context):
        def answer():
            old = self.fake.find(request.session_id)
            return pb.SnapshotSessionResponse(
                snapshot=f"{old.model} {old.applied} ".encode() + old.state.tobytes(), applied_seq=old.applied
            )

        return self._unary(context, answer)

    def RestoreSession(self, request, context):
        def answer():
            parts = request.snapshot.split(b" ", 2)
            if len(parts) != 3:
                raise Refused(e.ERROR_REASON_SNAPSHOT_INVALID)
            new = self.fake.create(request.session_id, parts[0].decode(), request.options.durability)
            new.applied, new.state = int(parts[1]), np.frombuffer(parts[2], np.float32).copy()
            self._store(new)
            return pb.RestoreSessionResponse(session=new.info())

        return self._unary(context, answer)

    def _store(self, session) -> None:
        if session.stored:
            self.fake.checkpoint(session)

    def _model(self, name: str) -> model_pb2.Model:
        if name not in SPECS:
            raise Refused(e.ERROR_REASON_MODEL_NOT_FOUND, model=name, available="sum, mix")
        return model_pb2.Model(
            name=name,
            version="1",
            status=model_pb2.MODEL_STATUS_READY,
            latest=True,
            spec=SPECS[name],
            device="cpu",
            sessions=sum(s.model == name for s in self.fake.sessions.values()),
        )

    def ListModels(self, request, context):
        return self._unary(context, lambda: model_pb2.ListModelsResponse(models=map(self._model, SPECS)))

    def GetModel(self, request, context):
        return self._unary(context, lambda: model_pb2.GetModelResponse(model=self._model(request.name)))

    def LoadModel(self, request, context):
        return self._unary(context, lambda: model_pb2.LoadModelResponse(model=self._model(request.name)))

    def UnloadModel(self, request, context):
        def answer():
            live = self._model(request.name).sessions
            if live and not request.force:
                raise Refused(e.ERROR_REASON_MODEL_IN_USE, model=request.name, version="1", sessions=str(live))
            return model_pb2.UnloadModelResponse(closed_sessions=live)

        return self._unary(context, answer)


class Api:
    """One way to use the SDK; `value`, `entered` and `each` take what either client returns."""

    def __init__(self, name):
        self.connect = {"blocking": conveyor.connect, "asyncio": conveyor.aio.connect}[name]

    @staticmethod
    async def value(returned):
        return await returned if inspect.isawaitable(returned) else returned

    @staticmethod
    @contextlib.asynccontextmanager
    async def entered(opened):
        if hasattr(opened, "__aenter__"):
            async with opened as inner:
                yield inner
        else:
            with opened as inner:
                yield inner

    @staticmethod
    async def each(items):
        if hasattr(items, "__aiter__"):
            async for item in items:
                yield item
        else:
            for item in items:
                yield item


@pytest.fixture(params=["blocking", "asyncio"])
async def api(request):
    yield Api(request.param)
    left = [thread for thread in threading.enumerate() if thread.name == "conveyor-link"]
    for thread in left:
        thread.join(5)
        assert not thread.is_alive(), "the client left a thread behind"
    tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("conveyor")]
    assert not tasks, "the client left a task behind"


@pytest.fixture
def grpc_server():
    """A fake server behind gRPC."""
    server = GrpcServer()
    yield server
    server.stop()


@pytest.fixture
def stored_server():
    """A fake server behind gRPC that has a store, and keeps sessions so that a client has to keep their last steps."""
    server = GrpcServer()
    server.fake = FakeServer(FakeStore(), "async")
    yield server
    server.stop()


@pytest.fixture
def new_grpc_server():
    """Makes fake servers behind gRPC, on a port: `new_grpc_server(0)`."""
    servers = []

    def make(port: int) -> GrpcServer:
        servers.append(GrpcServer(port=port))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def authority():
    """A certificate authority of this test run."""
    return trustme.CA()


@pytest.fixture
def tls_server(authority):
    """A fake server that is called models.example, and asks for certificates that its authority signed."""
    certificate = authority.issue_cert("models.example")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), chain)], authority.cert_pem.bytes(), require_client_auth=True
    )
    server = GrpcServer(credentials)
    yield server
    server.stop()


class Cable:
    """A client's stream core and a fake server, with two queues of messages between them that can be cut."""

    def __init__(self, server: FakeServer | None = None) -> None:
        self.server = server or FakeServer()
        self.core = StreamCore(RetryPolicy())
        self.up: deque[pb.StreamRequest] = deque()
        self.down: deque[pb.StreamResponse] = deque()
        self.connect()

    def connect(self) -> None:
        self.up.clear()
        self.down.clear()
        self.end = FakeStream(self.server, self.down.append)
        self.core.opened()

    def pump_up(self) -> bool:
        """Delivers one message to the server."""
        self.up.extend(self.core.take_outgoing())
        if not self.up:
            return False
        self.end.receive(self.up.popleft())
        return True

    def pump_down(self) -> bool:
        """Delivers one message to the client; where all was said on a stream that takes no more, ends it."""
        if self.down:
            self.core.receive(self.down.popleft())
            return True
        if self.core.finishing:
            self.cut()
            return True
        return False

    def cut(self) -> None:
        """Loses what is on its way, and connects again."""
        self.end.broken()
        assert self.core.lost(ConnectionLost("cut", code=grpc.StatusCode.UNAVAILABLE), 0.0, 0.5) is not None
        self.connect()

    def move(self, server: FakeServer) -> None:
        """Cuts, and connects to another server; the first one does not know that it is left."""
        self.server = server
        self.cut()

    def farewell(self, token: str = "") -> None:
        """The server says that it goes, and lets go of every handle; what is still on its way up is refused."""
        if not self.core.finishing:
            self.end.go_away(token)
            self.end.end()

    def pump_time(self) -> bool:
        """Lets the time pass that was to be waited before something that was refused is asked for again."""
        if self.core.has_postponed:
            self.core.schedule(0.0, 0.5)
        due = self.core.retry(0.0) is not None
        self.core.retry(1e9)
        return due

    def settle(self) -> None:
        """Delivers everything."""
        for _ in range(10_000):
            if not (self.pump_up() or self.pump_down() or self.pump_time()):
                return
        raise AssertionError("client and server talk without end")

    def session(
        self,
        session_id: str = "s",
        model: str = "sum",
        opening: Opening = Opening.CREATE,
        buffer_bytes: int = RESEND_BUFFER_BYTES,
    ) -> SessionCore:
        """A session's core, added to the stream."""
        handle = self.core.reserve(1)[0]
        session = SessionCore(Attachment(handle, Claim(session_id, model, opening=opening)), self.core, buffer_bytes)
        session.use(Signature(SPECS.get(model, SUM)))
        self.core.add(session)
        return session

    def population(
        self, rows: int, model: str = "sum", prefix: str = "p", buffer_bytes: int = RESEND_BUFFER_BYTES
    ) -> PopulationCore:
        """A population's core, added to the stream."""
        claims = [Claim(f"{prefix}{row}", model) for row in range(rows)]
        population = PopulationCore(self.core.reserve(rows), claims, self.core, buffer_bytes)
        population.use(Signature(SPECS[model]))
        self.core.add(population)
        return population


@pytest.fixture(scope="session")
def new_cable():
    """Makes a cable to a fake server, a fresh one unless it is given: client and server core without I/O."""
    return Cable


@pytest.fixture(scope="session")
def new_replicas():
    """Makes fake servers that share a store, and keep sessions so durable unless they ask: `(2, "async")`."""

    def make(count: int, durability: str = "async") -> list[FakeServer]:
        store = FakeStore()
        return [FakeServer(store, durability) for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def refused():
    """Makes refusals: `refused("MODEL_FAILED", seq="1")`."""

    def make(reason: str, retry_s: float | None = None, **metadata: str) -> Refused:
        return Refused(e.ErrorReason.Value("ERROR_REASON_" + reason), retry_s, **metadata)

    return make


@pytest.fixture(scope="session")
def specs():
    """The models' descriptions by name."""
    return SPECS
