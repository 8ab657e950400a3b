"""One request on its way, from what was read of it to its answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from conveyor_proto.codec import WireError
from conveyor_proto.inference import service_pb2 as pb
from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.engine.engine import Engine
from conveyor_server.errors import Refused, refuse
from conveyor_server.identity.caller import ANYBODY, Caller
from conveyor_server.incidents import record
from conveyor_server.inference.parameters import Parameters
from conveyor_server.inference.requests import Content, read_content
from conveyor_server.inference.statistics import Statistics
from conveyor_server.servicers.core import Core
from conveyor_server.sessions.session import Session
from conveyor_server.tracing import CallTrace

Reply: TypeAlias = Callable[[pb.ModelInferResponse | Fault], None]


@dataclass(slots=True, eq=False)
class Job:
    """A request that is to be answered exactly once.

    Attributes:
        request: as it came.
        parameters: what it says beside its tensors.
        reply: gets the response, or why there is none. Core thread.
        caller: who sent it.
        trace: of the call that it came with.
        notes: parameters of its response.
    """

    request: pb.ModelInferRequest
    parameters: Parameters
    reply: Reply
    caller: Caller = ANYBODY
    trace: CallTrace | None = None
    notes: dict[str, bool | int | str] = field(default_factory=dict)

    def read(self, engine: Engine, statistics: Statistics, *, max_time_steps: int) -> Content:
        """Its tensors, as that model takes them.

        Args:
            engine: of the model.
            statistics: counts it.
            max_time_steps: of one row.

        Raises:
            WireError: as requests.read_content.
            Refused: as requests.read_content; MESSAGE_INVALID for what it fails on unexpectedly. A request may be read
                while another one's answer is handed out, and is nobody's business but its sender's.
        """
        began = time.perf_counter()
        try:
            content = read_content(self.request, engine.spec, self.request.model_name, max_time_steps=max_time_steps)
        except (Refused, WireError):
            raise
        except Exception as error:  # a defect: logged whole, told by its id
            incident = record("a request could not be read", error)
            message = f"the request's tensors cannot be read: incident {incident} in the server's log"
            raise refuse(e.ERROR_REASON_MESSAGE_INVALID, message, field="inputs") from error
        statistics.of(engine).read(time.perf_counter() - began)
        return content


def take_back(core: Core, session: Session, seq: int, reply_to: object) -> bool:
    """Takes back an accepted step that has not begun and has nothing behind it; False: it will be answered."""
    waiting = session.pending
    if session.accepted_seq != seq or not waiting or waiting[-1].step.running:
        return False
    core.directory.cancel(session, seq, reply_to)
    core.kick()
    return session.accepted_seq < seq


class Underway(Protocol):
    """A request that is not answered yet."""

    def cancel(self) -> None:
        """The caller is gone: what has not run is taken back where that harms no other request. Core thread."""
