"""The bench measures every row against real processes, no session goes unserved, and what is void does not count.

How fast anything is, is not asked here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ["frames-1", "frames-2", "sdk", "stream-1", "streams-16", "streams", "connections", "one-stream"]
ECHOES = [f"echo-{name}" for name in CASES if name != "sdk"]
BARES = ["bare-1", "bare-16"]


def test_a_small_bench_measures_every_row_and_serves_every_session(tmp_path):
    # One test, so that it runs once, whatever the number of test processes.
    command = [sys.executable, "-m", "benchmarks.bench", "--rounds", "1", "--seconds", "0.1", "--sessions", "16"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "bench.json").read_text(), parse_constant=_refuse)
    rows = {row["case"]["name"]: row for row in report["rows"]}
    assert sorted(rows) == sorted(CASES + ECHOES + BARES)
    _check_figures(rows)
    _check_segments(report["segments"], len(rows))
    _check_batches(rows)
    _check_ratios(rows)
    _check_message_sizes(rows)
    for label in ("onnxruntime bare", "frames of 16 sessions, 2 in flight", "SDK, population", "16 streams on 16 conn"):
        assert label in done.stdout
    for name in ("throughput.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def _check_figures(rows):
    for name, row in rows.items():
        for figure in ("tokens_per_s", "tokens_per_server_cpu_s", "server_us_per_token", "p50_ms", "p99_ms"):
            spread = row[figure]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"], (name, figure)
        assert row["p50_ms"]["median"] <= row["p99_ms"]["median"]
        assert 0 < row["server_cores"]["median"] < 1.5 * os.cpu_count()


def _check_segments(segments, count):
    assert len(segments) == count
    for segment in segments:
        assert segment["figures"]["fewest"] > 0, segment
        assert "a session was not served" not in segment["void"]


def _check_batches(rows):
    batches = {name: row["mean_batch"]["median"] for name, row in rows.items()}
    assert batches["frames-1"] == batches["sdk"] == batches["bare-16"] == 16
    assert batches["stream-1"] == 1


def _check_ratios(rows):
    for row in rows.values():
        conveyor = row["case"]["target"] == "conveyor"
        for ratio in ("to_bare", "to_echo", "to_both", "speed_to_echo"):
            assert (row[ratio] is not None) == conveyor
            assert not conveyor or row[ratio]["median"] > 0


def _check_message_sizes(rows):
    for name in CASES:
        if name == "sdk":
            continue
        ours, theirs = rows[name], rows[f"echo-{name}"]
        assert ours["request_bytes"] == theirs["request_bytes"] > 256
        # The server names and types its outputs.
        assert theirs["reply_bytes"] <= ours["reply_bytes"] <= theirs["reply_bytes"] + 32


@pytest.fixture
def modules(monkeypatch):
    """The bench's own modules; they are no part of the distribution."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import accounting, cases, figures, report, segments

    return accounting, cases, figures, report, segments


def _rows(modules, server_s):
    """Rows of rounds in which a case took so many CPU seconds for 1,000 tokens: `{case: [(seconds, void)]}`."""
    accounting, cases, figures, report, segments = modules
    chosen = [case for case in cases.cases(16) if case.name in server_s]
    made = [
        segments.Segment(
            case.name,
            round_,
            figures.Done(1000, 1000),
            accounting.Usage(1.0, seconds, 0.1, 0.0, 0.0),
            figures.Figures(1e-3, 2e-3, 5, 6, 267, 267),
            float(case.sessions),
            ("others used 0.50 cores",) if void else (),
        )
        for case in chosen
        for round_, (seconds, void) in enumerate(server_s[case.name])
    ]
    return {row.case.name: row for row in report.rows_of(chosen, made)}


def test_a_ratio_is_taken_within_each_round(modules):
    rows = _rows(
        modules,
        {
            "bare-1": [(0.1, False), (0.2, False), (0.4, False)],
            "bare-16": [(0.1, False)] * 3,
            "stream-1": [(0.4, False), (0.4, False), (0.5, False)],
            "echo-stream-1": [(0.2, False)] * 3,
        },
    )
    to_bare = rows["stream-1"].to_bare
    assert (to_bare.low, to_bare.median, to_bare.high) == pytest.approx((0.25, 0.5, 0.8))
    assert rows["stream-1"].to_both.median == pytest.approx(1.0)


def test_a_void_round_counts_nowhere_while_another_does(modules):
    rows = _rows(
        modules,
        {
            "bare-1": [(0.1, False), (0.1, True), (0.1, False)],
            "bare-16": [(0.1, False)] * 3,
            "stream-1": [(0.9, True), (0.2, False), (0.4, False)],
            "echo-stream-1": [(0.2, True)] * 3,
        },
    )
    row = rows["stream-1"]
    assert (row.server_us_per_token.counted, row.server_us_per_token.high) == (2, pytest.approx(400))
    assert (row.to_bare.counted, row.to_bare.low, row.to_bare.high) == (1, pytest.approx(0.25), pytest.approx(0.25))
    # Nothing but void ones: shown, and said.
    assert row.to_echo.counted == 0
    assert row.to_echo.high == pytest.approx(1.0)


def test_the_model_s_time_between_two_batches_lies_on_the_line_of_whole_runs(modules):
    interpolate = modules[3].interpolate
    known = {1: 30.0, 16: 6.0, 256: 5.0}
    assert [interpolate(batch, known) for batch in (1, 16, 256)] == pytest.approx([30.0, 6.0, 5.0])
    # Runs take 30 us at 1 and 96 us at 16, so 52 us at 6.
    assert interpolate(6, known) == pytest.approx(52 / 6)
    assert interpolate(1000, known) == pytest.approx(5.0)
