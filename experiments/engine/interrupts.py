"""SIGTERM and Ctrl-C: noted, for a loop that finishes its step and saves; or the end there and then."""

import signal
import sys
from types import FrameType
from typing import Any

from experiments.engine.errors import InterruptedRunError


class Interrupts:
    """Within it, the first SIGINT or SIGTERM sets `signum`; the second one acts as it would without it."""

    def __init__(self):
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()


class Ended(Interrupts):
    """Within it, the first SIGINT or SIGTERM raises InterruptedRunError: for work whose parts are saved as they end."""

    def __init__(self, remedy: str):
        super().__init__()
        self._remedy, self._hook = remedy, sys.unraisablehook

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = self._hook
        super().__exit__()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        super()._note(signum, _frame)
        # Python drops what is raised within a finalizer: once a second it is raised again.
        self._before = {signal.SIGALRM: signal.signal(signal.SIGALRM, self._end)}
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
        sys.unraisablehook = _unless_interrupted
        self._end(signum, _frame)

    def _end(self, _signum: int, _frame: FrameType | None) -> None:
        assert self.signum is not None
        raise InterruptedRunError(self.signum, self._remedy)


def _unless_interrupted(dropped: Any) -> None:
    """Say what Python drops, but for what is raised again."""
    if not isinstance(dropped.exc_value, InterruptedRunError):
        sys.__unraisablehook__(dropped)
