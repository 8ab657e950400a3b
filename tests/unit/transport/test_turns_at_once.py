"""Whole turns whose steps nothing is before: run where they arrive, in one call; all others the ordinary way.

Whoever sends them cannot tell, and neither can whoever reads the metrics.
"""

import asyncio

import numpy as np
import pytest
from conveyor_proto.codec import encode
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server.metrics import Tally

from tests.unit.transport.test_intake import FIRST, Paper, Streams, attach, step, told

STREAMS = 30
# The session whose steps keep the engine busy.
BLOCKER = "blocker"


class Spy:
    """Notes which way steps went: rows of offers that ran at once, of those that were tried, and of those that flew.

    A lone step is as an offer of one; the ordinary way, it is submitted.
    """

    def __init__(self, server, monkeypatch) -> None:
        self.at_once: list[int] = []
        self.in_vain: list[int] = []
        self.flew: list[int] = []
        self.offered = asyncio.Event()
        directory = server.directory
        run_turn, run_now, offer, run_one_now, submit = (
            directory.run_turn,
            directory.run_now,
            directory.offer,
            directory.run_one_now,
            directory.submit,
        )

        def noted_run_turn(turn, now):
            staging = run_turn(turn, now)
            (self.in_vain if staging is None else self.at_once).append(turn.rows)
            return staging

        def noted_run_now(steps, now):
            outputs = run_now(steps, now)
            (self.in_vain if outputs is None else self.at_once).append(len(steps.rows))
            return outputs

        def noted_offer(steps, now):
            self.flew.append(len(steps.rows))
            self.offered.set()
            return offer(steps, now)

        def noted_run_one_now(seat, step, now):
            outputs = run_one_now(seat, step, now)
            (self.in_vain if outputs is None else self.at_once).append(1)
            return outputs

        def noted_submit(session, step, now):
            if session.id != BLOCKER:
                self.flew.append(1)
                self.offered.set()
            submit(session, step, now)

        monkeypatch.setattr(directory, "run_turn", noted_run_turn)
        monkeypatch.setattr(directory, "run_now", noted_run_now)
        monkeypatch.setattr(directory, "offer", noted_offer)
        monkeypatch.setattr(directory, "run_one_now", noted_run_one_now)
        monkeypatch.setattr(directory, "submit", noted_submit)


class Single:
    """A stream with one session, under handle 1."""

    def __init__(self, server, session_id: str, model: str = "sum") -> None:
        self.paper = Paper()
        self.call = server.grpc._streams.enter(self.paper, {})
        attach(self.call, self.paper, 1, model, session_id)


