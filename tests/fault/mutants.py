"""Servers with a fault of their own, to prove that the checker sees it: the real one, with one thing changed.

Each does what it says now and then, and says nothing of it to anybody.

    python -m tests.fault.mutants NAME [flags of conveyor serve]
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

_CHANCE = random.Random(0)


def applies_again() -> None:
    """A step that was applied, and is sent again because its answer was lost, is applied a second time."""
    from conveyor_server.sessions import rules

    judge = rules.judge

    def forgetful(session: Any, step: Any, *arguments: Any, **options: Any) -> Any:
        if step.seq == session.applied_seq > 0 and not session.pending:
            session.applied_seq = step.seq - 1
        return judge(session, step, *arguments, **options)

    _replace(rules, "judge", forgetful)


def applies_twice() -> None:
    """Now and then a step moves its session's state twice; the answer is that of the first time."""
    from conveyor_server.runner.base import Run

    def twice(runner: Any, run: Any, step: Callable[[Any, Any], Any]) -> Any:
        result = step(runner, run)
        row = _one_of(run)
        if row is not None:
            source, destination = run.sources[row : row + 1], run.destinations[row : row + 1]
            runner.write_rows(source.tolist(), runner.read_rows(destination.tolist()))
            alone = [array[row : row + 1] for array in run.inputs]
            step(runner, Run(source, destination, run.fresh[row : row + 1], run.lengths[row : row + 1], alone))
        return result

    _around_runs(twice)


def drops() -> None:
    """Now and then a step is answered, and its session's state stays as it was."""

    def dropped(runner: Any, run: Any, step: Callable[[Any, Any], Any]) -> Any:
        result = step(runner, run)
        row = _one_of(run)
        if row is not None:
            runner.write_rows([int(run.destinations[row])], runner.read_rows([int(run.sources[row])]))
        return result

    _around_runs(dropped)


def forgets() -> None:
    """Now and then a write to the store is said to be done, and is not."""
    from conveyor_server.store.contract import Outcome

    def put(store: Any, checkpoint: Any, written: Callable[[Any, Any], Any]) -> Any:
        if _CHANCE.random() < 0.3:
            return [Outcome.DONE] * len(checkpoint.session_ids)
        return written(store, checkpoint)

    _around_puts(put)


def stale() -> None:
    """Now and then a session's state in the store is that of an earlier step, under the number of the new one."""
    before: dict[str, bytes] = {}

    def put(store: Any, checkpoint: Any, written: Callable[[Any, Any], Any]) -> Any:
        bodies, start = [], 0
        for session, size in zip(checkpoint.session_ids, checkpoint.sizes, strict=True):
            body = bytes(checkpoint.bodies[start : start + size])
            start += size
            older = before.get(session, body)
            before[session] = body
            bodies.append(older if _CHANCE.random() < 0.3 else body)
        checkpoint.bodies = b"".join(bodies)
        checkpoint.sizes = [len(body) for body in bodies]
        return written(store, checkpoint)

    _around_puts(put)


MUTANTS = {
    mutant.__name__.replace("_", "-"): mutant for mutant in (applies_again, applies_twice, drops, forgets, stale)
}


def _around_runs(mutant: Callable[[Any, Any, Callable[[Any, Any], Any]], Any]) -> None:
    """Has every run of a model pass a mutant."""
    from conveyor_server.runner.onnx_runner import OnnxRunner

    step = OnnxRunner.step
    _replace(OnnxRunner, "step", lambda runner, run: mutant(runner, run, step))
    # Runs that are filled in place would pass it by.
    _replace(OnnxRunner, "staging", lambda runner, rows: None)


def _around_puts(mutant: Callable[[Any, Any, Callable[[Any, Any], Any]], Any]) -> None:
    """Has every write of states to a Valkey pass a mutant."""
    from conveyor_server.store.valkey import ValkeyStore

    put = ValkeyStore.put
    _replace(ValkeyStore, "put", lambda store, checkpoint: mutant(store, checkpoint, put))


def _one_of(run: Any) -> int | None:
    """A row of a run that goes on from a state; None: not this time."""
    rows = [row for row in range(len(run.sources)) if not run.fresh[row]]
    return _CHANCE.choice(rows) if rows and _CHANCE.random() < 0.05 else None


def _replace(owner: Any, name: str, new: Any) -> None:
    if not hasattr(owner, name):
        raise AssertionError(f"{owner} has no {name}: the mutant is out of date")
    setattr(owner, name, new)


def main(arguments: Sequence[str]) -> int:
    """Runs the server with a mutation; returns its exit status."""
    name, *flags = arguments
    MUTANTS[name]()
    from conveyor_server.__main__ import main as serve

    return serve(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
