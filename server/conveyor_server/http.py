"""/metrics, /healthz and /readyz on a port of their own.

Invariant: requests are served on threads of their own and ask the core thread only for what it answers in microseconds;
so a scrape never blocks a step, and a core thread that no longer turns is seen from outside.
"""

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar

from conveyor_proto.v1 import errors_pb2 as e
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from conveyor_server.errors import Refused, StartError
from conveyor_server.exposition import render
from conveyor_server.identity.gate import AUTHORIZATION_KEY, Gate
from conveyor_server.identity.methods import METRICS
from conveyor_server.metrics import Sample

T = TypeVar("T")
# Longer than any run that goes inline; a core thread that takes more is as good as dead.
ANSWER_S = 5.0
# How often the accepting thread looks whether it should stop.
_LOOK_S = 0.1


class MetricsServer:
    """Serves the three pages.

    Args:
        loop: of the core thread.
        sample: all numbers; called on the core thread.
        not_ready: why the server should get no traffic, empty when it should; called on the core thread.
        gate: before /metrics; the other two are for whoever balances load, who has no token.

    Raises:
        StartError: the port is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        loop: asyncio.AbstractEventLoop,
        sample: Callable[[], Sample],
        not_ready: Callable[[], str],
        gate: Gate,
    ) -> None:
        self._gate = gate
        self._loop = loop
        self._sample = sample
        self._not_ready = not_ready
        try:
            self._server = _server_class(host)((host, port), self._handler())
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK_S,), name="metrics", daemon=True)

    def start(self) -> None:
        """Serves from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Lets go of the port. Blocks for a moment; not for the core thread."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def _page(self, path: str, authorization: str) -> tuple[HTTPStatus, str, bytes]:
        try:
            if path == METRICS:
                refusal = self._refusal(authorization)
                if refusal is not None:
                    return refusal
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, render(self._on_core(self._sample))
            if path == "/healthz":
                self._on_core(lambda: None)
                return _text(HTTPStatus.OK, "alive")
            if path == "/readyz":
                why = self._on_core(self._not_ready)
                return _text(HTTPStatus.SERVICE_UNAVAILABLE if why else HTTPStatus.OK, why or "ready")
        except (TimeoutError, RuntimeError):
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, "the core thread does not answer")
        return _text(HTTPStatus.NOT_FOUND, "here are /metrics, /healthz and /readyz")

    def _refusal(self, authorization: str) -> tuple[HTTPStatus, str, bytes] | None:
        """What somebody is answered who may not see the numbers."""
        shown = {AUTHORIZATION_KEY: authorization} if authorization else {}
        try:
            self._gate.admit(METRICS, shown, list)
        except Refused as refusal:
            known = refusal.fault.reason != e.ERROR_REASON_CALLER_UNKNOWN
            return _text(HTTPStatus.FORBIDDEN if known else HTTPStatus.UNAUTHORIZED, refusal.fault.message)
        return None

    def _on_core(self, ask: Callable[[], T]) -> T:
        return on_core(self._loop, ask)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        page = self._page

        class Handler(BaseHTTPRequestHandler):
            # A peer that says nothing holds its thread no longer than this.
            timeout = 10.0
            server_version = "conveyor"
            sys_version = ""

            def do_GET(self) -> None:
                status, content_type, body = page(self.path.partition("?")[0], self.headers.get("Authorization", ""))
                self.send_response(status)
                if status == HTTPStatus.UNAUTHORIZED:
                    self.send_header("WWW-Authenticate", "Bearer")
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Probes come every few seconds and say nothing new."""

        return Handler


def on_core(loop: asyncio.AbstractEventLoop, ask: Callable[[], T]) -> T:
    """What `ask` answers on the core thread, whose loop that is. Any other thread.

    Raises:
        TimeoutError: the core thread did not come to it within ANSWER_S.
        RuntimeError: its loop is closed.
    """
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def call() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)
            raise

    loop.call_soon_threadsafe(call)
    return answer.result(ANSWER_S)


def _text(status: HTTPStatus, text: str) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _server_class(host: str) -> type[ThreadingHTTPServer]:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server
