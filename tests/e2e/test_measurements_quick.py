"""Each of the small measurements runs against real servers, and writes what it says.

How fast anything is, is not asked here: goals have a verdict, whichever.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(module, *arguments, **environment):
    command = [sys.executable, "-m", module, *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The repository that all of them serve."""
    folder = tmp_path_factory.mktemp("bench") / "models"
    done = _run("benchmarks.model", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def measure(models, tmp_path):
    """Runs a program in its quick form; the figures that it wrote, once its goals are found to be told."""

    def measured(name, *arguments, goals):
        done = _run(f"benchmarks.{name}", "--quick", "--out", str(tmp_path), *arguments, BENCH_MODELS=str(models))
        assert done.returncode == 0, done.stderr[-4000:]
        assert "exporting" not in done.stderr
        report = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert report["quick"] is True
        assert report["machine"]
        assert len(report["goals"]) == goals
        verdicts = [f"{'PASS ' if goal['met'] else 'below'}  {goal['text']}" for goal in report["goals"]]
        assert [line for line in done.stdout.splitlines() if line in verdicts] == verdicts
        return report["figures"]

    return measured


def _check(load):
    """Whatever was put on, all sessions were served and the figures go together."""
    assert 0 < load["fewest"] <= load["most"] <= load["steps"]
    assert load["steps_per_s"] == pytest.approx(load["steps"] / load["elapsed_s"])
    latency = load["latency"]
    assert 0 < latency["p50_s"] <= latency["p90_s"] <= latency["p99_s"] <= latency["p999_s"] <= latency["max_s"]
    assert all(told["count"] > 0 for told in load["refused"].values())
    assert load["unsent"] >= 0
    assert load["client_cores"] > 0


def test_open_loop(measure):
    figures = measure("open_loop", "--sessions", "16", goals=10)
    for form in ("gateway", "streams"):
        assert figures[form]["peak_per_s"] > 0
        shares = figures[form]["shares"]
        assert list(shares) == ["0.55", "0.80", "1.20"]
        for share, load in shares.items():
            _check(load)
            assert load["cpu"]["server_s"] > 0
            # Below the peak what finds no room waits, and above it is given up.
            assert (load["unsent"] if share == "1.20" else load["shed"]) == 0


def test_idle(measure):
    figures = measure("idle", goals=5)
    idle, crowd = figures["idle"], figures["crowd"]
    assert idle["sessions"] == 2000
    assert idle["state_bytes"] == 2048
    assert 0 < idle["before"] < idle["attached"]
    assert idle["detached_each"] == pytest.approx((idle["detached"] - idle["before"]) / 2000)
    _check(crowd["at_once"])
    assert crowd["opened_s"] > 0
    assert 0 < crowd["before_bytes"] < crowd["after_bytes"]
    assert min(crowd["alone_per_s"] + crowd["beside_per_s"]) > 0


def test_ragged(measure):
    figures = measure("ragged", goals=1)
    assert figures["quantum_s"] > 0
    assert figures["rate_per_s"] == pytest.approx(figures["peak_per_s"] / 2)
    without, beside = figures["runs"]
    assert without["prompts"] == 0 < beside["prompts"]
    _check(without)
    _check(beside)


def test_workers(measure):
    figures = measure("workers", "--most", "2", goals=2)
    for form in ("streams", "frames"):
        assert list(figures[form]) == ["1", "2"]
        for (load,) in figures[form].values():
            _check(load)
            assert (load["unsent"], load["shed"], load["refused"]) == (0, 0, {})


def test_inference(measure):
    figures = measure("inference", goals=2)
    for form in ("stream", "calls"):
        (us,), (rate,) = figures[form]["server_us"], figures[form]["requests_per_s"]
        assert 0 < us < 1e6
        assert rate > 1


def test_durability(measure):
    figures = measure("durability", goals=2 * (4 + 1))
    for store in ("SQLite", "Valkey"):
        for form in ("streams", "frames"):
            for durability in ("none", "async", "sync"):
                (result,) = figures[store][form][durability]["results"]
                assert result["steps_per_s"] > 100
        asleep = figures[f"{store} asleep"]
        assert asleep["sessions"] == 2000
        assert 0 < asleep["touched_s"] < 60
        assert asleep["store_bytes"] > 2000 * asleep["state_bytes"]


def test_churn(measure, tmp_path):
    figures = measure("churn", goals=2)
    assert list(figures) == ["cq", "aio"]
    for churned in figures.values():
        assert set(churned["ends"]) <= {"reset", "cancelled", "half-closed", "closed"}
        assert churned["steps"] == 3 * sum(churned["ends"].values()) > 0
        assert len(churned["at_s"]) == len(churned["resident_bytes"]) > 10
        assert min(churned["resident_bytes"]) > 1 << 20
    assert (tmp_path / "churn.png").read_bytes().startswith(b"\x89PNG")
