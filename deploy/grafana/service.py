"""The service as its callers have it: how much they ask for, what fails, how long it takes; and how full it is."""

from deploy.grafana.dashboard import JOB, MODEL, SERVER, Dashboard, Row
from deploy.grafana.panel import OBJECTIVE, Graph, Query, Stat, mean, quantiles, rate

_PLAIN = "{{model}}"
_FAILURES = (
    "OVERLOADED|STEP_TIMEOUT|SESSIONS_EXHAUSTED|MODEL_NOT_READY|STORE_UNAVAILABLE|MODEL_FAILED|RECORD_INVALID|INTERNAL"
)
_FAILED = f'{SERVER}, reason=~"{_FAILURES}"'
_TURNED_AWAY = f'{SERVER}, reason=~"CALLER_UNKNOWN|ROLE_MISSING"'
_REFUSED = f'{SERVER}, reason!~"{_FAILURES}"'

NOW = Row(
    "Now",
    [
        Stat(
            "Servers that answer",
            "Share of the known servers whose metrics Prometheus gets.",
            [Query(f"avg(up{{{SERVER}}})", "up")],
            unit="percentunit",
            runbook="ConveyorDown",
            warn=1,
            bad=0.999,
            low_is_bad=True,
        ),
        Stat(
            "Alerts that fire",
            "Of Conveyor's rules; their marks are in every graph.",
            [Query(f'count(ALERTS{{alertstate="firing", alertname=~"Conveyor.*", {JOB}}}) or vector(0)', "alerts")],
            bad=1,
        ),
        Stat(
            "Steps a second",
            "Steps applied, of all servers and models that are chosen.",
            [Query(f"sum({rate('conveyor_steps_total', MODEL)})", "steps")],
            unit="reqps",
        ),
        Stat(
            "Failures, of what may fail",
            "Failures of the last five minutes over conveyor:failures:objective: 1 uses up in 30 days what 30 days may "
            "have, 14.4 in two days.",
            [Query(f"max(conveyor:failures:ratio_rate5m{{{JOB}}}) / scalar(conveyor:failures:objective)", "burn")],
            runbook="ConveyorFailingFast",
            warn=1,
            bad=14.4,
        ),
        Stat(
            "Wait, of its objective",
            "Of the model that waits longest, the 99th percentile before a run begins over its objective.",
            [
                Query(
                    f"max(conveyor:step_queue_seconds:p99_5m{{{JOB}}} / on (job, model) "
                    f"(conveyor:step_queue_seconds:objective{{{JOB}}}))",
                    "wait",
                )
            ],
            unit="percentunit",
            runbook="ConveyorQueueSlow",
            warn=0.8,
            bad=1,
        ),
        Stat(
            "Sessions in memory",
            "Sessions that live on the chosen servers.",
            [Query(f"sum(conveyor_sessions_active{{{MODEL}}})", "sessions")],
        ),
    ],
)

RATE = Row(
    "Rate",
    [
        Graph(
            "Steps a second",
            "Steps applied. A chunk is one step.",
            [Query(f"sum by (model) ({rate('conveyor_steps_total', MODEL)})", _PLAIN)],
            unit="reqps",
            width=12,
            stacked=True,
        ),
        Graph(
            "Time steps a second",
            "Time steps applied: tokens, where a time step is one.",
            [Query(f"sum by (model) ({rate('conveyor_time_steps_total', MODEL)})", _PLAIN)],
            unit="short",
            width=12,
            stacked=True,
        ),
    ],
)

ERRORS = Row(
    "Errors",
    [
        Graph(
            "Failures, as a share of all that was asked for",
            "Refusals whose reason is the service's. Mistakes of callers and a drain's refusals are not in it. The "
            "objective is what may fail; an alert comes at 14.4 times that for an hour, and at 6 times for six.",
            [
                Query(f"conveyor:failures:ratio_rate5m{{{JOB}}}", "5 minutes {{job}}"),
                Query(f"conveyor:failures:ratio_rate1h{{{JOB}}}", "1 hour {{job}}"),
                Query("conveyor:failures:objective", OBJECTIVE),
            ],
            unit="percentunit",
            runbook="ConveyorFailingFast",
        ),
        Graph(
            "Failures by reason",
            "What the service refuses for reasons of its own, each with its runbook.",
            [
                Query(
                    f"sum by (reason) ({rate('conveyor_errors_total', _FAILED)})",
                    "{{reason}}",
                )
            ],
            unit="reqps",
            runbook="ConveyorFailingSlow",
            stacked=True,
        ),
        Graph(
            "Other refusals by reason",
            "What callers get wrong, and what a drain sends elsewhere. A rise after a client's release is its own.",
            [
                Query(
                    f"sum by (reason) ({rate('conveyor_errors_total', _REFUSED)}) > 0",
                    "{{reason}}",
                )
            ],
            unit="reqps",
            stacked=True,
        ),
    ],
)

