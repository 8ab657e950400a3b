"""What an asynchronous client returns for something that must be opened first: await it, or enter it."""

from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar


class _Managed(Protocol):
    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


M = TypeVar("M", bound=_Managed)


class Opening(Generic[M]):
    """`s = await client.session(...)`, or `async with client.session(...) as s:`."""

    def __init__(self, open_it: Callable[[], Coroutine[Any, Any, M]]) -> None:
        self._open_it = open_it
        self._opened: M | None = None

    def __await__(self) -> Generator[Any, None, M]:
        return self._open_it().__await__()

    async def __aenter__(self) -> M:
        self._opened = await self
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(kind, error, traceback)
