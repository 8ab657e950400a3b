"""`conveyor top` without a network: pages read, changes between them, quantiles, the view and its drawing."""

import argparse
import json
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import conveyor
import pytest
from conveyor.cli import main as cli
from conveyor.cli.commands import UsageError
from conveyor.cli.top import screen
from conveyor.cli.top.change import Change, added, quantile, shares
from conveyor.cli.top.command import addresses
from conveyor.cli.top.page import Page
from conveyor.cli.top.sample import Sample, Server
from conveyor.cli.top.view import view
from conveyor_proto.v1 import spec_pb2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

NOW = datetime(2026, 1, 1, tzinfo=UTC)
INF = math.inf


def page_of(text):
    return Page.of("\n".join(line.strip() for line in text.splitlines()))


def sample(at_s, text=None, **kwargs):
    page = None if text is None else page_of(text)
    return Sample(Server("here:1", "here:2"), at_s, NOW + timedelta(seconds=at_s), "serving", page, **kwargs)


def session(name, **kwargs):
    fields = dict.fromkeys(("model_digest", "model", "version"), "m")
    fields |= dict.fromkeys(("epoch", "applied_seq", "applied_time_steps", "max_in_flight", "pending_steps"), 0)
    fields |= {"idle_timeout_s": 60.0, "created_at": NOW, "last_used_at": NOW, "attached": True, "state_bytes": 8}
    fields |= {"oldest_replayable_seq": 0, "durability": "none", "durable_seq": 0, "resident": True}
    return conveyor.SessionInfo(**{"id": name, **fields, **kwargs})


def model(**kwargs):
    fields = {"name": "m", "version": "1", "status": "ready", "latest": True, "device": "cpu", "loaded_at": NOW}
    fields |= {"load_s": 0.1, "sessions": 2, "failure": "", "spec": spec_pb2.ModelSpec(), "batch_policy": None}
    return conveyor.Model(**{**fields, **kwargs})


# ---------------------------------------------------------------- pages


def test_a_page_is_read_as_prometheus_reads_it():
    registry = CollectorRegistry()
    Counter("steps", "Help.", ["model"], registry=registry).labels('a "b" \\ c\nd').inc(3)
    Gauge("lag_seconds", "Help.", registry=registry).set(1.5e-7)
    Histogram("took_seconds", "Help.", ["x", "y"], registry=registry).labels("1", "2, 3}").observe(0.3)
    text = generate_latest(registry).decode()
    truth = {}
    for family in text_string_to_metric_families(text):
        for item in family.samples:
            truth.setdefault(item.name, {})[tuple(sorted(item.labels.items()))] = item.value
    assert len(truth) >= 5
    assert Page.of(text).series == truth


def test_what_is_no_sample_is_passed_over():
    page = Page.of('# HELP a b\n\nnonsense\na x\na{b="c"} 2 1700000000000\na{b="d"} NaN\n')
    assert page.total("a", b="c") == 2
    assert page.total("b") is None
    assert page.values_of("b", "a") == {"c", "d"}


# ---------------------------------------------------------------- changes


def test_increases_and_a_server_that_began_anew():
    before = page_of('steps{m="a"} 10\nsteps{m="b"} 100')
    after = page_of('steps{m="a"} 16\nsteps{m="b"} 4\nsteps{m="c"} 2')
    change = Change(before, after, 2.0)
    assert change.increase("steps", m="a") == 6
    assert change.increase("steps", m="b") == 4, "it counts from zero again"
    assert change.increase("steps", m="c") == 2, "it was not there"
    assert change.rate("steps") == 6.0
    assert change.increase("none") == 0