class Way:
    """A server whose turns go one way: `at once`, `elsewhere` because runs take long, or `behind` a batch that is out.

    At once, the compiled part takes what it can, and arrays the rest, or arrays take all.

    Attributes:
        held: steps that were held to keep the engine busy, each a batch of its own.
    """

    def __init__(self, name: str, server, spy: Spy) -> None:
        self.name = name
        self.server = server
        self.spy = spy
        self.held = 0
        # Long, as far as the driver can know.
        server.driver.inline_run_s = 0.0 if name == "elsewhere" else 10.0
        self._blocker = Single(server, BLOCKER) if name == "behind" else None
        self.is_at_once = name in {"at once", "at once, by arrays"}
        if name == "at once, by arrays":
            use_arrays(server)

    async def begin(self) -> None:
        """Before a turn."""
        self.spy.offered.clear()
        if self._blocker is not None:
            driver, runner = self.server.driver, self.server.runner
            runner.gate.clear()
            runner.entered.clear()
            driver.inline_run_s = 0.0
            self.held += 1
            self._blocker.call.receive(step(1, self.held, 1.0))
            await self.server.run_entered()
            driver.inline_run_s = 10.0

    async def end(self) -> None:
        """After a turn was sent, before it is answered."""
        if self._blocker is not None:
            await self.spy.offered.wait()
            assert self.server.engine.busy
            self.server.runner.gate.set()
            (answer,) = await self._blocker.paper.take(1)
            assert told(answer) == [FIRST + self.held]

    def went(self, *rows: int) -> None:
        """Every turn went this way, and was tried no other."""
        taken = self.spy.at_once if self.is_at_once else self.spy.flew
        assert taken == list(rows)
        assert self.spy.in_vain == []
        assert len(self.spy.at_once) + len(self.spy.flew) == len(rows)
        threads = set(self.server.runner.threads)
        assert threads == {"MainThread"} if self.is_at_once else "engine-sum-1_0" in threads

    def counted(self, *, steps: int, time_steps: int, batches: list[int]) -> None:
        """The metrics say so, beside what was held."""
        figures = self.server.metrics.of(self.server.engine)
        steps, batches = steps + self.held, batches + [1] * self.held
        assert (figures.steps, figures.time_steps) == (steps, time_steps + self.held)
        assert values(figures.batch_rows) == (len(batches), sum(batches))
        expected = Tally(figures.batch_rows.bounds)
        for rows in batches:
            expected.observe(rows)
        assert figures.batch_rows.counts == expected.counts
        assert values(figures.batch_share) == (len(batches), len(batches))
        assert values(figures.batch_run)[0] == len(batches)
        for tally in (figures.queue, figures.run, figures.reply):
            assert values(tally)[0] == steps
        assert self.server.metrics.errors == {}


def values(tally: Tally) -> tuple[int, float]:
    return sum(tally.counts), tally.total


def use_arrays(server) -> None:
    """As where the compiled part was not built."""
    server.grpc._streams._intake._turns = None


@pytest.fixture(params=["at once", "at once, by arrays", "elsewhere", "behind"])
def way_of(request, monkeypatch):
    return lambda server: Way(request.param, server, Spy(server, monkeypatch))


async def test_a_turn_of_many_streams_is_one_run_whichever_way_it_goes(server, way_of) -> None:
    way, streams = way_of(server), Streams(server, STREAMS)
    rows = [[1.0], [2.0], [1.0, 2.0, 3.0], [4.0]]
    totals = np.full(STREAMS, FIRST)
    for seq, row in enumerate(rows, 1):
        await way.begin()
        for index in range(STREAMS):
            # A client that claims more than it can hold is answered all the same.
            streams.send(index, seq, *(index * value for value in row), acked_seq=seq - 1 if seq % 2 else seq + 1)
        await way.end()
        expected = totals[:, np.newaxis] + np.cumsum(np.outer(np.arange(STREAMS), row), axis=1)
        assert await streams.answers() == [[each.tolist()] for each in expected]
        totals = expected[:, -1]
    way.went(*[STREAMS] * len(rows))
    way.counted(steps=4 * STREAMS, time_steps=6 * STREAMS, batches=[STREAMS] * 4)
    # Either way the last answer is kept, and the one before it is held by the client.
    for index in range(STREAMS):
        streams.send(index, 4, index * 4.0)
        streams.send(index, 3, *(index * value for value in rows[2]))
    evicted = (3, e.ERROR_REASON_STEP_ANSWER_EVICTED)
    assert await streams.answers(2) == [[[total], evicted] for total in totals]
    assert server.metrics.of(server.engine).replayed == STREAMS


async def test_a_frame_is_one_run_whichever_way_it_goes(server, way_of, make_frame) -> None:
    way, stream = way_of(server), Single(server, "s0")
    for handle in range(2, STREAMS + 1):
        attach(stream.call, stream.paper, handle, "sum", f"s{handle}")
    handles = range(1, STREAMS + 1)
    total = FIRST
    for seq, row in enumerate([[1.0], [1.0, 1.0], [1.0]], 1):
        await way.begin()
        stream.call.receive(request(make_frame(handles, [seq] * STREAMS, [row] * STREAMS)))
        await way.end()
        total += sum(row)
        frame = (await stream.paper.take(1))[0].frame
        assert np.frombuffer(frame.handles, np.uint32).tolist() == list(handles)
        assert np.frombuffer(frame.seqs, np.uint64).tolist() == [seq] * STREAMS
        assert np.frombuffer(frame.columns[1], np.float64).tolist() == [total] * STREAMS
    way.went(*[STREAMS] * 3)
    way.counted(steps=3 * STREAMS, time_steps=4 * STREAMS, batches=[STREAMS] * 3)


