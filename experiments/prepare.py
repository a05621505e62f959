"""CIFAR-10 for tensorflow-datasets, downloaded and prepared without TensorFlow.

    python -m experiments.prepare cifar10

TFDS can read a prepared set without TensorFlow, but not prepare one. Here its own builder for CIFAR-10 writes the set,
the same one as always; only what it does with TensorFlow is done otherwise: to unpack the archive, to read it, and to
encode the images as PNG. The archive never has a name on disk, and the set gets its own in the last step: a run that
is stopped at any point leaves nothing that looks prepared. One that is killed may leave a folder incomplete.*, which
nothing reads.

Expected: 20 s after a download of 170 MB, and 350 MB of disk while it runs.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import itertools
import os
import re
import signal
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import absl.logging
import numpy as np
import rich.console
import tyro
from PIL import Image
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command

_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 16  # bytes
_NEEDED = "350 MB of room"  # the archive and the set
_ANOTHER_COPY = "or name another copy of the archive with --url"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Download CIFAR-10 (170 MB) and prepare it for tensorflow-datasets (array_record), without TensorFlow."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The data set: cifar10."""
    data_dir: str | None = None
    """The TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    url: str | None = None
    """Another copy of the archive, an address or a file; by default TFDS' own. Its checksum must be the original's."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """What to download, and how to know it.

    Attributes:
      url: http, https or file.
      size: in bytes.
      sha256: hexadecimal.
    """

    url: str
    size: int
    sha256: str


def main() -> None:
    """Read the command line and prepare the set."""
    settings = tyro.cli(Settings, prog="python -m experiments.prepare")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave as after Ctrl-C: with nothing half-written
    prepare(settings.name, settings.data_dir, settings.url)


def prepare(name: str, data_dir: str | None = None, url: str | None = None) -> Path:
    """Download a set and write it for TFDS; nothing happens where it is prepared already.

    Args:
      name: "cifar10".
      data_dir: the TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      url: another copy of the archive, an address or a file; by default the one that TFDS names.

    Returns:
      The folder of the prepared set, such as ~/tensorflow_datasets/cifar10/3.0.2.

    Raises:
      UsageError: if this is another set, no right archive could be had, or the folder cannot be used.
    """
    if name != "cifar10":
        raise UsageError(
            f"only cifar10 can be prepared here, got {name!r}; where TensorFlow is installed, "
            f"`tfds build {name} --file_format=array_record` prepares any set"
        )
    say = Console().say
    tfds = _tensorflow_datasets()
    stock = tfds.builder_cls(name)
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    folder = root / name / str(stock.VERSION)
    archive = _stock_archive(stock)
    if url:
        address = url if "://" in url else Path(url).expanduser().absolute().as_uri()
        archive = dataclasses.replace(archive, url=address)
    try:
        if _is_prepared(tfds, name, root, folder):
            say(f"{name} is already prepared in {folder}")
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="incomplete.", dir=root) as scratch,
            tempfile.TemporaryFile(dir=root) as file,
        ):
            say(f"downloading {archive.url}, {archive.size / 1e6:,.0f} MB")
            _download(archive, file)
            say(f"writing {name} to {folder}")
            written, sizes = _write(stock, file, scratch, archive.size)
            folder.parent.mkdir(exist_ok=True)
            written.rename(folder)
    except OSError as error:
        raise UsageError(
            f"cannot write to {root} ({error.strerror or error}); --data-dir takes a folder with {_NEEDED} to write in"
        ) from error
    say(f"{name} is prepared: {sizes['train']:,} train and {sizes['test']:,} test images in {folder}")
    return folder


def _tensorflow_datasets() -> Any:
    absl.logging.set_verbosity(absl.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds
    tfds.disable_progress_bar()  # its bars have no total
    return tfds


def _stock_archive(stock: Any) -> Archive:
    ((url, info),) = stock.url_infos.items()
    return Archive(url, int(info.size), info.checksum)


def _is_prepared(tfds: Any, name: str, root: Path, folder: Path) -> bool:
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if not builder.is_prepared():
            raise ValueError("no prepared set")
        for examples in builder.as_data_source().values():
            examples[len(examples) - 1]  # a missing file or one that is cut off shows only when it is read
    except Exception as error:  # of another format or damaged: JSON, protobuf and array_record raise whatever they like
        raise UsageError(
            f"cannot use what is in {folder} ({_first_line(error)}); delete it, or pass another --data-dir"
        ) from error
    return True


def _download(archive: Archive, file: IO[bytes]) -> None:
    received, digest = 0, hashlib.sha256()
    with _bar("downloading", archive.size, DownloadColumn()) as advance:
        for block in _blocks(archive.url):
            file.write(block)
            digest.update(block)
            advance(len(block))
            received += len(block)
            if received > archive.size:
                break
    if received < archive.size:
        problem = f"gave only {received:,} of {archive.size:,} bytes; try again"
    elif received > archive.size:
        problem = f"is not the archive: it has more than {archive.size:,} bytes; try later"
    elif digest.hexdigest() != archive.sha256:
        problem = f"is not the archive: its SHA-256 is {digest.hexdigest()}, expected {archive.sha256}; try later"
    else:
        return
    raise UsageError(f"{archive.url} {problem}, {_ANOTHER_COPY}")


def _blocks(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            while block := response.read(_BLOCK):
                yield block
    except http.client.IncompleteRead:
        return  # who counts the bytes says it
    except urllib.error.HTTPError as error:
        error.close()
        raise UsageError(f"{url} answered {error.code} {error.reason}; try later, {_ANOTHER_COPY}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # no network, no such host, no such address
        reason = _first_line(getattr(error, "reason", error))
        raise UsageError(f"cannot get {url} ({reason}); check the network, {_ANOTHER_COPY}") from error


def _write(stock: Any, archive: IO[bytes], root: str, size: int) -> tuple[Path, dict[str, int]]:
    builder = stock(data_dir=root, file_format="array_record")
    names, features = builder._cifar_info, builder.info.features
    shape = features["image"].shape
    files = _unpack(archive, size)
    labels = files[names.prefix + names.label_files[0]].decode().split("\n")
    features["label"].names = [label for label in labels if label]
    # A record is a byte for the label, then the red, the green and the blue pixels, row by row.
    records = {
        split: [np.frombuffer(files[names.prefix + file], np.uint8).reshape(-1, 1 + np.prod(shape)) for file in parts]
        for split, parts in (("train", names.train_files), ("test", names.test_files))
    }
    sizes = {split: sum(map(len, parts)) for split, parts in records.items()}

    def examples(split: str, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, record in enumerate(itertools.chain(*records[split])):
            pixels = record[1:].reshape(shape[2], *shape[:2]).transpose(1, 2, 0)
            image = Image.fromarray(np.ascontiguousarray(pixels))  # an array TFDS would encode with TensorFlow
            yield index, {"id": f"{split}_{index:05d}", "image": image, "label": int(record[0])}
            advance(1)

    with _bar("writing", sum(sizes.values()), MofNCompleteColumn()) as advance:
        builder._split_generators = lambda _manager: {split: examples(split, advance) for split in records}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells of a download of unknown size
                builder.download_and_prepare()
        except RuntimeError as error:
            failed_call = re.search(r"\w+\(\) failed: [^;\n]*", str(error))  # how array_record says that a disk is full
            if not failed_call:
                raise
            raise OSError(failed_call[0]) from error
    builder.info.download_size = size
    builder.info.write_to_directory(builder.data_path)
    return Path(builder.data_path), sizes


def _unpack(archive: IO[bytes], size: int) -> dict[str, bytes]:
    archive.seek(0)
    files = {}
    with _bar("unpacking", size, DownloadColumn()) as advance, tarfile.open(fileobj=archive) as tar:
        for member in tar:  # in order: gzip cannot seek
            before = archive.tell()
            if content := tar.extractfile(member):
                files[member.name] = content.read()
            advance(archive.tell() - before)
    return files


@contextlib.contextmanager
def _bar(description: str, total: int, column: Any) -> Iterator[Callable[[int], None]]:
    console = rich.console.Console(file=sys.stdout)  # the file of now: standard output is redirected while TFDS writes
    columns = (TextColumn("{task.description}"), BarColumn(), column, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


if __name__ == "__main__":
    run_command(main)
