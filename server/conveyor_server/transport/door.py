"""The door of one method: asks the gate who a call is from, in gRPC's terms.

Invariant: a call that did not pass has moved nothing, and its client is told in the words of the service it called.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from google.rpc import status_pb2

from conveyor_server.errors import Refused
from conveyor_server.identity.gate import AUTHORIZATION_KEY, TENANT_KEY, Admitted, Gate

# What a client's certificate says of it, as gRPC names it.
_NAMES = ("x509_common_name", "x509_subject_alternative_name")
_SHOWN = (AUTHORIZATION_KEY, TENANT_KEY)


class Guest(NamedTuple):
    """Whoever has come in.

    Attributes:
        metadata: what the client sent ahead, by lower-case key.
        admitted: who it is.
        again: asks the gate again, as if the call came now; None: the gate asks nobody.
    """

    metadata: Mapping[str, str]
    admitted: Admitted
    again: Callable[[], Admitted] | None


class Door:
    """Any thread.

    Args:
        gate: asks who they are.
        path: of the method, as `/conveyor.v1.SessionService/Step`.
        words: how the service says no.

    Attributes:
        method: the same without the first slash, which is a method's full name.
    """

    def __init__(self, gate: Gate, path: str, words: Callable[[Any], status_pb2.Status]) -> None:
        self._gate = gate
        self._path = path
        self.method = path.removeprefix("/")
        self._words = words

    def ask(self, context: Any) -> Guest | status_pb2.Status:
        """Whoever calls; or the status to end the call with, which is to be counted.

        Args:
            context: a ServicerContext of either kind.
        """
        metadata = metadata_of(context)
        if not self._gate.asks:
            return self._let_in(metadata, partial(self._gate.admit, self._path, metadata, list))
        # What is kept for as long as a stream lives.
        shown = {key: metadata[key] for key in _SHOWN if key in metadata}
        names = names_in(context.auth_context())
        return self._let_in(metadata, partial(self._gate.admit, self._path, shown, lambda: names))

    def _let_in(self, metadata: Mapping[str, str], admit: Callable[[], Admitted]) -> Guest | status_pb2.Status:
        try:
            return Guest(metadata, admit(), admit if self._gate.asks else None)
        except Refused as refusal:
            return self._words(refusal.fault)


def metadata_of(context: Any) -> Mapping[str, str]:
    """What a call's client sent ahead, by lower-case key; what is no text is left out."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def names_in(authenticated: Mapping[str, Sequence[bytes]]) -> list[str]:
    """The names in a client's certificate that was checked."""
    return [name.decode(errors="replace") for key in _NAMES for name in authenticated.get(key, ())]
