"""The server as a process of its own, on free ports of this machine, for as long as a `with` lasts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

READY_S = 60.0
STOP_S = 30.0


class ServerError(Exception):
    """The server did not start, or did not stop, as it should; the message ends with what it logged last."""


class Server:
    """`conveyor serve` on the models of a folder. Left by SIGTERM, and its exit status is checked."""

    def __init__(self, models: Path, log: Path) -> None:
        self.models = models
        self.log = log
        self.port, self.metrics_port = _free_ports()
        self.target = f"127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def command(self) -> list[str]:
        ports = ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        return ["serve", "--models", str(self.models), *ports]

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Beside this interpreter, as PATH may know another.
        executable = Path(sys.executable).with_name("conveyor")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                [executable, *self.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
                # Ctrl-C in the terminal is for the demo, which then stops the server itself.
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = None
        if error is None and status != 0:
            ended = f"did not stop within {STOP_S:g} s" if status is None else f"exited with {status}"
            raise self._failed(f"the server {ended} after SIGTERM")

    def metrics(self) -> dict[str, Metric]:
        """What the server counts, by metric."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as page:  # noqa: S310 - our own http URL
            return {family.name: family for family in text_string_to_metric_families(page.read().decode())}

    def _wait_ready(self) -> None:
        """Follows the server's own health until it serves; a server that exits ends the wait at once."""
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        with grpc.insecure_channel(self.target, options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            replies = health.Watch(  # type: ignore[attr-defined]  # the stubs know Check alone
                health_pb2.HealthCheckRequest(), timeout=READY_S, wait_for_ready=True
            )

            def cancel_at_exit() -> None:
                self._process.wait()
                replies.cancel()

            threading.Thread(target=cancel_at_exit, daemon=True).start()
            try:
                for reply in replies:
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.RpcError as error:
                ended = self._process.poll()
                why = f"was not ready within {READY_S:g} s" if ended is None else f"exited with {ended}"
                raise self._failed(f"the server {why}") from error
        raise self._failed("the server ended its health stream")

    def _failed(self, what: str) -> ServerError:
        last = "\n".join(self.log.read_text().splitlines()[-15:])
        return ServerError(f"{what}; {self.log} ends with:\n{last}")


def _free_ports() -> tuple[int, int]:
    """Two ports that are free now. Held together, so that they differ."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return int(first.getsockname()[1]), int(second.getsockname()[1])
