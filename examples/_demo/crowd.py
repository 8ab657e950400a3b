"""Many sessions at once: what the server makes of them is read from its own metrics."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import conveyor
import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import Metric

from examples import charlm
from examples._demo import show
from examples._demo.server import Server

POPULATION = 128
STREAMS = 16
TOKENS = 200


def stream_crowd(client: conveyor.Client, server: Server, network: charlm.CharLM) -> float:
    """Steps many sessions at once; returns the largest difference from PyTorch over all of them."""
    sessions = POPULATION + STREAMS
    tokens = _texts(sessions)
    before = _batch_sizes(server.metrics())
    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        singles = [pool.submit(_one, client, row) for row in tokens[POPULATION:]]
        rows = _columns(client, tokens[:POPULATION])
        answers = np.concatenate([rows, np.stack([single.result() for single in singles])])
    elapsed = time.perf_counter() - start
    after = _batch_sizes(server.metrics())

    show.say(
        f"  {POPULATION} sessions in columns over one stream, and {STREAMS} sessions on a stream each: "
        f"{tokens.size:,} tokens\n  in {elapsed:.2f} s, {tokens.size / elapsed:,.0f} tokens per second\n"
    )
    show.say("  sessions in one run of the model, and how many runs (conveyor_batch_rows):")
    for line in show.bars([(label, after[label] - before.get(label, 0.0)) for label in after]):
        show.say(line)
    with torch.no_grad():
        whole = network(torch.from_numpy(tokens)).numpy()
    return float(np.abs(answers - whole).max())


def _texts(count: int) -> NDArray[np.int64]:
    """`[count, TOKENS]`: text of its own for each session, from what was held out."""
    _, text = charlm.corpus()
    starts = np.linspace(0, len(text) - TOKENS, count).astype(np.int64)
    rows: NDArray[np.int64] = text.numpy()[starts[:, np.newaxis] + np.arange(TOKENS)]
    return rows


def _columns(client: conveyor.Client, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """One token for each session in each frame; `[sessions, time, characters]`."""
    with client.population("charlm", len(tokens)) as population:
        return np.stack(list(population.stream(tokens.T)), axis=1)


def _one(client: conveyor.Client, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """One session, one token a message; `[time, characters]`."""
    with client.session("charlm", own_stream=True) as session:
        return np.stack(list(session.stream(tokens)))


def _batch_sizes(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Runs of charlm by how many sessions they took, as `5-8`; Prometheus counts them as `at most 8`."""
    buckets = [
        (float(sample.labels["le"]), sample.value)
        for sample in metrics["conveyor_batch_rows"].samples
        if sample.name.endswith("_bucket") and sample.labels["model"] == "charlm"
    ]
    sizes = {}
    low, runs = 0.0, 0.0
    for bound, at_most in sorted(buckets):
        label = f"{low + 1:.0f}" if bound == low + 1 else f"{low + 1:.0f}-{bound:.0f}"
        sizes[label] = at_most - runs
        low, runs = bound, at_most
    return sizes
