"""What is counted, what is exposed, and that docs/metrics.md says the same."""

import re
from pathlib import Path

import numpy as np
import pytest
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_server.exposition import TABLE, render
from conveyor_server.metrics import BATCH_BUCKETS, LATENCY_BUCKETS_S, Metrics, Tally
from conveyor_server.sessions.session import Submission
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture
def engine(make_engine):
    return make_engine()


def exposed(metrics, directory) -> dict[str, dict[frozenset, float]]:
    """Sample name -> labels -> value."""
    samples: dict[str, dict[frozenset, float]] = {}
    for family in text_string_to_metric_families(render(metrics.sample(directory)).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def value(samples, name: str, **labels: str) -> float:
    return samples[name][frozenset(labels.items())]


def submit(directory, session, seq: int, time_steps: int, now: float) -> None:
    inputs = [np.zeros((time_steps, 2), np.float32)]
    directory.submit(session, Submission(seq, object(), inputs, time_steps, seq), now)


def test_buckets() -> None:
    assert LATENCY_BUCKETS_S[0] == 50e-6
    assert [bound.is_integer() and int(bound).bit_count() == 1 for bound in BATCH_BUCKETS] == [True] * 11


def test_a_tally_counts_as_prometheus_does() -> None:
    tally = Tally((1.0, 2.0))
    tally.observe(1.0)
    tally.observe(1.5, 3)
    tally.observe(9.0)
    assert tally.cumulative() == [("1.0", 1), ("2.0", 4), ("+Inf", 5)]
    assert tally.total == 14.5


def test_batches_and_steps(engine, directory) -> None:
    metrics = Metrics()
    figures = metrics.of(engine)
    sessions = [directory.create(engine, 0.0) for _ in range(3)]
    for session, time_steps in zip(sessions, (1, 1, 6), strict=True):
        submit(directory, session, 1, time_steps, 10.0)
    now = 10.0
    while (batch := engine.next_batch(now + 0.0004)) is not None:
        result = engine.run(batch)
        now += 0.01
        directory.deliver(engine, batch, result, now)
        figures.delivered(batch, now)
    samples = exposed(metrics, directory)
    labels = {"model": "last", "version": "1"}
    assert value(samples, "conveyor_steps_total", **labels) == 3
    assert value(samples, "conveyor_time_steps_total", **labels) == 8
    assert value(samples, "conveyor_sessions_active", **labels) == 3
    assert value(samples, "conveyor_sessions_opened_total") == 3
    # One batch of the two short ones, two of the long one's quanta.
    assert value(samples, "conveyor_batch_rows_count", **labels) == 3
    assert value(samples, "conveyor_batch_rows_sum", **labels) == 4
    assert value(samples, "conveyor_batch_rows_bucket", le="1.0", **labels) == 2
    assert value(samples, "conveyor_batch_run_seconds_count", **labels) == 3
    assert value(samples, "conveyor_step_queue_seconds_count", **labels) == 3
    assert value(samples, "conveyor_step_run_seconds_count", **labels) == 3
    assert value(samples, "conveyor_batch_ready_ratio_bucket", le="0.7", **labels) >= 1
    assert value(samples, "conveyor_state_resident_bytes", **labels) == 3 * 16
    assert value(samples, "conveyor_state_slab_bytes", **labels) == 32 * 16
    assert value(samples, "conveyor_steps_ready", **labels) == 0


def test_a_failed_step_is_not_counted_as_applied(engine, directory, runner) -> None:
    metrics = Metrics()
    session = directory.create(engine, 0.0)
    submit(directory, session, 1, 1, 0.0)
    batch = engine.next_batch(0.0)
    result = engine.run(batch)
    result.finite[:] = False
    directory.deliver(engine, batch, result, 1.0)
    metrics.of(engine).delivered(batch, 1.0)
    samples = exposed(metrics, directory)
    assert value(samples, "conveyor_steps_total", model="last", version="1") == 0
    assert value(samples, "conveyor_step_queue_seconds_count", model="last", version="1") == 0
    assert value(samples, "conveyor_batch_rows_count", model="last", version="1") == 1


def test_errors_closes_and_loads(engine, directory) -> None:
    metrics = Metrics()
    metrics.loaded(engine, 1.25)
    metrics.refused(to_status(Fault(e.ERROR_REASON_STEP_GAP, "")))
    metrics.refused(to_status(Fault(e.ERROR_REASON_OVERLOADED, "", retry_s=1.0)))
    directory.close(directory.create(engine, 0.0), object(), 0.0)
    directory.create(engine, 0.0, idle_timeout_s=1.0)
    directory.expire(2.0)
    samples = exposed(metrics, directory)
    assert value(samples, "conveyor_errors_total", reason="STEP_GAP") == 1
    assert value(samples, "conveyor_errors_total", reason="OVERLOADED") == 1
    assert value(samples, "conveyor_sessions_closed_total", cause="closed") == 1
    assert value(samples, "conveyor_sessions_closed_total", cause="expired") == 1
    assert value(samples, "conveyor_model_ready", model="last", version="1") == 1
    assert value(samples, "conveyor_model_load_seconds", model="last", version="1") == 1.25


def test_counters_are_there_before_what_they_count(engine, directory) -> None:
    """Of a counter that begins with its first event, nobody sees that event."""
    samples = exposed(Metrics(), directory)
    reasons = {dict(labels)["reason"] for labels in samples["conveyor_errors_total"]}
    known = {name.removeprefix("ERROR_REASON_") for name in list(e.ErrorReason.keys())}
    assert reasons == known - {"UNSPECIFIED"} | {"INTERNAL"}
    assert set(samples["conveyor_errors_total"].values()) == {0}
    told = DOCS.read_text().partition("- `cause` of")[2].partition("\n- `reason`")[0]
    causes = {dict(labels)["cause"] for labels in samples["conveyor_sessions_closed_total"]}
    assert causes == set(re.findall(r"`(\w+)`", told))


def test_a_notice_to_leave_is_draining(engine, directory) -> None:
    metrics = Metrics()
    assert value(exposed(metrics, directory), "conveyor_draining") == 0
    metrics.leaving = True
    assert value(exposed(metrics, directory), "conveyor_draining") == 1
    assert value(exposed(metrics, directory), "conveyor_sessions_limit") == directory.limits.max_sessions


def test_a_certificates_end_is_told_where_there_is_one(engine, directory) -> None:
    metrics = Metrics()
    assert "conveyor_certificate_expiry_timestamp_seconds" not in exposed(metrics, directory)
    metrics.certificate_expires_at = 1.9e9
    assert value(exposed(metrics, directory), "conveyor_certificate_expiry_timestamp_seconds") == 1.9e9


def test_counters_outlive_an_unload(make_engine, directory) -> None:
    metrics = Metrics()
    first = make_engine()
    metrics.loaded(first, 1.0)
    metrics.of(first).steps = 5
    metrics.unloaded(first)
    samples = exposed(metrics, directory)
    assert value(samples, "conveyor_model_ready", model="last", version="1") == 0
    assert value(samples, "conveyor_steps_total", model="last", version="1") == 5
    second = make_engine()
    metrics.loaded(second, 1.0)
    assert metrics.of(second).steps == 5


def test_no_session_is_named(engine, directory) -> None:
    metrics = Metrics()
    metrics.of(engine)
    directory.create(engine, 0.0, session_id="very-secret")
    assert b"very-secret" not in render(metrics.sample(directory))


def test_the_table_is_what_is_exposed(engine, directory) -> None:
    metrics = Metrics()
    metrics.of(engine)
    metrics.refused(to_status(Fault(e.ERROR_REASON_STEP_GAP, "")))
    directory.close(directory.create(engine, 0.0), object(), 0.0)
    families = list(text_string_to_metric_families(render(metrics.sample(directory)).decode()))
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.startswith("process_")
    }
    assert names == {row.name for row in TABLE}
    assert any(family.name == "process_cpu_seconds" for family in families)
    for family in families:
        for row in TABLE:
            if row.name.removesuffix("_total") == family.name:
                assert family.type == row.kind
                for sample in family.samples:
                    assert set(sample.labels) - {"le"} == set(row.labels)


def test_docs_name_every_metric() -> None:
    rows = re.findall(r"^\| `(conveyor_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCS.read_text(), re.MULTILINE)
    documented = [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows]
    assert documented == [(row.name, row.kind, row.labels, row.help) for row in TABLE]
