"""Any sequence of cuts, delays, refusals and farewells loses nothing and repeats nothing: the core, without I/O.

The model adds, so an answer that is the sum of all inputs so far says that each was applied once and in order.
"""

from collections import deque

import numpy as np
from conveyor._core.batch import prepare_batch, present_batch
from conveyor._core.member import Leaving
from conveyor._core.signature import Signature
from conveyor.errors import ModelFailed, StepAborted
from hypothesis import given, settings
from hypothesis import strategies as st

ACTIONS = ["submit"] * 5 + ["up"] * 4 + ["down"] * 4 + ["cut", "farewell", "refuse", "drain"]
# How the server answers: frames may answer steps that were sent alone, and the other way round.
forms = st.sampled_from(["asked", "alone", "framed"])
schedules = st.lists(st.sampled_from(ACTIONS), min_size=50, max_size=150)


class App:
    """An application that steps one session through 1, 2, 3, ... and sends again what was refused."""

    def __init__(self, cable, refused, specs):
        self.cable = cable
        self.refused = refused
        self.signature = Signature(specs["sum"])
        self.session = cable.session()
        self.number = 0
        self.pending = deque()
        self.answers = []

    def submit(self):
        if self.pending and self.pending[-1][1].failed:
            # As a stream does: what comes after a failure is not sent before the failure was taken.
            return
        if self.session.opened.done and self.session.blocker() is None:
            self.number += 1
            prepared = self.signature.prepare([self.number, 0])
            self.pending.append((self.number, self.session.submit(prepared).ticket))

    def refuse(self, reason="MODEL_FAILED"):
        """The server shall refuse the step that is submitted next."""
        seq = self.session.applied_seq + len(self.pending) + 1
        if self.session.opened.done and self.session.blocker() is None:
            self.cable.server.failures["s", seq] = self.refused(reason, seq=str(seq))

    def collect(self):
        """Takes what is answered, in order; a refused number is the next to be sent."""
        while self.pending and self.pending[0][1].done:
            number, ticket = self.pending.popleft()
            try:
                answer = self.signature.present(ticket.result().outputs, 1, one=True)
            except (ModelFailed, StepAborted):
                self.number = min(self.number, number - 1)
            else:
                self.answers.append((number, answer[0]))


@settings(max_examples=300, deadline=None)
@given(schedule=schedules, form=forms, credit=st.integers(1, 9))
def test_a_session_applies_each_step_once_whatever_the_cable_does(schedule, form, credit, new_cable, refused, specs):
    cable = new_cable()
    cable.server.form, cable.server.credit = form, credit
    app = App(cable, refused, specs)
    actions = {
        "submit": app.submit,
        "refuse": app.refuse,
        "drain": lambda: app.refuse("DRAINING"),
        "up": cable.pump_up,
        "down": cable.pump_down,
        "cut": cable.cut,
        "farewell": cable.farewell,
    }
    for action in schedule:
        actions[action]()
        app.collect()
    cable.settle()
    app.collect()
    assert not app.pending
    assert [number for number, _ in app.answers] == list(range(1, len(app.answers) + 1))
    assert [answer for _, answer in app.answers] == [n * (n + 1) / 2 for n in range(1, len(app.answers) + 1)]
    assert cable.server.sessions["s"].applied == len(app.answers) == app.session.applied_seq

    left = app.session.leave(Leaving.CLOSE)
    cable.settle()
    left.result()
    assert cable.server.sessions == {}


class Gateway:
    """An application that steps a population's rows through row + 1, row + 2, ... and sends again what was refused."""

    rows = 4

    def __init__(self, cable, refused, specs):
        self.cable = cable
        self.refused = refused
        self.signature = Signature(specs["sum"])
        self.population = cable.population(self.rows)
        self.numbers = [0] * self.rows
        self.sums = [0.0] * self.rows
        self.answered = [0] * self.rows
        self.pending = []

    def submit(self, rows):
        chosen = np.array(sorted(rows))
        if any(step.errors for _, step in self.pending):
            return
        if not self.population.opened.done or self.population.blocker(chosen) is not None:
            return
        for row in chosen:
            self.numbers[row] += 1
        data = np.array([[row + self.numbers[row], 0] for row in chosen], np.float32)
        # Two time steps where the row is odd: ragged.
        chunks = [np.repeat(x[np.newaxis], 1 + row % 2, axis=0) for row, x in zip(chosen, data, strict=True)]
        batch = prepare_batch(self.signature, chunks, len(chosen))
        numbers = [self.numbers[row] for row in chosen]
        self.pending.append((numbers, self.population.submit(chosen, batch)))

    def refuse(self, row, reason):
        """The server shall refuse the row's step that is submitted next."""
        seq = int(self.population._ledger.next_seqs[row])
        self.cable.server.failures[f"p{row}", seq] = self.refused(reason, seq=str(seq))

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


row_sets = st.sets(st.integers(0, Gateway.rows - 1), min_size=1)
events = st.one_of(
    st.tuples(st.just("submit"), row_sets),
    st.tuples(st.just("submit"), st.just(set(range(Gateway.rows)))),
    st.tuples(st.sampled_from(["up", "up", "up", "down", "down", "down", "down", "cut", "farewell"]), st.none()),
    st.tuples(st.sampled_from(["MODEL_FAILED", "MODEL_FAILED", "DRAINING"]), st.integers(0, Gateway.rows - 1)),
)


@settings(max_examples=300, deadline=None)
@given(schedule=st.lists(events, min_size=50, max_size=150), form=forms)
def test_a_population_applies_each_rows_step_once_whatever_the_cable_does(schedule, form, new_cable, refused, specs):
    cable = new_cable()
    cable.server.form = form
    app = Gateway(cable, refused, specs)
    actions = {"up": cable.pump_up, "down": cable.pump_down, "cut": cable.cut, "farewell": cable.farewell}
    for action, argument in schedule:
        if action == "submit":
            app.submit(argument)
        elif action in actions:
            actions[action]()
        else:
            app.refuse(argument, action)
        app.collect()
    cable.settle()
    app.collect()
    assert not app.pending
    assert [cable.server.sessions[f"p{row}"].applied for row in range(app.rows)] == app.answered
    assert app.population.acked.tolist() == app.answered

    left = app.population.leave(Leaving.CLOSE)
    cable.settle()
    left.result()
    assert cable.server.sessions == {}
