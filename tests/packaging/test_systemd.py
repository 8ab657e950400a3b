"""deploy/systemd: what the unit says agrees with the commands, the settings and the drain."""

from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
from conveyor_server import configuration
from conveyor_server.explain import command
from conveyor_server.settings import Settings


class _Unit(dict[str, Any]):
    """Options of a section; one that comes twice adds to itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, list) and name in self:
            value = [*self[name], *value]
        super().__setitem__(name, value)


@pytest.fixture(scope="module")
def service(root: Path) -> dict[str, str]:
    unit = RawConfigParser(strict=False, dict_type=_Unit)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(root / "deploy" / "systemd" / "conveyor.service")
    assert {"Unit", "Service", "Install"} == set(unit.sections())
    return dict(unit["Service"])


def test_it_runs_what_is_installed_with_one_file_of_settings(service: dict[str, str], tmp_path: Path) -> None:
    serve = service["ExecStart"].split()
    assert serve[:2] == ["/opt/conveyor/bin/conveyor", "serve"]
    assert service["ExecStartPre"].split()[1:3] == ["config", "check"]
    flag, path = serve[2:]
    assert flag == "--config"
    assert path in service["ExecStartPre"]
    file = tmp_path / Path(path).name
    file.write_text('models = "/var/lib/conveyor/models"\nstore = "sqlite:/var/lib/conveyor/sessions.db"\n')
    assert str(configuration.load([flag, str(file)], {}).models) == "/var/lib/conveyor/models"
    assert command(["check", flag, str(file)]) == 0


def test_the_stop_is_longer_than_the_drain(service: dict[str, str]) -> None:
    # A supervisor passes SIGTERM on itself.
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) > Settings().drain_s + Settings().drain_notice_s + 5


def test_it_may_write_its_own_folder_alone(service: dict[str, str]) -> None:
    assert service["ProtectSystem"] == "strict"
    assert service["DynamicUser"] == "yes"
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == "yes"
