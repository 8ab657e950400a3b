"""What `connect` takes, checked once."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from conveyor._core.retry import RetryPolicy
from conveyor._core.unstored import RESEND_BUFFER_BYTES
from conveyor._io.channel import TLS, Option, channel_options
from conveyor.errors import Unauthenticated

_TOKEN = re.compile(r"[!-~]+")
# A bearer token, or what gives the one that is in force.
Token: TypeAlias = str | Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A client's settings; see `conveyor.connect` for what they mean."""

    tls: TLS | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    resume_timeout_s: float = 30.0
    resend_buffer_bytes: int = RESEND_BUFFER_BYTES
    streams_per_client: int = 1
    keepalive_s: float | None = 30.0
    token: Token | None = None
    metadata: Sequence[tuple[str, str]] = ()
    channel_options: Sequence[Option] = ()

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is a number of seconds above 0, not {self.timeout_s}")
        for name in ("connect_timeout_s", "resume_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a number of seconds of 0 or more, not {getattr(self, name)}")
        for name in ("streams_per_client", "resend_buffer_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, not {getattr(self, name)}")

    def headers(self, session_id: str = "") -> list[tuple[str, str]]:
        """The metadata of a call that is made now.

        Args:
            session_id: the session that it is about, so that a proxy can find its server; "": none, or several.

        Raises:
            Unauthenticated: there is no token to be had, or none that can be sent.
        """
        metadata = list(self.metadata)
        if session_id:
            metadata.append(("x-session-id", session_id))
        if self.token is None:
            return metadata
        try:
            token = self.token if isinstance(self.token, str) else self.token()
        except Exception as error:
            raise _no_token(f"the function `token` failed: {error!r}") from error
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            # Never the token itself: a message ends up in logs.
            raise _no_token("a token is visible ASCII characters without spaces, and what was given is not")
        return [*metadata, ("authorization", f"Bearer {token}")]

    @property
    def policy(self) -> RetryPolicy:
        """How streams are resumed."""
        return RetryPolicy(connect_s=self.connect_timeout_s, total_s=self.resume_timeout_s)

    @property
    def options(self) -> list[Option]:
        """What the channel is made with."""
        return channel_options(self.tls, self.keepalive_s, self.channel_options)


def _no_token(why: str) -> Unauthenticated:
    return Unauthenticated(why, code=grpc.StatusCode.UNAUTHENTICATED)
