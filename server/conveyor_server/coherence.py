"""What cannot be set together.

Invariant: what is refused here is told with what to set instead, before anything is opened.
"""

from conveyor_server.errors import StartError
from conveyor_server.settings import FIELDS, Settings, is_loopback

_LAST_PORT = 65_535


def check_together(settings: Settings) -> None:
    """Looks at what one setting alone does not tell.

    Raises:
        StartError: two of them cannot be together; the message says which, and what to do.
    """
    for low, high in (("idle_timeout_s", "max_idle_timeout_s"), ("in_flight", "max_in_flight")):
        if getattr(settings, low) > getattr(settings, high):
            raise StartError(f"{low} is larger than {high}: raise {FIELDS[high].flag} too")
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise StartError("--tls-certificate and --tls-key go together")
    if settings.tls_client_ca is not None and settings.tls_key is None:
        raise StartError("--tls-client-ca needs --tls-certificate and --tls-key")
    if settings.otlp_endpoint and not settings.otlp_endpoint.startswith(("http://", "https://")):
        raise StartError("--otlp-endpoint is a URL: http://HOST:4317, or https://HOST:4317 for TLS")
    _check_callers(settings)
    _check_workers(settings)
    _check_durability(settings)


def _check_callers(settings: Settings) -> None:
    asks = settings.access is not None or settings.tls_client_ca is not None
    if asks or settings.allow_anonymous or is_loopback(settings.host):
        return
    raise StartError(
        f"on {settings.host}, whoever reaches the port could use it: say who may with --access FILE, "
        "ask for certificates with --tls-client-ca, listen on 127.0.0.1, or let anybody call with --allow-anonymous"
    )


def _check_durability(settings: Settings) -> None:
    kept = settings.store != "memory"
    order = {"none": 0, "async": 1, "sync": 2}
    default, most = (order.get(name, -1) for name in (settings.durability, settings.max_durability))
    if not kept and max(default, most, order[settings.min_durability]) > 0:
        raise StartError(
            "durability needs a store that outlives the process: add --store sqlite:PATH or --store valkey://HOST:PORT/0"
        )
    most = order["sync" if kept else "none"] if most < 0 else most
    if max(default, order[settings.min_durability]) > most:
        raise StartError("durability and min_durability are at most max_durability: raise --max-durability")
    if 0 <= default < order[settings.min_durability]:
        raise StartError("durability is less than min_durability: raise --durability")


def _check_workers(settings: Settings) -> None:
    first, last = settings.metrics_port, settings.metrics_port + settings.workers - 1
    if settings.workers == 1 or first == 0:
        return
    if last > _LAST_PORT:
        raise StartError(f"--workers {settings.workers} need the metrics ports {first} to {last}: lower --metrics-port")
    if first <= settings.port <= last:
        raise StartError(
            f"--workers {settings.workers} need the metrics ports {first} to {last}, and port is {settings.port}: "
            "move one of them"
        )
