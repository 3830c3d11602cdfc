"""8-bit ONNX exports beside onnxruntime's own quantizers, on trained nets: bytes, speed and metric of each file.

    python scripts/bench_int8.py [--only NAME ...] [--pretrained FOLDER] [--json FILE]

`float32` is the uncompressed model's ONNX export, `int8` the format onnx-int8 of the same artifact; the others are
onnxruntime.quantization on the float32 file: `static` (QDQ, per channel, calibrated on the same number of training
examples), `static7` the same with reduce_range, `dynamic`; they get it with the weights of LSTM and GRU as constants,
without which they leave these in float32. Calls of one example and of 32 are timed in turns, warm,
on one thread; speed is the float32 file's time over theirs, the median of ratios of one round. The metric is that of
the whole test set, the error the root mean square of the outputs' differences from float32's over theirs. minilm and
crnn-lstm, the text reader with torch's own LSTM, need the folder that `pretrained_nets.py` describes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.deploy.export import export
from autocompress.deploy.files import FILES, write_file
from autocompress.deploy.int8 import EXAMPLES
from autocompress.deploy.int8_recurrent import joined
from autocompress.deploy.recorder import Recorder
from autocompress.deploy.sessions import session_of
from autocompress.deploy.turns import in_turns
from autocompress.plan import LayerPlan, Plan
from autocompress.tasks import data as data_sets
from autocompress.tasks.batches import batches, predict
from autocompress.tasks.builtin import accuracy
from autocompress.tasks.folders import cache_root
from autocompress.tasks.loading import load_task
from autocompress.tasks.task import Task
from autocompress.trial import Budget, Workbench, run_trial


def mlp() -> Task:
    """784-1024-1024-10 on Fashion-MNIST, trained for two epochs, once."""
    images, labels, test_images, test_labels = data_sets.images("fashion-mnist", None)
    x, z = (torch.from_numpy(np.array(part)).float().flatten(1) / 128 - 0.5 for part in (images, test_images))
    y, w = (torch.from_numpy(np.array(part)).long() for part in (labels, test_labels))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    path = cache_root() / "bench-int8-mlp.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(2):
            for at in torch.randperm(55000).split(128):
                optimiser.zero_grad()
                F.cross_entropy(net(x[at]), y[at]).backward()
                optimiser.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    train, val, test = (x[:55000], y[:55000]), (x[55000:], y[55000:]), (z, w)
    return Task(net.eval(), train, val, test, F.cross_entropy, accuracy, name="mlp-1024", metric_name="accuracy")


class Rows(nn.Module):
    """An image (N, 1, 8, 8) read row by row, both ways, by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 128, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x.squeeze(1))[0].mean(1))


def gru() -> Task:
    """A GRU on `digits`, trained for 15 epochs, in seconds."""
    task = load_task("digits")
    x, y = task.train
    torch.manual_seed(0)
    net = Rows()
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(15):
        for at in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimiser.step()
    return dataclasses.replace(task, model=net.eval(), name="digits-gru")


def tasks(pretrained: Path | None) -> dict[str, Callable[[], Task]]:
    """By name how each net is loaded."""
    found: dict[str, Callable[[], Task]] = {
        name: (lambda name=name: load_task(name)) for name in ("digits", "mnist-lenet5", "fashion-lenet5")
    }
    found |= {"cifar10-resnet8": lambda: load_task("cifar10-resnet8"), "mlp-1024": mlp, "digits-gru": gru}
    if pretrained is not None:
        import pretrained_nets

        found |= {name: (lambda load=load: load(pretrained)) for name, load in pretrained_nets.NETS.items()}
        found["crnn-lstm"] = lambda: pretrained_nets.crnn(pretrained, whole=True)
    return found


def uncompressed(task: Task, folder: Path) -> Path:
    """The artifact of the whole model."""
    bench = Workbench(task, "cpu")
    (outcome,) = run_trial(bench, Plan({spec.name: LayerPlan() for spec in bench.layers}), Budget((0.0,)))
    path = folder / "whole.acz"
    path.write_bytes(outcome.artifact)
    return path


