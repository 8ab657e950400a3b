"""Files and messages are data: nothing in the server, the contract or the SDK makes code or objects of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("server/conveyor_server", "proto/conveyor_proto", "client/conveyor")
# Modules that make objects of bytes.
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
YAML = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"}


def offences(source: str, where: str) -> Iterator[str]:
    """What in a source makes code or objects of data."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in MODULES:
                yield f"{where}:{node.lineno} imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in CALLS:
            yield f"{where}:{node.lineno} calls {called.id}"
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            whole = f"{called.value.id}.{called.attr}"
            if called.value.id == "yaml" and called.attr in YAML and not _is_safe(node):
                yield f"{where}:{node.lineno} calls {whole}"
            allows = [item for item in node.keywords if item.arg == "allow_pickle"]
            if any(not (isinstance(item.value, ast.Constant) and item.value.value is False) for item in allows):
                yield f"{where}:{node.lineno} allows pickle"
            if whole in {"np.load", "numpy.load"} and not allows:
                yield f"{where}:{node.lineno} calls {whole} without saying that it allows no pickle"


def _is_safe(call: ast.Call) -> bool:
    """The loader is given, and is one of ours: see strict_yaml."""
    given = [*call.args[1:], *(item.value for item in call.keywords if item.arg == "Loader")]
    return any(isinstance(item, ast.Name) and item.id == "_Loader" for item in given)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_makes_code_of_data(root: Path, package: str) -> None:
    found = [
        offence
        for path in sorted((root / package).rglob("*.py"))
        for offence in offences(path.read_text(), str(path.relative_to(root)))
    ]
    assert found == []


def test_the_one_loader_of_yaml_makes_nothing_but_plain_values() -> None:
    import yaml
    from conveyor_server.runner import strict_yaml

    assert issubclass(strict_yaml._Loader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        strict_yaml.load("!!python/object/apply:os.system [echo]")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import cloudpickle.x",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "np.savez(path, allow_pickle=True)",
    ],
)
def test_what_would_is_found(source: str) -> None:
    assert list(offences(source, "x.py"))


@pytest.mark.parametrize("source", ["np.load(path, allow_pickle=False)", "re.compile(x)", "yaml.safe_load(text)"])
def test_what_would_not_is_let_be(source: str) -> None:
    assert list(offences(source, "x.py")) == []
