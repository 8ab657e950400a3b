"""The models: which versions are served where, how their batches look, and where a step's time goes."""

from deploy.grafana.dashboard import JOB_MODEL, MODEL, Dashboard, Row
from deploy.grafana.panel import OBJECTIVE, Graph, Heatmap, Query, Stat, buckets, mean, quantiles, rate

_PLAIN = "{{model}}"
_VERSION = "{{model}}/{{version}}"
_SERVER = "{{model}}/{{version}} on {{instance}}"

VERSIONS = Row(
    "Versions",
    [
        Stat(
            "Versions served",
            "Versions that are ready, counted once for each server.",
            [Query(f"sum(conveyor_model_ready{{{MODEL}}})", "ready")],
            runbook="ConveyorServesNothing",
        ),
        Stat(
            "Versions that failed",
            "Versions in the folder that could not be loaded, counted once for each server.",
            [Query(f"sum(conveyor_model_failed{{{MODEL}}})", "failed")],
            runbook="ConveyorModelFailed",
            bad=1,
        ),
        Graph(
            "Servers that serve a version",
            "Lower than the number of servers for long: some do not have it, and sessions cannot move there.",
            [Query(f"sum by (model, version) (conveyor_model_ready{{{MODEL}}})", _VERSION)],
            runbook="ConveyorModelUneven",
        ),
        Graph(
            "Time to load",
            "Loading, warming and measuring a version, when it was loaded last.",
            [Query(f"conveyor_model_load_seconds{{{MODEL}}}", _SERVER)],
            unit="s",
            runbook="ConveyorServesNothing",
        ),
    ],
)

WORK = Row(
    "Work",
    [
        Graph(
            "Steps a second",
            "Steps applied, by version: a new one takes new sessions.",
            [Query(f"sum by (model, version) ({rate('conveyor_steps_total', MODEL)})", _VERSION)],
            unit="reqps",
            stacked=True,
        ),
        Graph(
            "Time steps of a step",
            "In the mean: 1 is single tokens, more is chunks. A step longer than the quantum takes several runs.",
            [
                Query(
                    f"sum by (model) ({rate('conveyor_time_steps_total', MODEL)}) / "
                    f"(sum by (model) ({rate('conveyor_steps_total', MODEL)}) > 0)",
                    _PLAIN,
                )
            ],
        ),
        Graph(
            "Replays a second",
            "Answers given from the record, because a client sent a step again. Many mean cut connections.",
            [Query(f"sum by (model) ({rate('conveyor_replayed_steps_total', MODEL)})", _PLAIN)],
            unit="reqps",
            runbook="ConveyorSessionsFenced",
        ),
    ],
)

LATENCY = Row(
    "Where a step's time goes",
    [
        Graph(
            "Wait before the run",
            "From a step's acceptance to its first run.",
            [
                *quantiles("conveyor_step_queue_seconds", MODEL, "model", _PLAIN, shares=(0.5, 0.9, 0.99)),
                Query(f"conveyor:step_queue_seconds:objective{{{JOB_MODEL}}}", f"{OBJECTIVE} {_PLAIN}"),
            ],
            unit="s",
            runbook="ConveyorQueueSlow",
        ),
        Graph(
            "Run",
            "From a step's first run to the end of its last.",
            [
                *quantiles("conveyor_step_run_seconds", MODEL, "model", _PLAIN, shares=(0.5, 0.9, 0.99)),
                Query(f"conveyor:step_run_seconds:objective{{{JOB_MODEL}}}", f"{OBJECTIVE} {_PLAIN}"),
            ],
            unit="s",
            runbook="ConveyorRunSlow",
        ),
        Graph(
            "Answer",
            "From a step's last run until its answer was handed to the transport.",
            quantiles("conveyor_step_reply_seconds", MODEL, "model", _PLAIN, shares=(0.5, 0.9, 0.99)),
            unit="s",
        ),
        Heatmap(
            "Waits before the run",
            "How many steps waited how long. Two bands are two kinds of load.",
            [buckets("conveyor_step_queue_seconds", MODEL)],
            unit="s",
            runbook="ConveyorQueueSlow",
        ),
        Heatmap(
            "Runs",
            "How many steps ran how long.",
            [buckets("conveyor_step_run_seconds", MODEL)],
            unit="s",
            runbook="ConveyorRunSlow",
        ),
    ],
)

BATCHES = Row(
    "Batches",
    [
        Graph(
            "Time that a model runs",
            "Seconds of runs in each second: at 1 it is full.",
            [
                Query(
                    f"sum by (model, instance) ({rate('conveyor_batch_run_seconds_sum', MODEL)})",
                    "{{model}} on {{instance}}",
                )
            ],
            unit="percentunit",
            runbook="ConveyorOverloaded",
        ),
        Graph(
            "One run",
            "How long one run of the model takes.",
            quantiles("conveyor_batch_run_seconds", MODEL, "model", _PLAIN),
            unit="s",
            runbook="ConveyorRunSlow",
        ),
        Graph(
            "Runs a second",
            "Each costs the same few microseconds, however many sessions share it.",
            [Query(f"sum by (model) ({rate('conveyor_batch_rows_count', MODEL)})", _PLAIN)],
            unit="reqps",
        ),
        Graph(
            "Sessions in one run",
            "In the mean.",
            [Query(mean("conveyor_batch_rows", MODEL, "model"), _PLAIN)],
        ),
        Graph(
            "Share of the ready sessions that a run takes",
            "In the mean. Below 1, steps wait although a batch leaves: batch limits or mixed lengths hold them back.",
            [Query(mean("conveyor_batch_ready_ratio", MODEL, "model"), _PLAIN)],
            unit="percentunit",
            runbook="ConveyorQueueSlow",
            most=1,
        ),
        Graph(
            "Steps that wait for a run",
            "Accepted, and in no run yet. More than none while nothing runs is a run that does not come back.",
            [Query(f"conveyor_steps_ready{{{MODEL}}}", _SERVER)],
            runbook="ConveyorModelStalled",
        ),
        Heatmap(
            "Sizes of runs",
            "How many runs had how many sessions.",
            [buckets("conveyor_batch_rows", MODEL)],
        ),
        Graph(
            "State in memory",
            "State of sessions, and what there is room for: the slab is made when the model is loaded.",
            [
                Query(
                    f"sum by (model, instance) (conveyor_state_resident_bytes{{{MODEL}}})",
                    "held: {{model}} on {{instance}}",
                ),
                Query(
                    f"sum by (model, instance) (conveyor_state_slab_bytes{{{MODEL}}})",
                    "room: {{model}} on {{instance}}",
                ),
            ],
            unit="bytes",
            runbook="ConveyorSessionsNearLimit",
            width=12,
        ),
    ],
)

DASHBOARD = Dashboard(
    "models",
    "Conveyor / Models",
    "Which versions are served where, how long their steps wait and run, and how well batches are filled.",
    [VERSIONS, WORK, LATENCY, BATCHES],
)
