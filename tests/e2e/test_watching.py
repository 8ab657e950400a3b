"""Real servers, their store and a Prometheus that watches them: panels have data, and what goes wrong is alerted.

It is one test, because its parts take seconds to start and what one half does is what the other looks at.
"""

import contextlib
import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import conveyor
import grafana
import grpc
import numpy as np
import pytest
import trustme
from conveyor_proto.codec import encode
from conveyor_proto.v1 import session_pb2, session_pb2_grpc
from conveyor_server.exposition import TABLE
from prometheus_process import PrometheusProcess
from valkey_process import ValkeyProcess

from tests.fault.model import NAME, SIZE, write_model
from tests.fault.replica import Replica

ROOT = Path(__file__).resolve().parents[2]
_SCRAPE_S = 1.0
_PATIENCE_S = 60.0
_LIMIT, _BUSY = 24, 6
_X = np.random.default_rng(1).standard_normal((2000, SIZE)).astype(np.float32)


class Watched:
    """Two servers that share a store, and who watches them. The first serves; the second is for what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        models = folder / "models"
        write_model(models)
        broken = models / "broken" / "1" / "model.onnx"
        broken.parent.mkdir(parents=True)
        broken.write_bytes(b"no model at all")
        (folder / "valkey").mkdir()
        self.valkey = ValkeyProcess(folder / "valkey")
        flags = ["--store", self.valkey.url, "--checkpoint-ms", "50", "--passivate-after-s", "0.5"]
        flags += ["--store-timeout-s", "0.3", "--sync-patience-s", "0.1", "--max-sessions", str(_LIMIT)]
        # It expires within days, which is told.
        issued = self.authority.issue_cert("127.0.0.1", not_after=datetime.now(UTC) + timedelta(days=7))
        issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        flags += ["--tls-certificate", str(folder / "server.pem"), "--tls-key", str(folder / "server.pem")]
        # Runs go on a thread of their own, so that steps are seen to wait.
        flags += ["--inline-run-s", "0", "--max-queue-s", "60"]
        self.servers = {
            "first": Replica("first", models, folder, flags),
            "second": Replica("second", models, folder, [*flags, "--drain-notice-s", "120"]),
        }
        ports = {name: server.metrics_port for name, server in self.servers.items()}
        self.prometheus = PrometheusProcess(folder / "prometheus", ports, _hasty_rules(folder), every_s=_SCRAPE_S)

    @contextlib.contextmanager
    def running(self) -> Iterator["Watched"]:
        """All of them."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.valkey.kill)
            for server in self.servers.values():
                stack.callback(server.kill)
                server.start()
            for server in self.servers.values():
                server.wait_ready()
            stack.enter_context(self.prometheus)
            # What comes before the first look is no rise of anything.
            self.until("count(up == 1) == 2")
            yield self

    def target(self, name: str) -> str:
        """A server's address."""
        return f"127.0.0.1:{self.servers[name].port}"

    def connect(self, name: str) -> conveyor.Client:
        """A client of a server."""
        tls = conveyor.TLS(root_certificates=self.authority.cert_pem.bytes())
        return conveyor.connect(self.target(name), tls=tls, connect_timeout_s=_PATIENCE_S)

    def until(self, expr: str) -> None:
        """Returns once an expression has a series."""
        self.prometheus.wait_until(lambda: self.prometheus.query(expr), _PATIENCE_S)


def _hasty_rules(folder: Path) -> list[Path]:
    """The rules as they are, but that nothing has to be so for long."""
    made = []
    for file in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"):
        copy = folder / file.name
        copy.write_text(re.sub(r"^( +for: )\w+$", r"\g<1>1s", file.read_text(), flags=re.MULTILINE))
        made.append(copy)
    return made


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with Watched(tmp_path).running() as parts:
        yield parts


# ---------------------------------------------------------------- traffic


@contextlib.contextmanager
def _in_the_background(work: Callable[[], None]) -> Iterator[None]:
    """Done again and again until the block ends; whatever it raises fails the test."""
    failures: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert failures == []


def _mistakes(watched: Watched) -> None:
    """Of callers: a wrong shape, a gap, a session that never was; and a step that is sent twice."""
    trusting = grpc.ssl_channel_credentials(watched.authority.cert_pem.bytes())
    with grpc.secure_channel(watched.target("first"), trusting) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        made = stub.CreateSession(session_pb2.CreateSessionRequest(model=NAME, session_id="by-hand"))
        assert made.session.session_id == "by-hand"

        def step(session: str, seq: int, x: np.ndarray) -> str:
            request = session_pb2.StepRequest(session_id=session, seq=seq, inputs=[encode(x, "x")])
            try:
                stub.Step(request)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

        told = [step("by-hand", 1, _X[:1]), step("by-hand", 1, _X[:1]), step("by-hand", 9, _X[:1])]
        told += [step("by-hand", 2, _X[:1, :2]), step("nobody", 1, _X[:1])]
        assert told == ["OK", "OK", "OUT_OF_RANGE", "INVALID_ARGUMENT", "NOT_FOUND"]
        stub.CloseSession(session_pb2.CloseSessionRequest(session_id="by-hand"))


