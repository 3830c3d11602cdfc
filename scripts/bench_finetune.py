"""The time of a finetuning step with its options, over a plain training step of the same uncompressed model.

    python scripts/bench_finetune.py [--net lenet5] [--rounds 40] [--device cuda] [--json FILE]

One thread, processor time; on CUDA the time until the device has done a round's steps. The plain step is forward,
loss, backward and torch.optim.Adam with its defaults, in channels last where our steps are. All ways take turns, a few
steps each a round; a ratio is the median over rounds of a way's time in that round over the plain step's, per batch.
"all" has masks and codebooks, a distillation of 0.5 (from outputs known in advance), accumulation 2 and InfoMax; "all,
1" the same with accumulation 1; "all, rated" has learned grids under a rate instead of masks and codebooks. With
"activations" the inputs of layers have 8 bits in learned ranges, but for those of a layer whose parent reads its weight
by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress import apply, finetune
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks import nets
from autocompress.tasks.task import Task
from autocompress.trial import Workbench

STEPS = 4
MASKED = LayerPlan(bits=4, threshold=1.0)
GRID = LayerPlan(bits=4, quantizer="uniform")


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.short = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        return torch.relu(inside + self.short(x))


def resnet8() -> nn.Module:
    """MLPerf Tiny's layout for 32 x 32 images; 78 thousand weights."""
    head = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*head, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Transformer(nn.Module):
    """Two encoder layers of width 64 over 32 tokens; 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return scores


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "lenet300": (nets.lenet300, lambda n: torch.randn(n, 1, 28, 28), 128),
    "lenet5": (nets.lenet5, lambda n: torch.randn(n, 1, 28, 28), 128),
    "resnet8": (resnet8, lambda n: torch.randn(n, 3, 32, 32), 64),
    "transformer": (Transformer, lambda n: torch.randint(0, 256, (n, 32)), 64),
}
WAYS: dict[str, tuple[LayerPlan, Recipe]] = {
    "nothing": (LayerPlan(), Recipe(distillation=0.0)),
    "masks and codebooks": (MASKED, Recipe(distillation=0.0)),
    "grids": (GRID, Recipe(distillation=0.0)),
    "grids, rate": (GRID, Recipe(distillation=0.0, rate=0.01)),
    "distillation": (LayerPlan(), Recipe(distillation=0.5)),
    "accumulation 2": (LayerPlan(), Recipe(distillation=0.0, accumulation=2)),
    "infomax": (LayerPlan(), Recipe(distillation=0.0, infomax=0.1)),
    "all": (MASKED, Recipe(distillation=0.5, accumulation=2, infomax=0.1)),
    "all, 1": (MASKED, Recipe(distillation=0.5, infomax=0.1)),
    "activations": (LayerPlan(activation_bits=8), Recipe(distillation=0.0)),
    "all, activations": (replace(MASKED, activation_bits=8), Recipe(distillation=0.5, accumulation=2, infomax=0.1)),
    "all, rated": (GRID, Recipe(distillation=0.5, rate=0.01, accumulation=2, infomax=0.1)),
}


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(1) == targets).double().mean().item()


def plain(task: Task, device: str) -> Iterator[None]:
    """`STEPS` training steps each time."""
    model = task.model.train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = apply.in_fast_layout(tensor.data)
    model.to(device)
    optimiser = torch.optim.Adam(model.parameters())
    x, y = task.train
    while True:
        for step, rows in enumerate(torch.randperm(len(x)).split(task.batch_size)):
            optimiser.zero_grad()
            task.loss(model(x[rows].to(device)), y[rows].to(device)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if step % STEPS == STEPS - 1:
                yield


def ours(bench: Workbench, layer: LayerPlan, recipe: Recipe) -> Iterator[float]:
    """Finetuning on `STEPS` batches each time."""
    unseen = replace(layer, activation_bits=32)
    layers = {spec.name: layer if spec.name in bench.statistics else unseen for spec in bench.layers}
    plan = Plan(layers, replace(recipe, epochs=1000.0))
    model = apply.compress(bench.model, bench.layers, plan, bench.svd, grids=bench.grids)
    feed = bench.feed(0, recipe.distillation > 0, recipe.infomax > 0)
    share = STEPS / feed.steps
    return finetune.finetune(model, feed, bench.task.loss, plan.recipe, [(i + 1) * share for i in range(1000)])


def clock(device: str) -> float:
    """Seconds: of the processor, or on CUDA of the clock once all is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ratios(name: str, rounds: int, device: str) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and each way's time over that."""
    torch.manual_seed(0)
    make, inputs, size = NETS[name]
    splits = [(inputs(n), torch.randint(0, 10, (n,))) for n in (16 * size, size, size)]
    task = Task(make(), *splits, F.cross_entropy, accuracy, batch_size=size)
    bench = Workbench(task, device)
    runs = {"plain": plain(replace(task, model=copy.deepcopy(task.model)), device)} | {
        way: ours(bench, *what) for way, what in WAYS.items()
    }
    times: dict[str, list[float]] = {way: [] for way in runs}
    for round_ in range(rounds + 2):
        for way, run in runs.items():
            began = clock(device)
            next(run)  # type: ignore[call-overload]
            if round_ >= 2:
                times[way].append((clock(device) - began) / STEPS)
    base = times.pop("plain")
    over = {way: statistics.median(a / b for a, b in zip(mine, base, strict=True)) for way, mine in times.items()}
    return 1000 * statistics.median(base), over


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", choices=tuple(NETS), action="append")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    print(f"| net | plain, ms | {' | '.join(WAYS)} |\n|---|---|{'---|' * len(WAYS)}")
    for name in options.net or NETS:
        base, over = ratios(name, options.rounds, options.device)
        print(f"| {name} | {base:.2f} | {' | '.join(f'{ratio:.2f}' for ratio in over.values())} |", flush=True)
        found[name] = {"plain ms": base} | over
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
