"""A verified step model as a file that describes itself, and the description read back.

Invariant: a file under its final name is whole. It is written beside under another name and renamed, weights first, and
a failure leaves nothing behind and the older model as it was.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from conveyor_proto import vectors as verifier_vectors
from conveyor_proto.spec import METADATA_KEY, SpecError, check_spec, dump_spec, parse_spec
from conveyor_proto.v1 import spec_pb2, vectors_pb2

from conveyor_export.errors import ExportError, WriteRefused
from conveyor_export.package_graph import MAX_INLINE_BYTES, digest, externalize, strip, weights_bytes
from conveyor_export.step_model import StepModel

MODEL_FILE = "model.onnx"


def write(
    model: StepModel,
    verification: spec_pb2.Verification,
    path: str | os.PathLike[str],
    *,
    vectors: vectors_pb2.VerifierVectors | None = None,
    external_data: bool = False,
    overwrite: bool = False,
) -> Path:
    """Writes a step model with its description and the verifier's figures.

    Args:
        model: left as it is.
        verification: what `verify` returned for this model.
        vectors: what `make_vectors` returned for it; None: a server cannot check the file.
        path: a version folder `models/NAME/1`, made when missing, or a `.onnx` file.
        external_data: put the weights beside the model; done in any case when they exceed 2 GB.
        overwrite: replace a model that is there.

    Returns:
        The path of the `.onnx` file.

    Raises:
        WriteRefused: the place is taken, is no version folder, or cannot be written.
        ExportError: the graph is not valid ONNX, or its description contradicts itself.
    """
    file = target(path, overwrite=overwrite)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    strip(proto)
    proto.producer_name, proto.producer_version = "conveyor", model.spec.provenance.conveyor_version
    spec = spec_pb2.ModelSpec()
    spec.CopyFrom(model.spec)
    spec.verification.CopyFrom(verification)
    spec.digest = digest(proto)
    if external_data or weights_bytes(proto) > MAX_INLINE_BYTES:
        # Named by content: a server that has the older weights mapped keeps them.
        spec.external_data = f"{file.stem}-{spec.digest[:16]}.data"
    try:
        check_spec(spec)
        with _parents(file):
            _write_files(proto, spec, vectors, file, overwrite=overwrite)
    except SpecError as error:
        raise ExportError(f"the model's description contradicts itself: {error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the captured graph is not valid ONNX: {error}") from error
    except OSError as error:
        raise WriteRefused(f"cannot write {file}: {error.strerror or error}") from error
    return file


def target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The `.onnx` file that a path means; asked before the work starts, so that nobody waits for a refusal.

    Raises:
        WriteRefused: a model is there and `overwrite` is not set, or the folder's name is no version number.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        file = path
    elif path.name.isascii() and path.name.isdigit() and int(path.name) > 0:
        file = path / MODEL_FILE
    else:
        raise WriteRefused(
            f"{path} is neither a version folder nor a .onnx file: a server finds models in NAME/VERSION with a whole "
            f"number as version, such as {path / '1'}"
        )
    if file.exists() and not overwrite:
        raise WriteRefused(
            f"{file} is there already: export to the next version, or set overwrite (--overwrite) to replace it"
        )
    return file


def read(path: str | os.PathLike[str]) -> tuple[spec_pb2.ModelSpec, Path]:
    """The description of a model, from its file, its version folder, or its folder with versions (the highest).

    Returns:
        The spec, and the path of the `.onnx` file.

    Raises:
        ExportError: there is no model, or it was not written by this version's exporter.
    """
    file = _find(Path(path))
    return spec_of(load(file), file), file


def load(file: Path) -> onnx.ModelProto:
    """The graph of a file, without weights that lie beside it.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        return onnx.load_model(file, load_external_data=False)
    except OSError as error:
        raise ExportError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # each protobuf implementation has a parse error of its own
        raise ExportError(f"{file} is not an ONNX model: {error}") from error


def spec_of(proto: onnx.ModelProto, file: Path) -> spec_pb2.ModelSpec:
    """The description in a graph's metadata.

    Raises:
        ExportError: there is none, or it cannot be read; `file` is named.
    """
    text = next((item.value for item in proto.metadata_props if item.key == METADATA_KEY), None)
    if text is None:
        raise ExportError(f"{file} has no {METADATA_KEY} metadata: it was not written by `conveyor export`")
    try:
        return parse_spec(text)
    except SpecError as error:
        raise ExportError(f"{file}: {error}") from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    versions = [file for file in path.glob(f"*/{MODEL_FILE}") if file.parent.name.isdigit()]
    if not versions:
        raise ExportError(f"no model at {path}: give a .onnx file or a folder NAME/VERSION with {MODEL_FILE} in it")
    return max(versions, key=lambda file: int(file.parent.name))


def _write_files(
    proto: onnx.ModelProto,
    spec: spec_pb2.ModelSpec,
    vectors: vectors_pb2.VerifierVectors | None,
    file: Path,
    *,
    overwrite: bool,
) -> None:
    older = _external_data_of(file)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        draft = Path(folder) / file.name
        weights = draft.with_name(spec.external_data) if spec.external_data else None
        if weights is not None:
            proto = externalize(proto, weights)
        texts = {METADATA_KEY: dump_spec(spec)}
        if vectors is not None:
            texts[verifier_vectors.METADATA_KEY] = verifier_vectors.dump_vectors(vectors)
        onnx.helper.set_model_props(proto, texts)
        with draft.open("wb") as stream:
            stream.write(proto.SerializeToString(deterministic=True))
            stream.flush()
            os.fsync(stream.fileno())
        onnx.checker.check_model(str(draft))
        target(file, overwrite=overwrite)
        with _moved(weights, file.parent):
            draft.replace(file)
    if older is not None and older.name != spec.external_data:
        older.unlink(missing_ok=True)


@contextlib.contextmanager
def _moved(weights: Path | None, folder: Path) -> Iterator[None]:
    """The weights under their final name, taken away again when the block fails and they were not there before."""
    if weights is None:
        yield
        return
    final = folder / weights.name
    known = final.exists()
    weights.replace(final)
    try:
        yield
    except BaseException:
        if not known:
            final.unlink()
        raise


@contextlib.contextmanager
def _parents(file: Path) -> Iterator[None]:
    """The folders above a file, made when missing and taken away again when the block fails."""
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # someone else put something there
                folder.rmdir()
        raise


def _external_data_of(file: Path) -> Path | None:
    """The weights beside a model that is about to be replaced, if this exporter wrote them."""
    if not file.exists():
        return None
    try:
        spec, _ = read(file)
    except ExportError:
        return None  # not ours: nothing beside it is ours either
    return file.with_name(spec.external_data) if spec.external_data else None
