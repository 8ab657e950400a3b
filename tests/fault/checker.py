"""Judges what clients were handed: every answer that an undisturbed run gives, each once, in order, to the bit.

It knows logs, and nothing of who wrote them. A log is a file of JSON objects, one a line:

    {"session": "s-1", "answer": 3, "input": "<digest>", "output": "<hex>", "at": 12.5}   the third answer, and when
    {"session": "s-1", "trouble": "why", "at": 12.6}                                     what must not be
    {"session": "s-1", "note": "...", "at": 12.7}                                        of no account

`expected.jsonl` has the first form without `at`; `client-*.jsonl` are what the clients wrote, on one clock.

    python -m tests.fault.checker FOLDER
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

EXPECTED, CLIENTS = "expected.jsonl", "client-*.jsonl"
# Told of one session, and in all; the rest is counted.
_MOST_EACH, _MOST = 3, 20
_WORD = 8

Line: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one session.

    Attributes:
        number: which, from 1.
        given: names the input that it is the answer to.
        output: its bytes in hex.
        where: for people: file and line.
    """

    number: int
    given: str
    output: str
    where: str = ""


@dataclass(slots=True)
class Verdict:
    """What the logs say.

    Attributes:
        sessions: that were expected.
        answers: that were handed out.
        problems: in words; empty: all is as it should be.
        kinds: how many there are of each kind of problem, also of those that are not told.
    """

    sessions: int = 0
    answers: int = 0
    problems: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        """Nothing is wrong."""
        return not self.kinds

    def __str__(self) -> str:
        """The verdict in words."""
        what = f"{self.answers} answers to {self.sessions} sessions"
        if self.good:
            return f"good: {what}, each once, in order, bit-equal"
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        told, total = self.problems[:_MOST], sum(self.kinds.values())
        rest = [f"and {total - len(told)} more"] if total > len(told) else []
        return "\n  ".join([f"BAD: {what}: {counted}", *told, *rest])


def judge(expected: Mapping[str, Sequence[Answer]], got: Mapping[str, Sequence[Answer]]) -> Verdict:
    """Compares sessions' answers, in the order in which they were handed out."""
    verdict = Verdict(len(expected), sum(map(len, got.values())))
    for session, answers in got.items():
        if session not in expected:
            _say(verdict, "of nobody", [f"session {session}: {len(answers)} answers, and nobody was to have any"])
    for session, wanted in expected.items():
        _judge_session(verdict, session, wanted, got.get(session, ()))
    return verdict


def judge_folder(folder: Path) -> Verdict:
    """Judges the logs of a folder; a line that is no JSON is a problem, and so is trouble that a client had."""
    expected = by_session(read(folder / EXPECTED))
    logs = [line for path in sorted(folder.glob(CLIENTS)) for line in read(path)]
    # One clock: what was handed out first is first, whoever it was handed to. The sort is stable.
    logs.sort(key=lambda line: float(line.get("at", 0.0)))
    verdict = judge(expected, by_session(logs))
    troubles: dict[str, list[str]] = {}
    for line in logs:
        if "trouble" in line:
            session = str(line.get("session", "?"))
            troubles.setdefault(session, []).append(f"session {session}: {line['trouble']} ({line['where']})")
    for told in troubles.values():
        _say(verdict, "troubles", told)
    if not expected:
        _say(verdict, "without answers", ["nothing was expected: that proves nothing"])
    return verdict


def by_session(lines: Iterable[Line]) -> dict[str, list[Answer]]:
    """The answers among the lines, in their order."""
    sessions: dict[str, list[Answer]] = {}
    for line in lines:
        if "answer" in line:
            answer = Answer(int(line["answer"]), str(line["input"]), str(line["output"]), str(line.get("where", "")))
            sessions.setdefault(str(line["session"]), []).append(answer)
    return sessions


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, each with where it is; a line that is torn is trouble."""
    with path.open(encoding="utf-8", errors="replace") as source:
        for number, text in enumerate(source, 1):
            where = f"{path.name}:{number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = {"trouble": f"the line is no JSON: {text[:60]!r}"}
            if not isinstance(line, dict):
                line = {"trouble": f"the line is no object: {text[:60]!r}"}
            yield {**line, "where": where}


def _judge_session(verdict: Verdict, session: str, wanted: Sequence[Answer], got: Sequence[Answer]) -> None:
    repeated: list[str] = []
    disordered: list[str] = []
    strange: list[str] = []
    other: list[str] = []
    seen: dict[int, Answer] = {}
    last = 0
    for answer in got:
        name = f"session {session}: answer {answer.number} ({answer.where})"
        if answer.number in seen:
            repeated.append(f"{name} was handed out before ({seen[answer.number].where})")
            continue
        seen[answer.number] = answer
        if answer.number < last:
            disordered.append(f"{name} came after answer {last}")
        last = max(last, answer.number)
        if not 1 <= answer.number <= len(wanted):
            strange.append(f"{name} is none of the {len(wanted)} that were expected")
            continue
        right = wanted[answer.number - 1]
        if answer.given != right.given:
            strange.append(f"{name} is to input {answer.given}, and not to {right.given}")
        elif answer.output != right.output:
            other.append(f"{name} has other bits: {_difference(right.output, answer.output)}")
    missing = [f"session {session}: answer {right.number} never came" for right in wanted if right.number not in seen]
    for kind, told in (
        ("repeated", repeated),
        ("out of order", disordered),
        ("unexpected", strange),
        ("of other bits", other),
        ("missing", missing),
    ):
        _say(verdict, kind, told)


def _difference(right: str, got: str) -> str:
    """Where two answers part, in words of four bytes."""
    if len(right) != len(got):
        return f"{len(got) // 2} bytes, and not {len(right) // 2}"
    starts = range(0, len(right), _WORD)
    different = [start for start in starts if right[start : start + _WORD] != got[start : start + _WORD]]
    first = different[0]
    return (
        f"{len(different)} of {len(starts)} words; word {first // _WORD} is {got[first : first + _WORD]}, and not "
        f"{right[first : first + _WORD]}"
    )


def _say(verdict: Verdict, kind: str, told: Sequence[str]) -> None:
    """Counts problems of a session, and tells the first."""
    if told:
        verdict.kinds[kind] += len(told)
        verdict.problems += told[:_MOST_EACH]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judges a folder; the exit status is 0 where all is well, and 1 where it is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.checker", description="Judges the logs of a folder.")
    parser.add_argument("folder", type=Path, help=f"has {EXPECTED} and {CLIENTS}")
    verdict = judge_folder(parser.parse_args(arguments).folder)
    print(verdict)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
