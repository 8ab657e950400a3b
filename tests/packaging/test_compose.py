"""The container files, read as the engine reads them: what they promise, and what has to agree between them."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from conveyor_server.settings import Settings

STAGE = re.compile(r"^FROM\s+(?P<image>\S+)(?:\s+AS\s+(?P<name>\S+))?", re.MULTILINE | re.IGNORECASE)


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", (root / "server" / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(instruction, arguments) for instruction, _, arguments in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def environment(dockerfile: list[tuple[str, str]]) -> dict[str, str]:
    """ENV of the last stage."""
    last = max(index for index, (instruction, _) in enumerate(dockerfile) if instruction == "FROM")
    found = [arguments for instruction, arguments in dockerfile[last:] if instruction == "ENV"]
    return dict(item.split("=", 1) for arguments in found for item in shlex.split(arguments))


def _of(dockerfile: list[tuple[str, str]], instruction: str) -> str:
    return [arguments for name, arguments in dockerfile if name == instruction][-1]


def test_two_services_and_their_images_are_pinned(compose: dict[str, Any], root: Path) -> None:
    assert set(compose["services"]) == {"server", "prometheus"}
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    for image, _ in STAGE.findall((root / "server" / "Dockerfile").read_text()):
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", image), image


def test_models_are_mounted_read_only_and_never_made_up(compose: dict[str, Any], environment: dict[str, str]) -> None:
    (mount,) = compose["services"]["server"]["volumes"]
    assert mount["source"] == "./models"
    assert mount["read_only"] is True
    assert mount["target"] == environment["CONVEYOR_MODELS"]
    # An engine makes a missing folder, as root: the demo could then not write into it.
    assert mount["bind"]["create_host_path"] is False


def test_ports_are_published_on_this_machine_alone(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items()}
    assert published["server"] == ["127.0.0.1:50051:50051", "127.0.0.1:9464:9464"]
    assert published["prometheus"] == ["127.0.0.1:9090:9090"]


def test_ports_are_the_same_everywhere(
    environment: dict[str, str], dockerfile: list[tuple[str, str]], compose: dict[str, Any], root: Path
) -> None:
    settings = Settings()
    assert int(environment["CONVEYOR_PORT"]) == settings.port
    assert int(environment["CONVEYOR_METRICS_PORT"]) == settings.metrics_port
    assert _of(dockerfile, "EXPOSE").split() == [str(settings.port), str(settings.metrics_port)]
    prometheus = yaml.safe_load((root / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in compose["services"]
    assert int(port) == settings.metrics_port


def test_every_environment_variable_is_a_setting(environment: dict[str, str], compose: dict[str, Any]) -> None:
    given = {*environment, *compose["services"]["server"]["environment"]}
    named = {name.removeprefix("CONVEYOR_").lower() for name in given if name.startswith("CONVEYOR_")}
    assert named <= set(Settings.__dataclass_fields__)
    # A container's own loopback is no one else's.
    assert environment["CONVEYOR_HOST"] == "0.0.0.0"  # noqa: S104
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_server_is_told_to_stop_and_given_the_time_to_drain(
    compose: dict[str, Any], dockerfile: list[tuple[str, str]]
) -> None:
    server = compose["services"]["server"]
    grace_s = float(server["stop_grace_period"].removesuffix("s"))
    assert grace_s > float(server["environment"]["CONVEYOR_DRAIN_S"])
    assert _of(dockerfile, "STOPSIGNAL") == "SIGTERM"
    # The exec form: a shell between would keep the signal to itself.
    assert yaml.safe_load(_of(dockerfile, "ENTRYPOINT")) == ["conveyor", "serve"]


def test_the_server_runs_without_rights(dockerfile: list[tuple[str, str]], compose: dict[str, Any]) -> None:
    user, group = _of(dockerfile, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert compose["services"]["server"]["read_only"] is True


def test_health_is_readiness_and_light(dockerfile: list[tuple[str, str]], compose: dict[str, Any]) -> None:
    _, command = _of(dockerfile, "HEALTHCHECK").split("CMD", 1)
    code = yaml.safe_load(command)[-1]
    compile(code, "healthcheck", "exec")
    assert "/readyz" in code
    assert "grpc" not in code
    assert compose["services"]["prometheus"]["depends_on"]["server"]["condition"] == "service_healthy"
    assert compose["services"]["prometheus"]["healthcheck"]["test"][0] == "CMD"


def test_the_image_has_no_torch(dockerfile: list[tuple[str, str]]) -> None:
    installs = [arguments for instruction, arguments in dockerfile if instruction == "RUN" and "install" in arguments]
    assert installs
    for arguments in installs:
        assert "torch" not in arguments
        assert "['export']" not in arguments
        assert "[export" not in arguments


def test_the_build_sees_the_wheels_sources_alone(root: Path) -> None:
    lines = (root / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    for path in kept:
        assert (root / path).exists(), path
    for needed in ("pyproject.toml", "README.md", "LICENSE", *_wheel_packages(root)):
        assert any(fnmatch(needed, path) for path in kept), needed


def _wheel_packages(root: Path) -> list[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
