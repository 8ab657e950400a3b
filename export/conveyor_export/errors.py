"""Why an export was refused. Every message names the offending module or tensor and says what to do."""

from conveyor_proto.v1 import spec_pb2


class ExportError(Exception):
    """An export that was refused, or a model file that cannot be read; nothing has been written."""


class CaptureError(ExportError):
    """A module that cannot become a step model.

    Attributes:
        path: module path of the offender as `named_modules` spells it; empty for the module itself.
        reason: why it cannot be streamed.
        advice: what to do about it; may be empty.
        owner: class of the module that was given, for a message about the module itself; may be empty.
    """

    def __init__(self, reason: str, *, path: str = "", advice: str = "", owner: str = "") -> None:
        where = f"module {path!r}" if path else f"the module ({owner})" if owner else "the module"
        super().__init__(f"{where}: {reason}" + (f". {advice}" if advice else ""))
        self.path = path
        self.reason = reason
        self.advice = advice
        self.owner = owner

    def about(self, owner: str) -> "CaptureError":
        """The same refusal of a module of that class."""
        return CaptureError(self.reason, path=self.path, advice=self.advice, owner=owner)


class VerificationFailed(ExportError):  # noqa: N818 - it says what happened
    """A captured graph that does not answer as PyTorch does, in some way of feeding it.

    Attributes:
        verification: the figures as far as they were taken; None where the module or the graph could not be run.
    """

    def __init__(self, message: str, verification: spec_pb2.Verification | None = None) -> None:
        super().__init__(message)
        self.verification = verification


class WriteRefused(ExportError):  # noqa: N818 - it says what happened
    """A model that was not written: the place is taken, or cannot be written."""
