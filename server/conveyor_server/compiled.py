"""The compiled part of the server, where it was built: a turn's steps taken at once (`_turn.pyx`).

Invariant: whatever it does, the server does without it too, by arrays: the same answers, bit for bit, and slower. It is
built when the package is installed where there is a C compiler, and left out elsewhere.
"""

try:
    from conveyor_server._turn import CELLS, MOST_HEAD_BYTES, MOST_TENSORS, Columns, Form, Model, Staging, Turn

    BUILT = True
except ImportError:
    BUILT = False

__all__ = ["BUILT", "CELLS", "MOST_HEAD_BYTES", "MOST_TENSORS", "Columns", "Form", "Model", "Staging", "Turn"]
