"""What `conveyor doctor` finds of what it has to ask: ports, stores; and the command itself."""

import contextlib
import http.server
import json
import re
import socket
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import valkey
from conveyor_proto.v1 import store_pb2
from conveyor_server.doctor import checks, collector, command, ports, stores, valkeys
from conveyor_server.doctor.finding import Level, bad, good, warning
from conveyor_server.keeper import head
from conveyor_server.settings import Settings
from conveyor_server.store.contract import Creation, Outcome, StoreUnavailable
from conveyor_server.store.sqlite import SqliteStore
from grpc_health.v1 import health, health_pb2_grpc
from valkey_process import ValkeyProcess

ROOT = Path(__file__).resolve().parents[3]
GOOD, WARNING, BAD = Level.GOOD, Level.WARNING, Level.BAD


def told(check, settings):
    return [(each.level, f"{each.what} -> {each.fix}") for each in check(settings)]


def only(found, level):
    (text,) = (text for each, text in found if each is level)
    return text


# ---------------------------------------------------------------- ports


@contextlib.contextmanager
def listening():
    """A port that somebody listens on who says nothing but goodbye."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        thread = threading.Thread(target=_hang_up, args=(held,), daemon=True)
        thread.start()
        yield held.getsockname()[1]
        held.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _hang_up(held):
    with contextlib.suppress(OSError):
        while True:
            held.accept()[0].close()


@contextlib.contextmanager
def answering(status, text):
    """A page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)


@pytest.fixture
def free(unused_tcp_port_factory):
    return unused_tcp_port_factory


def test_free_ports(free):
    settings = Settings(port=free(), metrics_port=free())
    assert [level for level, _ in told(ports.check, settings)] == [GOOD, GOOD]
    assert [level for level, _ in told(ports.check, Settings(port=0, metrics_port=0))] == [GOOD, GOOD]


def test_a_port_of_a_stranger(free):
    with listening() as taken:
        found = told(ports.check, Settings(port=taken, metrics_port=free()))
        assert f"sport = :{taken}" in only(found, BAD)
        found = told(ports.check, Settings(port=free(), metrics_port=taken))
        assert "give another --metrics-port" in only(found, BAD)


def test_a_conveyor_is_known_by_its_health_and_by_its_page(free):
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        text = only(told(ports.check, Settings(port=port, metrics_port=0))[:1], GOOD)
        assert "in use by a conveyor that runs" in text
    finally:
        server.stop(None).wait()
    for status, page in ((200, "conveyor_build_info 1"), (401, "send `authorization: Bearer TOKEN`")):
        with answering(status, page) as metrics_port, listening() as taken:
            found = told(ports.check, Settings(port=taken, metrics_port=metrics_port))
            assert [level for level, _ in found] == [GOOD, GOOD], "TLS may keep its health from us"
    with answering(200, "something else") as metrics_port:
        assert only(told(ports.check, Settings(port=free(), metrics_port=metrics_port)), BAD)


def test_ports_that_cannot_be_had(free, monkeypatch):
    assert "both" in only(told(ports.check, Settings(port=7, metrics_port=7)), BAD)
    assert "is no port" in only(told(ports.check, Settings(port=70_000, metrics_port=free())), BAD)
    elsewhere = told(
        ports.check, Settings(host="192.0.2.1", port=free(), metrics_host="127.0.0.1", metrics_port=free())
    )
    assert "no address of this machine" in only(elsewhere, BAD)
    for error, words in (
        (PermissionError(13, "Permission denied"), "CAP_NET_BIND_SERVICE"),
        (socket.gaierror(-2, "Name or service not known"), "has no address"),
        (OSError(5, "Input/output error"), "cannot be used: Input/output error"),
    ):

        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(ports, "_bind", refuse)
        assert words in only(told(ports.check, Settings(port=443, metrics_port=0)), BAD)


def test_each_workers_page(free):
    first = free()
    assert len(told(ports.check, Settings(port=0, metrics_port=first, workers=3))) == 4


# ---------------------------------------------------------------- stores


def test_memory_is_no_store():
    assert told(stores.check, Settings()) == [(GOOD, "no store: sessions end with the server -> ")]


def sqlite(path):
    return Settings(store=f"sqlite:{path}")


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    assert "the server makes it" in only(told(stores.check, sqlite(tmp_path / "s.db")), GOOD)
    assert list(tmp_path.iterdir()) == []
    assert "mkdir -p" in only(told(stores.check, sqlite(tmp_path / "gone" / "s.db")), BAD)