def _too_many(watched: Watched) -> None:
    """Sessions that cannot leave memory, until there is no room."""
    with watched.connect("first") as client, contextlib.ExitStack() as stack:

        def fill() -> None:
            for _ in range(_LIMIT + 1):
                stack.enter_context(client.session(NAME, durability="none", timeout_s=5.0))

        with pytest.raises(conveyor.SessionsExhausted):
            fill()


def _moves(watched: Watched) -> None:
    """A session that the second server takes while the first one has it: that one is fenced at its next write."""
    with (
        watched.connect("first") as one,
        watched.connect("second") as other,
        one.session(NAME, session_id="moves", durability="async") as former,
    ):
        former.step(_X[0])
        former.flush()
        with other.session(session_id="moves", resume=True) as taker:
            taker.step(_X[1])
            with contextlib.suppress(conveyor.ConveyorError):
                former.step(_X[1])
            watched.until("conveyor_sessions_fenced_total > 0")


# ---------------------------------------------------------------- the test


def test_panels_have_data_and_what_goes_wrong_is_alerted(watched: Watched) -> None:
    prometheus = watched.prometheus
    with watched.connect("first") as client, contextlib.ExitStack() as stack:
        # One that is forgotten, for the store to sweep away, and one that sleeps on its stream.
        with client.session(NAME, durability="async", idle_timeout_s=1.0, detach_on_exit=True) as forgotten:
            forgotten.step(_X[0])
        sleeper = stack.enter_context(client.session(NAME, durability="async"))
        sleeper.step(_X[0])
        _mistakes(watched)
        _too_many(watched)
        _moves(watched)
        watched.until("conveyor_sessions_asleep > 0")
        sleeper.step(_X[1])

        busy = stack.enter_context(client.population(NAME, _BUSY, durability="async"))
        chunks = np.broadcast_to(_X, (_BUSY, *_X.shape))

        with _in_the_background(lambda: busy.step(chunks)):
            watched.until("max_over_time(conveyor_steps_ready[1m]) > 0")
            _the_store_goes_and_comes(watched)
            _everything_was_seen_to_move(watched)
            os.kill(watched.servers["second"].pid, signal.SIGTERM)
            watched.until('conveyor_draining{instance="second"} == 1')
            _panels_have_data(prometheus)

    _fires(watched, "ConveyorModelFailed", instance="first", model="broken", severity="warning")
    _fires(watched, "ConveyorDrainStuck", instance="second")
    _fires(watched, "ConveyorCertificateExpires", instance="second")
    watched.servers["second"].kill()
    _fires(watched, "ConveyorDown", instance="second", severity="critical")
    assert prometheus.firing("ConveyorAbsent") == []
    for alert in prometheus.alerts():
        texts = " ".join(alert["annotations"].values())
        assert "{{" not in texts
        assert "error" not in texts, texts
        assert (ROOT / alert["annotations"]["runbook_url"]).exists()
    # The other server's are none of these.
    assert {alert["labels"]["instance"] for alert in prometheus.firing("ConveyorDown")} == {"second"}


def _the_store_goes_and_comes(watched: Watched) -> None:
    watched.valkey.signal(signal.SIGSTOP)
    try:
        _fires(watched, "ConveyorStoreAway", instance="first", severity="critical")
    finally:
        watched.valkey.signal(signal.SIGCONT)
    watched.until("sum(conveyor_store_away) == 0")
    log = watched.servers["first"].log.read_text()
    assert log.index("the store does not answer: ") < log.index("the store answers again")


def _everything_was_seen_to_move(watched: Watched) -> None:
    """No metric is shown that has been 0 all the time: a graph of zeros is no proof."""
    for row in TABLE:
        name = f"{row.name}_count" if row.kind == "histogram" else row.name
        if row.name != "conveyor_draining":
            watched.until(f"max_over_time({name}[5m]) > 0")


def _panels_have_data(prometheus: PrometheusProcess) -> None:
    values = {name: _values(prometheus, variable) for name, variable in grafana.variables().items()}
    assert values == {"job": ["conveyor"], "instance": ["first", "second"], "model": ["broken", NAME]}
    choices: list[grafana.Chosen] = [{"job": values["job"]}, {**values, "instance": ["first"], "model": [NAME]}]
    empty = []
    for chosen in choices:
        for asked in grafana.queries():
            expr = grafana.put(asked.expr, chosen, interval_s=60, scrape_s=_SCRAPE_S)
            series = prometheus.query(expr)
            if not series or all(math.isnan(float(one["value"][1])) for one in series):
                empty.append((asked.where, expr))
    assert empty == []


def _values(prometheus: PrometheusProcess, variable: dict[str, object]) -> list[str]:
    """What a variable offers, where everything of the variables before it is chosen."""
    query = variable["query"]
    assert isinstance(query, dict)
    series, label = grafana.labels(query["query"])
    found = prometheus.query(grafana.put(series, {"job": ["conveyor"]}, interval_s=60, scrape_s=_SCRAPE_S))
    return sorted({one["metric"][label] for one in found})


def _fires(watched: Watched, name: str, **labels: str) -> None:
    """An alert is seen to fire, with these labels."""

    def seen() -> bool:
        return any(labels.items() <= alert["labels"].items() for alert in watched.prometheus.firing(name))

    try:
        watched.prometheus.wait_until(seen, _PATIENCE_S)
    except AssertionError as error:
        raise AssertionError(f"{name} {labels} did not fire; {json.dumps(watched.prometheus.alerts())}") from error
