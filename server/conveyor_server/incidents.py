"""Defects: what happened goes to the log under an id, and only the id goes to a caller."""

import logging
import secrets

from conveyor_server.logs import INCIDENT

_log = logging.getLogger("conveyor")


def record(what: str, error: BaseException) -> str:
    """Logs an unexpected error with its traceback and returns the id under which it is found. Any thread."""
    incident = secrets.token_hex(4)
    _log.error("incident %s: %s", incident, what, exc_info=error, extra={INCIDENT: incident})
    return incident
