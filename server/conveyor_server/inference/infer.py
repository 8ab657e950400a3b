"""One request, one answer: what unary calls and streams have in common.

Invariant: every request is answered exactly once, with a response or with a fault, on the core thread.
"""

import time

from conveyor_proto.codec import WireError
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import ANYBODY, Caller
from conveyor_server.inference.job import Job, Reply, Underway
from conveyor_server.inference.names import session_id
from conveyor_server.inference.parameters import read_parameters
from conveyor_server.inference.plain import Plain
from conveyor_server.inference.sequences import Sequences
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.tracing import CallTrace, within


class Inference:
    """Runs requests. Core thread only.

    Args:
        core: what drives the sessions.
        statistics: counts what is read, answered and refused.
    """

    def __init__(self, core: Core, statistics: Statistics) -> None:
        self._core = core
        self._statistics = statistics
        self._sequences = Sequences(core, statistics)
        self._plain = Plain(core, statistics)

    def infer(
        self, request: pb.ModelInferRequest, reply: Reply, caller: Caller = ANYBODY, trace: CallTrace | None = None
    ) -> Underway | None:
        """Takes a request; None: it is answered already.

        Args:
            request: as it came.
            reply: gets the response, or why there is none.
            caller: who sent it.
            trace: of the call that it came with.
        """
        if trace is None:
            return self._infer(request, reply, caller, None)
        with within(trace):
            return self._infer(request, reply, caller, trace)

    def _infer(
        self, request: pb.ModelInferRequest, reply: Reply, caller: Caller, trace: CallTrace | None
    ) -> Underway | None:
        try:
            model = request.model_name
            if not model:
                raise refuse(
                    e.ERROR_REASON_MESSAGE_INVALID, "model_name is needed: which model is meant?", field="model_name"
                )
            parameters = read_parameters(request.parameters, model)
            engine = self._engine(request, parameters.sequence, caller)
            reply = _counted(reply, self._statistics, engine)
            return self._run(Job(request, parameters, reply, caller, trace), engine)
        except (Refused, WireError) as refusal:
            reply(refusal.fault)
            return None

    def _run(self, job: Job, engine: Engine) -> Underway:
        self._core.kick()
        if not engine.spec.states:
            return self._plain.run(job, engine)
        if job.parameters.sequence is None:
            model = job.request.model_name
            raise refuse(
                e.ERROR_REASON_SEQUENCE_INVALID,
                f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID: the model "
                "has state, and sequence_id says whose",
                model=model,
                sequence_id="",
            )
        return self._sequences.run(job)

    def _engine(self, request: pb.ModelInferRequest, sequence: int | str | None, caller: Caller) -> Engine:
        """Of the sequence's session, if there is one; else of the version that is asked for."""
        if sequence is not None:
            name = caller.full_name(session_id(request.model_name, sequence))
            session = self._core.directory.sessions.get(name)
            if session is not None and session.engine.model == request.model_name:
                return session.engine
        return self._core.repository.find(request.model_name, request.model_version, caller.uses).serving


def _counted(reply: Reply, statistics: Statistics, engine: Engine) -> Reply:
    began = time.perf_counter()

    def told(answer: pb.ModelInferResponse | Fault) -> None:
        counts = statistics.of(engine)
        took_s = time.perf_counter() - began
        if isinstance(answer, Fault):
            counts.failed(took_s)
        else:
            counts.answered(took_s)
        reply(answer)

    return told
