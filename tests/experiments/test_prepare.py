"""From a server to a set that TFDS reads; the files are small, their formats and the server are real."""

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import prepare as prepare_module
from experiments.engine import data
from experiments.engine.errors import UsageError, run_command
from experiments.prepare import Source, prepare
from tests.cases import first_fast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

ROOT = Path(__file__).parents[2]
LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {f"data_batch_{i}.bin": 3 for i in range(1, 6)} | {"test_batch.bin": 4}  # file -> images
VERSION = "3.0.2"


def make_archive():
    """The bytes of an archive in CIFAR-10's binary format, and split -> (images, labels)."""
    random = np.random.default_rng(0)
    images = {"train": [], "test": []}
    labels = {"train": [], "test": []}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add("batches.meta.txt", "\n".join([*LABELS, "", ""]).encode())
        add("readme.html", b"<html></html>")
        for name, size in reversed(BATCHES.items()):  # the order in the archive means nothing
            content = b""
            batch = random.integers(0, 256, (size, 32, 32, 3), np.uint8)
            batch_labels = random.integers(0, 10, size, np.uint8)
            for image, label in zip(batch, batch_labels, strict=True):
                planes = [image[:, :, channel].tobytes() for channel in range(3)]
                content += bytes([label]) + b"".join(planes)
            add(name, content)
            split = "test" if name.startswith("test") else "train"
            images[split].insert(0, batch)
            labels[split].insert(0, batch_labels)
    truth = {split: (np.concatenate(images[split]), np.concatenate(labels[split])) for split in images}
    return stream.getvalue(), truth


