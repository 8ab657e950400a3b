"""One ModelInfer call, as a stream of one request and one answer: a transport that has no threads serves it as tags.

Invariant: it is answered once. A caller that is gone takes back what has not run, unless more of its sequence follows.
"""

from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from google.protobuf.message import DecodeError

from conveyor_server.identity.caller import Caller
from conveyor_server.inference.faults import to_status
from conveyor_server.inference.infer import Inference
from conveyor_server.inference.job import Underway
from conveyor_server.metrics import Metrics
from conveyor_server.tracing import current
from conveyor_server.transport.ends import Outlet


class InferCall:
    """See the module. Core thread only.

    Args:
        inference: runs the request.
        metrics: counts refusals.
        outlet: where the answer goes.
        caller: who asks.
    """

    # Other calls' requests may have come with it, for the same run.
    eager = gathers = True

    def __init__(self, inference: Inference, metrics: Metrics, outlet: Outlet, caller: Caller) -> None:
        self._inference = inference
        self._caller = caller
        self._metrics = metrics
        self._outlet = outlet
        self._trace = current()
        self._under_way: Underway | None = None
        self._asked = self._over = False

    def receive(self, data: bytes) -> None:
        """Takes the request."""
        if self._asked:
            return
        self._asked = True
        try:
            request = pb.ModelInferRequest.FromString(data)
        except DecodeError:
            message = "the message of the call is no ModelInferRequest"
            self._answered(Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "message"}))
            return
        self._under_way = self._inference.infer(request, self._answered, self._caller, self._trace)

    def half_close(self) -> None:
        """The client sends no more: the answer is still to come, unless it has asked nothing."""
        if not self._asked:
            self._asked = True
            message = "a call of ModelInfer holds one request, and none came"
            self._answered(Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "message"}))

    def broken(self) -> None:
        """The call is gone, answered or not."""
        if not self._over:
            self._over = True
            if self._under_way is not None:
                self._under_way.cancel()

    def go_away(self, grace_s: float) -> None:
        """The server stops: the answer comes before, or the grace time is over."""

    def stop_lingering(self) -> None:
        """It never lingers."""

    def _answered(self, answer: pb.ModelInferResponse | Fault) -> None:
        if self._over:
            return
        self._over = True
        if isinstance(answer, Fault):
            status = to_status(answer)
            self._metrics.refused(status)
            self._outlet.fail(status)
        else:
            self._outlet.put(answer.SerializeToString())
            self._outlet.close()
