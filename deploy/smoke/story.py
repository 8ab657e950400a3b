"""What `make compose-smoke` does: docker-compose.yml built and run, a server killed under load, and what is left of it.

Invariant: each line says what was done or what was seen, and the first thing that is not as it should be ends it.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploy.smoke.project import Project, SmokeError, fetch, query, wait_for
from deploy.smoke.streams import FIRST, SESSIONS, STEPS, Crowd, export, undisturbed

REPLICAS = ("conveyor-1", "conveyor-2", "conveyor-3")
ALL = ("server", "prometheus", "grafana", *REPLICAS, "valkey", "envoy")
SERVER_IMAGE = "conveyor-server:0.1.0"
# Of the server's image, unpacked.
GOAL_BYTES = 360_000_000
SERVER, ENVOY, GRAFANA = "127.0.0.1:50051", "127.0.0.1:50050", "http://127.0.0.1:3000"
# In the server's container: who it is, what it can import, where it can write, which tools it finds.
_INSIDE = """
import importlib.util as i, os, shutil, tempfile
tools = [name for name in ("gcc", "cc", "pip", "pip3", "curl", "wget") if shutil.which(name)]
modules = [name for name in ("torch", "pip", "setuptools", "ensurepip") if i.find_spec(name)]
writable = [path for path in ("/", "/opt/conveyor", "/models", "/usr") if os.access(path, os.W_OK)]
print(os.getuid(), tools + modules, writable)
"""


def _step(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise SmokeError(what)


def smoke(services: Sequence[str], *, demo: bool) -> None:
    """The whole of it.

    Args:
        services: those to start.
        demo: the profile `demo` too.

    Raises:
        SmokeError: something is not as it should be.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="conveyor-smoke-") as folder:
        models = Path(folder)
        export(models)
        with Project(models, ("scale",)) as project:
            _build(project)
            _step(f"up --wait: {', '.join(services)}")
            project.up(*services)
            _inside(project)
            killed, sessions = _kill_one_under_load(project)
            _prometheus(project, killed, sessions)
            if "grafana" in services:
                _grafana()
            _drain(project)
            _step("down, volumes too")
    if demo:
        _demo()
    _step(f"all of it is as it should be; {time.monotonic() - start:.0f} s")


def _build(project: Project) -> None:
    _step("build the server's image")
    project.build("server")
    size, base = project.image_bytes(SERVER_IMAGE), project.image_bytes(project.build_argument("server", "PYTHON"))
    _step(
        f"  {SERVER_IMAGE}: {size / 1e6:.0f} MB (the goal is {GOAL_BYTES / 1e6:.0f}), "
        f"{(size - base) / 1e6:.0f} MB of it over its base image"
    )


def _inside(project: Project) -> None:
    _step("inside the server's container")
    seen = project.python("server", _INSIDE)
    _expect(seen == "10001 [] []", f"user, tools and places to write should be `10001 [] []`, and are `{seen}`")
    _step("  user 10001, no torch, no installer, no compiler, nowhere to write but /tmp")


def _kill_one_under_load(project: Project) -> tuple[str, float]:
    """The server that was killed, and how many sessions it had."""
    _step(f"{SESSIONS} sessions of {STEPS} steps on the single server, for comparison")
    expected = undisturbed(SERVER)
    _step(f"the same through Envoy, to three servers; {FIRST} steps each")
    crowd = Crowd(ENVOY)
    crowd.wait_half()
    active = 'sum by (instance) (conveyor_sessions_active{job="conveyor-scale"})'
    wait_for(f"{SESSIONS} sessions are open", lambda: sum(query(active).values()) == SESSIONS)
    counts = query(active)
    _step("  " + ", ".join(f"{name}: {count:.0f}" for name, count in sorted(counts.items())))
    _expect(len(counts) == len(REPLICAS) and min(counts.values()) > 0, "every server should have sessions")
    instance = max(counts, key=lambda name: counts[name])
    killed = instance.partition(":")[0]
    _step(f"kill {killed}, and {STEPS - FIRST} more steps each")
    project.compose("kill", killed)
    crowd.go_on()
    answers = crowd.finish()
    _expect(
        np.array_equal(answers, expected),
        f"answers differ from the undisturbed ones, by up to {np.abs(answers - expected).max():.1e}",
    )
    _step(f"  all {answers.shape[0] * answers.shape[1]:,} answers are those of the undisturbed server, to the bit")
    return killed, counts[instance]


def _prometheus(project: Project, killed: str, sessions: float) -> None:
    _step("what Prometheus has")
    groups = fetch("http://127.0.0.1:9090/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    _expect(bool(rules), "there are no rules")
    wait_for("every rule is evaluated", lambda: all(rule["health"] == "ok" for rule in _rules()))
    taken = f'sum(conveyor_sessions_taken_total{{job="conveyor-scale"}}) >= {sessions}'
    wait_for(f"the {sessions:.0f} sessions of {killed} were taken over", lambda: bool(query(taken)))
    _step(f"  {len(rules)} rules, all evaluated; {query(taken)['']:.0f} sessions taken over by other servers")
    _step(f"start {killed} again")
    project.up(killed)
    up = 'up{job=~"conveyor.*"} == 1'
    names = {f"{name}:9464" for name in ("server", *REPLICAS)}
    wait_for("all four servers are scraped", lambda: set(query(up)) == names)
    _step(f"  up: {', '.join(sorted(names))}")


def _rules() -> list[dict[str, str]]:
    groups = fetch("http://127.0.0.1:9090/api/v1/rules")["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _grafana() -> None:
    _step("what Grafana shows without a login")
    titles = sorted(item["title"] for item in fetch(f"{GRAFANA}/api/search?type=dash-db"))
    _expect(bool(titles), "no dashboard is provisioned")
    _step(f"  {', '.join(titles)}")


def _drain(project: Project) -> None:
    _step("stop the servers: each drains")
    servers = ("server", *REPLICAS)
    project.compose("stop", *servers)
    statuses = {name: project.exit_status(name) for name in servers}
    _expect(set(statuses.values()) == {0}, f"they should have ended with 0: {statuses}")
    _step("  all ended with 0")


def _demo() -> None:
    """The profile `demo`: models are made in a container, into a volume, and graphs move."""
    with Project(None, ("demo",)) as project:
        _step("demo: build, train, export, stream")
        project.build("demo-train")
        project.up("server", "prometheus", "demo-stream")
        _expect(project.exit_status("demo-train") == 0, "demo-train failed" + project.logs())
        rates = "sum(rate(conveyor_steps_total[1m])) > 0"
        wait_for("steps are answered", lambda: bool(query(rates)))
        wait_for("both models are", lambda: query("count(count by (model) (conveyor_steps_total > 0))") == {"": 2.0})
        _step(f"  {query(rates)['']:.0f} steps a second, of two models")
