"""What is fuzzed: every decoder of what a client, a file or a store can say, and the whole of a stream.

Invariant: a target returns what became of an input, or raises; whatever it raises is a defect.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from conveyor_proto import codec, vectors
from conveyor_proto import spec as specs
from conveyor_proto.fingerprint import fingerprints
from conveyor_proto.inference import service_pb2
from conveyor_proto.reasons import from_status
from conveyor_proto.v1 import session_pb2, spec_pb2, tensor_pb2
from conveyor_server import seal, snapshot
from conveyor_server.errors import Refused, StartError
from conveyor_server.frame_inputs import read_columns, read_numbers
from conveyor_server.identity.access import read_access
from conveyor_server.identity.jwks import Issuer, NotAccepted
from conveyor_server.inference.parameters import read_parameters
from conveyor_server.inference.requests import read_content
from conveyor_server.inputs import decode_step
from conveyor_server.keeper import body, head
from conveyor_server.keeper.token import ResumeToken
from conveyor_server.runner.base import RunnerUnavailable
from conveyor_server.runner.description import parse_description
from conveyor_server.runner.step_file import read_step_file
from conveyor_server.runner.strict_yaml import NotStrict
from google.protobuf.message import DecodeError
from issuer import AUDIENCE, ISSUER, Signer

from tests.fuzz import seeds

MAX_TIME_STEPS = 4096
F32, F64 = tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT64


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    Attributes:
        name: of it.
        seeds: good inputs.
        run: takes an input, and returns a word for what became of it.
        share: how many of all inputs it gets, beside the others.
    """

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], str]
    share: int = 10


def _spec() -> spec_pb2.ModelSpec:
    spec = spec_pb2.ModelSpec(spec_version=1, name="m", digest="d", state_bytes=24, lengths_input="lengths")
    spec.inputs.add(name="x", dtype=F32, shape=[3], has_time=True)
    spec.inputs.add(name="gain", dtype=F64, shape=[], has_time=False)
    spec.outputs.add(name="y", dtype=F32, shape=[2], has_time=True)
    spec.states.add(name="h", input_name="h.in", output_name="h.out", shape=[4], dtype=F32)
    spec.states.add(name="c", input_name="c.in", output_name="c.out", shape=[1], dtype=F64)
    return spec


SPEC = _spec()


def _refusal(error: Exception) -> str:
    fault = getattr(error, "fault", None)
    return type(error).__name__ if fault is None else fault.reason_name


def parsed(message: Any, data: bytes) -> Any:
    """The message, or None where the bytes are none."""
    try:
        return message.FromString(data)
    except DecodeError:
        return None


# ------------------------------------------------------------ the wire


def step(data: bytes) -> str:
    message = parsed(session_pb2.Step, data)
    if message is None:
        return "no message"
    try:
        content = decode_step(message.inputs, SPEC, max_time_steps=MAX_TIME_STEPS)
    except codec.WireError as error:
        return _refusal(error)
    assert 0 < content.length <= MAX_TIME_STEPS
    assert [array.shape for array in content.inputs] == [(content.length, 3), ()]
    assert all(np.isfinite(array).all() for array in content.inputs)
    return "ok"


def tensor(data: bytes) -> str:
    message = parsed(tensor_pb2.Tensor, data)
    if message is None:
        return "no message"
    try:
        array = codec.decode(message)
    except codec.WireError as error:
        return _refusal(error)
    again = codec.decode(codec.encode(array, message.name))
    assert again.dtype == array.dtype
    assert again.tobytes() == array.tobytes()
    return "ok"


def frame(data: bytes) -> str:
    message = parsed(session_pb2.StepFrame, data)
    if message is None:
        return "no message"
    try:
        numbers = read_numbers(message)
        columns = read_columns(message, len(numbers.handles), SPEC)
    except codec.WireError as error:
        return _refusal(error)
    rows = len(numbers.handles)
    assert len(numbers.seqs) == len(columns.lengths) == rows
    block = columns.block(MAX_TIME_STEPS)
    if block is not None:
        assert [array.shape for array in block.inputs] == [(rows, block.length, 3), (rows,)]
        return "block"
    return "ragged"


def inference(data: bytes) -> str:
    message = parsed(service_pb2.ModelInferRequest, data)
    if message is None:
        return "no message"
    try:
        read_parameters(message.parameters, message.model_name)
        content = read_content(message, SPEC, message.model_name, max_time_steps=MAX_TIME_STEPS)
    except (codec.WireError, Refused) as error:
        return _refusal(error)
    assert content.inputs[0].shape == (content.batch, content.length, 3)
    return "ok"


def status(data: bytes) -> str:
    from google.rpc import status_pb2

    message = parsed(status_pb2.Status, data)
    return "no message" if message is None else from_status(message).reason_name


def snapshots(data: bytes) -> str:
    # Half of them with a seal that fits, as if a client could make one.
    whole = snapshot.PLAIN.close(data) if data[:1] != b"C" else data
    try:
        content = snapshot.read(whole)
        states = snapshot.states_for(content, _ENGINE)
    except Refused as error:
        return _refusal(error)
    assert [state.shape for state in states] == [(4,), (1,)]
    return "ok"


def resume_token(data: bytes) -> str:
    token = ResumeToken.read(data.decode("latin-1"))
    if token is None:
        return "none"
    assert 0.0 <= token.left_s() <= 60.0
    return "ok"


