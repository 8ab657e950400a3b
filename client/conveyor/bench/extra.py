"""What the load generator needs beyond the SDK comes with an extra; who lacks it is told so in one line."""

import contextlib
from collections.abc import Iterator

from conveyor.bench.spec import LoadError


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """Turns a missing module into LoadError, which names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LoadError(f"{error.name} is not installed: pip install 'conveyor[bench]'") from None
