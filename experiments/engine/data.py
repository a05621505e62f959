"""Image sets as device arrays: uint8 pixels and int32 labels, read once and cached.

`digits` is scikit-learn's set of 8x8 handwritten digits and comes with it. Every other name is a TensorFlow Datasets
image-classification set, read through `tfds.data_source` without TensorFlow.
"""

import dataclasses
import hashlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from experiments.engine import tfds
from experiments.engine.errors import UsageError

DIGITS_TEST_SIZE = 360
_PIXELS = {"cdc4741f6c5081ef": "original pixels", "c955d4fefffbec93": "JPEG pixels"}
"""Fingerprints of two copies of CIFAR-10; another order of the same images has another fingerprint."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image-classification set, whole, in device memory.

    The fingerprint is SHA-256 over shapes, decoded pixels and labels, 16 hexadecimal digits: copies of a set that
    differ in one pixel, or in the order of images, have different ones.
    """

    name: str  # digits, or the TFDS name
    classes: int  # their number
    train_images: UInt8[Array, "n h w c"]
    train_labels: Int[Array, " n"]
    test_images: UInt8[Array, "m h w c"]
    test_labels: Int[Array, " m"]
    fingerprint: str
    tested_on: Literal["test", "held-out"] = "test"  # what the test images are

    @property
    def identity(self) -> dict[str, Any]:
        """What a record says of its data."""
        told = {"name": self.name, "fingerprint": self.fingerprint, "description": str(self)}
        return {**told, "classes": self.classes}

    def __str__(self) -> str:
        n, height, width, channels = self.train_images.shape
        size = f"{height}x{width}x{channels}"
        pixels = f" ({_PIXELS[self.fingerprint]})" if self.fingerprint in _PIXELS else ""
        images = f"{n:,} train and {len(self.test_labels):,} {self.tested_on} images of {size}"
        return f"{self.name}{pixels}: {images}, {self.classes} classes"


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Load a set into device memory.

    Args:
      name: "digits"; a TFDS name such as "cifar10"; or "auto": cifar10 where it is prepared, else digits.
      data_dir: the TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      UsageError: if there is no such set, it is not prepared, damaged, or not an image-classification set.

    >>> from experiments.engine import data
    >>> print(data.load("digits"))
    digits: 1,437 train and 360 test images of 8x8x1, 10 classes
    """
    folder = tfds.tfds_folder(data_dir)
    if name == "auto" and (name := of_auto(data_dir)) == "digits":
        how = tfds.how_to_prepare("cifar10")
        print(f"cifar10 is not in {folder}: taking the embedded digits. To get it, {how} with --data-dir.")
    classes, arrays = _digits() if name == "digits" else tfds.arrays_of(name, folder)
    on_device: Any = {key: jnp.asarray(value) for key, value in arrays.items()}
    return Dataset(name, classes, **on_device, fingerprint=_fingerprint(arrays))


def of_auto(data_dir: str | None = None) -> str:
    """The set that "auto" stands for."""
    prepared = any(tfds.tfds_folder(data_dir).glob("cifar10/*/dataset_info.json"))
    return "cifar10" if prepared else "digits"


@dataclasses.dataclass(frozen=True)
class Split:
    """The train or test split of a set, for those that learn it online; as a `Dataset`, but in host memory."""

    name: str
    split: str
    classes: int
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}'s {self.split} half, {len(self.labels):,} images"


def load_split(name: str, data_dir: str | None = None) -> Split:
    """The training split of a set, or the test split where a folder has that one alone."""
    folder = tfds.tfds_folder(data_dir)
    there = set(tfds.builder_of(name, folder, ()).info.splits)
    split = "train" if "train" in there else "test"
    classes, arrays = tfds.arrays_of(name, folder, (split,))
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return Split(name, split, classes, images, labels, _fingerprint(arrays))


def first(data: Dataset, count: int) -> Dataset:
    """The same set with its first training images only; the test set stays whole, and so does the fingerprint."""
    size = len(data.train_labels)
    if count > size:
        raise UsageError(f"--train-size is at most the {size:,} training images of {data.name}, got {count:,}")
    return dataclasses.replace(data, train_images=data.train_images[:count], train_labels=data.train_labels[:count])


def hold_out(data: Dataset, count: int) -> Dataset:
    """The training set without its last images, which stand in for the test set: for choices that may not see it.

    >>> from experiments.engine import data
    >>> print(data.hold_out(data.load("digits"), 400))
    digits: 1,037 train and 400 held-out images of 8x8x1, 10 classes
    """
    size = len(data.train_labels)
    if count >= size:
        raise UsageError(f"--held-out is less than the {size:,} training images of {data.name}, got {count:,}")
    images, labels = data.train_images, data.train_labels
    return dataclasses.replace(
        data, train_images=images[:-count], train_labels=labels[:-count], test_images=images[-count:],
        test_labels=labels[-count:], tested_on="held-out",
    )  # fmt: skip


Affine = tuple[Float[Array, "..."], Float[Array, "..."]]
UNIT: Affine = (np.float32(1), np.float32(0))  # pyright: ignore[reportAssignmentType]


def scale(images: UInt8[Array, "n h w c"], inputs: Affine = UNIT) -> Float[Array, "n h w c"]:
    """What the net sees of pixels: x / 255 * inputs[0] + inputs[1], in float32. Call it inside jit.

    By default pixels divided by 255, as in the paper: in [0, 1], not standardised.
    """
    return images.astype(jnp.float32) / 255 * inputs[0] + inputs[1]


def _digits() -> tuple[int, dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # its pixels are 0 to 16
    labels = digits.target.astype(np.int32)
    parts = train_test_split(images, labels, test_size=DIGITS_TEST_SIZE, random_state=0, stratify=labels)
    names = ("train_images", "test_images", "train_labels", "test_labels")
    return 10, {name: np.asarray(part) for name, part in zip(names, parts, strict=True)}


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key}{arrays[key].shape}{arrays[key].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()[:16]


def order(key: jax.Array | None, size: int) -> np.ndarray:
    """The indices of an epoch's examples, every one once: int32; shuffled by the key, or in the stored order.

    >>> from experiments.engine import data
    >>> data.order(None, 5).tolist()
    [0, 1, 2, 3, 4]
    """
    return np.asarray(np.arange(size) if key is None else jax.random.permutation(key, size), np.int32)
