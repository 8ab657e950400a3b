"""The checker sees everything that can be wrong with a log, and calls it by its name; what is right it lets pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.fault.checker import EXPECTED, Verdict, judge_folder, main

Line: TypeAlias = dict[str, Any]
Judge: TypeAlias = Callable[..., Verdict]


def answer(session: str, number: int, *, output: str = "", given: str = "", at: float | None = None) -> Line:
    line = {"session": session, "answer": number, "input": given or f"x{number}", "output": output or f"{number:016x}"}
    return line if at is None else line | {"at": at}


@pytest.fixture
def judged(tmp_path: Path) -> Judge:
    """The verdict on the logs of clients, where two sessions were to have five answers each."""

    def judge(*logs: list[Line | str]) -> Verdict:
        expected: list[Line | str] = [answer(session, number) for session in ("a", "b") for number in range(1, 6)]
        files = {EXPECTED: expected} | {f"client-{index}.jsonl": log for index, log in enumerate(logs)}
        for name, lines in files.items():
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            (tmp_path / name).write_text("".join(f"{text}\n" for text in texts))
        return judge_folder(tmp_path)

    return judge


def right() -> list[Line]:
    """A log with which nothing is wrong: the sessions take turns."""
    return [answer(session, number, at=number + 0.1) for number in range(1, 6) for session in ("a", "b")]


def test_what_is_right_is_good(judged: Judge) -> None:
    verdict = judged(right())
    assert verdict.good
    assert str(verdict) == "good: 10 answers to 2 sessions, each once, in order, bit-equal"


def test_a_session_may_go_on_in_another_log(judged: Judge) -> None:
    lines = right()
    assert judged([line for line in lines if line["at"] > 3], [line for line in lines if line["at"] < 3]).good


def test_notes_are_of_no_account(judged: Judge) -> None:
    assert judged([*right(), {"session": "a", "note": "pauses", "at": 9.0}]).good


def test_an_answer_that_never_came(judged: Judge) -> None:
    lines = right()
    lines.remove(answer("a", 3, at=3.1))
    verdict = judged(lines)
    assert verdict.kinds == {"missing": 1}
    assert verdict.problems == ["session a: answer 3 never came"]


def test_a_session_of_which_nobody_heard(judged: Judge) -> None:
    verdict = judged([line for line in right() if line["session"] == "a"])
    assert verdict.kinds == {"missing": 5}


def test_an_answer_that_came_twice(judged: Judge) -> None:
    verdict = judged([*right(), answer("b", 4, at=7.0)])
    assert verdict.kinds == {"repeated": 1}
    assert verdict.problems == ["session b: answer 4 (client-0.jsonl:11) was handed out before (client-0.jsonl:8)"]


def test_an_answer_that_two_clients_got(judged: Judge) -> None:
    assert judged(right(), [answer("b", 5, at=7.0)]).kinds == {"repeated": 1}


def test_answers_that_changed_places(judged: Judge) -> None:
    lines = [line for line in right() if line["session"] == "a"]
    others = [line for line in right() if line["session"] == "b"]
    lines[1]["at"], lines[2]["at"] = lines[2]["at"], lines[1]["at"]
    verdict = judged(lines + others)
    assert verdict.kinds == {"out of order": 1}
    assert verdict.problems == ["session a: answer 2 (client-0.jsonl:2) came after answer 3"]


def test_one_bit_that_is_another(judged: Judge) -> None:
    lines = right()
    lines[4] = answer("a", 3, output="0000000100000003", at=3.1)
    verdict = judged(lines)
    assert verdict.kinds == {"of other bits": 1}
    assert verdict.problems == [
        "session a: answer 3 (client-0.jsonl:5) has other bits: 1 of 2 words; word 0 is 00000001, and not 00000000"
    ]


def test_an_answer_of_another_size(judged: Judge) -> None:
    lines = right()
    lines[4] = answer("a", 3, output="03", at=3.1)
    assert "1 bytes, and not 8" in judged(lines).problems[0]


def test_an_answer_to_another_input(judged: Judge) -> None:
    lines = right()
    lines[4] = answer("a", 3, given="x4", at=3.1)
    assert judged(lines).kinds == {"unexpected": 1}


def test_one_answer_too_many(judged: Judge) -> None:
    assert judged([*right(), answer("a", 6, at=7.0)]).kinds == {"unexpected": 1}


def test_a_session_that_nobody_expects(judged: Judge) -> None:
    assert judged([*right(), answer("c", 1, at=7.0)]).kinds == {"of nobody": 1}


def test_a_client_that_had_trouble(judged: Judge) -> None:
    verdict = judged([*right(), {"session": "b", "trouble": "it said no", "at": 7.0}])
    assert verdict.kinds == {"troubles": 1}
    assert verdict.problems == ["session b: it said no (client-0.jsonl:11)"]


@pytest.mark.parametrize("torn", ['{"session": "a", "answ', "[]", "3"])
def test_a_line_that_is_torn(judged: Judge, torn: str) -> None:
    assert judged([*right(), torn]).kinds == {"troubles": 1}


def test_nothing_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / EXPECTED).write_text("")
    assert not judge_folder(tmp_path).good


def test_much_that_is_wrong_is_counted_and_told_in_part(judged: Judge) -> None:
    verdict = judged([])
    assert verdict.kinds == {"missing": 10}
    assert str(verdict).splitlines()[0] == "BAD: 0 answers to 2 sessions: 10 missing"
    assert str(verdict).splitlines()[-1] == "  and 4 more"


@pytest.mark.parametrize(("log", "status"), [(right(), 0), ([], 1)])
def test_the_command_tells_by_its_status(
    judged: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: list[Line], status: int
) -> None:
    verdict = judged(log)
    assert main([str(tmp_path)]) == status
    assert capsys.readouterr().out == f"{verdict}\n"
