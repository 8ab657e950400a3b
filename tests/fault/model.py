"""The model that is served, and the answers of an undisturbed run: the file itself in plain onnxruntime, one row.

Invariant: whatever a session was once given shows in all of its later answers. The weights are so large that the state
is chaotic: what differs anywhere grows, and never fades.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from conveyor_proto import spec as specs
from numpy.typing import NDArray

from tests.fault.script import Role, Script
from tests.support.by_hand import ByHand
from tests.unit.runner.conftest import ModelMaker

NAME = "chaos"
SIZE = 4
_HIDDEN, _ANSWER = 24, 3
_GAIN = np.float32(12.0)


class _Loud(ModelMaker):
    """Its weights are larger than anybody trains them."""

    def random(self, *shape: int) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = np.asarray(super().random(*shape), np.float32)
        return weights * _GAIN if shape[-1] == _HIDDEN else weights


def write_model(models: Path) -> Path:
    """Writes an LSTM with a head as version 1 of NAME into a model repository; returns the file."""
    maker = _Loud(seed=5)
    maker.head(maker.recurrent("LSTM", maker.input("x", [SIZE]), SIZE, _HIDDEN), _HIDDEN, _ANSWER)
    maker.spec.name = NAME
    maker.spec.digest = hashlib.sha256(maker.proto().graph.SerializeToString(deterministic=True)).hexdigest()
    proto = maker.proto()
    onnx.checker.check_model(proto)
    assert specs.METADATA_KEY in {item.key for item in proto.metadata_props}
    file = models / NAME / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    onnx.save(proto, file)
    return file


def given(seed: int, session: str, step: int, length: int) -> NDArray[np.float32]:
    """What a session is given as its step, counted from 1: `[length, SIZE]`."""
    source = np.random.default_rng([seed, zlib.crc32(session.encode()), step])
    return source.standard_normal((length, SIZE), np.float32)


def digest(x: NDArray[np.float32]) -> str:
    """Names an input in a log."""
    return hashlib.blake2s(np.ascontiguousarray(x).tobytes(), digest_size=8).hexdigest()


def write_expected(file: Path, script: Script, path: Path) -> int:
    """Writes the answers of an undisturbed run, one line each; returns how many."""
    model = ByHand(file)
    count = 0
    with path.open("w") as sink:
        for role in script.roles:
            for session in role.ids:
                for line in _answers(model, script.seed, session, role):
                    sink.write(line)
                    count += 1
    return count


def _answers(model: ByHand, seed: int, session: str, role: Role) -> Iterator[str]:
    sequence = model.begin()
    for step, length in enumerate(role.lengths, 1):
        x = given(seed, session, step, length)
        answer = {"session": session, "answer": step, "input": digest(x), "output": sequence.step(x).tobytes().hex()}
        yield json.dumps(answer) + "\n"
