"""The one refusal of capture: it names the module at fault, the reason, and what to do."""

from conveyor_export.errors import CaptureError

__all__ = ["CaptureError"]
