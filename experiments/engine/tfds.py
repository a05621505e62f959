"""TensorFlow Datasets' image sets as NumPy arrays, without TensorFlow: checked, and cached once they were decoded."""

import hashlib
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np

from experiments.engine.archives import READERS
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, first_line

_READ_AT_ONCE = 1000
BOTH = ("train", "test")


def tfds_folder(data_dir: str | None) -> Path:
    """Where TensorFlow Datasets' sets are: by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def tensorflow_datasets() -> Any:
    """The package, without its advice and its bars."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # its advice: install OpenCV, prepare the set in other groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds
    tfds.disable_progress_bar()  # its bars have no total
    return tfds


def arrays_of(name: str, folder: Path, splits: tuple[str, ...] = BOTH) -> tuple[int, dict[str, np.ndarray]]:
    """The number of classes, and images and labels of each split: {"train_images": ..., "train_labels": ..., ...}.

    Raises:
      UsageError: if there is no such set, it is not prepared, damaged, or not an image-classification set.
    """
    builder = builder_of(name, folder, splits)
    files = sorted(path for path in Path(builder.data_path).iterdir() if path.is_file())
    state = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    key = hashlib.sha256(f"{builder.data_path}{state}".encode()).hexdigest()[:16]
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "linked_jax"
    only = "" if splits == BOTH else "-" + "-".join(splits)
    cache = cache_root / f"{name.replace('/', '-')}{only}-{key}.npz"
    classes = builder.info.features["label"].num_classes
    if cache.is_file():
        try:
            with cache.open("rb") as file, np.load(file) as stored:  # np.load leaves a file it cannot read open
                return classes, dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"the cache {cache} is damaged ({error}): reading {name} again", file=sys.stderr)
    arrays = _read(builder, name, splits)
    try:
        cache_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_root) as scratch:
            np.savez(Path(scratch) / cache.name, allow_pickle=False, **arrays)
            (Path(scratch) / cache.name).replace(cache)
    except OSError as error:
        print(f"no cache written ({error.strerror}): the next start will be as slow", file=sys.stderr)
    return classes, arrays


def how_to_prepare(name: str) -> str:
    """The end of a sentence that says so."""
    ours, stock = f"python -m experiments.prepare {name}", f"tfds build {name} --file_format=array_record"
    command = f"`{ours}`" if name in READERS else f"`{stock}`, which needs TensorFlow"
    return f"prepare it with {command}, or name its folder"


def builder_of(name: str, folder: Path, splits: tuple[str, ...]) -> Any:
    """The set's builder, of a set that is prepared and has these splits of images with classes; others are refused."""
    if not folder.is_dir():
        raise UsageError(
            f"no data set {name!r}: the data folder {folder} does not exist; use --dataset digits, which is embedded, "
            f"or {how_to_prepare(name)} with --data-dir"
        )
    try:
        builder = tensorflow_datasets().builder(name, data_dir=str(folder), file_format="array_record")
    except Exception as error:
        raise UsageError(
            f"cannot open the data set {name!r} ({first_line(error)}); use --dataset digits or a TFDS name such as "
            "cifar10, or prepare the set again"
        ) from error
    if not (Path(builder.data_path) / "dataset_info.json").is_file():
        raise UsageError(f"{name} is not prepared in {folder}; {how_to_prepare(name)} with --data-dir")
    features: Any = builder.info.features
    if features is None or not {"image", "label"} <= set(features):
        raise UsageError(f"{name} is no image-classification set; use e.g. cifar10")
    if missing := [split for split in splits if split not in builder.info.splits]:
        raise UsageError(
            f"{name} in {folder} has no split {' and '.join(missing)}, only {', '.join(builder.info.splits)}; "
            "prepare all of it anew, or use e.g. cifar10"
        )
    if not hasattr(features["label"], "num_classes"):
        raise UsageError(f"the labels of {name} are no classes; use e.g. cifar10")
    return builder


def _read(builder: Any, name: str, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays, console = {}, Console()
    try:
        for split in splits:
            source, images, labels = builder.as_data_source(split=split), [], []
            size = builder.info.splits[split].num_examples
            if len(source) != size:
                raise ValueError(f"{len(source)} of {size} {split} examples")
            with console.progress(f"reading {name} {split}", size) as advance:
                for start in range(0, size, _READ_AT_ONCE):
                    examples = source.__getitems__(range(start, min(start + _READ_AT_ONCE, size)))
                    images += [example["image"] for example in examples]
                    labels += [example["label"] for example in examples]
                    advance(len(examples))
            _check_examples(builder.info.features, split, images, labels)
            arrays |= {f"{split}_images": np.stack(images), f"{split}_labels": np.asarray(labels, np.int32)}
    except Exception as error:  # array_record, Pillow and protobuf raise whatever they like on a damaged file
        raise UsageError(
            f"{name} in {builder.data_path} cannot be read ({first_line(error)}); delete it and prepare it again"
        ) from error
    return arrays


def _check_examples(features: Any, split: str, images: list[np.ndarray], labels: list[int]) -> None:
    """Refuse an image of another size than the set's, and a label that is none of its classes."""
    size = [None if side is None else int(side) for side in features["image"].shape]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if any(side not in (None, there) for side, there in zip(size, image.shape, strict=True)):
            raise ValueError(f"{split} image {number} has shape {image.shape}, not {tuple(size)}")
        if not 0 <= label < features["label"].num_classes:
            raise ValueError(
                f"{split} label {number} is {label}, and there are {features['label'].num_classes} classes"
            )
