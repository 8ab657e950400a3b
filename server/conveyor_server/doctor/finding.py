"""What was found: how good it is, what it is, and what to do about it.

Invariant: whatever is not good says what to do.
"""

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How good it is; the worst of all findings is the exit status."""

    GOOD = 0
    # It serves, and less well or less safely than was probably meant.
    WARNING = 1
    # It does not start, or does not serve what it should.
    BAD = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: how good it is.
        what: a sentence, without secrets.
        fix: what to do; empty where it is good.
    """

    level: Level
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Refuses what says nothing."""
        if (self.level is Level.GOOD) == bool(self.fix):
            raise ValueError(f"{self.what!r}: what is not good, and only that, says what to do")


def good(what: str) -> Finding:
    """Nothing is to be done."""
    return Finding(Level.GOOD, what)


def warning(what: str, fix: str) -> Finding:
    """It serves, and less well than it could."""
    return Finding(Level.WARNING, what, fix)


def bad(what: str, fix: str) -> Finding:
    """It does not serve."""
    return Finding(Level.BAD, what, fix)
