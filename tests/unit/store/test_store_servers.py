"""Servers that are away, full, in the wrong hands or not what they seem: each is an error that says what to do."""

import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trustme
import valkey
from conveyor_server.store.contract import Outcome, StoreInvalid, StoreUnavailable
from conveyor_server.store.valkey import ValkeyStore
from store_calls import add, creation, put, read
from valkey_process import ValkeyProcess

SECRET = "pass:w@rd/#"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ValkeyProcess]]:
    """Starts a server for one test, which may harm it."""
    with ExitStack() as ends:

        def begin(**settings: object) -> ValkeyProcess:
            folder = tmp_path / f"valkey{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            server = ValkeyProcess(folder, **settings)
            ends.callback(server.kill)
            return server

        yield begin


def test_a_server_that_forgets_its_scripts_is_told_them_again(
    valkey_store: ValkeyStore, commands: valkey.Valkey
) -> None:
    add(valkey_store, "a")
    commands.script_flush()
    assert put(valkey_store, "a", 1, 1) is Outcome.DONE


def test_a_server_that_is_away_is_named_and_used_again_once_it_is_back(start: Callable[..., ValkeyProcess]) -> None:
    server = start(appendonly="yes", appendfsync="always")
    with closing(ValkeyStore(server.url)) as store:
        add(store, "a")
        server.kill()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=rf"valkey://127\.0\.0\.1:{server.port}/0: .*[Cc]onnect"):
                put(store, "a", 1, 1)
        server.start()
        assert put(store, "a", 1, 1) is Outcome.DONE
        server.kill()
        server.start()
        # Its old connection is gone, which nobody is told.
        assert read(store).seq == 1


def test_what_a_silent_server_was_asked_is_not_done_when_it_wakes(start: Callable[..., ValkeyProcess]) -> None:
    """Whoever asked has been refused, and is elsewhere: a write or an attach that comes late is nobody's."""
    server = start()
    with closing(ValkeyStore(server.url, timeout_s=0.2)) as store:
        add(store, "a")
        server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable, match=r"[Tt]imeout"):
                put(store, "a", 1, 1)
            time.sleep(0.1)
        finally:
            server.signal(signal.SIGCONT)
        assert read(store).seq == 0
        assert put(store, "a", 1, 1) is Outcome.DONE


def test_a_server_whose_memory_is_full_refuses_what_is_new_and_drops_nothing(
    start: Callable[..., ValkeyProcess],
) -> None:
    server = start()
    with closing(ValkeyStore(server.url)) as store, valkey.Valkey(port=server.port) as client:
        add(store, "a", "b")
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable, match="its memory is full: raise maxmemory"):
            store.create([creation("new")])
        with pytest.raises(StoreUnavailable, match="its memory is full: raise maxmemory"):
            put(store, "a", 1, 1)
        assert [(read(store, name).seq, read(store, name).body) for name in "ab"] == [(0, b"body")] * 2
        # Closing sessions makes room.
        assert store.delete([("b", 1)]) == [Outcome.DONE]
        client.config_set("maxmemory", 0)
        assert put(store, "a", 1, 1) is Outcome.DONE


def test_a_replica_is_refused_and_the_primary_asked_for(start: Callable[..., ValkeyProcess]) -> None:
    primary, replica = start(), start()
    with closing(ValkeyStore(replica.url)) as store, valkey.Valkey(port=replica.port) as client:
        client.replicaof("127.0.0.1", primary.port)
        with pytest.raises(StoreUnavailable, match="it is a replica: name the primary"):
            store.create([creation("a")])


def test_a_password_is_given_and_never_told(start: Callable[..., ValkeyProcess]) -> None:
    server = start(requirepass=SECRET)
    at = f"127.0.0.1:{server.port}/0"
    for user in ("", ":wrong@", "nobody:pass%3Aw%40rd%2F%23@"):
        with closing(ValkeyStore(f"valkey://{user}{at}")) as store:
            with pytest.raises(StoreUnavailable, match=r"valkey://user:password@host") as caught:
                store.count()
            assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
            assert "w@rd" not in str(caught.value)
    with closing(ValkeyStore(f"valkey://:pass%3Aw%40rd%2F%23@{at}")) as store:
        add(store, "a")
        assert store.name == f"valkey://{at}"


def test_a_user_who_may_not_run_the_script_is_told_what_it_takes(start: Callable[..., ValkeyProcess]) -> None:
    server = start()
    with valkey.Valkey(port=server.port) as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+time")
    url = server.url.replace("//", "//reader:secret@")
    said = r"that: it needs EVAL, EVALSHA and what valkey\.lua calls"
    with closing(ValkeyStore(url)) as store, pytest.raises(StoreUnavailable, match=said):
        store.count()


def test_what_listens_there_and_is_no_such_server_is_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            with listener.accept()[0] as caller:
                caller.recv(1 << 16)
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"valkey://127.0.0.1:{port}/0"
        with closing(ValkeyStore(url)) as store, pytest.raises(StoreUnavailable, match=re.escape(url)):
            store.count()
        thread.join()


class TlsFront:
    """Ends TLS before a server that has none: one connection after the other."""

    def __init__(self, authority: trustme.CA, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        self._listener = socket.create_server(("localhost", 0))
        self.port = self._listener.getsockname()[1]
        self._context = context
        self._to = port
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(caller, server_side=True) as outer:
                    self._pass_on(outer)
            except OSError:
                # It does not believe us, or is gone.
                continue

    def _pass_on(self, outer: ssl.SSLSocket) -> None:
        with socket.create_connection(("127.0.0.1", self._to)) as inner:
            # A request is whole before its answer begins.
            while request := outer.recv(1 << 20):
                inner.sendall(request)
                outer.sendall(inner.recv(1 << 20))


def test_tls_is_spoken_with_a_server_that_is_known(
    valkey_server: ValkeyProcess, commands: valkey.Valkey, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with closing(TlsFront(authority, valkey_server.port)) as front:
        with closing(ValkeyStore(f"valkeys://localhost:{front.port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}")) as store:
            assert store.count() == 0
        stranger = ValkeyStore(f"rediss://localhost:{front.port}/0")
        with closing(stranger), pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.count()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("valkey://:s3cret@host:port/0", "port and database are numbers"),
        ("valkey://:s3cret@host:1/first", "port and database are numbers"),
        ("valkey://:s3/cret@host:1/0", "port and database are numbers"),
        ("valkey://:s3cret@/0", "valkey://host:port/db"),
        ("http://:s3cret@host:1/0", "valkey://host:port/db"),
        ("valkey://:s3cret@host:1/-1", "valkey://host:port/db"),
        ("valkey://:s3cret@host:1/0?timeout=3", "unknown options"),
        ("valkey://:s3cret@host:1/0?ssl_ca_certs=ca.pem", "unknown options"),
        ("valkeys://:s3cret@host:1/0?ssl_check_hostname=no", "unknown options"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(StoreInvalid, match=said) as caught:
        ValkeyStore(url)
    assert "s3" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_name_for_people_has_no_password_and_all_else() -> None:
    for url, name in (
        ("valkey://user:s3cret@host:1234/5", "valkey://host:1234/5"),
        ("redis://[::1]/", "redis://[::1]:6379/0"),
        ("rediss://host", "rediss://host:6379/0"),
    ):
        assert ValkeyStore(url).name == name
