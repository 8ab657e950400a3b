"""Where anybody may call, and what a server that begins says of it."""

from pathlib import Path

import pytest
from conveyor_server.banner import banner, offers_admin
from conveyor_server.configuration import load
from conveyor_server.errors import StartError
from conveyor_server.identity.access import read_access
from conveyor_server.settings import is_loopback

TLS = ["--tls-certificate", "c", "--tls-key", "k"]
EVERYWHERE = ["--host", "0.0.0.0"]  # noqa: S104


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_on_this_machine_anybody_may_call(host: str) -> None:
    assert is_loopback(host)
    assert load(["--host", host], {}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])  # noqa: S104
def test_elsewhere_it_must_be_said_who_may(host: str) -> None:
    assert not is_loopback(host)
    for flags in ([], TLS):
        with pytest.raises(StartError, match="--access FILE"):
            load(["--host", host, *flags], {})
    for flags in (["--access", "a.toml"], [*TLS, "--tls-client-ca", "ca"], ["--allow-anonymous"]):
        assert load(["--host", host, *flags], {}).host == host


@pytest.mark.parametrize(
    ("flags", "offered"),
    [
        ([], True),
        (["--admin", "off"], False),
        ([*EVERYWHERE, "--allow-anonymous"], False),
        ([*EVERYWHERE, "--allow-anonymous", "--admin", "on"], True),
        ([*EVERYWHERE, "--access", "a.toml"], True),
        ([*EVERYWHERE, *TLS, "--tls-client-ca", "ca"], True),
    ],
)
def test_strangers_change_nothing_unless_it_is_said(flags: list[str], offered: bool) -> None:
    assert offers_admin(load(flags, {})) is offered


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], ["anybody on this machine", "in the clear, on this machine", "metrics for anybody on this machine"]),
        (
            [*EVERYWHERE, "--allow-anonymous", "--metrics-host", "127.0.0.1"],
            ["anybody who reaches the port", "inputs and answers can be read", "are off", "anybody on this machine"],
        ),
        (
            [*EVERYWHERE, *TLS, "--tls-client-ca", "ca.pem", "--reflection", "off"],
            ["anybody, with a certificate by ca.pem", "over TLS", "are on", "reflection is off", "reaches 0.0.0.0"],
        ),
    ],
)
def test_what_is_open_is_said(flags: list[str], said: list[str]) -> None:
    text = "\n".join(banner(load(flags, {}), None))
    for part in said:
        assert part in text


def test_whom_the_access_file_lets_in_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'[[tokens]]\nname = "x"\nsha256 = "{"a" * 64}"\ntenant = "t"\nroles = ["infer"]\n')
    settings = load([*EVERYWHERE, "--access", str(path)], {})
    text = "\n".join(banner(settings, read_access(path)))
    for part in ("1 token; without any of them, nobody", "tokens can be read on their way", "whoever may observe"):
        assert part in text
