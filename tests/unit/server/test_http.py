"""The three pages, asked over a real socket while the core thread runs, and while it does not."""

import asyncio
import hashlib
import json
import socket
import time
import urllib.error
import urllib.request

import pytest
from conveyor_server import http
from conveyor_server.errors import StartError
from conveyor_server.http import MetricsServer
from conveyor_server.identity.gate import Gate
from conveyor_server.metrics import Metrics


def get(server: MetricsServer, path: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.fixture
async def pages(directory):
    why = [""]
    metrics = Metrics()
    server = MetricsServer(
        "127.0.0.1",
        0,
        loop=asyncio.get_running_loop(),
        sample=lambda: metrics.sample(directory),
        not_ready=lambda: why[0],
        gate=Gate(),
    )
    server.start()
    yield server, why
    await asyncio.to_thread(server.stop)


async def test_metrics(pages) -> None:
    status, content_type, body = await asyncio.to_thread(get, pages[0], "/metrics")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    assert "conveyor_build_info{" in body
    assert "process_resident_memory_bytes" in body


async def test_ready_or_why_not(pages) -> None:
    server, why = pages
    assert (await asyncio.to_thread(get, server, "/readyz"))[::2] == (200, "ready\n")
    why[0] = "loading models"
    assert (await asyncio.to_thread(get, server, "/readyz"))[::2] == (503, "loading models\n")
    assert (await asyncio.to_thread(get, server, "/healthz"))[::2] == (200, "alive\n")


async def test_other_pages(pages) -> None:
    assert (await asyncio.to_thread(get, pages[0], "/"))[0] == 404
    assert (await asyncio.to_thread(get, pages[0], "/healthz?x=1"))[0] == 200


async def test_a_core_thread_that_does_not_turn_is_not_healthy(pages, monkeypatch) -> None:
    monkeypatch.setattr(http, "ANSWER_S", 0.05)
    asked = asyncio.get_running_loop().run_in_executor(None, get, pages[0], "/healthz")
    time.sleep(0.5)  # noqa: ASYNC251 - the loop must not turn meanwhile
    assert (await asked)[::2] == (503, "the core thread does not answer\n")
    assert (await asyncio.to_thread(get, pages[0], "/healthz"))[0] == 200


async def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port} for metrics: Address already in use"):
            MetricsServer(
                "127.0.0.1",
                port,
                loop=asyncio.get_running_loop(),
                sample=lambda: None,
                not_ready=lambda: "",
                gate=Gate(),
            )


async def test_numbers_are_for_those_who_may_observe(directory, tmp_path) -> None:
    path = tmp_path / "access.toml"
    tokens = {"viewer": ["observe"], "device": ["infer"]}
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\ntenant = "*"\n'
            f"roles = {json.dumps(roles)}\n"
            for name, roles in tokens.items()
        )
    )
    server = MetricsServer(
        "127.0.0.1",
        0,
        loop=asyncio.get_running_loop(),
        sample=lambda: Metrics().sample(directory),
        not_ready=lambda: "",
        gate=Gate(path),
    )
    server.start()

    def asked(page: str, token: str = "") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}{page}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.headers.get("WWW-Authenticate", "")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get("WWW-Authenticate", "")

    try:
        for page, token, want in (
            ("/metrics", "", (401, "Bearer")),
            ("/metrics", "nobody", (401, "Bearer")),
            ("/metrics", "device", (403, "")),
            ("/metrics", "viewer", (200, "")),
            # For whoever balances load.
            ("/healthz", "", (200, "")),
            ("/readyz", "", (200, "")),
        ):
            assert await asyncio.to_thread(asked, page, token) == want
    finally:
        await asyncio.to_thread(server.stop)
