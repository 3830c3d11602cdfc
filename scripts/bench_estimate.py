"""How near the estimated bytes of plans are to those of the files that trials write, and what an estimate costs.

    python scripts/bench_estimate.py [digits mnist-lenet5 ...] [--plans 30] [--space NAME] [--epochs 0.2] [--data-dir D]

Plans are drawn at random from the search space, behind the uniform ones that a search begins with. Errors are in per
cent of the real file, at rung 0 and after `--epochs` of finetuning (0: rung 0 alone). "cold" is the CPU time that the
estimates of all plans took together when they were first asked for, less what they take when they are asked again: what
is prepared once a study. It leaves out the SVDs, which trials need too, and compiling. "ms" is the median of a plan's
second time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autocompress.compress import lowrank
from autocompress.compress.estimate import Estimator
from autocompress.compress.layers import find_layers
from autocompress.plan import LayerPlan, Plan
from autocompress.search.space import Space, ladder
from autocompress.search.space_file import load_space
from autocompress.tasks.loading import load_task
from autocompress.trial import Budget, Workbench, run_trial

UNIFORM = 5


@dataclass(frozen=True)
class Errors:
    """Per cent of the real file: median and 95th percentile of the error's size, the worst, the error's mean.

    `spread` is the 95th percentile of the error's distance from that mean, which a search learns from its own files.
    """

    median: float
    p95: float
    worst: float
    mean: float
    spread: float


@dataclass(frozen=True)
class Result:
    """One task. `finetuned` is None where nothing was finetuned."""

    task: str
    plans: int
    smallest: int
    largest: int
    rung0: Errors
    finetuned: Errors | None
    cold_s: float
    ms: float
    slowest_ms: float


def plans_of(space: Space, bench: Workbench, count: int, epochs: float) -> list[Plan]:
    """The uniform plans and `count` random ones."""
    draw = random.Random(0)
    every = ladder(space, bench.layers, UNIFORM)
    every += [{knob.name: knob.at(draw.random()) for knob in space.knobs} for _ in range(count)]
    plans = [space.plan(params, 1.0) for params in every]
    return [replace(plan, recipe=replace(plan.recipe, epochs=epochs)) for plan in plans]


def errors(estimated: Sequence[int], real: Sequence[int]) -> Errors:
    off = 100 * (np.array(estimated) / np.array(real) - 1)
    size = np.abs(off)
    spread = np.percentile(np.abs(off - off.mean()), 95)
    return Errors(*map(float, (np.median(size), np.percentile(size, 95), size.max(), off.mean(), spread)))


def seconds(bench: Workbench, plan: Plan) -> float:
    began = time.perf_counter()
    bench.estimate(plan)
    return time.perf_counter() - began


def compile_all() -> None:
    """Have the kernels compiled, which takes each process about a second, for trials or for estimates."""
    model = nn.Sequential(nn.Linear(40, 30))
    specs = find_layers(model, lambda module: module(torch.zeros(1, 40))).layers
    estimator = Estimator(model, specs, lambda spec, scheme: lowrank.svd(model[0].weight, scheme), "")
    estimator.size_bytes(Plan({"0": LayerPlan(rank=9, bits=3, threshold=1.0)}))


def measure(name: str, space: str, count: int, epochs: float, data_dir: Path | None) -> Result:
    bench = Workbench(load_task(name, data_dir=data_dir))
    plans = plans_of(load_space(space, bench.layers), bench, count, epochs)
    for spec in bench.layers:
        for scheme in {p.layers[spec.name].scheme for p in plans if p.layers[spec.name].rank is not None}:
            bench.svd(spec, scheme)
    compile_all()
    times = [time.process_time()]
    for _ in range(2):
        estimated = [bench.estimate(plan) for plan in plans]
        times.append(time.process_time())
    again = [min(seconds(bench, plan) for _ in range(3)) for plan in plans]
    budget = Budget((0.0, 1.0) if epochs > 0 else (0.0,))
    files = [[outcome.measurement.size_bytes for outcome in run_trial(bench, plan, budget)] for plan in plans]
    begun, ended = [sizes[0] for sizes in files], [sizes[-1] for sizes in files]
    return Result(
        name, len(plans), min(begun), max(begun), errors(estimated, begun),
        errors(estimated, ended) if epochs > 0 else None,
        2 * times[1] - times[0] - times[2], 1000 * statistics.median(again), 1000 * max(again),
    )  # fmt: skip


def table(results: Sequence[Result]) -> str:
    lines = [
        "| task | plans | bytes | rung 0: median | p95 | worst | mean | spread "
        "| finetuned: median | p95 | worst | mean | spread "
        "| cold s | ms | slowest ms |",
        "| --- |" + " ---: |" * 15,
    ]
    for r in results:
        told = ["".join(f" {v:.2f} |" for v in asdict(e).values()) if e else " - |" * 5 for e in (r.rung0, r.finetuned)]
        times = f"{r.cold_s:.2f} | {r.ms:.2f} | {r.slowest_ms:.2f} |"
        lines.append(f"| {r.task} | {r.plans} | {r.smallest} - {r.largest} |{told[0]}{told[1]} {times}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["digits"])
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--space", default="default")
    parser.add_argument("--epochs", type=float, default=0.2)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    results = []
    for name in args.tasks:
        results.append(measure(name, args.space, args.plans, args.epochs, args.data_dir))
        print(table(results), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
