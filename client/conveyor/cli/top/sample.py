"""What one server says at one moment, and how it is asked: its gRPC services, and its metrics page.

Invariant: a server, or a part of one, that does not answer is said to be away, with the reason; the others are read all
the same.
"""

import argparse
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

from conveyor_proto.v1 import session_pb2 as pb
from google.protobuf import wrappers_pb2

import conveyor
from conveyor import _calls
from conveyor._io.base import drive
from conveyor.cli import commands
from conveyor.cli.top.page import Page

T = TypeVar("T")
# grpc.health.v1 has one field in each message; these have the same on the wire, and the SDK needs no package for them.
_HEALTH = _calls.Method("Check", wrappers_pb2.Int32Value, "Health", "grpc.health.v1")
_SERVING = {1: "serving", 2: "not serving"}
# Of a page that is none, at most.
_SAID_BYTES = 300
# One page of ListSessions, at most.
SESSIONS = 1000


@dataclass(frozen=True, slots=True)
class Server:
    """Where one is asked.

    Attributes:
        target: of its gRPC services; "": they are not asked.
        metrics: HOST:PORT of its metrics page; "": it is not read.
    """

    target: str
    metrics: str

    @property
    def name(self) -> str:
        """What people call it."""
        return self.target or self.metrics


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server says at one moment.

    Attributes:
        server: which.
        at_s: when, by a clock that only runs forward.
        now: when, in UTC.
        health: `serving`, `not serving`, `away`, or "" where only its page was asked, and is there.
        page: its metrics; None: there are none.
        models: its model versions.
        sessions: SESSIONS of them, at most.
        all_sessions: how many it has.
        troubles: a sentence about each thing that was not to be had.
    """

    server: Server
    at_s: float
    now: datetime
    health: str = ""
    page: Page | None = None
    models: Sequence[conveyor.Model] = ()
    sessions: Sequence[conveyor.SessionInfo] = ()
    all_sessions: int = 0
    troubles: Sequence[str] = ()


class Reader(AbstractContextManager["Reader"]):
    """Asks servers, all at once. One thread uses it.

    Args:
        servers: which.
        arguments: the common options: TLS, token, timeout.
    """

    def __init__(self, servers: Sequence[Server], arguments: argparse.Namespace) -> None:
        self._timeout_s: float = arguments.timeout_s
        self._token = commands.token(arguments)
        self._clients = {server: _client(server, arguments) for server in servers if server.target}
        self._servers = servers
        self._threads = ThreadPoolExecutor(len(servers), thread_name_prefix="conveyor-top")

    def read(self) -> list[Sample]:
        """A sample of each server, within the timeout for each thing that is asked."""
        return list(self._threads.map(self._sample, self._servers))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnects."""
        self._threads.shutdown()
        for client in self._clients.values():
            client.close()

    def _sample(self, server: Server) -> Sample:
        troubles: list[str] = []
        health, models, page = "", [], None
        listed = pb.ListSessionsResponse()
        if server.target:
            client = self._clients[server]
            call = client._client._call

            def asked(what: Callable[[], T]) -> T | None:
                return _asked(what, server.target, troubles)

            answer = asked(lambda: drive(call(_HEALTH, wrappers_pb2.StringValue())))
            health = "away" if answer is None else _SERVING.get(answer.value, "unknown")
            if answer is not None:
                models = asked(client.models) or []
                request = pb.ListSessionsRequest(page_size=SESSIONS)
                listed = asked(lambda: drive(call(_calls.LIST_SESSIONS, request))) or listed
        at_s = time.monotonic()
        if server.metrics:
            page = self._page(server.metrics, troubles)
            if page is None and not server.target:
                health = "away"
        return Sample(
            server,
            at_s,
            datetime.now(UTC),
            health,
            page,
            models,
            [conveyor.SessionInfo.of(session) for session in listed.sessions],
            listed.total_size,
            troubles,
        )

    def _shown(self) -> dict[str, str]:
        token = self._token() if callable(self._token) else self._token
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _page(self, address: str, troubles: list[str]) -> Page | None:
        url = f"http://{address}/metrics"
        try:
            asking = urllib.request.Request(url, headers=self._shown())
            with urllib.request.urlopen(asking, timeout=self._timeout_s) as answer:  # noqa: S310 - http, as it is written
                return Page.of(answer.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(_SAID_BYTES).decode("utf-8", "replace").split())
            troubles.append(f"no metrics at {url}, so no rates: {error.code}, {said}")
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            troubles.append(f"no metrics at {url} ({reason}), so no rates: --metrics HOST:PORT says where they are")
        return None


def _client(server: Server, arguments: argparse.Namespace) -> conveyor.Client:
    return commands.connected(argparse.Namespace(**{**vars(arguments), "target": server.target}))


def _asked(what: Callable[[], T], target: str, troubles: list[str]) -> T | None:
    try:
        return what()
    except conveyor.ConveyorError as error:
        troubles.append(f"{target}: {' '.join(str(error).split())}" + (f" [{error.reason}]" if error.reason else ""))
        return None
