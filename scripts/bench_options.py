"""What options of finetuning buy, on Fashion-MNIST: test error with and without, mean of some seeds.

    python scripts/bench_options.py recalibration [--epochs 3] [--seeds 3] [--json FILE]
    python scripts/bench_options.py infomax [--labels 100] [--json FILE]
    python scripts/bench_options.py qat [--json FILE]
    python scripts/bench_options.py precision [--json FILE]

recalibration: a small conv net with batch normalisation, trained here, then pruned and quantized without any
finetuning: with the model's own statistics, and with those counted anew.
infomax: the same net under strong plans, finetuned on few examples, with distillation alone and with InfoMax beside
it; "labels": with labels in the loss (distillation 0.5), "none": distillation alone (1.0).
qat: the net in few bits: rounded (uniform grids to the nearest, and Hessian-aware), an epoch of finetuning in float32
and then rounded, and the same epoch with the rounding in the loop, steps or centroids learned (QAT), begun at the
nearest or at Hessian-aware rounding.
precision: that epoch with the forward pass in float32 and in bfloat16 (on CUDA in float16 too), and the seconds that
the trial took. --device cuda runs all that on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autocompress.codec import container
from autocompress.compress import apply, artifact
from autocompress.plan import LayerPlan, LayerSpec, Plan, Recipe
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.tasks.task import Task
from autocompress.trial import Budget, Workbench, run_trial

PLANS = {
    "4 bits": LayerPlan(bits=4),
    "3 bits": LayerPlan(bits=3),
    "2 bits": LayerPlan(bits=2),
    "threshold 0.5": LayerPlan(threshold=0.5),
    "threshold 1.0": LayerPlan(threshold=1.0),
    "threshold 1.0, 3 bits": LayerPlan(threshold=1.0, bits=3),
}


def net() -> nn.Sequential:
    """About 24,000 weights in three convolutions and a linear layer."""

    def block(inner: int, outer: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]

    blocks = [*block(1, 16, 2), *block(16, 32, 2), *block(32, 64, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(task: Task, epochs: int, seed: int, device: str) -> nn.Module:
    """The net after that many epochs of Adam with a falling rate."""
    torch.manual_seed(seed)
    model = net().to(device)
    x, y = (part.to(device) for part in task.train)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).to(device).split(128)[: len(x) // 128]:
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def bases(epochs: int, seeds: Sequence[int], device: str) -> Iterator[Task]:
    task = replace(load_task("fashion-lenet5"), augment=None, example_inputs=None)
    for seed in seeds:
        yield replace(task, model=trained(task, epochs, seed, device).to("cpu"))


def error(task: Task, model: nn.Module) -> float:
    return 100 * (1 - evaluate(task, model, "test"))


def whole(specs: tuple[LayerSpec, ...], layer: LayerPlan, recipe: Recipe) -> Plan:
    return Plan({spec.name: layer for spec in specs}, recipe)


def recalibration(epochs: int, seeds: Sequence[int], device: str) -> dict[str, dict[str, list[float]]]:
    """Test errors in per cent, by plan and way."""
    found: dict[str, dict[str, list[float]]] = {name: {"own": [], "recalibrated": []} for name in PLANS}
    found["uncompressed"] = {"own": []}
    for task in bases(epochs, seeds, device):
        bench = Workbench(task, device)
        found["uncompressed"]["own"].append(error(task, task.model))
        for name, layer in PLANS.items():
            model = apply.compress(bench.model, bench.layers, whole(bench.layers, layer, Recipe(0.0)), bench.svd)
            for way in found[name]:
                if way == "recalibrated":
                    bench.recalibrate(model)
                module = model.module.eval()
                values = {key: value.detach() for key, value in model.substitutes().items()}
                with Substituted(module, values):
                    found[name][way].append(error(task, module))
    return found


class Substituted:
    """A module with some parameters' values replaced for a while."""

    def __init__(self, module: nn.Module, values: dict[str, torch.Tensor]) -> None:
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.before = {key: self.module.get_parameter(key).data for key in self.values}
        for key, value in self.values.items():
            self.module.get_parameter(key).data = value

    def __exit__(self, *problem: Any) -> None:
        for key, value in self.before.items():
            self.module.get_parameter(key).data = value


