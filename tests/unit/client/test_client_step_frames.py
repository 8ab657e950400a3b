"""Which messages carry the steps of sessions: as few as may be, and every rule holds whatever they travel in."""

import numpy as np
import pytest
from conveyor._core.member import Leaving
from conveyor._core.signature import Signature
from conveyor.errors import ClientClosed, ModelFailed, Overloaded, ProtocolError, StepAborted
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import tensor_pb2 as t


@pytest.fixture
def cable(new_cable):
    cable = new_cable()
    cable.server.credit = 8
    return cable


@pytest.fixture
def step(specs):
    """Submits [value, 0], once or for several time steps, on a session of `sum`."""
    signature = Signature(specs["sum"])

    def submit(session, value=1.0, time_steps=None, timeout_ms=0):
        assert session.blocker() is None
        x = np.array([value, 0]) if time_steps is None else np.tile([value, 0], (time_steps, 1))
        return session.submit(signature.prepare(x), timeout_ms).ticket

    return submit


def opened(cable, session_id="s", signature=None, model="sum"):
    session = cable.session(session_id, model)
    cable.settle()
    session.opened.result()
    if signature is not None:
        session.use(signature)
    return session


def total(ticket):
    return np.frombuffer(ticket.result().outputs[0], np.float32).reshape(-1, 2)[-1, 0]


def described(request):
    """(handle, seq) of each row, and how the message is called."""
    if request.HasField("step"):
        return "step", [(request.step.handle, request.step.seq)]
    handles = np.frombuffer(request.frame.handles, np.uint32).tolist()
    return "frame", list(zip(handles, np.frombuffer(request.frame.seqs, np.uint64).tolist(), strict=True))


def test_a_step_alone_travels_alone(cable, step):
    session = opened(cable)
    step(session)
    assert list(map(described, cable.core.take_outgoing())) == [("step", [(1, 1)])]


def test_a_full_window_is_two_frames_of_half_the_credit(cable, step):
    session = opened(cable)
    for _ in range(8):
        step(session)
    frames = [described(request) for request in cable.core.take_outgoing()]
    assert frames == [("frame", [(1, n) for n in (1, 2, 3, 4)]), ("frame", [(1, n) for n in (5, 6, 7, 8)])]


def test_what_comes_while_two_messages_are_unanswered_gathers(cable, step):
    session = opened(cable)
    tickets = []
    for _ in range(5):
        tickets.append(step(session))
        cable.up.extend(cable.core.take_outgoing())
    assert list(map(described, cable.up)) == [("step", [(1, 1)]), ("step", [(1, 2)])]
    cable.end.receive(cable.up.popleft())
    cable.pump_down()
    (request,) = cable.core.take_outgoing()
    assert described(request) == ("frame", [(1, 3), (1, 4), (1, 5)])
    frame = request.frame
    assert np.frombuffer(frame.acked_seqs, np.uint64).tolist() == [1, 1, 1]
    assert frame.lengths == b""
    cable.up.append(request)
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [1, 2, 3, 4, 5]


def test_sessions_of_one_model_version_share_a_frame(cable, step, specs):
    shared = Signature(specs["sum"])
    one, two = opened(cable, "a", shared), opened(cable, "b", shared)
    other = opened(cable, "c", Signature(specs["mix"]), model="mix")
    tickets = [step(one, 1), step(two, 10, time_steps=3), step(one, 2)]
    mixed = Signature(specs["mix"]).prepare({"x": np.ones(2), "token": 5, "gain": 2})
    alone = other.submit(mixed).ticket
    requests = cable.core.take_outgoing()
    assert list(map(described, requests)) == [("frame", [(1, 1), (1, 2), (2, 1)]), ("step", [(3, 1)])]
    assert np.frombuffer(requests[0].frame.lengths, np.uint32).tolist() == [1, 1, 3]
    cable.up.extend(requests)
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [1, 30, 3]
    assert [np.frombuffer(data, dtype).tolist() for data, dtype in zip(alone.result().outputs, "fq", strict=True)] == [
        [2, 2],
        [5],
    ]