def test_a_file_that_works_is_left_as_it_was(tmp_path):
    path = tmp_path / "s.db"
    store = SqliteStore(path)
    add(store, "theirs", ahead_s=0.0)
    found = told(stores.check, sqlite(path))
    assert {level for level, _ in found} <= {GOOD, WARNING}, "a slow disk is to be looked at"
    assert any("has 1 sessions; a read took" in text for _, text in found)
    assert any("the 1 sessions that were looked at" in text for _, text in found)
    assert [record.session_id for record in store.listed("", 10, "").records] == ["theirs"]
    store.close()


def add(store, name, *, ahead_s, owner="other:1"):
    content = store_pb2.StoredSession(format=head.FORMAT, session_id=name)
    content.created_at.FromNanoseconds(round((time.time() + ahead_s) * 1e9))
    made = Creation(name, "m", head.sealed(content), b"", 0, owner, "", time.time() + 600)
    assert store.create([made]) == [None]


def test_clocks_of_other_servers_and_torn_records(tmp_path):
    store = SqliteStore(tmp_path / "s.db")
    add(store, "here", ahead_s=-5.0)
    add(store, "there", ahead_s=60.0, owner="fast:1")
    made = Creation("torn", "m", b"nonsense", b"", 0, "o", "", time.time() + 600)
    assert store.create([made]) == [None]
    store.close()
    texts = [text for level, text in told(stores.check, sqlite(tmp_path / "s.db")) if level is WARNING]
    assert any(text.startswith("fast:1 has sessions that were made 60 s from now") for text in texts)
    assert any("'torn'" in text for text in texts)


def test_files_that_are_no_store_or_open_to_all(tmp_path):
    path = tmp_path / "s.db"
    SqliteStore(path).close()
    path.chmod(0o666)
    assert any(text.endswith(f"chmod 600 {path}") for _, text in told(stores.check, sqlite(path)))
    path.chmod(0o600)
    path.write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    assert only(told(stores.check, sqlite(path)), BAD)


def test_a_folder_that_cannot_be_written_and_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.os, "access", lambda *_: False)
    assert "nothing can be written" in only(told(stores.check, sqlite(tmp_path / "s.db")), BAD)
    monkeypatch.undo()
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda _: stores.shutil._ntuple_diskusage(9, 8, 1 << 20))
    assert "1 MB are free" in only(told(stores.check, sqlite(tmp_path / "s.db")), WARNING)


def test_a_store_of_no_kind():
    assert "no known kind" in only(told(stores.check, Settings(store="file:x")), BAD)


class Forgetful:
    """A store that drops what it is given."""

    name = "forgetful"

    def count(self):
        return 0

    def create(self, creations):
        return [None]

    def delete(self, sessions):
        return [Outcome.MISSING]

    def close(self):
        pass


def test_a_store_that_drops_what_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "s.db").touch(mode=0o600)
    monkeypatch.setattr(stores, "open_store", lambda *_, **__: Forgetful())
    assert "it drops what it is given" in only(told(stores.check, sqlite(tmp_path / "s.db")), BAD)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    yield process
    process.kill()


def test_a_valkey_server(server):
    with valkey.Valkey(port=server.port) as client:
        client.flushdb()
        found = told(stores.check, Settings(store=server.url))
        assert "appendonly yes" in only([each for each in found if "forgets" in each[1]], WARNING)
        texts = [text for _, text in found]
        for words in (r"the store is valkey \d", r"apart", r"has 0 sessions; a read took"):
            assert any(re.search(words, text) for text in texts), (words, texts)
        assert client.dbsize() == 0, "nothing is left of the probe"


def test_a_valkey_server_that_is_away_or_wants_a_password(server):
    away = "valkey://user:secret@127.0.0.1:1/0"
    text = only(told(stores.check, Settings(store=away)), BAD)
    assert "secret" not in text
    with valkey.Valkey(port=server.port) as client:
        client.config_set("requirepass", "other")
        try:
            found = told(stores.check, Settings(store=f"valkey://:secret@127.0.0.1:{server.port}/0"))
        finally:
            client.close()
            with valkey.Valkey(port=server.port, password="other") as known:
                known.config_set("requirepass", "")
    assert "secret" not in only(found, BAD)
    with pytest.raises(StoreUnavailable):
        list(valkeys.check(away, 0.5))


