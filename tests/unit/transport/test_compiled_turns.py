"""The compiled part and arrays are one server: whatever comes, clients are told the same, and the same is left."""

import asyncio
import itertools
import math
import random

import numpy as np
import pytest
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_server import compiled
from conveyor_server.sessions import table
from conveyor_server.transport.loop import Driver

from tests.unit.transport.test_intake import Paper, step

SESSIONS = 24
CREDIT = 4
# The time of both servers: later than the loop's, so that no timer of theirs is ever due.
LATER = 1e9


def test_it_is_built() -> None:
    assert compiled.BUILT, "the tests need a C compiler and Python's headers: install them, then make env"


def test_its_columns_are_the_session_tables() -> None:
    assert {name: getattr(table, name) for name in compiled.CELLS} == compiled.CELLS


class Twin:
    """One of two servers that get the same messages.

    Attributes:
        told: what each session's stream was told about it in this turn, by the session's number.
    """

    def __init__(self, server) -> None:
        self.server = server
        self.told: dict[int, list[object]] = {number: [] for number in range(SESSIONS)}
        self.others: list[str] = []
        # The durable_seq that each answer said of its session, in the same order; None: it said nothing.
        self.durable: dict[int, list[int | None]] = {number: [] for number in range(SESSIONS)}
        # By stream: its call and paper, and the sessions that it holds, whose handles are their numbers.
        self.streams: list[tuple[object, Paper]] = []

    def open(self, numbers: range, model: str) -> None:
        paper = Paper()
        call = self.server.grpc._streams.enter(paper, {})
        self.streams.append((call, paper))
        for number in numbers:
            request = pb.AttachSession(
                handle=number,
                mode=pb.AttachSession.MODE_CREATE,
                model=model,
                session_id=f"s{number}",
                options=pb.SessionOptions(max_in_flight=CREDIT),
            )
            call.receive(pb.StreamRequest(attach=request).SerializeToString())

    def store(self, durable: dict[int, int]) -> None:
        """As if the store had the sessions up to these steps."""
        for number, seq in durable.items():
            session = self.server.directory.sessions[f"s{number}"]
            session.table.durable_seq[session.row] = seq

    async def settle(self) -> None:
        """Returns once all that came is done."""
        intake = self.server.grpc._streams._intake
        driver = self.server.driver
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0)
                if not len(intake) and not driver._kicked and not any(engine.ready for engine in driver._lanes):
                    break
        assert not driver.failed.done()
        for _, paper in self.streams:
            responses, paper.responses = paper.responses, []
            for response in responses:
                self._read(response)

    def _read(self, response: pb.StreamResponse) -> None:
        kind = response.WhichOneof("kind")
        if kind == "result":
            outputs = [output.data for output in response.result.outputs]
            self.told[response.result.handle].append((response.result.seq, outputs, response.result.replayed))
            said = response.result.durable_seq if response.result.HasField("durable_seq") else None
            self.durable[response.result.handle].append(said)
        elif kind == "frame":
            frame = response.frame
            handles, seqs = np.frombuffer(frame.handles, np.uint32).tolist(), np.frombuffer(frame.seqs, np.uint64)
            lengths = np.frombuffer(frame.lengths, np.uint32) if frame.lengths else np.ones(len(handles), np.uint32)
            replayed = np.frombuffer(frame.replayed_rows, np.uint32).tolist()
            durable = np.frombuffer(frame.durable_seqs, np.uint64).tolist() or [None] * len(handles)
            for handle, said in zip(handles, durable, strict=True):
                self.durable[handle].append(said)
            stops = np.cumsum(lengths) * 8
            for row, handle in enumerate(handles):
                start = int(stops[row]) - 8 * int(lengths[row])
                outputs = [frame.columns[0][start : int(stops[row])], frame.columns[1][8 * row : 8 * row + 8]]
                self.told[handle].append((int(seqs[row]), outputs, row in replayed))
        elif kind == "error":
            self._refused(response.error.handle, response.error.seq, response.error.status)
        elif kind == "errors":
            handles = np.frombuffer(response.errors.handles, np.uint32).tolist()
            for handle, seq in zip(handles, np.frombuffer(response.errors.seqs, np.uint64).tolist(), strict=True):
                self._refused(handle, seq, response.errors.status)
        else:
            self.others.append(str(kind))

    def _refused(self, handle: int, seq: int, status) -> None:
        self.told.setdefault(handle, []).append((seq, from_status(status).reason_name))

    def left(self) -> list[object]:
        """What is left behind of each session: numbers, state, and the answers it can still give."""
        found: list[object] = []
        for number in range(SESSIONS):
            session = self.server.directory.sessions.get(f"s{number}")
            if session is None:
                found.append(None)
                continue
            states = session.engine.read(session.lane)
            answers = [session.answers.get(seq) for seq in range(session.applied_seq + 2)]
            kept = [
                None if one is None else (one.fingerprint, one.length, [array.tobytes() for array in one.outputs])
                for one in answers
            ]
            numbers = (session.applied_seq, session.applied_time_steps, session.failed_seq, session.last_used_at)
            found.append((numbers, None if states is None else [state.tobytes() for state in states], kept))
        return found

    def counted(self) -> list[object]:
        figures = self.server.metrics.models.values()
        return [(one.model, one.steps, one.time_steps, one.replayed, sum(one.queue.counts)) for one in figures]


