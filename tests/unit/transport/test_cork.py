"""Answers of a turn that go to one connection are gathered by the kernel, and leave together."""

import asyncio
import os
import socket
import time
from pathlib import Path

import grpc.aio
import pytest
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc
from conveyor_server.transport.completion import cork
from conveyor_server.transport.completion.cork import WORTH_IT, Connection, Corks, Sockets, address_of

from tests.unit.transport.test_intake import step

on_the_queue = pytest.mark.asyncio(loop_factories=["cq"])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def pair():
    """A connection: the end that serves, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        served, _ = listener.accept()
        with served:
            served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield served, client


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:80", ("127.0.0.1", 80)),
        ("ipv6:%5B::1%5D:50051", ("::1", 50051)),
        ("ipv6:[2001:db8::1]:1", ("2001:db8::1", 1)),
        # A client of IPv4 on a socket of IPv6.
        ("ipv6:%5B::ffff:10.0.0.7%5D:9", ("10.0.0.7", 9)),
        ("unix:/tmp/a.sock", None),
        ("ipv4:not-an-address:80", None),
        ("ipv4:127.0.0.1", None),
        ("", None),
    ],
)
def test_addresses_are_read_as_sockets_tell_them(peer, address) -> None:
    assert address_of(peer) == address


def test_what_is_sent_behind_a_cork_waits_for_it_to_be_drawn(pair) -> None:
    served, client = pair
    connection = Connection(client.getsockname()[:2])
    assert connection.cork(Sockets())
    client.settimeout(0.05)
    for part in (b"a", b"b", b"c"):
        served.send(part)
    with pytest.raises(TimeoutError):
        client.recv(10)
    connection.uncork()
    client.settimeout(5)
    assert client.recv(10) == b"abc"


def test_a_connection_is_corked_from_some_messages_on_and_once_a_turn(pair, monkeypatch) -> None:
    _, client = pair
    set_to = []
    monkeypatch.setattr(Connection, "_set", lambda self, value: set_to.append((self, value)) or True)
    corks = Corks()
    mine = corks.connection(f"ipv4:127.0.0.1:{client.getsockname()[1]}")
    other = corks.connection("ipv4:192.0.2.1:9")
    assert corks.connection(f"ipv4:127.0.0.1:{client.getsockname()[1]}") is mine
    for _ in range(2):
        assert corks.put_in([mine] * (WORTH_IT - 1)) == []
        assert corks.put_in([mine, other] * (WORTH_IT + 3)) == [mine]
    assert set_to == [(mine, 1)] * 2


def test_a_connection_that_nobody_holds_is_forgotten_with_its_socket(pair) -> None:
    _, client = pair
    corks = Corks()
    peer = f"ipv4:127.0.0.1:{client.getsockname()[1]}"
    before = descriptors()
    connection = corks.connection(peer)
    assert corks.put_in([connection] * WORTH_IT) == [connection]
    assert descriptors() == before + 1
    del connection
    assert corks._connections == {}
    assert descriptors() == before


def test_a_descriptor_that_is_anothers_by_now_is_not_taken(pair) -> None:
    served, client = pair
    sockets, address = Sockets(), client.getsockname()[:2]
    found = sockets.find(address)
    assert found is not None
    found.close()
    number = served.detach()
    with socket.socket() as stranger:
        os.dup2(stranger.fileno(), number)
    try:
        assert sockets.find(address) is None
    finally:
        os.close(number)


def test_a_connection_that_is_gone_is_no_error(pair) -> None:
    served, client = pair
    connection = Connection(client.getsockname()[:2])
    assert connection.cork(Sockets())
    served.close()
    client.close()
    connection.uncork()
    connection._socket.close()
    assert not connection.cork(Sockets())


def test_looking_for_what_is_not_there_is_rare(monkeypatch) -> None:
    looks = []

    def connected():
        looks.append(time.monotonic())
        time.sleep(0.002)
        return iter(())

    monkeypatch.setattr(cork, "_connected", connected)
    sockets = Sockets()
    for _ in range(1000):
        assert sockets.find(("192.0.2.1", 1)) is None
    assert len(looks) == 1


@on_the_queue
async def test_many_streams_of_one_connection_are_answered_behind_a_cork_that_is_drawn(server, monkeypatch) -> None:
    corked, drawn = [], []
    put_in, draw = Connection.cork, Connection.uncork

    def noted_cork(self, sockets):
        done = put_in(self, sockets)
        if done:
            corked.append(self)
        return done

    def noted_uncork(self):
        drawn.append(self)
        draw(self)

    monkeypatch.setattr(Connection, "cork", noted_cork)
    monkeypatch.setattr(Connection, "uncork", noted_uncork)
    server.driver.inline_run_s = 10.0
    stub = session_pb2_grpc.SessionServiceStub(server.channel)
    calls = [stub.Stream() for _ in range(16)]
    for index, call in enumerate(calls):
        attach = pb.AttachSession(handle=1, mode=pb.AttachSession.MODE_CREATE, model="sum", session_id=f"s{index}")
        await call.write(pb.StreamRequest(attach=attach))
        assert (await call.read()).HasField("attached")
    for seq in range(1, 30):
        await asyncio.gather(*(call.write(pb.StreamRequest.FromString(step(1, seq, 1.0))) for call in calls))
        for call in calls:
            reply = await call.read()
            assert reply is not grpc.aio.EOF
            assert reply.result.seq == seq
    assert corked, "no turn had several answers for the connection"
    assert corked == drawn
    for call in calls:
        call.cancel()
