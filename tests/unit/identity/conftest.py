"""An access file on the disk, keys that sign, and JWTs by them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from issuer import Signer


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Replaces the access file."""

    def put(text: str) -> Path:
        path = tmp_path / "access.toml"
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)
        return path

    return put


@pytest.fixture(scope="session")
def signer() -> Signer:
    return Signer("k1")


@pytest.fixture
def jwks(tmp_path: Path, signer: Signer) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [signer.public()]}))
    return path


@pytest.fixture
def forge() -> Callable[..., str]:
    """A token with any key and header."""

    def sign(claims: dict[str, Any], key: Any, algorithm: str, **headers: Any) -> str:
        return jwt.encode(claims, key, algorithm=algorithm, headers=headers)

    return sign
