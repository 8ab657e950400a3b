"""Runs a module as `python -m` does, in a process that other processes of the same user may look into.

Linux may let only ancestors do so (kernel.yama.ptrace_scope = 1, the default of several distributions), and a profiler
that attaches is none. `python -m benchmarks.traceable MODULE ARGUMENTS`.
"""

import ctypes
import runpy
import sys

_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)


def main() -> None:
    """Does it. A kernel that knows no such restriction refuses the permission, and needs none."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
