"""Generates the stubs in proto/conveyor_proto from the .proto files, or checks that they are fresh.

protoc's virtual path (`conveyor_proto/v1=proto/conveyor/v1`) makes the generated imports right without patching. One
thing is patched: the Open Inference Protocol's messages bear names that its other clients' stubs bear too, and one
descriptor pool takes a name once; so ours live in a pool of their own, and both can be in one process.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
_POOL = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
_OWN_POOL = "from conveyor_proto.inference import pool as _descriptor_pool\n"


@dataclass(frozen=True)
class Tree:
    """A folder of .proto files and where its stubs go.

    Attributes:
        sources: of the .proto files, under ROOT.
        stubs: the package, as a path under ROOT.
        kinds: of output; a service's methods are bound without stubs where there is no grpc_python.
        own_pool: its messages live in a descriptor pool of their own.
    """

    sources: str
    stubs: str
    kinds: tuple[str, ...]
    own_pool: bool = False


TREES = (
    Tree("conveyor/v1", "conveyor_proto/v1", ("python", "grpc_python", "mypy", "mypy_grpc")),
    Tree("inference", "conveyor_proto/inference", ("python", "mypy"), own_pool=True),
)


def generate(tree: Tree, into: Path) -> None:
    """Writes the stubs of every .proto file of a tree under `into`."""
    sources, stubs = ROOT / tree.sources, into / tree.stubs
    stubs.mkdir(parents=True)
    well_known = Path(protoc.__file__).parent / "_proto"
    googleapis = Path(status_pb2.__file__).parents[2]
    outputs = [f"--{kind}_out={into}" for kind in tree.kinds]
    names = [f"{tree.stubs}/{source.name}" for source in sorted(sources.glob("*.proto"))]
    includes = [f"-I{tree.stubs}={sources}", f"-I{well_known}", f"-I{googleapis}"]
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", *plugins, *includes, *outputs, *names]) != 0:
        raise SystemExit("protoc refused the .proto files: see above")
    for grpc_stub in stubs.glob("*_pb2_grpc.py*"):
        proto = (sources / grpc_stub.name.split("_pb2_grpc")[0]).with_suffix(".proto").read_text()
        if "\nservice " not in proto:
            grpc_stub.unlink()
    if tree.own_pool:
        for stub in stubs.glob("*_pb2.py"):
            text = stub.read_text()
            if text.count(_POOL) != 1:
                raise SystemExit(f"{stub.name} takes its descriptor pool in a way that this program does not know")
            stub.write_text(text.replace(_POOL, _OWN_POOL))


def stale(tree: Tree, fresh: Path) -> list[str]:
    """Names of stubs that differ from what the .proto files give, that are missing, or that have no source."""
    made = {path.name: path.read_bytes() for path in (fresh / tree.stubs).iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / tree.stubs).iterdir() if path.name.endswith(SUFFIXES)}
    return sorted(name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name))


def main() -> int:
    """Command line: `python -m proto.generate [--check]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a stub is stale")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        for tree in TREES:
            generate(tree, fresh)
        names = [(tree, name) for tree in TREES for name in stale(tree, fresh)]
        if arguments.check:
            if names:
                print(f"stale stubs: {', '.join(name for _, name in names)}; run `make stubs`", file=sys.stderr)
                return 1
            print(f"stubs are fresh (grpcio-tools {version('grpcio-tools')})")
            return 0
        for tree, name in names:
            source, target = fresh / tree.stubs / name, ROOT / tree.stubs / name
            if source.exists():
                target.write_bytes(source.read_bytes())
            else:
                target.unlink()
        print(f"{len(names)} stubs rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
