"""`make bench-ragged`: what prompts of 512 time steps do to sessions that send single tokens.

128 sessions get tokens at random (Poisson) at half of what their closed loop answers; seconds without prompts alternate
with seconds in which sessions join with a prompt each. A prompt is run in quanta, between which everyone else's tokens
have their turn: so their p99 may move by less than the time of two quanta.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import conveyor
import numpy as np
from conveyor.bench import Load, LoadSpec, Pattern

from benchmarks.program import Findings, Goal, figures_of, run
from benchmarks.stage import MODEL, say, stage

SESSIONS = 128
PROMPT = 512
_SHARE = 0.5
_QUANTA = 2
_LOAD = LoadSpec(model=MODEL, sessions=SESSIONS, streams=SESSIONS, connections=8)


def _join(connection: Connection, address: str, each_s: float) -> None:
    """Told to start, sends a prompt as a new session every `each_s` seconds until told to stop; sends how many.

    Says 0 once it can be told.
    """
    prompt = np.random.default_rng(3).standard_normal((PROMPT, 64), np.float32)
    with conveyor.connect(address) as client:
        connection.send(0)
        while connection.recv():
            sent = 0
            while not connection.poll(each_s):
                with client.session(MODEL) as session:
                    session.step(prompt)
                    session.close()
                sent += 1
            connection.recv()
            connection.send(sent)


def quantum_s(model: conveyor.Model) -> float:
    """Seconds of one run of a quantum of one session, as measured when the model was loaded."""
    policy = model.batch_policy
    if policy is None:
        raise ValueError(f"model {model.name} is not ready")
    known = {run.time_steps: run.run_s for run in policy.measured if run.rows == 1}
    longest = max(known)
    return known.get(policy.quantum, known[longest] * policy.quantum / longest)


def judge(without_s: Sequence[float], beside_s: Sequence[float], quantum: float) -> Goal:
    """The median of the rounds' differences is under two quanta."""
    moved_s = statistics.median(beside - without for without, beside in zip(without_s, beside_s, strict=True))
    return Goal(
        f"{SESSIONS} sessions of single tokens: p99 {statistics.median(without_s) * 1e3:.2f} ms alone, "
        f"{statistics.median(beside_s) * 1e3:.2f} ms beside prompts of {PROMPT}: moved by {moved_s * 1e3:.2f} ms; two "
        f"quanta take {_QUANTA * quantum * 1e3:.2f} ms",
        moved_s < _QUANTA * quantum,
    )


def measure(settings: argparse.Namespace) -> Findings:
    """Rounds of seconds without prompts and seconds beside them."""
    seconds, rounds = (0.5, 1) if settings.quick else (settings.seconds, settings.rounds)
    with stage() as on:
        service = on.serve()
        with conveyor.connect(service.address) as client:
            quantum = quantum_s(client.model(MODEL))
        closed = Load(service.address, _LOAD)
        on.undo.callback(closed.close)
        closed.open()
        closed.run(seconds / 2)
        peak = closed.run(seconds).steps_per_s
        rate = _SHARE * peak
        print(f"the closed loop answers {peak:,.0f} steps/s; a quantum of one session takes {quantum * 1e3:.2f} ms")
        load = Load(service.address, dataclasses.replace(_LOAD, pattern=Pattern.POISSON, rate_per_s=rate, in_flight=16))
        on.undo.callback(load.close)
        load.open()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        joining = context.Process(target=_join, args=(theirs, service.address, 1 / settings.prompts), daemon=True)
        joining.start()
        on.undo.callback(joining.kill)
        ours.recv()
        say(f"{rounds} rounds of {seconds:g} s without and beside {settings.prompts:g} prompts a second")
        load.run(seconds / 2)
        results: list[dict[str, Any]] = []
        p99_s: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for beside in (False, True):
                closed.tend()
                if beside:
                    ours.send(True)
                    time.sleep(1 / settings.prompts)
                result = load.run(seconds)
                sent = 0
                if beside:
                    ours.send(True)
                    sent = ours.recv()
                p99_s[beside].append(result.latency.percentiles().p99_s)
                results.append({"prompts": sent, **figures_of(result)})
        ours.send(False)
        joining.join(5)
    goal = judge(*p99_s, quantum)
    return Findings({"peak_per_s": peak, "rate_per_s": rate, "quantum_s": quantum, "runs": results}, [goal])


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=3.0, help="of one run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--prompts", type=float, default=8.0, help="prompts a second (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("ragged", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
