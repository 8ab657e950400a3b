"""A supervisor with workers that are small scripts: what it starts, replaces and ends."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings
from conveyor_server.supervisor import process as process_module
from conveyor_server.supervisor import supervisor as supervisor_module
from conveyor_server.supervisor.process import describe
from conveyor_server.supervisor.supervisor import BackOff, Supervisor

# A worker that serves nothing; BEHAVIOUR, with the names below, says what it does.
_WORKER = """
import asyncio, os, signal, sys
from pathlib import Path
from conveyor_server.supervisor.link import Link, Report
link = Link.inherited(os.environ)
def ready():
    link.tell(Report(metrics_port=9000 + link.index))
async def told():
    ended = asyncio.Event()
    link.watch(ended.set, asyncio.get_running_loop(), 60)
    await ended.wait()
def drain():
    asyncio.run(told())
def first():
    try:
        Path(os.environ["FOLDER"], str(link.index)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
exec(os.environ["BEHAVIOUR"])
"""
_SERVE = "ready(); drain()"
_READY = re.compile(r"worker (\d+) is ready: process (\d+), metrics on 127\.0\.0\.1:(\d+)")


class Heard(logging.Handler):
    """What was logged on the loop's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self._more.set()

    def matches(self, pattern: str | re.Pattern[str]) -> list[re.Match[str]]:
        found = (re.search(pattern, message) for message in self.messages)
        return [match for match in found if match]

    async def until(self, pattern: str | re.Pattern[str], count: int = 1) -> list[re.Match[str]]:
        async with asyncio.timeout(30):
            while len(self.matches(pattern)) < count:
                self._more.clear()
                await self._more.wait()
        return self.matches(pattern)


@pytest.fixture
async def heard() -> AsyncIterator[Heard]:
    log, handler = logging.getLogger("conveyor"), Heard()
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


Supervise = Callable[..., "asyncio.Task[int]"]


@pytest.fixture
async def supervise(monkeypatch, tmp_path) -> AsyncIterator[Supervise]:
    """Starts supervisors of workers that behave in some way; the task is `run`."""
    monkeypatch.setattr(process_module, "_command", lambda: [sys.executable, "-c", _WORKER])
    monkeypatch.setattr(BackOff, "first_s", 0.1)
    started: list[asyncio.Task[int]] = []

    def start(behaviour: str, workers: int = 2, **fields) -> asyncio.Task[int]:
        settings = Settings(port=0, metrics_port=0, workers=workers, **{"drain_s": 60.0, **fields})
        environment = {**os.environ, "BEHAVIOUR": behaviour, "FOLDER": str(tmp_path)}
        started.append(asyncio.create_task(Supervisor(settings, environment).run()))
        return started[-1]

    yield start
    # What a test that failed has left.
    for task in started:
        task.cancel()
    await asyncio.gather(*started, return_exceptions=True)


async def test_workers_serve_until_the_supervisor_is_told_to_stop(supervise, heard) -> None:
    running = supervise(_SERVE, workers=3)
    ready = await heard.until(_READY, 3)
    assert sorted((match[1], match[3]) for match in ready) == [("0", "9000"), ("1", "9001"), ("2", "9002")]
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 0
    assert heard.messages[-1] == "stopped: 3 workers"
    for match in ready:
        with pytest.raises(ProcessLookupError):
            os.kill(int(match[2]), 0)


async def test_a_worker_gets_the_resolved_settings_and_no_variable_besides(supervise, heard, monkeypatch) -> None:
    monkeypatch.setenv("CONVEYOR_CONFIG", "/gone/since.toml")
    monkeypatch.setenv("CONVEYOR_THREADS", "7")
    tell = (
        "names = sorted(name for name in os.environ if 'CONVEYOR' in name)\n"
        "values = [os.environ['CONVEYOR_' + name] for name in ('THREADS', 'PORT', 'WORKERS')]\n"
        "link.tell(Report(error=f'{values} {names}'))"
    )
    with pytest.raises(StartError) as caught:
        await supervise(tell, threads=3)
    [port] = [match[1] for match in heard.matches(r"share grpc on 127.0.0.1:(\d+)")]
    assert str(caught.value).startswith(f"['3', '{port}', '2'] ['CONVEYOR_")
    assert "'CONVEYOR_DEVICE', " in str(caught.value)
    assert "CONFIG" not in str(caught.value)


async def test_a_worker_has_a_process_group_of_its_own(supervise) -> None:
    with pytest.raises(StartError, match="True"):
        await supervise("link.tell(Report(error=f'{os.getpgrp() == os.getpid()}'))")


async def test_a_worker_that_dies_is_replaced_and_the_other_stays(supervise, heard) -> None:
    running = supervise(_SERVE)
    processes = {match[1]: int(match[2]) for match in await heard.until(_READY, 2)}
    os.kill(processes["1"], signal.SIGKILL)
    again = (await heard.until(_READY, 3))[2]
    assert again[1] == "1"
    assert int(again[2]) not in processes.values()
    assert heard.matches(r"worker 1 was ended by SIGKILL: its sessions are lost; another one is started in 0\.1 s")
    os.kill(processes["0"], 0)
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(running, 30) == 0


async def test_a_worker_that_keeps_dying_is_replaced_less_and_less_often(supervise, heard) -> None:
    running = supervise("again = not first(); ready()\nif again: sys.exit(3)\ndrain()")
    processes = {match[1]: int(match[2]) for match in await heard.until(_READY, 2)}
    os.kill(processes["1"], signal.SIGKILL)
    waits = await heard.until(r"worker 1 .*: its sessions are lost; another one is started in (.*) s", 4)
    assert [match[1] for match in waits[:4]] == ["0.1", "0.2", "0.4", "0.8"]
    os.kill(processes["0"], 0)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 30)


