"""What arrives beside a step of many runs: it has its turns between them, and waits for no more of them than it must.

Times are not measured: the order of the runs is what counts.
"""

import pytest
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import session_pb2 as pb

from tests.unit.transport.test_intake import FIRST, Streams, attach, step, told
from tests.unit.transport.test_turns_at_once import Single, Spy, use_arrays

STREAMS = 5
QUANTUM = 8
# Of a session, within its credit.
MOST_AHEAD = 6
PART = (1, QUANTUM)
TURN = (STREAMS, 1)


@pytest.fixture(params=["compiled", "by arrays"])
async def server(request, make_server):
    server = await make_server(inline_run_s=10.0, quantum=QUANTUM)
    if request.param == "by arrays":
        use_arrays(server)
    return server


class Busy:
    """Five streams beside one with a prompt of eight parts; they send during the runs that `when` names.

    Args:
        when: of each run, by number since the prompt's first part and time steps: the seqs that each stream sends.
    """

    def __init__(self, server, when) -> None:
        self.server = server
        self.streams = Streams(server, STREAMS)
        self.prompter = Single(server, "prompter")
        self.total = FIRST
        self.seq = 0
        self.sent = 0
        self._when = when

    async def run(self) -> list[tuple[int, int]]:
        """Rows and time steps of all runs from the prompt's first part to its last."""
        # So that the compiled part knows the steps.
        for _ in range(2):
            self._send(1)
            await self._take()
        runner = self.server.runner
        runner.forget()
        runner.during = lambda time_steps: self._send(self._when(len(runner.shapes) - 1, time_steps))
        self.prompter.call.receive(step(1, 1, *[1.0] * 8 * QUANTUM))
        (answer,) = await self.prompter.paper.take(1)
        runner.during = lambda time_steps: None
        assert told(answer) == [FIRST + number for number in range(1, 8 * QUANTUM + 1)]
        last = max(number for number, shape in enumerate(runner.shapes) if shape == PART)
        shapes = runner.shapes[: last + 1]
        await self._take()
        assert self.server.directory.sessions["prompter"].applied_time_steps == 8 * QUANTUM
        return shapes

    def _send(self, count: int) -> None:
        answered = min(len(paper.responses) for paper in self.streams.papers)
        for _ in range(min(count, MOST_AHEAD - (self.sent - answered))):
            self.seq += 1
            self.sent += 1
            for index in range(STREAMS):
                self.streams.send(index, self.seq, 1.0)

    async def _take(self) -> None:
        sent, self.sent = self.sent, 0
        expected = [[self.total + number] for number in range(1, sent + 1)]
        self.total += sent
        assert await self.streams.answers(sent) == [expected] * STREAMS


def between(shapes: list[tuple[int, int]]) -> list[int]:
    """How many other runs there are between the parts of the prompt."""
    assert set(shapes) <= {PART, TURN}
    return [len(runs) for runs in "".join("P" if shape == PART else "t" for shape in shapes).split("P")][1:-1]


async def test_each_part_is_followed_by_what_came_meanwhile(server) -> None:
    busy = Busy(server, lambda number, time_steps: int(time_steps == QUANTUM))
    assert between(await busy.run()) == [1] * 7


async def test_two_steps_of_a_session_that_came_together_do_not_wait_for_a_part_each(server) -> None:
    busy = Busy(server, lambda number, time_steps: 2 * (number == 1))
    assert between(await busy.run()) == [0, 2, 0, 0, 0, 0, 0]


async def test_what_comes_during_their_runs_does_not_wait_behind_them(server) -> None:
    """The compiled part runs both at once, and has one more turn for what came then; arrays have a turn for each."""
    busy = Busy(server, lambda number, time_steps: {1: 2, 2: 1}.get(number, 0))
    by_arrays = server.grpc._streams._intake._turns is None
    assert between(await busy.run()) == [0, 2 if by_arrays else 3, 1 if by_arrays else 0, 0, 0, 0, 0]