CONTENT, TRUTH = make_archive()
WRONG = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, self.path[1:].replace("-", "_"))()

    def log_message(self, *_):
        pass

    def answer(self, content, claimed=None):
        self.send_response(200)
        if claimed is not None:
            self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self.wfile.write(content)

    def good(self):
        self.answer(CONTENT, len(CONTENT))

    def no_length(self):
        self.answer(CONTENT)

    def moved(self):
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()

    def half(self):
        self.answer(CONTENT[: len(CONTENT) // 2], len(CONTENT))

    def half_no_length(self):
        self.answer(CONTENT[: len(CONTENT) // 2])

    def half_chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT[:1000])

    def nothing(self):
        self.answer(b"", 0)

    def drop(self):
        pass  # closes without an answer

    def wrong(self):
        self.answer(WRONG, len(WRONG))

    def longer(self):
        self.answer(CONTENT + b"more", len(CONTENT) + 4)

    def page(self):
        self.answer(b"<html>log in first</html>", 25)

    def not_found(self):
        self.send_error(404)

    def busy(self):
        self.send_error(503)

    def hang(self):
        self.server.over.wait(10)

    def hang_half(self):
        self.answer(CONTENT[:1000], len(CONTENT))
        self.wfile.flush()
        self.server.over.wait(10)

    def noise(self):
        self.wfile.write(b"SSH-2.0-server\r\n")


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.over = [], threading.Event()
        server.handle_error = lambda *_: None  # a client that hangs up
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def settings(server, tmp_path, monkeypatch):
    """The small archive takes the place of the real one, at /good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    server.asked.clear()
    archive = Source(address(server, "good"), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(prepare_module, "_stock_sources", lambda _: {"cifar-10-binary.tar.gz": archive})


def address(server, path):
    return f"http://127.0.0.1:{server.server_address[1]}/{path}"


def usage_error(call, *parts):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def assert_nothing_then_good(folder):
    """Nothing lies there, and nothing keeps a second call from working."""
    assert list(folder.iterdir()) == []
    assert data.load("auto", str(folder)).name == "digits"
    assert_prepared(folder, prepare("cifar10", str(folder)))


def assert_prepared(folder, prepared):
    assert prepared == folder / "cifar10" / VERSION
    assert [path.name for path in folder.iterdir()] == ["cifar10"]
    assert [path.name for path in (folder / "cifar10").iterdir()] == [VERSION]
    loaded = data.load("cifar10", str(folder))
    shards = [prepared / f"cifar10-{split}.array_record-00000-of-00001" for split in TRUTH]
    assert all(shard.is_file() for shard in shards)
    assert loaded.classes == 10
    # TFDS stores a set in an order of its own, so as sets of (image, label).
    for split, (images, labels) in TRUTH.items():
        found = zip(getattr(loaded, f"{split}_images"), getattr(loaded, f"{split}_labels"), strict=True)
        found = sorted((np.asarray(image).tobytes(), int(label)) for image, label in found)
        assert found == sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def command(monkeypatch, *arguments):
    """The exit code of a command line."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    try:
        with pytest.raises(SystemExit) as caught:
            run_command(prepare_module.main)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return caught.value.code


# --- the good cases


@pytest.mark.slow
def test_the_set_is_what_the_stock_builder_promises(tmp_path, capsys):
    folder = prepare("cifar10", str(tmp_path / "new" / "folder"))
    assert_prepared(tmp_path / "new" / "folder", folder)
    assert capsys.readouterr().out.splitlines() == [
        f"downloading {prepare_module._stock_sources(None)['cifar-10-binary.tar.gz'].url}, 0 MB",
        f"writing cifar10 to {folder}",
        f"cifar10 is prepared: 15 train, 4 test examples in {folder}",
    ]
    root = folder.parents[1]
    builder = tfds.builder("cifar10", data_dir=root, file_format="array_record")
    assert builder.is_prepared()
    stock = tfds.builder_cls("cifar10")(data_dir=root / "elsewhere", file_format="array_record")
    assert builder.info.features.to_json() == stock.info.features.to_json()
    assert builder.info.supervised_keys == stock.info.supervised_keys == ("image", "label")
    assert str(builder.version) == str(stock.version) == VERSION
    assert builder.info.features["label"].names == LABELS
    assert builder.info.download_size == len(CONTENT)
    assert json.loads((folder / "dataset_info.json").read_text())["moduleName"] == type(stock).__module__
    for split, (images, labels) in TRUTH.items():
        source = tfds.data_source("cifar10", split=split, data_dir=root)
        examples = {example["id"].decode(): example for example in source}
        assert sorted(examples) == [f"{split}_{index:05d}" for index in range(len(images))]
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            example = examples[f"{split}_{index:05d}"]
            np.testing.assert_array_equal(example["image"], image)
            assert example["label"] == label


def test_the_archive_is_the_one_that_tfds_names(monkeypatch):
    monkeypatch.undo()
    (archive,) = prepare_module._stock_sources(tfds.builder_cls("cifar10")).values()
    assert archive.url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert archive.size == 170_052_171
    assert len(bytes.fromhex(archive.sha256)) == 32


@pytest.mark.parametrize("path", first_fast(["no-length", "moved"]))
def test_other_ways_to_serve_the_same_bytes(path, server, tmp_path):
    assert_prepared(tmp_path / "tfds", prepare("cifar10", str(tmp_path / "tfds"), address(server, path)))


@pytest.mark.parametrize("kind", first_fast(["path", "home", "file://"]))
def test_a_copy_on_disk(kind, server, tmp_path, monkeypatch):
    copy = tmp_path / "a copy.tar.gz"
    copy.write_bytes(CONTENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = {"path": str(copy), "home": f"~/{copy.name}", "file://": copy.as_uri()}[kind]
    assert_prepared(tmp_path / "tfds", prepare("cifar10", str(tmp_path / "tfds"), url))
    assert server.asked == []


def test_a_prepared_set_is_left_alone(server, tmp_path, monkeypatch, capsys):
    folder = prepare("cifar10", str(tmp_path))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert command(monkeypatch, "cifar10", "--data-dir", str(tmp_path), "--url", address(server, "not-found")) == 0
    assert capsys.readouterr() == (f"cifar10 is already prepared in {folder}\n", "")
    assert server.asked == ["/good"]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")} == before


def test_the_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare("cifar10") == tmp_path / "home" / "tensorflow_datasets" / "cifar10" / VERSION
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "set"))
    assert prepare("cifar10") == tmp_path / "set" / "cifar10" / VERSION


def test_a_terminal_shows_a_bar_for_each_long_step_and_none_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich see a terminal
    prepare("cifar10", str(tmp_path))
    said, noise = capsys.readouterr()
    for step in ("downloading", "unpacking", "writing"):
        assert f"{step} \x1b" in said
    assert "19/19" in said
    assert "Dataset cifar10 downloaded" not in said
    assert noise == ""


def in_new_process(folder, url, before=""):
    """Run the command without TensorFlow, after some lines of code."""
    code = f"""
import os, signal, sys
from experiments import prepare
archive = prepare.Source("file:///none", {len(CONTENT)}, {hashlib.sha256(CONTENT).hexdigest()!r})
prepare._stock_sources = lambda _: {{"cifar-10-binary.tar.gz": archive}}
{before}
sys.argv = ["prepare", "cifar10", "--data-dir", {str(folder)!r}, "--url", {url!r}]
try:
    prepare.run_command(prepare.main)
finally:
    assert "tensorflow" not in sys.modules
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_the_command_needs_no_tensorflow(server, tmp_path):
    folder = tmp_path / "tfds"
    ran = in_new_process(folder, address(server, "good"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].startswith("cifar10 is prepared: 15 train, 4 test examples in ")
    assert_prepared(folder, folder / "cifar10" / VERSION)


# --- archives that cannot be had


@pytest.mark.fault("download", "half a file, an HTML page, a wrong checksum, an error, a server that hangs up")
@pytest.mark.parametrize(
    ("path", "parts"),
    first_fast(
        [
            ("half", [f"gave only {len(CONTENT) // 2:,} of {len(CONTENT):,} bytes", "try again"]),
            ("half-no-length", [f"gave only {len(CONTENT) // 2:,} of {len(CONTENT):,} bytes"]),
            ("half-chunked", [f"of {len(CONTENT):,} bytes"]),
            ("nothing", [f"gave only 0 of {len(CONTENT):,} bytes"]),
            ("page", [f"gave only 25 of {len(CONTENT):,} bytes"]),
            ("wrong", ["is not the archive", hashlib.sha256(WRONG).hexdigest(), hashlib.sha256(CONTENT).hexdigest()]),
            ("longer", ["is not the archive", f"more than {len(CONTENT):,} bytes"]),
            ("not-found", ["answered 404 Not Found"]),
            ("busy", ["answered 503 Service Unavailable"]),
            ("drop", ["cannot get"]),
            ("noise", ["cannot get", "SSH-2.0"]),
        ]
    ),
)
def test_a_bad_answer(path, parts, server, tmp_path, monkeypatch, capsys):
    url = address(server, path)
    assert command(monkeypatch, "cifar10", "--data-dir", str(tmp_path), "--url", url) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (f"error: {url} " if "cannot get" not in parts else url, "--url", *parts):
        assert part in said
    assert_nothing_then_good(tmp_path)


@pytest.mark.fault("download", "a server that falls silent")
@pytest.mark.parametrize("path", first_fast(["hang", "hang-half"]))
def test_a_server_that_falls_silent(path, server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_TIMEOUT", 0.2)
    url = address(server, path)
    start = time.perf_counter()
    usage_error(lambda: prepare("cifar10", str(tmp_path), url), f"cannot get {url}", "timed out", "network", "--url")
    assert time.perf_counter() - start < 5
    assert_nothing_then_good(tmp_path)


@pytest.mark.fault("download", "no server")
def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/cifar-10-binary.tar.gz"
        usage_error(lambda: prepare("cifar10", str(tmp_path), url), f"cannot get {url}", "refused", "network", "--url")
    assert_nothing_then_good(tmp_path)


@pytest.mark.fault("download", "no such host")
def test_no_such_host(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", no_network)
        url = "http://example.invalid/cifar10"
        usage_error(lambda: prepare("cifar10", str(tmp_path), url), url, "name resolution", "check the network")
    assert_nothing_then_good(tmp_path)


@pytest.mark.parametrize(
    "url",
    first_fast(
        [
            "nosuch://host/file",
            "http://",
            "http://[",
            "http://a host/",
            "http://host:port/",
            "file:///none",
            "none",
            ".",
        ]
    ),
)
def test_addresses_that_are_none(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tfds"
    usage_error(lambda: prepare("cifar10", str(folder), url), "cannot get ", "--url")
    assert_nothing_then_good(folder)


# --- folders that cannot be used


@pytest.mark.parametrize("below", first_fast(["", "folder"]))
def test_a_file_in_place_of_the_folder(below, server, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    folder = file / below
    assert command(monkeypatch, "cifar10", "--data-dir", str(folder)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write to {folder} (")
    assert said.count("\n") == 1
    assert "--data-dir" in said
    assert file.read_text() == "mine"
    assert server.asked == []


@pytest.mark.parametrize("mode", first_fast([0o555, 0o000]))
def test_a_folder_that_may_not_be_used(mode, server, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may use any folder")
    folder = tmp_path / "tfds"
    folder.mkdir()
    folder.chmod(mode)
    try:
        usage_error(lambda: prepare("cifar10", str(folder)), f"cannot write to {folder} (Permission denied)")
    finally:
        folder.chmod(0o755)
    assert server.asked == []
    assert_nothing_then_good(folder)


@pytest.mark.fault("download", "a disk that is full while the set is written")
def test_a_disk_that_is_full_while_writing(tmp_path, monkeypatch):
    class Writer(array_record_module.ArrayRecordWriter):
        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing cifar10-train; at byte 0")

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Writer)
        usage_error(lambda: prepare("cifar10", str(tmp_path)), str(tmp_path), "No space left", "200 MB", "--data-dir")
    assert_nothing_then_good(tmp_path)


@pytest.mark.parametrize(
    "there", first_fast(["stray", "tfrecord", "damaged info", "lost shard", "cut shard", "fewer examples"])
)
def test_another_thing_in_place_of_the_set(there, server, tmp_path, capsys):
    folder = prepare("cifar10", str(tmp_path))
    info = folder / "dataset_info.json"
    shard = folder / "cifar10-train.array_record-00000-of-00001"
    match there:
        case "stray":
            info.unlink()
        case "tfrecord":
            info.write_text(info.read_text().replace("array_record", "tfrecord"))
        case "damaged info":
            info.write_text("{")
        case "lost shard":
            shard.unlink()
        case "cut shard":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        case "fewer examples":
            info.write_text(info.read_text().replace('"15"', '"16"'))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    server.asked.clear()
    capsys.readouterr()
    usage_error(lambda: prepare("cifar10", str(tmp_path)), f"cannot use what is in {folder}", "delete it", "--data-dir")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert server.asked == []
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(folder)
    assert_prepared(tmp_path, prepare("cifar10", str(tmp_path)))


def test_an_empty_folder_in_place_of_the_set_is_filled(tmp_path):
    (tmp_path / "cifar10" / VERSION).mkdir(parents=True)
    assert_prepared(tmp_path, prepare("cifar10", str(tmp_path)))


def test_a_set_that_another_run_prepares_meanwhile_is_kept(tmp_path, monkeypatch):
    write = prepare_module._write

    def write_second(*arguments):
        written = write(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "_write", write)
            prepare("cifar10", str(tmp_path))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write", write_second)
        usage_error(lambda: prepare("cifar10", str(tmp_path)), "cannot write", "not empty")
    assert_prepared(tmp_path, prepare("cifar10", str(tmp_path)))


# --- runs that are stopped


@pytest.mark.fault("download", "stopped while the set is written")
@pytest.mark.parametrize("stop", first_fast([KeyboardInterrupt, MemoryError, RuntimeError]))
@pytest.mark.parametrize("images", first_fast([0, 7, 18]))
def test_a_run_that_is_stopped_while_it_writes(stop, images, tmp_path, monkeypatch):
    from_array, made = Image.fromarray, []

    def stopped(array):
        if len(made) == images:
            raise stop("stopped here")
        made.append(array)
        return from_array(array)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", stopped)
        with pytest.raises(stop, match="stopped here"):
            prepare("cifar10", str(tmp_path))
    assert len(made) == images
    assert_nothing_then_good(tmp_path)


@pytest.mark.parametrize("step", first_fast(["mkdir", "rename"]))
def test_a_run_that_is_stopped_at_its_last_step(step, tmp_path, monkeypatch):
    original = getattr(Path, step)

    def stopped(path, *arguments, **options):
        if VERSION in str(path) if step == "rename" else path.name == "cifar10" and path.parent == tmp_path:
            raise KeyboardInterrupt
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare("cifar10", str(tmp_path))
    assert not (tmp_path / "cifar10" / VERSION).exists()
    assert not list(tmp_path.glob("incomplete*"))
    assert_prepared(tmp_path, prepare("cifar10", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.fault("kills", "SIGKILL, SIGTERM while a data set is prepared")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_while_it_writes(signum, server, tmp_path):
    kill = f"lambda _: os.kill(os.getpid(), {int(signum)})"
    killed = f"from experiments.engine import archives; archives.Image.fromarray = {kill}"
    ran = in_new_process(tmp_path, address(server, "good"), killed)
    left = list(tmp_path.iterdir())
    if signum == signal.SIGTERM:
        assert ran.returncode == 143
        assert left == []
    else:
        assert ran.returncode == -signal.SIGKILL
        assert [path.name.split(".")[0] for path in left] == ["incomplete"]
        assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert data.load("auto", str(tmp_path)).name == "digits"
    folder = prepare("cifar10", str(tmp_path))
    assert data.load("auto", str(tmp_path)).name == "cifar10"
    assert folder.is_dir()


# --- the command line


@pytest.mark.parametrize("name", first_fast(["svhn_cropped", "CIFAR10", "cifar100-x", "", "../cifar10"]))
def test_other_sets(name, server, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, name, "--data-dir", str(tmp_path / "tfds")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    known = "cifar10, cifar100, mnist, tiny_shakespeare can be prepared"
    for part in (known, repr(name), f"tfds build {name} --file_format=array_record"):
        assert part in said
    assert not (tmp_path / "tfds").exists()
    assert server.asked == []


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    for part in ("python -m experiments.prepare", "NAME", "--data-dir", "$TFDS_DATA_DIR", "--url", "Checksums"):
        assert part in said


@pytest.mark.parametrize("arguments", first_fast(["", "cifar10 mnist", "cifar10 --nosuch"]))
def test_bad_command_lines(arguments, monkeypatch, capsys):
    assert command(monkeypatch, *arguments.split()) == 2
    assert capsys.readouterr().out == ""
