"""On the path of a child process: it is killed in the middle of a write, or its clock jumps back.

KILL_AT_WRITE=n: SIGKILL in its write number n, before that is on disk. CLOCK_JUMPS: each look at the time of day is
hours before the last one.
"""

import datetime
import os
import signal

_left = int(os.environ.get("KILL_AT_WRITE", "0"))
_fsync, _looks = os.fsync, 0


def _fsync_or_die(file):
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _fsync(file)


class _Back(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        global _looks
        _looks += 1
        return super().now(tz) - datetime.timedelta(hours=2 * _looks)


if _left:
    os.fsync = _fsync_or_die
if "CLOCK_JUMPS" in os.environ:
    datetime.datetime = _Back
