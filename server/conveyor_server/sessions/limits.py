"""What the server grants its sessions."""

from dataclasses import dataclass

from conveyor_server.sessions.session import SessionOptions


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What the server grants at most, and by default.

    Attributes:
        max_sessions: of all models together.
        max_per_tenant: of one tenant, in memory, unless it has a number of its own; 0: any.
        max_in_flight: the largest credit.
        default_in_flight: the credit of a session that asks for none.
        max_idle_timeout_s, default_idle_timeout_s: likewise for the idle limit.
        step_timeout_s: how long a step may wait that names no timeout.
        max_queue_s: a step that would wait longer is refused as OVERLOADED.
        pipeline_queue_s: likewise, for a step whose session has two messages unanswered; or the time of two full
            runs, where that is longer.
        retry_s: suggested delay when the server is full or draining.
        remembered: how many sessions that are gone are remembered with the reason.
    """

    max_sessions: int = 10_000
    max_per_tenant: int = 0
    max_in_flight: int = 256
    default_in_flight: int = 16
    max_idle_timeout_s: float = 86_400.0
    default_idle_timeout_s: float = 600.0
    step_timeout_s: float = 30.0
    max_queue_s: float = 2.0
    pipeline_queue_s: float = 1.0
    retry_s: float = 1.0
    remembered: int = 10_000

    def grant(self, max_in_flight: int = 0, idle_timeout_s: float = 0.0, tenant: str = "") -> SessionOptions:
        """What a session is given that asks for this, in this server's memory; zeros take the defaults."""
        credit = min(max_in_flight or self.default_in_flight, self.max_in_flight)
        timeout_s = min(idle_timeout_s or self.default_idle_timeout_s, self.max_idle_timeout_s)
        return SessionOptions(credit, timeout_s, tenant=tenant)
