"""The store: whether it answers, how fast, how much is written, and what is not written yet."""

from deploy.grafana.dashboard import SERVER, Dashboard, Row
from deploy.grafana.panel import OBJECTIVE, Graph, Heatmap, Query, Stat, buckets, mean, quantiles, rate

_SERVER = "{{instance}}"
_VISITS = "conveyor_store_visit_seconds"

NOW = Row(
    "Now",
    [
        Stat(
            "Servers that do not reach it",
            "One of them: look at its network. All: look at the store.",
            [Query(f"sum(conveyor_store_away{{{SERVER}}})", "away")],
            runbook="ConveyorStoreAway",
            bad=1,
        ),
        Stat(
            "Longest wait to be stored",
            "Of all sessions. Usual is the checkpoint's time; from --max-undurable-s on, steps are refused.",
            [Query(f"max(conveyor_store_lag_seconds{{{SERVER}}})", "lag")],
            unit="s",
            runbook="ConveyorStoreLag",
            warn=2,
            bad=5,
        ),
        Stat(
            "Sessions that wait for it",
            "Sessions with steps that the store does not have yet.",
            [Query(f"sum(conveyor_store_undurable_sessions{{{SERVER}}})", "sessions")],
            runbook="ConveyorStoreLag",
        ),
        Stat(
            "Visit, of its objective",
            "The 99th percentile of the slowest server's visits over conveyor:store_visit_seconds:objective.",
            [
                Query(
                    f"max(conveyor:store_visit_seconds:p99_5m{{{SERVER}}}) / "
                    "scalar(conveyor:store_visit_seconds:objective)",
                    "visit",
                )
            ],
            unit="percentunit",
            runbook="ConveyorStoreSlow",
            warn=0.8,
            bad=1,
        ),
        Stat(
            "Sessions written a second",
            "By all chosen servers.",
            [Query(f"sum({rate('conveyor_store_written_sessions_total', SERVER)})", "written")],
            unit="wps",
        ),
        Stat(
            "Bytes written a second",
            "State and answers, by all chosen servers.",
            [Query(f"sum({rate('conveyor_store_written_bytes_total', SERVER)})", "written")],
            unit="Bps",
        ),
    ],
)

THERE = Row(
    "Is it there",
    [
        Graph(
            "Away",
            "1 while the store does not answer a server. It is tried again four times a second.",
            [Query(f"conveyor_store_away{{{SERVER}}}", _SERVER)],
            runbook="ConveyorStoreAway",
            most=1,
        ),
        Graph(
            "Visits that failed, a minute",
            "Some now and then, without being away for long, are a store that comes and goes.",
            [Query(f"60 * {rate('conveyor_store_failures_total', SERVER)}", _SERVER)],
            runbook="ConveyorStoreFailing",
        ),
        Graph(
            "What clients are told, a second",
            "STORE_UNAVAILABLE is a store that is away for too long, RECORD_INVALID a damaged record.",
            [
                Query(
                    f'sum by (reason) (rate(conveyor_errors_total{{{SERVER}, reason=~"STORE_UNAVAILABLE|RECORD_INVALID|'
                    'NOT_DURABLE"}[$__rate_interval]))',
                    "{{reason}}",
                )
            ],
            unit="reqps",
            runbook="ConveyorRecordInvalid",
        ),
    ],
)

FAST = Row(
    "How fast",
    [
        Graph(
            "Visits",
            "What an attach, a wake and the answer of a sync session wait for.",
            [
                *quantiles(_VISITS, SERVER, "instance", _SERVER),
                Query("conveyor:store_visit_seconds:objective", OBJECTIVE),
            ],
            unit="s",
            runbook="ConveyorStoreSlow",
        ),
        Graph(
            "Visits a second",
            "One is out at a time; what becomes due meanwhile is the next.",
            [Query(rate(f"{_VISITS}_count", SERVER), _SERVER)],
            unit="reqps",
        ),
        Graph(
            "Mean visit",
            "Times the visits a second it is how much of the time one is under way: near 1, all wait for the store.",
            [Query(mean(_VISITS, SERVER, "instance"), _SERVER)],
            unit="s",
            runbook="ConveyorStoreSlow",
        ),
        Heatmap(
            "All visits",
            "How many took how long, on all chosen servers.",
            [buckets(_VISITS, SERVER)],
            unit="s",
            runbook="ConveyorStoreSlow",
            width=24,
        ),
    ],
)

WRITTEN = Row(
    "What is written, and what is not yet",
    [
        Graph(
            "Longest wait to be stored",
            "If a server died now, clients that keep no steps would lose as much.",
            [
                Query(f"conveyor_store_lag_seconds{{{SERVER}}}", _SERVER),
                Query("conveyor:store_lag_seconds:objective", OBJECTIVE),
            ],
            unit="s",
            runbook="ConveyorStoreLag",
        ),
        Graph(
            "Sessions that wait to be stored",
            "Sessions with steps that the store does not have yet.",
            [Query(f"conveyor_store_undurable_sessions{{{SERVER}}}", _SERVER)],
            runbook="ConveyorStoreLag",
        ),
        Graph(
            "Sessions in one visit",
            "In the mean: the more, the less each costs.",
            [
                Query(
                    f"{rate('conveyor_store_written_sessions_total', SERVER)} / on (job, instance) "
                    f"({rate(f'{_VISITS}_count', SERVER)} > 0)",
                    _SERVER,
                )
            ],
        ),
        Graph(
            "Sessions written a second",
            "Each time that a session is written.",
            [Query(rate("conveyor_store_written_sessions_total", SERVER), _SERVER)],
            unit="wps",
            stacked=True,
        ),
        Graph(
            "Bytes written a second",
            "State, and answers that clients have not acknowledged.",
            [Query(rate("conveyor_store_written_bytes_total", SERVER), _SERVER)],
            unit="Bps",
            runbook="ConveyorStoreSlow",
            stacked=True,
        ),
        Graph(
            "Sessions that come and go, a minute",
            "passivated left memory for the store, taken came in, fenced are another server's, swept had expired.",
            [
                Query(f"60 * sum({rate(f'conveyor_sessions_{what}_total', SERVER)})", what)
                for what in ("passivated", "taken", "fenced", "swept")
            ],
            runbook="ConveyorSessionsThrash",
        ),
    ],
)

DASHBOARD = Dashboard(
    "store",
    "Conveyor / Store",
    "Whether the store answers, how fast, and what it does not have yet. For servers that have one.",
    [NOW, THERE, FAST, WRITTEN],
    by_model=False,
)
