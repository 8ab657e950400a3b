"""`conveyor sessions`: how durable each is and where its state lies, and their move to another version."""

import json
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from conveyor.cli import main as cli
from conveyor_proto.reasons import Fault, to_status
from conveyor_proto.v1 import errors_pb2 as e
from conveyor_proto.v1 import model_pb2, model_pb2_grpc, session_pb2_grpc
from conveyor_proto.v1 import session_pb2 as pb

Ran = tuple[int, str, str]


class Server(session_pb2_grpc.SessionServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Says what it is told to say.

    Attributes:
        sessions: what it lists.
        moved: what it was asked to migrate.
    """

    def __init__(self) -> None:
        self.sessions: list[pb.SessionInfo] = []
        self.moved: list[model_pb2.MigrateSessionsRequest] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def ListSessions(self, request, context):
        return pb.ListSessionsResponse(sessions=self.sessions, total_size=len(self.sessions))

    def MigrateSessions(self, request, context):
        if request.name != "charlm":
            fault = Fault(e.ERROR_REASON_MODEL_NOT_FOUND, f"no model {request.name!r}", {"model": request.name})
            context.set_trailing_metadata((("grpc-status-details-bin", to_status(fault).SerializeToString()),))
            context.abort(grpc.StatusCode.NOT_FOUND, fault.message)
        self.moved.append(request)
        return model_pb2.MigrateSessionsResponse(
            migrated_sessions=len(self.moved), to_version=request.to_version or "7"
        )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def run(capsys, server: Server) -> Callable[..., Ran]:
    """Runs `conveyor sessions` against the server: (exit code, stdout, stderr)."""

    def ran(*argv: str) -> Ran:
        try:
            code = cli.main(["sessions", "--target", server.target, *argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ran


def cells(out: str) -> list[dict[str, str]]:
    """Rows by heading; no cell of these is of two words."""
    lines = out.splitlines()
    headings = lines[0].replace("TIME STEPS", "TIME").replace("IDLE LIMIT", "LIMIT").split()
    return [dict(zip(headings, line.split(), strict=False)) for line in lines[1:]]


def test_each_session_says_how_durable_it_is_and_where_it_lies(run, server: Server) -> None:
    server.sessions = [
        pb.SessionInfo(session_id="a", applied_seq=9, durability=pb.DURABILITY_ASYNC, durable_seq=7, resident=True),
        pb.SessionInfo(session_id="b", applied_seq=5, durability=pb.DURABILITY_SYNC, durable_seq=5, resident=False),
        pb.SessionInfo(session_id="c", applied_seq=3, durability=pb.DURABILITY_NONE, resident=True),
    ]
    for session in server.sessions:
        session.model, session.version = "charlm", "1"
    code, out, _ = run()
    assert code == 0
    rows = cells(out)
    assert [(row["SESSION"], row["STEPS"], row["DURABILITY"], row["STORED"], row["IN"]) for row in rows] == [
        ("a", "9", "async", "7", "memory"),
        ("b", "5", "sync", "5", "store"),
        ("c", "3", "none", "-", "memory"),
    ]


def test_what_is_not_known_of_a_session_in_the_store_is_no_zero(run, server: Server) -> None:
    fields = {"model": "charlm", "version": "1", "durability": pb.DURABILITY_ASYNC, "state_bytes": 512}
    server.sessions = [
        pb.SessionInfo(session_id="s", **fields),
        pb.SessionInfo(session_id="m", resident=True, **fields),
    ]
    asleep, resident = run()[1].splitlines()[1:]
    assert cells(run()[1])[0]["TIME"] == "-"
    assert asleep.endswith(" -")
    assert resident.endswith(" 512 B")


def test_a_server_of_before_there_was_durability_has_all_in_memory(run, server: Server) -> None:
    server.sessions = [pb.SessionInfo(session_id="s", model="charlm", version="1", applied_seq=2)]
    (row,) = cells(run()[1])
    assert (row["DURABILITY"], row["STORED"], row["IN"]) == ("none", "-", "memory")


def test_json_says_it_too(run, server: Server) -> None:
    server.sessions = [
        pb.SessionInfo(session_id="a", applied_seq=9, durability=pb.DURABILITY_ASYNC, durable_seq=7, resident=True)
    ]
    (said,) = json.loads(run("--json")[1])
    assert (said["durability"], said["durable_seq"], said["resident"]) == ("async", 7, True)


def test_sessions_move_from_one_version_to_another(run, server: Server) -> None:
    assert run("migrate", "charlm", "--from", "1", "--to", "2")[:2] == (0, "1 session moves to charlm 2\n")
    assert run("migrate", "charlm")[:2] == (0, "2 sessions move to charlm 7\n")
    assert [(asked.name, asked.from_version, asked.to_version) for asked in server.moved] == [
        ("charlm", "1", "2"),
        ("charlm", "", ""),
    ]


def test_a_move_in_json(run) -> None:
    code, out, _ = run("migrate", "charlm", "--json")
    assert code == 0
    assert json.loads(out) == {"model": "charlm", "migrated_sessions": 1, "to_version": "7"}


def test_options_hold_on_either_side_of_migrate(run, server: Server) -> None:
    """The target of `run` is said before it; what is said behind it goes first."""
    assert json.loads(run("--json", "migrate", "charlm")[1])["to_version"] == "7"
    code, _, err = run("migrate", "charlm", "--target", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in err


def test_a_move_that_is_refused_is_one_sentence(run) -> None:
    code, _, err = run("migrate", "nope")
    assert code == 1
    assert err.endswith("[MODEL_NOT_FOUND]\n")
    assert err.count("\n") == 1


def test_a_move_needs_a_model(run) -> None:
    code, _, err = run("migrate")
    assert code == 2
    assert "usage: conveyor sessions migrate" in err
