"""What a Valkey or Redis server says of itself: its version, its part, whether it keeps what it is given, its clock.

Invariant: it is only asked (INFO, TIME), so that any user that a server may have can look.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from conveyor_server.doctor.finding import Finding, bad, good, warning
from conveyor_server.store.contract import StoreUnavailable

_LEAST = 7
_SKEW_S = 1.0


def check(url: str, timeout_s: float) -> Iterator[Finding]:
    """Asks the server.

    Raises:
        StoreUnavailable: it does not answer; the message has no password.
    """
    # Here, as the package is an extra; who opened the store has it.
    import valkey

    client: Any = valkey.Valkey.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    try:
        info = client.info()
        began = time.time()
        seconds, microseconds = client.time()
        skew_s = seconds + microseconds / 1e6 - (began + time.time()) / 2
    except valkey.exceptions.NoPermissionError:
        yield good("the store's user may not ask it about itself (INFO, TIME), which only doctor does")
        return
    except (valkey.ValkeyError, OSError) as error:
        raise StoreUnavailable(str(error)) from error
    finally:
        client.close()
    yield from judged(info)
    yield clock(skew_s)


def judged(info: Mapping[str, Any]) -> Iterator[Finding]:
    """What its INFO means for sessions."""
    name = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version", ""))
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) < _LEAST:
        yield bad(f"the store is {name} {version or 'of no known version'}", f"use version {_LEAST} or newer")
    else:
        yield good(f"the store is {name} {version}")
    if info.get("role") in {"slave", "replica"}:
        yield bad("the store is a replica, which takes no writes", "name the primary in --store")
    if str(info.get("cluster_enabled", 0)) == "1":
        yield bad("the store is a cluster, whose keys lie apart", "name a server that is none in --store")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield warning(
            f"the store drops sessions when its memory is full (maxmemory-policy {policy})",
            "maxmemory-policy noeviction in its configuration",
        )
    if str(info.get("aof_enabled", 0)) != "1":
        yield warning(
            "the store forgets its last writes, or all of them, when it ends (appendonly no)",
            "appendonly yes, and appendfsync always where sync sessions are to outlive its machine",
        )


def clock(skew_s: float) -> Finding:
    """How far its clock is before ours."""
    if abs(skew_s) <= _SKEW_S:
        return good(f"the store's clock and ours are {abs(skew_s) * 1e3:.0f} ms apart")
    return warning(
        f"the store's clock is {abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's",
        "keep both right, with chrony for example: sessions end by the store's clock",
    )
