"""All steps of a turn, from many streams at once: read, judged and answered as if each had come alone."""

import asyncio
import random

import numpy as np
import pytest
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2
from google.rpc import code_pb2, status_pb2

FIRST = 10.0


class Paper:
    """An outlet that keeps what it is given, so that whole turns can be written by hand."""

    def __init__(self) -> None:
        self.responses: list[pb.StreamResponse] = []
        self.status: status_pb2.Status | None = None
        self.closed = False
        self.failed = asyncio.Event()
        self._more = asyncio.Event()

    def put(self, message: bytes) -> None:
        if not self.closed:
            self.responses.append(pb.StreamResponse.FromString(message))
            self._more.set()

    def close(self) -> None:
        self.closed = True

    def fail(self, status: status_pb2.Status) -> None:
        self.status = status
        self.failed.set()
        self.close()

    async def take(self, count: int) -> list[pb.StreamResponse]:
        async with asyncio.timeout(20):
            while len(self.responses) < count:
                self._more.clear()
                await self._more.wait()
        taken, self.responses = self.responses[:count], self.responses[count:]
        return taken


class Streams:
    """Streams of a server, each with one session; what they receive before they are awaited comes in one turn."""

    def __init__(self, server, count: int, models=("sum",)) -> None:
        self.papers = [Paper() for _ in range(count)]
        self.calls = [server.grpc._streams.enter(paper, {}) for paper in self.papers]
        for index, (call, paper) in enumerate(zip(self.calls, self.papers, strict=True)):
            attach(call, paper, 1, models[index % len(models)], f"s{index}")

    def send(self, index: int, seq: int, *values: float, handle: int = 1, **fields) -> None:
        self.calls[index].receive(step(handle, seq, *values, **fields))

    async def answers(self, count: int = 1) -> list:
        """The next messages of each stream: totals, or a fault with its seq."""
        return [[told(response) for response in await paper.take(count)] for paper in self.papers]


def attach(call, paper: Paper, handle: int, model: str, session_id: str) -> None:
    request = pb.AttachSession(handle=handle, mode=pb.AttachSession.MODE_CREATE, model=model, session_id=session_id)
    call.receive(pb.StreamRequest(attach=request).SerializeToString())
    assert paper.responses.pop().HasField("attached")


def step(handle: int, seq: int, *values: float, **fields) -> bytes:
    tensor = tensor_pb2.Tensor(data=np.array(values, np.float64).tobytes())
    return pb.StreamRequest(step=pb.Step(handle=handle, seq=seq, inputs=[tensor], **fields)).SerializeToString()


def told(response: pb.StreamResponse):
    if response.HasField("result"):
        return np.frombuffer(response.result.outputs[0].data, np.float64).tolist()
    assert response.HasField("error"), response
    return response.error.seq, from_status(response.error.status).reason


@pytest.fixture
async def quick(make_server):
    return await make_server(inline_run_s=10.0)


async def test_steps_of_one_turn_are_one_run(quick) -> None:
    streams = Streams(quick, 30)
    for turn in range(1, 4):
        for index in range(30):
            streams.send(index, turn, float(index))
        assert await streams.answers() == [[[FIRST + turn * index]] for index in range(30)]
    assert quick.runner.rows == [30] * 3


async def test_steps_of_one_stream_keep_their_order_whatever_their_size(quick) -> None:
    """Steps of some sizes can be read together and others cannot; a session's are taken as they came."""
    streams = Streams(quick, 6)
    values = [[1.0], [1.0, 1.0], [2.0], [1.0] * 20, [3.0], [4.0], [1.0] * 3]
    for seq, row in enumerate(values, 1):
        for index in range(6):
            streams.send(index, seq, *row)
    expected, total = [], FIRST
    for row in values:
        expected.append((total + np.cumsum(row)).tolist())
        total += sum(row)
    assert await streams.answers(len(values)) == [expected] * 6


