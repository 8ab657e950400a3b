"""Sessions that are gone, and why.

Invariant: whoever asks for a session that is not here is told the reason while it is remembered, and never given a new
one in its place.
"""

from collections import OrderedDict

from conveyor_proto.reasons import Fault
from conveyor_proto.v1 import errors_pb2 as e

from conveyor_server.identity.caller import public_name


class Departed:
    """The last sessions that went. Core thread only.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._faults: OrderedDict[str, Fault] = OrderedDict()

    def remember(self, session_id: str, fault: Fault) -> None:
        """A session is gone, and that is what whoever asks for it is told."""
        self._faults[session_id] = fault
        while len(self._faults) > self._most:
            self._faults.popitem(last=False)

    def forget(self, session_id: str) -> None:
        """The id belongs to a live session again."""
        self._faults.pop(session_id, None)

    def why(self, session_id: str) -> Fault:
        """Why a session is not here: SESSION_EXPIRED or SESSION_CLOSED while that is remembered, or NOT_FOUND."""
        return self._faults.get(session_id) or Fault(
            e.ERROR_REASON_SESSION_NOT_FOUND,
            f"session {public_name(session_id)!r} is not on this server: it was never here, or the server was "
            "restarted since; create a session and send its history again",
            {"session_id": public_name(session_id)},
        )
