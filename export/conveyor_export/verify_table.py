"""The verifier's figures as a table that a person reads."""

from conveyor_proto.v1 import spec_pb2

_BLANK = "-"


def format_verification(verification: spec_pb2.Verification) -> str:
    """One line per tensor and kind of inputs, one column per mode; differences over the tolerance carry a `!`."""
    cases = verification.cases
    modes = list(dict.fromkeys(case.mode for case in cases))
    found = {(case.inputs, case.tensor, case.mode): case for case in cases}
    rows = [["inputs", "tensor", *modes]]
    for inputs, tensor in dict.fromkeys((case.inputs, case.tensor) for case in cases):
        cells = [found.get((inputs, tensor, mode)) for mode in modes]
        rows.append([inputs, tensor, *(_cell(case, verification.tolerance) for case in cells)])
    steps = sum(case.time_steps for case in cases)
    head = (
        f"largest absolute difference from PyTorch, onnxruntime {verification.onnxruntime_version}, "
        f"tolerance {verification.tolerance:g}, {steps} comparisons"
    )
    return "\n".join([head, *align(rows, left=2)])


def align(rows: list[list[str]], left: int = 1, indent: str = "  ") -> list[str]:
    """Lines whose columns line up: the first `left` columns to the left, the rest to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(case: spec_pb2.VerificationCase | None, tolerance: float) -> str:
    if case is None:
        return _BLANK
    text = "0" if case.max_abs_difference == 0 else f"{case.max_abs_difference:.1e}"
    return text if case.max_abs_difference <= tolerance else f"{text} !"
