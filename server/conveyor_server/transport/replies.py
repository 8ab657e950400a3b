"""Answers as stream messages: single steps one by one, framed steps in columns.

Invariants: what is told about one session keeps its order; a ResultFrame holds rows of one model and each handle once.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from conveyor_proto.codec import pack
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.servicers.convert import output_tensors
from conveyor_server.sessions.events import Answer

# Larger result frames are split, so that one never nears a client's message limit (4 MiB unless it says otherwise).
MAX_FRAME_BYTES = 1 << 20

Send: TypeAlias = Callable[[session_pb2.StreamResponse, Engine | None, int], None]


class Replies:
    """Collects the answers of one turn and sends them as few messages. Core thread only.

    Args:
        send: takes a message, the engine whose answers it holds, and how many.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        # Rows of frames under way, by engine.
        self._rows: dict[Engine, dict[int, Answer]] = {}
        self._bytes: dict[Engine, int] = {}

    def single(self, handle: int, answer: Answer) -> None:
        """Answers a Step."""
        self._keep_order(handle, answer.session.engine)
        if answer.fault is not None:
            self.error(handle, answer.seq, answer.fault)
            return
        result = session_pb2.StepResult(
            handle=handle, seq=answer.seq, outputs=output_tensors(answer), replayed=answer.replayed
        )
        self._send(session_pb2.StreamResponse(result=result), answer.session.engine, 1)

    def framed(self, handle: int, answer: Answer) -> None:
        """Answers a row of a StepFrame."""
        engine = answer.session.engine
        self._keep_order(handle, engine)
        if answer.fault is not None:
            self.error(handle, answer.seq, answer.fault)
            return
        self._rows.setdefault(engine, {})[handle] = answer
        size = self._bytes.get(engine, 0) + sum(array.nbytes for array in answer.outputs)
        self._bytes[engine] = size
        if size >= MAX_FRAME_BYTES:
            self._flush(engine)

    def error(self, handle: int, seq: int, fault: Fault) -> None:
        """Refuses a step, an attach, a detach, a close or a frame."""
        error = session_pb2.StepError(handle=handle, seq=seq, status=to_status(fault))
        self._send(session_pb2.StreamResponse(error=error), None, 0)

    def about(self, handle: int, engine: Engine, message: session_pb2.StreamResponse) -> None:
        """Says something else about a session, behind its answers."""
        self._keep_order(handle, engine)
        self._send(message, None, 0)

    def flush(self) -> None:
        """Sends the frames under way."""
        for engine in list(self._rows):
            self._flush(engine)

    def _keep_order(self, handle: int, engine: Engine) -> None:
        if handle in self._rows.get(engine, ()):
            self._flush(engine)

    def _flush(self, engine: Engine) -> None:
        rows = self._rows.pop(engine)
        del self._bytes[engine]
        self._send(session_pb2.StreamResponse(frame=result_frame(rows)), engine, len(rows))


def result_frame(rows: dict[int, Answer]) -> session_pb2.ResultFrame:
    """The columns of answers by handle, all with outputs of one model."""
    answers = list(rows.values())
    lengths = [answer.length for answer in answers]
    replayed = [row for row, answer in enumerate(answers) if answer.replayed]
    return session_pb2.ResultFrame(
        handles=np.array(list(rows), np.uint32).tobytes(),
        seqs=np.array([answer.seq for answer in answers], np.uint64).tobytes(),
        lengths=b"" if max(lengths) == 1 else np.array(lengths, np.uint32).tobytes(),
        columns=[pack(column) for column in zip(*(answer.outputs for answer in answers), strict=True)],
        replayed_rows=np.array(replayed, np.uint32).tobytes(),
    )
