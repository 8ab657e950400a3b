"""`conveyor adopt`: arguments in, a described and proved model in the folder, or one message that says what to do.

Invariant: nothing is written before the proof has held. A refusal is one message on standard error and exits with 2.
"""

import os

# onnxruntime reads it when it is imported, so before anything that might import it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from conveyor_server import runner
from conveyor_server.adopt.adoption import Adoption, adopt
from conveyor_server.adopt.answers import Refused
from conveyor_server.adopt.flags import add_answers, answers_of
from conveyor_server.adopt.place import MODELS, Place
from conveyor_server.adopt.render import render
from conveyor_server.adopt.triton import CONFIG, TritonModel, read_triton
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.foreign import inputs_of
from conveyor_server.runner.step_file import read_graph

_REFUSED = 2


def command(arguments: Sequence[str]) -> int:
    """`conveyor adopt`. Returns the exit status.

    Args:
        arguments: flags, without the program's name and `adopt`.
    """
    try:
        with _quiet():
            _run(parser().parse_args(arguments))
        sys.stdout.flush()
    except (Refused, RunnerUnavailable) as error:
        print(f"conveyor adopt: {error}", file=sys.stderr)
        return _REFUSED
    except BrokenPipeError:
        # The reader has seen enough, as `head` has; what is still buffered must not raise at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="conveyor adopt",
        description="Describes an ONNX file that Conveyor did not export: which inputs are states and which outputs "
        "their new values, where the rows of a batch lie, and what never changes. Steps sessions together and each "
        "alone in plain onnxruntime, and compares to the bit, before it writes the model into a folder that `conveyor "
        "serve` serves. What could be otherwise is asked, and the question says which flag answers it.",
        epilog="example: conveyor adopt silero_vad.onnx --name vad --batch-axis input=0 --shape input=512 "
        "--window input=64 --constant sr=16000",
    )
    made.add_argument(
        "file",
        metavar="FILE.onnx",
        type=Path,
        nargs="?",
        help="the file; it is copied, unless it is in its place already",
    )
    made.add_argument(
        "--triton",
        metavar="DIR",
        type=Path,
        help=f"a model of a Triton repository, with {CONFIG}: its states are taken as they are named there",
    )
    made.add_argument(
        "--models", metavar="DIR", type=Path, help="default: models; for a file DIR/NAME/VERSION/model.onnx its own"
    )
    made.add_argument("--name", metavar="NAME", help="the model's name; default: the file's, or Triton's")
    made.add_argument("--version", metavar="V", help="the model's version; default: 1, or the file's own")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    made.add_argument("--print", action="store_true", help="print the model.yaml, and write nothing")
    made.add_argument(
        "--example",
        metavar="PATH",
        type=Path,
        help="time steps for the proof: .npy [time, *shape], or .npz by input; default: random ones",
    )
    made.add_argument(
        "--tolerance",
        metavar="T",
        type=_tolerance,
        default=0.0,
        help="serve rows together where that changes answers and states by up to so much; default: 0, the same bits",
    )
    add_answers(made)
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the runner says of a model under proof belongs into a server's log, and not here."""
    log = logging.getLogger(runner.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _run(arguments: argparse.Namespace) -> None:
    answers, triton = answers_of(arguments), _triton(arguments)
    if triton is not None:
        answers = answers.over(triton.answers)
    path = arguments.file if triton is None else triton.file
    if path is None:
        raise Refused("which file? Say FILE.onnx, or --triton DIR")
    name = arguments.name or (None if triton is None else triton.name)
    place = Place.of(path, arguments.models or (None if triton is None else MODELS), name, arguments.version)
    is_kept = not (arguments.print or arguments.overwrite)
    if is_kept:
        place.check_free(path)
    adoption = adopt(path, answers, example=arguments.example, tolerance=arguments.tolerance)
    text = render(adoption.description, _head(path, adoption, triton), adoption.reasons)
    if arguments.print:
        print(text, end="")
        return
    if is_kept:
        place.check_free(path, adoption.description)
    place.put(path, adoption.proto, text)
    print(text)
    print(f"{place.file}: serve it with `conveyor serve --models {place.models}`")


def _triton(arguments: argparse.Namespace) -> TritonModel | None:
    if arguments.triton is None:
        return None
    if arguments.file is not None:
        raise Refused("FILE.onnx and --triton name two models: say one of them")
    return read_triton(arguments.triton, lambda path: list(inputs_of(read_graph(path)[0])))


def _head(path: Path, adoption: Adoption, triton: TritonModel | None) -> list[str]:
    proof = adoption.proof
    lines = [f"How {path.name} is served; docs/adopt.md says what each key means. Written by `conveyor adopt`."]
    if triton is not None:
        lines += [f"States, shapes and controls are those of Triton's {CONFIG}.", *triton.notes]
    lines.append(f"Proved: {proof}.")
    if adoption.rows:
        lines.append(adoption.rows)
    if proof.unmoved:
        lines.append(f"Never changed while it was proved: {', '.join(proof.unmoved)}.")
    return lines


def _tolerance(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
