"""Tokens, JWTs and certificates against the real process: who may, what is whose, and how a token is taken back."""

import contextlib
import hashlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import conveyor
import numpy as np
import pytest
import trustme
from issuer import AUDIENCE, ISSUER, Signer

from tests.e2e.conftest import FEATURES, Server, launch

X = np.random.default_rng(61).standard_normal((30, FEATURES)).astype(np.float32)
PATIENCE_S = 30.0


class Access:
    """The access file of a server, replaced at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "access.toml"
        self.signer = Signer("k1")
        (folder / "jwks.json").write_text(json.dumps({"keys": [self.signer.public()]}))
        self.tokens: dict[str, tuple[str, str]] = {}

    def write(self) -> None:
        tokens = "".join(
            f'[[tokens]]\nname = "of {tenant}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
            f'tenant = "{tenant}"\nroles = ["{role}"]\n'
            for token, (tenant, role) in self.tokens.items()
        )
        new = self.path.with_suffix(".new")
        new.write_text(
            f'{tokens}[jwt]\njwks = "jwks.json"\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n'
            '[[certificates]]\nname = "device.example"\ntenant = "field"\nroles = ["infer"]\n'
        )
        new.replace(self.path)


@pytest.fixture
def access(tmp_path: Path) -> Access:
    access = Access(tmp_path)
    access.tokens = {"one": ("acme", "infer"), "boss": ("*", "admin"), "eyes": ("*", "observe")}
    access.write()
    return access


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(nets, tmp_path: Path, access: Access, authority: trustme.CA) -> Iterator[Server]:
    issued = authority.issue_cert("localhost")
    chain, key, ca = (tmp_path / name for name in ("chain.pem", "key.pem", "clients.pem"))
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(ca))
    flags: dict[str, object] = {"tls-certificate": chain, "tls-key": key, "tls-client-ca": ca, "access": access.path}
    flags["handshake-timeout-s"] = 1
    server = launch(
        nets.folder, tmp_path, *(part for name, value in flags.items() for part in (f"--{name}", f"{value}"))
    )
    until = time.monotonic() + 60
    while "open: gRPC" not in server.log.read_text():
        assert time.monotonic() < until, server.log.read_text()
        time.sleep(0.05)
    yield server
    assert server.stop() == 0


@pytest.fixture
def connect(server: Server, authority: trustme.CA):
    def make(name: str = "somebody.example", **settings) -> conveyor.Client:
        issued = authority.issue_cert(name)
        tls = conveyor.TLS(
            root_certificates=authority.cert_pem.bytes(),
            certificate=issued.cert_chain_pems[0].bytes(),
            private_key=issued.private_key_pem.bytes(),
        )
        return conveyor.connect(f"localhost:{server.port}", tls=tls, **settings)

    return make


def pages(server: Server, token: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{server.metrics_port}/metrics")
    request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_who_may_and_what_is_whose(server: Server, connect, access: Access, nets) -> None:
    want = nets.truth("lstm", X)
    signed = access.signer.token(tenant="rival", roles=["infer"], sub="robot")
    with connect(token="one") as one, connect(token=signed) as robot, connect("device.example") as device:
        # Three tenants, one id.
        for client in (one, robot, device):
            with client.session("lstm", session_id="line-7", detach_on_exit=True) as session:
                np.testing.assert_allclose([session.step(x) for x in X[:3]], want[:3], atol=1e-5)
            assert [found.id for found in client.sessions()] == ["line-7"]
        with one.session(session_id="line-7", resume=True) as session:
            np.testing.assert_allclose(session.step(X[3]), want[3], atol=1e-5)
        with pytest.raises(conveyor.SessionNotFound):
            one.session(session_id="line-7", resume=True).__enter__()
        with pytest.raises(conveyor.PermissionDenied) as denied:
            one.load_model("lstm")
        assert denied.value.metadata == {"roles": "admin"}
    with connect(token="boss") as boss:
        assert {found.id for found in boss.sessions()} == {"field/line-7", "rival/line-7"}
        assert boss.load_model("lstm").name == "lstm"
    for settings in ({}, {"token": "two"}, {"token": access.signer.token(aud="another")}):
        with connect(**settings) as nobody, pytest.raises(conveyor.Unauthenticated):
            nobody.models()
    assert [pages(server, token) for token in ("eyes", "one", "two")] == [200, 403, 401]
    assert server.get("/readyz")[0] == 200
    log = server.log.read_text()
    assert "who may call: 3 tokens, 1 certificate, JWTs of https://id.example; without any of them, nobody" in log
    assert not [secret for secret in ("Bearer", signed) if secret in log]


def test_a_token_that_is_taken_back_ends_its_streams_and_a_new_one_goes_on(connect, access: Access, nets) -> None:
    """Each step once and in order, while the token changes under a stream that goes on."""
    want = nets.truth("lstm", X)
    token = ["one"]
    with connect(token=lambda: token[0]) as client, client.session("lstm") as session:
        first = session.info.epoch
        got = [session.step(x) for x in X[:5]]
        access.tokens["next"] = access.tokens["one"]
        access.write()
        token[0] = "next"
        got += [session.step(x) for x in X[5:10]]
        del access.tokens["one"]
        access.write()
        until, row = time.monotonic() + PATIENCE_S, 10
        # Until the stream was sent away and another took its place.
        while session.refresh().epoch == first:
            assert time.monotonic() < until
            if row < len(X) - 1:
                got.append(session.step(X[row]))
                row += 1
        got.append(session.step(X[row]))
        np.testing.assert_allclose(np.array(got), want[: row + 1], atol=1e-5)
        del access.tokens["next"]
        access.write()
        with pytest.raises(conveyor.Unauthenticated):
            step_until(session, until)


def step_until(session: conveyor.Session, until: float) -> None:
    while time.monotonic() < until:
        session.step(X[0])
        time.sleep(0.1)


def test_connections_that_never_shake_hands_are_dropped(server: Server, connect) -> None:
    with contextlib.ExitStack() as stack, connect(token="one") as client:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(40)]
        for number, each in enumerate(silent):
            each.settimeout(PATIENCE_S)
            if number % 2:
                # The first bytes of a TLS greeting, and no more.
                each.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert client.models()
        for each in silent:
            with contextlib.suppress(ConnectionError):
                assert each.recv(1) == b""


def test_a_jwt_that_ends_ends_its_streams(connect, access: Access) -> None:
    ends = time.time() + 2.5
    signed = access.signer.token(exp=ends)
    with connect(token=signed) as client, client.session("lstm") as session:
        session.step(X[0])
        until = time.monotonic() + PATIENCE_S
        with pytest.raises(conveyor.Unauthenticated, match="expired"):
            step_until(session, until)
        assert time.time() >= ends
