"""What a user gets: the wheel's contents, and base and each extra in an environment of its own.

Each environment has a test of its own, so that the runner's workers install them side by side.
"""

import importlib.metadata
import re
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = {"conveyor", "conveyor_proto", "conveyor_server", "conveyor_export"}
BUILT = "from conveyor_server import compiled; print(compiled.BUILT)"
HEAVY = {"torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "prometheus-client", "pandas", "scipy"}

_OF_OTHER_EXTRAS = (
    "conveyor_server.store.valkey",
    "conveyor_server.telemetry.figures",
    "conveyor_server.telemetry.spans",
)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "conveyor-0.1.0.dist-info"}
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    for service in ("session", "model"):
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert f"conveyor_proto/v1/{service}{suffix}" in names
    assert not [name for name in names if re.search(r"(^|/)(tests?|conftest|benchmarks|examples)(/|\.py)", name)]
    assert not [name for name in names if "__pycache__" in name or name.endswith(".proto")]
    assert "conveyor-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_wheel_holds_what_was_compiled_and_says_for_whom(wheel: Path, new_environment) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    (compiled,) = (name for name in names if name.endswith(".so"))
    assert compiled.startswith("conveyor_server/_turn.cpython-")
    assert not wheel.name.endswith("-none-any.whl")
    environment = new_environment()
    environment.install(str(wheel))
    assert environment.run("python", "-c", BUILT).stdout.strip() == "True"


def test_without_a_compiler_the_wheel_is_pure_and_works(pure_wheel: Path, new_environment) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith(".so")]
    environment = new_environment()
    environment.install(str(pure_wheel))
    assert environment.run("python", "-c", BUILT).stdout.strip() == "False"


def test_base_is_the_sdk_and_light(wheel: Path, new_environment) -> None:
    environment = new_environment()
    environment.install(str(wheel))
    assert environment.distributions().isdisjoint(HEAVY)
    done = environment.run("python", "-W", "error", "-c", "import conveyor, conveyor.aio; print(conveyor.__version__)")
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0"), done.stderr
    helped = environment.run("conveyor", "--help")
    assert helped.returncode == 0
    assert "models" in helped.stdout
    # What another extra brings is named, in one line, by a command that needs it.
    commands = {
        "serve": [],
        "doctor": [],
        "adopt": ["model.onnx"],
        "inspect": ["models/m/1"],
        "export": ["m:f", "--out", "models/m/1"],
    }
    for command, arguments in commands.items():
        refused = environment.run("conveyor", command, *arguments)
        assert refused.returncode == 2, refused
        assert f"conveyor[{'export' if command == 'export' else 'server'}]" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_server_brings_no_torch(wheel: Path, new_environment) -> None:
    environment = new_environment()
    environment.install(f"{wheel}[server]")
    found = environment.distributions()
    assert {"onnx", "onnxruntime", "prometheus-client", "pyyaml"} <= found
    assert found.isdisjoint({"torch", "onnxscript", "onnxruntime-gpu"})
    helped = environment.run("conveyor", "serve", "--help")
    assert helped.returncode == 0, helped.stderr
    assert "--metrics-port" in helped.stdout
    # Every module can be imported: nothing in it needs what the extra does not bring, but for those that say so.
    code = (
        "import importlib, pkgutil, conveyor_server\n"
        "for module in pkgutil.walk_packages(conveyor_server.__path__, 'conveyor_server.'):\n"
        f"    if module.name not in {_OF_OTHER_EXTRAS}: importlib.import_module(module.name)\n"
    )
    imported = environment.run("python", "-c", code)
    assert imported.returncode == 0, imported.stderr
    (environment.work_folder / "models").mkdir()
    start = ("conveyor", "serve", "--models", "models", "--port", "0", "--metrics-port", "0")
    refused = environment.run(*start, "--store", "valkey://127.0.0.1:1")
    assert (refused.returncode, "pip install 'conveyor[valkey]'" in refused.stderr) == (2, True), refused.stderr
    refused = environment.run(*start, "--traces")
    assert (refused.returncode, "pip install 'conveyor[otel]'" in refused.stderr) == (2, True), refused.stderr
    environment.install(f"{wheel}[valkey,otel]")
    # With it, there is a client, and what it says to the server lies in the wheel.
    code = (
        "from conveyor_server.store.opening import open_store\n"
        "print(open_store('valkey://127.0.0.1:1', timeout_s=1.0).name)\n"
    )
    opened = environment.run("python", "-c", code)
    assert (opened.returncode, opened.stdout) == (0, "valkey://127.0.0.1:1/0\n"), opened.stderr
    imported = environment.run("python", "-c", f"import {', '.join(_OF_OTHER_EXTRAS)}")
    assert imported.returncode == 0, imported.stderr


def test_export_makes_a_model(wheel: Path, new_environment) -> None:
    environment = new_environment()
    _link_torch(environment.site_packages)
    environment.install(f"{wheel}[export]")
    assert {"torch", "onnx", "onnxruntime", "onnxscript"} <= environment.distributions()
    (environment.work_folder / "mine.py").write_text(
        "import torch\n"
        "def model():\n    return torch.nn.GRU(3, 4, batch_first=True)\n"
        "def example():\n    return torch.zeros(1, 5, 3)\n"
    )
    arguments = ("mine:model", "--example", "mine:example", "--out", "models/mine/1")
    exported = environment.run("conveyor", "export", *arguments)
    assert exported.returncode == 0, exported.stderr
    inspected = environment.run("conveyor", "inspect", "models/mine/1")
    assert inspected.returncode == 0, inspected.stderr
    assert "GRU  3 -> 4" in inspected.stdout


def test_server_gpu_differs_from_server_by_its_runtime_alone(wheel: Path) -> None:
    """Only by its metadata: it brings CUDA, some 3 GB."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read("conveyor-0.1.0.dist-info/METADATA").decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]

    def brought_by(extra: str) -> set[str]:
        return {item.name for item in requirements if item.marker and item.marker.evaluate({"extra": extra})}

    assert {"server", "server-gpu", "export"} <= set(metadata.get_all("Provides-Extra", []))
    assert brought_by("server-gpu") ^ brought_by("server") == {"onnxruntime", "onnxruntime-gpu"}
    assert "torch" not in brought_by("server-gpu")
    assert {item.name for item in requirements if not item.marker} == {
        *("grpcio", "protobuf", "googleapis-common-protos", "numpy")
    }


def _link_torch(site_packages: Path) -> None:
    """Puts this environment's torch into another one: it weighs up to 2 GB, and is not what is tested."""
    torch = importlib.metadata.distribution("torch")
    home = Path(str(torch.locate_file("")))
    for name in {file.parts[0] for file in torch.files or () if not file.parts[0].startswith("..")}:
        (site_packages / name).symlink_to(home / name)
