"""The folder of models on disk: `NAME/VERSION/model.onnx`.

Invariant: a path is made only of a checked name and version, so no request reaches a file outside the folder.
"""

import os
import re
from pathlib import Path
from typing import TypeAlias

from conveyor_server.stamp import Stamp, stamp

MODEL_FILE = "model.onnx"
# Describes adopted files; of all versions of a model.
DESCRIPTION_FILE = "model.yaml"
# Another one once any file of a version is another: each file's name with its stamp, in order.
Look: TypeAlias = tuple[tuple[str, Stamp], ...]
# Files that whoever writes them is not done with.
_UNFINISHED = (".tmp", ".part", ".partial", ".swp", "~")
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,128}")
_VERSION = re.compile(r"0|[1-9][0-9]{0,17}")


class ModelFolder:
    """What lies in the folder now. Any thread; every call looks at the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> dict[str, list[str]]:
        """Model names, sorted, with their versions, newest last; entries that are no model are passed over.

        So are names that are hidden or say that somebody is not done: `.charlm`, `charlm.tmp`.

        Raises:
            OSError: the folder itself cannot be read.
        """
        entries = (entry.name for entry in self.root.iterdir())
        names = sorted(name for name in entries if is_name(name) and not is_unfinished(name))
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
        try:
            return path if path.is_file() else None
        except OSError:
            return None  # it cannot be looked at

    def look(self, name: str, version: str) -> Look:
        """How the files of a version look now; those that are hidden or named as unfinished do not count.

        Nothing (an empty look) where there is no such version.
        """
        path = self.path(name, version)
        if path is None:
            return ()
        try:
            with os.scandir(path.parent) as entries:
                files = sorted(entry.name for entry in entries if not is_unfinished(entry.name))
        except OSError:
            return ()  # it went meanwhile
        description = self.root / name / DESCRIPTION_FILE
        return ((f"../{DESCRIPTION_FILE}", stamp(description)), *((file, stamp(path.parent / file)) for file in files))

    def is_gone(self, name: str, version: str) -> bool:
        """The version's file is not there. Where that cannot be found out, it is not gone."""
        try:
            (self.root / name / version / MODEL_FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # a file server that does not answer, or rights that changed
        return False

    def looks(self) -> dict[tuple[str, str], Look]:
        """`look` of every version.

        Raises:
            OSError: the folder itself cannot be read.
        """
        found = {
            (name, version): self.look(name, version) for name, several in self.scan().items() for version in several
        }
        return {key: look for key, look in found.items() if look}


def is_unfinished(name: str) -> bool:
    """True for what is hidden, or named as somebody's work that is not done."""
    return name.startswith(".") or name.endswith(_UNFINISHED)


def is_name(text: str) -> bool:
    """True for a model name: 1 to 128 of letters, digits, dot, underscore and hyphen, and not dots alone."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """True for a version: a decimal number without leading zeros."""
    return _VERSION.fullmatch(text) is not None