async def test_a_train_is_one_row_whichever_way_it_goes(make_server, way_of, make_frame) -> None:
    server = await make_server(timed=True)
    way, stream = way_of(server), Single(server, "s0")
    total = FIRST
    for first in (1, 4):
        await way.begin()
        stream.call.receive(request(make_frame([1] * 3, range(first, first + 3), [[1.0], [2.0], [3.0]])))
        await way.end()
        frame = (await stream.paper.take(1))[0].frame
        assert np.frombuffer(frame.seqs, np.uint64).tolist() == list(range(first, first + 3))
        assert np.frombuffer(frame.columns[0], np.float64).tolist() == [total + 1, total + 3, total + 6]
        total += 6
    way.went(1, 1)
    way.counted(steps=6, time_steps=6, batches=[1, 1])


@pytest.mark.parametrize("handle", [0, 1, 300])
async def test_a_lone_step_is_one_run_whichever_way_it_goes(server, way_of, handle) -> None:
    way, paper = way_of(server), Paper()
    call = server.grpc._streams.enter(paper, {})
    for other in {handle, 5}:
        attach(call, paper, other, "sum", f"s{other}")
    rows = [[1.0], [2.0, -1.0, 4.0], [0.5], [3.0] * 8, [1.0]]
    total, sent, answers = FIRST, [], []
    for seq, row in enumerate(rows, 1):
        await way.begin()
        # A client that claims more than it can hold is answered all the same.
        sent.append(step(handle, seq, *row, acked_seq=seq - 1 if seq % 2 else seq + 1))
        call.receive(sent[-1])
        await way.end()
        expected = total + np.cumsum(row)
        total = float(expected[-1])
        answers += await paper.take(1)
        assert answers[-1] == result_of(handle, seq, expected)
    way.went(*[1] * len(rows))
    way.counted(steps=5, time_steps=14, batches=[1] * 5)
    # Either way the last answer is kept, and the one before it is held by the client.
    call.receive(sent[-1])
    (again,) = await paper.take(1)
    answers[-1].result.replayed = True
    assert again == answers[-1]
    call.receive(sent[-2])
    assert told(*await paper.take(1)) == (4, e.ERROR_REASON_STEP_ANSWER_EVICTED)
    assert server.metrics.of(server.engine).replayed == 1


@pytest.mark.parametrize(
    ("seq", "value", "reason"),
    [
        (3, 1.0, e.ERROR_REASON_STEP_GAP),
        (1, 5.0, e.ERROR_REASON_STEP_CONFLICT),
        (2, "POISON", e.ERROR_REASON_MODEL_FAILED),
        (2, "BUG", e.ERROR_REASON_MODEL_FAILED),
        (2, float("nan"), e.ERROR_REASON_INPUT_NON_FINITE),
    ],
)
async def test_a_lone_step_with_something_amiss_is_tried_once_and_submitted(
    server, monkeypatch, seq, value, reason
) -> None:
    spy, stream = Spy(server, monkeypatch), Single(server, "s0")
    server.driver.inline_run_s = 10.0
    stream.call.receive(step(1, 1, 1.0))
    await stream.paper.take(1)
    stream.call.receive(step(1, seq, getattr(server.runner, value) if isinstance(value, str) else value))
    assert told(*await stream.paper.take(1)) == (seq, reason)
    # What cannot be used is not tried.
    tried = [] if reason == e.ERROR_REASON_INPUT_NON_FINITE else [1]
    assert (spy.at_once, spy.in_vain, spy.flew) == ([1], tried, [1])
    figures = server.metrics.of(server.engine)
    assert (figures.steps, sum(server.metrics.errors.values())) == (1, 1)
    # And the next one goes at once again.
    stream.call.receive(step(1, 2, 1.0))
    assert told(*await stream.paper.take(1)) == [FIRST + 2]
    assert spy.at_once == [1, 1]


