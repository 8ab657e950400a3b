"""What the log looks like: every record a line of JSON, or a line for people."""

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from conveyor_server import incidents, logs, tracing
from conveyor_server.logs import JsonFormat, TextFormat


@dataclass
class Call:
    """A call in a trace."""

    trace_id: str = "0af7651916cd43dd8448eb211c80319c"
    span_id: str = "b7ad6b7169203331"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., logging.Logger]]:
    """Configures logging as a process that begins does, and gives the logger of the server."""
    root = logging.getLogger()
    before = root.level

    def said(stream: io.StringIO, log_format: str, worker: int | None = None) -> logging.Logger:
        monkeypatch.setattr(root, "handlers", [])
        logs.configure(log_format, "info", worker, stream)
        return logging.getLogger("conveyor")

    yield said
    root.setLevel(before)


def test_a_record_is_one_object_on_one_line(said) -> None:
    stream = io.StringIO()
    log = said(stream, "json")
    log.info("serving %s\n%s", "a", 'line "two" ü')
    log.debug("not wanted")
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", fields.pop("time"))
    assert fields == {"level": "INFO", "logger": "conveyor", "message": 'serving a\nline "two" ü'}


def test_the_time_is_utc(said) -> None:
    record = logging.LogRecord("conveyor", logging.INFO, "", 0, "x", (), None)
    record.created = 1_700_000_000.25
    assert json.loads(JsonFormat(None).format(record))["time"] == "2023-11-14T22:13:20.250000Z"


def test_a_worker_says_which_it_is(said) -> None:
    stream = io.StringIO()
    said(stream, "json", worker=0).warning("x")
    assert json.loads(stream.getvalue())["worker"] == 0
    text = io.StringIO()
    said(text, "text", worker=3).warning("x")
    assert re.fullmatch(r"[\d\-]+ [\d:,]+ WARNING worker 3: x\n", text.getvalue())


def test_a_defect_is_found_under_its_incident(said) -> None:
    stream = io.StringIO()
    said(stream, "json")
    try:
        int("what went wrong")
    except ValueError as error:
        incident = incidents.record("a call failed", error)
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields["incident"] == incident
    assert fields["message"] == f"incident {incident}: a call failed"
    assert fields["exception"].startswith("Traceback (most recent call last)")
    assert fields["exception"].endswith("'what went wrong'")


def test_what_a_call_has_to_do_with_names_its_trace(said) -> None:
    stream, text = io.StringIO(), io.StringIO()
    log = said(stream, "json")
    with tracing.within(Call()):
        log.info("within")
    log.info("outside")
    within, outside = map(json.loads, stream.getvalue().splitlines())
    assert (within["trace_id"], within["span_id"]) == (Call.trace_id, Call.span_id)
    assert not {"trace_id", "span_id"} & outside.keys()
    said(text, "text")
    with tracing.within(Call()):
        log.info("within")
    assert text.getvalue().endswith(f"INFO within (trace {Call.trace_id})\n")


@pytest.mark.parametrize(
    ("log_format", "stream", "form"),
    [
        ("auto", Terminal(), TextFormat),
        ("auto", io.StringIO(), JsonFormat),
        ("json", Terminal(), JsonFormat),
        ("text", io.StringIO(), TextFormat),
    ],
)
def test_auto_is_for_whoever_reads(said, log_format, stream, form) -> None:
    said(stream, log_format)
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler.formatter, form)
    assert logs.speaks_json() == (form is JsonFormat)


def test_a_stack_is_in_its_record(said) -> None:
    stream = io.StringIO()
    said(stream, "json").info("x", stack_info=True)
    assert sys._getframe().f_code.co_name in json.loads(stream.getvalue())["stack"]
