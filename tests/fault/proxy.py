"""TCP links on loopback that can be cut, slowed and stalled at any moment.

Invariant: bytes that are handed on are the bytes that came, in their order; a fault delays them or ends the connection.
The links run on an event loop in a thread of their own; every public method is called from another.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")
_CALL_S = 10.0
_CHUNK_BYTES = 1 << 16
# Chunks that may wait for their time on one way of one connection: then nothing more is read from it.
_MOST_WAITING = 256
# Of SO_LINGER: closing resets.
_AT_ONCE = struct.pack("ii", 1, 0)


class Link:
    """One port, and where it leads. Made by `FaultProxy.link`.

    Attributes:
        name: for the log.
        port: where it listens.
        cuts: connections that were cut.
    """

    def __init__(self, proxy: "FaultProxy", name: str, upstream_port: int) -> None:
        self.name = name
        self.port = 0
        self.cuts = 0
        self._proxy = proxy
        self._upstream_port = upstream_port
        self._delay_s = 0.0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._pairs)

    def cut(self, share: float = 1.0, chance: random.Random | None = None) -> int:
        """Resets connections, whatever is on its way: all, or a share of them, at least one. Returns how many."""
        return self._proxy.call(lambda: self._cut(share, chance or random.Random()))

    def slow(self, delay_s: float) -> None:
        """Delays every byte from now on, each way; 0 ends it."""
        self._proxy.call(lambda: setattr(self, "_delay_s", delay_s))

    def stall(self) -> None:
        """Lets nothing pass, and loses nothing, until `flow`."""
        self._proxy.call(self._flowing.clear)

    def flow(self) -> None:
        """Ends `stall`."""
        self._proxy.call(self._flowing.set)

    # ------------------------------------------------------------ on the loop

    async def open(self) -> None:
        """Listens."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Ends everything."""
        if self._server is not None:
            self._server.close()
        self._cut(1.0, random.Random())
        for handler in list(self._handlers):
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    def _cut(self, share: float, chance: random.Random) -> int:
        pairs = list(self._pairs)
        count = min(len(pairs), max(1, round(share * len(pairs))))
        for pair in chance.sample(pairs, count):
            for writer in pair:
                _reset(writer)
        self.cuts += count
        return count

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._handlers.add(task)
            task.add_done_callback(self._handlers.discard)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            _reset(writer)
            return
        pair = (writer, up_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pass_on(reader, up_writer), self._pass_on(up_reader, writer))
        finally:
            self._pairs.discard(pair)
            for end in pair:
                end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way of one connection, to its end."""
        clock = asyncio.get_running_loop().time
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_WAITING)

        async def hand_on() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due_at, data = await waiting.get()
                    await asyncio.sleep(max(0.0, due_at - clock()))
                    await self._flowing.wait()
                    if not data:
                        writer.close()
                        return
                    writer.write(data)
                    await writer.drain()
            # Whoever reads no more is not written to; the other way learns it too.
            _reset(writer)

        async def take_in() -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(_CHUNK_BYTES):
                    await waiting.put((clock() + self._delay_s, data))
            await waiting.put((clock() + self._delay_s, b""))

        taking, handing = asyncio.create_task(take_in()), asyncio.create_task(hand_on())
        try:
            await handing
        finally:
            taking.cancel()
            handing.cancel()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection without a goodbye: whoever is at its other end gets ECONNRESET."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()


class FaultProxy:
    """All links of a test, and the thread that they run in. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._links: list[Link] = []

    def link(self, name: str, upstream_port: int) -> Link:
        """A new link to a port of loopback."""
        link = Link(self, name, upstream_port)
        self._await(link.open())
        self._links.append(link)
        return link

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function on the loop's thread."""

        async def called() -> T:
            return function()

        return self._await(called())

    def __enter__(self) -> Self:
        """Starts the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Closes all links and ends the thread."""
        for link in self._links:
            self._await(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CALL_S)
