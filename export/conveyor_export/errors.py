"""Why an export was refused. Every message names the offending module or tensor and says what to do."""


class ExportError(Exception):
    """An export that was refused; nothing has been written."""


class CaptureError(ExportError):
    """A module that cannot become a step model: the message names the module and the reason."""


class VerificationFailed(ExportError):  # noqa: N818 - it says what happened
    """A captured graph that does not answer as PyTorch does, in some way of feeding it."""


class WriteRefused(ExportError):  # noqa: N818 - it says what happened
    """A model that was not written: the place is taken, or cannot be written."""