async def test_a_part_waits_for_one_more_turn_and_not_for_two(server) -> None:
    """Whoever sends as soon as he is answered does not keep a prompt from being run."""
    # During the parts, and during the first run after each.
    busy = Busy(server, lambda number, time_steps: int(number % 3 < 2))
    assert between(await busy.run()) == [2] * 7


@pytest.mark.parametrize("ahead", [1, 2, 5])
async def test_whoever_sends_far_ahead_does_not_keep_a_prompt_from_being_run(server, ahead) -> None:
    busy = Busy(server, lambda number, time_steps: ahead)
    gaps = between(await busy.run())
    assert len(gaps) == 7
    assert max(gaps) <= 4


async def test_streams_read_ahead_while_a_part_is_next(server) -> None:
    busy = Busy(server, lambda number, time_steps: 0)
    one = busy.streams.calls[0]
    assert not one.eager
    seen: list[bool] = []
    begin = server.driver._run_next

    def noted(*args) -> None:
        seen.append(one.eager)
        begin(*args)

    server.driver._run_next = noted
    await busy.run()
    assert sum(seen) >= 7
    assert not one.eager
    attach(one, busy.streams.papers[0], 2, "sum", "another")
    assert one.eager, "the next message may be the other session's, for the same run"


async def test_a_stream_that_has_steps_enough_is_not_read_ahead(server) -> None:
    """What a client may send at once can have more answers than it may leave unread."""
    busy = Busy(server, lambda number, time_steps: 0)
    one, paper, session = busy.streams.calls[0], busy.streams.papers[0], server.directory.sessions["s0"]
    ahead: list[int] = []
    begin = server.driver._run_next

    def noted(*args) -> None:
        while one.eager:
            busy.seq += 1
            one.receive(step(1, busy.seq, 1.0))
            ahead.append(busy.seq - session.applied_seq)
        begin(*args)

    server.driver._run_next = noted
    await busy.run()
    server.driver._run_next = begin
    assert 8 <= max(ahead) <= 9, "one more is what runs"
    sent = len(ahead)
    assert sent > 9, "once they are answered, others are read"
    answers = [told(response) for response in await paper.take(sent)]
    assert answers == [[busy.total + number] for number in range(1, sent + 1)]


async def test_steps_one_by_one_are_gathered_and_a_frame_is_a_run_by_itself(server, make_frame) -> None:
    busy = Busy(server, lambda number, time_steps: 0)
    one, paper = busy.streams.calls[0], busy.streams.papers[0]
    one.receive(step(1, 1, 1.0))
    assert not one.gathers, "its client waits for the answer"
    attach(one, paper, 2, "sum", "another")
    for handle in (1, 2):
        one.receive(step(handle, 2 if handle == 1 else 1, 1.0))
        assert one.gathers
    one.receive(pb.StreamRequest(frame=make_frame([1, 2], [3, 2], [[1.0], [1.0]])).SerializeToString())
    assert not one.gathers
    one.receive(step(1, 4, 1.0))
    assert one.gathers
    await paper.take(4)


async def test_what_a_stream_says_behind_its_steps_parts_no_other_stream_from_its_turn(server, monkeypatch) -> None:
    spy, streams = Spy(server, monkeypatch), Streams(server, STREAMS)
    for seq in (1, 2, 3):
        for index in range(STREAMS):
            streams.send(index, seq, 1.0)
            if index == 2 and seq == 3:
                # Of a session that it does not hold: refused, behind the step.
                detach = pb.StreamRequest(detach=pb.DetachSession(handle=9))
                streams.calls[index].receive(detach.SerializeToString())
        if seq < 3:
            assert await streams.answers() == [[[FIRST + seq]]] * STREAMS
    for index, paper in enumerate(streams.papers):
        answers = [told(response) for response in await paper.take(2 if index == 2 else 1)]
        assert [FIRST + 3] in answers
        assert len(answers) == 1 or (0, e.ERROR_REASON_HANDLE_UNKNOWN) in answers
    assert spy.at_once == [STREAMS, STREAMS, STREAMS - 1]
    assert spy.flew == [1]
