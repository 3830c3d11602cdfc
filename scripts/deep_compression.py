"""Deep Compression (Han et al. 2015, arXiv 1510.00149) with this project's own pieces, beside the paper's tables.

    python scripts/deep_compression.py lenet300|lenet5 --data-dir DATA [--fashion] [--seeds 3] [--press 1]

Rounds of pruning: each prunes by magnitude to a share that falls geometrically to the paper's and finetunes what
stays; a pruned weight never comes back. Rounds of clustering: k-means from evenly spaced centroids, then finetuning
with the paper's gradient for the centroids; unlike the paper's, a weight may change to the next cluster. At the end
the file is written with Huffman codes of gaps and values, read back, and what it decodes to is measured. All of it is
`run_trial`, each round going on from the float weights of the one before. `--press` divides the shares that are kept.

The bits after Huffman count a layer's stream with its code tables; bytes of a file count its head and biases too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autocompress.codec import container, leb128
from autocompress.codec.tensors import Coded, Raw
from autocompress.compress import artifact
from autocompress.compress.lineage import State
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.trial import Budget, Outcome, Workbench, run_trial


@dataclass(frozen=True)
class Said:
    """What the paper has of a layer: the share kept, bits of a value and of a gap, as numbers and after Huffman."""

    kept: float
    bits: int
    coded_bits: float
    gap_bits: int
    coded_gap_bits: float


@dataclass(frozen=True)
class Net:
    """The paper's layers in order, its errors before and after, its bytes; our rounds, and epochs of each."""

    layers: Mapping[str, Said]
    error_before: float
    error_after: float
    bytes_before: int
    bytes_after: int
    prune_rounds: int
    cluster_rounds: int
    epochs: float