class Talk:
    """What clients might send, right and wrong; knows what each session's next step is."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.next = dict.fromkeys(range(SESSIONS), 1)
        self.sent: dict[int, dict[int, list[float]]] = {number: {} for number in range(SESSIONS)}
        self.owed = dict.fromkeys(range(SESSIONS), 0)
        self.answered_seq = dict.fromkeys(range(SESSIONS), 0)

    def values(self, count: int = 1) -> list[float]:
        return [self.random.choice([0.5, -1.25, 3.0, 1e-3]) for _ in range(count)]

    def acked(self, number: int) -> int:
        """Of what was answered; or more than can be, which counts for nothing when it comes.

        When that is is not the same for a step that waits behind another of its session.
        """
        newest = self.answered_seq[number]
        return self.random.choice([0, newest, max(0, newest - 1), newest + 5 if self.owed[number] == 1 else 0])

    def next_step(self, number: int, count: int = 1) -> tuple[int, list[float]]:
        seq, values = self.next[number], self.values(count)
        self.next[number] += 1
        self.sent[number][seq] = values
        return seq, values

    def message(self, numbers: range) -> bytes | None:
        """One message of a stream that holds these sessions, or None where all are owed too many answers."""
        free = [number for number in numbers if self.owed[number] < CREDIT]
        if not free:
            return None
        odd = self.random.random()
        if odd < 0.04:
            return self.odd_one(self.random.choice(free))
        if len(free) > 1 and self.random.random() < 0.6:
            return self.frame(self.random.sample(free, self.random.randint(1, len(free))), odd)
        number = self.random.choice(free)
        self.owed[number] += 1
        seq, values = self.next_step(number, 3 if odd > 0.97 else 1)
        return self.step(number, seq, values)

    def step(self, number: int, seq: int, values: list[float]) -> bytes:
        return step(number, seq, *values, acked_seq=self.acked(number))

    def frame(self, numbers: list[int], odd: float) -> bytes:
        rows = []
        for number in numbers:
            self.owed[number] += 1
            rows.append(self.next_step(number))
        acked = b""
        if self.random.random() < 0.5:
            acked = np.array([self.acked(number) for number in numbers], np.uint64).tobytes()
        frame = pb.StepFrame(
            handles=np.array(numbers, np.uint32).tobytes(),
            seqs=np.array([seq for seq, _ in rows], np.uint64).tobytes(),
            columns=[np.array([values for _, values in rows], np.float64).tobytes()],
            acked_seqs=acked,
            timeout_ms=60_000 if odd > 0.9 else 0,
        )
        return pb.StreamRequest(frame=frame).SerializeToString()

    def odd_one(self, number: int) -> bytes:
        """A message with something amiss; the session's next step stays what it was."""
        self.owed[number] += 1
        seq = self.next[number]
        old = self.random.choice(list(self.sent[number]) or [0])
        again = [
            lambda: step(number, old, *self.sent[number].get(old, [1.0])),
            lambda: step(number, old, 77.0),
        ]
        kinds = [
            # Behind a step that says which answers its client has, it depends on which of the two is judged first.
            *(again if self.owed[number] == 1 else []),
            lambda: step(number, seq + 2, 1.0),
            lambda: step(number, seq, math.nan),
            lambda: step(number, seq, math.inf),
            lambda: step(999, 1, 1.0),
            lambda: step(number, seq),
            lambda: self.broken_frame([number], columns=[b"1234567"]),
            lambda: self.broken_frame([number], columns=[]),
            lambda: self.broken_frame([number, 999], columns=[bytes(16)]),
            lambda: self.broken_frame([number], seqs=b"123"),
            lambda: self.broken_frame([], columns=[b""]),
            lambda: self.broken_frame([number], seqs=np.array([1 << 63], np.uint64).tobytes()),
            lambda: pb.StreamRequest(detach=pb.DetachSession(handle=999)).SerializeToString(),
        ]
        return self.random.choice(kinds)()

    def broken_frame(self, numbers: list[int], **fields) -> bytes:
        seqs = np.array([self.next.get(number, 1) for number in numbers], np.uint64).tobytes()
        whole = {"seqs": seqs, "columns": [bytes(8 * len(numbers))], **fields}
        frame = pb.StepFrame(handles=np.array(numbers, np.uint32).tobytes(), **whole)
        return pb.StreamRequest(frame=frame).SerializeToString()

    def answered(self, applied: dict[int, int]) -> None:
        """All is; where something was amiss, the next step is the one after the last that was applied."""
        self.owed = dict.fromkeys(self.owed, 0)
        self.answered_seq = applied
        self.next = {number: seq + 1 for number, seq in applied.items()}


