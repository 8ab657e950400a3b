"""A session whose server has a store, and another server of that store."""

import numpy as np
import pytest
from conveyor._core.signature import Signature


@pytest.fixture
def replicas(new_replicas):
    return new_replicas(2, "async")


@pytest.fixture
def store(replicas):
    return replicas[0].store


@pytest.fixture
def cable(new_cable, replicas):
    return new_cable(replicas[0])


@pytest.fixture
def step(specs):
    """Submits [value, 0] on a session, 8 bytes, or as many time steps of it."""
    signature = Signature(specs["sum"])

    def submit(session, value=1.0, time_steps=None):
        assert session.blocker() is None
        x = np.array([value, 0]) if time_steps is None else np.tile([value, 0], (time_steps, 1))
        return session.submit(signature.prepare(x)).ticket

    return submit
