"""Answers that are told one by one, as stream messages: single steps by themselves, rows of frames in columns.

Invariants: what is told about one session keeps its order; a ResultFrame holds rows of one model, those of one handle
in order.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from conveyor_proto.codec import pack
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import session_pb2

from conveyor_server.engine.engine import Engine
from conveyor_server.servicers.convert import output_tensors
from conveyor_server.sessions.events import Answer
from conveyor_server.transport.result_wire import DURABLE_BYTES, MAX_FRAME_BYTES, ResultWriter

Send: TypeAlias = Callable[[session_pb2.StreamResponse], None]
Row: TypeAlias = tuple[int, Answer]


class Replies:
    """Collects the answers of one turn and sends them as few messages. Core thread only.

    Args:
        send: takes a message.
        put: takes the bytes of one.
        writer_of: writes the results of an engine's model.
        says_durable: answers say their session's durable_seq, as those that `writer_of` gives do.
    """

    __slots__ = ("_bytes", "_handles", "_put", "_rows", "_says_durable", "_send", "_writer_of")

    def __init__(
        self,
        send: Send,
        put: Callable[[bytes], None],
        writer_of: Callable[[Engine], ResultWriter],
        *,
        says_durable: bool,
    ) -> None:
        self._send = send
        self._put = put
        self._writer_of = writer_of
        self._says_durable = says_durable
        # Rows of frames under way, by engine, and the handles among them: as keys, for an empty set takes 216 bytes.
        self._rows: dict[Engine, list[Row]] = {}
        self._handles: dict[int, None] = {}
        self._bytes: dict[Engine, int] = {}

    def single(self, handle: int, answer: Answer) -> None:
        """Answers a Step."""
        self._keep_order(handle)
        if answer.fault is not None:
            self.error(handle, answer.seq, answer.fault)
            return
        if answer.replayed:
            result = session_pb2.StepResult(
                handle=handle,
                seq=answer.seq,
                outputs=output_tensors(answer),
                replayed=True,
                durable_seq=answer.session.durable_seq if self._says_durable else None,
            )
            self._send(session_pb2.StreamResponse(result=result))
            return
        session = answer.session
        durable_seq = session.durable_seq if self._says_durable else 0
        self._put(self._writer_of(session.engine).write_one(handle, answer.seq, answer.outputs, durable_seq))

    def framed(self, handle: int, answer: Answer) -> None:
        """Answers a row of a StepFrame."""
        engine = answer.session.engine
        if answer.fault is not None:
            self._keep_order(handle)
            self.error(handle, answer.seq, answer.fault)
            return
        self._rows.setdefault(engine, []).append((handle, answer))
        self._handles[handle] = None
        size = sum(array.nbytes for array in answer.outputs) + (DURABLE_BYTES if self._says_durable else 0)
        size = self._bytes[engine] = self._bytes.get(engine, 0) + size
        if size >= MAX_FRAME_BYTES:
            self.flush()

    def error(self, handle: int, seq: int, fault: Fault) -> None:
        """Refuses a step, an attach, a detach, a close or a frame."""
        error = session_pb2.StepError(handle=handle, seq=seq, status=to_status(fault))
        self._send(session_pb2.StreamResponse(error=error))

    def about(self, handle: int, message: session_pb2.StreamResponse) -> None:
        """Says something else about a session, behind its answers."""
        self._keep_order(handle)
        self._send(message)

    def flush(self) -> None:
        """Sends the frames under way."""
        rows, self._rows = self._rows, {}
        self._handles.clear()
        self._bytes.clear()
        for answers in rows.values():
            self._send(session_pb2.StreamResponse(frame=result_frame(answers, says_durable=self._says_durable)))

    def _keep_order(self, handle: int) -> None:
        if handle in self._handles:
            self.flush()


def result_frame(rows: Sequence[Row], *, says_durable: bool) -> session_pb2.ResultFrame:
    """The columns of answers with their handles, all with outputs of one model."""
    answers = [answer for _, answer in rows]
    lengths = [answer.length for answer in answers]
    replayed = [row for row, answer in enumerate(answers) if answer.replayed]
    durable = [answer.session.durable_seq for answer in answers] if says_durable else []
    return session_pb2.ResultFrame(
        handles=np.array([handle for handle, _ in rows], np.uint32).tobytes(),
        seqs=np.array([answer.seq for answer in answers], np.uint64).tobytes(),
        lengths=b"" if max(lengths) == 1 else np.array(lengths, np.uint32).tobytes(),
        columns=[pack(column) for column in zip(*(answer.outputs for answer in answers), strict=True)],
        replayed_rows=np.array(replayed, np.uint32).tobytes(),
        durable_seqs=np.array(durable, np.uint64).tobytes(),
    )
