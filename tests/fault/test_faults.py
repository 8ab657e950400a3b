"""Sessions live through everything: each gets the answers of an undisturbed run, each once, in order, to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.conftest import SEED_VARIABLE
from tests.fault.faults import Kind
from tests.fault.rig import Rig
from tests.fault.script import Settings
from tests.fault.trial import Outcome, Weather, run

pytestmark = pytest.mark.xdist_group("fault")
LIMIT_S = 200.0


def check(outcome: Outcome, rig: Rig) -> None:
    assert outcome.verdict.good, f"{outcome}\n{rig.tails()}"
    assert outcome.said == "", "the clients have nothing to complain of"


@pytest.mark.timeout(280)
def test_two_hundred_sessions_survive_every_kind_of_fault(
    rig: Rig, logs: Path, seed: int, tell: Callable[[object], None]
) -> None:
    tell(f"{SEED_VARIABLE}={seed} draws these faults again")
    outcome = run(rig, Settings(seed=seed, steps=75), logs, Weather(), link=rig.by_session, limit_s=LIMIT_S)
    tell(outcome)
    check(outcome, rig)
    assert set(outcome.faults) == {kind.name for kind in Kind}, "each kind struck"


@pytest.mark.timeout(280)
def test_affinity_is_for_speed_alone(rig: Rig, logs: Path, seed: int, tell: Callable[[object], None]) -> None:
    """Round robin: every stream that is opened again goes to another replica than before."""
    settings = Settings(seed=seed + 1, sessions=60, steps=40, pause_s=0.25, prefix="rr")
    weather = Weather(kinds=(Kind.KILL, Kind.FREEZE, Kind.CLIENTS_CUT), gap_s=(0.2, 0.5))
    outcome = run(rig, settings, logs, weather, link=rig.round_robin, limit_s=LIMIT_S)
    tell(f"round robin: {outcome}")
    check(outcome, rig)
    assert sum(outcome.faults.values()) >= 3
