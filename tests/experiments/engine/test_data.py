"""The sets that experiments read; the TFDS ones are prepared here, as files, without TensorFlow."""

import io
import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from experiments.engine import data, tfds
from experiments.engine.errors import UsageError

SPLITS = {"train": 7, "test": 5}
SHAPE = (4, 3, 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "linked_jax"


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


# --- digits


def test_digits_are_scikit_learns_split_in_two_by_class(digits):
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    train, test = (
        Counter((image.tobytes(), int(label)) for image, label in zip(*map(np.asarray, pair), strict=True))
        for pair in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels))
    )
    source = load_digits()
    pixels = np.floor(source.images * 255 / 16 + 0.5).astype(np.uint8)
    everything = Counter((image.tobytes(), int(label)) for image, label in zip(pixels, source.target, strict=True))
    assert train + test == everything
    assert not train & test
    of_class = np.bincount(source.target)
    np.testing.assert_allclose(np.bincount(np.asarray(digits.test_labels)), of_class * 360 / 1797, atol=1)


def test_digits_are_uint8_and_use_the_whole_range(digits):
    for images, labels in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)):
        assert images.dtype == jnp.uint8
        assert labels.dtype == jnp.int32
        assert (int(images.min()), int(images.max())) == (0, 255)
        assert set(np.asarray(labels).tolist()) == set(range(digits.classes))


def test_the_fingerprint_sees_one_pixel_and_one_label(digits, monkeypatch):
    assert re.fullmatch("[0-9a-f]{16}", digits.fingerprint)
    assert data.load("digits").fingerprint == digits.fingerprint
    classes, arrays = data._digits()
    fingerprints = {digits.fingerprint}
    for key in arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
        changed[key].flat[-1] ^= 1
        monkeypatch.setattr(data, "_digits", lambda changed=changed: (classes, changed))
        fingerprints.add(data.load("digits").fingerprint)
    assert len(fingerprints) == 5


def test_auto_takes_digits_and_says_how_to_get_cifar10(tmp_path, capsys):
    assert data.load("auto", str(tmp_path)).name == "digits"
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in (str(tmp_path), "cifar10", "experiments.prepare cifar10", "--data-dir"):
        assert part in said


# --- pixels and orders


def test_scale_divides_by_255_inside_jit():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = jax.jit(data.scale)(pixels)
    assert scaled.dtype == jnp.float32
    # XLA multiplies by 1 / 255, so all but the ends may differ from the division in the last bit.
    np.testing.assert_array_max_ulp(np.asarray(scaled), pixels.astype(np.float32) / np.float32(255), maxulp=1)
    assert (scaled.min(), scaled.max()) == (0, 1)


@given(size=st.integers(1, 200))
def test_the_stored_order_is_every_index_once(size):
    order = data.order(None, size)
    assert order.tolist() == list(range(size))
    assert order.dtype == np.int32


@given(size=st.sampled_from((1, 2, 33)), seed=st.integers(0, 5))  # jax.random compiles for each size
def test_a_shuffled_order_has_every_index_once(size, seed):
    order = data.order(jax.random.key(seed), size)
    assert sorted(order.tolist()) == list(range(size))
    assert order.dtype == np.int32


def test_the_key_is_the_order():
    orders = [data.order(jax.random.key(seed), 50).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])


# --- TensorFlow Datasets