def jwt(data: bytes) -> str:
    try:
        _ISSUER.read(data.decode("latin-1"))
    except NotAccepted:
        return "not accepted"
    raise AssertionError("a token counts that the issuer has not signed")


# ------------------------------------------------------------ files and records


def model_spec(data: bytes) -> str:
    try:
        spec = specs.parse_spec(data.decode("utf-8", "replace"))
    except (specs.SpecError, codec.WireError) as error:
        return type(error).__name__
    assert specs.parse_spec(specs.dump_spec(spec)) == spec
    for state in spec.states:
        specs.initial_row(state)
    return "ok"


def verifier_vectors(data: bytes) -> str:
    try:
        found = vectors.parse_vectors(data.decode("utf-8", "replace"), SPEC)
    except vectors.VectorsError as error:
        return type(error).__name__
    assert vectors.vectors_bytes(found) <= vectors.MAX_BYTES
    for vector in found.vectors:
        time_steps = vector.time_steps
        assert [len(item) for item in vector.inputs] == [12 * time_steps, 8]
        assert vectors.difference(vector.outputs[0], np.zeros((time_steps, 2), np.float32)) >= 0
        for state, like in zip(vector.states, (np.zeros(4, np.float32), np.zeros(1)), strict=True):
            assert vectors.difference(state, like) >= 0
    return "ok"


def model_yaml(data: bytes) -> str:
    try:
        parse_description(data)
    except NotStrict:
        return "not strict"
    return "ok"


def onnx_file(data: bytes) -> str:
    _FILE.write_bytes(data)
    try:
        read_step_file(_FILE)
    except RunnerUnavailable:
        return "refused"
    return "ok"


def access(data: bytes) -> str:
    _ACCESS.write_bytes(data)
    try:
        read_access(_ACCESS)
    except StartError:
        return "refused"
    return "ok"


def jwks(data: bytes) -> str:
    _JWKS.write_bytes(data)
    try:
        Issuer(_JWKS, name="i", audience="a")
    except ValueError:
        return "refused"
    return "ok"


def keys(data: bytes) -> str:
    _KEYS.write_bytes(data)
    try:
        seal.read_keys(_KEYS)
    except StartError:
        return "refused"
    return "ok"


def stored_head(data: bytes) -> str:
    import zlib

    whole = head.MAGIC + zlib.crc32(data).to_bytes(4, "little") + data
    for given in (data, whole):
        try:
            content = head.decode("s", given)
            head.options_of(content)
        except head.HeadInvalid:
            continue
        return "ok"
    return "invalid"


def stored_body(data: bytes) -> str:
    start = body.seed("s", "d")
    if len(data) >= body.HEAD.itemsize and len(data) % 8 == 0:
        # With a checksum that fits: by accident none does.
        rows = np.frombuffer(data, np.uint8)[np.newaxis].copy()
        rows[:, 8:16] = 0
        checksum = (fingerprints([rows])[0] + np.uint64(start)).astype("<u8").tobytes()
        data = data[:8] + checksum + data[16:]
    try:
        body.decode(data, start, SPEC)
    except body.BodyInvalid:
        return "invalid"
    return "ok"


class _Engine:
    """What a snapshot is compared with."""

    model, version, spec = "m", "1", SPEC


def _issuer() -> tuple[Issuer, bytes, bytes]:
    """An issuer, its keys, and a token of its that has expired: what is signed well does not count either."""
    signer = Signer("k1")
    content = json.dumps({"keys": [signer.public()]}).encode()
    path = _FOLDER / "issuer.json"
    path.write_bytes(content)
    return Issuer(path, name=ISSUER, audience=AUDIENCE), content, signer.token(exp=1).encode()


_ENGINE: Any = _Engine()
_FOLDER = Path(mkdtemp(prefix="conveyor-fuzz-"))
_FILE, _ACCESS, _JWKS, _KEYS = (_FOLDER / name for name in ("model.onnx", "access.toml", "jwks.json", "keys"))
_ISSUER, _KEY_SET, _TOKEN = _issuer()


def targets() -> list[Target]:
    """All of them."""
    # Here: it makes two servers.
    from tests.fuzz.twins import Twins, messages

    return [
        Target("stream", messages(), Twins().run, 30),
        Target("step", seeds.steps(), step, 15),
        Target("frame", seeds.frames(), frame, 15),
        Target("tensor", [item.SerializeToString() for item in seeds.tensors(2)], tensor),
        Target("inference", seeds.inferences(), inference),
        Target("snapshot", seeds.snapshots(), snapshots),
        Target("resume_token", [b"cvr1:1800000000.5:server-1"], resume_token, 3),
        Target("jwt", [_TOKEN], jwt, 3),
        Target("spec", [specs.dump_spec(SPEC).encode()], model_spec),
        Target("vectors", seeds.verifier_vectors(), verifier_vectors),
        Target("model_yaml", [seeds.YAML], model_yaml, 5),
        Target("onnx", seeds.onnx_files(), onnx_file, 5),
        Target("access", [seeds.ACCESS], access, 5),
        Target("jwks", [_KEY_SET], jwks, 3),
        Target("keys", [b"# keys\n" + b"A" * 44 + b"\n"], keys, 3),
        Target("head", [], stored_head),
        Target("body", seeds.bodies(), stored_body),
        Target("status", [], status, 3),
    ]
