"""What the proof of an adopted file asks onnxruntime: the file as anybody runs it, and as it is served.

Invariant: the plain session is of the file itself, untouched, with onnxruntime's own settings; nothing that is served
has a hand in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
from conveyor_proto.codec import Array

from conveyor_server.runner.adopting import described
from conveyor_server.runner.base import RunFailed, RunnerUnavailable
from conveyor_server.runner.description import Description
from conveyor_server.runner.onnx_runner import OnnxRunner
from conveyor_server.runner.provider import Host
from conveyor_server.runner.step_file import StepFile

_FATAL_ONLY = 4


class PlainSession:
    """A file in plain onnxruntime on one thread of the CPU.

    Args:
        path: the file; weights that are not inline lie beside it.

    Raises:
        RunnerUnavailable: onnxruntime does not load it.
    """

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise RunnerUnavailable(f"onnxruntime {ort.__version__} does not load {path.name}: {error}") from error

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names.

        Raises:
            RunFailed: the model raised; the message has onnxruntime's words, for whoever has the file.
        """
        try:
            values: list[Array] = self._session.run(list(names), dict(feeds))
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise RunFailed(" ".join(str(error).split())) from error
        return values


def open_as_served(proto: onnx.ModelProto, description: Description, path: Path, capacity: int) -> OnnxRunner:
    """A runner of a file as it is served once it is described so. On one thread of the CPU.

    Args:
        proto: the file's own graph.
        description: of it.
        path: the file.
        capacity: slots, at least 1.

    Raises:
        RunnerUnavailable: the two do not fit, or onnxruntime does not load what comes of them.
    """
    model, spec = described(proto, description, path.parent, path.stem)
    file = StepFile(path, model, spec, spec.provenance.opset)
    return OnnxRunner(file, Host.of("cpu", 1), capacity)
