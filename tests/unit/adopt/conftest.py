"""Proofs with few sessions: what they find does not depend on how many there are."""

import pytest
from conveyor_server.adopt import prove


@pytest.fixture(autouse=True)
def few_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_MOST", 16)
