"""The load of one process: connections that are opened once, and put to work for a while as often as wanted.

Invariants: a run ends with everything answered, so the next one begins on quiet streams; between runs nothing is sent,
and the process does nothing; sessions and their step numbers go on from run to run.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from conveyor_proto.v1 import spec_pb2

from conveyor.bench.connection import Connection
from conveyor.bench.conversation import Conversation
from conveyor.bench.ledger import Integers
from conveyor.bench.model import inputs_of, random_columns
from conveyor.bench.opening import Opening
from conveyor.bench.patterns import pattern_of
from conveyor.bench.result import LoadResult
from conveyor.bench.sockets import Sockets
from conveyor.bench.spec import LoadError, LoadSpec
from conveyor.bench.topology import Topology

Told = Callable[[LoadResult], None]
# How often `told` hears of the run.
_TELL_S = 0.5
# The reason of a step that may be sent again.
_TRY_AGAIN = "OVERLOADED"
# Sessions that take their first step at once.
_FIRST_STEPS = 512


class Load:
    """Sessions of one model, and the connections that they are on. Belongs to one thread.

    Args:
        target: HOST:PORT of the server.
        spec: what load.
        inputs: what a step takes; None: the server is asked (a bare echo has no answer to that).
    """

    def __init__(self, target: str, spec: LoadSpec, inputs: Sequence[spec_pb2.TensorSpec] | None = None) -> None:
        self._target = target
        self._spec = spec
        self._inputs = inputs
        self._rng = np.random.default_rng(spec.seed)
        self._sockets: Sockets | None = None
        self._opening: Opening | None = None
        self._conversation: Conversation | None = None

    def open(self) -> None:
        """Connects, creates all sessions and takes each one's first step.

        Raises:
            LoadError: the server is not there, or refused something.
        """
        spec, topology = self._spec, Topology.of(self._spec)
        inputs = self._inputs
        if inputs is None:
            inputs = inputs_of(self._target, spec)
        windows = np.zeros(spec.streams, np.int64)
        connections = [Connection(int(first), windows) for first in topology.first_stream[:-1]]
        self._sockets = Sockets(self._target, connections, spec.root_certificates)
        self._opening = Opening(self._sockets, spec, topology, self._target)
        self._opening.open()
        columns = random_columns(inputs, spec, self._rng)
        self._conversation = Conversation(self._sockets, spec, topology, windows, columns)
        for first in range(0, spec.sessions, _FIRST_STEPS):
            self._take_first_steps(np.arange(first, min(first + _FIRST_STEPS, spec.sessions)))

    def _take_first_steps(self, sessions: Integers) -> None:
        """Has each session take one step, however often a busy server wants it sent."""
        conversation = self._opened()
        end = time.monotonic() + self._spec.answer_timeout_s
        while sessions.size:
            result = LoadResult()
            conversation.send(sessions, time.perf_counter_ns())
            self._drain(result)
            sessions = sessions[conversation.ledger.applied[sessions] == 0]
            if sessions.size and (set(result.refused) != {_TRY_AGAIN} or time.monotonic() > end):
                raise LoadError(f"the server refused first steps: {', '.join(result.refused)}")
            if conversation.resting:
                time.sleep(max(0, min(conversation.resting.values()) - time.perf_counter_ns()) / 1e9)
                conversation.resting.clear()

    def run(self, seconds: float, told: Told | None = None) -> LoadResult:
        """Puts the load on for that long, and waits for what is on its way then.

        Args:
            seconds: how long.
            told: hears of the run as it stands, about twice a second.

        Raises:
            LoadError: a connection or stream ended, or the server broke the protocol or fell silent.
        """
        conversation, result = self._opened(), LoadResult()
        self.tend()
        served = conversation.ledger.applied.copy()
        sockets, requests = conversation.sockets, conversation.requests
        bytes_before = (sockets.bytes_sent, sockets.bytes_received)
        cpu_s = time.process_time()
        begin_ns = time.perf_counter_ns()
        end_ns = begin_ns + int(seconds * 1e9)
        self._turn_until(end_ns, begin_ns, result, told)
        self._drain(result)
        conversation.resting.clear()
        result.elapsed_s = (time.perf_counter_ns() - begin_ns) / 1e9
        result.client_cpu_s = result.busiest_cpu_s = time.process_time() - cpu_s
        result.tick_s = self._spec.tick
        result.requests = conversation.requests - requests
        result.request_bytes = sockets.bytes_sent - bytes_before[0]
        result.reply_bytes = sockets.bytes_received - bytes_before[1]
        result.served = conversation.ledger.applied - served
        result.served_streams = np.add.reduceat(result.served, conversation.topology.first_session[:-1])
        result.time_steps = result.steps * self._spec.time_steps
        return result

    def tend(self) -> None:
        """Answers what the server asked meanwhile. A server that pings idle connections wants this now and then."""
        conversation = self._opened()
        conversation.take(0.0, LoadResult())

    def abandon(self) -> None:
        """Cuts all connections: the sessions stay on the server, on no stream."""
        if self._sockets is not None:
            self._sockets.close()
        self._sockets = self._opening = self._conversation = None

    def close(self) -> None:
        """Closes all sessions, ends the streams in order and closes the connections, as far as they still stand."""
        if self._opening is not None:
            self._opening.close()
        if self._sockets is not None:
            self._sockets.close()
        self._sockets = self._opening = self._conversation = None

    def _opened(self) -> Conversation:
        if self._conversation is None:
            raise LoadError("the load is not open")
        return self._conversation

    def _turn_until(self, end_ns: int, begin_ns: int, result: LoadResult, told: Told | None) -> None:
        conversation, clock = self._opened(), time.perf_counter_ns
        pattern = pattern_of(self._spec, conversation, begin_ns, self._rng)
        tick_ns = int(self._spec.tick * 1e9)
        tell_ns = begin_ns + int(_TELL_S * 1e9) if told else end_ns
        pattern.begin(begin_ns)
        looked_ns = begin_ns
        patience_ns = int(self._spec.answer_timeout_s * 1e9)
        give_up_ns = begin_ns + patience_ns
        while (now_ns := clock()) < end_ns:
            if tick_ns and (rest_ns := looked_ns + tick_ns - now_ns) > 0:
                time.sleep(rest_ns / 1e9)
                now_ns = clock()
            looked_ns = now_ns
            until_ns = min(end_ns, pattern.next_ns, tell_ns, give_up_ns)
            freed = conversation.take(max(0, until_ns - now_ns) / 1e9, result)
            now_ns = clock()
            if freed.size or not conversation.ledger.unanswered:
                give_up_ns = now_ns + patience_ns
            elif now_ns >= give_up_ns:
                raise LoadError(f"the server was silent for {self._spec.answer_timeout_s:g} s")
            pattern.turn(now_ns, freed)
            if now_ns >= tell_ns and told:
                result.elapsed_s = (now_ns - begin_ns) / 1e9
                told(result)
                tell_ns += int(_TELL_S * 1e9)
        pattern.end(end_ns, result)

    def _drain(self, result: LoadResult) -> None:
        conversation = self._opened()
        end = time.monotonic() + self._spec.answer_timeout_s
        while conversation.ledger.unanswered:
            if conversation.take(0.1, result).size:
                end = time.monotonic() + self._spec.answer_timeout_s
            elif time.monotonic() > end:
                count = conversation.ledger.unanswered
                raise LoadError(f"{count} steps were not answered for {self._spec.answer_timeout_s:g} s")
