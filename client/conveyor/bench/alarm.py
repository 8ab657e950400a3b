"""A timer that epoll can wait for: its own timeouts are whole milliseconds, in which a busy load sends fifty steps.

Invariant: after `clear` the descriptor is not readable until the next time set has come.
"""

import contextlib
import ctypes
import os
import time

_CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


class _Timer(ctypes.Structure):
    """struct itimerspec: interval and first expiry, seconds and nanoseconds each."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


class Alarm:
    """timerfd_create(2), which Python itself has from 3.13 on.

    Raises:
        OSError: the system has none to give.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._timer = _Timer()
        self._address = ctypes.byref(self._timer)

    def fileno(self) -> int:
        """The descriptor; readable once the time has come."""
        return int(self._descriptor)

    def set(self, seconds: float) -> None:
        """Goes off in so many seconds, above 0 and below 1; a time set before counts no more."""
        self._timer.first_ns = max(1, int(seconds * 1e9))
        if self._libc.timerfd_settime(self._descriptor, 0, self._address, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Makes the descriptor not readable."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._descriptor)
