"""How sessions are kept: what each is granted, when it is written, when it leaves memory.

Invariant: a session is never given less than it asks for: what the server does not offer, it refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2

from conveyor_server.errors import refuse
from conveyor_server.sessions.limits import SessionLimits
from conveyor_server.sessions.session import Durability, SessionOptions
from conveyor_server.store.contract import Quota


@dataclass(frozen=True, slots=True)
class KeeperPolicy:
    """What the server's settings say of durability.

    Attributes:
        replica: this server's name among those that share the store.
        runtime: what computes states here, see runner.provider.fingerprint.
        default: of sessions that do not ask.
        least, most: what a session can have.
        checkpoint_s: ASYNC: a session that was stepped is written after so long,
        checkpoint_steps: or so many steps.
        max_undurable_s: ASYNC: how long sessions go on while the store is away.
        sync_patience_s: SYNC: how long answers wait for the store before their steps are told that it is away.
        passivate_after_s: idle time after which a session's state leaves memory.
        ttl_s: idle time after which a stored session is gone, at most, and of one that asks for none.
        max_stored, max_per_model, max_per_tenant: quotas in the store; 0: no bound.
    """

    replica: str
    runtime: str
    default: Durability = session_pb2.DURABILITY_ASYNC
    least: Durability = session_pb2.DURABILITY_NONE
    most: Durability = session_pb2.DURABILITY_SYNC
    checkpoint_s: float = 0.25
    checkpoint_steps: int = 64
    max_undurable_s: float = 30.0
    sync_patience_s: float = 2.0
    passivate_after_s: float = 60.0
    ttl_s: float = 30 * 86_400.0
    max_stored: int = 0
    max_per_model: int = 0
    max_per_tenant: int = 0

    def grant(
        self,
        limits: SessionLimits,
        durability: Durability,
        *,
        max_in_flight: int = 0,
        idle_timeout_s: float = 0.0,
        tenant: str = "",
    ) -> SessionOptions:
        """What a session is given that asks for this; zeros take the defaults.

        Raises:
            Refused: NOT_DURABLE.
        """
        wanted = durability or self.default
        if wanted > self.most:
            raise not_durable(wanted, self.most)
        wanted = max(wanted, self.least)
        plain = limits.grant(max_in_flight, idle_timeout_s)
        if wanted == session_pb2.DURABILITY_NONE:
            return SessionOptions(plain.max_in_flight, plain.idle_timeout_s, wanted, tenant)
        return SessionOptions(plain.max_in_flight, min(idle_timeout_s or self.ttl_s, self.ttl_s), wanted, tenant)

    def quotas(self, model: str, tenant: str, max_sessions: int) -> Sequence[Quota]:
        """What a session of that model and tenant counts against; `max_sessions` of the tenant's own, 0: as of all."""
        quotas = [Quota("", self.max_stored), Quota(f"model:{model}", self.max_per_model)]
        return [*quotas, Quota(f"tenant:{tenant}", max_sessions or self.max_per_tenant)] if tenant else quotas


def not_durable(wanted: Durability, most: Durability) -> Exception:
    """The refusal (NOT_DURABLE) of a session that asks for more than the server offers, to be raised by the caller."""
    asked, offered = name_of(wanted), name_of(most)
    what = (
        "keeps sessions in memory alone: start it with --store"
        if most <= session_pb2.DURABILITY_NONE
        else (f"keeps sessions {offered} at most: raise --max-durability")
    )
    return refuse(
        e.ERROR_REASON_NOT_DURABLE,
        f"the session asks for durability {asked}, and this server {what}, or ask for less",
        durability=asked,
        most=offered,
    )


def name_of(durability: Durability) -> str:
    """`none`, `async` or `sync`."""
    return session_pb2.Durability.Name(durability).removeprefix("DURABILITY_").lower()