DURATION = Row(
    "Duration: a step waits, runs and is answered",
    [
        Graph(
            "Wait before the run",
            "From a step's acceptance to its first run. It grows first where there is too much to do.",
            [
                *quantiles("conveyor_step_queue_seconds", MODEL, "model", _PLAIN),
                Query(f"conveyor:step_queue_seconds:objective{{{JOB}}}", f"{OBJECTIVE} {_PLAIN}"),
            ],
            unit="s",
            runbook="ConveyorQueueSlow",
        ),
        Graph(
            "Run",
            "From a step's first run to the end of its last: the model's own time.",
            [
                *quantiles("conveyor_step_run_seconds", MODEL, "model", _PLAIN),
                Query(f"conveyor:step_run_seconds:objective{{{JOB}}}", f"{OBJECTIVE} {_PLAIN}"),
            ],
            unit="s",
            runbook="ConveyorRunSlow",
        ),
        Graph(
            "Answer",
            "From a step's last run until its answer was handed to the transport.",
            quantiles("conveyor_step_reply_seconds", MODEL, "model", _PLAIN),
            unit="s",
        ),
    ],
)

SATURATION = Row(
    "Saturation",
    [
        Graph(
            "Time that a model runs",
            "Seconds of runs in each second: at 1, a model is busy all the time, and what comes more has to wait.",
            [
                Query(
                    f"sum by (instance, model) ({rate('conveyor_batch_run_seconds_sum', MODEL)})",
                    "{{model}} on {{instance}}",
                )
            ],
            unit="percentunit",
            runbook="ConveyorOverloaded",
        ),
        Graph(
            "CPU",
            "Cores in use. A server uses about one, and more where runs have threads of their own.",
            [Query(rate("process_cpu_seconds_total", SERVER), "{{instance}}")],
            unit="short",
            runbook="ConveyorCoreSlow",
        ),
        Graph(
            "Time to get the metrics",
            "The core thread gives them between two turns: near its own delay for every step.",
            [
                Query(f"scrape_duration_seconds{{{SERVER}}}", "{{instance}}"),
                Query("conveyor:core_delay_seconds:objective", OBJECTIVE),
            ],
            unit="s",
            runbook="ConveyorCoreSlow",
        ),
        Graph(
            "Steps that wait for a run",
            "Accepted, and in no run yet.",
            [Query(f"sum by (instance, model) (conveyor_steps_ready{{{MODEL}}})", "{{model}} on {{instance}}")],
            runbook="ConveyorModelStalled",
        ),
        Graph(
            "Memory",
            "Resident memory of each process.",
            [Query(f"process_resident_memory_bytes{{{SERVER}}}", "{{instance}}")],
            unit="bytes",
        ),
        Graph(
            "Open files, of those allowed",
            "Each connection is one. An alert comes at 80 %.",
            [Query(f"process_open_fds{{{SERVER}}} / process_max_fds", "{{instance}}")],
            unit="percentunit",
            runbook="ConveyorFilesNearLimit",
            most=1,
        ),
    ],
)

SERVERS = Row(
    "Servers",
    [
        Graph(
            "Up",
            "1 while Prometheus gets a server's metrics.",
            [Query(f"up{{{SERVER}}}", "{{instance}}")],
            runbook="ConveyorDown",
            most=1,
        ),
        Graph(
            "Draining",
            "1 from SIGTERM on: a deploy, if it is soon over.",
            [Query(f"conveyor_draining{{{SERVER}}}", "{{instance}}")],
            runbook="ConveyorDrainStuck",
            most=1,
        ),
        Graph(
            "Time since the start",
            "A line that falls to zero is a restart.",
            [Query(f"time() - process_start_time_seconds{{{SERVER}}}", "{{instance}}")],
            unit="s",
            runbook="ConveyorRestarting",
        ),
        Graph(
            "Builds",
            "How many servers run which build. Two lines for long are a deploy that was not finished.",
            [
                Query(
                    f"count by (version, runtime, python) (conveyor_build_info{{{SERVER}}})",
                    "conveyor {{version}}, {{runtime}}, Python {{python}}",
                )
            ],
            runbook="ConveyorBuildsDiffer",
            stacked=True,
        ),
        Graph(
            "Days that a certificate is valid",
            "Of servers with TLS.",
            [
                Query(f"(conveyor_certificate_expiry_timestamp_seconds{{{SERVER}}} - time()) / 86400", "{{instance}}"),
                Query("conveyor:certificate_seconds:objective / 86400", OBJECTIVE),
            ],
            runbook="ConveyorCertificateExpires",
        ),
        Graph(
            "Calls turned away a second",
            "CALLER_UNKNOWN shows no token or certificate that is known, ROLE_MISSING asks for what it may not.",
            [
                Query(f"sum by (reason) ({rate('conveyor_errors_total', _TURNED_AWAY)})", "{{reason}}"),
                Query("conveyor:callers_turned_away:objective", OBJECTIVE),
            ],
            unit="reqps",
            runbook="ConveyorCallersTurnedAway",
        ),
        Graph(
            "Streams",
            "Open Stream calls.",
            [Query(f"conveyor_streams_active{{{SERVER}}}", "{{instance}}")],
        ),
        Graph(
            "Sessions in one run",
            "In the mean. More share the cost of a run between them.",
            [Query(mean("conveyor_batch_rows", MODEL, "model"), _PLAIN)],
        ),
    ],
)

DASHBOARD = Dashboard(
    "service",
    "Conveyor / Service",
    "Rate, errors and duration of what callers ask for, and how full the servers are. Begin here.",
    [NOW, RATE, ERRORS, DURATION, SATURATION, SERVERS],
)
