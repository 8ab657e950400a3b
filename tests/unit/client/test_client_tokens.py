"""Tokens that the client shows: with every call, the one in force, and never in a message of its own."""

from pathlib import Path

import conveyor
import grpc
import pytest
from conveyor.cli.main import main

ONE = [1, 2]


async def test_a_token_is_shown_with_every_call_and_stream(api, grpc_server):
    async with api.entered(api.connect(grpc_server.target, token="t1", metadata=[("x-tenant-id", "a")])) as client:
        await api.value(client.models())
        async with api.entered(client.session("sum", own_stream=True)) as session:
            await api.value(session.step(ONE))
            await api.value(session.refresh())
            session_id = session.id
    for metadata in (*grpc_server.metadata, *grpc_server.unary_metadata):
        assert metadata["authorization"] == "Bearer t1"
        assert metadata["x-tenant-id"] == "a"
    assert grpc_server.metadata[0]["x-session-id"] == session_id


async def test_the_token_that_is_in_force_is_asked_for_after_a_cut(api, grpc_server):
    tokens = iter(f"t{number}" for number in range(100))
    connection = api.connect(grpc_server.target, token=lambda: next(tokens))
    async with api.entered(connection) as client, api.entered(client.session("sum")) as session:
        await api.value(session.step(ONE))
        grpc_server.cut()
        await api.value(session.step(ONE))
    shown = [metadata["authorization"] for metadata in (*grpc_server.metadata, *grpc_server.unary_metadata)]
    assert len(set(shown)) == len(shown) > 2


async def test_without_a_token_nothing_is_shown(api, grpc_server):
    async with api.entered(api.connect(grpc_server.target)) as client:
        await api.value(client.models())
    assert "authorization" not in grpc_server.unary_metadata[0]


@pytest.mark.parametrize("token", ["", "a b", "a\n", "ü", lambda: None, lambda: 1 / 0])
async def test_a_token_that_cannot_be_sent_is_told_of_and_not_told(api, grpc_server, token):
    async with api.entered(api.connect(grpc_server.target, token=token)) as client:
        with pytest.raises(conveyor.Unauthenticated) as one:
            await api.value(client.models())
        with pytest.raises(conveyor.Unauthenticated) as other:
            async with api.entered(client.session("sum")):
                raise AssertionError("it is not opened")
    for caught in (one, other):
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert not isinstance(token, str) or not token or token not in str(caught.value)
    assert not grpc_server.metadata
    assert not grpc_server.unary_metadata


async def test_a_server_that_does_not_know_the_token_ends_it_at_once(api, grpc_server):
    grpc_server.stream_status = (grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    async with api.entered(api.connect(grpc_server.target, token="t")) as client:
        with pytest.raises(conveyor.Unauthenticated, match="who are you"):
            async with api.entered(client.session("sum")):
                raise AssertionError("it is not opened")
    assert len(grpc_server.metadata) == 1, "asking again brings nothing"


def test_the_command_line_takes_a_token(grpc_server, tmp_path: Path, capsys, monkeypatch):
    def shown() -> str | None:
        return grpc_server.unary_metadata[-1].get("authorization")

    models = ["models", "--target", grpc_server.target]
    monkeypatch.delenv("CONVEYOR_TOKEN", raising=False)
    monkeypatch.delenv("CONVEYOR_TOKEN_FILE", raising=False)
    assert main(models) == 0
    assert shown() is None
    monkeypatch.setenv("CONVEYOR_TOKEN", "from-the-environment")
    assert main(models) == 0
    assert shown() == "Bearer from-the-environment"
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    assert main([*models, "--token-file", str(file), "--tenant", "acme"]) == 0
    assert shown() == "Bearer from-a-file"
    assert grpc_server.unary_metadata[-1]["x-tenant-id"] == "acme"
    monkeypatch.setenv("CONVEYOR_TOKEN_FILE", str(file))
    assert main(models) == 0
    assert shown() == "Bearer from-a-file"
    capsys.readouterr()
    assert main([*models, "--token-file", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    file.write_text("two words")
    assert main(models) == 1
    assert "words" not in capsys.readouterr().err.replace("without spaces", "")
