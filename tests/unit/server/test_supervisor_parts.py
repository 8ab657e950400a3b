"""What a supervisor is made of: the port that it keeps, the settings that it hands on, the link to a worker."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conveyor_server import configuration
from conveyor_server.configuration import load
from conveyor_server.errors import StartError
from conveyor_server.settings import Settings
from conveyor_server.supervisor.link import Link, Report, address
from conveyor_server.supervisor.port import reserved

# ------------------------------------------------------------------ the port


def listener(port: int = 0, *, reuse: bool = False) -> socket.socket:
    """A socket that listens, as another program's would; with reuse, one that would share its port."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse))
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def test_workers_share_a_reserved_port_and_every_connection_reaches_one_of_them() -> None:
    with reserved("127.0.0.1", 0) as port, listener(port, reuse=True) as one, listener(port, reuse=True) as two:
        one.setblocking(False)
        two.setblocking(False)
        accepted = 0
        for _ in range(32):
            with socket.create_connection(("127.0.0.1", port)):
                for sock in (one, two):
                    with contextlib.suppress(BlockingIOError):
                        sock.accept()[0].close()
                        accepted += 1
    assert accepted == 32, "none was queued at the reservation"


@pytest.mark.parametrize("reuse", [False, True], ids=["alone", "would share"])
def test_a_port_on_which_someone_listens_is_refused(reuse) -> None:
    with listener(reuse=reuse) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            reserved("127.0.0.1", port),
        ):
            pass


def test_a_reserved_port_is_refused_to_others_while_nobody_listens_yet() -> None:
    with reserved("127.0.0.1", 0) as port:
        with pytest.raises(StartError, match="in use"), reserved("127.0.0.1", port):
            pass
        with pytest.raises(OSError, match="in use"):
            listener(port)
    listener(port).close()


def test_connections_of_a_server_that_has_just_ended_are_no_hindrance() -> None:
    with listener() as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            # The side that closes first keeps the connection for a minute.
            before.accept()[0].close()
            assert client.recv(1) == b""
    with pytest.raises(OSError, match="in use"), socket.socket() as strict:
        strict.bind(("127.0.0.1", port))
    with reserved("127.0.0.1", port) as same, listener(port, reuse=True):
        assert same == port


def test_a_name_is_reserved_at_all_its_addresses(monkeypatch) -> None:
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: here)
    with reserved("localhost", 0) as port:
        for ip in ("127.0.0.1", "127.0.0.2"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((ip, port))


def test_an_address_that_is_not_here_hinders_only_alone(monkeypatch) -> None:
    away = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [here, away])
    with reserved("localhost", 0) as port:
        assert port > 0
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [away])
    with pytest.raises(StartError, match=r"cannot listen on localhost:0: Cannot assign"), reserved("localhost", 0):
        pass


def test_a_host_that_is_none_is_told() -> None:
    with pytest.raises(StartError, match=r"cannot listen on \[::nobody\]:1: "), reserved("::nobody", 1):
        pass
    with pytest.raises(StartError, match=r"cannot listen on 127.0.0.1:70000: .*0-65535"), reserved("127.0.0.1", 70000):
        pass


# ------------------------------------------------------------------ settings


def test_workers_need_a_metrics_port_each() -> None:
    assert load(["--workers", "3", "--metrics-port", "65533", "--port", "1"], {}).workers == 3
    assert load(["--workers", "3", "--metrics-port", "0"], {}).workers == 3
    with pytest.raises(StartError, match="--workers 3 need the metrics ports 65534 to 65536: lower --metrics-port"):
        load(["--workers", "3", "--metrics-port", "65534"], {})
    with pytest.raises(StartError, match="the metrics ports 9000 to 9001, and port is 9001: move one of them"):
        load(["--workers", "2", "--metrics-port", "9000", "--port", "9001"], {})
    with pytest.raises(StartError, match="is less than 1"):
        load(["--workers", "0"], {})


def test_settings_survive_the_way_to_a_worker() -> None:
    assert load([], configuration.environment(Settings())) == Settings()
    other = {
        "models": Path("/m"),
        "host": "::1",
        "tls_certificate": Path("c"),
        "tls_key": Path("k"),
        "device": "cpu",
        "max_batch": 8,
        "inline_run_s": 0.1,
        "log_level": "debug",
    }
    for field in dataclasses.fields(Settings):
        default = field.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            other[field.name] = default + type(default)(1)
    given = dataclasses.replace(Settings(), **other)
    assert load([], configuration.environment(given)) == given


# ------------------------------------------------------------------ the link


def test_a_report_is_a_line() -> None:
    for report in (Report(metrics_port=9464), Report(error="line\nbreak"), Report()):
        line = report.encode()
        assert line.count(b"\n") == 1
        assert Report.decode(line) == report
    assert Report.decode(b"") == Report()


def test_a_process_without_supervisor_has_no_link() -> None:
    assert Link.inherited({"HOME": "/"}) is None


async def test_the_end_of_the_link_is_heard() -> None:
    ours, theirs = socket.socketpair()
    environment = {"HOME": "/", **address(3, theirs.detach())}
    link = Link.inherited(environment)
    assert environment == {"HOME": "/"}, "nobody else inherits it"
    assert link is not None
    assert link.index == 3
    with ours:
        link.tell(Report(metrics_port=1))
        assert Report.decode(ours.recv(100)).metrics_port == 1
        ended = asyncio.Event()
        # As long as the test run: the thread of the link waits for the end of the process.
        link.watch(ended.set, asyncio.get_running_loop(), 1e6)
        assert not ended.is_set()
    await asyncio.wait_for(ended.wait(), 10)
    link.tell(Report(error="to nobody"))


def test_a_worker_that_does_not_end_is_ended() -> None:
    ours, theirs = socket.socketpair()
    code = (
        "import asyncio, os, threading; from conveyor_server.supervisor.link import Link\n"
        "Link.inherited(os.environ).watch(print, asyncio.new_event_loop(), 0.05); threading.Event().wait()"
    )
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **address(0, theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.communicate(timeout=60)[1] == "it did not stop within 0 s: the process ends as it is\n"
    assert process.returncode == 1
