"""Waiting to the microsecond, and connections beyond the usual number of descriptors."""

import resource
import select
import socket
import time

import numpy as np
import pytest
from conveyor.bench import LoadError
from conveyor.bench.alarm import Alarm
from conveyor.bench.connection import Connection
from conveyor.bench.sockets import Sockets, split_target


@pytest.fixture
def alarm():
    made = Alarm()
    yield made
    made.close()


def readable(alarm, timeout_s):
    return bool(select.select([alarm.fileno()], [], [], timeout_s)[0])


def test_an_alarm_goes_off_once_when_its_time_has_come(alarm):
    assert not readable(alarm, 0)
    alarm.set(0.05)
    assert not readable(alarm, 0.01)
    assert readable(alarm, 10)
    alarm.clear()
    assert not readable(alarm, 0.1)


def test_a_time_set_anew_replaces_the_one_before(alarm):
    alarm.set(0.01)
    assert readable(alarm, 10)
    alarm.set(0.9)
    assert not readable(alarm, 0.05)
    alarm.clear()
    alarm.set(1e-12)
    assert readable(alarm, 10)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=512) as made:
        yield made


def connected(listener, count):
    windows = np.zeros(count, np.int64)
    target = f"127.0.0.1:{listener.getsockname()[1]}"
    return Sockets(target, [Connection(index, windows) for index in range(count)], None)


@pytest.mark.parametrize("timeout_s", [0.0, 0.0004, 0.002, 0.005, 0.02])
def test_a_turn_on_which_nothing_comes_ends_in_time(listener, timeout_s):
    sockets = connected(listener, 1)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        assert sockets.turn(timeout_s).offsets == []
        took.append(time.perf_counter() - began)
    sockets.close()
    # The best of many: the machine may be busy. Long waits may end early by a millisecond or so, none is rounded up.
    assert min(took) < timeout_s + 0.0009
    assert min(took) >= (timeout_s if timeout_s < 0.003 else timeout_s - 0.0015)


def test_the_limit_of_descriptors_is_raised_where_that_is_allowed(listener):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
    try:
        sockets = connected(listener, 300)
        assert len(sockets.wires) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
        sockets.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_targets():
    assert split_target("localhost:5") == ("localhost", 5)
    assert split_target("[::1]:5") == ("::1", 5)
    for wrong in ("localhost", ":5", "h:", "h:x"):
        with pytest.raises(LoadError, match="HOST:PORT"):
            split_target(wrong)
