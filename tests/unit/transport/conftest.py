"""A whole server in the test's own event loop, over a runner in numpy; every test runs on both transports."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from conveyor_proto.codec import decode
from conveyor_proto.inference import service_pb2
from conveyor_proto.reasons import Fault, from_status
from conveyor_proto.v1 import model_pb2, model_pb2_grpc, session_pb2_grpc, spec_pb2, tensor_pb2
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.engine.engine import Engine, EngineLimits
from conveyor_server.identity.gate import Gate
from conveyor_server.inference.service import InferenceServicer
from conveyor_server.keeper.beat import Beat
from conveyor_server.keeper.policy import KeeperPolicy
from conveyor_server.metrics import Metrics
from conveyor_server.repository import Repository
from conveyor_server.runner.base import Run, RunFailed, RunnerUnavailable, RunResult
from conveyor_server.servicers.loader import Loader
from conveyor_server.servicers.models import ModelServicer
from conveyor_server.servicers.session import SessionServicer
from conveyor_server.sessions.directory import Directory
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.store.contract import StateStore
from conveyor_server.store.memory import MemoryStore
from conveyor_server.transport.choice import after_sending, deferral, open_transport
from conveyor_server.transport.completion_loop import CompletionLoop
from conveyor_server.transport.loop import Driver
from conveyor_server.transport.port import WireOptions
from flaky_store import FlakyStore
from staged import Staged

FIRST = 10.0
LOOPS = {"aio": asyncio.new_event_loop, "cq": CompletionLoop}


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test that is a coroutine runs on the loop of each transport, and its server is of that transport."""
    return LOOPS


def sum_spec(digest: str, *, timed: bool) -> spec_pb2.ModelSpec:
    """`total` after each time step of `x`, and unless `timed` the `last` one; the state is it, FIRST when fresh."""
    spec = spec_pb2.ModelSpec(spec_version=1, name="sum", digest=digest, state_bytes=8)
    spec.inputs.add(name="x", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    spec.outputs.add(name="total", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1], has_time=True)
    if not timed:
        spec.outputs.add(name="last", dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=[1])
    spec.states.add(
        name="sum",
        input_name="s",
        output_name="s2",
        dtype=tensor_pb2.DATA_TYPE_FLOAT64,
        shape=[1],
        initial=np.array([FIRST]).tobytes(),
    )
    return spec


class SumRunner(Staged):
    """Adds up. POISON fails a run, BUG raises what no runner should; `gate` holds runs while it is clear.

    Attributes:
        shapes: rows and time steps of each run.
        during: called in each run with its time steps.
    """

    POISON = 666.0
    BUG = 667.0

    def __init__(self, capacity: int, digest: str, *, timed: bool = False) -> None:
        self.spec = sum_spec(digest, timed=timed)
        self.device = "cpu"
        self.capacity = capacity
        self.slab = np.full((capacity, 1), np.nan)
        self.rows: list[int] = []
        self.shapes: list[tuple[int, int]] = []
        self.during: Callable[[int], None] = lambda time_steps: None
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False

    def step(self, run: Run) -> RunResult:
        self.entered.set()
        assert self.gate.wait(20)
        x = run.inputs[0]
        self.rows.append(len(x))
        self.shapes.append(x.shape[:2])
        self.during(x.shape[1])
        self.threads.append(threading.current_thread().name)
        if (x == self.BUG).any():
            raise ValueError("secret")
        if (x == self.POISON).any():
            raise RunFailed("poisoned")
        old = np.where(run.fresh[:, None], FIRST, self.slab[run.sources])
        totals = old[:, None, :] + np.cumsum(x, axis=1)
        last = totals[np.arange(len(x)), run.lengths - 1]
        self.slab[run.destinations] = last
        return RunResult([totals, last][: len(self.spec.outputs)], np.isfinite(last).all(axis=1))

    def forget(self) -> None:
        """Forgets the runs that warmed it."""
        self.entered.clear()
        self.rows.clear()
        self.shapes.clear()
        self.threads.clear()

    def read_rows(self, slots: Sequence[int]) -> list[np.ndarray]:
        return [self.slab[list(slots)].copy()]

    def write_rows(self, slots: Sequence[int], states: Sequence[np.ndarray]) -> None:
        self.slab[list(slots)] = states[0]

    def close(self) -> None:
        self.closed = True


# Of models by their name, where they are no SumRunners.
RUNNERS: dict[str, type[SumRunner]] = {}


