"""Low rank without finetuning: what the criteria of a factorisation buy, on real trained nets.

    python scripts/bench_rank.py [NAME ...] [--folder FOLDER] [--tolerance 0.1 ...] [--schemes channel best]
        [--only metric|ranks]

NAME is a built-in task or a net of scripts/pretrained_nets.py (whose docstring says what FOLDER holds). Two tables:

metric: every layer that can be factorised at half its full rank (at the highest rank that makes it smaller, where
that is lower), factors by plain SVD, by activation-aware SVD and fitted after the activation; for convolutions also
the scheme "best". Metric on validation, and the median over layers of the relative squared error after the
activation, on calibration inputs that no factor was fitted to.

ranks: for each layer that an activation follows, the smallest rank whose error after the activation is within the
tolerance, by the three criteria; "-" stays whole. "no gain" marks layers where fitting after the activation reached no
lower rank than plain SVD.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from autocompress.plan import SVDS, LayerPlan, LayerSpec, Plan, Recipe
from autocompress.rank_pruning import layer_ranks
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.trial import Workbench, run_trial

BUILT_IN = ("digits", "mnist-lenet300", "fashion-lenet5")


def workbench(name: str, folder: Path | None) -> Workbench:
    """The net, on the CPU."""
    if folder is not None:
        sys.path.insert(0, str(Path(__file__).parent))
        from pretrained_nets import NETS

        if name in NETS:
            return Workbench(NETS[name](folder), "cpu")
    return Workbench(load_task(name), "cpu")


def half(spec: LayerSpec) -> int:
    return max(1, min(spec.full_rank() // 2, spec.max_rank()))


def factorable(bench: Workbench) -> list[LayerSpec]:
    return [spec for spec in bench.layers if spec.factorable and spec.max_rank()]


def metric_rows(bench: Workbench, wanted: list[str]) -> Iterator[tuple[str, str, float, float, float]]:
    """Scheme, criterion, metric on validation, median error after the activation, seconds of making the factors."""
    specs = factorable(bench)
    has_images = any(spec.kind == "conv2d" for spec in specs)
    schemes = [scheme for scheme in wanted if has_images or scheme == "channel"]
    for scheme in schemes:
        for svd in SVDS:
            began = time.perf_counter()
            layers = {spec.name: LayerPlan() for spec in bench.layers}
            for spec in specs:
                own = scheme if scheme in spec.schemes else "channel"
                layer = LayerPlan(rank=half(spec), scheme=own, svd=svd)
                layers[spec.name] = bench.factoriser.settled(spec, layer)
            errors = [bench.factoriser.error(spec, layers[spec.name]) for spec in specs]
            seconds = time.perf_counter() - began
            (outcome,) = run_trial(bench, Plan(layers, Recipe(0.0, 1e-3, 0.0)), effort="fast")
            yield scheme, svd, outcome.measurement.metric_val, median(errors), seconds


def report_metric(name: str, bench: Workbench, schemes: list[str]) -> None:
    bench.factoriser.inputs  # noqa: B018  (gathered once, before the clock starts)
    whole = evaluate(bench.task, bench.model, "val")
    print(f"{name}: {bench.task.metric_name or 'metric'} {whole:.4f}, {len(factorable(bench))} layers at half rank")
    for scheme, svd, metric, error, seconds in metric_rows(bench, schemes):
        print(f"    {scheme:<8} {svd:<11} metric {metric:9.4f}   error {error:8.5f}   {seconds:6.1f} s", flush=True)


def report_ranks(name: str, bench: Workbench, tolerances: list[float]) -> None:
    followed = [spec for spec in factorable(bench) if bench.factoriser.activation(spec).name]
    for tolerance in tolerances:
        began, lower, comparable = time.perf_counter(), 0, 0
        print(f"{name}: ranks at an error of {tolerance:g} after the activation")
        print(f"    {'layer':<34} {'then':<10} {'full':>5} {'most':>5} {'plain':>6} {'aware':>6} {'after':>6}")
        for spec in followed:
            ranks = layer_ranks(bench.factoriser, spec, tolerance)
            plain, after = ranks["plain"], ranks["relu"]
            gained = after is not None and (plain is None or after < plain)
            lower, comparable = lower + gained, comparable + (plain is not None or after is not None)
            told = [f"{'-' if rank is None else rank:>6}" for rank in ranks.values()]
            note = "" if gained else "  all whole" if plain is None else "  no gain"
            then = bench.factoriser.activation(spec).name
            print(f"    {spec.label:<34} {then:<10} {spec.full_rank():>5} {spec.max_rank():>5} {' '.join(told)}{note}",
                  flush=True)  # fmt: skip
        seconds = time.perf_counter() - began
        print(f"    lower than plain SVD in {lower} of {comparable} layers that have a rank, {len(followed)} in all, "
              f"{seconds:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=BUILT_IN)
    parser.add_argument("--folder", type=Path, help="where the files of scripts/pretrained_nets.py are")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.1])
    parser.add_argument(
        "--schemes", nargs="+", choices=("channel", "spatial", "tucker", "best"), default=["channel", "best"]
    )
    parser.add_argument("--only", choices=("metric", "ranks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names or BUILT_IN:
        bench = workbench(name, options.folder)
        if options.only != "ranks":
            report_metric(name, bench, options.schemes)
        if options.only != "metric":
            report_ranks(name, bench, options.tolerance)


if __name__ == "__main__":
    main()
