"""Servers die with what their store does not have, others take over, the store goes away and comes back: each step is
in the last server's state once and in its place, and each answer was handed out once. The cores, without I/O.
"""

import contextlib
import itertools
from collections import deque

import numpy as np
from conveyor._core.batch import prepare_batch, present_batch
from conveyor._core.member import Leaving
from conveyor._core.signature import Signature
from conveyor.errors import ModelFailed, StepAborted
from fake_service import Refused
from hypothesis import given, settings
from hypothesis import strategies as st

durabilities = st.sampled_from(["async", "async", "sync"])
forms = st.sampled_from(["asked", "alone", "framed"])
# A few steps of 8 bytes, or many.
buffers = st.sampled_from([40, 8 * 64, 8 << 20])
FAULTS = ["cut", "crash", "move", "farewell", "away", "back", "refuse", "drain", "again"]
ACTIONS = ["submit"] * 8 + ["up"] * 4 + ["down"] * 4 + ["talk"] * 4 + ["checkpoint", "flush", "time", "time", *FAULTS]
schedules = st.lists(st.sampled_from(ACTIONS), min_size=50, max_size=200)


class Site:
    """Two servers with a store, and what befalls them."""

    def __init__(self, new_cable, new_replicas, refused, durability, form, credit):
        self.replicas = new_replicas(2, durability)
        self.store = self.replicas[0].store
        self.refused = refused
        for server in self.replicas:
            server.form, server.credit = form, credit
        self.cable = new_cable(self.replicas[0])
        self.turns = itertools.cycle([self.replicas[1], self.replicas[0]])
        self.actions = {
            "up": self.cable.pump_up,
            "down": self.cable.pump_down,
            "time": self.cable.pump_time,
            "talk": self.talk,
            "cut": self.cable.cut,
            "crash": self.crash,
            "move": lambda: self.cable.move(next(self.turns)),
            "farewell": lambda: self.cable.farewell("token"),
            "checkpoint": self.checkpoint,
            "away": lambda: self.be_away(True),
            "back": lambda: self.be_away(False),
        }

    def talk(self):
        """Delivers what is on its way, and a few answers to that."""
        for _ in range(20):
            self.cable.pump_up()
            self.cable.pump_down()

    def crash(self):
        self.cable.server.crash()
        self.cable.cut()

    def checkpoint(self):
        for session in list(self.cable.server.sessions.values()):
            # The store is away, or the session is another server's by now.
            with contextlib.suppress(Refused):
                self.cable.server.checkpoint(session)

    def be_away(self, away):
        self.store.away = away

    def fail(self, session_id, seq, reason):
        for server in self.replicas if reason == "OVERLOADED" else [self.cable.server]:
            server.failures[session_id, seq] = self.refused(reason, seq=str(seq))

    def settle(self):
        self.store.away = False
        self.cable.settle()

    def history(self, session_id):
        """First value of each step's input, as they are in the store's state."""
        return [np.frombuffer(step[0], np.float32)[0] for step in self.store.records[session_id].history]


class App:
    """Steps one session through 1, 2, 3, ... and sends again what was refused; its sum tells how it was applied."""

    def __init__(self, site, signature, buffer_bytes):
        self.site = site
        self.signature = signature
        self.session = site.cable.session(buffer_bytes=buffer_bytes)
        self.number = 0
        self.pending = deque()
        self.answers = []
        self.flushed = []

    @property
    def ready(self):
        return self.session.opened.done and self.session.blocker() is None

    def submit(self):
        if self.ready and not (self.pending and self.pending[-1][1].failed):
            self.number += 1
            prepared = self.signature.prepare([self.number, 0])
            self.pending.append((self.number, self.session.submit(prepared).ticket))

    def refuse(self, reason):
        """The server shall refuse the step that is submitted next."""
        seq = self.session.applied_seq + len(self.pending) + 1
        if self.ready:
            self.site.fail("s", seq, reason)

    def refuse_again(self):
        """Some server shall refuse the last step that was answered, should it be sent again."""
        self.site.fail("s", self.session.applied_seq, "OVERLOADED")

    def flush(self):
        if self.session.opened.done:
            self.flushed.append((self.session.applied_seq, self.session.flush()))

    def collect(self):
        while self.pending and self.pending[0][1].done:
            number, ticket = self.pending.popleft()
            try:
                answer = self.signature.present(ticket.result().outputs, 1, one=True)
            except (ModelFailed, StepAborted):
                self.number = min(self.number, number - 1)
            else:
                self.answers.append((number, answer[0]))
        for target, ticket in self.flushed:
            if ticket.done:
                assert ticket.result() >= target