def prepare(
    root: Path,
    name: str = "tiny",
    *,
    label: str = "label",
    label_kind: str = "class",
    splits=SPLITS,
    group=1,
    changed=lambda image, label: (image, label),
):
    """Write a prepared set; returns its folder and split -> (images, labels)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from array_record.python.array_record_module import ArrayRecordWriter
        from PIL import Image
        from tensorflow_datasets.proto import tf_example_pb2

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    truth = {}
    for split, size in splits.items():
        images = random.integers(0, 256, (size, *SHAPE), dtype=np.uint8)
        labels = random.integers(0, 3, size)
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), f"group_size:{group}")
        for image, number in zip(images, labels, strict=True):
            image, number = changed(image, number)
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature[label].int64_list.value.append(int(number))
            writer.write(example.SerializeToString())
        writer.close()
        truth[split] = images, labels
    package = "tensorflow_datasets.core.features."
    dimensions = {"dimensions": [str(n) for n in SHAPE]}
    features = {
        "image": {
            "pythonClassName": package + "image_feature.Image",
            "image": {"dtype": "uint8", "encodingFormat": "png", "shape": dimensions},
        },
        label: {"pythonClassName": package + "class_label_feature.ClassLabel", "classLabel": {"numClasses": "3"}}
        if label_kind == "class"
        else {"pythonClassName": package + "scalar.Scalar", "tensor": {"dtype": "int64", "shape": {}}},
    }
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "array_record",
        "moduleName": "__main__",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(size)],
            }
            for split, size in splits.items()
        ],
    }
    top = {"pythonClassName": package + "features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(top))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder, truth


def assert_equals(loaded, truth):
    for split, (images, labels) in truth.items():
        np.testing.assert_array_equal(getattr(loaded, f"{split}_images"), images)
        np.testing.assert_array_equal(getattr(loaded, f"{split}_labels"), labels)
    assert loaded.train_images.dtype == jnp.uint8
    assert loaded.classes == 3


def usage_error(call, *parts):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_a_prepared_set_is_read_exactly_and_the_second_time_from_the_cache(tmp_path, own_cache, monkeypatch, capsys):
    _, truth = prepare(tmp_path / "tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    first = data.load("tiny")
    assert_equals(first, truth)
    assert str(first) == "tiny: 7 train and 5 test images of 4x3x3, 3 classes"
    monkeypatch.setattr(tfds, "_read", lambda *_: pytest.fail("read again"))
    second = data.load("tiny", str(tmp_path / "tfds"))
    assert_equals(second, truth)
    assert second.fingerprint == first.fingerprint
    assert [path.suffix for path in own_cache.iterdir()] == [".npz"]
    assert capsys.readouterr() == ("", "")


def test_a_set_prepared_in_groups_is_read_without_advice(tmp_path, caplog):
    _, truth = prepare(tmp_path / "tfds", group=64)
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    assert caplog.text == ""


@pytest.mark.fault("data", "the cache is damaged: read again")
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "text", "flipped"])
def test_a_damaged_cache_is_read_again_and_repaired(damage, tmp_path, own_cache, capsys):
    _, truth = prepare(tmp_path / "tfds")
    data.load("tiny", str(tmp_path / "tfds"))
    (cache,) = own_cache.iterdir()
    good = cache.read_bytes()
    pixels = good.index(truth["train"][0].tobytes())
    flipped = good[:pixels] + bytes([good[pixels] ^ 1]) + good[pixels + 1 :]
    bad = {"empty": b"", "half": good[: len(good) // 2], "noise": os.urandom(500), "text": b"{}", "flipped": flipped}
    cache.write_bytes(bad[damage])
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    said = capsys.readouterr().err
    assert "damaged" in said
    assert str(cache) in said
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    assert capsys.readouterr().err == ""
    assert list(own_cache.iterdir()) == [cache]


def test_a_set_prepared_anew_is_not_taken_from_the_old_cache(tmp_path):
    folder, _ = prepare(tmp_path / "tfds")
    data.load("tiny", str(tmp_path / "tfds"))
    (folder / "tiny-train.array_record-00000-of-00001").unlink()
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", "prepare it again")


def test_without_a_place_for_the_cache_a_set_still_loads(tmp_path, monkeypatch, capsys):
    _, truth = prepare(tmp_path / "tfds")
    blocked = tmp_path / "file"  # root may write into any folder, but into no file
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    assert "no cache written" in capsys.readouterr().err


@pytest.mark.fault("data", "the disk is full: no partial cache")
def test_a_full_disk_leaves_no_partial_cache(tmp_path, own_cache, monkeypatch, capsys):
    _, truth = prepare(tmp_path / "tfds")

    def savez(file, **_):
        file.write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    assert "No space left" in capsys.readouterr().err
    assert list(own_cache.iterdir()) == []


@pytest.mark.fault("security", "the name of a data set leaves its folder, or is none")
@pytest.mark.parametrize("name", ["nosuchset", "../tiny", "", "Two Words", "tiny/config", "tiny:9.9.9"])
def test_unknown_names(name, tmp_path):
    prepare(tmp_path / "tfds")
    usage_error(lambda: data.load(name, str(tmp_path / "tfds")), repr(name), "--dataset digits", "cifar10")


def test_names_that_are_not_prepared(tmp_path, own_cache):
    tmp_path.joinpath("empty").mkdir()
    hows = {
        "svhn_cropped": "`tfds build svhn_cropped --file_format=array_record`, which needs TensorFlow",
        "mnist": "`python -m experiments.prepare mnist`",
        "cifar10": "`python -m experiments.prepare cifar10`",
    }
    for name, how in hows.items():
        message = usage_error(lambda name=name: data.load(name, str(tmp_path / "empty")), how)
        assert str(tmp_path / "empty") in message
    missing = str(tmp_path / "missing")
    usage_error(lambda: data.load("cifar10", missing), missing, "--data-dir", "--dataset digits")
    assert list(tmp_path.joinpath("empty").iterdir()) == []
    assert not own_cache.exists()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    usage_error(lambda: data.load("cifar10", str(tmp_path / "file")), str(tmp_path / "file"), "--data-dir")


@pytest.mark.fault("data", "a data file is truncated")
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("split", ["train", "test"])
def test_truncated_records(kept, split, tmp_path, own_cache):
    folder, _ = prepare(tmp_path / "tfds")
    file = folder / f"tiny-{split}.array_record-00000-of-00001"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", str(folder), "prepare it again")
    assert not own_cache.exists()


@pytest.mark.fault("data", "a description is damaged")
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_descriptions(file, text, tmp_path, own_cache):
    folder, _ = prepare(tmp_path / "tfds")
    (folder / file).write_text(text)
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", "--dataset digits")
    assert not own_cache.exists()


@pytest.mark.fault("data", "a bit of a data file is altered")
def test_an_altered_bit_is_found_or_changes_nothing(tmp_path, own_cache, record_property):
    folder, truth = prepare(tmp_path / "tfds")
    file = folder / "tiny-train.array_record-00000-of-00001"
    whole, random = file.read_bytes(), np.random.default_rng(0)
    refused, tried = 0, 40
    for place in random.choice(np.flatnonzero(np.frombuffer(whole, np.uint8)), tried):  # the rest is padding
        content = bytearray(whole)
        content[place] ^= 1 << int(random.integers(8))
        file.write_bytes(bytes(content))
        try:
            assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
        except UsageError:
            refused += 1
    assert refused > tried / 2
    record_property("tried", tried)


@pytest.mark.fault("data", "a label that is no class, an image of another size")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda image, label: (image, label + 3), "label 0 is "),
        (lambda image, label: (image, -1), "label 0 is -1, and there are 3 classes"),
        (lambda image, label: (image[:-1], label), "image 0 has shape (3, 3, 3), not (4, 3, 3)"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit(changed, said, tmp_path, own_cache):
    folder, _ = prepare(tmp_path / "tfds", changed=changed)
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", str(folder), said, "prepare it again")
    assert not own_cache.exists()


@pytest.mark.fault("data", "fewer examples than promised")
def test_fewer_examples_than_promised(tmp_path):
    folder, _ = prepare(tmp_path / "tfds")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('["7"]', '["8"]'))
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", "prepare it again")


@pytest.mark.parametrize(
    "kind", [{"label": "number"}, {"label_kind": "scalar"}, {"splits": {"train": 7}}, {"splits": {"test": 5}}]
)
def test_sets_that_are_no_image_classification(kind, tmp_path, own_cache):
    prepare(tmp_path / "tfds", **kind)
    usage_error(lambda: data.load("tiny", str(tmp_path / "tfds")), "tiny", "use e.g. cifar10")
    assert not own_cache.exists()


@pytest.mark.slow
def test_the_real_cifar10_if_it_is_there():
    root = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (root / "cifar10").is_dir():
        pytest.skip("no prepared cifar10; set TFDS_DATA_DIR to a folder that has it")
    cifar10 = data.load("auto", str(root))
    assert cifar10.name == "cifar10"
    assert cifar10.train_images.shape == (50_000, 32, 32, 3)
    assert cifar10.test_images.shape == (10_000, 32, 32, 3)
    assert np.bincount(np.asarray(cifar10.train_labels)).tolist() == [5000] * 10
    assert np.bincount(np.asarray(cifar10.test_labels)).tolist() == [1000] * 10
    means = np.asarray(cifar10.train_images, np.float64).mean(axis=(0, 1, 2))
    original = bool(np.allclose(means, [125.307, 122.950, 113.865], atol=1e-3, rtol=0))
    assert not ("JPEG pixels" in str(cifar10) and original)
    assert not ("original pixels" in str(cifar10) and not original)
    if cifar10.fingerprint in data._PIXELS:
        assert str(cifar10).startswith(f"cifar10 ({data._PIXELS[cifar10.fingerprint]}): ")


def test_the_first_training_images_only():
    whole = data.load("digits")
    part = data.first(whole, 100)
    np.testing.assert_array_equal(part.train_images, whole.train_images[:100])
    np.testing.assert_array_equal(part.train_labels, whole.train_labels[:100])
    assert part.test_images is whole.test_images
    assert part.fingerprint == whole.fingerprint
    assert len(data.first(whole, 1437).train_labels) == 1437
    assert "1,437" in usage_error(lambda: data.first(whole, 1438), "--train-size")


def test_held_out_images_are_no_training_images():
    whole = data.load("digits")
    part = data.hold_out(whole, 437)
    for name in ("images", "labels"):
        joined = np.concatenate([getattr(part, f"train_{name}"), getattr(part, f"test_{name}")])
        np.testing.assert_array_equal(joined, getattr(whole, f"train_{name}"))
    assert (len(part.test_labels), part.fingerprint) == (437, whole.fingerprint)
    assert "1,000 train and 437 held-out images" in str(part)
    assert "1,437" in usage_error(lambda: data.hold_out(whole, 1437), "--held-out")


@pytest.mark.parametrize(
    ("splits", "taken"), [({"train": 7, "test": 5}, "train"), ({"train": 7}, "train"), ({"test": 5}, "test")]
)
def test_a_half_is_the_training_split_or_the_one_that_is_there(splits, taken, tmp_path, own_cache, monkeypatch):
    _, truth = prepare(tmp_path / "tfds", splits=splits)
    half = data.load_split("tiny", str(tmp_path / "tfds"))
    np.testing.assert_array_equal(half.images, truth[taken][0])
    np.testing.assert_array_equal(half.labels, truth[taken][1])
    assert (half.split, half.classes, str(half)) == (taken, 3, f"tiny's {taken} half, {splits[taken]} images")
    monkeypatch.setattr(tfds, "_read", lambda *_: pytest.fail("read again"))
    assert data.load_split("tiny", str(tmp_path / "tfds")).fingerprint == half.fingerprint
    assert [path.suffix for path in own_cache.iterdir()] == [".npz"]


def test_a_half_and_the_whole_set_have_caches_of_their_own(tmp_path, own_cache):
    _, truth = prepare(tmp_path / "tfds")
    data.load_split("tiny", str(tmp_path / "tfds"))
    assert_equals(data.load("tiny", str(tmp_path / "tfds")), truth)
    assert len(list(own_cache.iterdir())) == 2


def test_a_set_with_neither_half_is_refused(tmp_path):
    prepare(tmp_path / "tfds", splits={"validation": 4})
    usage_error(lambda: data.load_split("tiny", str(tmp_path / "tfds")), "tiny", "has no split test, only validation")
