"""`conveyor export` and `conveyor inspect`: arguments in, one readable message out when something is refused.

Invariant: a refusal exits with 2 and one message on standard error; a traceback comes only with `--debug`.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from conveyor_export.errors import ExportError

_REFUSED = 2


def export_command(argv: list[str]) -> int:
    """`conveyor export`: from a factory, its weights and an example to a model file. Returns the exit status."""
    return _guarded("export", _export_parser().parse_args(argv), _run_export)


def inspect_command(argv: list[str]) -> int:
    """`conveyor inspect`: what a model file says about itself. Needs no torch. Returns the exit status."""
    return _guarded("inspect", _inspect_parser().parse_args(argv), _run_inspect)


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conveyor export",
        description="Turns a trained PyTorch recurrent model into a step model that `conveyor serve` serves. "
        "The model is verified against PyTorch first; nothing is written when it differs.",
        epilog="example: conveyor export my_package.models:KeywordSpotter --weights state.pt "
        "--example my_package.models:example --out models/keywords/1",
    )
    parser.add_argument(
        "model",
        metavar="MODULE:FACTORY | FILE.pt2",
        help="what makes the module, found from the current folder: a class, a function without arguments or a module "
        "instance; or a file that torch.export.save wrote",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="state_dict to load, as torch.save(module.state_dict(), FILE) wrote"
    )
    parser.add_argument(
        "--weights-key", metavar="KEY", help="entry of a checkpoint that holds the state_dict, such as model_state_dict"
    )
    parser.add_argument(
        "--example",
        metavar="MODULE:NAME",
        help="one batch of example inputs, or a function that makes it: a tensor [batch, time, ...], a tuple or a dict "
        "(a .pt2 file brings its own)",
    )
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="version folder such as models/NAME/1, or a .onnx file"
    )
    parser.add_argument("--name", help="the model's name (default: the folder above the version)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest absolute difference from PyTorch that passes (default: %(default)g)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument("--external-data", action="store_true", help="put the weights in a file beside the model")
    parser.add_argument(
        "--allow-non-finite-inputs", action="store_true", help="let a server accept NaN and infinities for this model"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing on success")
    _add_debug(parser)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conveyor inspect", description="Shows what a model file says about itself.")
    parser.add_argument("path", help="a folder NAME/VERSION, a folder NAME (its highest version), or a .onnx file")
    parser.add_argument("--json", action="store_true", help="print the description as JSON (conveyor.v1.ModelSpec)")
    _add_debug(parser)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _guarded(command: str, arguments: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> int:
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as `head` has; what is still buffered must not raise at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        # Whatever is no refusal is a bug of ours: told in one message all the same, and never as success.
        message = (
            str(error)
            if isinstance(error, ExportError)
            else (f"internal error, {type(error).__name__}: {error}\nPlease report it with what --debug shows.")
        )
        print(f"conveyor {command}: {message}", file=sys.stderr)
        return _REFUSED
    return 0


def _run_export(arguments: argparse.Namespace) -> None:
    try:
        import torch  # noqa: F401 - asked for first, so that its absence is told plainly
    except ModuleNotFoundError as error:
        raise ExportError(f"{error}: install the exporter with pip install 'conveyor[export]'") from error
    from conveyor_export import export
    from conveyor_export.cli_load import load_example, load_module
    from conveyor_export.package import target

    target(arguments.out, overwrite=arguments.overwrite)
    module, own_example = load_module(arguments.model, arguments.weights, arguments.weights_key)
    example = load_example(arguments.example, own_example)
    result = export(
        module,
        example,
        arguments.out,
        name=arguments.name,
        tolerance=arguments.tolerance,
        allow_non_finite_inputs=arguments.allow_non_finite_inputs,
        external_data=arguments.external_data,
        overwrite=arguments.overwrite,
        quiet=arguments.quiet,
    )
    if not arguments.quiet:
        states = f"{len(result.spec.states)} states, {result.spec.state_bytes} bytes per session"
        print(f"wrote {result.path} ({states}, digest {result.spec.digest[:16]})")


def _run_inspect(arguments: argparse.Namespace) -> None:
    try:
        import onnx  # noqa: F401 - the base install has none
    except ModuleNotFoundError as error:
        raise ExportError(f"{error}: install it with pip install 'conveyor[server]' or 'conveyor[export]'") from error
    from conveyor_proto.spec import dump_spec

    from conveyor_export import package
    from conveyor_export.inspect_model import describe

    spec, file = package.read(arguments.path)
    print(dump_spec(spec) if arguments.json else describe(spec, package.load(file), file))
