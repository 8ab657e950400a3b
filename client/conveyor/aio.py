"""Conveyor for asyncio: the same client, awaited.

    import conveyor.aio

    async with conveyor.aio.connect("localhost:50051") as client:
        async with client.session("charlm") as s:
            y = await s.step(x)
            async for y in s.stream(chunks):
                ...

Everything belongs to the event loop that runs at the first call. Errors are those of `conveyor`.
"""

from collections.abc import Sequence
from typing import Any

from conveyor._client import AsyncClient
from conveyor._io.asynchronous import AsyncIo
from conveyor._io.channel import TLS
from conveyor._opening import Opening
from conveyor._population import AsyncPopulation
from conveyor._session import AsyncSession
from conveyor._settings import Settings, Token

__all__ = ["AsyncClient", "AsyncPopulation", "AsyncSession", "Opening", "connect"]


def connect(
    target: str,
    *,
    tls: TLS | None = None,
    timeout_s: float = 30.0,
    connect_timeout_s: float = 5.0,
    resume_timeout_s: float = 30.0,
    resend_buffer_bytes: int = 8 << 20,
    streams_per_client: int = 1,
    keepalive_s: float | None = 30.0,
    token: Token | None = None,
    metadata: Sequence[tuple[str, str]] = (),
    channel_options: Sequence[tuple[str, Any]] = (),
) -> AsyncClient:
    """An asynchronous client of the server at `target`; arguments as in `conveyor.connect`."""
    settings = Settings(
        tls=tls,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        resume_timeout_s=resume_timeout_s,
        resend_buffer_bytes=resend_buffer_bytes,
        streams_per_client=streams_per_client,
        keepalive_s=keepalive_s,
        token=token,
        metadata=metadata,
        channel_options=channel_options,
    )
    return AsyncClient(AsyncIo(target, tls, settings.options), settings)
