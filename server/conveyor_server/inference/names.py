"""What a sequence's session is called."""

import hashlib
import re

_MOST_ID = 128
_PLAIN = re.compile(r"[A-Za-z0-9._-]*")


def session_id(model: str, sequence: int | str) -> str:
    """The name of a sequence's session: `MODEL:42`, `MODEL:s:NAME`; what a name may not hold is written `:HEX`."""
    kind, text = ("s:", sequence) if isinstance(sequence, str) else ("", str(sequence))
    if not _PLAIN.fullmatch(text):
        text = "".join(char if _PLAIN.fullmatch(char) else f":{char.encode().hex()}" for char in text)
    name = f"{model}:{kind}{text}"
    if len(name) <= _MOST_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: _MOST_ID - 33]}:{digest}"
