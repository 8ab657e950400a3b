"""What the SDK exports, and that it stays light: a name that goes or comes is a decision, written down here."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import conveyor
import conveyor.aio
import pytest
from conveyor._blocking.client import Client
from conveyor._blocking.population import Population
from conveyor._blocking.session import Session

NAMES = """
    TLS AsyncClient AsyncPopulation AsyncSession BatchPolicy CallTimeout Client ClientClosed ConnectionLost
    ConveyorError CreditExceeded Draining InvalidInput InvalidSessionId Migration Model ModelFailed ModelInUse
    ModelInvalid ModelMismatch ModelNotFound ModelNotReady NotDurable Overloaded PermissionDenied Population
    ProtocolError RecordInvalid RowsFailed RunTime Session SessionClosed SessionExists SessionExpired SessionInfo
    SessionNotFound SessionTakenOver SessionsExhausted SnapshotInvalid StateNonFinite StepAborted StepAnswerEvicted
    StepCancelled StepConflict StepFailed StepGap StepTimeout StoreUnavailable Unauthenticated __version__ aio connect
"""
TWINS = [
    (Client, conveyor.AsyncClient),
    (Session, conveyor.AsyncSession),
    (Population, conveyor.AsyncPopulation),
]


def test_the_exported_names():
    assert set(conveyor.__all__) == set(NAMES.split())
    assert len(conveyor.__all__) == len(set(conveyor.__all__))
    assert set(conveyor.aio.__all__) == {"AsyncClient", "AsyncPopulation", "AsyncSession", "Opening", "connect"}
    public = {name for name in vars(conveyor) if not name.startswith("_")}
    assert public - set(conveyor.__all__) <= {"errors", "cli", "bench", "annotations"} | {"Any", "Sequence"}


@pytest.mark.parametrize("name", sorted(set(NAMES.split()) - {"__version__", "aio"}))
def test_names_say_where_to_import_them_from_and_what_they_are(name):
    value = getattr(conveyor, name)
    assert value.__module__ == "conveyor"
    assert value.__doc__
    assert repr(value).find("conveyor._") == -1


def test_every_error_is_exported():
    errors = {name for name, value in vars(conveyor.errors).items() if inspect.isclass(value)}
    errors = {name for name in errors if issubclass(getattr(conveyor.errors, name), conveyor.ConveyorError)}
    assert errors <= set(conveyor.__all__)


@pytest.mark.parametrize(("blocking", "asynchronous"), TWINS, ids=lambda kind: kind.__name__)
def test_both_clients_offer_the_same(blocking, asynchronous):
    def public(kind):
        return {name: value for name, value in vars(kind).items() if not name.startswith("_")}

    assert public(blocking).keys() == public(asynchronous).keys()
    for name, value in public(blocking).items():
        twin = public(asynchronous)[name]
        assert type(value) is type(twin)
        if callable(value):
            mine, its = inspect.signature(value).parameters, inspect.signature(twin).parameters
            assert [(p.name, p.kind, p.default) for p in mine.values()] == [
                (p.name, p.kind, p.default) for p in its.values()
            ], name


def test_connect_is_the_same_for_both():
    mine, its = inspect.signature(conveyor.connect), inspect.signature(conveyor.aio.connect)
    assert mine.parameters == its.parameters


def test_the_examples_in_the_docstrings_parse():
    for module in (conveyor, conveyor.aio):
        lines = [line[4:] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
        wrapped = "async def example():\n" + "\n".join("    " + line for line in lines)
        ast.parse(wrapped)


def test_importing_the_sdk_imports_nothing_heavy():
    heavy = "torch onnx onnxruntime prometheus_client conveyor_server conveyor_export matplotlib"
    code = f"import sys, conveyor, conveyor.aio; print([m for m in {heavy.split()} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_package_is_typed():
    assert (Path(conveyor.__file__).parent / "py.typed").exists()


def test_tls_takes_a_key_only_with_its_certificate(tmp_path):
    with pytest.raises(ValueError, match="together"):
        conveyor.TLS(certificate=b"pem")
    with pytest.raises(FileNotFoundError):
        conveyor.connect("localhost:1", tls=conveyor.TLS(root_certificates=tmp_path / "none.pem"))