def peers(file: Path, task: Task, recorder: Recorder, folder: Path) -> Iterator[tuple[str, Path]]:
    """The files that onnxruntime's quantizers make of the float32 file."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    calls = [
        recorder.named(inputs)
        for inputs, _ in islice(batches(task.train, 32, shuffle_seed=0, device="cpu"), EXAMPLES // 32)
    ]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calls)

        def get_next(self) -> Any:
            return next(self.left, None)

    for name, reduced in (("static", False), ("static7", True)):
        out = folder / f"{name}.onnx"
        try:
            quantize_static(
                str(file), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduced,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            yield name, out
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error)[:200]}")
    out = folder / "dynamic.onnx"
    quantize_dynamic(str(file), str(out), per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
    yield "dynamic", out


def ran(task: Task, recorder: Recorder, file: Path) -> tuple[torch.Tensor, float]:
    """The outputs and the metric on the test set."""
    session = session_of(file)

    class Ran(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            feed = session.feed(recorder.named(kwargs or args))
            return torch.from_numpy(session.run(None, feed)[0])

    outputs, targets = predict(Ran(), task.test, device="cpu")
    return outputs, float(task.metric(outputs, targets))


def measured(name: str, task: Task, batch_sizes: tuple[int, ...], turns: int) -> dict[str, Any]:
    """The figures of a net's files by name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        artifact = uncompressed(task, folder)
        recorder = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
        predict(recorder, task.test, batch_size=256)
        files = {"float32": folder / "float32.onnx"}
        write_file("onnx", artifact, recorder, files["float32"], slim=False)
        began = time.perf_counter()
        manifest = export(artifact, task, "onnx-int8", folder / "out", {})
        seconds = time.perf_counter() - began
        files["int8"] = folder / "out" / FILES["onnx-int8"]
        whole = folder / "whole.onnx"
        onnx.save(joined(onnx.load(files["float32"]), {})[0], whole)
        files |= dict(peers(whole, task, recorder, folder))
        rows: dict[str, dict[str, float]] = {}
        wanted = None
        for kind, file in files.items():
            outputs, metric = ran(task, recorder, file)
            wanted = outputs if wanted is None else wanted
            error = float((outputs - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
            rows[kind] = {"bytes": file.stat().st_size, "metric": metric, "error": error}
        sessions = {kind: session_of(file) for kind, file in files.items()}
        for size in batch_sizes:
            inputs = recorder.first(size)
            calls = {kind: partial(session.run, None, session.feed(inputs)) for kind, session in sessions.items()}
            times = in_turns(calls, turns=turns)
            for kind in files:
                rows[kind][f"ms_{size}"] = 1e3 * times[kind].quartiles[1]
                rows[kind][f"speed_{size}"] = 1 / times[kind].over(times["float32"])
        layers = {layer: found["form"] for layer, found in manifest["layers"].items()}
        return {"rows": rows, "export_seconds": seconds, "layers": layers}


def shown(name: str, task: Task, found: dict[str, Any], batch_sizes: tuple[int, ...]) -> None:
    rows = found["rows"]
    print(f"\n{name}: exported in {found['export_seconds']:.1f} s; {found['layers']}")
    for kind, row in rows.items():
        speeds = "  ".join(f"b{size} {row[f'ms_{size}']:8.4f} ms {row[f'speed_{size}']:5.2f}x" for size in batch_sizes)
        print(
            f"  {kind:8} {row['bytes']:>10} B  {row['bytes'] / rows['float32']['bytes']:6.3f}  {speeds}"
            f"  metric {row['metric']:.5f}  error {row['error']:.4f}"
        )
    ours, others = rows["int8"], [row for kind, row in rows.items() if kind not in ("float32", "int8")]
    sign = 1 if task.direction == "maximize" else -1

    def loss(row: dict[str, float]) -> float:
        return max(0.0, sign * (rows["float32"]["metric"] - row["metric"]))

    told = {
        "no larger than any peer": ours["bytes"] <= min(row["bytes"] for row in others),
        "at most 5 % slower than the fastest peer": ours["speed_1"] >= 0.95 * max(row["speed_1"] for row in others),
        "loses no more of the metric than any peer": loss(ours) <= min(loss(row) for row in others),
        "outputs no further from float32 than any peer's": ours["error"] <= min(row["error"] for row in others),
        "at most 0.30 of float32": ours["bytes"] <= 0.30 * rows["float32"]["bytes"],
        "1.4 times as fast as float32": ours["speed_1"] >= 1.4,
    }
    print("  " + "; ".join(f"{what}: {'yes' if good else 'NO'}" for what, good in told.items()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of the peers
    known = tasks(arguments.pretrained)
    standard = [name for name in known if name in ("digits", "mnist-lenet5", "fashion-lenet5", "cifar10-resnet8")]
    names = arguments.only or [*standard, "mlp-1024", *(name for name in ("minilm", "crnn-lstm") if name in known)]
    every = {}
    for name in names:
        task = known[name]()
        every[name] = measured(name, task, tuple(arguments.batch), arguments.turns)
        shown(name, task, every[name], tuple(arguments.batch))
    if arguments.json:
        arguments.json.write_text(json.dumps(every, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
