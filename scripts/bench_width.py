"""What cutting units buys: metric, bytes, multiply-accumulates and speed of exports at given widths.

    python scripts/bench_width.py TASK PLAN ... [--epochs 1] [--saliency activation] [--learning-rate 2e-3]

A PLAN is a width for all layers (0.5), or for layers by pattern (4.*=0.75,5.*=0.75; the others keep all units);
layers whose units cannot go keep them. Weights are on 8-bit grids. Speed is the time of the float32 model's ONNX
export over that of the format's, for one example, one thread, in turns (`deploy/latency.py`). With --epochs 0 speeds
alone mean something.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from autocompress.compress.artifact import load
from autocompress.compress.products import macs_of
from autocompress.deploy.latency import measure
from autocompress.plan import LayerPlan, Plan, Recipe, uncompressed
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.timing import FORMATS
from autocompress.trial import Budget, Workbench, run_trial


def widths_of(text: str, bench: Workbench) -> dict[str, float]:
    """By layer name the width that a PLAN means."""
    rules = [rule.rpartition("=")[::2] for rule in text.split(",")]
    found: dict[str, float] = {}
    for spec in bench.layers:
        asked = [float(width) for pattern, width in rules if fnmatchcase(spec.label, pattern or "*")]
        found[spec.name] = asked[-1] if asked and not bench.units.why(spec) else 1.0
    return found


def plan_of(widths: Mapping[str, float], options: argparse.Namespace) -> Plan:
    """8-bit grids at those widths."""
    kind = {"bits": 8, "quantizer": "uniform", "saliency": options.saliency}
    layers = {name: LayerPlan(width=width, **kind) for name, width in widths.items()}
    return Plan(layers, Recipe(options.epochs, options.learning_rate, options.distillation))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("plans", nargs="+", metavar="PLAN")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--saliency", default="activation")
    parser.add_argument("--targets", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    task = load_task(options.task)
    bench = Workbench(task)
    val, test = (evaluate(task, bench.model, split) for split in ("val", "test"))
    macs = macs_of(bench.layers, uncompressed(bench.layers))
    print(f"{'plan':40}{'val':>8}{'test':>8}{'bytes':>10}{'MACs':>12}" + "".join(f"{t:>12}" for t in options.targets))
    print(f"{'float32':40}{val:8.4f}{test:8.4f}{bench.baseline_bytes():10}{macs:12}{1.0:12.2f}")
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        files: dict[int, Path] = {}
        rows: dict[int, str] = {}
        for number, text in enumerate(options.plans):
            plan = plan_of(widths_of(text, bench), options)
            outcome = list(run_trial(bench, plan, Budget((1.0,))))[-1]
            files[number] = Path(scratch) / f"{number}.acz"
            files[number].write_bytes(outcome.artifact)
            test = evaluate(task, load(files[number], model=task.model), "test")
            got = outcome.measurement
            rows[number] = f"{text:40}{got.metric_val:8.4f}{test:8.4f}{got.size_bytes:10}{got.macs:12}"
        for target in options.targets:
            for number, (latency,) in measure(task, files, target=target, batches=(1,)).items():
                rows[number] += f"{1 / latency.ratio:12.2f}"
        print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
