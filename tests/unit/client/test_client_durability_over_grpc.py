"""Both clients against a server with a store, behind real gRPC, that is killed: each test runs blocking and asyncio."""
# ruff: noqa: SIM117 - a session in its client reads as it is.

import threading
import time

import conveyor
import conveyor.aio
import numpy as np
import pytest
from conveyor_proto.v1 import session_pb2 as pb

ONE = np.array([1, 0], np.float32)


@pytest.fixture
def server(stored_server):
    return stored_server


@pytest.fixture
def store(server):
    return server.fake.store


def back_after(store, seconds):
    """The store comes back in a while."""
    timer = threading.Timer(seconds, lambda: setattr(store, "away", False))
    timer.start()
    return timer


async def test_a_stream_goes_on_over_dead_servers(api, server):
    def chunks():
        for number in range(60):
            if number in (20, 40):
                server.crash()
            yield ONE

    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        assert (s.info.durability, s.info.durable_seq, s.info.resident) == ("async", 0, True)
        assert [y[0] async for y in api.each(s.stream(chunks()))] == list(range(1, 61))
        assert await api.value(s.flush()) == 60 == s.durable_seq
        assert len(server.fake.store.records[s.id].history) == 60


async def test_a_population_goes_on_over_dead_servers(api, server):
    def items():
        for number in range(30):
            if number == 15:
                server.crash()
            yield np.tile(ONE, (3, 1))

    async with api.entered(api.connect(server.target)) as client, api.entered(client.population("sum", 3)) as p:
        assert [y[:, 0].tolist() async for y in api.each(p.stream(items()))] == [[n] * 3 for n in range(1, 31)]
        assert (await api.value(p.flush())).tolist() == [30] * 3 == p.durable_seq.tolist()


@pytest.mark.parametrize("how", ["detach", "close the client", "leave"])
async def test_whoever_leaves_leaves_everything_in_the_store(api, server, store, how):
    async with api.entered(api.connect(server.target)) as client:
        async with api.entered(client.session("sum", session_id="s", detach_on_exit=True)) as s:
            for _ in range(3):
                await api.value(s.step(ONE))
            assert (s.applied_seq, s.durable_seq) == (3, 0)
            server.crash()
            if how == "detach":
                await api.value(s.detach())
            elif how == "close the client":
                await api.value(client.close())
            if how != "leave":
                assert store.records["s"].seq == 3
    assert store.records["s"].seq == 3
    assert s.durable_seq == 3


async def test_a_client_that_closes_waits_for_no_server_longer_than_its_timeout(api, server):
    client = api.connect(server.target, timeout_s=0.3)
    s = await api.value(client.session("sum"))
    await api.value(s.step(ONE))
    server.fake.store.away = True
    before = time.monotonic()
    await api.value(client.close())
    assert 0.25 < time.monotonic() - before < 5
    assert (s.applied_seq, s.durable_seq) == (1, 0)


@pytest.mark.parametrize("durability", ["none", "async", "sync"])
async def test_a_session_is_as_durable_as_it_asks_to_be(api, server, durability):
    async with api.entered(api.connect(server.target)) as client:
        async with api.entered(client.session("sum", durability=durability)) as s:
            assert s.info.durability == durability
            await api.value(s.step(ONE))
            async with api.entered(s.fork(durability="sync")) as twin:
                assert twin.info.durability == "sync"
            snapshot = await api.value(s.snapshot())
            async with api.entered(client.restore(snapshot, durability="async")) as again:
                assert again.info.durability == "async"
            if durability == "none":
                with pytest.raises(conveyor.NotDurable):
                    await api.value(s.flush())
        async with api.entered(client.population("sum", 2, durability=durability)) as p:
            if durability == "none":
                with pytest.raises(conveyor.NotDurable):
                    await api.value(p.flush())


async def test_more_durability_than_there_is_is_refused(api, grpc_server):
    async with api.entered(api.connect(grpc_server.target)) as client:
        with pytest.raises(conveyor.NotDurable):
            async with api.entered(client.session("sum", durability="sync")):
                pass
        with pytest.raises(ValueError, match="one of none, async, sync"):
            client.session("sum", durability="eventually")


async def test_an_opening_waits_while_the_store_is_away_for_a_moment(api, server, store):
    store.away = True
    timer = back_after(store, 0.3)
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        assert (await api.value(s.step(ONE)))[0] == 1
    timer.join()


async def test_an_opening_whose_store_stays_away_says_so(api, server, store):
    store.away = True
    async with api.entered(api.connect(server.target, connect_timeout_s=0.2)) as client:
        with pytest.raises(conveyor.StoreUnavailable, match="gave up"):
            async with api.entered(client.session("sum")):
                pass
        store.away = False
        async with api.entered(client.session("sum")) as s:
            assert (await api.value(s.step(ONE)))[0] == 1


