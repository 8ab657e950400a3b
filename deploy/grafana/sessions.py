"""The sessions: how many there are and where, how they come and go, and what clients are told of them."""

from deploy.grafana.dashboard import MODEL, SERVER, Dashboard, Row
from deploy.grafana.panel import OBJECTIVE, Graph, Query, Stat, rate

_SERVER = "{{instance}}"
_NO_ROOM = f'{SERVER}, reason="SESSIONS_EXHAUSTED"'
_LOST = "SESSION_NOT_FOUND|SESSION_EXPIRED|SESSION_CLOSED|SESSION_TAKEN_OVER|STEP_GAP|STEP_CONFLICT|STEP_ANSWER_EVICTED"

NOW = Row(
    "Now",
    [
        Stat(
            "In memory",
            "Sessions that live on the chosen servers.",
            [Query(f"sum(conveyor_sessions_active{{{MODEL}}})", "sessions")],
        ),
        Stat(
            "Of what there is room for",
            "On the fullest server. With a store, idle sessions make room by themselves.",
            [Query(f"max(conveyor:sessions:fill{{{SERVER}}})", "fill")],
            unit="percentunit",
            runbook="ConveyorSessionsNearLimit",
            warn=0.8,
            bad=0.95,
        ),
        Stat(
            "Asleep",
            "Sessions that streams hold and whose state is in the store alone.",
            [Query(f"sum(conveyor_sessions_asleep{{{SERVER}}})", "asleep")],
        ),
        Stat(
            "Opened a second",
            "Sessions created, forked or restored.",
            [Query(f"sum({rate('conveyor_sessions_opened_total', SERVER)})", "opened")],
            unit="reqps",
        ),
        Stat(
            "Streams",
            "Open Stream calls; each carries any number of sessions.",
            [Query(f"sum(conveyor_streams_active{{{SERVER}}})", "streams")],
        ),
        Stat(
            "Refused a second",
            "New sessions for which there was no room.",
            [Query(f"sum({rate('conveyor_errors_total', _NO_ROOM)})", "refused")],
            unit="reqps",
            runbook="ConveyorSessionsRefused",
            warn=0.001,
            bad=0.1,
        ),
    ],
)

WHERE = Row(
    "How many, and where",
    [
        Graph(
            "In memory, by model",
            "Sessions that live on the chosen servers.",
            [Query(f"sum by (model) (conveyor_sessions_active{{{MODEL}}})", "{{model}}")],
            stacked=True,
        ),
        Graph(
            "In memory, of what there is room for",
            "Share of --max-sessions. At 1 a server without a store refuses new ones.",
            [
                Query(f"conveyor:sessions:fill{{{SERVER}}}", _SERVER),
                Query("conveyor:sessions_fill:objective", OBJECTIVE),
            ],
            unit="percentunit",
            runbook="ConveyorSessionsNearLimit",
        ),
        Graph(
            "Room",
            "Sessions that each server may have in memory, and those that it has.",
            [
                Query(f"conveyor_sessions_limit{{{SERVER}}}", "room: {{instance}}"),
                Query(f"sum by (instance) (conveyor_sessions_active{{{SERVER}}})", "held: {{instance}}"),
            ],
            runbook="ConveyorSessionsNearLimit",
        ),
        Graph(
            "Asleep",
            "Sessions that streams hold and whose state is in the store alone: they come back with their next step.",
            [Query(f"conveyor_sessions_asleep{{{SERVER}}}", _SERVER)],
            runbook="ConveyorSessionsThrash",
        ),
        Graph(
            "State in memory",
            "State of all sessions of a model.",
            [Query(f"sum by (model) (conveyor_state_resident_bytes{{{MODEL}}})", "{{model}}")],
            unit="bytes",
            stacked=True,
        ),
        Graph(
            "Streams",
            "Open Stream calls.",
            [Query(f"conveyor_streams_active{{{SERVER}}}", _SERVER)],
        ),
    ],
)

COMING_AND_GOING = Row(
    "How they come and go",
    [
        Graph(
            "Opened a second",
            "Sessions created, forked or restored.",
            [Query(rate("conveyor_sessions_opened_total", SERVER), _SERVER)],
            unit="reqps",
        ),
        Graph(
            "Gone a second, by cause",
            "closed was asked for, expired was idle for too long, taken_over lives on another server.",
            [Query(f"sum by (cause) ({rate('conveyor_sessions_closed_total', SERVER)})", "{{cause}}")],
            unit="reqps",
            stacked=True,
        ),
        Graph(
            "Replays a second",
            "Answers given from the record: clients came back after a cut and sent again what was not answered.",
            [Query(f"sum by (instance) ({rate('conveyor_replayed_steps_total', MODEL)})", _SERVER)],
            unit="reqps",
        ),
        Graph(
            "Into the store and out of it, a minute",
            "Both high: more sessions are in use at a time than fit in memory.",
            [
                Query(f"60 * {rate('conveyor_sessions_passivated_total', SERVER)}", "into: {{instance}}"),
                Query(f"60 * {rate('conveyor_sessions_taken_total', SERVER)}", "out of: {{instance}}"),
            ],
            runbook="ConveyorSessionsThrash",
        ),
        Graph(
            "Lost to other servers, a minute",
            "Sessions that turned out to be another server's. Some after a fault are right; many for long mean that "
            "nothing keeps a session on its server.",
            [
                Query(f"60 * {rate('conveyor_sessions_fenced_total', SERVER)}", _SERVER),
                Query("conveyor:sessions_fenced:objective", OBJECTIVE),
            ],
            runbook="ConveyorSessionsFenced",
        ),
        Graph(
            "Expired in the store, a minute",
            "Records that nobody has used for so long that they were removed.",
            [Query(f"60 * {rate('conveyor_sessions_swept_total', SERVER)}", _SERVER)],
        ),
    ],
)

TOLD = Row(
    "What clients are told",
    [
        Graph(
            "Of their sessions, in 15 minutes",
            "SESSION_NOT_FOUND and STEP_GAP are sessions, or steps of them, that are not there any more.",
            [
                Query(
                    f'sum by (reason) (increase(conveyor_errors_total{{{SERVER}, reason=~"{_LOST}"}}[15m]))',
                    "{{reason}}",
                ),
                Query("conveyor:sessions_lost:objective", OBJECTIVE),
            ],
            runbook="ConveyorSessionsLost",
            width=12,
        ),
        Graph(
            "No room, a second",
            "New sessions that were refused, SESSIONS_EXHAUSTED.",
            [Query(rate("conveyor_errors_total", _NO_ROOM), _SERVER)],
            unit="reqps",
            runbook="ConveyorSessionsRefused",
            width=12,
        ),
    ],
)

DASHBOARD = Dashboard(
    "sessions",
    "Conveyor / Sessions",
    "How many sessions there are and where, how they come and go, and which were lost.",
    [NOW, WHERE, COMING_AND_GOING, TOLD],
)
