"""The real process: drains on SIGTERM, refuses what it cannot serve, says why it cannot start."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from conveyor_proto.codec import decode, encode
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc

both_transports = pytest.mark.usefixtures("transport")
X = np.random.default_rng(5).standard_normal((4000, 4)).astype(np.float32)


def step(seq, x, handle=1):
    return pb.StreamRequest(step=pb.Step(handle=handle, seq=seq, inputs=[encode(x)]))


async def attach(call, session_id, model="lstm", handle=1, mode=pb.AttachSession.MODE_CREATE):
    request = pb.AttachSession(handle=handle, mode=mode, model=model, session_id=session_id)
    request.options.max_in_flight = 8
    await call.write(pb.StreamRequest(attach=request))
    reply = await call.read()
    assert reply.WhichOneof("kind") == "attached", reply
    return reply.attached


async def rest_of(call):
    """The kinds of the messages until the stream ends."""
    kinds = []
    while (message := await call.read()) is not grpc.aio.EOF:
        kinds.append(message.WhichOneof("kind"))
    return kinds


@both_transports
async def test_sigterm_in_the_middle_of_a_stream_loses_nothing(start_server, nets):
    server = start_server("--drain-s", "10")
    async with grpc.aio.insecure_channel(server.target) as channel:
        call = session_pb2_grpc.SessionServiceStub(channel).Stream()
        await attach(call, "survivor")
        credit = asyncio.Semaphore(8)
        going_away = asyncio.Event()
        sent = 0

        async def send():
            nonlocal sent
            for index in range(len(X)):
                await credit.acquire()
                if going_away.is_set():
                    break
                await call.write(step(index + 1, X[index : index + 1]))
                sent = index + 1
            await call.done_writing()

        sender = asyncio.create_task(send())
        answered, refused, kinds = [], [], []
        while (message := await call.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("kind")
            kinds.append(kind)
            credit.release()
            if kind == "result":
                answered.append(message.result)
                if message.result.seq == 200:
                    server.process.send_signal(signal.SIGTERM)
            elif kind == "error":
                refused.append(from_status(message.error.status).reason_name)
            elif kind == "go_away":
                going_away.set()
        credit.release()
        await sender
        assert await call.code() == grpc.StatusCode.OK
    assert "go_away" in kinds
    assert kinds[-1] == "end"
    assert [result.seq for result in answered] == list(range(1, len(answered) + 1))
    assert 200 <= len(answered) <= sent < len(X), "the signal came in the middle"
    assert set(refused) <= {"DRAINING", "STEP_ABORTED"}
    assert len(answered) + len(refused) == sent, "each step was answered once"
    got = np.concatenate([decode(result.outputs[0]) for result in answered])
    assert np.abs(got - nets.truth("lstm", X)[: len(got)]).max() < 1e-5
    assert server.process.wait(12) == 0


@both_transports
def test_sigterm_while_idle_ends_at_once(start_server):
    server = start_server("--drain-s", "30")
    assert server.get("/readyz")[0] == 200
    began = time.monotonic()
    assert server.stop(timeout_s=15) == 0
    assert time.monotonic() - began < 10


def test_a_taken_port_is_a_clear_error(start_server, nets):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "conveyor_server", "--models", str(nets.folder), "--host", "127.0.0.1"]
        done = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


@both_transports
def test_two_servers_never_share_a_port(start_server, nets):
    first = start_server()
    command = [sys.executable, "-m", "conveyor_server", "--models", str(nets.folder), "--host", "127.0.0.1"]
    command += ["--port", str(first.port), "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_command_tells_grpc_in_time_and_stays_the_same_process(nets, tmp_path):
    """The command line is the SDK's, which imports gRPC before the server can say how it wants it."""
    (tmp_path / "conveyor_server.py").write_text("raise SystemExit('a file of the caller was taken for the server')")
    command = [str(Path(sys.executable).with_name("conveyor")), "serve", "--models", str(nets.folder)]
    command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("ready: grpc on" in line for line in process.stderr)
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            assert b"GRPC_EXPERIMENTS=-event_engine_listener" in variables
            assert b"GRPC_ENABLE_FORK_SUPPORT=0" in variables
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("has_models", [True, False])
def test_cuda_is_refused_where_there_is_none(nets, tmp_path, has_models):
    folder = nets.folder if has_models else tmp_path
    command = [sys.executable, "-m", "conveyor_server", "--models", str(folder), "--device", "cuda", "--port", "0"]
    command += ["--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "CUDA" in done.stderr
    assert "Traceback" not in done.stderr


@both_transports
async def test_an_oversize_message_ends_the_stream_and_not_the_session(start_server, nets):
    server = start_server("--max-message-bytes", "65536")
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        call = stub.Stream()
        await attach(call, "big")
        await call.write(step(1, X[:1]))
        assert (await call.read()).result.seq == 1
        await call.write(step(2, np.zeros((8192, 4), np.float32)))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        again = stub.Stream()
        attached = await attach(again, "big", mode=pb.AttachSession.MODE_RESUME)
        assert attached.session.applied_seq == 1
        await again.write(step(2, X[1:2]))
        answer = decode((await again.read()).result.outputs[0])
        assert np.abs(answer - nets.truth("lstm", X[:2])[1:]).max() < 1e-5
        await again.done_writing()
        assert await rest_of(again) == ["detached", "end"]


@both_transports
async def test_a_row_that_makes_the_model_raise_leaves_its_neighbours_alone(start_server, nets):
    server = start_server()
    async with grpc.aio.insecure_channel(server.target) as channel:
        call = session_pb2_grpc.SessionServiceStub(channel).Stream()
        for handle in range(1, 9):
            await attach(call, f"n{handle}", "speller", handle)
        tokens = np.arange(1, 9, dtype=np.int64)
        tokens[3] = 999
        frame = pb.StepFrame(
            handles=np.arange(1, 9, dtype=np.uint32).tobytes(),
            seqs=np.ones(8, np.uint64).tobytes(),
            columns=[tokens.tobytes()],
        )
        await call.write(pb.StreamRequest(frame=frame))
        rows, errors = {}, {}
        while len(rows) + len(errors) < 8:
            message = await call.read()
            if message.WhichOneof("kind") == "frame":
                handles = np.frombuffer(message.frame.handles, np.uint32).tolist()
                values = np.frombuffer(message.frame.columns[0], np.float32).reshape(len(handles), 8)
                rows.update(zip(handles, values, strict=True))
            else:
                errors[message.error.handle] = from_status(message.error.status).reason_name
        assert errors == {4: "MODEL_FAILED"}
        for handle, row in rows.items():
            assert np.abs(row - nets.truth("speller", tokens[handle - 1 : handle])[0]).max() < 1e-5
        await call.write(step(1, np.array([2]), handle=4))
        answer = decode((await call.read()).result.outputs[0])
        assert np.abs(answer[0] - nets.truth("speller", np.array([2]))[0]).max() < 1e-5
        await call.done_writing()
        assert (await rest_of(call))[-1] == "end"
