"""The bench measures every row against real processes, no stream goes unserved, and what it runs beside them answers.

How fast anything is, is not asked here.
"""

import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

ROOT = Path(__file__).parents[2]
FRAMES = ["frames-1", "frames-2", "gru-frames-1", "gru-frames-2"]
MESSAGES = {"stream-1": [1], "streams-16": [1, 16], "streams": [1, 16], "connections": [1, 16], "one-stream": [1, 16]}
MAIN = ["frames-1", "stream-1", "streams", "connections"]
SERVED = ["echo", "null", "full"]


def _names(groups, echoes):
    bare = {name: MESSAGES.get(name, [16]) for name in groups}
    targets = [*SERVED, *echoes]
    return [
        f"{name}/{target}"
        for name, batches in bare.items()
        for target in [*targets, *(f"bare-{batch}" for batch in batches)]
    ]


def _bench(*arguments, timeout_s=200):
    command = [sys.executable, "-m", "benchmarks.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_a_small_bench_measures_every_row_and_serves_every_stream(tmp_path):
    # One test, so that it runs once, whatever the number of test processes.
    done = _bench("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "bench.json").read_text(), parse_constant=_refuse)
    cq, aio = report["tables"]
    assert (cq["transport"], aio["transport"]) == ("cq", "aio")
    rows = _rows(cq)
    sdk = ["sdk-population/full", "sdk-population/bare-16", "sdk-session/sdk-steps", "sdk-session/sdk-pipeline"]
    curve = [f"curve/{2**power}" for power in range(7)]
    assert sorted(rows) == sorted(_names([*FRAMES, *MESSAGES], ["cq-echo", "aio-echo"]) + sdk + curve)
    assert sorted(_rows(aio)) == sorted(_names(MAIN, ["aio-echo"]))
    for table in (cq, aio):
        _check_figures(_rows(table))
        _check_segments(table["segments"])
        _check_ratios(table["reports"])
        _check_message_sizes(_rows(table))
    _check_batches(rows)
    assert len(cq["goals"]) == 18
    for text in ("Transport cq", "Transport aio", "bare onnxruntime, batch 16", "16 streams on 16 conn", "Goals"):
        assert text in done.stdout
    for name in ("throughput.png", "latency.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_pattern_that_no_group_has_is_refused(tmp_path):
    done = _bench("--only", "nothing*", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--only nothing* matches none of frames-1" in done.stderr


@pytest.mark.parametrize("module", ["benchmarks.cq_echo", "benchmarks.aio_echo"])
def test_a_bare_echo_answers_half_closes_and_outlives_a_call_that_is_cut(module, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from benchmarks.echo import Echo

    echo = Echo(module)
    try:
        with grpc.insecure_channel(echo.address) as channel:
            stream = channel.stream_stream("/conveyor.v1.SessionService/Stream")
            for _ in range(2):
                requests = queue.SimpleQueue()
                answers = stream(iter(requests.get, None), timeout=20)
                for message in (b"", b"one", b"x" * 100_000):
                    requests.put(message)
                    assert next(answers) == message
                requests.put(None)
                assert list(answers) == []
                assert answers.code() is grpc.StatusCode.OK
                waiting = queue.SimpleQueue()
                cut = stream(iter(waiting.get, None), timeout=20)
                waiting.put(b"before")
                assert next(cut) == b"before"
                cut.cancel()
                waiting.put(None)
    finally:
        echo.stop()


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def _rows(table):
    return {row["case"]["name"]: row for report in table["reports"] for row in report["rows"]}


def _check_figures(rows):
    for name, row in rows.items():
        for figure in ("tokens_per_s", "tokens_per_server_cpu_s", "server_us_per_token", "p50_ms", "p99_ms"):
            spread = row[figure]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"], (name, figure)
        assert row["p50_ms"]["median"] <= row["p99_ms"]["median"]
        assert row["server_us_per_message"]["median"] >= 0.999 * row["server_us_per_token"]["median"]
        assert 0 < row["server_cores"]["median"] < 1.5 * os.cpu_count()
        if row["case"]["client"] != "none":
            assert row["streams"] == row["case"]["streams"]


def _check_segments(segments):
    for segment in segments:
        figures = segment["figures"]
        assert figures["fewest"] > 0, segment
        assert figures["fewest_messages"] > 0, segment
        assert not [why for why in segment["void"] if "served" in why]


def _check_batches(rows):
    batches = {name: row["mean_batch"]["median"] for name, row in rows.items()}
    for name in ("frames-1/null", "frames-1/full", "sdk-population/full", "gru-frames-1/full", "frames-1/bare-16"):
        assert batches[name] == 16
    assert batches["stream-1/full"] == 1
    assert not any(batch for name, batch in batches.items() if name.endswith("echo"))


def _check_ratios(reports):
    expected = {"to_bare", "null_to_echo", "to_ceiling", "to_bare_ceiling", "echo_to_bare_echo"}
    more = {"sdk-population": {"to_bare"}, "sdk-session": {"pipelined"}, "curve": set()}
    for report in reports:
        name = report["group"]["name"]
        found = {key for key, ratio in report["ratios"].items() if ratio is not None}
        assert found == more.get(name, expected | ({"overhead_us"} if name == "stream-1" else set())), name
        assert all(report["ratios"][key]["median"] > 0 for key in found - {"overhead_us"})


def _check_message_sizes(rows):
    """The echoes are sent what the model is sent, and a message is its tokens and little else."""
    for name, row in rows.items():
        group, _, target = name.partition("/")
        if target in {*SERVED, "cq-echo", "aio-echo"} and not group.startswith("sdk"):
            values = 4 * 16 * (4 if row["case"]["model"] == "bench-lstm" else 1)
            tokens = 16 if "frames" in group else 1
            assert row["request_bytes"] == pytest.approx(rows[f"{group}/echo"]["request_bytes"], rel=0.05)
            for size in ("request_bytes", "reply_bytes"):
                assert tokens * values < row[size] < tokens * (values + 64) + 128, (name, size)
