"""What tests of sessions in a store do with a client's core."""

import numpy as np


def total(ticket):
    return np.frombuffer(ticket.result().outputs[0], np.float32).reshape(-1, 2)[-1, 0]


def opened(cable, **claim):
    session = cable.session(**claim)
    cable.settle()
    session.opened.result()
    return session


def stepped(cable, step, session, count):
    """Steps and has them answered, one after the other."""
    for _ in range(count):
        step(session)
        cable.settle()


def steps_of(requests):
    """(seq, acked seq) of every step in some messages."""
    pairs = []
    for request in requests:
        if request.HasField("step"):
            pairs.append((request.step.seq, request.step.acked_seq))
        elif request.HasField("frame"):
            frame = request.frame
            columns = [np.frombuffer(column, np.uint64).tolist() for column in (frame.seqs, frame.acked_seqs)]
            pairs += zip(*columns, strict=True)
    return pairs


def kinds(requests):
    return [request.WhichOneof("kind") for request in requests]


def crash(cable):
    cable.server.crash()
    cable.cut()


def reattach(cable):
    """Has an attach granted and nothing else; returns what is sent then."""
    cable.pump_up(), cable.pump_down()
    return cable.core.take_outgoing()


def pumped(cable):
    """Delivers everything that needs no waiting."""
    while cable.pump_up() or cable.pump_down():
        pass


def until_done(cable, ticket, before_each=lambda: None):
    """Lets the time pass, a try at a time; returns how much of it, in seconds."""
    clock = 0.0
    while not ticket.done:
        before_each()
        pumped(cable)
        cable.core.schedule(clock, 0.5)
        clock += cable.core.retry(clock) or 0.0
        cable.core.retry(clock)
    return clock
