"""`make bench-inference`: what a request of the Open Inference Protocol costs the server.

Sequences of one token a request, each sent when the last is answered: all on one ModelStreamInfer stream, or each by a
ModelInfer call of its own. The client is Python on bare messages and is the limit, so what counts is the server's CPU.
"""

import argparse
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from conveyor_proto.inference import service_pb2 as pb

from benchmarks.accounting import Meter
from benchmarks.program import Findings, Goal, run
from benchmarks.stage import MODEL, say, stage

SEQUENCES = 64
# What NVIDIA Triton's sequence batcher takes for a request, as was measured before Conveyor was begun.
TRITON_US = 160.0
_SERVICE = "/inference.GRPCInferenceService/"
_WARM_UP_S = 0.3
_TOKEN = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32).tobytes()


def request(sequence: int, *, start: bool = False) -> bytes:
    """One time step of a sequence."""
    message = pb.ModelInferRequest(model_name=MODEL, id=str(sequence), raw_input_contents=[_TOKEN])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1, 64])
    message.parameters["sequence_id"].int64_param = sequence
    if start:
        message.parameters["sequence_start"].bool_param = True
    return message.SerializeToString()


class Loop:
    """Sends each sequence's next request when its last is answered, from threads of gRPC's own.

    Attributes:
        answered: requests so far.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.failure: Exception | None = None
        self._messages = {sequence: request(sequence) for sequence in range(1, SEQUENCES + 1)}
        self._stopping = False

    def over_a_stream(self, channel: grpc.Channel) -> Callable[[], None]:
        """Begins; returns what ends it."""
        sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(f"{_SERVICE}ModelStreamInfer", None, None)
        call = method(iter(sent.get, None))

        def answers() -> Iterator[int]:
            for data in call:
                response = pb.ModelStreamInferResponse.FromString(data)
                if response.error_message:
                    raise RuntimeError(response.error_message)
                yield int(response.infer_response.id)

        return self._begin(lambda _, message: sent.put(message), answers(), lambda: sent.put(None))

    def by_calls(self, channel: grpc.Channel) -> Callable[[], None]:
        """Begins; returns what ends it."""
        method: Any = channel.unary_unary(f"{_SERVICE}ModelInfer", None, None)
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

        def send(sequence: int, message: bytes) -> None:
            method.future(message).add_done_callback(lambda call: done.put((sequence, call)))

        def answers() -> Iterator[int]:
            while True:
                sequence, call = done.get()
                call.result()
                yield sequence

        return self._begin(send, answers(), lambda: None)

    def _begin(
        self, send: Callable[[int, bytes], None], answers: Iterator[int], close: Callable[[], None]
    ) -> Callable[[], None]:
        def follow() -> None:
            left = SEQUENCES
            try:
                while left:
                    sequence = next(answers)
                    self.answered += 1
                    if self._stopping:
                        left -= 1
                    else:
                        send(sequence, self._messages[sequence])
            except Exception as error:  # for the program's own thread, which looks
                self.failure = error
            close()

        for sequence in self._messages:
            send(sequence, request(sequence, start=True))
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()

        def end() -> None:
            self._stopping = True
            thread.join(20)

        return end


FORMS = {
    "stream": (f"{SEQUENCES} sequences on one stream", Loop.over_a_stream),
    "calls": (f"{SEQUENCES} sequences, a call for each request", Loop.by_calls),
}


def judge(label: str, us: Sequence[float]) -> Goal:
    """A request costs less than where these clients come from."""
    cost = statistics.median(us)
    return Goal(
        f"{label}: {cost:.0f} us of server CPU a request ({min(us):.0f}-{max(us):.0f}), model included; "
        f"{TRITON_US:.0f} to beat",
        cost < TRITON_US,
    )


def measure(settings: argparse.Namespace) -> Findings:
    """Both forms against one server."""
    seconds, rounds = (0.3, 1) if settings.quick else (settings.seconds, settings.rounds)
    figures: dict[str, Any] = {}
    goals: list[Goal] = []
    with stage() as on:
        service = on.serve()
        for name, (label, begin) in FORMS.items():
            say(label)
            with grpc.insecure_channel(service.address) as channel:
                loop = Loop()
                end = begin(loop, channel)
                time.sleep(_WARM_UP_S)
                us, rates = [], []
                for _ in range(rounds):
                    meter, before = Meter(service.pid, []), loop.answered
                    time.sleep(seconds)
                    usage, answered = meter.stop(), loop.answered - before
                    if loop.failure is not None:
                        raise loop.failure
                    us.append(usage.server_s / answered * 1e6)
                    rates.append(answered / usage.elapsed_s)
                end()
            print(f"{label}: {statistics.median(rates):,.0f} requests/s by this client", flush=True)
            figures[name] = {"server_us": us, "requests_per_s": rates}
            goals.append(judge(label, us))
    return Findings(figures, goals)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each form (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run("inference", __doc__, measure, add=_add, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
