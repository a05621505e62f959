"""Data sets for tensorflow-datasets, downloaded and prepared without TensorFlow.

    python -m experiments.prepare cifar10
    python -m experiments.prepare tiny_shakespeare

TFDS reads a prepared set without TensorFlow, but needs it to prepare one. Here a subclass of a set's own builder reads
the files without TensorFlow; all else is the builder's, so the set is the same. The files stay in memory, and the set
gets its name in the last step: a run that is stopped at any point leaves nothing that looks prepared. One that is
killed may leave a folder incomplete.*, which nothing reads.

Expected: CIFAR-10 and CIFAR-100 take 20 s after a download of 170 MB each, 200 MB of disk and 0.8 GB of memory; MNIST
and Tiny Shakespeare are small.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import re
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import tyro
from rich.progress import DownloadColumn

from experiments.engine.archives import READERS, Contents, Example
from experiments.engine.checks import command_line
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, first_line, run_command
from experiments.engine.tfds import tensorflow_datasets, tfds_folder

_TIMEOUT = 30.0  # seconds without a byte
_BLOCK = 1 << 16  # bytes
_ANOTHER_COPY = "or name another copy of the file with --url"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Download a data set and prepare it for tensorflow-datasets (array_record), without TensorFlow."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The data set: cifar10, cifar100 (170 MB each), mnist or tiny_shakespeare."""
    data_dir: str | None = None
    """The TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    url: str | None = None
    """Another copy of the file, an address or a path; of mnist's four files their folder. Checksums are looked at."""


class Source(NamedTuple):
    """A file to download, and how to know it: an address (http, https or file), bytes, and hexadecimal digits."""

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
    if name not in READERS:
        raise UsageError(
            f"{', '.join(READERS)} can be prepared here, got {name!r}; where TensorFlow is installed, "
            f"`tfds build {name} --file_format=array_record` prepares any set"
        )
    console, tfds = Console(), tensorflow_datasets()
    stock = tfds.builder_cls(name)
    root = tfds_folder(data_dir)
    folder = root / name / str(stock.VERSION)
    sources = _copies(_stock_sources(stock), url)
    try:
        if _is_prepared(tfds, name, root, folder):
            console.say(f"{name} is already prepared in {folder}")
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=root) as scratch:
            files = {}
            for file, source in sources.items():
                console.say(f"downloading {source.url}, {source.size / 1e6:,.0f} MB")
                files[file] = _download(source, console)
            console.say(f"writing {name} to {folder}")
            builder = _write(stock, READERS[name](files, console), scratch, console)
            builder.info.download_size = sum(map(len, files.values()))
            builder.info.write_to_directory(builder.data_path)
            folder.parent.mkdir(exist_ok=True)
            Path(builder.data_path).rename(folder)
    except OSError as error:
        raise UsageError(
            f"cannot write to {root} ({error.strerror or error}); --data-dir takes a folder with 200 MB of room "
            "to write in"
        ) from error
    sizes = ", ".join(f"{info.num_examples:,} {split}" for split, info in builder.info.splits.items())
    console.say(f"{name} is prepared: {sizes} examples in {folder}")
    return folder


def _stock_sources(stock: Any) -> dict[str, Source]:
    """TFDS' own, by the names of the files."""
    return {
        PurePosixPath(url).name: Source(url, int(info.size), info.checksum) for url, info in stock.url_infos.items()
    }


def _copies(sources: Mapping[str, Source], url: str | None) -> dict[str, Source]:
    """The same files at another address, of several that of their folder."""
    if not url:
        return dict(sources)
    address = url if "://" in url else Path(url).expanduser().absolute().as_uri()
    below = {file: f"{address.rstrip('/')}/{file}" if len(sources) > 1 else address for file in sources}
    return {file: source._replace(url=below[file]) for file, source in sources.items()}


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


def _download(source: Source, console: Console) -> bytes:
    url, content = source.url, bytearray()
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
            console.progress("downloading", source.size, DownloadColumn()) as advance,
        ):
            while len(content) <= source.size and (block := response.read(_BLOCK)):
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
    if len(content) < source.size:
        problem = f"gave only {len(content):,} of {source.size:,} bytes; try again"
    elif len(content) > source.size:
        problem = f"is not the archive: it has more than {source.size:,} bytes; try later"
    elif digest != source.sha256:
        problem = f"is not the archive: its SHA-256 is {digest}, expected {source.sha256}; try later"
    else:
        return bytes(content)
    raise UsageError(f"{url} {problem}, {_ANOTHER_COPY}")


def _write(stock: Any, contents: Contents, root: str, console: Console) -> Any:
    """The builder that wrote the set below a folder."""

    class Prepared(stock, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        """The stock builder, which finds its examples in `contents`."""

        name, __module__ = stock.name, stock.__module__  # the set says which builder reads it

        def _split_generators(self, dl_manager: Any) -> Any:
            for label, names in contents.names.items():
                self.info.features[label].names = names
            return {split: self._generate_examples(split) for split in contents.splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int | str, Example]]:
            for example in contents.splits[split].examples:
                yield example
                advance(1)

    builder = Prepared(data_dir=root, file_format="array_record")
    with (
        console.progress("writing", sum(split.size for split in contents.splits.values())) as advance,
        contextlib.redirect_stdout(io.StringIO()),  # TFDS tells of a download of unknown size
    ):
        try:
            builder.download_and_prepare()
        except RuntimeError as error:
            failed_call = re.search(r"\w+\(\) failed: [^;\n]*", str(error))  # how array_record says that a disk is full
            if not failed_call:
                raise
            raise OSError(failed_call[0]) from error
    return builder


if __name__ == "__main__":
    run_command(main)
