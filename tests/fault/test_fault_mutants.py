"""The checker can fail: servers that apply twice, drop, forget or mix up are judged bad, each for what it does."""

from pathlib import Path

import pytest

from tests.fault.checker import Verdict
from tests.fault.faults import Kind
from tests.fault.mutants import MUTANTS
from tests.fault.rig import Rig
from tests.fault.script import Settings
from tests.fault.trial import Weather, run

pytestmark = pytest.mark.xdist_group("fault")
OF_STEPS = ("applies-again", "applies-twice", "drops")
OF_WRITES = ("forgets", "stale")


def judged(rig: Rig, logs: Path, mutant: str, kinds: tuple[Kind, ...], steps: int = 20) -> Verdict:
    rig.restart(mutant=mutant)
    settings = Settings(
        seed=3,
        sessions=60,
        steps=steps,
        pause_s=0.06,
        durable=rig.durable,
        affine=not rig.durable,
        idles=False,
        prefix=mutant or "right",
    )
    return run(rig, settings, logs, Weather(kinds, gap_s=(0.05, 0.2)), link=rig.by_session, limit_s=60.0).verdict


def test_each_mutant_is_tried() -> None:
    assert {*OF_STEPS, *OF_WRITES} == set(MUTANTS)


@pytest.mark.parametrize("mutant", OF_STEPS)
def test_a_server_that_steps_wrong_is_judged_bad(plain: Rig, logs: Path, mutant: str) -> None:
    verdict = judged(plain, logs, mutant, (Kind.CLIENTS_CUT,))
    assert set(verdict.kinds) == {"of other bits"}, verdict


def test_a_server_that_steps_right_is_judged_good(plain: Rig, logs: Path) -> None:
    verdict = judged(plain, logs, "", (Kind.CLIENTS_CUT,))
    assert verdict.good, verdict


@pytest.mark.parametrize("mutant", OF_WRITES)
def test_a_server_that_writes_wrong_is_judged_bad(rig: Rig, logs: Path, mutant: str) -> None:
    # Long enough for several replicas to be killed: what was written wrong is read only then.
    verdict = judged(rig, logs, mutant, (Kind.KILL,), steps=80)
    assert {"of other bits", "missing"} & set(verdict.kinds), verdict
