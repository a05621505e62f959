"""Each set from files in the format in which it is published, to what TFDS reads; CIFAR-10: test_prepare.py."""

import gzip
import hashlib
import io
import tarfile
import warnings

import numpy as np
import pytest

from experiments import prepare as prepare_module
from experiments.charlm import data as text_data
from experiments.engine import data
from experiments.engine.archives import READERS
from experiments.engine.errors import UsageError
from experiments.prepare import Source, prepare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds

COARSE, FINE = [f"super{i}" for i in range(20)], [f"class{i}" for i in range(100)]


def promise(monkeypatch, files):
    """TFDS' own files are these."""
    sources = {name: Source("file:///none", len(x), hashlib.sha256(x).hexdigest()) for name, x in files.items()}
    monkeypatch.setattr(prepare_module, "_stock_sources", lambda _: sources)


def assert_stock(name, root):
    """TFDS takes what lies there for its own, with its own features."""
    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    stock = tfds.builder_cls(name)(data_dir=root / "elsewhere", file_format="array_record")
    assert builder.is_prepared()
    assert builder.info.features.to_json() == stock.info.features.to_json()
    return builder


def pairs(images, labels):
    """What is in a split, in no order: TFDS has its own."""
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_cifar100_has_two_labels(tmp_path, monkeypatch):
    random, truth, stream = np.random.default_rng(0), {}, io.BytesIO()
    texts = {"coarse_label_names.txt": "\n".join([*COARSE, ""]), "fine_label_names.txt": "\n".join([*FINE, ""])}
    contents = {name: text.encode() for name, text in texts.items()}
    for split, size in (("train", 9), ("test", 4)):
        images = random.integers(0, 256, (size, 32, 32, 3), np.uint8)
        coarse, fine = random.integers(0, 20, size, np.uint8), random.integers(0, 100, size, np.uint8)
        truth[split] = images, fine, coarse
        planes = images.transpose(0, 3, 1, 2).reshape(size, -1)
        contents[f"{split}.bin"] = np.hstack([coarse[:, None], fine[:, None], planes]).tobytes()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    promise(monkeypatch, {"cifar-100-binary.tar.gz": stream.getvalue()})
    (tmp_path / "copy").write_bytes(stream.getvalue())
    prepare("cifar100", str(tmp_path / "tfds"), str(tmp_path / "copy"))
    builder, found = assert_stock("cifar100", tmp_path / "tfds"), data.load("cifar100", str(tmp_path / "tfds"))
    assert (builder.info.features["coarse_label"].names, builder.info.features["label"].names) == (COARSE, FINE)
    for split, (images, fine, coarse) in truth.items():
        assert pairs(getattr(found, f"{split}_images"), getattr(found, f"{split}_labels")) == pairs(images, fine)
        examples = sorted(builder.as_data_source(split=split), key=lambda example: example["id"])
        assert [example["coarse_label"] for example in examples] == coarse.tolist()
        assert [example["label"] for example in examples] == fine.tolist()


def mnist(sizes):
    """The four files, and split -> (images, labels)."""
    random, truth, files = np.random.default_rng(1), {}, {}
    for (name, split), size in zip((("train", "train"), ("t10k", "test")), sizes, strict=True):
        images, labels = random.integers(0, 256, (size, 28, 28), np.uint8), random.integers(0, 10, size, np.uint8)
        head = [number.to_bytes(4, "big") for number in (2051, size, 28, 28)]
        files[f"{name}-images-idx3-ubyte.gz"] = gzip.compress(b"".join(head) + images.tobytes())
        head = [number.to_bytes(4, "big") for number in (2049, size)]
        files[f"{name}-labels-idx1-ubyte.gz"] = gzip.compress(b"".join(head) + labels.tobytes())
        truth[split] = images, labels
    return files, truth


def test_mnist_has_four_files(tmp_path, monkeypatch):
    files, truth = mnist((7, 5))
    promise(monkeypatch, files)
    (tmp_path / "copies").mkdir()
    for name, content in files.items():
        (tmp_path / "copies" / name).write_bytes(content)
    prepare("mnist", str(tmp_path / "tfds"), str(tmp_path / "copies"))
    assert_stock("mnist", tmp_path / "tfds")
    found = data.load("mnist", str(tmp_path / "tfds"))
    for split, (images, labels) in truth.items():
        assert pairs(getattr(found, f"{split}_images"), getattr(found, f"{split}_labels")) == pairs(images, labels)


def test_one_wrong_file_of_four_leaves_nothing(tmp_path, monkeypatch):
    files, _ = mnist((7, 5))
    promise(monkeypatch, files)
    (tmp_path / "copies").mkdir()
    for name, content in files.items():
        (tmp_path / "copies" / name).write_bytes(content if "t10k-labels" not in name else content[:-1] + b"!")
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte\.gz is not the archive"):
        prepare("mnist", str(tmp_path / "tfds"), str(tmp_path / "copies"))
    assert not list((tmp_path / "tfds").iterdir())


def test_tiny_shakespeare_is_cut_as_tfds_cuts_it(tmp_path, monkeypatch):
    text = "".join(chr(ord("a") + i % 26) for i in range(1003)) + " é"
    promise(monkeypatch, {"input.txt": text.encode()})
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    prepare("tiny_shakespeare", str(tmp_path / "tfds"), str(tmp_path / "input.txt"))
    source = assert_stock("tiny_shakespeare", tmp_path / "tfds").as_data_source()
    parts = [source[split][0]["text"].decode() for split in ("train", "validation", "test")]
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [904, 50, 51]
    found = text_data.load(None, str(tmp_path / "tfds"), block=8)
    assert (len(found.train), len(found.validation)) == (904, 101)


@pytest.mark.parametrize("name", READERS)
def test_the_files_are_those_that_tfds_names(name):
    sources = prepare_module._stock_sources(tfds.builder_cls(name))
    assert len(sources) == (4 if name == "mnist" else 1)
    assert all(
        source.url.endswith(file) and len(bytes.fromhex(source.sha256)) == 32 for file, source in sources.items()
    )
