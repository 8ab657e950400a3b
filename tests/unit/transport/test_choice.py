"""Which transport serves, and what happens where the fast one cannot."""

import asyncio
import builtins
import sys

import pytest
from conveyor_server.errors import StartError
from conveyor_server.transport.choice import deferral, run_with
from conveyor_server.transport.completion_loop import CompletionLoop
from conveyor_server.transport.selftest import Unusable


class Main:
    """A server's main that notes the loops that it ran on; it fails on the first `fails` of them."""

    def __init__(self, *fails: Exception) -> None:
        self.fails = list(fails)
        self.loops: list[str] = []

    async def __call__(self) -> int:
        self.loops.append("cq" if isinstance(asyncio.get_running_loop(), CompletionLoop) else "aio")
        if self.fails:
            raise self.fails.pop(0)
        return 7


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "conveyor"]


@pytest.mark.parametrize(("choice", "loop"), [("auto", "cq"), ("cq", "cq"), ("aio", "aio")])
def test_the_loop_is_that_of_the_transport(choice, loop, caplog):
    main = Main()
    assert run_with(choice, main) == 7
    assert main.loops == [loop]
    assert lines(caplog) == []


def test_auto_takes_the_other_where_the_fast_one_is_unusable_and_says_so_once(caplog):
    main = Main(Unusable("the self-test's message came back changed"))
    assert run_with("auto", main) == 7
    assert main.loops == ["cq", "aio"]
    assert lines(caplog) == [
        "transport auto: aio, because cq cannot be used: the self-test's message came back changed"
    ]


def test_cq_alone_is_an_error_that_says_what_to_do(caplog):
    main = Main(Unusable("no socket could be opened for the self-test"))
    with pytest.raises(StartError, match=r"cq cannot be used: no socket .*; take --transport aio, or another grpcio"):
        run_with("cq", main)
    assert (main.loops, lines(caplog)) == (["cq"], [])


@pytest.fixture(params=[ImportError("no cygrpc"), AttributeError("module 'cygrpc' has no attribute 'StatusCode'")])
def other_internals(request, monkeypatch):
    """A grpcio from which the fast transport does not even let itself be imported."""
    real = builtins.__import__

    def importing(name: str, *args: object, **options: object) -> object:
        if name == "conveyor_server.transport.completion_loop":
            raise request.param
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.delitem(sys.modules, "conveyor_server.transport.completion_loop")
    return str(request.param)


def test_auto_takes_the_other_where_the_fast_one_cannot_be_imported(other_internals, caplog):
    main = Main()
    assert run_with("auto", main) == 7
    assert main.loops == ["aio"]
    assert lines(caplog) == [
        f"transport auto: aio, because cq cannot be used: this grpcio has other internals: {other_internals}"
    ]


def test_cq_that_cannot_be_imported_is_an_error(other_internals):
    with pytest.raises(StartError, match="this grpcio has other internals"):
        run_with("cq", Main())


@pytest.mark.parametrize("error", [AttributeError("x"), ImportError("y"), StartError("the port is taken")])
def test_what_fails_otherwise_is_no_reason_to_begin_again(error, caplog):
    main = Main(error)
    with pytest.raises(type(error)):
        run_with("auto", main)
    assert (main.loops, lines(caplog)) == (["cq"], [])


async def test_a_turn_is_put_off_until_all_that_arrived_is_in() -> None:
    calls: list[str] = []
    done = asyncio.Event()
    deferral()(lambda: (calls.append("deferred"), done.set()))
    calls.append("now")
    await asyncio.wait_for(done.wait(), 20)
    assert calls == ["now", "deferred"]
