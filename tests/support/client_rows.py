"""What tests of populations do with a client's core."""

import numpy as np
from conveyor._core.batch import prepare_batch, present_batch
from conveyor._core.signature import Signature
from fake_service import SPECS

SIGNATURE = Signature(SPECS["sum"])


def step(population, value=1.0, rows=None):
    """Submits [value, 0] on some rows, 8 bytes each."""
    chosen = np.arange(len(population.handles)) if rows is None else np.array(rows)
    assert population.blocker(chosen) is None
    batch = prepare_batch(SIGNATURE, np.full((len(chosen), 2), value), len(chosen))
    return population.submit(chosen, batch)


def totals(step):
    """Of each row that the step was of."""
    return present_batch(SIGNATURE, step.batch, step.pieces)[:, 0].tolist()


def opened(cable, rows=3, **options):
    population = cable.population(rows, **options)
    cable.settle()
    population.opened.result()
    return population
