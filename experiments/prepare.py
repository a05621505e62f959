"""CIFAR-10 for tensorflow-datasets, downloaded and prepared without TensorFlow.

    python -m experiments.prepare cifar10

TFDS reads a prepared set without TensorFlow, but needs it to prepare one. Here a subclass of its builder for CIFAR-10
reads the archive without TensorFlow; all else is the builder's, so the set is the same. The archive stays in memory,
and the set gets its name in the last step: a run that is stopped at any point leaves nothing that looks prepared. One
that is killed may leave a folder incomplete.*, which nothing reads.

Expected: 20 s after a download of 170 MB; 200 MB of disk and 0.8 GB of memory.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import re
import signal
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from PIL import Image
from rich.progress import DownloadColumn

from experiments.engine.checks import command_line
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, first_line, run_command
from experiments.engine.tfds import tensorflow_datasets, tfds_folder

SHAPE = (32, 32, 3)
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
"""Of the archive: records of a byte for the label, then the red, the green and the blue pixels, row by row."""
NAMES = "batches.meta.txt"
"""Of the archive: the names of the classes, one a line."""

_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 16  # bytes
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


class Archive(NamedTuple):
    """What to download, and how to know it: an address (http, https or file), bytes, and hexadecimal digits."""

    url: str
    size: int
    sha256: str


def main() -> None:
    """Read the command line and prepare the set."""
    settings = command_line(Settings, "python -m experiments.prepare")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave as after Ctrl-C: with nothing half-written
    prepare(settings.name, settings.data_dir, settings.url)


def prepare(name: str, data_dir: str | None = None, url: str | None = None) -> Path:
    """Download a set and write it for TFDS, see `Settings`; nothing happens where it is prepared already.

    Returns:
      The folder of the prepared set, such as ~/tensorflow_datasets/cifar10/3.0.2.
    """
    if name != "cifar10":
        raise UsageError(
            f"only cifar10 can be prepared here, got {name!r}; where TensorFlow is installed, "
            f"`tfds build {name} --file_format=array_record` prepares any set"
        )
    console, tfds = Console(), tensorflow_datasets()
    stock = tfds.builder_cls(name)
    root = tfds_folder(data_dir)
    folder = root / name / str(stock.VERSION)
    archive = _stock_archive(stock)
    if url:
        address = url if "://" in url else Path(url).expanduser().absolute().as_uri()
        archive = archive._replace(url=address)
    try:
        if _is_prepared(tfds, name, root, folder):
            console.say(f"{name} is already prepared in {folder}")
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=root) as scratch:
            console.say(f"downloading {archive.url}, {archive.size / 1e6:,.0f} MB")
            content = _download(archive, console)
            console.say(f"writing {name} to {folder}")
            builder = _write(stock, content, scratch, console)
            folder.parent.mkdir(exist_ok=True)
            Path(builder.data_path).rename(folder)
    except OSError as error:
        raise UsageError(
            f"cannot write to {root} ({error.strerror or error}); --data-dir takes a folder with 200 MB of room "
            "to write in"
        ) from error
    train, test = (builder.info.splits[split].num_examples for split in ("train", "test"))
    console.say(f"{name} is prepared: {train:,} train and {test:,} test images in {folder}")
    return folder


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
            f"cannot use what is in {folder} ({first_line(error)}); delete it, or pass another --data-dir"
        ) from error
    return True


def _download(archive: Archive, console: Console) -> bytes:
    url, content = archive.url, bytearray()
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
            console.progress("downloading", archive.size, DownloadColumn()) as advance,
        ):
            while len(content) <= archive.size and (block := response.read(_BLOCK)):
                content += block
                advance(len(block))
    except http.client.IncompleteRead:
        pass  # there are too few bytes, see below
    except urllib.error.HTTPError as error:
        error.close()
        raise UsageError(f"{url} answered {error.code} {error.reason}; try later, {_ANOTHER_COPY}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # no network, no such host, no such address
        reason = first_line(getattr(error, "reason", error))
        raise UsageError(f"cannot get {url} ({reason}); check the network, {_ANOTHER_COPY}") from error
    digest = hashlib.sha256(content).hexdigest()
    if len(content) < archive.size:
        problem = f"gave only {len(content):,} of {archive.size:,} bytes; try again"
    elif len(content) > archive.size:
        problem = f"is not the archive: it has more than {archive.size:,} bytes; try later"
    elif digest != archive.sha256:
        problem = f"is not the archive: its SHA-256 is {digest}, expected {archive.sha256}; try later"
    else:
        return bytes(content)
    raise UsageError(f"{url} {problem}, {_ANOTHER_COPY}")


def _write(stock: Any, archive: bytes, root: str, console: Console) -> Any:
    """The builder that wrote the set below a folder."""
    files = _unpack(archive, console)
    records = {
        split: np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, 1 + np.prod(SHAPE))
        for split, names in FILES.items()
    }

    class Cifar10(stock, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        """The stock builder, which finds its images in `records`."""

        __module__ = stock.__module__  # the set says which builder reads it

        def _split_generators(self, dl_manager: Any) -> Any:
            self.info.features["label"].names = files[NAMES].decode().split()
            return {split: self._generate_examples(split) for split in records}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, record in enumerate(records[split]):
                pixels = record[1:].reshape(SHAPE[2], *SHAPE[:2]).transpose(1, 2, 0)
                image = Image.fromarray(np.ascontiguousarray(pixels))  # an array TFDS would encode with TensorFlow
                yield index, {"id": f"{split}_{index:05d}", "image": image, "label": int(record[0])}
                advance(1)

    builder = Cifar10(data_dir=root, file_format="array_record")
    with (
        console.progress("writing", sum(map(len, records.values()))) as advance,
        contextlib.redirect_stdout(io.StringIO()),  # TFDS tells of a download of unknown size
    ):
        try:
            builder.download_and_prepare()
        except RuntimeError as error:
            failed_call = re.search(r"\w+\(\) failed: [^;\n]*", str(error))  # how array_record says that a disk is full
            if not failed_call:
                raise
            raise OSError(failed_call[0]) from error
    builder.info.download_size = len(archive)
    builder.info.write_to_directory(builder.data_path)
    return builder


def _unpack(archive: bytes, console: Console) -> dict[str, bytes]:
    """The contents of the archive's files, by their names."""
    files, stream = {}, io.BytesIO(archive)
    with (
        console.progress("unpacking", len(archive), DownloadColumn()) as advance,
        tarfile.open(fileobj=stream) as tar,
    ):
        for member in tar:  # in order: gzip cannot seek
            before = stream.tell()
            if content := tar.extractfile(member):
                files[PurePosixPath(member.name).name] = content.read()
            advance(stream.tell() - before)
    return files


if __name__ == "__main__":
    run_command(main)