NETS = {
    "lenet300": Net(
        {
            "ip1": Said(0.08, 6, 4.4, 5, 3.7),
            "ip2": Said(0.09, 6, 4.4, 5, 4.3),
            "ip3": Said(0.26, 6, 4.3, 5, 3.2),
        },
        0.0164, 0.0158, 1_070_000, 27_000, prune_rounds=6, cluster_rounds=2, epochs=5,
    ),
    "lenet5": Net(
        {
            "conv1": Said(0.66, 8, 7.2, 5, 1.5),
            "conv2": Said(0.12, 8, 7.2, 5, 3.9),
            "ip1": Said(0.08, 5, 4.5, 5, 4.5),
            "ip2": Said(0.19, 5, 5.2, 5, 3.7),
        },
        0.0080, 0.0074, 1_720_000, 44_000, prune_rounds=5, cluster_rounds=2, epochs=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One layer of a file: the share kept, mean bits of a value and of a gap after Huffman, the gap's width, bytes."""

    kept: float
    coded_bits: float
    gap_bits: int
    coded_gap_bits: float
    size_bytes: int


@dataclass(frozen=True)
class Result:
    """A file's bytes, test error, layers, and its bytes under this project's own coder."""

    size_bytes: int
    error: float
    rows: Sequence[Row]
    own_bytes: int


def thresholds(
    weights: Mapping[str, Tensor], units: Mapping[str, float], kept: Mapping[str, float]
) -> dict[str, float]:
    """For each weight the threshold, in units, that keeps a share of its elements: between two magnitudes."""
    found = {}
    for name, weight in weights.items():
        sizes = weight.detach().double().abs().flatten().sort(descending=True).values
        count = max(1, round(kept[name] * len(sizes)))
        below = float(sizes[count]) if count < len(sizes) else 0.0
        found[name] = (float(sizes[count - 1]) + below) / 2 / units[name]
    return found


def without_pruned(outcome: Outcome) -> State:
    """The state behind an outcome with zeros where its file has them, so that no pruned weight comes back."""
    state = outcome.state()
    values = {name: values_of(tensor) for name, tensor in container.unpack(outcome.artifact).tensors.items()}
    frozen = {
        key: tensor * torch.from_numpy(values[key] != 0).to(tensor.device) if f"{key}#unit" in state.tensors else tensor
        for key, tensor in state.tensors.items()
    }
    return replace(state, tensors=frozen)


def values_of(tensor: Raw | Coded) -> np.ndarray:
    return tensor.values() if isinstance(tensor, Coded) else tensor.array


def compressed(bench: Workbench, net: Net, seed: int, press: float, say: Callable[[str], None]) -> Outcome:
    """The last outcome of all rounds: its file has Huffman codes."""
    names = [spec.name for spec in bench.layers]
    said = dict(zip(names, net.layers.values(), strict=True))
    units = {n: float(bench.model.get_parameter(f"{n}.weight").detach().double().std(correction=0)) for n in names}
    state: State | None = None
    outcome: Outcome | None = None
    for number in range(net.prune_rounds + net.cluster_rounds):
        clusters = number >= net.prune_rounds
        share = min(1.0, (number + 1) / net.prune_rounds)
        tensors = dict(bench.model.named_parameters()) if state is None else state.tensors
        limits = thresholds(
            {name: tensors[f"{name}.weight"] for name in names},
            units,
            {name: (said[name].kept / press) ** share for name in names},
        )
        layers = {n: LayerPlan(bits=said[n].bits if clusters else 32, threshold=limits[n]) for n in names}
        recipe = Recipe(epochs=net.epochs, learning_rate=3e-4 if clusters else 1e-3, distillation=0.0)
        effort = container.HUFFMAN if clusters else container.FAST
        for outcome in run_trial(bench, Plan(layers, recipe), Budget((1.0,)), seed + number, state, effort=effort):
            state = without_pruned(outcome)
        assert outcome is not None
        what = "clustering" if clusters else "pruning"
        numbers = outcome.measurement
        say(f"seed {seed}, {what}: {numbers.size_bytes:,} bytes, val error {100 * (1 - numbers.metric_val):.2f} %")
    assert outcome is not None
    return outcome


def measured(bench: Workbench, outcome: Outcome) -> Result:
    """What the file is, read back: its test error and its layers."""
    archive = container.Archive(outcome.artifact)
    content = container.unpack(outcome.artifact)
    rows = []
    for spec in bench.layers:
        name = f"{spec.name}.weight"
        tensor = content.tensors[name]
        sizes = archive.sizes(name, tensor)
        kept = int(np.count_nonzero(values_of(tensor)))
        gap_bits = leb128.read(archive.stream(name), leb128.read(archive.stream(name), sizes.table)[1])[0]
        each = 8 / kept
        rows.append(
            Row(kept / spec.parameters, sizes.codes * each, gap_bits, sizes.mask * each, archive.entries[name].length)
        )
    model = artifact.restore(content, bench.task.model)
    error = 1 - evaluate(bench.task, model, "test")
    return Result(len(outcome.artifact), error, rows, len(container.pack(content)))


def report(net: Net, base_error: float, base_bytes: int, results: Sequence[Result]) -> str:
    """The table: means over the results, with the paper's numbers behind them in brackets."""
    line = "{:<6} {:>10} {:>10} {:>16} {:>8} {:>14} {:>8}"
    lines = [line.format("layer", "kept, %", "value bits", "after Huffman", "gap bits", "after Huffman", "bytes")]
    for k, (name, said) in enumerate(net.layers.items()):
        rows = [result.rows[k] for result in results]
        kept, coded, gap, coded_gap, size = (
            float(np.mean([getattr(row, field) for row in rows]))
            for field in ("kept", "coded_bits", "gap_bits", "coded_gap_bits", "size_bytes")
        )
        pairs = (
            f"{100 * kept:.1f} ({100 * said.kept:.0f})",
            f"{said.bits} ({said.bits})",
            f"{coded:.1f} ({said.coded_bits})",
            f"{gap:.0f} ({said.gap_bits})",
            f"{coded_gap:.1f} ({said.coded_gap_bits})",
        )
        lines.append(line.format(name, *pairs, f"{size:,.0f}"))
    errors = [100 * result.error for result in results]
    size = float(np.mean([result.size_bytes for result in results]))
    own = float(np.mean([result.own_bytes for result in results]))
    each = ", ".join(f"{error:.2f}" for error in errors)
    before, after = 100 * net.error_before, 100 * net.error_after
    lines += [
        f"test error {np.mean(errors):.2f} % (paper {after:.2f}), each seed: {each}; "
        f"uncompressed {100 * base_error:.2f} % (paper {before:.2f})",
        f"file {size:,.0f} bytes (paper {net.bytes_after:,}), {base_bytes / size:.0f}x (paper "
        f"{net.bytes_before / net.bytes_after:.0f}x); the same tensors under this project's coder: {own:,.0f} bytes",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", choices=tuple(NETS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--fashion", action="store_true", help="Fashion-MNIST in place of MNIST")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--press", type=float, default=1.0, help="keep so many times fewer weights than the paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = f"{'fashion' if options.fashion else 'mnist'}-{options.net}"
    bench = Workbench(load_task(name, data_dir=options.data_dir, progress=print), "cpu")
    net, began = NETS[options.net], time.monotonic()
    base_error = 1 - evaluate(bench.task, bench.model, "test")
    results = []
    for seed in range(options.seeds):
        outcome = compressed(bench, net, 100 * seed, options.press, lambda text: print(text, flush=True))
        results.append(measured(bench, outcome))
    print(f"\n{name}, {options.seeds} seeds, {time.monotonic() - began:.0f} s; in brackets the paper's on MNIST")
    print(report(net, base_error, bench.baseline_bytes(), results))


if __name__ == "__main__":
    main()