def infomax(epochs: int, seeds: Sequence[int], device: str, labels: int) -> dict[str, dict[str, list[float]]]:
    """Test errors in per cent, by plan and way."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed, task in zip(seeds, bases(epochs, seeds, device), strict=True):
        x, y = task.train
        few = replace(task, train=(x[:labels], y[:labels]), batch_size=min(64, labels))
        bench = Workbench(few, device)
        steps = 300 / bench.steps_per_epoch
        for name in ("2 bits", "threshold 1.0, 3 bits"):
            for supervision, distillation in (("labels", 0.5), ("none", 1.0)):
                for weight in (0.0, 0.1, 0.5):
                    recipe = Recipe(steps, 1e-3, distillation, infomax=weight)
                    plan = whole(bench.layers, PLANS[name], recipe)
                    *_, last = run_trial(bench, plan, Budget((1.0,)), seed)
                    module = artifact.restore(container.unpack(last.artifact), few.model)
                    ways = found.setdefault(f"{name}, {supervision}", {})
                    ways.setdefault(f"infomax {weight}", []).append(error(few, module))
    return found


def file_error(bench: Workbench, layer: LayerPlan, recipe: Recipe, seed: int) -> tuple[float, nn.Module]:
    """Test error in per cent of the file of a trial in which each layer has this plan, and its module."""
    *_, last = run_trial(bench, whole(bench.layers, layer, recipe), Budget((1.0,)), seed)
    module = artifact.restore(container.unpack(last.artifact), bench.task.model)
    return error(bench.task, module), module


def qat(epochs: int, seeds: Sequence[int], device: str) -> dict[str, dict[str, list[float]]]:
    """Test errors in per cent, by bits and way."""
    found: dict[str, dict[str, list[float]]] = {}
    still, epoch = Recipe(0.0), Recipe(1.0, 1e-3, 0.5)
    for seed, task in zip(seeds, bases(epochs, seeds, device), strict=True):
        bench = Workbench(task, device)
        plain, module = file_error(bench, LayerPlan(), epoch, seed)
        tuned = Workbench(replace(task, model=module), device)
        for bits in (4, 3, 2):
            grid = LayerPlan(bits=bits, quantizer="uniform")
            ways = {
                "float32, finetuned": plain,
                "nearest": file_error(bench, grid, still, seed)[0],
                "hessian": file_error(bench, replace(grid, rounding="hessian"), still, seed)[0],
                "finetuned, then nearest": file_error(tuned, grid, still, seed)[0],
                "finetuned, then hessian": file_error(tuned, replace(grid, rounding="hessian"), still, seed)[0],
                "QAT": file_error(bench, grid, epoch, seed)[0],
                "QAT from hessian": file_error(bench, replace(grid, rounding="hessian"), epoch, seed)[0],
                "QAT, codebook": file_error(bench, LayerPlan(bits=bits), epoch, seed)[0],
            }
            for way, value in ways.items():
                found.setdefault(f"{bits} bits", {}).setdefault(way, []).append(value)
    return found


def precision(epochs: int, seeds: Sequence[int], device: str) -> dict[str, dict[str, list[float]]]:
    """Test errors in per cent and seconds, by plan and precision."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed, task in zip(seeds, bases(epochs, seeds, device), strict=True):
        bench = Workbench(task, device)
        for name in ("3 bits", "threshold 1.0, 3 bits"):
            for way in ("float32", "bfloat16", *(["float16"] if device == "cuda" else [])):
                began = time.perf_counter()
                value, _ = file_error(bench, PLANS[name], Recipe(1.0, 1e-3, 0.5, precision=way), seed)
                ways = found.setdefault(name, {})
                ways.setdefault(way, []).append(value)
                ways.setdefault(f"{way}, s", []).append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("recalibration", "infomax", "qat", "precision"))
    parser.add_argument("--epochs", type=int, default=3, help="of training the net")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--labels", type=int, default=100, help="training examples that finetuning sees")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    if options.what == "infomax":
        found = infomax(options.epochs, seeds, options.device, options.labels)
    else:
        measure = {"recalibration": recalibration, "qat": qat, "precision": precision}[options.what]
        found = measure(options.epochs, seeds, options.device)
    print("| plan | " + " | ".join(next(iter(found.values()))) + " |\n|---|" + "---|" * len(next(iter(found.values()))))
    for name, ways in found.items():
        print(f"| {name} | " + " | ".join(f"{statistics.mean(values):.2f}" for values in ways.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
