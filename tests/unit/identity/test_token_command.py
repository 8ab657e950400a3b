"""`conveyor token new`: what it prints goes into the access file, and the token that it tells counts."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from conveyor_server.identity.caller import Role
from conveyor_server.identity.command import command
from conveyor_server.identity.gate import Gate

NEW = ["new", "--name", 'gate "way" \\ 7', "--tenant", "acme", "--role", "infer", "--role", "observe"]


def test_what_is_printed_goes_into_the_access_file(write: Callable[[str], Path], capsys) -> None:
    assert command(NEW) == 0
    told = capsys.readouterr()
    token = told.err.split()[-1]
    assert token not in told.out
    assert len(token) > 40
    gate = Gate(write(told.out))
    caller = gate.admit("/metrics", {"authorization": f"Bearer {token}"}, list).caller
    assert (caller.name, caller.tenant, caller.roles) == ('gate "way" \\ 7', "acme", {Role.INFER, Role.OBSERVE})
    assert command(NEW) == 0
    assert capsys.readouterr().err.split()[-1] != token


def test_the_token_can_go_to_a_file_of_its_owner_alone(write: Callable[[str], Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "token"
    assert command([*NEW, "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    gate = Gate(write(told.out))
    assert gate.admit("/metrics", {"authorization": f"Bearer {out.read_text().strip()}"}, list)
    # What is there may be somebody's.
    assert command([*NEW, "--out", str(out)]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "usage: conveyor token new"),
        (["old"], "usage: conveyor token new"),
        (["new"], "--name"),
        ([*NEW, "--role", "root"], "invalid choice"),
        (["new", "--name", "x", "--tenant", "a/b", "--role", "infer"], "--tenant 'a/b'"),
        (["new", "--name", "a\nb", "--tenant", "a", "--role", "infer"], "--name is one line"),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], why: str, capsys) -> None:
    assert command(arguments) == 2
    told = capsys.readouterr()
    assert why in told.err
    assert told.out == ""
