"""How long sessions waited for their next answer that were on a replica when it was killed, ended or frozen.

Told by the logs alone: of whoever did it, who asked the replica whose streams end there, and of the clients. A session
that was pausing asked nothing, and is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fault.checker import CLIENTS, read
from tests.fault.script import IDLE_S


@dataclass(frozen=True, slots=True)
class Resume:
    """One session after one fault, in seconds.

    Attributes:
        after_s: from the fault to the session's next answer, the app's own pause before its step included.
        waited_s: of it, what the app waited for the answer, from the fault on.
    """

    after_s: float
    waited_s: float


def resumes(folder: Path, faults: Sequence[Mapping[str, Any]], kind: str) -> list[Resume]:
    """All sessions that were on a replica when a fault of that kind struck it."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob(CLIENTS)):
        for line in read(path):
            if "session" in line:
                lines.setdefault(str(line["session"]), []).append(line)
    for told in lines.values():
        told.sort(key=lambda line: float(line["at"]))
    struck = [fault for fault in faults if fault["fault"] == kind]
    return [found for fault in struck for session in fault["held"] for found in _next(lines.get(session, ()), fault)]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies; NaN where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _next(lines: Sequence[Mapping[str, Any]], fault: Mapping[str, Any]) -> Iterator[Resume]:
    at = float(fault["at"])
    for line in lines:
        if float(line["at"]) <= at:
            continue
        if "answer" in line:
            asked_at = float(line["asked_at"])
            if asked_at - at < IDLE_S[0]:
                yield Resume(float(line["at"]) - at, float(line["at"]) - max(asked_at, at))
        return
