"""The place of an adopted file in a folder of models: NAME/model.yaml and NAME/VERSION/model.onnx.

Invariant: a version folder gets the model's file last, and nothing that is there is replaced unasked; so a server that
looks meanwhile sees no half of a model. A file that is in its place already stays there untouched.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from conveyor_server.adopt.answers import Refused
from conveyor_server.repository.folder import MODEL_FILE, is_name, is_version
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import FILE_NAME, Description, read_description
from conveyor_server.runner.nodes import tensors

MODELS, _VERSION = Path("models"), "1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model's version belongs.

    Attributes:
        models: folder of all models.
        name: of the model.
        version: of the model.
    """

    models: Path
    name: str
    version: str

    @classmethod
    def of(cls, source: Path, models: Path | None, name: str | None, version: str | None) -> "Place":
        """The place that was said; of what was not, the file's own if it is in one, else `models/STEM/1`.

        Args:
            source: the file.
            models: as said.
            name: as said.
            version: as said.

        Raises:
            Refused: a name or version that no model can have.
        """
        folder = source.absolute().parent
        in_place = source.name == MODEL_FILE and is_version(folder.name) and is_name(folder.parent.name)
        own = cls(source.parent.parent.parent, folder.parent.name, folder.name) if in_place else None
        own = own or cls(MODELS, source.stem, _VERSION)
        place = cls(models or own.models, name or own.name, version or own.version)
        if not is_name(place.name):
            raise Refused(
                f"{place.name!r} is no name for a model: 1 to 128 of letters, digits, dot, underscore and hyphen"
            )
        if not is_version(place.version):
            raise Refused(f"{place.version!r} is no version: a whole number such as 1")
        return place

    @property
    def description(self) -> Path:
        """The model's model.yaml."""
        return self.models / self.name / FILE_NAME

    @property
    def file(self) -> Path:
        """The version's model.onnx."""
        return self.models / self.name / self.version / MODEL_FILE

    def check_free(self, source: Path, description: Description | None = None) -> None:
        """Raises Refused where another file is in the place, or the model is described otherwise.

        Args:
            source: the file that is to come here.
            description: of it; None: it is not known yet.
        """
        if self.file.exists() and not self.file.samefile(source):
            raise Refused(f"{self.file} is there already: choose another --version or --name, or say --overwrite")
        if description is not None and self.description.exists() and _read(self.description) != description:
            raise Refused(
                f"{self.description} is there already and says otherwise, and it holds for all versions: choose "
                "another --name, or say --overwrite"
            )

    def put(self, source: Path, proto: onnx.ModelProto, text: str) -> None:
        """Writes the description, the file, and beside it the weights that are not in it; replaces what is there.

        Args:
            source: the file; it stays where it is.
            proto: its graph.
            text: of its description.

        Raises:
            Refused: something cannot be written.
        """
        folder = self.file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _external(proto):
                _copy(source.parent / name, folder / name)
            with contextlib.ExitStack() as both:
                # Written whole, and then exchanged: a full disk leaves no old file with a new description.
                if not _is_same(source, self.file):
                    shutil.copyfile(source, both.enter_context(_replacing(self.file)))
                both.enter_context(_replacing(self.description)).write_text(text)
        except OSError as error:
            raise Refused(f"{error.filename or folder} cannot be written: {error.strerror}") from error


def _read(path: Path) -> Description | None:
    try:
        return read_description(path)
    except RunnerUnavailable:
        return None  # whatever it says, it is not this


def _external(proto: onnx.ModelProto) -> Iterator[str]:
    """Names of the files beside the model that its weights lie in, relative to its folder."""
    names: Iterable[str] = (
        item.value
        for tensor in tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for item in tensor.external_data
        if item.key == "location"
    )
    return iter(dict.fromkeys(names))


def _copy(source: Path, target: Path) -> None:
    if not _is_same(source, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as part:
            shutil.copyfile(source, part)


def _is_same(source: Path, target: Path) -> bool:
    return target.exists() and source.samefile(target)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside the target that takes its place once it is whole; of one that cannot be written, none is left."""
    part = target.with_name(f"{target.name}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
