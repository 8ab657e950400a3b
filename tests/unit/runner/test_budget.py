"""A budget of memory for the slabs of all models: what does not fit is refused, and what goes gives its part back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.budget import StateBudget
from conveyor_server.runner.onnx_runner import open_runner


@pytest.fixture
def lstm_file(recurrent: Callable[..., Any], save: Callable[..., Path]) -> Path:
    return save(recurrent("lstm"))


def open_one(path: Path, budget: StateBudget, capacity: int = 10):
    return open_runner(path, device="cpu", threads=1, capacity=capacity, budget=budget)


def test_models_share_it(lstm_file: Path) -> None:
    free = open_one(lstm_file, StateBudget())
    one = free.spec.state_bytes * 12
    budget = StateBudget(2 * one + 1)
    first, second = open_one(lstm_file, budget), open_one(lstm_file, budget)
    assert budget.taken == 2 * one
    with pytest.raises(RunnerUnavailable, match=r"only 1 are left: lower --max-sessions") as caught:
        open_one(lstm_file, budget)
    assert str(one) in str(caught.value)
    first.close()
    assert budget.taken == one
    third = open_one(lstm_file, budget)
    for runner in (second, third, free):
        runner.close()
    assert budget.taken == 0


def test_what_cannot_be_opened_takes_none_of_it(lstm_file: Path, tmp_path: Path) -> None:
    budget = StateBudget()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(lstm_file.read_bytes()[:-100])
    with pytest.raises(RunnerUnavailable):
        open_one(broken, budget)
    with pytest.raises(RunnerUnavailable, match="are left"):
        open_one(lstm_file, StateBudget(1))
    assert budget.taken == 0


def test_a_part_is_given_back_once() -> None:
    budget = StateBudget(100)
    lease = budget.take(10, 10)
    for _ in range(2):
        lease.release()
    assert budget.taken == 0
    assert StateBudget(0).take(1 << 40, 1 << 20)
