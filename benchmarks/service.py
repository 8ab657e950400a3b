"""The Conveyor server under test, as `conveyor serve` runs it, in a process of its own."""

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.worker import WorkerError

_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_BATCH_METRIC = "conveyor_batch_rows"


class Service:
    """A running server; ready when the constructor returns.

    Args:
        repository: model repository.
        folder: where its log goes.
        flags: of the server, after the bench's own, so the same flag here goes before.
        environment: variables that the server has beside the bench's.
        launcher: what is run with the server's module and flags; a Python that runs modules, unless given.
    """

    def __init__(
        self,
        repository: Path,
        folder: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (sys.executable, "-m"),
    ) -> None:
        port, metrics_port = _free_ports(2)
        self.address = f"{_HOST}:{port}"
        self._metrics_url = f"http://{_HOST}:{metrics_port}/metrics"
        self._log = folder / "server.log"
        command = [*launcher, "conveyor_server", "--models", str(repository), "--host", _HOST]
        command += ["--port", str(port), "--metrics-port", str(metrics_port), "--threads", "1", "--device", "cpu"]
        command += flags
        variables = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **(environment or {})}
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C is for the bench, which ends the server after its clients.
            self._process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_serving()
        except grpc.RpcError as error:
            self.stop()
            raise WorkerError(f"the server did not start: {error}\n{self._log.read_text()[-4000:]}") from error

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def batches(self) -> tuple[float, float]:
        """Runs of all models so far, and the sessions in them, as the server counts."""
        with urllib.request.urlopen(self._metrics_url, timeout=_READY_TIMEOUT_S) as response:  # noqa: S310 - our own
            text = response.read().decode()
        totals: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            if family.name == _BATCH_METRIC:
                for sample in family.samples:
                    totals[sample.name] += sample.value
        return totals[f"{_BATCH_METRIC}_count"], totals[f"{_BATCH_METRIC}_sum"]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, as the server counts now; 0 where there are none."""
        with urllib.request.urlopen(self._metrics_url, timeout=_READY_TIMEOUT_S) as response:  # noqa: S310 - our own
            text = response.read().decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name)

    def stop(self) -> None:
        """Ends the server: in order, or not at all."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_serving(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            # The published types know only Check.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=_READY_TIMEOUT_S)
            # A server that cannot start ends, and then nobody is left to wait for.
            threading.Thread(target=lambda: (self._process.wait(), watch.cancel()), daemon=True).start()
            for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    return


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server((_HOST, 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
