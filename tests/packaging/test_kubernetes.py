"""deploy/kubernetes: built by kubectl, taken by Kubernetes' own schemas, and in agreement with the settings.

Invariant: no cluster is asked. Kubernetes' schemas know no custom resources; the operator's, for the ServiceMonitor,
let names pass that they do not know, so its few fields are held here too.
"""

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conveyor_server import configuration
from conveyor_server.identity.access import read_access
from conveyor_server.identity.command import command
from conveyor_server.settings import Settings
from node_packages import installed, node

Json = dict[str, Any]
# The oldest with all that is used: preStop.sleep is on from 1.30. And the newest that the schemas know.
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
FILES = {"statefulset.yaml", "service.yaml", "poddisruptionbudget.yaml", "servicemonitor.yaml"}
LABELS = {"app.kubernetes.io/name": "conveyor"}


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy" / "kubernetes"


@pytest.fixture(scope="module")
def manifests(folder: Path) -> dict[str, Json]:
    return {name: yaml.safe_load((folder / name).read_text()) for name in FILES}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Json]) -> Json:
    return manifests["statefulset.yaml"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def server(pod: Json) -> Json:
    (server,) = pod["containers"]
    return server


@pytest.fixture(scope="module")
def kustomization(folder: Path) -> Json:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


@pytest.fixture(scope="module")
def settings(kustomization: Json) -> dict[str, str]:
    (generator,) = kustomization["configMapGenerator"]
    return dict(line.split("=", 1) for line in generator["literals"])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubectl_builds_what_the_schemas_take(folder: Path, version: str, settings: dict[str, str]) -> None:
    built = {each["kind"]: each for each in _built(folder)}
    assert set(built) == {"ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget", "ServiceMonitor"}
    for kind, each in built.items():
        if kind != "ServiceMonitor":
            kubernetes_validate.validate(each, version, strict=True)
    (server,) = built["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    # A name made of what is in it: other settings are other pods.
    assert server["envFrom"] == [{"configMapRef": {"name": built["ConfigMap"]["metadata"]["name"]}}]
    assert built["ConfigMap"]["data"] == settings
    assert server["image"].startswith("conveyor-server:")


def test_an_overlay_changes_image_and_settings_and_leaves_the_monitor_out(folder: Path, tmp_path: Path) -> None:
    """The one of docs/deployment.md, where there is no operator."""
    (tmp_path / "base").mkdir()
    for file in folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    text = (folder.parents[1] / "docs" / "deployment.md").read_text()
    (overlay,) = [block for block in text.split("```yaml\n") if block.startswith("apiVersion: kustomize")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(overlay.partition("```")[0])
    built = {each["kind"]: each for each in _built(tmp_path / "mine")}
    assert "ServiceMonitor" not in built
    assert built["ConfigMap"]["data"]["CONVEYOR_MAX_SESSIONS"] == "20000"
    (server,) = built["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    assert server["image"] == "registry.example/conveyor-server:0.1.0"


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", sorted(FILES - {"servicemonitor.yaml"}))
def test_kubernetes_schemas_take_it(manifests: dict[str, Json], name: str, version: str) -> None:
    kubernetes_validate.validate(manifests[name], version, strict=True)


@pytest.mark.parametrize("change", [{"replicas": "three"}, {"replica": 3}])
def test_kubernetes_schemas_do_not_take_a_broken_one(manifests: dict[str, Json], change: Json) -> None:
    whole = manifests["statefulset.yaml"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**whole, "spec": {**whole["spec"], **change}}, NEWEST, strict=True)


def test_the_base_names_each_file_and_what_it_generates(kustomization: Json, server: Json, folder: Path) -> None:
    assert set(kustomization["resources"]) == FILES
    assert {path.name for path in folder.iterdir()} == {*FILES, "kustomization.yaml"}
    (generator,) = kustomization["configMapGenerator"]
    assert server["envFrom"] == [{"configMapRef": {"name": generator["name"]}}]
    assert [image["name"] for image in kustomization["images"]] == [server["image"]]


def test_labels_find_what_they_are_meant_to(manifests: dict[str, Json]) -> None:
    stateful = manifests["statefulset.yaml"]["spec"]
    assert stateful["template"]["metadata"]["labels"] == LABELS
    assert stateful["selector"]["matchLabels"] == LABELS
    assert manifests["service.yaml"]["spec"]["selector"] == LABELS
    assert manifests["poddisruptionbudget.yaml"]["spec"]["selector"]["matchLabels"] == LABELS
    assert manifests["servicemonitor.yaml"]["spec"]["selector"]["matchLabels"] == LABELS
    assert all(manifest["metadata"]["labels"] == LABELS for manifest in manifests.values())


def test_the_service_is_headless_and_has_the_servers_ports(manifests: dict[str, Json], server: Json) -> None:
    service = manifests["service.yaml"]
    assert service["spec"]["clusterIP"] == "None"
    assert manifests["statefulset.yaml"]["spec"]["serviceName"] == service["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"grpc": Settings().port, "metrics": Settings().metrics_port}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports


def test_its_settings_are_the_servers(settings: dict[str, str], server: Json) -> None:
    given = {**settings, **{each["name"]: "conveyor-0" for each in server["env"]}}
    loaded = configuration.load([], given)
    assert loaded.store == "valkey://valkey:6379/0"
    # Who may call is said: whoever else is in the cluster may not.
    assert loaded.access is not None
    (mount,) = [mount for mount in server["volumeMounts"] if mount["name"] == "access"]
    assert loaded.access.parent == Path(mount["mountPath"])


def test_health_is_asked_by_grpc_and_life_by_healthz(server: Json) -> None:
    for probe in ("startupProbe", "readinessProbe"):
        # No service: the server as a whole.
        assert server[probe]["grpc"] == {"port": Settings().port}
    # A server that drains is NOT_SERVING, and must not be killed for it.
    assert server["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}


def test_the_grace_is_longer_than_what_comes_before_the_end(pod: Json, server: Json, settings: dict[str, str]) -> None:
    first_s = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = float(settings["CONVEYOR_DRAIN_NOTICE_S"]) + float(settings["CONVEYOR_DRAIN_S"])
    assert pod["terminationGracePeriodSeconds"] >= first_s + drain_s + 10


def test_the_pod_has_no_rights(pod: Json, server: Json) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    rights = server["securityContext"]
    assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_volumes_are_those_that_are_mounted(pod: Json, server: Json) -> None:
    mounted = {mount["name"]: mount.get("readOnly", False) for mount in server["volumeMounts"]}
    assert mounted == {"models": True, "access": True, "tmp": False}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)


def test_the_documents_tokens_make_an_access_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (root / "docs" / "deployment.md").read_text().partition("## Kubernetes\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^ {4}conveyor token (new .*) >> access\.toml$", text, re.MULTILINE)
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    assert [command(shlex.split(line)) for line in lines] == [0, 0]
    access = tmp_path / "access.toml"
    access.write_text(capsys.readouterr().out)
    read_access(access)
    assert all(f"--out {name}" in text and (tmp_path / name).exists() for name in ("observe.token", "gateway.token"))


def test_the_service_monitor_scrapes_the_metrics_port_with_a_token(manifests: dict[str, Json]) -> None:
    monitor, service = manifests["servicemonitor.yaml"], manifests["service.yaml"]
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert set(_keys(endpoint)) == {
        *("port", "interval", "scrapeTimeout", "authorization"),
        *("authorization.type", "authorization.credentials"),
        *("authorization.credentials.name", "authorization.credentials.key"),
    }
    seconds = [float(endpoint[key].removesuffix("s")) for key in ("scrapeTimeout", "interval")]
    assert seconds == sorted(seconds)
    # The rules look at jobs whose name begins with it; the job is the service's name.
    assert service["metadata"]["name"].startswith("conveyor")


def test_the_operators_schema_takes_the_service_monitor_and_no_broken_one(manifests: dict[str, Json]) -> None:
    whole = manifests["servicemonitor.yaml"]
    number, blind = copy.deepcopy(whole), copy.deepcopy(whole)
    number["spec"]["endpoints"][0]["interval"] = 5
    del blind["spec"]["selector"]
    tests = Path(__file__).resolve().parents[1] / "kubernetes"
    command = [node(), tests / "service-monitor.mjs", installed(tests / "package.json")]
    given = json.dumps([whole, number, blind])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    good, of_number, of_blind = json.loads(done.stdout)
    assert good == ""
    assert "interval must be string" in of_number
    assert "selector" in of_blind


def _built(folder: Path) -> list[Json]:
    """What `kubectl kustomize` makes of a folder."""
    command = [Path(sys.executable).with_name("kubectl"), "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _keys(value: Json, path: str = "") -> Iterator[str]:
    for key, inner in value.items():
        yield path + key
        if isinstance(inner, dict):
            yield from _keys(inner, f"{path}{key}.")
