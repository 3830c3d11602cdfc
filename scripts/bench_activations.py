"""What quantizing layers' inputs costs in test error, on Fashion-MNIST, and what learning the ranges buys back.

    python scripts/bench_activations.py [--net conv] [--epochs 3] [--seeds 3] [--json FILE]

Weights stay float32, all layers' inputs get 8 or 4 bits. Without finetuning: ranges from least to greatest ("minmax"),
without a thousandth at either end ("percentile"), of least error to the power 1.5 ("fitted", what a trial takes). With
an epoch of finetuning at 1e-3, no distillation: ranges as they were fitted ("fixed"), or learned with the weights
("learned"); 32 bits finetuned alike are what to compare with. Nets: "conv", the one of bench_options.py with batch
normalisation (its statistics are recalibrated in all columns), and "lenet300".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench_options import bases, error

from autocompress.codec import container
from autocompress.compress import apply, artifact, ranges
from autocompress.compress.finetune import finetune
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.loading import load_task
from autocompress.tasks.task import Task
from autocompress.trial import Workbench

CLIPPINGS = ("minmax", "percentile", "fitted")


def tasks(net: str, epochs: int, seeds: int) -> Iterator[Task]:
    if net == "conv":
        yield from bases(epochs, seeds)
    else:
        yield from [load_task("fashion-lenet300")] * seeds


def error_of(bench: Workbench, model: apply.Compressed) -> float:
    """The test error of the file that the model gives, in per cent."""
    bench.recalibrate(model)
    data = artifact.write(bench.model, model.plan, model.encode(), "", "fast", grids=model.grids())
    return error(bench.task, artifact.restore(container.unpack(data), bench.task.model))


def compressed(bench: Workbench, bits: int, recipe: Recipe, clipping: str) -> apply.Compressed:
    def grids(spec: object, width: int) -> ranges.Grid:
        return ranges.fitted(sampled[spec.name], width, clipping)  # type: ignore[attr-defined]

    sampled = bench._sampled()
    plan = Plan({spec.name: LayerPlan(activation_bits=bits) for spec in bench.layers}, recipe)
    return apply.compress(bench.model, bench.layers, plan, bench.svd, grids=grids)


def measured(bench: Workbench, seed: int) -> Iterator[tuple[str, str, float]]:
    """Bits, way and error of everything, for one base model."""
    recipe = Recipe(1.0, 1e-3, 0.0)
    for bits in (32, 8, 4):
        for clipping in CLIPPINGS if bits < 32 else ("fitted",):
            yield (
                str(bits),
                clipping if bits < 32 else "none",
                error_of(bench, compressed(bench, bits, recipe, clipping)),
            )
        for way in ("fixed", "learned") if bits < 32 else ("learned",):
            model = compressed(bench, bits, recipe, "fitted")
            if way == "fixed":
                for found in model.ranges.values():
                    for tensor in found.trained:
                        tensor.requires_grad_(False)
            list(finetune(model, bench.feed(seed, False), bench.task.loss, recipe, [recipe.epochs]))
            yield str(bits), f"finetuned, {way}" if bits < 32 else "finetuned", error_of(bench, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", choices=("conv", "lenet300"), action="append")
    parser.add_argument("--epochs", type=int, default=3, help="of training the conv net")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for net in options.net or ("conv", "lenet300"):
        for seed, task in enumerate(tasks(net, options.epochs, options.seeds)):
            for bits, way, value in measured(Workbench(task, "cpu"), seed):
                found.setdefault(f"{net}, {bits} bits", {}).setdefault(way, []).append(value)
    for name, ways in found.items():
        print(f"{name}: " + ", ".join(f"{way} {statistics.mean(values):.2f}" for way, values in ways.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
