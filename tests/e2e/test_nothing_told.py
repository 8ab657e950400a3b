"""What clients send is nobody else's: no refusal, log line or page holds an input, a token or a traceback."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import conveyor
import grpc
import numpy as np
import pytest
from conveyor_proto.inference import service_pb2
from conveyor_proto.v1 import session_pb2 as pb
from conveyor_proto.v1 import session_pb2_grpc
from google.protobuf import text_format
from google.rpc import status_pb2

from tests.e2e.conftest import FEATURES, Server

TOKEN = "cvy_5ecr3t-t0ken-5ecr3t"
# Numbers that are found wherever they are written, as text or as bytes.
MARK, MARKED_ID = 8675.309, 86753
SECRETS = ("8675", "86753", "5ecr3t", "Traceback", "site-packages", 'File "')
AS_BYTES = (np.float32(MARK).tobytes(), np.float64(MARK).tobytes(), TOKEN.encode())


@pytest.fixture
def server(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    access = tmp_path / "access.toml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    access.write_text(
        f'[[tokens]]\nname = "app"\nsha256 = "{digest}"\ntenant = "*"\nroles = {json.dumps(["infer", "observe"])}\n'
    )
    return start_server("--access", str(access), "--log-level", "debug")


def marked(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.full(shape, MARK, dtype)


def test_nothing_of_what_is_sent_is_told(server: Server) -> None:
    told: list[str] = []

    def refused(call: Callable[[], object], *kinds: type[Exception]) -> None:
        with pytest.raises(kinds or conveyor.ConveyorError) as caught:
            call()
        error = caught.value
        told.append(f"{error} {getattr(error, 'metadata', '')}")

    with conveyor.connect(server.target, token=TOKEN) as client:
        with client.session("lstm") as session, client.session("speller") as speller:
            session.step(marked(FEATURES))
            for wrong in (marked(FEATURES + 1), marked(0, FEATURES), np.array([MARK, np.nan, np.inf, -np.inf])):
                refused(lambda wrong=wrong: session.step(wrong))
            # The model itself fails on an id past its embedding, and onnxruntime's words quote it.
            refused(lambda: speller.step(MARKED_ID), conveyor.ModelFailed)
            snapshot = session.snapshot()
            refused(lambda: client.restore(snapshot[:-9] + AS_BYTES[1] + b"x").__enter__())
        refused(lambda: client.session("no-such-model").__enter__())
        refused(lambda: client.load_model("lstm"), conveyor.PermissionDenied)
    for token in (TOKEN + "x", TOKEN[:-1]):
        with conveyor.connect(server.target, token=token) as nobody:
            refused(nobody.models, conveyor.Unauthenticated)
    _raw(server, told)
    status, page = server.get("/metrics")
    assert status == 401
    log = server.log.read_text()
    assert "a run failed" in log, "the log was asked for all it has"
    assert len(told) > 12
    for text in (log, page, *told):
        assert not [secret for secret in SECRETS if secret in text], text[-2000:]


def _raw(server: Server, told: list[str]) -> None:
    """What the SDK does not send."""
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    with grpc.insecure_channel(server.target) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        step = pb.StepRequest(session_id="none", seq=1)
        step.inputs.add(name="x", data=marked(3).tobytes())
        infer = service_pb2.ModelInferRequest(model_name="lstm", raw_input_contents=[marked(3).tobytes()])
        infer.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        infer.parameters["sequence_id"].int64_param = 7
        calls = [
            lambda **given: stub.Step(step, **given),
            lambda **given: stub.RestoreSession(pb.RestoreSessionRequest(snapshot=marked(40).tobytes()), **given),
            lambda **given: channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            )(infer, **given),
            lambda **given: channel.unary_unary("/conveyor.v1.SessionService/Step")(marked(40).tobytes(), **given),
            lambda **given: next(
                channel.stream_stream("/conveyor.v1.SessionService/Stream")(iter([marked(40).tobytes()]), **given)
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call(metadata=metadata, timeout=20)
            trailing = dict(caught.value.trailing_metadata())
            details = trailing.get("grpc-status-details-bin", b"")
            assert not [secret for secret in AS_BYTES if secret in details]
            told.append(
                f"{caught.value.details()} {text_format.MessageToString(status_pb2.Status.FromString(details))}"
            )