def same(ours: list[object], theirs: list[object], what: str) -> None:
    """As assert ours == theirs, and says where they differ; pytest would compare the long lists letter by letter."""
    for index, (mine, other) in enumerate(itertools.zip_longest(ours, theirs)):
        if mine != other:
            pytest.fail(f"{what}, at {index}: compiled {mine}, by arrays {other}")


# Streams by the sessions that they hold, and their model; the first eight have one each.
HOLDERS = [
    *((range(number, number + 1), "sum") for number in range(8)),
    (range(8, 14), "sum"),
    (range(14, 20), "sum"),
    (range(20, 24), "other"),
]


# A loop of the fast transport's has one server; and nothing comes over a wire here.
@pytest.mark.asyncio(loop_factories=["aio"])
@pytest.mark.parametrize("says_durable", [False, True], ids=["no store", "a store"])
@pytest.mark.parametrize("seed", range(12))
async def test_the_same_is_told_and_left_behind(make_server, wire_options, monkeypatch, seed, says_durable) -> None:
    """Random turns to both: steps, frames, repeats, gaps, chunks, what is not finite, what cannot be read."""
    monkeypatch.setattr(Driver, "says_durable", property(lambda driver: says_durable))
    twins = []
    for use in (True, False):
        server = await make_server(folder=f"{use}", inline_run_s=10.0, wire=wire_options(compiled=use))
        monkeypatch.setattr(server.driver, "now", lambda: LATER)
        twins.append(Twin(server))
    went: list[bool] = []
    run_turn = twins[0].server.directory.run_turn

    def noted(turn, now):
        staging = run_turn(turn, now)
        went.append(staging is not None)
        return staging

    monkeypatch.setattr(twins[0].server.directory, "run_turn", noted)
    for twin in twins:
        for numbers, model in HOLDERS:
            twin.open(numbers, model)
        await twin.settle()
    talk = Talk(seed)
    for turn in range(60):
        durable = {number: talk.random.getrandbits(talk.random.choice([1, 8, 40, 63])) for number in range(SESSIONS)}
        for twin in twins:
            twin.store(durable)
        # Of one model in every other turn.
        holders = [index for index in range(len(HOLDERS)) if HOLDERS[index][1] == "sum" or turn % 2 == 0]
        for _ in range(talk.random.randint(1, 12)):
            index = talk.random.choice(holders)
            message = talk.message(HOLDERS[index][0])
            if message is not None:
                for twin in twins:
                    twin.streams[index][0].receive(message)
        for twin in twins:
            await twin.settle()
        compiled_twin, arrays = twins
        for number in range(SESSIONS):
            # A refusal may overtake the answer to a step before, where that has to wait for another one first.
            ours, theirs = (sorted(twin.told.pop(number), key=repr) for twin in twins)
            same(ours, theirs, f"what session {number} was told in turn {turn}")
            answered = sum(len(told) > 2 for told in ours)
            for twin in twins:
                # Each answer says where its session is now.
                assert twin.durable[number] == [durable[number] if says_durable else None] * answered
                twin.durable[number] = []
        same(*(sorted(twin.told.items()) for twin in twins), f"what was told of no session in turn {turn}")
        for twin in twins:
            twin.told = {number: [] for number in range(SESSIONS)}
        same(compiled_twin.left(), arrays.left(), f"what is left behind of each session after turn {turn}")
        sessions = arrays.server.directory.sessions
        talk.answered({number: sessions[f"s{number}"].applied_seq for number in range(SESSIONS)})
    assert twins[0].others == twins[1].others
    assert twins[0].counted() == twins[1].counted()
    assert sum(went) > 20, "the compiled part had next to nothing to do"