class Server:
    """The server under test and one channel to it.

    `inline_run_s` 0: every run goes to the engine's thread, so that a closed gate holds the run and not the server.
    """

    def __init__(
        self,
        folder: Path,
        limits: SessionLimits,
        wire: WireOptions,
        *,
        inline_run_s: float,
        max_time_steps: int,
        quantum: int,
        timed: bool,
        store: StateStore | None,
        policy: KeeperPolicy,
        gate: Gate | None,
    ) -> None:
        engine_limits = EngineLimits(max_batch=64, quantum=quantum, max_batch_time_steps=64 * quantum)
        capacity = engine_limits.capacity(limits.max_sessions)
        self.runners: dict[str, SumRunner] = {}

        def open_runner(path: Path) -> SumRunner:
            name = path.parts[-3]
            content = path.read_text()
            if content == "broken":
                raise RunnerUnavailable("the file is broken")
            kind = RUNNERS.get(name, SumRunner)
            digest = f"digest of {name}" + (f", {content}" if content else "")
            runner = self.runners[name] = kind(capacity, digest, timed=timed or content == "timed")
            return runner

        repository: Repository[Engine] = Repository(
            folder,
            open_runner=open_runner,
            make_engine=lambda prepared: Engine(
                prepared.runner, model=prepared.name, version=prepared.version, limits=engine_limits
            ),
        )
        self.folder = folder
        self.metrics = Metrics()
        self.directory = Directory(limits)
        self.driver = Driver(
            self.directory,
            repository,
            self.metrics,
            inline_run_s=inline_run_s,
            max_time_steps=max_time_steps,
            defer=deferral(),
            afterwards=after_sending(),
        )
        if store is not None:
            self.driver.store = Beat(
                store,
                self.directory,
                repository,
                policy,
                self.metrics,
                wall=self.driver.wall,
                kick=self.driver.kick,
                fail=self.driver.fail,
            )
        self.loader = Loader(self.driver, self.metrics, diagnostics=wire.diagnostics)
        servicers = {
            pb.DESCRIPTOR.services_by_name["SessionService"]: SessionServicer(self.driver),
            model_pb2.DESCRIPTOR.services_by_name["ModelService"]: ModelServicer(self.driver, self.loader),
            service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]: InferenceServicer(
                self.driver, self.loader, self.metrics, lambda: "draining" if self.directory.draining else ""
            ),
        }
        self.grpc = open_transport(self.driver, self.metrics, servicers, gate or Gate(), wire)
        self.port = self.grpc.listen("127.0.0.1", 0, None)
        self.channel = self.connect()
        self.stub = session_pb2_grpc.SessionServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)  # type: ignore[no-untyped-call]

    @property
    def runner(self) -> SumRunner:
        return self.runners["sum"]

    def connect(self) -> grpc.aio.Channel:
        # A channel that is made holds a lock of grpc.aio's while the loop starts a thread, and one that is collected
        # waits for it: so none may be collected in that thread.
        gc.disable()
        try:
            return grpc.aio.insecure_channel(
                f"127.0.0.1:{self.port}",
                options=(("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)),
            )
        finally:
            gc.enable()

    def stream(self, channel: grpc.aio.Channel | None = None) -> "Stream":
        stub = session_pb2_grpc.SessionServiceStub(channel or self.channel)  # type: ignore[no-untyped-call]
        return Stream(stub.Stream())

    @property
    def engine(self) -> Engine:
        return self.driver.repository.find("sum").serving

    async def start(self) -> None:
        for name in ("sum", "other"):
            self.add_model(name)
            await self.loader.load(name)
            self.runners[name].forget()
        await self.grpc.start()
        await self.grpc.say(serving=True)

    def add_model(self, name: str, version: str = "1", content: str = "") -> None:
        path = self.folder / name / version / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_text(content)

    def put(self, name: str, version: str, content: str) -> None:
        """A file in whole, as it is to be published: written beside and renamed."""
        path = self.folder / name / version / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(".model.onnx")
        draft.write_text(content)
        draft.replace(path)

    async def run_entered(self) -> None:
        """Returns when a run has begun."""
        assert await asyncio.to_thread(self.runner.entered.wait, 20)

    async def no_streams(self) -> None:
        """Returns when the server has noticed the end of every stream."""
        await asyncio.wait_for(self.grpc._streams._none.wait(), 20)

    async def stop(self) -> None:
        for runner in self.runners.values():
            runner.gate.set()
        await self.channel.close()
        if self.driver.store is not None:
            await self.driver.store.stop(1.0)
        await self.grpc.stop()
        assert await self.driver.stop(20.0)
        assert not self.driver.failed.done()


class Stream:
    """A client's side of one stream, message by message."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call

    async def send(self, **kind: object) -> None:
        await self.call.write(pb.StreamRequest(**kind))

    async def attach(self, handle: int, session_id: str = "", **fields: object) -> None:
        fields = {"mode": pb.AttachSession.MODE_CREATE, "model": "sum", **fields}
        await self.send(attach=pb.AttachSession(handle=handle, session_id=session_id, **fields))

    async def attached(self, handle: int, session_id: str = "", **fields: object) -> pb.SessionAttached:
        await self.attach(handle, session_id, **fields)
        return await self.expect("attached")

    async def step(self, handle: int, seq: int, *values: float, **fields: object) -> None:
        await self.send(step=pb.Step(handle=handle, seq=seq, inputs=[tensor(*values)], **fields))

    async def answer(self, handle: int, seq: int, *values: float, **fields: object) -> list[float]:
        await self.step(handle, seq, *values, **fields)
        result = await self.expect("result")
        assert (result.handle, result.seq) == (handle, seq)
        return totals(result)

    async def frame(
        self, handles: Sequence[int], seqs: Sequence[int], rows: Sequence[Sequence[float]], **extra
    ) -> None:
        await self.send(frame=frame(handles, seqs, rows, **extra))

    async def receive(self) -> pb.StreamResponse:
        response = await asyncio.wait_for(self.call.read(), 20)
        assert response is not grpc.aio.EOF, "the stream ended"
        return response

    async def expect(self, kind: str):
        response = await self.receive()
        assert response.WhichOneof("kind") == kind, response
        return getattr(response, kind)

    async def fault(self) -> tuple[int, int, Fault]:
        """The handle, seq and fault of the next message, a StepError."""
        error = await self.expect("error")
        return error.handle, error.seq, from_status(error.status)

    async def end(self) -> None:
        """Half-closes and takes the rest: SessionDetached messages, StreamEnd, OK."""
        await self.call.done_writing()
        while (response := await self.receive()).WhichOneof("kind") == "detached":
            pass
        assert response.HasField("end"), response
        await self.ended()

    async def ended(self) -> None:
        assert await asyncio.wait_for(self.call.read(), 20) is grpc.aio.EOF
        assert await self.call.code() is grpc.StatusCode.OK


async def until(condition: Callable[[], object]) -> None:
    """Takes turns of the loop until it is so."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is the server's own, or found in a log or a list
            await asyncio.sleep(0.001)


def tensor(*values: float) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data=np.array(values, np.float64).tobytes())


def frame(handles: Sequence[int], seqs: Sequence[int], rows: Sequence[Sequence[float]], **extra) -> pb.StepFrame:
    lengths = [len(row) for row in rows]
    return pb.StepFrame(
        handles=np.array(handles, np.uint32).tobytes(),
        seqs=np.array(seqs, np.uint64).tobytes(),
        lengths=b"" if set(lengths) == {1} else np.array(lengths, np.uint32).tobytes(),
        columns=[np.concatenate([np.array(row, np.float64) for row in rows]).tobytes() if rows else b""],
        **extra,
    )


def totals(result: pb.StepResult | pb.StepResponse) -> list[float]:
    assert [item.name for item in result.outputs] == ["total", "last"]
    total, last = map(decode, result.outputs)
    assert last[0] == total[-1, 0]
    return [float(value) for value in total[:, 0]]


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[Callable[..., Server]]:
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            *,
            wire: WireOptions | None = None,
            inline_run_s: float = 0.0,
            max_time_steps: int = 64,
            quantum: int = 8,
            timed: bool = False,
            folder: str = "",
            store: StateStore | None = None,
            policy: KeeperPolicy | None = None,
            gate: Gate | None = None,
            **limits: float,
        ) -> Server:
            server = Server(
                tmp_path / folder,
                SessionLimits(**{"max_sessions": 512, **limits}),  # type: ignore[arg-type]
                wire or WireOptions(),
                inline_run_s=inline_run_s,
                max_time_steps=max_time_steps,
                quantum=quantum,
                timed=timed,
                store=store,
                policy=policy or KeeperPolicy("r1", "a runtime", checkpoint_s=0.02),
                gate=gate,
            )
            await server.start()
            stack.push_async_callback(server.stop)
            return server

        yield make


@pytest.fixture
def store() -> FlakyStore:
    return FlakyStore(MemoryStore())


@pytest.fixture
async def server(make_server: Callable[..., Server]) -> Server:
    return await make_server()


@pytest.fixture
def make_frame() -> Callable[..., pb.StepFrame]:
    return frame


@pytest.fixture
def make_tensor() -> Callable[..., tensor_pb2.Tensor]:
    return tensor


@pytest.fixture
def wire_options() -> type[WireOptions]:
    return WireOptions
