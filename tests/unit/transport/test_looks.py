"""How long a turn looks for events before it runs what it has."""

from types import SimpleNamespace

import pytest
from conveyor_server.transport.completion.server import CompletionServer
from conveyor_server.transport.completion.stream import Stream
from grpc._cython import cygrpc

from tests.unit.transport.test_completion_internals import grpc_server


class Queue:
    """A completion queue whose looks find what is said: a tag's event, or nothing."""

    def __init__(self, *found: bool) -> None:
        self.looks = 0
        self.taken = 0
        self._found = found

    def poll(self, deadline: float):
        found = self.looks < len(self._found) and self._found[self.looks]
        self.looks += 1
        kind = cygrpc.CompletionType.operation_complete if found else cygrpc.CompletionType.queue_timeout
        return SimpleNamespace(completion_type=kind, tag=self._take)

    def _take(self, _: object) -> None:
        self.taken += 1


def taken_in_a_turn(queue: Queue, *, lone: object = None, thorough: bool = False) -> int:
    server = CompletionServer(grpc_server(), max_unsent_bytes=1)
    server._queue = queue
    server.lone = lone
    seen: list[int] = []
    server.turn(0.0, lambda: seen.append(queue.taken), thorough=thorough)
    (taken,) = seen
    return taken


def test_a_turn_takes_all_that_is_there_before_it_runs() -> None:
    assert taken_in_a_turn(Queue(*[True] * 50)) == 50
    # One look may be spent on a socket that has nothing.
    assert taken_in_a_turn(Queue(True, False, True, False, True)) == 3
    assert taken_in_a_turn(Queue(True, False, False, True)) == 1


def test_a_turn_that_finds_nothing_does_not_look_twice() -> None:
    queue = Queue(False, True)
    assert taken_in_a_turn(queue) == 0
    assert queue.looks == 1


@pytest.mark.parametrize(("gathers", "taken"), [(False, 1), (True, 5)])
def test_a_lone_stream_is_answered_at_once_unless_what_follows_belongs_into_the_run(gathers, taken) -> None:
    queue = Queue(*[True] * 5)
    assert taken_in_a_turn(queue, lone=SimpleNamespace(gathers=gathers)) == taken


def test_before_a_part_of_a_long_step_every_socket_is_looked_at() -> None:
    assert taken_in_a_turn(Queue(*[False] * 8, True), thorough=True) == 1
    assert taken_in_a_turn(Queue(True, *[False] * 8, True), thorough=True) == 2
    queue = Queue()
    assert taken_in_a_turn(queue, thorough=True) == 0
    assert queue.looks < 50


class Call:
    """Takes batches, and says nothing until it is asked to."""

    def __init__(self) -> None:
        self.begun: list[tuple[object, object]] = []

    def start_server_batch(self, operations, tag) -> int:
        self.begun.append((operations, tag))
        return 0


def test_the_answers_of_one_stream_do_not_wait_for_a_turn_each() -> None:
    home = SimpleNamespace(touched=[], max_unsent_bytes=100, condition=None, over=lambda rpc: None)
    call, rpc = Call(), SimpleNamespace(due=set(), callbacks=[])
    stream = Stream(home, rpc, call, None, None)
    stream.begin(SimpleNamespace(eager=True))
    for message in (b"1", b"2", b"3"):
        stream.put(message)
    (touched,) = home.touched
    home.touched.clear()
    touched.advance()
    for count in (2, 3, 4):
        # A receive, and as many sends as have come back and one.
        assert len(call.begun) == count
        _, sent = next(item for item in reversed(call.begun) if item[1] == stream._sent)
        sent(None)
    assert len(call.begun) == 4
    assert not home.touched
    assert not stream.has_more
