"""Compiles `_turn.pyx` when the package is installed, where there is a C compiler; else the package goes without it.

HATCH_CONVEYOR_COMPILED=required makes a failure an error, =off leaves it out. Invariant: a wheel that holds the
compiled part is tagged for its platform, one that does not is pure.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_MODULE = "conveyor_server._turn"
_SOURCE = Path("server", "conveyor_server", "_turn.pyx")
_CHOICE = "HATCH_CONVEYOR_COMPILED"


class CompiledPart(BuildHookInterface):  # type: ignore[type-arg]  # any builder's configuration
    """The hook of hatchling; it finds it by its base."""

    PLUGIN_NAME = "custom"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._temporary = tempfile.TemporaryDirectory(prefix="conveyor-build-")
        self._folder = Path(self._temporary.name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel holds what was compiled."""
        del version, build_data, artifact_path
        self._temporary.cleanup()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles into the wheel, or for an editable install beside the source.

        Raises:
            RuntimeError: it was required and cannot be compiled here.
        """
        choice = os.environ.get(_CHOICE, "")
        root = Path(self.root)
        if version == "editable":
            # What an older source made is not to be taken for this one's.
            for stale in (root / _SOURCE.parent).glob("_turn.*.so"):
                stale.unlink()
        if choice == "off":
            return
        try:
            built = _compile(root, self._folder)
        except Exception as error:  # no compiler, no headers, no linker: each has an exception of its own
            if choice == "required":
                raise RuntimeError(f"{_MODULE} cannot be compiled here: {error}") from error
            self.app.display_warning(
                f"conveyor: {_MODULE} cannot be compiled here ({error}): the server does without it, and slower. "
                f"Install a C compiler and Python's headers; or set {_CHOICE}=off, and nothing is tried."
            )
            return
        if version == "editable":
            shutil.copy(built, root / _SOURCE.parent)
            return
        build_data["force_include"][str(built)] = f"{_MODULE.rpartition('.')[0].replace('.', '/')}/{built.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(root: Path, folder: Path) -> Path:
    """The shared object, in this folder."""
    # Of the build's own requirements, which a build that leaves it out does not need.
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    for part in (root / _SOURCE).parent.glob("_turn*.p?[xi]"):
        shutil.copy(part, folder)
    source = folder / _SOURCE.name
    # Without symbols for a debugger, which would be six times the code.
    flags = {"extra_compile_args": ["-O3", "-g0"], "extra_link_args": ["-s"]}
    extension = Extension(_MODULE, [str(source)], **flags)
    distribution = Distribution({"name": "conveyor", "ext_modules": cythonize([extension], quiet=True)})
    command = build_ext(distribution)
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(_MODULE))