async def test_a_step_waits_while_the_store_is_away_even_beyond_its_timeout(api, server, store):
    async with api.entered(api.connect(server.target, timeout_s=0.1)) as client:
        async with api.entered(client.session("sum", durability="sync")) as s:
            store.away = True
            timer = back_after(store, 0.6)
            assert (await api.value(s.step(ONE)))[0] == 1
            timer.join()


async def test_a_step_whose_store_stays_away_says_so_after_the_resume_timeout(api, server, store):
    async with api.entered(api.connect(server.target, resume_timeout_s=0.3)) as client:
        async with api.entered(client.session("sum", durability="sync", detach_on_exit=True)) as s:
            store.away = True
            with pytest.raises(conveyor.StoreUnavailable, match="gave up"):
                await api.value(s.step(ONE))
            store.away = False


async def test_a_step_that_finds_no_room_is_not_sent(api, server, store):
    async with api.entered(api.connect(server.target, timeout_s=0.1, resend_buffer_bytes=16)) as client:
        async with api.entered(client.session("sum")) as s:
            store.away = True
            assert [(await api.value(s.step(ONE)))[0] for _ in range(2)] == [1, 2]
            with pytest.raises(conveyor.StepTimeout, match=r"not in the server's store.*nothing was sent"):
                await api.value(s.step(ONE))
            store.away = False
            assert [y[0] async for y in api.each(s.stream([ONE] * 10))] == list(range(3, 13))
        async with api.entered(client.population("sum", 2)) as p:
            store.away = True
            await api.value(p.step([ONE, ONE]))
            with pytest.raises(conveyor.StepTimeout, match=r"not in the server's store.*nothing was sent"):
                await api.value(p.step([ONE, ONE]))
            store.away = False


async def test_a_flush_may_have_a_timeout_of_its_own_and_the_session_goes_on(api, server, store):
    async with api.entered(api.connect(server.target)) as client:
        async with api.entered(client.session("sum")) as s, api.entered(client.population("sum", 2)) as p:
            await api.value(s.step(ONE))
            await api.value(p.step([ONE, ONE]))
            store.away = True
            for flush in (s.flush, p.flush):
                with pytest.raises(conveyor.CallTimeout, match=r"not stored within 0\.05 s"):
                    await api.value(flush(timeout_s=0.05))
            store.away = False
            assert await api.value(s.flush()) == 1
            assert (await api.value(p.flush())).tolist() == [1, 1]


async def test_unary_calls_wait_for_the_store_too(api, server, store):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        await api.value(s.step(ONE))
        snapshot = await api.value(s.snapshot())
        store.away = True
        timer = back_after(store, 0.2)
        async with api.entered(client.restore(snapshot)) as again:
            assert (await api.value(again.step(ONE)))[0] == 2
        timer.join()


async def test_a_farewell_with_a_token_moves_sessions(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        await api.value(s.step(ONE))
        server.go_away("moved")
        assert [y[0] async for y in api.each(s.stream([ONE] * 9))] == list(range(2, 11))
        assert server.fake.resume_tokens == ["moved"]


async def test_a_server_of_before_there_was_durability_keeps_nothing(api, grpc_server, monkeypatch):
    info = type(grpc_server.fake.create("old", "sum")).info

    def without(self):
        message = info(self)
        message.ClearField("durability")
        message.ClearField("resident")
        return message

    monkeypatch.setattr(type(grpc_server.fake.sessions["old"]), "info", without)
    async with api.entered(api.connect(grpc_server.target)) as client:
        async with api.entered(client.session(session_id="old", resume=True)) as s:
            assert (s.info.durability, s.info.resident, s.durable_seq) == ("none", False, 0)
            with pytest.raises(conveyor.NotDurable):
                await api.value(s.flush())


@pytest.mark.parametrize("away_s", [0.2, 1.2])
async def test_a_server_that_comes_back_is_found_soon(api, new_grpc_server, away_s):
    """Where the connection itself is refused in between: neither gRPC's pauses nor ours add seconds."""
    first = new_grpc_server(0)
    port = first.port
    async with api.entered(api.connect(first.target)) as client, api.entered(client.session("sum")) as s:
        assert (await api.value(s.step(ONE)))[0] == 1
        sessions = first.fake.sessions
        first.stop()
        back = []

        def come_back():
            second = new_grpc_server(port)
            second.fake.sessions = sessions
            back.append(time.monotonic())

        timer = threading.Timer(away_s, come_back)
        timer.start()
        assert (await api.value(s.step(ONE)))[0] == 2
        late_s = time.monotonic() - back[0]
        timer.join()
        assert late_s < 1.5


def test_options_are_what_the_contract_calls_them():
    from conveyor._info import session_options

    assert session_options(durability="sync").durability == pb.DURABILITY_SYNC
    assert session_options().durability == pb.DURABILITY_UNSPECIFIED