@settings(max_examples=500, deadline=None)
@given(
    schedule=schedules,
    durability=durabilities,
    form=forms,
    credit=st.integers(1, 9),
    patient=st.booleans(),
    size=buffers,
)
def test_a_session_survives_its_servers(
    schedule, durability, form, credit, patient, size, new_cable, new_replicas, refused, specs
):
    site = Site(new_cable, new_replicas, refused, durability, form, credit)
    for server in site.replicas:
        server.patient = patient
    app = App(site, Signature(specs["sum"]), size)
    actions = site.actions | {
        "submit": app.submit,
        "flush": app.flush,
        "refuse": lambda: app.refuse("MODEL_FAILED"),
        "drain": lambda: app.refuse("DRAINING"),
        "again": app.refuse_again,
    }
    for action in schedule:
        actions[action]()
        app.collect()
    site.settle()
    app.collect()
    # What was to be refused when it was sent again, and never was.
    for server in site.replicas:
        server.failures.clear()
    app.submit()
    app.flush()
    site.settle()
    app.collect()
    assert not app.pending
    count = len(app.answers)
    assert [number for number, _ in app.answers] == list(range(1, count + 1))
    assert [answer for _, answer in app.answers] == [n * (n + 1) / 2 for n in range(1, count + 1)]
    assert app.session.applied_seq == count
    app.flush()
    site.settle()
    assert all(ticket.done for _, ticket in app.flushed)
    assert site.history("s") == list(range(1, count + 1))
    assert app.session.durable_seq == count
    assert not app.session.unstored

    left = app.session.leave(Leaving.DETACH)
    site.settle()
    left.result()


class Gateway:
    """Steps a population's rows through row + 1, row + 2, ... and sends again what was refused."""

    rows = 4

    def __init__(self, site, signature, buffer_bytes):
        self.site = site
        self.signature = signature
        self.population = site.cable.population(self.rows, buffer_bytes=buffer_bytes)
        self.numbers = [0] * self.rows
        self.answered = [0] * self.rows
        self.sums = [0.0] * self.rows
        self.pending = []
        self.flushed = []

    def submit(self, rows):
        chosen = np.array(sorted(rows))
        if any(step.errors for _, step in self.pending):
            return
        if not self.population.opened.done or self.population.blocker(chosen) is not None:
            return
        for row in chosen:
            self.numbers[row] += 1
        # Two time steps where the row is odd: ragged.
        chunks = [np.tile(np.float32([row + self.numbers[row], 0]), (1 + row % 2, 1)) for row in chosen]
        batch = prepare_batch(self.signature, chunks, len(chosen))
        numbers = [self.numbers[row] for row in chosen]
        self.pending.append((numbers, self.population.submit(chosen, batch)))

    def refuse(self, row, reason):
        """The server shall refuse the row's step that is submitted next; or, AGAIN, its last one that was answered."""
        if reason == "AGAIN":
            self.site.fail(f"p{row}", int(self.population.acked[row]), "OVERLOADED")
        else:
            self.site.fail(f"p{row}", int(self.population._ledger.next_seqs[row]), reason)

    def flush(self):
        if self.population.opened.done:
            self.flushed.append((self.population.acked.copy(), self.population.flush()))

    def collect(self):
        while self.pending and self.pending[0][1].ticket.done:
            numbers, step = self.pending.pop(0)
            step.ticket.result()
            outputs = present_batch(self.signature, step.batch, step.pieces)
            for position, (row, number) in enumerate(zip(step.rows.tolist(), numbers, strict=True)):
                if position in step.errors:
                    assert isinstance(step.errors[position], ModelFailed | StepAborted)
                    self.numbers[row] = min(self.numbers[row], number - 1)
                    continue
                self.sums[row] += (row + number) * (1 + row % 2)
                self.answered[row] += 1
                assert number == self.answered[row]
                assert outputs[position][-1, 0] == self.sums[row]
        for target, ticket in self.flushed:
            if ticket.done:
                assert (ticket.result() >= target).all()


row_numbers = st.integers(0, Gateway.rows - 1)
events = st.one_of(
    st.tuples(st.just("submit"), st.sets(row_numbers, min_size=1)),
    st.tuples(st.just("submit"), st.just(set(range(Gateway.rows)))),
    st.tuples(st.sampled_from(["up"] * 4 + ["down"] * 4 + ["talk"] * 6 + ["time"] * 2), st.none()),
    st.tuples(st.sampled_from(["cut", "crash", "move", "farewell", "checkpoint", "flush", "away", "back"]), st.none()),
    st.tuples(st.sampled_from(["MODEL_FAILED", "DRAINING", "AGAIN"]), row_numbers),
)


@settings(max_examples=500, deadline=None)
@given(
    schedule=st.lists(events, min_size=50, max_size=200),
    durability=durabilities,
    form=forms,
    patient=st.booleans(),
    size=buffers,
)
def test_a_population_survives_its_servers(
    schedule, durability, form, patient, size, new_cable, new_replicas, refused, specs
):
    site = Site(new_cable, new_replicas, refused, durability, form, 3)
    for server in site.replicas:
        server.patient = patient
    app = Gateway(site, Signature(specs["sum"]), size)
    site.cable.settle()
    for action, argument in schedule:
        if action == "submit":
            app.submit(argument)
        elif action == "flush":
            app.flush()
        elif action in site.actions:
            site.actions[action]()
        else:
            app.refuse(argument, action)
        app.collect()
    site.settle()
    app.collect()
    for server in site.replicas:
        server.failures.clear()
    app.submit(range(app.rows))
    app.flush()
    site.settle()
    app.collect()
    assert not app.pending
    app.flush()
    site.settle()
    assert all(ticket.done for _, ticket in app.flushed)
    assert app.population.row_errors == {}
    for row, count in enumerate(app.answered):
        assert site.history(f"p{row}") == [row + number for number in range(1, count + 1)]
    assert app.population.acked.tolist() == app.population.durable.tolist() == app.answered
    assert not app.population.unstored

    left = app.population.leave(Leaving.DETACH)
    site.settle()
    left.result()
