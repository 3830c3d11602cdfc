"""Train large, then compress (Li et al. 2020, arXiv 2002.11794): is that so for small nets on Fashion-MNIST?

    python scripts/train_big_then_compress.py --data-dir DATA [--family mlp|conv] [--compute 6] [--seeds 1] [--plot OUT]

Nets of one family and several widths are trained from scratch for equal compute: multiply-accumulates x examples, that
of `--compute` epochs of width 1, so that a net twice as wide sees about a fourth of the examples. Then each is
compressed by finetuning under a rising price of the file's bits, the same prices for all, in steps of equal compute,
each going on from the float weights of the one before (`run_trial`; training itself is a trial whose plan compresses
nothing). A size counts the file that fits into it and is best on validation. Printed: test errors in per cent, the
winner of each size in brackets, and what the claim comes to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autocompress.codec import container
from autocompress.compress import artifact
from autocompress.compress.lineage import State
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.tasks.task import Task
from autocompress.trial import Budget, Outcome, Workbench, run_trial


def mlp(width: float) -> nn.Sequential:
    """LeNet-300-100, its hidden layers `width` times as wide."""
    one, two = round(300 * width), round(100 * width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 10)
    )


def conv(width: float) -> nn.Sequential:
    """Two convolutions of 16 and 32 channels, times `width`, and a linear layer."""
    one, two = round(16 * width), round(32 * width)
    return nn.Sequential(
        nn.Conv2d(1, one, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(one, two, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(25 * two, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Nets by width, and the sizes in bytes, falling, that they are compressed to."""

    net: Callable[[float], nn.Sequential]
    widths: tuple[float, ...]
    sizes: tuple[int, ...]


FAMILIES = {
    "mlp": Family(mlp, (0.25, 0.5, 1, 2, 4), (64_000, 32_000, 16_000, 8_000, 4_000, 2_000)),
    "conv": Family(conv, (0.5, 1, 2), (16_000, 8_000, 4_000, 2_000)),
}
PRICES = tuple(0.1 * 2**k for k in range(9))
"""Of all bits of a net of `PRICED` elements, in the training loss: a bit costs the same in every net."""
PRICED = 266_610
STEP = 0.25
"""Compute of one step of compression, in that of training."""


@dataclass(frozen=True)
class Point:
    """A file of a net: its width, bytes, and metrics."""

    width: float
    size_bytes: int
    val: float
    test: float


def trial(bench: Workbench, plan: Plan, seed: int, start: State | None = None) -> tuple[Outcome, State]:
    """The last outcome of the plan, and the state behind it."""
    *_, outcome = run_trial(bench, plan, Budget((1.0,)), seed, start)
    return outcome, outcome.state()


def point(bench: Workbench, width: float, outcome: Outcome) -> Point:
    model = artifact.restore(container.unpack(outcome.artifact), bench.task.model)
    numbers = outcome.measurement
    return Point(width, numbers.size_bytes, numbers.metric_val, evaluate(bench.task, model, "test"))


def chain(bench: Workbench, width: float, epochs: float, seed: int, state: State) -> list[Point]:
    """The files of a trained net at rising prices, each from the float weights of the one before."""
    found = []
    layers = {spec.name: LayerPlan(bits=5, quantizer="uniform") for spec in bench.layers}
    for number, price in enumerate(PRICES):
        rate = price * bench.inventory.parameters / PRICED
        recipe = Recipe(epochs, 2e-3, distillation=0.0, rate=rate)
        outcome, state = trial(bench, Plan(layers, recipe), seed + number + 1, state)
        found.append(point(bench, width, outcome))
    return found


def best(points: Iterable[Point], size: int) -> Point | None:
    """Of the points that fit into so many bytes the one that is best on validation."""
    return max((p for p in points if p.size_bytes <= size), key=lambda p: p.val, default=None)


