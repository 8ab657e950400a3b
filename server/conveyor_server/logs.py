"""What the log looks like: a line of JSON for each record, or text for people.

Invariant: in JSON a record is one line, whatever is in it, and its fields are those of docs/telemetry.md. A record
that was made for a traced call names its trace, in either form.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from conveyor_server import tracing

# The attribute of a record under which an incident's id is; see incidents.
INCIDENT = "incident"


class _Format(logging.Formatter):
    """Either form.

    Args:
        worker: index of the worker that logs; None: there is but one process, or it is the supervisor.
    """

    def __init__(self, worker: int | None, form: str | None = None) -> None:
        super().__init__(form)
        self._worker = worker


class TextFormat(_Format):
    """For people: time, level, worker, message, and the trace of the call that it is about."""

    def __init__(self, worker: int | None) -> None:
        who = "" if worker is None else f" worker {worker}:"
        super().__init__(worker, f"%(asctime)s %(levelname)s{who} %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The first line."""
        call = tracing.current()
        return super().formatMessage(record) + ("" if call is None else f" (trace {call.trace_id})")


class JsonFormat(_Format):
    """For programs: one object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._worker is not None:
            fields["worker"] = self._worker
        call = tracing.current()
        if call is not None:
            fields |= {"trace_id": call.trace_id, "span_id": call.span_id}
        incident = getattr(record, INCIDENT, None)
        if incident is not None:
            fields["incident"] = incident
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(fields, ensure_ascii=False)


def is_json(log_format: str, stream: TextIO) -> bool:
    """What `auto` means: text where a person reads it, which is a terminal, and JSON elsewhere."""
    return log_format == "json" or (log_format == "auto" and not stream.isatty())


def configure(log_format: str, level: str, worker: int | None = None, stream: TextIO | None = None) -> None:
    """Everything that this process logs goes to the stream from now on, in that form.

    Args:
        log_format: auto, json or text.
        level: debug, info, warning or error.
        worker: index of the worker that this is, if it is one.
        stream: None: standard error.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormat(worker) if is_json(log_format, stream) else TextFormat(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def speaks_json() -> bool:
    """What this process logs is JSON: it was configured so."""
    return any(isinstance(handler.formatter, JsonFormat) for handler in logging.getLogger().handlers)
