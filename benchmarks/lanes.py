"""Closed loops over one stream: as soon as an answer is here, the next request goes out.

Invariants: a run ends with everything answered, so the next begins on a quiet stream; sessions and their step numbers
go on from run to run; an answer that is not the expected one ends the bench.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import grpc.aio
import numpy as np
from conveyor_proto.v1 import session_pb2
from numpy.typing import NDArray

from benchmarks.cases import MODEL, TOKEN_BYTES

Tokens: TypeAlias = NDArray[np.float32]
Counts: TypeAlias = NDArray[np.int64]


class LoadError(RuntimeError):
    """The server refused a request, or answered something else than was asked."""


class Lane(Protocol):
    """One stream under load.

    Attributes:
        served: tokens of each session in the run, `[sessions]`.
        took_ns: round trip of each message in the run.
        request_bytes: size of one request.
        reply_bytes: size of one reply.
    """

    served: Counts
    took_ns: list[int]
    request_bytes: int
    reply_bytes: int

    async def open(self) -> None:
        """Creates the lane's sessions and has each step once."""

    async def run(self, end_ns: int) -> None:
        """Sends until `end_ns` (perf_counter_ns), then waits for what is on its way."""

    async def close(self) -> None:
        """Ends the stream in order."""


class MessageLane:
    """One token per message; each session has `in_flight` of them on their way.

    Args:
        call: the stream, over the generated stubs.
        tokens: `[sessions, 64]`; a session sends the same values each time, the model's cost does not depend on them.
        in_flight: as Case.in_flight.
    """

    def __init__(self, call: Any, tokens: Tokens, in_flight: int) -> None:
        self._call = call
        self._in_flight = in_flight
        # One message for each session, and only its seq changes: the client should be cheap.
        self._requests = [_step(handle, token.tobytes()) for handle, token in enumerate(tokens)]
        self._waiting: list[deque[tuple[int, int]]] = [deque() for _ in tokens]
        self.served = np.zeros(len(tokens), np.int64)
        self.took_ns: list[int] = []
        self.request_bytes = self.reply_bytes = 0

    async def open(self) -> None:
        """As Lane.open."""
        await _attach(self._call, len(self._requests), self._in_flight)
        await self.run(0)
        self.request_bytes = self._requests[0].ByteSize()

    async def run(self, end_ns: int) -> None:
        """As Lane.run."""
        self.served[:] = 0
        self.took_ns = []
        for handle in range(len(self._requests)):
            for _ in range(self._in_flight):
                await self._send(handle)
        waiting = len(self._requests) * self._in_flight
        while waiting:
            handle = self._take(await self._call.read())
            if time.perf_counter_ns() < end_ns:
                await self._send(handle)
            else:
                waiting -= 1

    async def close(self) -> None:
        """As Lane.close."""
        await _half_close(self._call)

    async def _send(self, handle: int) -> None:
        request = self._requests[handle]
        request.step.seq += 1
        self._waiting[handle].append((request.step.seq, time.perf_counter_ns()))
        await self._call.write(request)

    def _take(self, reply: Any) -> int:
        """Counts an answer; returns whose it is."""
        result = expect(reply, "result").result
        handle: int = result.handle
        seq, sent_ns = self._waiting[handle].popleft()
        self.took_ns.append(time.perf_counter_ns() - sent_ns)
        if result.seq != seq or len(result.outputs[0].data) != TOKEN_BYTES:
            raise LoadError(f"step {seq} of handle {handle} was answered by {reply}")
        self.served[handle] += 1
        self.reply_bytes = self.reply_bytes or reply.ByteSize()
        return handle


class FrameLane:
    """One token of every session per frame; `in_flight` frames are on their way.

    Args:
        call: the stream, over the generated stubs.
        tokens: `[sessions, 64]`.
        in_flight: as Case.in_flight.
    """

    def __init__(self, call: Any, tokens: Tokens, in_flight: int) -> None:
        self._call = call
        self._in_flight = in_flight
        self._rows = len(tokens)
        handles = np.arange(self._rows, dtype=np.uint32).tobytes()
        self._request = session_pb2.StreamRequest(
            frame=session_pb2.StepFrame(handles=handles, columns=[tokens.tobytes()])
        )
        self._seq = 0
        # Frames on their way: seq -> rows not answered, when it was sent.
        self._waiting: dict[int, tuple[int, int]] = {}
        self.served = np.zeros(self._rows, np.int64)
        self.took_ns: list[int] = []
        self.request_bytes = self.reply_bytes = 0

    async def open(self) -> None:
        """As Lane.open."""
        await _attach(self._call, self._rows, self._in_flight)
        await self.run(0)
        self.request_bytes = self._request.ByteSize()

    async def run(self, end_ns: int) -> None:
        """As Lane.run."""
        self.served[:] = 0
        self.took_ns = []
        for _ in range(self._in_flight):
            await self._send()
        while self._waiting:
            finished = self._take(await self._call.read())
            for _ in range(finished):
                if time.perf_counter_ns() < end_ns:
                    await self._send()

    async def close(self) -> None:
        """As Lane.close."""
        await _half_close(self._call)

    async def _send(self) -> None:
        self._seq += 1
        self._request.frame.seqs = np.full(self._rows, self._seq, np.uint64).tobytes()
        self._waiting[self._seq] = (self._rows, time.perf_counter_ns())
        await self._call.write(self._request)

    def _take(self, reply: Any) -> int:
        """Counts the rows of a reply; returns how many frames it finished."""
        frame = expect(reply, "frame").frame
        handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
        if len(frame.columns[0]) != handles.size * TOKEN_BYTES or handles.size != seqs.size:
            raise LoadError(f"a frame of {handles.size} rows holds {len(frame.columns[0])} bytes")
        self.served[handles] += 1
        self.reply_bytes = max(self.reply_bytes, reply.ByteSize())
        finished = 0
        for seq, rows in zip(*np.unique(seqs, return_counts=True), strict=True):
            left, sent_ns = self._waiting.pop(int(seq))
            if left > rows:
                self._waiting[int(seq)] = (left - int(rows), sent_ns)
            else:
                self.took_ns.append(time.perf_counter_ns() - sent_ns)
                finished += 1
        return finished


def expect(reply: Any, kind: str) -> session_pb2.StreamResponse:
    """The reply, if it is of that kind.

    Raises:
        LoadError: it is not; the message shows it.
    """
    if reply is grpc.aio.EOF:
        raise LoadError("the server ended the stream")
    message: session_pb2.StreamResponse = reply
    if message.WhichOneof("kind") != kind:
        raise LoadError(f"{kind} was expected, and this came: {message}")
    return message


async def _attach(call: Any, handles: int, in_flight: int) -> None:
    """Creates a session for each handle, one after the other."""
    for handle in range(handles):
        attach = session_pb2.AttachSession(
            handle=handle,
            mode=session_pb2.AttachSession.MODE_CREATE,
            model=MODEL,
            options=session_pb2.SessionOptions(max_in_flight=in_flight),
        )
        await call.write(session_pb2.StreamRequest(attach=attach))
        expect(await call.read(), "attached")


async def _half_close(call: Any) -> None:
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass


def _step(handle: int, data: bytes) -> session_pb2.StreamRequest:
    request = session_pb2.StreamRequest(step=session_pb2.Step(handle=handle))
    request.step.inputs.add(data=data)
    return request


def spread(tokens: Tokens, streams: int) -> Sequence[Tokens]:
    """The tokens of each stream's sessions."""
    return np.array_split(tokens, streams)
