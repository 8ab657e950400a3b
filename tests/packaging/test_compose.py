"""The compose files, as Compose itself resolves them: every profile and overlay, and what has to agree between them."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_process import FILE, GPU_FILE, config, resolved
from conveyor_server import configuration
from conveyor_server.settings import Settings

ALWAYS = {"server", "prometheus", "grafana"}
SCALE = {"conveyor-1", "conveyor-2", "conveyor-3", "valkey", "envoy"}
DEMO = {"demo-train", "demo-stream"}
REPLICAS = {"conveyor-1", "conveyor-2", "conveyor-3"}
SERVERS = {"server", *REPLICAS}
PROFILES = [(), ("scale",), ("demo",), ("scale", "demo")]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """Of all profiles."""
    return resolved(FILE, profiles=("scale", "demo"))["services"]


@pytest.mark.parametrize("profiles", PROFILES)
@pytest.mark.parametrize("files", [(FILE,), (FILE, GPU_FILE)])
def test_compose_takes_every_profile_with_and_without_the_overlay(
    files: tuple[str, ...], profiles: tuple[str, ...]
) -> None:
    expected = ALWAYS | (SCALE if "scale" in profiles else set()) | (DEMO if "demo" in profiles else set())
    assert set(resolved(*files, profiles=profiles)["services"]) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("stop_grace_period:", "stop_grace_perriod:"), "stop_grace_perriod"),
        (("valkey: {condition: service_healthy}", "valkeyy: {condition: service_healthy}"), "valkeyy"),
    ],
)
def test_a_file_that_compose_would_not_take_is_refused(
    root: Path, tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    file = tmp_path / FILE
    file.write_text((root / FILE).read_text().replace(*change))
    done = config(file, profiles=("scale",))
    assert done.returncode != 0
    assert complaint in done.stderr


def test_images_are_pinned_by_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"]), name
    assert {name for name, service in services.items() if "build" in service} == SERVERS | DEMO


def test_ports_are_published_on_this_machine_alone(services: dict[str, dict[str, Any]]) -> None:
    published = {
        (name, int(port["published"]), port["target"], port["host_ip"])
        for name, service in services.items()
        for port in service.get("ports", ())
    }
    settings, here = Settings(), "127.0.0.1"
    assert published == {
        ("server", settings.port, settings.port, here),
        ("server", settings.metrics_port, settings.metrics_port, here),
        ("prometheus", 9090, 9090, here),
        ("grafana", 3000, 3000, here),
        ("envoy", 50050, settings.port, here),
    }


def test_servers_take_up_models_that_come_later(services: dict[str, dict[str, Any]]) -> None:
    assert all(float(services[name]["environment"]["CONVEYOR_WATCH"]) > 0 for name in SERVERS)


def test_who_may_call_is_said_because_the_ports_are_this_machines(services: dict[str, dict[str, Any]]) -> None:
    assert all(services[name]["environment"]["CONVEYOR_ALLOW_ANONYMOUS"] == "on" for name in SERVERS)


def test_models_are_read_only_for_servers_and_made_by_the_demo(services: dict[str, dict[str, Any]]) -> None:
    mounts = {name: service["volumes"] for name, service in services.items() if name in SERVERS | {"demo-train"}}
    assert len(mounts) == len(SERVERS) + 1
    for name, (mount,) in mounts.items():
        assert (mount["type"], mount["source"], mount["target"]) == ("volume", "models", "/models")
        assert mount.get("read_only", False) is (name in SERVERS)


def test_models_may_be_a_folder(root: Path) -> None:
    (mount,) = resolved(FILE, MODELS_DIR="./models")["services"]["server"]["volumes"]
    assert (mount["type"], mount["source"]) == ("bind", str(root / "models"))


def test_every_variable_of_a_server_is_a_setting(services: dict[str, dict[str, Any]]) -> None:
    names = {name for server in SERVERS for name in services[server]["environment"]}
    assert {name.removeprefix("CONVEYOR_").lower() for name in names} <= set(Settings.__dataclass_fields__)


def test_servers_are_given_the_time_to_drain(services: dict[str, dict[str, Any]]) -> None:
    for name in SERVERS:
        environment = services[name]["environment"]
        drain_s = float(environment["CONVEYOR_DRAIN_S"]) + float(environment.get("CONVEYOR_DRAIN_NOTICE_S", 0))
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > drain_s


def test_nothing_runs_with_rights_that_it_does_not_need(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
    # Its image begins as root, takes the volume for its own user and becomes that.
    assert {name for name, service in services.items() if "cap_add" in service} == {"valkey"}


def test_whatever_stays_has_a_health_check_and_is_started_again(
    services: dict[str, dict[str, Any]], root: Path
) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name == "demo-train" else "unless-stopped"), name
    for name in ("prometheus", "grafana", "valkey", "envoy"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    # A server's is its image's.
    assert "HEALTHCHECK" in (root / "server" / "Dockerfile").read_text()


def test_who_waits_for_whom(services: dict[str, dict[str, Any]]) -> None:
    waits = {
        (name, other): (how["condition"], how["required"])
        for name, service in services.items()
        for other, how in service.get("depends_on", {}).items()
    }
    healthy = ("service_healthy", True)
    assert waits == {
        **{(replica, "valkey"): healthy for replica in REPLICAS},
        **{("envoy", replica): healthy for replica in REPLICAS},
        ("grafana", "prometheus"): healthy,
        ("demo-stream", "server"): healthy,
        # No server waits: it takes the models up when they are there.
        ("demo-stream", "demo-train"): ("service_completed_successfully", True),
    }


def test_three_replicas_share_a_store_and_envoy_knows_their_names(
    services: dict[str, dict[str, Any]], root: Path
) -> None:
    assert {services[name]["environment"]["CONVEYOR_STORE"] for name in REPLICAS} == {"valkey://valkey:6379/0"}
    envoy = (root / "deploy" / "envoy" / "envoy.yaml").read_text()
    assert set(re.findall(r"address: (conveyor-\d)", envoy)) == REPLICAS
    [mount] = services["envoy"]["volumes"]
    assert mount["source"] == str(root / "deploy" / "envoy" / "envoy.yaml")
    assert mount["target"] in services["envoy"]["command"]
    # Envoy sees within two seconds that one drains, and the notice is longer.
    assert {float(services[name]["environment"]["CONVEYOR_DRAIN_NOTICE_S"]) for name in REPLICAS} == {3.0}


def test_prometheus_scrapes_every_server(services: dict[str, dict[str, Any]], root: Path) -> None:
    prometheus = yaml.safe_load((root / "deploy" / "prometheus" / "prometheus.yml").read_text())
    single, scaled = prometheus["scrape_configs"]
    assert single["static_configs"] == [{"targets": [f"server:{Settings().metrics_port}"]}]
    # By DNS: without the profile the names mean nothing, and nothing is missing.
    (names,) = scaled["dns_sd_configs"]
    assert set(names["names"]) == REPLICAS
    assert names["port"] == Settings().metrics_port
    # The rules look at jobs of these names.
    assert all(job["job_name"].startswith("conveyor") for job in (single, scaled))
    mounted = {mount["target"]: mount["source"] for mount in services["prometheus"]["volumes"]}
    assert mounted["/etc/prometheus/rules"] == str(root / "deploy" / "prometheus" / "rules")
    assert prometheus["rule_files"] == ["/etc/prometheus/rules/*.yml"]


def test_grafana_is_provisioned_and_nobody_is_its_administrator(
    services: dict[str, dict[str, Any]], root: Path
) -> None:
    mounted = {mount["target"]: mount["source"] for mount in services["grafana"]["volumes"]}
    assert mounted["/etc/grafana/provisioning"] == str(root / "deploy" / "grafana" / "provisioning")
    assert mounted["/var/lib/grafana/dashboards"] == str(root / "deploy" / "grafana" / "dashboards")
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_all_that_is_mounted_is_there(services: dict[str, dict[str, Any]]) -> None:
    """An engine would make a missing file as an empty folder, and the service would say something else."""
    sources = [
        Path(mount["source"]) for s in services.values() for mount in s.get("volumes", ()) if mount["type"] == "bind"
    ]
    assert sources
    assert [source for source in sources if not source.exists()] == []


def test_the_overlay_takes_a_gpu_and_nothing_less() -> None:
    services = resolved(FILE, GPU_FILE, profiles=("scale",))["services"]
    plain = resolved(FILE, profiles=("scale",))["services"]
    for name, service in services.items():
        if name not in SERVERS:
            assert service == plain[name], name
            continue
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
        assert service["build"]["args"]["EXTRA"] == "server-gpu"
        assert service["image"] != plain[name]["image"]
        # `auto` would go on with the CPU.
        added = {"CONVEYOR_DEVICE": "cuda", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
        assert service["environment"] == {**plain[name]["environment"], **added}


def test_the_override_of_the_docs_lets_in_those_alone_who_are_named(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "deployment.md").read_text()
    (override,) = [block for block in text.split("```yaml\n") if block.startswith("services:\n")]
    file = tmp_path / "compose.override.yml"
    file.write_text(override.partition("```")[0])
    server = resolved(FILE, file)["services"]["server"]
    published = {port["target"]: port.get("host_ip", "") for port in server["ports"]}
    assert published == {Settings().port: "", Settings().metrics_port: "127.0.0.1"}
    settings = configuration.load([], {"CONVEYOR_HOST": "0.0.0.0", **server["environment"]})  # noqa: S104
    assert settings.allow_anonymous is False
    (folder,) = [mount["target"] for mount in server["volumes"] if mount["type"] == "bind"]
    for path in (settings.access, settings.tls_certificate, settings.tls_key):
        assert str(path).startswith(f"{folder}/")


def test_names_of_profiles_are_the_documents(root: Path) -> None:
    text = (root / "docs" / "deployment.md").read_text()
    named = set(itertools.chain(*(re.findall(r"--profile (\w+)", part) for part in (text, (root / FILE).read_text()))))
    assert named == {"scale", "demo"}