def test_the_buckets_of_a_time():
    before = page_of('t_bucket{m="a",le="0.5"} 1\nt_bucket{m="a",le="1.0"} 1\nt_bucket{m="a",le="+Inf"} 2')
    after = page_of('t_bucket{m="a",le="0.5"} 3\nt_bucket{m="a",le="1.0"} 5\nt_bucket{m="a",le="+Inf"} 6')
    buckets = Change(before, after, 1.0).buckets("t", m="a")
    assert buckets == {0.5: 2, 1.0: 4, INF: 4}
    assert added([buckets, {0.5: 1, 1.0: 1, INF: 2}]) == {0.5: 3, 1.0: 5, INF: 6}
    assert shares(buckets) == {0.5: 0.5, 1.0: 0.5, INF: 0.0}
    assert shares({}) == shares({1.0: 0, INF: 0}) == {}


@pytest.mark.parametrize(
    ("share", "buckets", "value"),
    [
        (0.5, {1.0: 4, 2.0: 8, INF: 8}, 1.0),
        (0.75, {1.0: 4, 2.0: 8, INF: 8}, 1.5),
        (0.25, {1.0: 4, 2.0: 8, INF: 8}, 0.5),
        (0.99, {1.0: 0, 2.0: 100, INF: 100}, 1.99),
        (0.5, {1.0: 0, 2.0: 0, 4.0: 10, INF: 10}, 3.0),
        (0.9, {1.0: 1, INF: 10}, 1.0),
        (0.5, {1.0: 0, INF: 0}, None),
        (0.5, {INF: 3}, None),
        (0.5, {}, None),
    ],
)
def test_quantiles_are_prometheus(share, buckets, value):
    """Evenly within a bucket, the lowest from zero, beyond the highest bound that bound."""
    assert quantile(share, buckets) == (None if value is None else pytest.approx(value))


# ---------------------------------------------------------------- the view

PAGE = """
    conveyor_model_ready{model="m",version="1"} 1
    conveyor_sessions_active{model="m",version="1"} 7
    conveyor_sessions_limit 9
    conveyor_steps_ready{model="m",version="1"} 3
    conveyor_steps_total{model="m",version="1"} %d
    conveyor_time_steps_total{model="m",version="1"} %d
    conveyor_batch_rows_bucket{model="m",version="1",le="1.0"} %d
    conveyor_batch_rows_bucket{model="m",version="1",le="2.0"} %d
    conveyor_batch_rows_bucket{model="m",version="1",le="+Inf"} %d
    conveyor_batch_rows_sum{model="m",version="1"} %d
    conveyor_batch_run_seconds_sum{model="m",version="1"} %f
    conveyor_errors_total{reason="OVERLOADED"} %d
    conveyor_errors_total{reason="STEP_GAP"} 5
    conveyor_errors_total{reason="NEVER"} 0
    conveyor_build_info{version="0.1.0"} 1
    conveyor_draining 0
    process_cpu_seconds_total %f
"""
EARLY = PAGE % (0, 0, 0, 0, 0, 0, 0.0, 1, 10.0)
LATE = PAGE % (60, 120, 10, 30, 40, 90, 1.0, 9, 11.0)


def test_rates_batches_and_errors_of_one_server():
    shown = view([sample(0.0, EARLY)], [sample(2.0, LATE, models=[model()])])
    (item,) = shown.models
    assert (item.status, item.sessions, item.ready, item.steps_per_s, item.time_steps_per_s) == ("ready", 7, 3, 30, 60)
    assert (item.batch, item.busy) == (90 / 40, 0.5)
    assert item.batches == {1.0: 0.25, 2.0: 0.5, INF: 0.25}
    assert item.queue_p50_s is None, "the page says nothing of it"
    (server,) = shown.servers
    assert (server.sessions, server.sessions_limit) == (7, 9)
    assert (server.version, server.steps_per_s, server.cpu, server.store) == ("0.1.0", 30, 0.5, "none")
    assert list(shown.errors.items()) == [("OVERLOADED", (4.0, 9.0)), ("STEP_GAP", (0.0, 5.0))], (
        "what happens now first"
    )
    assert shown.store is None
    assert shown.answered


