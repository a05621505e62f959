"""On the path of a child process: it is killed in the middle of a write, or its clock jumps back.

KILL_AT_WRITE=n: SIGKILL in its write number n, before that is on disk. CLOCK_JUMPS: each look at the time of day is an
hour before the last one.
"""

import os
import signal
import time

_left = int(os.environ.get("KILL_AT_WRITE", "0"))
_fsync, _now = os.fsync, [time.time()]


def _fsync_or_die(file):
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _fsync(file)


def _an_hour_earlier():
    _now[0] -= 3600
    return _now[0]


if _left:
    os.fsync = _fsync_or_die
if "CLOCK_JUMPS" in os.environ:
    time.time = _an_hour_earlier
