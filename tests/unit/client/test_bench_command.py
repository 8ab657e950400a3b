"""`conveyor bench`: what is refused before any load is put on, and how a result is told."""

import argparse
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conveyor.bench import LoadError, LoadResult, LoadSpec, Pattern
from conveyor.bench.fleet import shares
from conveyor.bench.histogram import Histogram
from conveyor.bench.plot import draw
from conveyor.bench.report import describe, format_progress, format_report, notes, to_json
from conveyor.bench.worker import Snapshot
from conveyor.cli.bench import _spec, add_arguments
from conveyor.cli.main import main


def histogram(*values_ms):
    made = Histogram()
    made.record((np.array(values_ms) * 1e6).astype(np.int64))
    return made


def result(**more):
    fields = {
        "elapsed_s": 2.0,
        "steps": 1000,
        "latency": histogram(*range(1, 101)),
        "served": np.array([400, 600]),
        "served_streams": np.array([400, 600]),
        "client_cpu_s": 0.5,
        "busiest_cpu_s": 0.5,
    }
    return LoadResult(**(fields | more))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--sessions", "3", "--streams", "4"], "3 sessions on 4 streams"),
        (["--processes", "9"], "9 processes need as many connections"),
        (["--pattern", "poisson"], "needs a rate"),
        (["--seconds", "0"], "--seconds"),
        (["--in-flight", "0"], "in_flight"),
        (["--shed"], "a closed loop has none to give up"),
        (["--plot", "latency.jpg"], ".png or .svg"),
        (["--json", "nowhere/at/all.json"], "no folder"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_tried(given, says, capsys):
    assert main(["bench", "--model", "m", "--target", "127.0.0.1:1", *given]) == 2
    assert says in capsys.readouterr().err


def test_no_server_is_said_in_one_line(capsys):
    assert main(["bench", "--model", "m", "--target", "127.0.0.1:1", "--seconds", "0.1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("conveyor: 127.0.0.1:1, model m: ")


@pytest.mark.parametrize(("missing", "given"), [("hpack", []), ("matplotlib", ["--plot", "a.png"])])
def test_a_missing_extra_is_named(missing, given, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from conveyor.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-W", "error", "-c", code, "bench", "--model", "m", "--target", "127.0.0.1:1", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == f"conveyor: {missing} is not installed: pip install 'conveyor[bench]'\n"


def test_the_other_commands_do_without_the_extra(tmp_path):
    code = "import sys; sys.modules['hpack'] = None; from conveyor.cli.main import main; main(['bench', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--in-flight" in done.stdout


def test_shares_add_up():
    spec = LoadSpec(model="m", sessions=10, streams=7, connections=5, pattern=Pattern.POISSON, rate_per_s=1000, seed=3)
    found = shares(spec, 3)
    for name, whole in (("sessions", 10), ("streams", 7), ("connections", 5), ("rate_per_s", pytest.approx(1000))):
        assert sum(getattr(share, name) for share in found) == whole
    assert len({share.seed for share in found}) == 3
    # Each session at the same rate, whoever sends for it.
    assert {share.rate_per_s / share.sessions for share in found} == {100}
    with pytest.raises(ValueError, match="6 processes"):
        shares(spec, 6)


def test_results_of_processes_add_up():
    whole = LoadResult()
    whole.add(result(requests=3, refused={"OVERLOADED": histogram(1)}, unsent=2, unsent_oldest_s=0.5, shed=5))
    whole.add(result(elapsed_s=2.5, requests=4, shed=6, refused={"OVERLOADED": histogram(2), "DRAINING": histogram(3)}))
    assert (whole.steps, whole.requests, whole.unsent, whole.elapsed_s) == (2000, 7, 2, 2.5)
    assert whole.shed == 11
    assert {reason: took.count for reason, took in whole.refused.items()} == {"OVERLOADED": 2, "DRAINING": 1}
    assert whole.latency.count == 200
    assert whole.served.tolist() == [400, 600, 400, 600]
    assert (whole.client_cpu_s, whole.busiest_cpu_s, whole.unsent_oldest_s) == (1.0, 0.5, 0.5)
    assert whole.active_streams == 4


def test_the_report_tells_what_happened():
    spec = LoadSpec(model="m", sessions=2, streams=2, time_steps=5)
    text = format_report(spec, result(refused={"OVERLOADED": histogram(2, 2)}, unsent=7, unsent_oldest_s=0.25))
    for expected in (
        r"steps +1,000 in 2.00 s, 500/s, 2,500 time steps/s",
        r"latency +p50 50\.\d ms, p90 90\.\d ms, p99 99\.\d ms, p99.9 100 ms, max 100 ms",
        r"refused +2 OVERLOADED, told within p50 2 ms",
        r"not sent +7 steps .* 250 ms",
        r"streams +2 of 2 served, 400 to 600 steps each",
        r"client +0.25 cores, 500.0 us a step",
    ):
        assert re.search(expected, text), text
    assert "note" not in text
    assert "given up" not in text


def test_steps_that_were_given_up_are_told():
    spec = LoadSpec(model="m", pattern=Pattern.POISSON, rate_per_s=100, shed=True)
    assert re.search(r"given up +1,234 steps", format_report(spec, result(shed=1234)))
    assert "steps without room given up" in describe("h:1", spec, 1)
    found = to_json("h:1", spec, 1, result(shed=1234))
    assert (found["shed"], found["load"]["shed"]) == (1234, True)


@pytest.mark.parametrize("shed", [False, True])
def test_what_is_given_up_is_the_user_s_choice(shed):
    parser = argparse.ArgumentParser()
    add_arguments(parser, "h:1")
    given = ["--model", "m", "--pattern", "burst", "--rate", "5", *(["--shed"] if shed else [])]
    assert _spec(parser.parse_args(given)).shed is shed


def test_figures_that_are_the_client_s_own_are_called_so():
    (busy,) = notes(result(busiest_cpu_s=1.9))
    assert "0.95 cores" in busy
    (unserved,) = notes(result(served_streams=np.array([0, 5, 0])))
    assert unserved.startswith("2 streams")
    assert f"note: {busy}" in format_report(LoadSpec(model="m"), result(busiest_cpu_s=1.9))


def test_the_load_is_described():
    spec = LoadSpec(model="m", sessions=8, streams=2, pattern=Pattern.BURST, rate_per_s=2500, frames=True, in_flight=3)
    text = describe("h:1", spec, 1)
    assert text == (
        "m on h:1: 8 sessions on 2 streams on 1 connection of 1 process, bursts, 2,500 steps/s in one each 100 ms, "
        "frames, 3 steps in flight"
    )
    assert describe("h:1", LoadSpec(model="m", connections=1), 2).endswith("of 2 processes, closed loop")


def test_progress_is_of_the_last_moment_and_latency_of_the_whole():
    before, now = Snapshot(0.5, 1000, 0, histogram(1)), Snapshot(1.0, 3000, 5, histogram(1, 1, 3))
    assert "2,000 steps/s" in format_progress(before, None)
    assert "4,000 steps/s, p50 1 ms, p99 3 ms, 5 refused" in format_progress(now, before)


def test_json_holds_everything_and_is_json():
    text = json.dumps(to_json("h:1", LoadSpec(model="m"), 1, result(refused={"OVERLOADED": histogram(2)})))
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["load"]["pattern"] == "closed"
    assert found["steps_per_s"] == 500
    assert sum(found["latency"]["histogram"]["counts"]) == found["latency"]["count"] == 100
    assert found["refused"]["OVERLOADED"]["count"] == 1
    assert found["streams"] == {"active": 2, "fewest_steps": 400, "most_steps": 600}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_drawn(suffix, tmp_path):
    path = tmp_path / f"latency.{suffix}"
    draw(result(refused={"OVERLOADED": histogram(2)}), "a load", path)
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert "<svg" in path.read_text()


def test_one_answer_can_be_drawn(tmp_path):
    draw(result(latency=histogram(3)), "a load", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_what_went_wrong_keeps_its_reason():
    with pytest.raises(LoadError) as caught:
        raise LoadError("no", reason="OVERLOADED")
    assert caught.value.reason == "OVERLOADED"
