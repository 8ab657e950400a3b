"""The folder of models: every file that a server would load, read and checked without running it.

Invariant: it goes by the server's own reader, so that what is said to be no model is none to the server either.
"""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.repository.folder import MODEL_FILE, ModelFolder, is_name, is_unfinished, is_version
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.nodes import tensors
from conveyor_server.runner.step_file import StepFile, read_step_file
from conveyor_server.settings import Settings

_ELSEWHERE = "conveyor inspect FOLDER shows what is in it; export the model again, or take the version away"


@dataclass(frozen=True, slots=True)
class Readable:
    """A version that can be read.

    Attributes:
        state_bytes: of a session's state.
        file_bytes: of its file and the weights beside it.
    """

    name: str
    version: str
    state_bytes: int
    file_bytes: int


def check(settings: Settings) -> Iterator[Finding]:
    """Every version in the folder, and what lies there that is none."""
    root = settings.models
    try:
        found = ModelFolder(root).scan()
    except OSError as error:
        yield bad(
            f"the models' folder {root} cannot be read: {error.strerror}",
            "export a model into it with conveyor export, or name another with --models",
        )
        return
    if not found:
        yield warning(
            f"no model in {root}: the server starts, and serves nothing",
            f"conveyor export puts one at NAME/VERSION/{MODEL_FILE}",
        )
    for name, versions in found.items():
        for version in versions:
            yield _version(root, name, version)
    yield from _passed_over(root)
    yield from _open_to_others(root, found)


def readable(settings: Settings) -> list[Readable]:
    """The versions that can be read; none where the folder cannot."""
    found = []
    try:
        names = ModelFolder(settings.models).scan()
    except OSError:
        return []
    for name, versions in names.items():
        for version in versions:
            try:
                file = read_step_file(settings.models / name / version / MODEL_FILE)
            except RunnerUnavailable:
                continue
            found.append(Readable(name, version, file.spec.state_bytes, sum(map(_size, _files(file)))))
    return found


def _version(root: Path, name: str, version: str) -> Finding:
    path = root / name / version / MODEL_FILE
    try:
        file = read_step_file(path)
        for weights in _files(file)[1:]:
            with weights.open("rb"):
                pass
    except RunnerUnavailable as error:
        return bad(f"{name}/{version}: {error}", _ELSEWHERE)
    except OSError as error:
        return bad(
            f"{name}/{version}: {error.filename} cannot be read: {error.strerror}", f"chmod a+r {error.filename}"
        )
    spec = file.spec
    if not spec.digest:
        return warning(
            f"{name}/{version} has no digest, so that nobody can tell whether two servers have the same model",
            "export it again",
        )
    beside = f", {len(_files(file)) - 1} files of weights beside it" if len(_files(file)) > 1 else ""
    return good(f"{name}/{version}: {spec.state_bytes:,} bytes of state a session, digest {spec.digest[:16]}{beside}")


def _files(file: StepFile) -> Sequence[Path]:
    """The file, and the weights that lie beside it, each once."""
    beside = {
        next(item.value for item in tensor.external_data if item.key == "location")
        for tensor in tensors(file.proto)
        if tensor.data_location == tensor.EXTERNAL
    }
    return [file.path, *(file.path.parent / name for name in sorted(beside))]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _passed_over(root: Path) -> Iterator[Finding]:
    for entry in sorted(root.iterdir()):
        if not entry.is_dir() or is_unfinished(entry.name):
            continue
        if not is_name(entry.name):
            yield warning(f"{entry} is passed over: its name is none of a model", "rename it: letters, digits, '._-'")
            continue
        try:
            below = sorted(entry.iterdir())
        except OSError as error:
            yield bad(f"{entry} cannot be read: {error.strerror}", f"chmod a+rx {entry}")
            continue
        for version in below:
            if is_unfinished(version.name):
                continue
            if version.is_dir() and not is_version(version.name):
                yield warning(f"{version} is passed over: a version is a number without leading zeros", "rename it")
            elif version.is_dir() and not (version / MODEL_FILE).is_file():
                yield warning(f"{version} is passed over: no {MODEL_FILE} in it", "put it there, or remove the folder")
        if (entry / MODEL_FILE).is_file():
            yield warning(
                f"{entry / MODEL_FILE} is passed over: it is in no version's folder", f"move it to {entry}/1/"
            )


def _open_to_others(root: Path, found: dict[str, list[str]]) -> Iterator[Finding]:
    """What anybody on the machine may exchange for another model."""
    paths = [root, *(root / name for name in found)]
    paths += [root / name / version / file for name in found for version in found[name] for file in ("", MODEL_FILE)]
    # A sticky folder, such as /tmp, lets nobody replace another's files.
    wrong = [path for path in paths if (mode := path.stat().st_mode) & stat.S_IWOTH and not mode & stat.S_ISVTX]
    if wrong:
        listed = ", ".join(map(str, wrong[:3])) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        yield warning(f"everybody on this machine may change {listed}", f"chmod -R o-w {root}")