def run(task: Task, family: Family, compute: float, seed: int) -> tuple[dict[float, Point], list[Point]]:
    """The uncompressed net of each width, and the points of all files."""
    base, points = {}, []
    one = _macs(replace(task, model=family.net(1)))
    for width in family.widths:
        torch.manual_seed(seed)
        bench = Workbench(replace(task, model=family.net(width)), "cpu")
        epochs = compute * one / sum(spec.macs for spec in bench.layers)
        began = time.monotonic()
        plain = Plan({spec.name: LayerPlan() for spec in bench.layers}, Recipe(epochs, 2e-3, 0.0))
        outcome, state = trial(bench, plain, seed)
        base[width] = point(bench, width, outcome)
        points += chain(bench, width, STEP * epochs, seed, state)
        error = 100 * (1 - base[width].test)
        print(
            f"seed {seed}, width x{width:g}: {bench.inventory.parameters:,} parameters, {epochs:.2f} epochs, "
            f"{error:.2f} % uncompressed, {time.monotonic() - began:.0f} s", flush=True,
        )  # fmt: skip
    return base, points


def _macs(task: Task) -> int:
    return sum(spec.macs for spec in Workbench(task, "cpu").layers)


def errors(family: Family, points: Sequence[Sequence[Point]]) -> dict[float, list[float]]:
    """For each width and size the mean test error in per cent over the seeds; NaN where a seed's files do not fit."""
    table = {}
    for width in family.widths:
        chosen = [[best((p for p in found if p.width == width), size) for found in points] for size in family.sizes]
        table[width] = [float(np.mean([np.nan if p is None else 100 * (1 - p.test) for p in row])) for row in chosen]
    return table


def report(family: Family, base: Mapping[float, float], table: Mapping[float, list[float]]) -> str:
    """The table, a line a width, and who wins."""
    lines = ["width   uncompressed" + "".join(f"{size // 1000:>8} KB" for size in family.sizes)]
    winners = [
        min(family.widths, key=lambda w: np.nan_to_num(table[w][k], nan=np.inf)) for k in range(len(family.sizes))
    ]
    for width in family.widths:
        cells = [_cell(e, winners[k] == width) for k, e in enumerate(table[width])]
        lines.append(f"x{width:<6g} {base[width]:>12.2f}" + "".join(f"{cell:>11}" for cell in cells))
    small, large = min(base, key=lambda w: base[w]), [w for w in winners if w > 1]
    lines.append(
        f"best uncompressed: x{small:g}; widths above 1 win {len(large)} of {len(winners)} sizes "
        f"(winners: {', '.join(f'x{w:g}' for w in winners)})"
    )
    return "\n".join(lines)


def _cell(error: float, wins: bool) -> str:
    """A size into which no file fits is a dash."""
    if np.isnan(error):
        return "- "
    return f"[{error:.2f}]" if wins else f"{error:.2f} "


def plot(path: Path, family: Family, table: Mapping[float, list[float]]) -> None:
    """Test error over size, a line a width, as an image file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for width in family.widths:
        axes.plot(family.sizes, table[width], marker="o", label=f"x{width:g}")
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="test error, %", title="Equal compute, then equal bytes")
    axes.legend(title="width")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="mlp")
    parser.add_argument("--compute", type=float, default=6.0, help="epochs of training that width 1 gets")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = replace(load_task("fashion-lenet300", data_dir=options.data_dir, progress=print), augment=None)
    family = FAMILIES[options.family]
    found = [run(task, family, options.compute, 100 * seed) for seed in range(options.seeds)]
    base = {w: float(np.mean([100 * (1 - uncompressed[w].test) for uncompressed, _ in found])) for w in family.widths}
    table = errors(family, [points for _, points in found])
    print(f"\n{options.family}, compute of {options.compute:g} epochs at width 1, {options.seeds} seeds; test error, %")
    print(report(family, base, table))
    if options.plot:
        plot(options.plot, family, table)


if __name__ == "__main__":
    main()
