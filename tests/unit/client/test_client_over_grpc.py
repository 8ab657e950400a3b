"""Both clients against a server behind real gRPC: each test runs blocking and with asyncio."""
# ruff: noqa: SIM117 - a session in its client reads as it is.

import asyncio
import contextlib

import conveyor
import conveyor.aio
import grpc
import numpy as np
import pytest
from conveyor_proto.v1 import session_pb2 as pb

ONE = np.array([1, 0], np.float32)


@pytest.fixture
def server(grpc_server):
    return grpc_server


def sums(count, start=0):
    return [[start + number + 1, 0] for number in range(count)]


async def test_tokens_chunks_and_streams(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        assert (await api.value(s.step([1, 0]))).tolist() == [1, 0]
        chunk = await api.value(s.step(np.tile(ONE, (3, 1))))
        assert chunk.dtype == np.float32
        assert chunk.tolist() == sums(3, 1)
        assert [y.tolist() async for y in api.each(s.stream([ONE] * 20))] == sums(20, 4)
        assert s.applied_seq == 22
        assert (s.info.model, s.info.applied_seq, s.info.max_in_flight) == ("sum", 0, 4)
        assert (await api.value(s.refresh())).applied_seq == 22
        assert server.fake.sessions.keys() == {s.id}
    assert server.fake.sessions == {}


async def test_several_inputs_and_outputs_go_by_name(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("mix")) as s:
        y = await api.value(s.step({"x": [1, 2], "token": 5, "gain": 10}))
        assert y["y"].tolist() == [10, 20]
        assert y["last"] == 5
        with pytest.raises(conveyor.InvalidInput, match="'token' is missing"):
            await api.value(s.step({"x": [1, 2], "gain": 10}))
        assert s.applied_seq == 1


@pytest.mark.parametrize("cut_after", range(8))
async def test_a_cut_anywhere_loses_and_repeats_nothing(api, server, cut_after):
    async with api.entered(api.connect(server.target)) as client:
        server.cut_after = cut_after
        async with api.entered(client.session("sum")) as s:
            assert [y.tolist() async for y in api.each(s.stream([ONE] * 10))] == sums(10)
    assert server.fake.sessions == {}


async def test_the_next_stream_pulls_nothing_that_it_cannot_send(api, server):
    server.fake.credit = 3
    pulled = []

    def chunks():
        for number in range(10):
            pulled.append(number)
            yield ONE

    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        answers = 0
        async for _ in api.each(s.stream(chunks())):
            answers += 1
            assert len(pulled) <= answers + 3
        assert answers == 10
        pulled.clear()
        async for _ in api.each(s.stream(chunks(), in_flight=1)):
            assert len(pulled) <= 1
            pulled.clear()


async def test_leaving_a_stream_early_keeps_the_session(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        stream = s.stream([ONE] * 10, in_flight=2)
        await anext(api.each(stream))
        await api.value(stream.aclose() if hasattr(stream, "aclose") else stream.close())
        sent = server.fake.steps_received
        assert sent <= 3
        assert (await api.value(s.step(ONE)))[0] == s.applied_seq


async def test_a_refused_step_raises_and_the_session_goes_on(api, server, refused):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        server.fake.failures[s.id, 3] = refused("MODEL_FAILED", model="sum")
        answers = api.each(s.stream([ONE] * 10))
        assert [(await anext(answers))[0], (await anext(answers))[0]] == [1, 2]
        with pytest.raises(conveyor.ModelFailed) as error:
            await anext(answers)
        assert error.value.metadata == {"model": "sum"}
        assert (await api.value(s.step(ONE)))[0] == 3
        assert s.applied_seq == 3


async def test_a_bad_chunk_in_a_stream_raises_in_its_place(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        with pytest.raises(conveyor.InvalidInput):
            async for _ in api.each(s.stream([ONE, [1, 2, 3]])):
                pass
        assert (await api.value(s.step(ONE)))[0] == 2


async def test_sessions_are_forked_snapshotted_and_restored(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        await api.value(s.step(ONE))
        snapshot = await api.value(s.snapshot())
        await api.value(s.step(ONE))
        async with api.entered(s.fork()) as twin, api.entered(client.restore(snapshot, session_id="old")) as old:
            assert (await api.value(twin.step(ONE)))[0] == 3
            assert (await api.value(old.step(ONE)))[0] == 2
            assert (twin.applied_seq, old.applied_seq) == (3, 2)
            assert old.id == "old"
        with pytest.raises(conveyor.SnapshotInvalid):
            async with api.entered(client.restore(b"nonsense")):
                pass
        with pytest.raises(conveyor.SessionExists):
            async with api.entered(s.fork(session_id=s.id)):
                pass
    assert all(metadata["x-session-id"] for metadata in server.unary_metadata if "x-session-id" in metadata)


async def test_a_session_outlives_its_client_and_is_resumed(api, server):
    async with api.entered(api.connect(server.target)) as client:
        async with api.entered(client.session("sum", session_id="mine", detach_on_exit=True)) as s:
            await api.value(s.step(ONE))
    async with api.entered(api.connect(server.target)) as client:
        with pytest.raises(conveyor.SessionExists):
            async with api.entered(client.session("sum", session_id="mine")):
                pass
        async with api.entered(client.session(session_id="mine", resume=True)) as s:
            assert s.applied_seq == 1
            assert (await api.value(s.step(ONE)))[0] == 2
        with pytest.raises(conveyor.SessionClosed):
            async with api.entered(client.session(session_id="mine", resume=True)):
                pass


async def test_an_abandoned_session_stays_for_a_successor(api, server):
    async with api.entered(api.connect(server.target)) as first, api.entered(api.connect(server.target)) as second:
        async with api.entered(first.session("sum", session_id="s", detach_on_exit=True)) as mine:
            await api.value(mine.step(ONE))
            async with api.entered(second.session("sum", session_id="s", resume="or-create")) as theirs:
                with pytest.raises(conveyor.SessionTakenOver):
                    await api.value(mine.step(ONE))
                assert (await api.value(theirs.step(ONE)))[0] == 2


async def test_models_and_sessions(api, server):
    async with api.entered(api.connect(server.target)) as client:
        models = await api.value(client.models())
        assert [(m.name, m.version, m.status, m.latest) for m in models] == [
            ("sum", "1", "ready", True),
            ("mix", "1", "ready", True),
        ]
        assert (await api.value(client.model("mix"))).spec.digest == "7" * 64
        assert (await api.value(client.load_model("sum"))).name == "sum"
        with pytest.raises(conveyor.ModelNotFound) as error:
            await api.value(client.model("nope"))
        assert error.value.metadata["available"] == "sum, mix"
        async with contextlib.AsyncExitStack() as stack:
            for number in range(5):
                await stack.enter_async_context(api.entered(client.session("sum", session_id=f"s{number}")))
            found = [info.id async for info in api.each(client.sessions())]
            assert found == [f"s{number}" for number in range(5)]
            assert [info async for info in api.each(client.sessions(model="mix"))] == []
            with pytest.raises(conveyor.ModelInUse):
                await api.value(client.unload_model("sum", "1"))
            assert await api.value(client.unload_model("sum", "1", force=True)) == 5


async def test_sessions_share_a_stream_unless_they_ask_for_their_own(api, server):
    metadata = (("authorization", "me"),)
    async with api.entered(api.connect(server.target, metadata=metadata)) as client:
        async with api.entered(client.session("sum")) as one, api.entered(client.session("sum")) as two:
            await api.value(one.step(ONE))
            await api.value(two.step(ONE))
            assert len(server.metadata) == 1
            async with api.entered(client.session("sum", session_id="routed", own_stream=True)) as own:
                await api.value(own.step(ONE))
        assert ["x-session-id" in each for each in server.metadata] == [False, True]
        assert server.metadata[1]["x-session-id"] == "routed"
        assert {each["authorization"] for each in server.metadata} == {"me"}
    async with api.entered(api.connect(server.target, streams_per_client=2)) as client:
        async with api.entered(client.session("sum")), api.entered(client.session("sum")):
            pass
    assert len(server.metadata) == 4


async def test_a_farewell_moves_sessions_to_the_next_stream(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        await api.value(s.step(ONE))
        server.go_away()
        assert [y[0] async for y in api.each(s.stream([ONE] * 9))] == list(range(2, 11))
        assert len(server.metadata) == 2


async def test_no_server_is_told_within_the_connect_timeout(api):
    async with api.entered(api.connect("127.0.0.1:1", connect_timeout_s=0.2)) as client:
        with pytest.raises(conveyor.ConnectionLost, match=r"127\.0\.0\.1:1"):
            async with api.entered(client.session("sum")):
                pass
        with pytest.raises(conveyor.ConnectionLost, match="ListModels"):
            await api.value(client.models())


async def test_calls_are_repeated_while_the_server_is_away_for_a_moment(api, server):
    async with api.entered(api.connect(server.target)) as client:
        server.unavailable = 2
        assert len(await api.value(client.models())) == 2
        server.unavailable = 1
        with pytest.raises(conveyor.ConnectionLost):
            await api.value(client.unload_model("sum", "1"))


async def test_a_server_that_stays_away_is_told_and_the_session_can_be_resumed(api, server):
    async with api.entered(api.connect(server.target, resume_timeout_s=0.2)) as client:
        async with api.entered(client.session("sum", session_id="s")) as s:
            await api.value(s.step(ONE))
            server.stream_status = (grpc.StatusCode.UNAVAILABLE, "away")
            server.cut()
            with pytest.raises(conveyor.ConnectionLost, match="away"):
                await api.value(s.step(ONE))
            with pytest.raises(conveyor.ConnectionLost):
                await api.value(s.step(ONE))
            server.stream_status = None
            async with api.entered(client.session(session_id="s", resume=True, detach_on_exit=True)) as again:
                assert again.applied_seq == 1
        assert server.fake.sessions.keys() == {"s"}, "a session that was lost is not closed behind its successor"
        await api.value(s.close())
        assert server.fake.sessions == {}


async def test_an_idle_session_goes_on_after_the_link_was_given_up(api, server):
    async with api.entered(api.connect(server.target, resume_timeout_s=0.1)) as client:
        async with api.entered(client.session("sum")) as s:
            await api.value(s.step(ONE))
            server.stream_status = (grpc.StatusCode.UNAVAILABLE, "away")
            server.cut()
            with pytest.raises(conveyor.ConnectionLost):
                async with api.entered(client.session("sum")):
                    pass
            server.stream_status = None
            assert (await api.value(s.step(ONE)))[0] == 2


async def test_a_stream_that_is_forbidden_is_told_at_once(api, server):
    server.stream_status = (grpc.StatusCode.PERMISSION_DENIED, "not you")
    async with api.entered(api.connect(server.target)) as client:
        with pytest.raises(conveyor.ConveyorError, match="not you") as error:
            async with api.entered(client.session("sum")):
                pass
        assert error.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_server_that_makes_no_sense_is_told_to_whoever_waits(api, server, monkeypatch):
    monkeypatch.setattr(type(server)._stream_type, "_step", lambda self, _: self.out(pb.StreamResponse()))
    async with api.entered(api.connect(server.target)) as client:
        s = await api.value(client.session("sum"))
        with pytest.raises(conveyor.ProtocolError, match="does not know"):
            await api.value(s.step(ONE))
        monkeypatch.undo()
        async with api.entered(client.session("sum")) as another:
            assert (await api.value(another.step(ONE)))[0] == 1


async def test_a_mute_server_is_given_up_after_the_timeout(api, server):
    async with api.entered(api.connect(server.target, timeout_s=0.15)) as client:
        async with api.entered(client.session("sum")) as s:
            server.mute = True
            with pytest.raises(conveyor.CallTimeout, match="resume session"):
                await api.value(s.step(ONE))
            with pytest.raises(conveyor.CallTimeout):
                await api.value(s.step(ONE))
            with pytest.raises(conveyor.CallTimeout, match="not opened"):
                async with api.entered(client.session("sum")):
                    pass
            server.mute = False


async def test_a_call_may_have_a_timeout_of_its_own(api, server):
    async with api.entered(api.connect(server.target)) as client:
        s = await api.value(client.session("sum"))
        server.mute = True
        for late in (
            lambda: client.session("sum", timeout_s=0.05),
            lambda: client.population("sum", 2, timeout_s=0.05),
            lambda: s.fork(timeout_s=0.05),
            lambda: s.close(timeout_s=0.05),
        ):
            with pytest.raises(conveyor.CallTimeout, match=r"0\.05 s"):
                await api.value(late())
        with server.lock, pytest.raises(conveyor.CallTimeout, match="ListModels"):
            await api.value(client.models(timeout_s=0.05))


async def test_closing_does_not_wait_for_a_server_that_is_away(api, server):
    client = api.connect(server.target)
    s = await api.value(client.session("sum"))
    server.stream_status = (grpc.StatusCode.UNAVAILABLE, "away")
    server.cut()
    async with asyncio.timeout(5):
        await api.value(client.close())
    with pytest.raises(conveyor.ClientClosed):
        await api.value(s.step(ONE))


async def test_a_steps_timeout_travels_in_the_message(api, server, monkeypatch):
    seen = []
    stream_type = type(server)._stream_type
    kept = stream_type._step

    def step(self, message):
        seen.append(message.timeout_ms)
        kept(self, message)

    monkeypatch.setattr(stream_type, "_step", step)
    async with api.entered(api.connect(server.target)) as client, api.entered(client.session("sum")) as s:
        await api.value(s.step(ONE))
        await api.value(s.step(ONE, timeout_s=0.25))
        [y async for y in api.each(s.stream([ONE], timeout_s=2))]
    assert seen == [0, 250, 2000]


async def failing(api, client, server):
    async with api.entered(client.session("sum")):
        server.mute = True
        raise ZeroDivisionError


async def test_what_ended_the_block_is_not_hidden_by_the_closing(api, server):
    async with api.entered(api.connect(server.target, timeout_s=0.1)) as client:
        with pytest.raises(ZeroDivisionError) as error:
            await failing(api, client, server)
        assert "could not be left in order" in error.value.__notes__[0]


async def test_closing_the_client_tells_whoever_waits_and_keeps_sessions(api, server):
    client = api.connect(server.target)
    s = await api.value(client.session("sum", session_id="kept"))
    await api.value(s.step(ONE))
    await api.value(client.close())
    await api.value(client.close())
    with pytest.raises(conveyor.ClientClosed):
        await api.value(s.step(ONE))
    with pytest.raises(conveyor.ClientClosed):
        await api.value(client.session("sum"))
    assert server.fake.sessions.keys() == {"kept"}


async def test_a_population_steps_in_columns(api, server):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.population("sum", 3)) as p:
        assert len(p) == 3
        assert (await api.value(p.step(np.tile(ONE, (3, 1))))).tolist() == [[1, 0]] * 3
        assert (await api.value(p.step(np.tile(ONE, (3, 4, 1))))).shape == (3, 4, 2)
        ragged = await api.value(p.step([np.tile(ONE, (1, 1)), np.tile(ONE, (2, 1))], rows=[2, 0]))
        assert [part[:, 0].tolist() for part in ragged] == [[6], [6, 7]]
        packed, lengths = await api.value(p.step((np.tile(ONE, (3, 1)), [1, 2]), rows=np.array([True, True, False])))
        assert packed[:, 0].tolist() == [8, 6, 7]
        assert lengths.tolist() == [1, 2]
        assert p.applied_seq.tolist() == [4, 3, 3]
        server.cut_after = 5
        outputs = [y[:, 0].tolist() async for y in api.each(p.stream([np.tile(ONE, (3, 1))] * 10))]
        assert outputs == [[8 + n, 7 + n, 6 + n] for n in range(1, 11)]
    assert server.fake.sessions == {}


async def test_a_row_that_fails_carries_the_others_results(api, server, refused):
    x = np.tile(ONE, (3, 1))
    async with api.entered(api.connect(server.target)) as client, api.entered(client.population("sum", 3)) as p:
        server.fake.failures[p.ids[1], 1] = refused("INPUT_NON_FINITE", input="x")
        with pytest.raises(conveyor.RowsFailed, match="1 of 3 rows failed; row 1") as error:
            await api.value(p.step(x))
        assert isinstance(error.value.errors[1], conveyor.InvalidInput)
        assert error.value.outputs[:, 0].tolist() == [1, 0, 1]
        assert error.value.succeeded.tolist() == [True, False, True]
        assert (await api.value(p.step(x)))[:, 0].tolist() == [2, 1, 2]

        server.fake.failures[p.ids[0], 4] = refused("MODEL_FAILED")
        with pytest.raises(conveyor.RowsFailed) as error:
            async for _ in api.each(p.stream([x] * 6)):
                pass
        assert error.value.succeeded.tolist() == [False, True, True]
        assert [type(each) for each in error.value.later] == [conveyor.RowsFailed] * len(error.value.later)
        assert p.applied_seq[1] == 1 + 2 + len(error.value.later)

        server.fake.failures[p.ids[2], int(p.applied_seq[2]) + 1] = refused("MODEL_FAILED")
        outcomes = [each async for each in api.each(p.stream([x] * 2, in_flight=1, on_error="yield"))]
        assert [type(each) for each in outcomes] == [conveyor.RowsFailed, np.ndarray]


async def test_a_population_that_cannot_open_leaves_nothing(api, server):
    async with api.entered(api.connect(server.target)) as client:
        async with api.entered(client.session("sum", session_id="b")):
            with pytest.raises(conveyor.SessionExists):
                async with api.entered(client.population("sum", session_ids=["a", "b", "c"])):
                    pass
        async with api.entered(client.population("sum", session_ids=["a", "b"], detach_on_exit=True)):
            pass
        assert server.fake.sessions.keys() == {"a", "b"}
        async with api.entered(client.population(session_ids=["b", "a"], resume=True)) as p:
            assert p.ids == ["b", "a"]
            assert p.row_errors == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "name of a model"),
        ({"model": "sum", "resume": True}, "session_id"),
        ({"resume": "or-create", "session_id": "s"}, "name of a model"),
    ],
)
async def test_what_cannot_be_meant_is_refused_before_any_call(api, arguments, words):
    async with api.entered(api.connect("127.0.0.1:1")) as client:
        with pytest.raises(ValueError, match=words):
            client.session(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "sum"}, "needs n"),
        ({"model": "sum", "n": 0}, "one or more"),
        ({"model": "sum", "n": 2, "session_ids": ["a"]}, "n is 2 and 1 ids"),
        ({"model": "sum", "session_ids": ["a", "a"]}, "different ids"),
        ({"n": 2, "resume": True}, "session_ids"),
    ],
)
async def test_populations_that_cannot_be_meant(api, arguments, words):
    async with api.entered(api.connect("127.0.0.1:1")) as client:
        with pytest.raises(ValueError, match=words):
            client.population(**arguments)


@pytest.mark.parametrize("rows", [[], [0, 0], [3], [-1], [[0]], [True, False], [0.5]])
async def test_rows_that_cannot_be_meant(api, server, rows):
    async with api.entered(api.connect(server.target)) as client, api.entered(client.population("sum", 3)) as p:
        with pytest.raises(ValueError, match="row"):
            await api.value(p.step(np.tile(ONE, (len(rows), 1)), rows=rows))


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": 0},
        {"connect_timeout_s": -1},
        {"resume_timeout_s": -1},
        {"streams_per_client": 0},
        {"resend_buffer_bytes": 0},
    ],
)
def test_settings_that_cannot_be_meant(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        conveyor.connect("127.0.0.1:1", **settings)