async def test_models_whose_steps_look_alike_are_told_apart(quick) -> None:
    streams = Streams(quick, 20, models=("sum", "other"))
    for seq in (1, 2):
        for index in range(20):
            streams.send(index, seq, float(index))
        assert await streams.answers() == [[[FIRST + seq * index]] for index in range(20)]
    assert quick.runners["sum"].rows == quick.runners["other"].rows == [10, 10]


async def test_a_row_that_is_not_finite_is_refused_among_many(quick) -> None:
    streams = Streams(quick, 16)
    for index in range(16):
        streams.send(index, 1, float("nan") if index == 5 else float("inf") if index == 9 else 1.0)
    answers = await streams.answers()
    refused = (1, e.ERROR_REASON_INPUT_NON_FINITE)
    assert answers == [[refused if index in {5, 9} else [11.0]] for index in range(16)]
    for index in range(16):
        streams.send(index, 1 if index in {5, 9} else 2, 1.0)
    assert await streams.answers() == [[[11.0] if index in {5, 9} else [12.0]] for index in range(16)]


@pytest.mark.parametrize("all_of_them", [False, True])
async def test_bytes_that_are_no_message_end_their_own_stream_only(quick, all_of_them) -> None:
    streams = Streams(quick, 12)
    good = step(1, 1, 1.0)
    bad = good[:-9] + b"\x22\x63" + good[-7:]
    assert len(bad) == len(good)
    spoiled = set(range(12)) if all_of_them else {0, 7}
    for index, call in enumerate(streams.calls):
        call.receive(bad if index in spoiled else good)
    for index, paper in enumerate(streams.papers):
        if index in spoiled:
            async with asyncio.timeout(20):
                await paper.failed.wait()
            assert (paper.status.code, paper.responses) == (code_pb2.INVALID_ARGUMENT, [])
            assert from_status(paper.status).reason == e.ERROR_REASON_MESSAGE_INVALID
        else:
            assert [told(response) for response in await paper.take(1)] == [[11.0]]


async def test_handles_and_seqs_that_are_wrong_are_refused_among_many(quick) -> None:
    streams = Streams(quick, 10)
    for index in range(10):
        if index == 2:
            streams.send(index, 1, 1.0, handle=99)
        elif index == 4:
            streams.send(index, 7, 1.0)
        elif index == 6:
            streams.send(index, 0, 1.0)
        else:
            streams.send(index, 1, 1.0)
    answers = await streams.answers()
    assert answers[2] == [(1, e.ERROR_REASON_HANDLE_UNKNOWN)]
    assert answers[4] == [(7, e.ERROR_REASON_STEP_GAP)]
    assert answers[6] == [(0, e.ERROR_REASON_MESSAGE_INVALID)]
    assert all(answers[index] == [[11.0]] for index in range(10) if index not in {2, 4, 6})


async def test_a_step_and_its_repetition_in_one_turn(quick) -> None:
    streams = Streams(quick, 8)
    for index in range(8):
        streams.send(index, 1, 1.0)
        streams.send(index, 1, 2.0 if index == 3 else 1.0)
    for index, paper in enumerate(streams.papers):
        responses = await paper.take(2)
        if index == 3:
            assert {str(told(response)) for response in responses} == {
                "[11.0]",
                str((1, e.ERROR_REASON_STEP_CONFLICT)),
            }
        else:
            assert [(told(response), response.result.replayed) for response in responses] == [
                ([11.0], False),
                ([11.0], True),
            ]


async def test_what_follows_a_step_finds_it_accepted(quick) -> None:
    """A detach, a close, a frame or a half-close that comes in the same turn comes behind the steps before it."""
    streams = Streams(quick, 8)
    for index in range(8):
        streams.send(index, 1, 1.0)
    streams.calls[0].receive(pb.StreamRequest(detach=pb.DetachSession(handle=1)).SerializeToString())
    streams.calls[1].receive(pb.StreamRequest(close=pb.CloseAttachedSession(handle=1)).SerializeToString())
    streams.calls[2].half_close()
    for index, kinds in ((0, ["result", "detached"]), (1, ["result", "detached"]), (2, ["result", "detached", "end"])):
        responses = await streams.papers[index].take(len(kinds))
        assert [response.WhichOneof("kind") for response in responses] == kinds
        assert responses[1].detached.applied_seq == 1
    for paper in streams.papers[3:]:
        assert [told(response) for response in await paper.take(1)] == [[11.0]]


