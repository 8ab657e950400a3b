"""One rig for all tests of a file, and the seed that decides what happens in it.

FAULT_SEED in the environment gives the seed; without it each run has another, which is told.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.rig import Rig

SEED_VARIABLE = "FAULT_SEED"


@pytest.fixture(scope="session")
def seed() -> int:
    """Of everything."""
    given = os.environ.get(SEED_VARIABLE)
    return random.SystemRandom().randrange(1_000_000) if given is None else int(given)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Three replicas with a Valkey behind an Envoy."""
    with Rig(tmp_path_factory.mktemp("rig") / "parts") as parts:
        yield parts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Three replicas without a store behind an Envoy."""
    with Rig(tmp_path_factory.mktemp("plain") / "parts", durable=False) as parts:
        yield parts


@pytest.fixture
def tell(capfd: pytest.CaptureFixture[str]) -> Callable[[object], None]:
    """Says something to whoever runs the tests, also when they pass."""

    def told(what: object) -> None:
        with capfd.disabled():
            print(f"\n{what}", flush=True)

    return told


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder that is not there yet, for one run."""
    return tmp_path / "run"