@pytest.mark.parametrize("by_arrays", [False, True])
async def test_a_step_that_is_not_all_that_came_goes_with_the_others(
    server, monkeypatch, make_frame, by_arrays
) -> None:
    """Beside another message or a frame it is not run by itself: what comes together runs together."""
    if by_arrays:
        use_arrays(server)
    spy, streams = Spy(server, monkeypatch), [Single(server, "s0"), Single(server, "s1")]
    server.driver.inline_run_s = 10.0
    streams[0].call.receive(step(1, 1, 1.0))
    streams[1].call.receive(step(1, 1, 1.0))
    assert [told(*await stream.paper.take(1)) for stream in streams] == [[FIRST + 1]] * 2
    streams[0].call.receive(step(1, 2, 1.0))
    streams[1].call.receive(request(make_frame([1], [2], [[1.0]])))
    assert told(*await streams[0].paper.take(1)) == [FIRST + 2]
    (answer,) = await streams[1].paper.take(1)
    assert np.frombuffer(answer.frame.columns[0], np.float64).tolist() == [FIRST + 2]
    assert (spy.at_once, spy.in_vain) == ([] if by_arrays else [2], [])
    assert server.runner.rows == [2, 2]


async def test_a_step_too_long_for_one_run_is_submitted(server, monkeypatch) -> None:
    spy, stream = Spy(server, monkeypatch), Single(server, "s0")
    server.driver.inline_run_s = 10.0
    stream.call.receive(step(1, 1, *[1.0] * 9))
    assert told(*await stream.paper.take(1)) == [FIRST + 1 + index for index in range(9)]
    assert (spy.at_once, spy.in_vain, spy.flew) == ([], [], [1])
    assert server.runner.rows == [1, 1]


async def test_what_was_told_about_a_session_before_is_told_before_a_step_that_runs_at_once(
    server, monkeypatch
) -> None:
    """Messages of one turn are answered in their order, though only one of the answers takes the way of events."""
    spy, stream = Spy(server, monkeypatch), Single(server, "s0")
    attach(stream.call, stream.paper, 2, "sum", "s1")
    server.driver.inline_run_s = 10.0
    stream.call.receive(pb.StreamRequest(detach=pb.DetachSession(handle=2)).SerializeToString())
    stream.call.receive(step(1, 1, 1.0))
    detached, answer = await stream.paper.take(2)
    assert detached.detached.handle == 2
    assert told(answer) == [FIRST + 1]
    assert spy.at_once == [1]


async def test_a_turn_with_something_amiss_is_tried_once_and_flies(server, monkeypatch) -> None:
    spy, streams = Spy(server, monkeypatch), Streams(server, STREAMS)
    server.driver.inline_run_s = 10.0
    for index in range(STREAMS):
        streams.send(index, 3 if index == 5 else 1, 1.0)
    answers = await streams.answers()
    assert [answer for index, answer in enumerate(answers) if index != 5] == [[[FIRST + 1]]] * (STREAMS - 1)
    assert answers[5] == [(3, e.ERROR_REASON_STEP_GAP)]
    # The one that is amiss is none of the flight, and is submitted by itself.
    assert (spy.at_once, spy.in_vain, spy.flew) == ([], [STREAMS], [STREAMS, 1])
    assert server.runner.rows == [STREAMS - 1]
    assert server.metrics.of(server.engine).steps == STREAMS - 1
    assert sum(server.metrics.errors.values()) == 1


