"""What `--store` may say: each form is the store that it names, and all else is refused, with what it may be."""

import sys
from contextlib import closing
from pathlib import Path

import pytest
from conveyor_server.errors import StartError
from conveyor_server.store.opening import open_store
from conveyor_server.store.sqlite import SqliteStore
from conveyor_server.store.valkey import ValkeyStore
from store_calls import add, read


def test_memory_is_no_store() -> None:
    assert open_store("memory") is None


@pytest.mark.parametrize("options", ["", "?synchronous=full", "?synchronous=normal"])
def test_a_file_is_opened_at_once(path: Path, options: str) -> None:
    store = open_store(f"sqlite:{path}{options}", timeout_s=7.0)
    assert isinstance(store, SqliteStore)
    with closing(store):
        assert path.exists()
        assert (store.name, store.timeout_s) == (f"sqlite:{path}", 7.0)
        add(store, "a")
        assert read(store).seq == 0


@pytest.mark.parametrize("scheme", ["valkey", "redis", "valkeys", "rediss"])
def test_a_server_is_not_asked_yet(scheme: str) -> None:
    store = open_store(f"{scheme}://nobody.invalid:1/0")
    assert isinstance(store, ValkeyStore)
    store.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "of no known kind"),
        ("Memory", "of no known kind"),
        ("postgres://host/sessions", "of no known kind"),
        ("/var/lib/sessions.db", "of no known kind"),
        ("sqlite:", "the file has no name"),
        ("sqlite:?synchronous=full", "the file has no name"),
        ("sqlite:x.db?synchronous=off", "synchronous=full or synchronous=normal"),
        ("sqlite:x.db?cache=shared", "synchronous=full or synchronous=normal"),
        ("sqlite:/no/such/folder/x.db", "cannot be opened"),
        ("valkey:host", r"valkey://host:port/db"),
    ],
)
def test_what_is_no_store_is_refused_with_what_may_be_said(text: str, said: str) -> None:
    with pytest.raises(StartError, match=said) as caught:
        open_store(text)
    assert "--store is memory, sqlite:PATH" in str(caught.value)


def test_a_store_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "conveyor_server.store.valkey")
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(StartError, match=r"pip install 'conveyor\[valkey\]'"):
        open_store("valkey://host")
