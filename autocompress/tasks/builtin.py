"""The built-in tasks: real data, a known network, a base model that is trained once and cached.

Importing this module is fast; torch comes in when a task is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
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

    from autocompress.tasks.augment import Augment

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
    return _trained("digits", nets.digits_net, _DIGITS, (train, val, test), scale, batch_size=64, progress=progress)


def _on_images(name: str, data_set: str, net: Callable[[], nn.Module], recipe: TrainingRecipe) -> Callable[..., Task]:
    """The `load` of a task on a data set of 28 x 28 images, its base model trained here, once."""

    def load(data_dir: str | Path | None, progress: Progress | None) -> Task:
        *official, test_images, test_labels = data_sets.images(data_set, data_dir)
        held_out = len(official[0]) // 12
        train, val = _split((official[0], official[1]), (len(official[0]) - held_out, held_out))
        about = data_sets.data_set(data_set)
        scale = _Scale(top=255.0, mean=about.mean, std=about.std)
        splits = train, val, (test_images, test_labels)
        return _trained(name, net, recipe, splits, scale, batch_size=128, progress=progress)

    return load


def _cifar10_resnet8(data_dir: str | Path | None, progress: Progress | None) -> Task:
    from safetensors.torch import load_file

    from autocompress.tasks.augment import Augment

    *official, test_images, test_labels = data_sets.images("cifar10", data_dir)
    train, val = _split((official[0], official[1]), (len(official[0]) - len(official[0]) // 10, len(official[0]) // 10))
    about = data_sets.data_set("cifar10")
    scale = _Scale(top=255.0, mean=about.mean, std=about.std)
    model = nets.resnet8()
    with resources.as_file(resources.files("autocompress.tasks") / "weights" / "cifar10-resnet8.safetensors") as path:
        model.load_state_dict(load_file(path))
    splits = [scale(part) for part in (train, val, (test_images, test_labels))]
    return _task("cifar10-resnet8", model.eval(), splits, batch_size=128, augment=Augment(flip=True, crop=4))


@dataclass(frozen=True)
class _Scale:
    """From pixels 0..top to (pixel / top - mean) / std, of each channel where there are several."""

    top: float
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __call__(self, arrays: Arrays) -> Pair:
        """Images (N, height, width), or with channels last, and labels (N,) as float32 (N, channels, height, width)
        and int64 tensors."""
        import torch

        pixels = torch.as_tensor(arrays[0]).float()
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return pixels.div_(self.top).sub_(mean).div_(std), torch.as_tensor(arrays[1], dtype=torch.int64)


def _split(arrays: Arrays, sizes: tuple[int, ...]) -> list[Arrays]:
    """Disjoint parts of these sizes, in an order that is the same everywhere and always."""
    import numpy as np

    order = np.random.RandomState(_SPLIT_SEED).permutation(len(arrays[0]))
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [(arrays[0][part], arrays[1][part]) for part in parts]


def _trained(
    name: str,
    net: Callable[[], nn.Module],
    recipe: TrainingRecipe,
    splits: Any,
    scale: _Scale,
    *,
    batch_size: int,
    progress: Progress | None,
) -> Task:
    from autocompress.tasks.augment import Augment
    from autocompress.tasks.pretrain import base_model

    scaled = [scale(part) for part in splits]
    version = f"{_sha256(splits[0])} {scale}"
    model = base_model(name, net, recipe, scaled[0], data_version=version, progress=progress)
    augment = Augment(shift=recipe.shift, flip=recipe.flip) if recipe.shift or recipe.flip else None
    return _task(name, model, scaled, batch_size=batch_size, augment=augment)


def _task(
    name: str,
    model: nn.Module,
    splits: list[Pair],
    *,
    batch_size: int,
    augment: Augment | None,
) -> Task:
    from torch.nn import functional as F

    train, val, test = splits
    return Task(
        name=name,
        model=model,
        train=train,
        val=val,
        test=test,
        loss=F.cross_entropy,
        metric=accuracy,
        direction="maximize",
        metric_name="accuracy",
        example_inputs=(val[0][:1].clone(),),
        batch_size=batch_size,
        augment=augment,
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
    "cifar10-resnet8": Builtin(
        "CIFAR-10, the ResNet-8 of MLPerf Tiny, 78k parameters; its weights come with this package",
        "cifar10",
        _cifar10_resnet8,
    ),
}
