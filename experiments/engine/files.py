"""Files that are whole or as they were: written beside the old one, onto the disk, then renamed over it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.engine.errors import UsageError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, a full disk or a folder that may not be written is a mistake of the user, in one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {path} ({error.strerror or error}); make room, or pass --out with a folder that you can "
            "write. What was recorded before is kept"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Leave the old file or the new one, on disk.

    >>> import pathlib, tempfile
    >>> from experiments.engine.files import write_whole
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(pathlib.Path(folder) / "table.md", "| act |")
    ...     [path.name for path in pathlib.Path(folder).iterdir()]
    ['table.md']
    """
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
