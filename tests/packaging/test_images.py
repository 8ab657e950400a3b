"""The Dockerfiles, read as the engine reads them: what the images promise. hadolint has nothing against them."""

import re
import shlex
import subprocess
import sys
import threading
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from conveyor_server.settings import Settings

from examples._demo.server import Server

DOCKERFILES = ["server/Dockerfile", "examples/Dockerfile"]
# Instructions and their arguments.
Lines = list[tuple[str, str]]


@pytest.fixture(scope="module")
def server(root: Path) -> Lines:
    return _lines((root / "server" / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def last_stage(server: Lines) -> Lines:
    """What is shipped."""
    last = max(index for index, (instruction, _) in enumerate(server) if instruction == "FROM")
    return server[last:]


@pytest.fixture(scope="module")
def environment(last_stage: Lines) -> dict[str, str]:
    found = [arguments for instruction, arguments in last_stage if instruction == "ENV"]
    return dict(item.split("=", 1) for arguments in found for item in shlex.split(arguments))


@pytest.mark.parametrize("path", DOCKERFILES)
def test_hadolint_finds_nothing(root: Path, path: str) -> None:
    done = _hadolint(root / path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_what_is_wrong(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM python:latest\nENTRYPOINT conveyor serve\n")
    done = _hadolint(file)
    assert done.returncode != 0
    assert "DL3007" in done.stdout  # latest
    assert "DL3025" in done.stdout  # a shell before the server


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_base_image_is_pinned_and_the_same_everywhere(root: Path, path: str) -> None:
    lines = _lines((root / path).read_text())
    (pinned,) = [value for name, value in lines if name == "ARG" and value.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=python:3\.\d+\.\d+-slim-\w+", pinned)
    assert {value.split()[0] for name, value in lines if name == "FROM"} == {"${PYTHON}"}
    assert f"PYTHON_IMAGE:-{pinned.removeprefix('PYTHON=')}" in (root / "docker-compose.yml").read_text()


@pytest.mark.parametrize("path", DOCKERFILES)
def test_an_image_runs_as_nobody_in_particular(root: Path, path: str) -> None:
    """By number: an orchestrator that forbids root can tell."""
    user, group = _of(_lines((root / path).read_text()), "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_the_server_is_built_in_a_stage_that_is_left_behind(server: Lines, last_stage: Lines) -> None:
    assert [name for name, _ in server].count("FROM") == 2
    copied = [arguments for name, arguments in last_stage if name == "COPY"]
    assert copied == ["--from=build /opt/conveyor /opt/conveyor"]
    for name, arguments in last_stage:
        assert name != "RUN" or not re.search(r"\b(apt-get|curl|wget|gcc)\b|pip3? install", arguments)


def test_installers_are_taken_away(last_stage: Lines, server: Lines) -> None:
    (taken,) = [arguments for name, arguments in last_stage if name == "RUN"]
    for tool in ("pip", "setuptools", "wheel", "ensurepip"):
        assert tool in taken
    assert ("RUN", "python -m venv --without-pip /opt/conveyor") in server


def test_the_image_has_no_torch(server: Lines, root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    given = dict(value.split("=", 1) for name, value in server if name == "ARG" and "=" in value)
    installed = [given["EXTRA"], *shlex.split(given["BESIDE"])[0].split()]
    assert installed[0] == "server"
    for extra in (*installed, "server-gpu"):
        assert not [requirement for requirement in extras[extra] if re.match(r"torch|conveyor", requirement)], extra


def test_labels_say_what_it_is(last_stage: Lines, root: Path) -> None:
    labels = dict(item.split("=", 1) for item in shlex.split(_of(last_stage, "LABEL")))
    prefix = "org.opencontainers.image."
    assert {"title", "description", "licenses", "version", "revision"} <= {name.removeprefix(prefix) for name in labels}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert labels[f"{prefix}licenses"] == project["license"]
    assert ("ARG", f"VERSION={_version(root)}") in last_stage
    assert labels[f"{prefix}version"] == "${VERSION}"


def test_variables_are_settings_and_ports_are_theirs(environment: dict[str, str], last_stage: Lines) -> None:
    named = {name.removeprefix("CONVEYOR_").lower() for name in environment if name.startswith("CONVEYOR_")}
    assert named <= set(Settings.__dataclass_fields__)
    # A container's own loopback is no one else's. Who may call is for whoever runs it to say: not here.
    assert environment["CONVEYOR_HOST"] == "0.0.0.0"  # noqa: S104
    assert "allow_anonymous" not in named
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    settings = Settings()
    assert int(environment["CONVEYOR_PORT"]) == settings.port
    assert int(environment["CONVEYOR_METRICS_PORT"]) == settings.metrics_port
    assert _of(last_stage, "EXPOSE").split() == [str(settings.port), str(settings.metrics_port)]


def test_health_is_what_readyz_says(last_stage: Lines, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with Server(tmp_path / "models", tmp_path / "log") as server:
        assert _health(last_stage, server.metrics_port).returncode == 0
    gone = _health(last_stage, server.metrics_port)
    assert gone.returncode == 1
    assert "ConnectionRefusedError" in gone.stderr


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
def test_health_goes_by_the_status(last_stage: Lines, status: int, expected: int) -> None:
    asked = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as pages:
        thread = threading.Thread(target=pages.handle_request)
        thread.start()
        assert _health(last_stage, pages.server_port).returncode == expected
        thread.join()
    assert asked == ["/readyz"]


def test_health_imports_nothing_that_takes_time(last_stage: Lines) -> None:
    command = _health_command(last_stage)
    assert {"-I", "-S"} <= set(command)
    assert set(re.findall(r"\bimport ([\w, ]+)", command[-1])) == {"os, socket, sys"}


def test_the_server_is_told_to_stop(last_stage: Lines) -> None:
    assert _of(last_stage, "STOPSIGNAL") == "SIGTERM"
    # The exec form: a shell between would keep the signal to itself.
    assert yaml.safe_load(_of(last_stage, "ENTRYPOINT")) == ["conveyor", "serve"]


def test_cuda_comes_in_versions_that_were_seen_to_load(root: Path) -> None:
    text = (root / "server" / "constraints-gpu.txt").read_text()
    pinned = dict(re.findall(r"^(nvidia-\S+)==([\d.]+)$", text, re.MULTILINE))
    assert {"nvidia-cublas", "nvidia-cudnn-cu13"} <= set(pinned)
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server-gpu"]
    assert any(requirement.startswith("onnxruntime-gpu[cuda,cudnn]") for requirement in extra)


@pytest.mark.parametrize("path", [".dockerignore", "examples/Dockerfile.dockerignore"])
def test_the_build_sees_what_it_needs_alone(root: Path, path: str) -> None:
    rules = [line for line in (root / path).read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    for kept_path in kept:
        assert list(root.glob(kept_path)), kept_path
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for needed in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", *packages["packages"]):
        assert any(fnmatch(needed, kept_path) for kept_path in kept), needed


def _lines(text: str) -> Lines:
    """Instructions and their arguments: continued lines joined, comments left out."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in re.sub(r"\\\n", " ", kept).splitlines() if line.strip()]
    return [(instruction, arguments.strip()) for instruction, _, arguments in (line.partition(" ") for line in lines)]


def _of(lines: Lines, instruction: str) -> str:
    return [arguments for name, arguments in lines if name == instruction][-1]


def _health_command(lines: Lines) -> list[str]:
    command: list[str] = yaml.safe_load(_of(lines, "HEALTHCHECK").split("CMD", 1)[1])
    return [sys.executable if word == "python" else word for word in command]


def _health(lines: Lines, port: int) -> subprocess.CompletedProcess[str]:
    environment = {"CONVEYOR_METRICS_PORT": str(port)}
    return subprocess.run(
        _health_command(lines), env=environment, capture_output=True, text=True, check=False, timeout=30
    )


def _version(root: Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


def _hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, "--no-color", file], capture_output=True, text=True, check=False, timeout=60)
