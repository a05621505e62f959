"""Mistakes of the person at the command line: one clear line, exit code 2, no traceback."""

import codecs
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import jax


class UsageError(ValueError):
    """Says what is wrong, what was received and what to do."""


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; exit code 3."""


class InterruptedRunError(BaseException):
    """A signal ended the run after it was saved; exit code 128 + the signal's number.

    As KeyboardInterrupt it is no Exception: JAX, for one, goes on after any of these in its cache of programs.
    """

    def __init__(self, signum: int, remedy: str):
        super().__init__(remedy)
        self.signum = signum


def first_line(error: BaseException) -> str:
    r"""What a library's error says, in one line; its type's name if it says nothing.

    >>> from experiments.engine.errors import first_line
    >>> first_line(ValueError("a file\nis missing")), first_line(KeyError())
    ('a file', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call main and end the process: 0, 2 on a usage error, 3 on a non-finite loss, 130 on Ctrl-C, 143 on SIGTERM.

    A reader that has gone, as in `| head -1`, ends it with 141, as it ends other programs. Where the output cannot show
    a character, such as the plus-minus sign in a locale without UTF-8, another one stands for it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN)
    try:
        main()
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteLossError as error:
        _say(f"stopped: {error}")
        sys.exit(3)
    except InterruptedRunError as error:
        _say(f"interrupted by {signal.Signals(error.signum).name}. {error}")
        sys.exit(128 + error.signum)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(0)


_PLAIN = "linked_jax.plain"
_PLAINER = {"±": "+-", "─": "-", "…": "..."}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAINER.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(_PLAIN, _plain)


def _say(line: str) -> None:
    """Once, where several processes end alike."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(line, file=sys.stderr)
