"""Packages for Node.js, as a package.json names them: installed once, into the temporary folder, by one process."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_HOW = "install Node.js 18 or newer with npm, as CONTRIBUTING.md says"


def node() -> str:
    """The program.

    Raises:
        AssertionError: there is none; it says what to install.
    """
    found = shutil.which("node")
    assert found, f"there is no `node` in PATH: {_HOW}"
    assert shutil.which("npm"), f"there is no `npm` in PATH: {_HOW}"
    return found


def installed(package: Path) -> Path:
    """A folder whose `node_modules` has what a package.json asks for.

    Raises:
        AssertionError: npm could not install it; it says why.
    """
    node()
    key = hashlib.sha256(package.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"conveyor-node-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "installed"
        if not done.exists():
            shutil.copy(package, folder)
            command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
            made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
            assert made.returncode == 0, f"npm install failed:\n{made.stdout}\n{made.stderr}"
            done.touch()
    return folder
