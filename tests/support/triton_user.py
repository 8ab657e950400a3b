"""tritonclient as tests use it: arrays as its inputs, and what its stream's callback is told, in order."""

import contextlib
import queue
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = NDArray[Any]
WAIT_S = 60.0


def given(x: Array, name: str = "x") -> list[grpcclient.InferInput]:
    """An array as the inputs of a request."""
    tensor = grpcclient.InferInput(name, list(x.shape), np_to_triton_dtype(x.dtype))
    tensor.set_data_from_numpy(x)
    return [tensor]


def answer(result: grpcclient.InferResult, name: str = "output") -> Array:
    """An output of a response."""
    array = result.as_numpy(name)
    assert array is not None, result.get_response()
    return array


def parameters(result: grpcclient.InferResult) -> dict[str, bool | int | str]:
    """What a response says beside its tensors."""
    return {
        key: getattr(value, value.WhichOneof("parameter_choice"))
        for key, value in result.get_response().parameters.items()
    }


@contextlib.contextmanager
def refused(status: str, *texts: str) -> Iterator[None]:
    """What is done here is refused, with that status and those words."""
    with pytest.raises(InferenceServerException) as caught:
        yield
    assert caught.value.status() == f"StatusCode.{status}", caught.value
    for text in texts:
        assert text in caught.value.message()


def reads(client: grpcclient.InferenceServerClient, model: str) -> int:
    """Requests whose tensors the server has read."""
    (told,) = client.get_inference_statistics(model).model_stats
    return int(told.inference_stats.compute_input.count)


def arrived(client: grpcclient.InferenceServerClient, model: str, count: int) -> None:
    """Returns when the server has read so many requests."""
    until = time.monotonic() + WAIT_S
    while reads(client, model) < count:
        assert time.monotonic() < until


class Replies:
    """The callback of a stream. Called by the stream's thread, read by the test's."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[tuple[grpcclient.InferResult | None, InferenceServerException | None]] = (
            queue.SimpleQueue()
        )

    def __call__(self, result: grpcclient.InferResult | None, error: InferenceServerException | None) -> None:
        self._told.put((result, error))

    def either(self) -> tuple[grpcclient.InferResult | None, InferenceServerException | None]:
        """The next."""
        return self._told.get(timeout=WAIT_S)

    def result(self) -> grpcclient.InferResult:
        """The next, which is a response."""
        result, error = self.either()
        assert result is not None, error
        return result

    def error(self) -> InferenceServerException:
        """The next, which is an error."""
        result, error = self.either()
        assert error is not None, result
        return error

    def empty(self) -> bool:
        """Nothing was told that was not read."""
        return self._told.empty()


@dataclass
class Script:
    """One sequence: its steps, as they are to be sent, and the answers that came."""

    id: int | str
    steps: Sequence[Array]
    answers: list[Array] = field(default_factory=list)

    def request(self, index: int) -> dict[str, Any]:
        """What the client is given to send one step of it."""
        return {
            "inputs": given(self.steps[index]),
            "request_id": f"{self.id!r}/{index}",
            "sequence_id": self.id,
            "sequence_start": index == 0,
            "sequence_end": index == len(self.steps) - 1,
        }


def scripts(ids: Sequence[int | str], features: int, seed: int) -> list[Script]:
    """Sequences of random lengths, of single time steps `[1, features]` and chunks `[time, features]`."""
    rng = np.random.default_rng(seed)
    return [
        Script(
            name,
            [
                rng.standard_normal((int(rng.choice([1, 1, 1, 2, 5])), features)).astype(np.float32)
                for _ in range(rng.integers(3, 12))
            ],
        )
        for name in ids
    ]


def interleaved(all_of_them: Sequence[Script], seed: int) -> list[tuple[Script, int]]:
    """Every step of every sequence, each sequence's in order, and otherwise shuffled."""
    turns = [script for script in all_of_them for _ in script.steps]
    random.Random(seed).shuffle(turns)
    sent: dict[int, int] = {}
    plan = []
    for script in turns:
        index = sent[id(script)] = sent.get(id(script), -1) + 1
        plan.append((script, index))
    return plan
