"""The wheel, built from the working tree, and environments that hold nothing but what is installed into them."""

import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python3.*")) / "site-packages"

    @property
    def work_folder(self) -> Path:
        folder = self.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder

    def install(self, requirement: str) -> None:
        # This interpreter's pip, so that none has to be installed first.
        command = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python")]
        run([*command, "install", "--quiet", "--disable-pip-version-check", requirement])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs one of its executables in a folder of its own, where no source can be imported by accident."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CONVEYOR_"))}
        executable = self.folder / "bin" / command[0]
        return subprocess.run(
            [executable, *command[1:]], cwd=self.work_folder, env=clean, capture_output=True, text=True, check=False
        )

    def distributions(self) -> set[str]:
        code = "import importlib.metadata as m; print(*{d.name.lower().replace('_', '-') for d in m.distributions()})"
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())


def run(command: Sequence[str], **environment: str) -> None:
    done = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a release would upload."""
    return _build(tmp_path_factory.mktemp("wheel"), "required")


@pytest.fixture
def pure_wheel(tmp_path: Path) -> Path:
    """The wheel that is built where there is no C compiler."""
    return _build(tmp_path / "pure", "", CC="/there/is/none")


def _build(folder: Path, choice: str, **environment: str) -> Path:
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        HATCH_CONVEYOR_COMPILED=choice,
        **environment,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    """Makes an environment without anything in it, not even pip."""

    def make() -> Environment:
        folder = tmp_path / "environment"
        venv.create(folder, symlinks=True)
        return Environment(folder)

    return make
