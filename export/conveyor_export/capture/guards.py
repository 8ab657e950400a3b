"""Checks that a trace holds for all sizes: torch.export writes down what it assumed, and this tries it.

The assumptions are tried at numbers rather than proved: most of them (strides of a reshaped tensor) are always true and
beyond what the solver can show.
"""

from typing import Any

import torch

from conveyor_export.capture.errors import CaptureError

# Rows and time steps.
_TRIED = ((1, 8), (2, 9), (5, 11), (1, 16), (7, 33), (2, 100), (64, 257))
# A trace in scan form has rows alone.
_ROWS = (1, 2, 5, 7, 64)


def check_symbolic(batch: Any, time: Any) -> None:
    """Refuses a trace in which a size became a number; arguments as for `check_guards`.

    Raises:
        CaptureError: the trace holds for one size only.
    """
    for what, size in (("rows", batch), ("time steps", time)):
        if size is not None and not isinstance(size, torch.SymInt):
            raise _fixed(what, f"it must be {size}")


def check_guards(batch: Any, time: Any) -> None:
    """Refuses a trace that holds for some numbers of rows or time steps only.

    Args:
        batch: rows as the trace's shapes have them.
        time: time steps likewise, or None in scan form.

    Raises:
        CaptureError: an assumption is false at some size.
    """
    environment = batch.node.shape_env
    tried = [(rows, None) for rows in _ROWS] if time is None else list(_TRIED)
    for guard in environment.guards:
        expression = guard.expr
        for _ in range(len(environment.replacements) + 1):
            expression = expression.subs(environment.replacements)
        for rows, steps in tried:
            values = {batch.node.expr: rows} | ({} if time is None else {time.node.expr: steps})
            if expression.subs(values) == False:  # noqa: E712  sympy's false, not Python's
                names = {batch.node.expr: "rows"} | ({} if time is None else {time.node.expr: "time"})
                raise _fixed("rows or time steps", f"it needs {expression.subs(names)}")


def _fixed(what: str, detail: str) -> CaptureError:
    return CaptureError(
        f"forward() does something else for other numbers of {what} ({detail}), "
        "so chunks would not add up to the sequence",
        advice="Do not branch on, or reshape by a fixed number of, rows or time steps, and write x.shape[0] for len(x)",
    )
