"""SIGTERM and Ctrl-C, noted and left to the loop, which finishes its step and saves."""

import signal
from types import FrameType
from typing import Any


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