def test_several_servers_are_added_up():
    two = view([sample(0.0, EARLY)] * 2, [sample(2.0, LATE)] * 2)
    (item,) = two.models
    assert (item.sessions, item.steps_per_s, item.busy, item.batch) == (14, 60, 0.5, 90 / 40)
    assert two.errors["OVERLOADED"] == (8.0, 18.0)


def test_without_a_page_what_grpc_says_is_shown_and_the_rest_is_not_known():
    early, late = (
        sample(at, models=[model(status="failed", failure="it is cut short")], troubles=["no metrics"])
        for at in (0.0, 1.0)
    )
    (item,) = view([early], [late]).models
    assert (item.status, item.sessions, item.steps_per_s, item.ready) == ("failed", 2, None, None)
    drawn = screen.text(view([early], [late]), "title", rows=5, width=160)
    assert "no metrics" in drawn
    assert "failed cpu" in drawn
    assert "m 1: it is cut short" in drawn.splitlines()


def test_a_model_that_some_server_could_not_load_is_not_ready():
    told = [replace(sample(1.0, models=[model(status=status)])) for status in ("ready", "failed", "loading")]
    assert view(told, told).models[0].status == "failed"


def test_a_model_that_was_unloaded_is_in_its_counters_alone():
    gone = LATE.replace('ready{model="m",version="1"} 1', 'ready{model="m",version="1"} 0')
    assert view([sample(0.0, EARLY)], [sample(1.0, gone)]).models[0].status == "unloaded"


def test_a_drain_is_shown_before_health_is():
    draining = LATE.replace("draining 0", "draining 1")
    assert view([sample(0.0, EARLY)], [sample(1.0, draining)]).servers[0].health == "draining"


def test_a_server_that_is_away_is_said_to_be():
    away = replace(sample(1.0), health="away", troubles=["here:1: cannot connect [CONNECTION_LOST]"])
    shown = view([away], [away])
    assert not shown.answered
    assert "cannot connect" in screen.text(shown, "title", rows=5, width=160)


def test_sessions_are_ordered_and_counted_by_idle_time():
    def at(at_s, steps):
        listed = [
            session("busy", applied_seq=steps, last_used_at=NOW + timedelta(seconds=at_s - 0.01), pending_steps=2),
            session("old", applied_seq=3, last_used_at=NOW - timedelta(hours=2)),
            session("new", applied_seq=steps, last_used_at=NOW - timedelta(seconds=30)),
        ]
        return sample(at_s, sessions=listed if at_s else listed[:2], all_sessions=9)

    def names(order):
        return [each.id for each in view([at(0.0, 10)], [at(2.0, 14)], order).sessions]

    assert names("active") == ["busy", "new", "old"]
    assert names("idle") == ["old", "new", "busy"]
    assert names("steps") == names("pending") == ["busy", "new", "old"]
    shown = view([at(0.0, 10)], [at(2.0, 14)])
    assert [each.steps_per_s for each in shown.sessions] == [2.0, None, 0.0], "None: it was seen once"
    assert shown.idle == {"<1 s": 1, "<10 s": 0, "<1 min": 1, "<10 min": 0, "<1 h": 0, "more": 1}
    assert (shown.seen, shown.all_sessions) == (3, 9)


def test_a_session_of_a_store_is_shown_once_by_the_server_that_has_it():
    asleep = session("s", durability="async", resident=False, applied_seq=5, durable_seq=5)
    here = session("s", durability="async", resident=True, applied_seq=7, durable_seq=5)
    for samples in ([asleep, here], [here, asleep]):
        late = [sample(1.0, sessions=[each]) for each in samples]
        (only,) = view(late, late).sessions
        assert (only.where, only.steps, only.unstored) == ("memory", 7, 2)