def test_steps_of_another_timeout_have_messages_of_their_own(cable, step):
    session = opened(cable)
    tickets = [step(session), step(session), step(session, timeout_ms=7), step(session, timeout_ms=7), step(session)]
    first, second = cable.core.take_outgoing()
    assert (described(first)[1], first.frame.timeout_ms) == ([(1, 1), (1, 2)], 0)
    assert (described(second)[1], second.frame.timeout_ms) == ([(1, 3), (1, 4)], 7)
    cable.up.extend((first, second))
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [1, 2, 3, 4, 5]


def test_large_steps_do_not_gather_into_large_messages(cable, step):
    session = opened(cable)
    tickets = [step(session, time_steps=50_000) for _ in range(8)]
    requests = cable.core.take_outgoing()
    assert [len(described(request)[1]) for request in requests] == [2, 2, 2, 2]
    assert all(request.ByteSize() < 1 << 20 for request in requests)
    cable.up.extend(requests)
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [50_000 * n for n in range(1, 9)]


@pytest.mark.parametrize("form", ["asked", "alone", "framed"])
@pytest.mark.parametrize("model", ["sum", "mix"])
def test_answers_may_come_in_any_form(cable, specs, form, model):
    cable.server.form = form
    signature = Signature(specs[model])
    session = opened(cable, model=model)

    def submit(value, time_steps):
        x = np.tile(np.float32([value, 0]), (time_steps, 1))
        given = {"x": x, "token": np.arange(time_steps), "gain": 1} if model == "mix" else x
        prepared = signature.prepare(given)
        return prepared, session.submit(prepared).ticket

    sent = [submit(1, 1), submit(2, 3), submit(3, 1)]
    cable.settle()
    sent.append(submit(4, 2))
    cable.settle()
    expected = [[1], [3, 5, 7], [10], [14, 18]]
    for (prepared, ticket), values in zip(sent, expected, strict=True):
        answer = signature.present(ticket.result().outputs, prepared.time_steps, one=prepared.one)
        y = answer["y"] if model == "mix" else answer
        assert y[:, 0].tolist() == values
        if model == "mix":
            assert answer["last"] == len(values) - 1


def test_the_callers_array_may_change_behind_a_step_that_waits(cable, specs):
    session = opened(cable)
    signature = Signature(specs["sum"])
    x = np.array([1, 0], np.float32)
    tickets = []
    for value in (1, 2, 3, 4):
        x[0] = value
        tickets.append(session.submit(signature.prepare(x)).ticket)
    x[0] = 100
    cable.settle()
    assert [total(ticket) for ticket in tickets] == [1, 3, 6, 10]


def test_a_refusal_aborts_what_was_not_sent_and_sends_it_no_more(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 2] = refused("MODEL_FAILED")
    tickets = []
    for _ in range(6):
        tickets.append(step(session))
        cable.up.extend(cable.core.take_outgoing())
    for _ in range(2):
        cable.end.receive(cable.up.popleft())
    received = cable.server.steps_received
    # The first answer opens the way for what has gathered; the refusal behind it closes it, before that was written.
    cable.pump_down(), cable.pump_down()
    assert total(tickets[0]) == 1
    with pytest.raises(ModelFailed):
        tickets[1].result()
    for ticket in tickets[2:]:
        with pytest.raises(StepAborted) as aborted:
            ticket.result()
        assert aborted.value.metadata["next_seq"] == "2"
    assert session.blocker() is None
    again = step(session, 10)
    cable.settle()
    assert total(again) == 11
    assert cable.server.steps_received == received + 1


def test_a_refusal_within_a_frame_concerns_that_step_and_those_behind(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 3] = refused("MODEL_FAILED")
    tickets = [step(session) for _ in range(8)]
    cable.settle()
    assert [total(ticket) for ticket in tickets[:2]] == [1, 2]
    assert [ticket.failed for ticket in tickets] == [False] * 2 + [True] * 6
    again = step(session, 5)
    cable.settle()
    assert total(again) == 7
    assert session.applied_seq == 3


def test_a_cut_sends_the_unanswered_again_in_frames(cable, step):
    session = opened(cable)
    tickets = [step(session) for _ in range(8)]
    cable.pump_up()
    cable.cut()
    cable.settle()
    assert [total(ticket) for ticket in tickets] == list(range(1, 9))
    assert [ticket.result().replayed for ticket in tickets] == [True] * 4 + [False] * 4