def test_a_user_that_may_do_only_what_a_server_does(server):
    with valkey.Valkey(port=server.port) as client:
        client.acl_setuser("small", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-info"])
        found = told(stores.check, Settings(store=f"valkey://small:pw@127.0.0.1:{server.port}/0"))
        assert {level for level, _ in found} <= {GOOD, WARNING}, "a slow machine is to be looked at"
        assert any("may not ask it about itself" in text for _, text in found)
        client.acl_setuser("none", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-evalsha"])
        found = told(stores.check, Settings(store=f"valkey://none:pw@127.0.0.1:{server.port}/0"))
        assert "it needs EVAL, EVALSHA" in only(found, BAD)


INFO = {
    "valkey_version": "8.1.0",
    "role": "master",
    "cluster_enabled": 0,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
}


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        ({}, GOOD, "valkey 8.1.0"),
        ({"valkey_version": "", "redis_version": "6.2.1"}, BAD, "version 7"),
        ({"valkey_version": "x"}, BAD, "version 7"),
        ({"role": "slave"}, BAD, "name the primary"),
        ({"cluster_enabled": 1}, BAD, "cluster"),
        ({"maxmemory_policy": "allkeys-lru"}, WARNING, "noeviction"),
        ({"aof_enabled": 0}, WARNING, "appendonly yes"),
    ],
)
def test_what_a_server_says_of_itself(said, level, words):
    found = [(each.level, f"{each.what} -> {each.fix}") for each in valkeys.judged({**INFO, **said})]
    assert any(each is level and words in text for each, text in found), found
    assert max(each for each, _ in found) is level


def test_the_stores_clock():
    assert valkeys.clock(0.5).level is valkeys.clock(-0.5).level is GOOD
    assert "ahead of" in valkeys.clock(3.0).what
    assert "behind" in valkeys.clock(-3.0).what


# ---------------------------------------------------------------- the collector


def test_a_collector_that_is_there_and_one_that_is_not(free, monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert told(collector.check, Settings())[0][0] is GOOD
    gone = Settings(traces=True, otlp_endpoint=f"http://me:secret@127.0.0.1:{free()}")
    text = only(told(collector.check, gone), WARNING)
    assert "no collector at 127.0.0.1" in text
    assert "secret" not in text
    assert only(told(collector.check, Settings(traces=True, otlp_endpoint="http://127.0.0.1:x")), WARNING)
    with listening() as port:
        for given, variable in ((f"http://127.0.0.1:{port}", ""), ("", f"127.0.0.1:{port}")):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", variable)
            assert f"127.0.0.1:{port}" in only(
                told(collector.check, Settings(otlp_metrics=True, otlp_endpoint=given)), GOOD
            )
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert "nothing is sent" in only(told(collector.check, gone), WARNING)
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setattr(collector, "_is_installed", lambda _: False)
    assert "conveyor[otel]" in only(told(collector.check, gone), BAD)


# ---------------------------------------------------------------- the command


@pytest.fixture
def found(monkeypatch):
    """Exchanges the checks for one that finds this."""

    def find(*findings):
        monkeypatch.setattr(checks, "CHECKS", {"thing": lambda _: iter(findings)})

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    return find


def test_the_worst_finding_is_the_exit_status(found, capsys):
    one, two, three = good("a is well"), warning("b is slow", "speed it up"), bad("c is gone", "bring it back")
    for findings, status in (((), 0), ((one,), 0), ((one, two), 1), ((three, one, two), 2)):
        if findings:
            found(*findings)
            assert command.command([]) == status
    out = capsys.readouterr().out
    assert "FIX   thing         c is gone\n                    -> bring it back" in out
    assert out.endswith("1 good, 1 to look at, 1 to fix\n")
    assert command.command(["--quiet"]) == 2
    assert "a is well" not in capsys.readouterr().out
    assert command.command(["--json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"check": "thing", "level": "bad", "what": "c is gone", "fix": "bring it back"}


def test_what_cannot_be_looked_at_is_a_finding(monkeypatch, capsys):
    def check(_):
        yield good("so far")
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(checks, "CHECKS", {"thing": check})
    assert command.command([]) == 2
    assert "it cannot be looked at: Permission denied (/secret)" in capsys.readouterr().out


def test_settings_that_cannot_be_meant_are_serves_own_words(capsys):
    assert command.command(["--max-sesions", "1"]) == 2
    assert "did you mean --max-sessions?" in capsys.readouterr().err
    assert command.command(["--help"]) == 0
    assert "Exit status" in capsys.readouterr().out


def test_the_page_names_every_check():
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(checks.CHECKS)