async def test_timeouts_and_acknowledgements_travel_with_each(make_server) -> None:
    server = await make_server()
    streams = Streams(server, 9)
    server.runner.gate.clear()
    streams.send(8, 1, 1.0)
    await server.run_entered()
    for index in range(8):
        streams.send(index, 1, 1.0, timeout_ms=30 if index < 4 else 30_000)
    for paper in streams.papers[:4]:
        assert [told(response) for response in await paper.take(1)] == [(1, e.ERROR_REASON_STEP_TIMEOUT)]
    server.runner.gate.set()
    for paper in streams.papers[4:]:
        assert [told(response) for response in await paper.take(1)] == [[11.0]]
    for index in range(4, 8):
        streams.send(index, 2, 1.0, acked_seq=index % 2)
    for index in range(4, 8):
        await streams.papers[index].take(1)
        assert server.directory.sessions[f"s{index}"].answers.oldest_seq == 1 + index % 2


@pytest.mark.parametrize("seed", range(12))
async def test_any_turns_give_what_each_session_alone_would(quick, seed) -> None:
    """Sessions of two models on a few streams; steps of any length, good and bad, in turns of any size."""
    chance = random.Random(seed)
    streams = Streams(quick, 4, models=("sum", "other"))
    sessions = [(index, 1) for index in range(4)]
    for index in range(4):
        for handle in (2, 200, 70_000):
            attach(
                streams.calls[index],
                streams.papers[index],
                handle,
                chance.choice(["sum", "other"]),
                f"{index}.{handle}",
            )
            sessions.append((index, handle))
    seqs, totals = (dict.fromkeys(sessions, value) for value in (0, FIRST))
    expected: dict[tuple[int, int], list] = {session: [] for session in sessions}
    got: dict[tuple[int, int], list] = {session: [] for session in sessions}
    for _ in range(25):
        count = 0
        for session in chance.choices(sessions, k=chance.randint(1, 24)):
            values = [float(chance.randint(1, 9))] * chance.choice([1, 1, 1, 2, 3, 11])
            bad = chance.random() < 0.1
            seq = seqs[session] + 1
            if len(expected[session]) - len(got[session]) > 10:
                # Within the credit.
                continue
            streams.send(session[0], seq, *([float("nan")] if bad else values), handle=session[1])
            count += 1
            if bad:
                expected[session].append((seq, e.ERROR_REASON_INPUT_NON_FINITE))
                continue
            expected[session].append((totals[session] + np.cumsum(values)).tolist())
            totals[session] += sum(values)
            seqs[session] = seq
        if chance.random() < 0.7:
            await collect(streams, expected, got)
    await collect(streams, expected, got)
    # Refusals come at once and answers when they are run: each kind is in order.
    for session in sessions:
        for kind in (list, tuple):
            assert [item for item in got[session] if isinstance(item, kind)] == [
                item for item in expected[session] if isinstance(item, kind)
            ]


async def collect(streams: Streams, expected: dict, got: dict) -> None:
    for index, paper in enumerate(streams.papers):
        missing = sum(len(expected[session]) - len(got[session]) for session in expected if session[0] == index)
        for response in await paper.take(missing):
            kind = response.result if response.HasField("result") else response.error
            got[index, kind.handle].append(told(response))


async def test_layouts_of_many_forms_do_not_pile_up(quick) -> None:
    streams = Streams(quick, 5)
    seq = 0
    for length in range(1, 60):
        for timeout_ms in (0, 1000 + length):
            seq += 1
            for index in range(5):
                streams.send(index, seq, *[0.0] * length, timeout_ms=timeout_ms)
            assert await streams.answers() == [[[FIRST] * length]] * 5
    intake = quick.grpc._streams._intake
    assert len(intake._forms) <= 256
    assert all(len(forms) <= 8 for forms in intake._forms._forms.values())
