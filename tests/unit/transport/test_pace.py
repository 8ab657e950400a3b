"""So many messages a second, and not one is lost or refused for it."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conveyor_proto.v1 import session_pb2_grpc
from conveyor_server.identity.caller import Caller
from conveyor_server.identity.gate import Gate
from conveyor_server.transport import pace
from conveyor_server.transport.pace import Pace, Paces


def test_a_second_of_messages_may_come_at_once_and_then_one_at_a_time() -> None:
    ten = Pace(10.0)
    assert [ten.take(100.0) for _ in range(10)] == [0.0] * 10
    assert ten.take(100.0) == pytest.approx(0.1)
    assert ten.take(100.1) == pytest.approx(0.1)
    # Whoever was silent for long has no more than a second's worth.
    assert [ten.take(500.0) for _ in range(10)] == pytest.approx([0.0] * 10)
    assert ten.take(500.0) == pytest.approx(0.1)


def test_a_rate_is_kept_however_the_messages_come() -> None:
    now, read, eight = 0.0, 0, Pace(8.0)
    while now < 100.0:
        wait_s = eight.take(now)
        read += 1
        now += max(wait_s, 0.01)
    assert 8 * 100 <= read <= 8 * 101 + 1


def test_a_tenants_streams_are_counted_together_and_others_each() -> None:
    paces, acme = Paces(5.0), Caller(tenant="acme")
    first = paces.of(acme)
    assert paces.of(Caller("another name", tenant="acme")) is first
    assert paces.of(Caller(tenant="rival")) is not first
    assert paces.of(Caller()) is not paces.of(Caller())
    del first
    assert len(paces._known) == 0, "with the last stream it is forgotten"
    assert Paces(0.0).of(acme) is None


async def test_who_sends_too_fast_is_read_later_and_a_neighbour_is_not(
    make_server: Callable, wire_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_BURST_S", 0.0)
    path = tmp_path / "access.toml"
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\ntenant = "{name}"\n'
            'roles = ["infer"]\n'
            for name in ("fast", "slow")
        )
    )
    server = await make_server(wire=wire_options(messages_per_s=25.0), gate=Gate(path), folder="models")
    stub = session_pb2_grpc.SessionServiceStub(server.channel)  # type: ignore[no-untyped-call]

    def stream(name: str):
        return type(server.stream())(stub.Stream(metadata=(("authorization", f"Bearer {name}"),)))

    one, other, neighbour = stream("fast"), stream("fast"), stream("slow")
    for each in (one, other, neighbour):
        await each.attached(1)
    began = time.monotonic()
    for seq in range(1, 9):
        await one.step(1, seq, 1.0)
        await other.step(1, seq, 1.0)
    # Its own tenant has sixteen messages before it; nobody else has to wait for them.
    assert await neighbour.answer(1, 1, 1.0)
    applied = {name: session.applied_seq for name, session in server.directory.sessions.items()}
    assert min(seq for name, seq in applied.items() if name.startswith("fast/")) < 8
    for each in (one, other):
        assert [(await each.expect("result")).seq for _ in range(8)] == list(range(1, 9))
    assert time.monotonic() - began >= 14 / 25.0
    for each in (one, other, neighbour):
        await each.end()


async def test_a_stream_that_is_not_read_for_now_can_end(
    make_server: Callable, wire_options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_BURST_S", 0.0)
    server = await make_server(wire=wire_options(messages_per_s=0.001))
    stream, broken = server.stream(), server.stream()
    await stream.attached(1)
    await broken.attached(1)
    await stream.step(1, 1, 1.0)
    broken.call.cancel()
    # Neither is read again within the hour: one is told that the server stops, the other is gone.
    now = server.driver.now()
    assert await asyncio.wait_for(server.grpc.drain(now + 3.0, now), 20)
    await stream.expect("go_away")
    await stream.expect("detached")
    await stream.expect("end")
