"""Compression without finetuning: what saliency, rounding and granularity buy on real pretrained nets.

    python scripts/bench_posttraining.py FOLDER [--nets NAME ...] [--only pruning|rounding|scales|rates] [--split test]
    python scripts/bench_posttraining.py FOLDER --time minilm

FOLDER holds the package files that scripts/pretrained_nets.py names; a net may also be a built-in task. Every layer has
the same plan; a metric is that of the model that the written file decodes to. Tables:

pruning: float32 weights, so many pruned as are below threshold 0.4, 0.7, 1.0, 1.3, by each saliency.
rounding: 4, 3 and 2 bits, a scale for each channel: nearest against Hessian.
scales: 4 and 3 bits, Hessian: per tensor, channel and group of 48, codebook, asymmetric.
rates: Hessian, one scale: 4, 3 and 2 bits, then 5 bits at prices of 0.3 to 12 (smaller files left of larger ones).

"<" marks a metric worse than the one left of it. --time compresses a net in a fresh process (3 bits, a scale a channel,
threshold 0.7, both by Hessian) and prints seconds, processor seconds and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from autocompress.codec import container
from autocompress.compress import artifact
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.batches import evaluate
from autocompress.tasks.builtin import builtin_names
from autocompress.tasks.loading import load_task
from autocompress.trial import Budget, Workbench, run_trial

PER_CHANNEL = partial(LayerPlan, quantizer="uniform", granularity="channel")
BOTH = LayerPlan(bits=3, threshold=0.7, quantizer="uniform", granularity="channel", saliency="hessian",
                 rounding="hessian")  # fmt: skip
ROUNDED = partial(LayerPlan, quantizer="uniform", rounding="hessian")
TABLES = {
    "pruning": {
        f"threshold {t}": {s: LayerPlan(threshold=t, saliency=s) for s in ("magnitude", "activation", "hessian")}
        for t in (0.4, 0.7, 1.0, 1.3)
    },
    "rounding": {
        f"{bits} bits": {r: PER_CHANNEL(bits=bits, rounding=r) for r in ("nearest", "hessian")} for bits in (4, 3, 2)
    },
    "scales": {
        f"{bits} bits": {
            "tensor": ROUNDED(bits=bits),
            "channel": ROUNDED(bits=bits, granularity="channel"),
            "48": ROUNDED(bits=bits, granularity=48),
            "codebook": LayerPlan(bits=bits, rounding="hessian"),
            "asymmetric": LayerPlan(bits=bits, quantizer="asymmetric", granularity="channel", rounding="hessian"),
        }
        for bits in (4, 3)
    },
    "rates": {
        "no price": {f"{bits} bits": ROUNDED(bits=bits) for bits in (4, 3, 2)},
        **{f"rate {rate}": {"5 bits": (ROUNDED(bits=5), rate)} for rate in (0.3, 1.0, 3.0, 6.0, 12.0)},
    },
}
Way = LayerPlan | tuple[LayerPlan, float]
"""What each layer's plan is, and the price of a bit."""


def workbench(name: str, folder: Path) -> Workbench:
    """The net, on the CPU."""
    sys.path.insert(0, str(Path(__file__).parent))
    from pretrained_nets import NETS

    if name in builtin_names():
        return Workbench(load_task(name), "cpu")
    return Workbench(NETS[name](folder), "cpu")


def compressed(bench: Workbench, way: Way, effort: str = "fast", *, every: bool = False) -> bytes:
    """The file of a trial in which each layer has this plan: those whose inputs can be seen, in which ways differ.

    If `every`, embeddings and the like too.
    """
    layer, rate = way if isinstance(way, tuple) else (way, 0.0)
    layers = {spec.name: layer if every or spec.seen else LayerPlan() for spec in bench.layers}
    plan = Plan(layers, Recipe(0.0, 1e-3, 0.0, rate))
    (outcome,) = run_trial(bench, plan, Budget((0.0,)), effort=effort)
    return outcome.artifact


def metric(bench: Workbench, way: Way, split: str, effort: str) -> tuple[float, int]:
    """The metric of the decoded file, and its bytes; not a number where the trial fails."""
    try:
        data = compressed(bench, way, effort)
    except TrialFailed:
        return float("nan"), 0
    model = artifact.restore(container.unpack(data, max_elements=1 << 40), bench.task.model)
    return evaluate(bench.task, model, split), len(data)


def rows(bench: Workbench, table: str, split: str, effort: str) -> Iterator[tuple[str, list[str]]]:
    """Each row's name, and in each column the metric, the bytes and the seconds."""
    better = 1 if bench.task.direction == "maximize" else -1
    for name, columns in TABLES[table].items():
        cells, before = [], -float("inf")
        for way in columns.values():
            began = time.perf_counter()
            found, size = metric(bench, way, split, effort)
            mark = "<" if better * found < before else ""
            cells.append(f"{mark}{found:.4f} {size / 1e3:.1f}K {time.perf_counter() - began:.0f}s")
            before = better * found
        yield name, cells


def timed(name: str, folder: Path) -> None:
    """Compress a net here and print what that took."""
    bench = workbench(name, folder)
    bench.layers, bench.calibration  # noqa: B018  (made ready)
    ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    began, used = time.perf_counter(), time.process_time()
    size = len(compressed(bench, BOTH, every=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    print(f"{name}: {seconds:.1f} s ({processor:.1f} s of processor time, validation included), {size} bytes, "
          f"peak memory {peak:.2f} GB ({ready:.2f} GB before)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nets", nargs="+", default=["mobilenet-v2", "minilm", "llama-15m", "crnn", "crepe-tiny"])
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=tuple(TABLES))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--effort", choices=container.EFFORTS, default="fast", help="of the coder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", metavar="NET")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.time and options.here:
        timed(options.time, options.folder)
    elif options.time:
        subprocess.run([sys.executable, *sys.argv, "--here"], check=True)
    else:
        for name in options.nets:
            bench = workbench(name, options.folder)
            whole = evaluate(bench.task, bench.model, options.split)
            print(f"{name}, {bench.task.metric_name} on {options.split}: {whole:.4f} in float32", flush=True)
            for table in options.only:
                print(f"  {table}: {', '.join(next(iter(TABLES[table].values())))}", flush=True)
                for row, cells in rows(bench, table, options.split, options.effort):
                    print(f"    {row:<14}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
