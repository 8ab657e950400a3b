"""What the completion queue leans on within grpcio is there, and nothing else of the server leans on it."""

import ast
import inspect
import re
from pathlib import Path

import grpc
import pytest
from conveyor_server.transport import completion
from conveyor_server.transport.completion import CompletionServer, internals
from conveyor_server.transport.completion.server import _Inline
from conveyor_server.transport.selftest import Unusable
from grpc import _server
from grpc._cython import cygrpc

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])
PACKAGE = Path(completion.__file__).parent


def grpc_server() -> grpc.Server:
    return grpc.server(_Inline(1))


def used(*owners: str) -> set[str]:
    """Attributes that the package takes of a name, or of an attribute of self."""
    trees = [ast.parse(file.read_text()) for file in sorted(PACKAGE.glob("*.py"))]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }


@pytest.mark.parametrize(
    ("what", "owners", "where", "looked_for"),
    [
        ("grpc._server", ("_server",), _server, internals.OF_MODULE),
        ("cygrpc", ("cygrpc",), cygrpc, internals.OF_CYGRPC),
        ("the state of grpc.server", ("state", "self._state"), grpc_server()._state, internals.OF_STATE),
        ("a call's state", ("rpc", "self._rpc"), _server._RPCState(), None),
    ],
    ids=["module", "cygrpc", "server", "call"],
)
def test_this_grpcio_has_all_that_is_used_of_it(what, owners, where, looked_for):
    names = used(*owners)
    assert names, "the package was rewritten: this test looks at nothing"
    missing = sorted(name for name in names if not hasattr(where, name))
    assert not missing, f"{what} of grpcio {grpc.__version__} has no {', '.join(missing)}: completion uses it"
    if looked_for is not None:
        assert names == set(looked_for), "what is looked for at the start is not what is used"


def test_nothing_else_of_the_server_imports_what_is_within_grpcio():
    server = PACKAGE.parents[1]
    files = {file for file in server.rglob("*.py") if re.search(r"\bgrpc import _|\bgrpc\._", file.read_text())}
    assert files <= set(PACKAGE.glob("*.py"))
    assert PACKAGE / "stream.py" in files, "the package was rewritten: this test looks at nothing"


def test_this_grpcio_has_the_calls_that_are_used_of_it():
    where = f"of grpcio {grpc.__version__} is another one: completion uses it"
    parameters = list(inspect.signature(_server._handle_call).parameters)
    assert parameters[:4] == ["rpc_event", "method_with_handler", "interceptor_pipeline", "thread_pool"], where
    assert len(parameters) == 5, f"_handle_call {where}"
    assert {"state", "call"} <= inspect.signature(_server._RequestIterator.__init__).parameters.keys(), where
    assert {"_state", "_call"} <= vars(_server._RequestIterator(None, None, None)).keys(), f"_RequestIterator {where}"
    for owner, name in (
        *((cygrpc.Server, name) for name in ("request_call", "request_registered_call", "start")),
        (cygrpc.CompletionQueue, "poll"),
        (cygrpc.Call, "start_server_batch"),
    ):
        assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} {where}"
    assert "experimental_non_blocking" in inspect.getsource(_server), f"a stream's non-blocking hook {where}"


@pytest.mark.parametrize("name", internals.OF_MODULE)
def test_a_grpcio_without_one_of_them_is_unusable_and_says_which(monkeypatch, name):
    server = grpc_server()
    monkeypatch.delattr(_server, name)
    with pytest.raises(Unusable, match=rf"grpc\._server of grpcio .* has no {name}$"):
        CompletionServer(server, max_unsent_bytes=1)


def test_a_server_without_a_state_is_unusable():
    with pytest.raises(Unusable, match=r"grpc.server's state of grpcio .* has no active_rpc_count, completion_queue"):
        CompletionServer(object(), max_unsent_bytes=1)


def test_the_version_that_runs_is_one_that_is_known():
    assert grpc.__version__ in completion.TESTED, "add it to the table once the tests pass on it"
