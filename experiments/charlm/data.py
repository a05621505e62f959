"""A text as codes of its characters: Tiny Shakespeare from TensorFlow Datasets, or any file."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.engine.errors import UsageError, first_line
from experiments.engine.tfds import how_to_prepare, tensorflow_datasets, tfds_folder

SHAKESPEARE = "tiny_shakespeare"
_PREPARE = f"{how_to_prepare(SHAKESPEARE)} with --data-dir, or pass --text with a text file of your own"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, split by position: the first nine tenths of the characters train, the last tenth validates.

    Attributes:
      name: tiny_shakespeare, or that of the file.
      train: codes of the characters, in order of the text.
      validation: the same of the rest.
      vocabulary: all characters of the text, sorted; a code is a position in it.
    """

    name: str
    train: Int[np.ndarray, " n"]
    validation: Int[np.ndarray, " m"]
    vocabulary: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, sizes and codes, 16 hexadecimal digits."""
        sizes = f"{self.vocabulary} {len(self.train)} {len(self.validation)} "
        return hashlib.sha256(sizes.encode() + self.train.tobytes() + self.validation.tobytes()).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, str]:
        """What a record says of its data."""
        return {"name": self.name, "fingerprint": self.fingerprint, "description": str(self)}

    def __str__(self) -> str:
        sizes = f"{len(self.train):,} characters to train on, {len(self.validation):,} to validate"
        return f"{self.name}: {sizes}, {len(self.vocabulary)} different ones"


def load(text: str | None, data_dir: str | None, *, block: int) -> Text:
    """The text of a file in UTF-8, or Tiny Shakespeare for None; both parts have a block and one more at least.

    Raises:
      UsageError: if it is not there, cannot be read, or is too short.
    """
    found = _shakespeare(tfds_folder(data_dir)) if text is None else _file(Path(text))
    least = min(len(found.train), len(found.validation))
    if least <= block or len(found.vocabulary) < 2:
        raise UsageError(
            f"{found.name} has {least:,} characters in its smaller part and {len(found.vocabulary)} different ones; a "
            f"text has {block + 1} and 2 at least, so pass a --text of {10 * block + 10:,} or more"
        )
    return found


def split(name: str, train: str, validation: str) -> Text:
    """The text of two parts.

    >>> from experiments.charlm.data import split
    >>> text = split("letters", "abba", "cab")
    >>> text.vocabulary, text.train.tolist(), text.validation.tolist()
    ('abc', [0, 1, 1, 0], [2, 0, 1])
    """
    vocabulary = "".join(sorted({*train, *validation}))
    code = {character: number for number, character in enumerate(vocabulary)}
    first, last = (np.array([code[character] for character in part], np.int32) for part in (train, validation))
    return Text(name, first, last, vocabulary)


def _file(path: Path) -> Text:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); pass --text with a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8 ({first_line(error)}); save it as one") from error
    cut = len(text) * 9 // 10
    return split(path.name, text[:cut], text[cut:])


def _shakespeare(folder: Path) -> Text:
    """TFDS has the last tenth in two halves, validation and test; nanoGPT validates on both together."""
    if not any(folder.glob(f"{SHAKESPEARE}/*/dataset_info.json")):
        raise UsageError(f"{SHAKESPEARE} is not in {folder}; {_PREPARE}")
    try:
        builder: Any = tensorflow_datasets().builder(SHAKESPEARE, data_dir=str(folder), file_format="array_record")
        parts = [
            builder.as_data_source(split=part)[0]["text"].decode("utf-8") for part in ("train", "validation", "test")
        ]
    except Exception as error:  # array_record and protobuf raise whatever they like on a damaged file
        raise UsageError(f"{SHAKESPEARE} in {folder} cannot be read ({first_line(error)}); {_PREPARE}") from error
    return split(SHAKESPEARE, parts[0], parts[1] + parts[2])
