"""docs/protocol.md's table of errors says what errors.proto and the code say."""

import re
from pathlib import Path

from conveyor_proto.reasons import CODES
from conveyor_proto.v1 import errors_pb2 as e
from google.rpc import code_pb2

ROOT = Path(__file__).parents[3]
PREFIX = "ERROR_REASON_"


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Reason -> code and metadata keys, from the table."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| (.*?) \| .+? \|$", text, re.MULTILINE)
    return {name: (code, frozenset(re.findall(r"`(\w+)`", keys))) for name, code, keys in rows}


def contracted() -> dict[str, tuple[str, frozenset[str]]]:
    """Reason -> code and metadata keys, from the comments of errors.proto."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    code, keys = "", frozenset[str]()
    for line in (ROOT / "proto" / "conveyor" / "v1" / "errors.proto").read_text().splitlines():
        if comment := re.match(r"\s*// ([A-Z_]{2,})( with RetryInfo)?\. ?(?:metadata: (.*?)\.)?", line):
            code = comment[1]
            keys = frozenset(re.findall(r"\b(?!and\b)[a-z_]+\b", comment[3] or ""))
        if value := re.match(rf"\s*{PREFIX}(\w+) = [1-9]", line):
            found[value[1]] = (code, keys)
    return found


def test_every_reason_is_documented_once_with_its_code() -> None:
    codes = {
        e.ErrorReason.Name(reason).removeprefix(PREFIX): code_pb2.Code.Name(code) for reason, code in CODES.items()
    }
    assert {name: code for name, (code, _) in documented().items()} == codes
    assert {name: code for name, (code, _) in contracted().items()} == codes


def test_metadata_is_what_the_contract_names() -> None:
    contract = contracted()
    for name, (_, keys) in documented().items():
        if name.startswith("INPUT_"):
            # One comment is over all of them; not every reason has every key.
            assert "input" in keys
        else:
            assert keys == contract[name][1], name
