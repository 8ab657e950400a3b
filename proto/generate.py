"""Generates proto/conveyor_proto/v1 from proto/conveyor/v1, or checks that it is fresh.

protoc's virtual path (`conveyor_proto/v1=proto/conveyor/v1`) makes the generated imports right without patching.
"""

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "conveyor" / "v1"
STUBS = ROOT / "conveyor_proto" / "v1"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(into: Path) -> None:
    """Writes the stubs of every .proto file under `into`/conveyor_proto/v1."""
    well_known = Path(protoc.__file__).parent / "_proto"
    googleapis = Path(status_pb2.__file__).parents[2]
    outputs = [f"--{kind}_out={into}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    names = [f"conveyor_proto/v1/{source.name}" for source in sorted(SOURCES.glob("*.proto"))]
    includes = [f"-Iconveyor_proto/v1={SOURCES}", f"-I{well_known}", f"-I{googleapis}"]
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", *plugins, *includes, *outputs, *names]) != 0:
        raise SystemExit("protoc refused the .proto files: see above")
    for grpc_stub in (into / "conveyor_proto" / "v1").glob("*_pb2_grpc.py*"):
        proto = (SOURCES / grpc_stub.name.split("_pb2_grpc")[0]).with_suffix(".proto").read_text()
        if "\nservice " not in proto:
            grpc_stub.unlink()


def stale(fresh: Path) -> list[str]:
    """Names of stubs that differ from what the .proto files give, that are missing, or that have no source."""
    made = {path.name: path.read_bytes() for path in (fresh / "conveyor_proto" / "v1").iterdir()}
    kept = {path.name: path.read_bytes() for path in STUBS.iterdir() if path.name.endswith(SUFFIXES)}
    return sorted(name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name))


def main() -> int:
    """Command line: `python -m proto.generate [--check]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a stub is stale")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        (fresh / "conveyor_proto" / "v1").mkdir(parents=True)
        generate(fresh)
        names = stale(fresh)
        if arguments.check:
            if names:
                print(f"stale stubs: {', '.join(names)}; run `make stubs`", file=sys.stderr)
                return 1
            print(f"stubs are fresh (grpcio-tools {version('grpcio-tools')})")
            return 0
        for name in names:
            source = fresh / "conveyor_proto" / "v1" / name
            if source.exists():
                (STUBS / name).write_bytes(source.read_bytes())
            else:
                (STUBS / name).unlink()
        print(f"{len(names)} stubs rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
