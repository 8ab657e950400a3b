"""The whole server in one process: starts, turns ready, says why not, drains and stops."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import grpc
import numpy as np
import pytest
from conveyor_proto.v1 import model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc, tensor_pb2
from conveyor_server import app as app_module
from conveyor_server import compiled
from conveyor_server.app import App
from conveyor_server.errors import StartError
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.settings import Settings
from conveyor_server.transport.choice import run_with
from conveyor_server.transport.completion_loop import CompletionLoop
from conveyor_server.transport.selftest import SelfTest, Unusable
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "conveyor.v1.SessionService", "conveyor.v1.ModelService")


@pytest.fixture(autouse=True)
def opened(monkeypatch, runner):
    """Runners by path in place of onnxruntime's; a file that says broken is."""

    def open_runner(path, **options):
        if path.read_text():
            raise RunnerUnavailable(path.read_text())
        runner.options = options
        return runner

    monkeypatch.setattr(app_module, "open_runner", open_runner)


@contextlib.asynccontextmanager
async def running(settings: Settings):
    """An App whose `run` is under way, ready, with a channel; stopped at the end."""
    app = App(settings)
    run = asyncio.create_task(app.run())
    await asyncio.wait_for(app.warm.wait(), 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        yield app, channel, run
    app.stop()
    assert await run == 0


def settings(models, **fields) -> Settings:
    small = {"port": 0, "metrics_port": 0, "max_sessions": 8, "max_batch": 8, "drain_s": 5.0}
    return Settings(models=models, **{**small, **fields})


async def health(channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_ready_when_warm(models, runner) -> None:
    async with running(settings(models, device="cpu", threads=3)) as (_, channel, _):
        given = {name: runner.options[name] for name in ("device", "threads", "capacity")}
        assert given == {"device": "cpu", "threads": 3, "capacity": 8 + 2 * 8}
        assert [await health(channel, service) for service in SERVICES] == [SERVING] * 3
        listed = await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        assert [item.name for item in listed.models] == ["last"]
        stub = session_pb2_grpc.SessionServiceStub(channel)
        created = await stub.CreateSession(session_pb2.CreateSessionRequest(model="last"))
        x = tensor_pb2.Tensor(data=np.ones(2, np.float32).tobytes())
        step = session_pb2.StepRequest(session_id=created.session.session_id, seq=1, inputs=[x])
        assert (await stub.Step(step)).outputs[0].data == x.data
    assert runner.closed


async def test_reflection_names_the_services(models) -> None:
    async with running(settings(models)) as (_, channel, _):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        response = await call.read()
        names = {item.name for item in response.list_services_response.service}
        assert set(SERVICES[1:]) | {"grpc.health.v1.Health"} <= names


async def test_not_serving_while_models_load(models, runner) -> None:
    later = models / "later" / "1" / "model.onnx"
    later.parent.mkdir(parents=True)
    later.touch()
    runner.gate.clear()
    app = App(settings(models))
    run = asyncio.create_task(app.run())
    assert await asyncio.to_thread(runner.entered.wait, 20)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        assert await health(channel) == NOT_SERVING
        assert app._not_ready() == "loading models"
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for name in ("last", "later"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.CreateSession(session_pb2.CreateSessionRequest(model=name))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        runner.gate.set()
        assert (await watch.read()).status == SERVING
        app.stop()
        assert await run == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(models, runner, number) -> None:
    before = signal.getsignal(number)
    async with running(settings(models, inline_run_s=0.0)) as (app, channel, run):
        stub = session_pb2_grpc.SessionServiceStub(channel)
        stream = stub.Stream()
        attach = session_pb2.AttachSession(handle=1, mode=session_pb2.AttachSession.MODE_CREATE, model="last")
        await stream.write(session_pb2.StreamRequest(attach=attach))
        assert (await stream.read()).HasField("attached")
        runner.entered.clear()
        runner.gate.clear()
        x = tensor_pb2.Tensor(data=np.ones(2, np.float32).tobytes())
        await stream.write(session_pb2.StreamRequest(step=session_pb2.Step(handle=1, seq=1, inputs=[x])))
        assert await asyncio.to_thread(runner.entered.wait, 20)
        os.kill(os.getpid(), number)
        assert (await stream.read()).HasField("go_away")
        assert await health(channel) == NOT_SERVING
        assert app._not_ready() == "draining"
        runner.gate.set()
        kinds = [(await stream.read()).WhichOneof("kind") for _ in range(3)]
        assert kinds == ["result", "detached", "end"]
        assert await stream.code() is grpc.StatusCode.OK
        assert await run == 0
    assert signal.getsignal(number) is before


async def test_what_does_not_finish_is_cut_off_in_time(models, runner) -> None:
    async with running(settings(models, inline_run_s=0.0, drain_s=0.6)) as (app, channel, run):
        stub = session_pb2_grpc.SessionServiceStub(channel)
        await stub.CreateSession(session_pb2.CreateSessionRequest(model="last", session_id="a"))
        runner.entered.clear()
        runner.gate.clear()
        x = tensor_pb2.Tensor(data=np.ones(2, np.float32).tobytes())
        step = asyncio.ensure_future(stub.Step(session_pb2.StepRequest(session_id="a", seq=1, inputs=[x])))
        assert await asyncio.to_thread(runner.entered.wait, 20)
        app.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await step
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert await run == 0
        assert app.stuck
        assert not runner.closed
        runner.gate.set()


async def test_one_broken_model_does_not_keep_the_others_back(models, caplog) -> None:
    path = models / "broken" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_text("its weights are not there")
    async with running(settings(models)) as (_, channel, _):
        listed = await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        assert [(item.name, item.status) for item in listed.models] == [
            ("broken", model_pb2.MODEL_STATUS_FAILED),
            ("last", model_pb2.MODEL_STATUS_READY),
        ]
    assert "its weights are not there" in caplog.text


async def test_an_empty_folder_is_served(tmp_path, caplog) -> None:
    async with running(settings(tmp_path)) as (_, channel, _):
        assert await health(channel) == SERVING
    assert "no model in" in caplog.text


async def test_no_model_that_works_is_no_server(models) -> None:
    (models / "last" / "1" / "model.onnx").write_text("no CUDA provider")
    with pytest.raises(StartError, match="none of the models can be served"):
        await App(settings(models)).run()


async def test_a_folder_that_is_not_there_is_told(tmp_path) -> None:
    with pytest.raises(StartError, match=r"cannot read the models' folder .*nothing: No such file.*conveyor export"):
        await App(settings(tmp_path / "nothing")).run()


async def test_a_port_in_use_is_told(models) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: it is in use"):
            await App(Settings(models=models, port=port, metrics_port=0)).run()


async def test_a_core_that_broke_an_invariant_stops_the_server(models, runner, caplog) -> None:
    app = App(settings(models))
    run = asyncio.create_task(app.run())
    await asyncio.wait_for(app.warm.wait(), 20)
    app.directory.expire = lambda now: 1 / 0
    app.directory.next_expiry_at = lambda: 0.0
    app.driver.kick()
    assert await run == 1
    assert "the core failed, the server stops" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_wrong_flag_answers_without_onnxruntime() -> None:
    code = (
        "import sys; from conveyor_server.__main__ import main; r = main(['--prot', '1']); "
        "assert 'onnxruntime' not in sys.modules and 'grpc' not in sys.modules; sys.exit(r)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "conveyor serve: --prot is not a flag of conveyor serve: did you mean --port?\n"


async def test_a_certificate_that_cannot_be_read_is_told(models, tmp_path) -> None:
    files = {"tls_certificate": tmp_path / "chain.pem", "tls_key": tmp_path / "key.pem"}
    with pytest.raises(StartError, match=r"cannot read .*key\.pem: No such file"):
        await App(settings(models, **files)).run()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def serve_once(models, loops: list[str], port: int = 0):
    """A main that serves until it has answered a health check."""

    async def main() -> int:
        loops.append("cq" if isinstance(asyncio.get_running_loop(), CompletionLoop) else "aio")
        app = App(settings(models, port=port))
        run, warm = asyncio.create_task(app.run()), asyncio.create_task(app.warm.wait())
        await asyncio.wait((run, warm), return_when=asyncio.FIRST_COMPLETED)
        if not warm.done():
            warm.cancel()
            return await run
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            assert await health(channel) == SERVING
        app.stop()
        return await run

    return main


@pytest.mark.parametrize("method", ["__init__", "run"])
def test_a_server_whose_fast_transport_fails_its_test_serves_all_the_same(models, monkeypatch, caplog, method) -> None:
    """On the same port, whether or not it had been opened for the other one."""

    def fails(*_: object) -> None:
        raise Unusable("the self-test's message came back changed")

    monkeypatch.setattr(SelfTest, method, fails)
    loops: list[str] = []
    assert run_with("auto", serve_once(models, loops, port=free_port())) == 0
    assert loops == ["cq", "aio"]
    said = [record for record in caplog.records if "transport" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]
    with pytest.raises(StartError, match="came back changed; take --transport aio"):
        run_with("cq", serve_once(models, loops))


@pytest.mark.parametrize("built", [True, False])
def test_a_server_without_its_compiled_part_says_so_and_serves(models, monkeypatch, caplog, built) -> None:
    monkeypatch.setattr(compiled, "BUILT", built)
    assert run_with("auto", serve_once(models, [])) == 0
    assert ("the compiled part was not built" in caplog.text) is not built


def test_the_fast_transport_is_taken_where_it_can_be(models, caplog) -> None:
    loops: list[str] = []
    assert run_with("auto", serve_once(models, loops)) == 0
    assert loops == ["cq"]
    assert "transport auto" not in caplog.text