@pytest.mark.parametrize("bad", ["POISON", "BUG"])
async def test_a_run_that_fails_at_once_fails_for_who_is_to_blame(server, monkeypatch, bad) -> None:
    spy, streams = Spy(server, monkeypatch), Streams(server, 8)
    server.driver.inline_run_s = 10.0
    for index in range(8):
        streams.send(index, 1, getattr(server.runner, bad) if index == 5 else 1.0)
    answers = await streams.answers()
    assert answers == [[(1, e.ERROR_REASON_MODEL_FAILED) if index == 5 else [FIRST + 1]] for index in range(8)]
    assert (spy.at_once, spy.in_vain, spy.flew) == ([], [8], [8])
    assert server.metrics.of(server.engine).steps == 7
    # And the next turn goes at once again.
    for index in range(8):
        streams.send(index, 1 if index == 5 else 2, 1.0)
    assert await streams.answers() == [[[FIRST + 1 if index == 5 else FIRST + 2]] for index in range(8)]
    assert spy.at_once == [8]


def result_of(handle: int, seq: int, totals: np.ndarray) -> pb.StreamResponse:
    """As protobuf would write it."""
    outputs = [encode(totals[:, np.newaxis], "total"), encode(totals[-1:], "last")]
    return pb.StreamResponse(result=pb.StepResult(handle=handle, seq=seq, outputs=outputs))


def request(frame: pb.StepFrame) -> bytes:
    return pb.StreamRequest(frame=frame).SerializeToString()


@pytest.mark.parametrize("streams", [1, 5], ids=["a lone step", "several steps"])
async def test_a_step_for_a_model_that_has_just_gone_hurts_nobody(server, streams) -> None:
    """Between the end of an engine and the word of it to the streams, their steps still come."""
    server.driver.inline_run_s = 10.0
    singles = [Single(server, f"s{index}") for index in range(streams)]
    for single in singles:
        single.call.receive(step(1, 1, 1.0))
    assert [told(*await single.paper.take(1)) for single in singles] == [[FIRST + 1]] * streams
    server.directory.close_all(server.engine, pb.DETACH_CAUSE_MODEL_UNLOADED, server.driver.now())
    await server.driver.remove(server.engine)
    for single in singles:
        single.call.receive(step(1, 2, 1.0))
    for single in singles:
        (gone,) = await single.paper.take(1)
        assert gone.detached.cause == pb.DETACH_CAUSE_MODEL_UNLOADED
        assert gone.detached.applied_seq == 1
    assert not server.driver.failed.done()


async def test_steps_of_two_models_run_at_once_model_by_model(server, monkeypatch) -> None:
    spy = Spy(server, monkeypatch)
    server.driver.inline_run_s = 10.0
    singles = [Single(server, f"{model}{index}", model) for index in range(4) for model in ("sum", "other")]
    for seq in (1, 2, 3):
        for single in singles:
            single.call.receive(step(1, seq, 1.0))
        assert [told(*await single.paper.take(1)) for single in singles] == [[FIRST + seq]] * 8
    # In the first turn, the second model's messages were taken for the first's: a form is made for one model a turn.
    # The compiled part learns one a turn too, and the second model's fly meanwhile.
    assert (spy.at_once, spy.in_vain, spy.flew) == ([4] * 4, [], [1, 1, 1, 1, 4])


@pytest.mark.parametrize("streams", [1, 5], ids=["a lone step", "several steps"])
async def test_what_runs_at_once_is_timed_part_by_part(server, streams) -> None:
    """The model's run is a part of what a step takes, and writing its answer comes after."""
    server.driver.inline_run_s = 10.0
    singles = [Single(server, f"s{index}") for index in range(streams)]
    for single in singles:
        single.call.receive(step(1, 1, 1.0))
    for single in singles:
        await single.paper.take(1)
    figures = server.metrics.of(server.engine)
    assert 0 < figures.batch_run.total < figures.run.total / streams
    assert figures.reply.total > 0
    assert (sum(figures.reply.counts), figures.batch_share.total, figures.queue.total) == (streams, 1.0, 0.0)
