"""The built-in tasks: real data, a known network, a base model that is trained once and cached.

Importing this module is fast; torch comes in when a task is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.tasks import data as data_sets
from autocompress.tasks import nets
from autocompress.tasks.task import Task
from autocompress.tasks.training_recipe import TrainingRecipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    Arrays = tuple[np.ndarray, np.ndarray]
    Pair = tuple[torch.Tensor, torch.Tensor]

Progress = Callable[[str], None]
_SPLIT_SEED = 0

_DIGITS = TrainingRecipe(epochs=25, batch_size=64, learning_rate=3e-3, weight_decay=0.01, threads=1)
_LENET300 = TrainingRecipe(epochs=12, batch_size=128, learning_rate=3e-3, weight_decay=0.01, shift=1, threads=1)
_FASHION_LENET300 = TrainingRecipe(
    epochs=20, batch_size=128, learning_rate=3e-3, weight_decay=0.01, shift=1, flip=True, threads=1
)
_MNIST_LENET5 = TrainingRecipe(epochs=4, batch_size=128, learning_rate=3e-3, weight_decay=0.01, shift=1)
_FASHION_LENET5 = TrainingRecipe(epochs=6, batch_size=128, learning_rate=3e-3, weight_decay=0.01, flip=True)


@dataclass(frozen=True)
class Builtin:
    """A built-in task: one line about it, the data set it needs ("" for none), and `load(data_dir, progress)`."""

    description: str
    data_set: str
    load: Callable[[str | Path | None, Progress | None], Task]


def builtin_names() -> tuple[str, ...]:
    """The names of the built-in tasks."""
    return tuple(BUILTIN)


def describe() -> dict[str, str]:
    """One line about each built-in task, by name."""
    return {name: builtin.description for name, builtin in BUILTIN.items()}


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The fraction, 0 to 1, of rows of logits (N, classes) whose largest is at the target (N,)."""
    return int((outputs.argmax(1) == targets).sum()) / len(targets)


def _digits(data_dir: str | Path | None, progress: Progress | None) -> Task:
    from sklearn.datasets import load_digits

    bunch = load_digits()  # 1,797 images of 8 x 8, values 0 to 16
    train, val, test = _split((bunch.images, bunch.target), (1197, 300, 300))
    scale = _Scale(top=16.0, mean=0.3053, std=0.3760)
    return _task("digits", nets.digits_net, _DIGITS, (train, val, test), scale, batch_size=64, progress=progress)


def _on_images(name: str, data_set: str, net: Callable[[], nn.Module], recipe: TrainingRecipe) -> Callable[..., Task]:
    """The `load` of a task on a data set of 28 x 28 images."""

    def load(data_dir: str | Path | None, progress: Progress | None) -> Task:
        *official, test_images, test_labels = data_sets.images(data_set, data_dir)
        held_out = len(official[0]) // 12
        train, val = _split((official[0], official[1]), (len(official[0]) - held_out, held_out))
        about = data_sets.data_set(data_set)
        scale = _Scale(top=255.0, mean=about.mean, std=about.std)
        splits = train, val, (test_images, test_labels)
        return _task(name, net, recipe, splits, scale, batch_size=128, progress=progress)

    return load


@dataclass(frozen=True)
class _Scale:
    """From pixels 0..top to (pixel / top - mean) / std."""

    top: float
    mean: float
    std: float

    def __call__(self, arrays: Arrays) -> Pair:
        """Images (N, height, width) and labels (N,) as float32 (N, 1, height, width) and int64 tensors."""
        import torch

        pixels = torch.as_tensor(arrays[0], dtype=torch.float32).unsqueeze(1)
        return pixels.div_(self.top).sub_(self.mean).div_(self.std), torch.as_tensor(arrays[1], dtype=torch.int64)


def _split(arrays: Arrays, sizes: tuple[int, ...]) -> list[Arrays]:
    """Disjoint parts of these sizes, in an order that is the same everywhere and always."""
    import numpy as np

    order = np.random.RandomState(_SPLIT_SEED).permutation(len(arrays[0]))
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [(arrays[0][part], arrays[1][part]) for part in parts]


def _task(
    name: str,
    net: Callable[[], nn.Module],
    recipe: TrainingRecipe,
    splits: Any,
    scale: _Scale,
    *,
    batch_size: int,
    progress: Progress | None,
) -> Task:
    from torch.nn import functional as F

    from autocompress.tasks.augment import Augment
    from autocompress.tasks.pretrain import base_model

    train, val, test = (scale(part) for part in splits)
    version = f"{_sha256(splits[0])} {scale}"
    return Task(
        name=name,
        model=base_model(name, net, recipe, train, data_version=version, progress=progress),
        train=train,
        val=val,
        test=test,
        loss=F.cross_entropy,
        metric=accuracy,
        direction="maximize",
        metric_name="accuracy",
        example_inputs=(val[0][:1].clone(),),
        batch_size=batch_size,
        augment=Augment(shift=recipe.shift, flip=recipe.flip) if recipe.shift or recipe.flip else None,
    )


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


BUILTIN: dict[str, Builtin] = {
    "digits": Builtin(
        "8 x 8 handwritten digits (inside scikit-learn), a small conv net, 38k parameters; needs no download",
        "",
        _digits,
    ),
    "mnist-lenet300": Builtin(
        "MNIST, LeNet-300-100, 267k parameters",
        "mnist",
        _on_images("mnist-lenet300", "mnist", nets.lenet300, _LENET300),
    ),
    "mnist-lenet5": Builtin(
        "MNIST, LeNet-5 as Caffe has it, 431k parameters",
        "mnist",
        _on_images("mnist-lenet5", "mnist", nets.lenet5, _MNIST_LENET5),
    ),
    "fashion-lenet300": Builtin(
        "Fashion-MNIST, LeNet-300-100, 267k parameters",
        "fashion-mnist",
        _on_images("fashion-lenet300", "fashion-mnist", nets.lenet300, _FASHION_LENET300),
    ),
    "fashion-lenet5": Builtin(
        "Fashion-MNIST, LeNet-5 as Caffe has it, 431k parameters",
        "fashion-mnist",
        _on_images("fashion-lenet5", "fashion-mnist", nets.lenet5, _FASHION_LENET5),
    ),
}
