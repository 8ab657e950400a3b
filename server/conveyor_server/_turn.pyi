from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MOST_TENSORS: int
MOST_HEAD_BYTES: int
CELLS: Mapping[str, int]

class _Slots(Protocol):
    free: int
    stack: NDArray[np.int32]

class _Record(Protocol):
    def plane(self, position: int) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint64]]: ...
    def trim_one(self, row: int, acked_seq: int) -> None: ...

class _Sender(Protocol):
    number: int
    rows: dict[int, int]
    handle: int
    row: int

class Columns:
    def __init__(self, arrays: list[NDArray[np.uint8]], sizes: list[int]) -> None: ...

class Staging:
    @property
    def rows(self) -> int: ...
    @property
    def frame(self) -> Any: ...
    def __init__(
        self,
        rows: int,
        inputs: Columns,
        outputs: Columns,
        lengths: NDArray[np.int32],
        sources: NDArray[np.int64],
        destinations: NDArray[np.int64],
        finite: NDArray[np.uint8] | None,
        initial_slot: int,
        frame: object,
    ) -> None: ...

class Model:
    @property
    def engine(self) -> Any: ...
    def __init__(
        self,
        number: int,
        engine: object,
        most_rows: int,
        most_later: int,
        held: NDArray[np.int64],
        slots: _Slots,
        record: _Record,
        inputs: list[tuple[int, int]],
        outputs: list[int],
        weights: NDArray[np.uint64],
    ) -> None: ...

class Form:
    def __init__(
        self,
        model: Model,
        message: bytes,
        mask: bytes,
        numbers: Sequence[tuple[int, int]],
        inputs: Sequence[int],
        label: tuple[int, int],
        answer: bytes,
        answer_label: int,
        outputs: Sequence[int],
        durable: int,
    ) -> None: ...

class Turn:
    @property
    def rows(self) -> int: ...
    @property
    def model(self) -> Model | None: ...
    @property
    def senders(self) -> list[Any]: ...
    @property
    def later(self) -> tuple[list[Any], list[bytes]]: ...
    @property
    def others(self) -> tuple[list[Any], list[bytes]]: ...
    @property
    def aside(self) -> tuple[list[Any], list[bytes]]: ...
    @property
    def stranger(self) -> tuple[Any, bytes] | None: ...
    def __init__(self, cells: NDArray[np.int64], most_rows: int, durable: NDArray[np.int64] | None = None) -> None: ...
    def add_model(self, model: Model) -> None: ...
    def add_form(self, form: Form) -> None: ...
    def model_of(self, number: int) -> Model | None: ...
    def forget(self, number: int) -> None: ...
    def where(self, index: int) -> tuple[int, int]: ...
    def done(self) -> None: ...
    def read(self, senders: Sequence[_Sender], messages: list[bytes]) -> bool: ...
    def fill(self, staging: Staging) -> bool: ...
    def commit(self, staging: Staging, now: float) -> bool: ...
    def answers(self, staging: Staging) -> list[bytes]: ...