def test_a_goodbye_goes_behind_what_has_gathered(cable, step):
    session = opened(cable)
    tickets = []
    for _ in range(8):
        tickets.append(step(session))
        cable.up.extend(cable.core.take_outgoing())
    left = session.leave(Leaving.CLOSE)
    assert not any(request.HasField("close") for request in cable.up)
    cable.settle()
    assert [total(ticket) for ticket in tickets] == list(range(1, 9))
    left.result()
    with pytest.raises(ClientClosed):
        session.blocker()
    assert cable.server.sessions == {}


def test_a_goodbye_is_said_once(cable, step, refused):
    session = opened(cable)
    cable.server.failures["s", 1] = refused("MODEL_FAILED")
    for _ in range(8):
        step(session)
        cable.up.extend(cable.core.take_outgoing())
    left = session.leave(Leaving.DETACH)
    while cable.pump_up():
        cable.up.extend(cable.core.take_outgoing())
    cable.settle()
    left.result()
    assert cable.server.sessions["s"].applied == 0
    assert not cable.down


def test_a_population_takes_answers_that_come_alone(cable, specs):
    cable.server.form = "alone"
    signature = Signature(specs["sum"])
    from conveyor._core.batch import prepare_batch, present_batch

    population = cable.population(3)
    cable.settle()
    rows = np.arange(3)
    chunks = [np.tile([row + 1.0, 0], (row + 1, 1)) for row in range(3)]
    ragged = population.submit(rows, prepare_batch(signature, chunks, 3))
    plain = population.submit(rows, prepare_batch(signature, np.ones((3, 2)), 3))
    cable.settle()
    assert [part[:, 0].tolist() for part in present_batch(signature, ragged.batch, ragged.pieces)] == [
        [1],
        [2, 4],
        [3, 6, 9],
    ]
    assert present_batch(signature, plain.batch, plain.pieces)[:, 0].tolist() == [2, 5, 10]


def frame(columns, seqs=(1, 2), lengths=b""):
    return pb.StreamResponse(
        frame=pb.ResultFrame(
            handles=np.ones(len(seqs), np.uint32).tobytes(),
            seqs=np.array(seqs, np.uint64).tobytes(),
            lengths=lengths,
            columns=columns,
        )
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (frame([]), "0 outputs"),
        (frame([b"", b""]), "2 outputs"),
        (frame([b"123"]), "3 bytes"),
        (frame([b"12"], lengths=b"1"), "lengths"),
    ],
)
def test_a_frame_that_is_not_the_models_is_a_protocol_error(cable, step, message, words):
    session = opened(cable)
    step(session), step(session)
    with pytest.raises(ProtocolError, match=words):
        cable.core.receive(message)


def test_an_answer_of_another_size_is_a_protocol_error(cable, step, specs):
    signature = Signature(specs["sum"])
    session = opened(cable)
    ticket = step(session)
    cable.core.receive(frame([b"12345678" * 2], seqs=[1], lengths=np.uint32(2).tobytes()))
    with pytest.raises(ProtocolError, match="'y'"):
        signature.present(ticket.result().outputs, 1, one=True)


def test_answers_to_what_was_never_asked_are_ignored(cable, step):
    session = opened(cable)
    ticket = step(session)
    cable.core.receive(frame([b"12345678" * 2], seqs=[7, 8]))
    cable.core.receive(pb.StreamResponse(result=pb.StepResult(handle=1, seq=9, outputs=[t.Tensor(data=b"")])))
    assert not ticket.done
    cable.settle()
    assert total(ticket) == 1


def test_rows_refused_together_are_refused_each(cable, step, refused):
    one, two = opened(cable, "a"), opened(cable, "b")
    tickets = [step(one), step(two), step(one), step(two)]
    cable.core.take_outgoing()
    status = refused("OVERLOADED", retry_s=0.5, model="sum").status
    handles, seqs = np.array([1, 2, 1], np.uint32), np.array([1, 1, 2], np.uint64)
    errors = pb.StepErrorFrame(handles=handles.tobytes(), seqs=seqs.tobytes(), status=status)
    cable.core.receive(pb.StreamResponse(errors=errors))
    for ticket in tickets[:3]:
        with pytest.raises(Overloaded) as error:
            ticket.result()
        assert error.value.retry_s == 0.5
    assert not tickets[3].done
    assert two.blocker() is tickets[3]
    again = step(one)
    cable.settle()
    assert total(again) == 1