async def test_the_error_of_a_start_is_raised_once_and_ends_all(supervise, heard) -> None:
    broken = "link.tell(Report(error='no such folder')); sys.exit(2)"
    with pytest.raises(StartError, match=r"^no such folder$"):
        await asyncio.wait_for(supervise(f"if link.index: {broken}\nready(); drain()", workers=3), 30)
    assert not heard.matches("no such folder|another one")


async def test_a_crash_before_all_were_ready_ends_all(supervise, heard) -> None:
    crash = "if link.index: os.kill(os.getpid(), signal.SIGSEGV)\nready(); drain()"
    with pytest.raises(StartError, match=r"^worker 1 was ended by SIGSEGV while it started$"):
        await asyncio.wait_for(supervise(crash), 30)
    assert not heard.matches("another one")


async def test_a_worker_that_cannot_start_again_is_tried_again_and_the_other_stays(supervise, heard) -> None:
    second_fails = "if not first(): link.tell(Report(error='the folder is away')); sys.exit(2)\n"
    running = supervise(second_fails + _SERVE)
    processes = {match[1]: int(match[2]) for match in await heard.until(_READY, 2)}
    os.kill(processes["0"], signal.SIGKILL)
    await heard.until("the folder is away: .* another one is started", 3)
    os.kill(processes["1"], 0)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 30)


async def test_told_before_the_workers_are_ready(supervise, tmp_path) -> None:
    for index in (0, 1):
        os.mkfifo(tmp_path / f"started{index}")
    running = supervise("Path(os.environ['FOLDER'], f'started{link.index}').write_text('now'); drain()")
    for index in (0, 1):
        assert await asyncio.to_thread((tmp_path / f"started{index}").read_text) == "now"
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 0


async def test_a_worker_that_ends_badly_is_seen_in_the_status(supervise, heard) -> None:
    running = supervise("ready(); drain(); sys.exit(link.index)")
    await heard.until(_READY, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 1


async def test_a_second_signal_ends_at_once(supervise, heard) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); signal.pause()"
    running = supervise(deaf)
    await heard.until(_READY, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    await heard.until("stopping: 2 workers drain")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 1
    assert heard.matches("told to stop again")


async def test_a_worker_that_does_not_drain_in_time_is_killed(supervise, heard, monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "PATIENCE_S", 0.1)
    running = supervise("ready(); signal.pause()", drain_s=0.1)
    await heard.until(_READY, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 1


async def test_a_system_that_starts_no_process_is_told(supervise, monkeypatch) -> None:
    monkeypatch.setattr(process_module, "_command", lambda: ["/no/such/python"])
    with pytest.raises(StartError, match=r"worker \d cannot be started: No such file"):
        await asyncio.wait_for(supervise(_SERVE), 30)


def test_waits_grow_until_a_worker_has_lived_long_enough() -> None:
    back_off = BackOff()
    assert [back_off.after(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [back_off.after(3600.0), back_off.after(0.0)] == [0.5, 1]


def test_an_end_in_words() -> None:
    assert describe(3) == "ended with status 3"
    assert describe(-9) == "was ended by SIGKILL"


def test_places_of_modules_are_the_supervisors_own(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conveyor_server.py").write_text("raise SystemExit('the wrong one')")
    code = (
        "import subprocess, sys; sys.path[:] = [path for path in sys.path if path]\n"
        "from conveyor_server.supervisor.process import _command\n"
        "sys.exit(subprocess.run([*_command(), '--help'], stdout=subprocess.DEVNULL).returncode)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_supervisor_loads_nothing_that_serves() -> None:
    code = (
        "import sys; from conveyor_server.__main__ import main\n"
        "r = main(['--workers', '2', '--host', '192.0.2.1', '--allow-anonymous', *sys.argv[1:]])\n"
        "assert not {'grpc', 'onnxruntime', 'numpy', 'prometheus_client'} & set(sys.modules); sys.exit(r)"
    )
    why = "cannot listen on 192.0.2.1:50051: Cannot assign requested address"
    for form, said in (("text", f"conveyor serve: {why}\n"), ("auto", None)):
        command = [sys.executable, "-c", code, "--log-format", form]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        # To whoever reads logs by program, the reason is a record like the others.
        assert done.stderr == said or json.loads(done.stderr)["message"] == why
