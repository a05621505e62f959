"""What is in the files that data sets are published as, read without TensorFlow.

A reader takes the contents of a set's files by their names, such as {"cifar-10-binary.tar.gz": b"..."}, and gives what
TensorFlow Datasets' own builder would make of them.
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.progress import DownloadColumn

from experiments.engine.console import Console

Files = Mapping[str, bytes]
"""Contents by names."""
Example = dict[str, Any]


class SplitContents(NamedTuple):
    """A split: how many examples, and each with its key."""

    size: int
    examples: Iterator[tuple[int | str, Example]]


class Contents(NamedTuple):
    """Of a set: its splits, and the names of the classes of its labels, by their features."""

    splits: dict[str, SplitContents]
    names: dict[str, list[str]]


Reader = Callable[[Files, Console], Contents]


def _cifar(train: Sequence[str], test: Sequence[str], labels: Mapping[str, str]) -> Reader:
    """A reader of CIFAR's binary format: an archive of files, some of them of records.

    A record is a byte for each label, then the red, the green and the blue pixels of 32 x 32, row by row.

    Args:
      train: the files of the records to train on.
      test: those of the others.
      labels: the features of the labels, in order, each with the file of its classes' names.
    """

    def read(files: Files, console: Console) -> Contents:
        (archive,) = files.values()
        found = _unpack(archive, console)

        def contents_of(split: str, names: Sequence[str]) -> SplitContents:
            joined = np.frombuffer(b"".join(found[name] for name in names), np.uint8)
            records = joined.reshape(-1, len(labels) + 3 * 32 * 32)
            return SplitContents(len(records), examples(split, records))

        def examples(split: str, records: UInt8[np.ndarray, "n bytes"]) -> Iterator[tuple[int, Example]]:
            for index, record in enumerate(records):
                pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
                image = Image.fromarray(np.ascontiguousarray(pixels))  # an array TFDS would encode with TensorFlow
                of_record = dict(zip(labels, map(int, record), strict=False))
                yield index, {"id": f"{split}_{index:05d}", "image": image, **of_record}

        names = {label: found[file].decode().split() for label, file in labels.items()}
        return Contents({"train": contents_of("train", train), "test": contents_of("test", test)}, names)

    return read


def _mnist(files: Files, _console: Console) -> Contents:
    """Four files: 16 bytes of head and 28 x 28 pixels an image, 8 bytes of head and a byte a label."""

    def contents_of(name: str) -> SplitContents:
        images, labels = (gzip.decompress(files[f"{name}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1"))
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        pairs = zip(pixels, labels[8:], strict=True)
        return SplitContents(
            len(pixels), enumerate({"image": Image.fromarray(image), "label": y} for image, y in pairs)
        )

    return Contents({"train": contents_of("train"), "test": contents_of("t10k")}, {})


def _tiny_shakespeare(files: Files, _console: Console) -> Contents:
    """One text: nine tenths train, half of the rest validates, the other half tests."""
    (content,) = files.values()
    text = content.decode()
    first = int(len(text) * 0.9)
    second = first + int((len(text) - first) * 0.5)
    parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    return Contents({split: SplitContents(1, iter([(split, {"text": part})])) for split, part in parts.items()}, {})


READERS: dict[str, Reader] = {
    "cifar10": _cifar(
        [f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"], {"label": "batches.meta.txt"}
    ),
    "cifar100": _cifar(
        ["train.bin"], ["test.bin"], {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
    ),
    "mnist": _mnist,
    "tiny_shakespeare": _tiny_shakespeare,
}


def _unpack(archive: bytes, console: Console) -> dict[str, bytes]:
    """The contents of a tar archive's files, by their names."""
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
