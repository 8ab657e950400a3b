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