def test_the_store_of_several_servers():
    text = """
        conveyor_store_away %d
        conveyor_store_written_sessions_total %d
        conveyor_store_undurable_sessions 2
        conveyor_store_lag_seconds %f
        conveyor_sessions_asleep 4
        conveyor_store_visit_seconds_bucket{le="0.001"} %d
        conveyor_store_visit_seconds_bucket{le="0.002"} %d
        conveyor_store_visit_seconds_bucket{le="+Inf"} %d
    """
    early = [sample(0.0, text % (0, 0, 0.1, 0, 0, 0))] * 2
    late = [sample(2.0, text % (0, 20, 0.1, 10, 10, 10)), sample(2.0, text % (1, 0, 7.0, 0, 10, 10))]
    shown = view(early, late)
    store = shown.store
    assert (store.away, store.of, store.written_per_s, store.undurable, store.lag_s, store.asleep) == (
        1,
        2,
        10,
        4,
        7,
        8,
    )
    assert (store.visit_p50_s, store.visit_p99_s) == pytest.approx((0.001, 0.00198))
    assert [server.store for server in shown.servers] == ["ok", "away"]
    assert "away for 1 of 2" in screen.text(shown, "title", rows=5, width=160)


# ---------------------------------------------------------------- the screen and the command line


def test_names_are_drawn_as_they_are_and_sessions_make_room():
    sessions = [session(f"[bold]{number}", model="[red]m") for number in range(30)]
    shown = view([sample(0.0, EARLY)], [sample(2.0, LATE, sessions=sessions, all_sessions=30)])
    lines = screen.text(shown, "title", rows=7, width=160).splitlines()
    assert sum("[bold]" in line for line in lines) == 7
    assert any("sessions (7 of 30)" in line for line in lines)
    assert any(line.startswith("m 1") and "25%" in line and "50%" in line for line in lines), "the batches"
    console = Console(width=160, color_system=None)
    long = [sample(2.0, LATE, sessions=sessions, all_sessions=30, troubles=["why " * 100])]
    for samples in ([sample(2.0, LATE, sessions=sessions, all_sessions=30)], long):
        with console.capture() as captured:
            console.print(screen.draw(view([sample(0.0, EARLY)], samples), "title", rows=20, height=24))
        assert len(captured.get().splitlines()) <= 24


def test_which_pages_belong_to_which_servers(monkeypatch):
    monkeypatch.setenv("CONVEYOR_METRICS_PORT", "7")
    assert addresses(["a:1"], None) == [Server("a:1", "a:7")]
    monkeypatch.delenv("CONVEYOR_METRICS_PORT")
    assert addresses(["a:1", "b"], None) == [Server("a:1", "a:9464"), Server("b", "b:9464")]
    assert addresses(["dns:///a:1"], None) == [Server("dns:///a:1", "a:9464")]
    assert addresses(["a:1"], ["a:2", "a:3"]) == [Server("a:1", "a:2"), Server("", "a:3")], "of two workers"
    assert addresses(["a:1"], ["none"]) == [Server("a:1", "")]
    with pytest.raises(UsageError, match="2 servers and 1 metrics pages"):
        addresses(["a:1", "b:1"], ["a:2"])


def test_what_cannot_be_meant_is_said(capsys):
    assert cli.main(["top", "--once", "--interval", "0"]) == 2
    assert "--interval is 0.2 to 60 seconds, not 0" in capsys.readouterr().err
    assert cli.main(["top"]) == 2
    assert "--once" in capsys.readouterr().err, "no terminal"


def test_without_rich_the_extra_is_named_and_json_does_without(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["top", "--once"]) == 2
    assert "pip install 'conveyor[top]'" in capsys.readouterr().err
    nobody = ("--target", "127.0.0.1:1", "--metrics", "none")
    assert cli.main(["top", "--json", "--interval", "0.2", *nobody]) == 1
    assert json.loads(capsys.readouterr().out)["servers"][0]["health"] == "away"


def test_common_options_are_tops_too():
    parsed = cli._parser({}).parse_args(["top", "--target", "a:1", "--target", "b:1", "--tls", "--once"])
    assert isinstance(parsed, argparse.Namespace)
    assert (parsed.target, parsed.tls, parsed.timeout_s) == (["a:1", "b:1"], True, 2.0)
