"""One ModelStreamInfer call: requests of any models and sequences, answered as they are done.

Invariants: answers are in the order of the requests within each sequence, and no sequence waits for another; an error
belongs to its request, and the stream goes on, unless its client asked for statuses.
"""

from collections.abc import Mapping

from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e
from google.protobuf.message import DecodeError

from conveyor_server.identity.caller import Caller
from conveyor_server.inference.faults import to_status
from conveyor_server.inference.infer import Inference
from conveyor_server.metrics import Metrics
from conveyor_server.sessions.refusals import stopping
from conveyor_server.tracing import current
from conveyor_server.transport.ends import Outlet

# A client that sends this with the call has the stream end with the first error's status.
STATUS_KEY = "triton_grpc_error"
# Of every response: nothing more comes for its request.
FINAL = "triton_final_response"


class InferStream:
    """See the module. Core thread only.

    Args:
        inference: runs the requests.
        metrics: counts refusals.
        outlet: where responses go.
        metadata: what the client sent ahead, by lower-case key.
        caller: who it is.
    """

    # A message may be another sequence's, for the same run.
    eager = gathers = True

    def __init__(
        self, inference: Inference, metrics: Metrics, outlet: Outlet, metadata: Mapping[str, str], caller: Caller
    ) -> None:
        self._inference = inference
        self._caller = caller
        self._metrics = metrics
        self._outlet = outlet
        self._ends_with_error = metadata.get(STATUS_KEY, "").lower() == "true"
        self._trace = current()
        self._unanswered = 0
        self._ending = False
        self._over = False
        # The server stops in so many seconds; 0: it does not.
        self._stops_in_s = 0.0

    def receive(self, data: bytes) -> None:
        """Takes one message."""
        if self._over:
            return
        try:
            request = pb.ModelInferRequest.FromString(data)
        except DecodeError:
            message = "a message of the stream is no ModelInferRequest"
            self._fail(Fault(e.ERROR_REASON_MESSAGE_INVALID, message, {"field": "message"}))
            return
        self._unanswered += 1
        self._inference.infer(request, lambda answer: self._answered(request.id, answer), self._caller, self._trace)

    def half_close(self) -> None:
        """The client sends no more: the call ends with the last answer. Sequences go on without it."""
        self._ending = True
        self._settle()

    def broken(self) -> None:
        """The call is gone. What was taken is run."""
        self._over = True

    def go_away(self, grace_s: float) -> None:
        """The server stops in `grace_s` seconds. What comes is refused, what was taken is answered; then it ends."""
        self._stops_in_s = max(grace_s, 1e-3)
        self._ending = True
        self._settle()

    def stop_lingering(self) -> None:
        """It does not linger: its client is told by the status of the call."""

    # ------------------------------------------------------------ within

    def _answered(self, request_id: str, answer: pb.ModelInferResponse | Fault) -> None:
        self._unanswered -= 1
        if self._over:
            return
        if isinstance(answer, pb.ModelInferResponse):
            answer.parameters[FINAL].bool_param = True
            self._outlet.put(pb.ModelStreamInferResponse(infer_response=answer).SerializeToString())
        elif self._ends_with_error:
            self._fail(answer)
            return
        else:
            self._metrics.refused(to_status(answer))
            if self._trace is not None:
                self._trace.refused(to_status(answer))
            told = pb.ModelStreamInferResponse(error_message=to_status(answer).message)
            told.infer_response.id = request_id
            told.infer_response.parameters[FINAL].bool_param = True
            self._outlet.put(told.SerializeToString())
        self._settle()

    def _fail(self, fault: Fault) -> None:
        self._over = True
        status = to_status(fault)
        self._metrics.refused(status)
        self._outlet.fail(status)

    def _settle(self) -> None:
        if self._ending and not self._unanswered and not self._over:
            self._over = True
            self._outlet.close(to_status(stopping(self._stops_in_s)) if self._stops_in_s else None)
