"""`conveyor models load` and `unload`: what a server is asked, and what is said of its answer."""

import json
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from conveyor.cli import main as cli
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, model_pb2_grpc

Ran = tuple[int, str, str]


class Server(model_pb2_grpc.ModelServiceServicer):
    """Says what it is told to say.

    Attributes:
        model: what it loads.
        asked: what it was asked.
        fault: why it refuses; None: it does not.
    """

    def __init__(self) -> None:
        self.model = model_pb2.Model(
            name="charlm",
            version="4",
            status=model_pb2.MODEL_STATUS_READY,
            latest=True,
            device="cpu",
            checked_vectors=4,
        )
        self.asked: list[model_pb2.LoadModelRequest | model_pb2.UnloadModelRequest] = []
        self.fault: Fault | None = None
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def LoadModel(self, request, context):
        self._take(request, context)
        return model_pb2.LoadModelResponse(model=self.model)

    def UnloadModel(self, request, context):
        self._take(request, context)
        return model_pb2.UnloadModelResponse(closed_sessions=3)

    def _take(self, request, context) -> None:
        self.asked.append(request)
        if self.fault is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", to_status(self.fault).SerializeToString()),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.fault.message)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def run(capsys, server: Server) -> Callable[..., Ran]:
    """Runs `conveyor models` against the server: (exit code, stdout, stderr)."""

    def ran(*argv: str) -> Ran:
        try:
            code = cli.main(["models", "--target", server.target, *argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ran


def test_load_says_what_is_served_and_whether_it_was_checked(run, server: Server) -> None:
    assert run("load", "charlm") == (0, "charlm 4 is served on cpu, checked by 4 verifier vectors\n", "")
    server.model.checked_vectors, server.model.latest = 0, False
    code, out, _ = run("load", "charlm", "--version", "4", "--reload")
    assert code == 0
    assert out == "charlm 4 is served on cpu, not checked: its file holds no verifier vectors, and is not the latest\n"
    assert server.asked == [
        model_pb2.LoadModelRequest(name="charlm"),
        model_pb2.LoadModelRequest(name="charlm", version="4", reload=True),
    ]
    server.model.failure.message = "it differs"
    assert run("load", "charlm")[1].endswith("\nwhat is in its file now is not: it differs\n")
    loaded = json.loads(run("load", "charlm", "--json")[1])
    assert (loaded["version"], loaded["status"], loaded["checked_vectors"]) == ("4", "ready", 0)


def test_a_refusal_is_told_with_its_reason(run, server: Server) -> None:
    server.fault = Fault(e.ERROR_REASON_MODEL_INVALID, "version 5 of model 'charlm' cannot be served: y differs", {})
    code, out, err = run("load", "charlm")
    assert (code, out) == (1, "")
    assert "cannot be served: y differs" in err
    assert "MODEL_INVALID" in err


def test_unload_names_the_version_and_says_what_it_closed(run, server: Server) -> None:
    assert run("unload", "charlm")[0] == 2
    assert run("unload", "charlm", "--version", "3") == (0, "charlm 3 is not served any more, 3 sessions closed\n", "")
    unloaded = json.loads(run("unload", "charlm", "--version", "3", "--force", "--json")[1])
    assert unloaded == {"model": "charlm", "version": "3", "closed_sessions": 3}
    assert server.asked == [
        model_pb2.UnloadModelRequest(name="charlm", version="3"),
        model_pb2.UnloadModelRequest(name="charlm", version="3", force=True),
    ]
