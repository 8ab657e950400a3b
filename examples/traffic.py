"""Streams to the demo's models until it is stopped, so that graphs move: `python -m examples.traffic localhost:50051`.

Sessions come and go, some in columns and some alone, at a pace that a laptop does not notice.
"""

import argparse
import signal
import sys
import threading
import time

import conveyor
import numpy as np

from examples.charlm import CHARACTERS

# Between two steps of one session.
PACE_S = 0.05
# Of one session, on average.
STEPS = 200
_AGAIN_S = 2.0


def crowd(client: conveyor.Client, chance: np.random.Generator, stop: threading.Event) -> int:
    """Sessions of charlm in columns, one token each a frame; returns how many steps were answered."""
    sessions = int(chance.integers(8, 65))
    steps = 0
    with client.population("charlm", sessions) as population:
        for _ in range(int(chance.integers(STEPS // 2, 2 * STEPS))):
            if stop.wait(PACE_S):
                break
            population.step(chance.integers(0, len(CHARACTERS), sessions))
            steps += sessions
    return steps


def reader(client: conveyor.Client, chance: np.random.Generator, stop: threading.Event) -> int:
    """One session of co2, a reading at a time, then chunks of a month; returns how many steps were answered."""
    ppm = 320.0
    steps = 0
    with client.session("co2") as session:
        for _ in range(int(chance.integers(STEPS // 2, 2 * STEPS))):
            if stop.wait(PACE_S):
                break
            readings = ppm + np.cumsum(chance.normal(0.03, 0.3, 4)).astype(np.float32)
            session.step(readings[0] if chance.random() < 0.8 else readings)
            ppm = float(readings[-1])
            steps += 1
    return steps


def stream(target: str, stop: threading.Event) -> int:
    """Runs both until `stop`; returns how many steps were answered. A server that is away is told of and waited for."""
    counts = []

    def run(seed: int) -> None:
        chance = np.random.default_rng(seed)
        with conveyor.connect(target) as client:
            while not stop.is_set():
                try:
                    counts.append((crowd if seed % 3 == 0 else reader)(client, chance, stop))
                except conveyor.ConveyorError as error:
                    print(f"traffic: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    stop.wait(error.retry_s or _AGAIN_S)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="HOST:PORT of a server that has the demo's models")
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    start = time.monotonic()
    print(f"streaming to {parser.parse_args().target}; Ctrl-C ends it", flush=True)
    steps = stream(parser.parse_args().target, stop)
    print(f"{steps:,} steps answered in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
