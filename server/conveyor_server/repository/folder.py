"""The folder of models on disk: `NAME/VERSION/model.onnx`.

Invariant: a path is made only of a checked name and version, so no request reaches a file outside the folder.
"""

import re
from pathlib import Path

MODEL_FILE = "model.onnx"
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,128}")
_VERSION = re.compile(r"0|[1-9][0-9]{0,17}")


class ModelFolder:
    """What lies in the folder now. Any thread; every call looks at the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> dict[str, list[str]]:
        """Model names, sorted, with their versions, newest last; entries that are no model are passed over.

        Raises:
            OSError: the folder itself cannot be read.
        """
        names = sorted(entry.name for entry in self.root.iterdir() if is_name(entry.name))
        found = {name: self.versions(name) for name in names}
        return {name: versions for name, versions in found.items() if versions}

    def versions(self, name: str) -> list[str]:
        """Versions of a model that have a file, newest last; empty where there is no such model."""
        if not is_name(name):
            return []
        try:
            entries = [entry.name for entry in (self.root / name).iterdir()]
        except OSError:
            return []  # not a folder, or one that went or is closed to us: no model either way
        return sorted((entry for entry in entries if self.path(name, entry) is not None), key=int)

    def path(self, name: str, version: str) -> Path | None:
        """The file of a version, or None where there is none."""
        if not (is_name(name) and is_version(version)):
            return None
        path = self.root / name / version / MODEL_FILE
        return path if path.is_file() else None


def is_name(text: str) -> bool:
    """True for a model name: 1 to 128 of letters, digits, dot, underscore and hyphen, and not dots alone."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """True for a version: a decimal number without leading zeros."""
    return _VERSION.fullmatch(text) is not None
