"""The one refusal of capture: it names the module at fault, the reason, and what to do."""


class CaptureError(Exception):
    """A module that cannot become a step model.

    Attributes:
        path: module path of the offender as `named_modules` spells it; empty for the module itself.
        reason: why it cannot be streamed.
        advice: what to do about it; may be empty.
    """

    def __init__(self, reason: str, *, path: str = "", advice: str = "") -> None:
        where = f"module {path!r}" if path else "the module"
        super().__init__(f"{where}: {reason}" + (f". {advice}" if advice else ""))
        self.path = path
        self.reason = reason
        self.advice = advice
