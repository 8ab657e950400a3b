"""`conveyor bench` against the real server: what it counts is what the server counts, in every mode.

How fast anything is, is not asked here.
"""

import json
import signal
import subprocess
import sys

import pytest
from conveyor.bench import Load, LoadError, LoadSpec, Pattern
from prometheus_client.parser import text_string_to_metric_families

MODES = {
    "messages": [],
    "one": ["--sessions", "1"],
    "pipelined": ["--in-flight", "4", "--streams", "3", "--connections", "2"],
    "a connection each": ["--connections", "12"],
    "frames": ["--frames", "--streams", "2", "--in-flight", "2"],
    "chunks": ["--chunk", "40"],
    "chunked frames": ["--chunk", "40", "--frames"],
    "poisson": ["--pattern", "poisson", "--rate", "500", "--in-flight", "4"],
    "poisson frames": ["--pattern", "poisson", "--rate", "500", "--frames"],
    "burst": ["--pattern", "burst", "--rate", "500", "--burst-s", "0.05", "--in-flight", "4"],
    "shed": ["--pattern", "burst", "--rate", "500", "--burst-s", "0.05", "--shed"],
    "processes": ["--processes", "2", "--connections", "4"],
    "token ids": ["--model", "speller", "--integers-below", "11"],
}


def total(server, name, **labels):
    """The sum of a counter's samples that have these labels."""
    code, text = server.get("/metrics")
    assert code == 200
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs the command; the report as JSON, and what was printed."""

    def ran(server, *arguments):
        path = tmp_path_factory.mktemp("bench") / "report.json"
        command = [sys.executable, "-W", "error", "-m", "conveyor.cli.main", "bench", "--target", server.target]
        command += ["--model", "gru", "--sessions", "12", "--warm-up", "0", "--seconds", "0.4", "--json", str(path)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(path.read_text(), parse_constant=pytest.fail), done.stdout

    return ran


def test_every_mode_counts_what_the_server_counts(start_server, bench):
    # One server for all of them: starting it is what takes long.
    server = start_server("--device", "cpu")
    for mode, arguments in MODES.items():
        model = "speller" if mode == "token ids" else "gru"
        before = [total(server, f"conveyor_{what}_total", model=model) for what in ("steps", "time_steps")]
        report, printed = bench(server, *arguments)
        steps, time_steps = (
            int(total(server, f"conveyor_{what}_total", model=model) - old)
            for what, old in zip(("steps", "time_steps"), before, strict=True)
        )
        sessions, chunk = report["load"]["sessions"], report["load"]["time_steps"]
        # Each session takes one step before it is measured.
        assert report["steps"] == steps - sessions > 0, mode
        assert report["time_steps"] == report["steps"] * chunk == time_steps - sessions * chunk, mode
        assert report["latency"]["count"] == report["steps"], mode
        assert 0 < report["latency"]["p50_s"] <= report["latency"]["p999_s"] <= report["latency"]["max_s"], mode
        assert report["refused"] == {}, mode
        if report["load"]["frames"]:
            assert report["requests"] < report["steps"] or sessions == 1, mode
        else:
            assert report["requests"] == report["replies"] == report["steps"], mode
        if report["load"]["pattern"] == "closed":
            assert report["streams"]["active"] == report["load"]["streams"], mode
            assert report["streams"]["fewest_steps"] > 0, mode
        else:
            assert 100 < report["steps"] + report["unsent"] + report["shed"] < 320, mode
        # A burst is of more steps than there are sessions.
        assert (report["shed"] > 0) == (mode == "shed"), mode
        assert f"{report['steps']:,} in" in printed, mode
    # All said goodbye.
    assert total(server, "conveyor_sessions_active") == 0
    assert total(server, "conveyor_errors_total") == 0
    assert total(server, "conveyor_replayed_steps_total") == 0
    assert server.stop() == 0


def test_refusals_are_counted_by_reason_as_the_server_counts_them(start_server):
    server = start_server("--device", "cpu", "--max-queue-s", "0.001", "--max-batch", "4")
    spec = {"model": "gru", "sessions": 64, "streams": 64, "connections": 2, "time_steps": 400, "in_flight": 2}
    load = Load(server.target, LoadSpec(**spec, pattern=Pattern.POISSON, rate_per_s=4000))
    load.open()
    before = {
        reason: total(server, "conveyor_errors_total", reason=reason) for reason in ("OVERLOADED", "STEP_ABORTED")
    }
    steps = total(server, "conveyor_steps_total")
    result = load.run(1.0)
    load.close()
    assert result.refused["OVERLOADED"].count > 0
    for reason, took in result.refused.items():
        assert took.count == total(server, "conveyor_errors_total", reason=reason) - before[reason]
        assert took.max_ns > 0
    assert result.steps == total(server, "conveyor_steps_total") - steps > 0


def test_runs_follow_one_another_on_the_same_sessions(start_server):
    server = start_server("--device", "cpu")
    load = Load(server.target, LoadSpec(model="lstm", sessions=300, streams=300, connections=4, opening=300))
    load.open()
    assert total(server, "conveyor_sessions_opened_total") == 300
    assert total(server, "conveyor_streams_active") == 300
    first = load.run(0.2)
    load.tend()
    second = load.run(0.2)
    assert first.served.min() > 0
    assert second.served.min() > 0
    assert total(server, "conveyor_steps_total") == 300 + first.steps + second.steps
    assert total(server, "conveyor_sessions_opened_total") == 300
    load.close()
    assert total(server, "conveyor_sessions_active") == 0
    assert total(server, "conveyor_streams_active") == 0


def test_a_server_that_stops_ends_the_load_with_a_reason(start_server):
    server = start_server("--device", "cpu")
    load = Load(server.target, LoadSpec(model="lstm", sessions=4, streams=4, connections=2))
    load.open()
    told = []

    def stop(now):
        told.append(now)
        server.process.send_signal(signal.SIGTERM)

    with pytest.raises(LoadError, match=r"go_away|stream .* ended|closed a connection"):
        load.run(30, stop)
    load.close()
    assert len(told) == 1
    assert server.process.wait(20) == 0


def test_a_model_that_is_not_there_is_named(start_server):
    server = start_server("--device", "cpu")
    load = Load(server.target, LoadSpec(model="nobody"))
    with pytest.raises(LoadError, match="no model 'nobody'"):
        load.open()
    load.close()
