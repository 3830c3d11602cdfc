"""What exports of studies cost: bytes, time and exactness of the ONNX files, and what cutting dead units is worth.

    python scripts/bench_deploy.py STUDY... [--dir DIR] [--batch 1 32] [--sparsest 3] [--node DIR]
                                    [--formats onnx torch ...] [--json]

Bytes: of each member of a study's front the archive, its ONNX file beside `limit`, twice the archive and 4 KB, and the
float32 model's ONNX file; times of a call as parts of the float32 file's, in turns (`deploy/latency.py`); the largest
difference of outputs from the artifact's, over the first test examples, in parts of the largest output: in onnxruntime,
in OpenVINO where it is installed, in Node.js where `--node` names a folder with onnxruntime-node in `node_modules`.

Dead units: the members with the largest shares of zeros exported whole and without dead units: units cut,
multiply-accumulates of an example counted from both files' graphs, speed-up (above 1 is faster), difference.

Formats, where any are named: the smallest member within a point of the baseline exported in each and verified: bytes,
the test metric of the artifact and of the file, the largest difference in parts of the largest output, and seconds of
the export, its verification in a fresh process included.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from autocompress import api
from autocompress.compress.artifact import load
from autocompress.deploy import latency
from autocompress.deploy.files import write_file
from autocompress.deploy.macs import macs
from autocompress.deploy.recorder import Named, Recorder
from autocompress.errors import AutocompressError, ExportError
from autocompress.results import Point, pick
from autocompress.tasks.batches import call_model, first_batch
from autocompress.tasks.task import Task

EXAMPLES = 256
"""Test examples whose outputs are compared."""
RUNTIMES = ("onnxruntime", "openvino", "node")

NODE = """
import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";
const [file, folder] = process.argv.slice(2);
const kinds = { float32: Float32Array, int64: BigInt64Array };
const session = await ort.InferenceSession.create(file);
const feed = {};
for (const { name, dtype, shape } of JSON.parse(readFileSync(folder + "/inputs.json"))) {
  const bytes = readFileSync(`${folder}/${name}.in`);
  const data = new kinds[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  if (session.inputNames.includes(name)) feed[name] = new ort.Tensor(dtype, data, shape);
}
const outputs = await session.run(feed);
for (const name of session.outputNames) {
  const { data } = outputs[name];
  writeFileSync(`${folder}/${name}.out`, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
}
"""


@dataclass(frozen=True)
class Settings:
    """Batch sizes, turns of each file, members whose dead units are cut, where npm installed onnxruntime-node."""

    batches: tuple[int, ...] = (1, 32)
    turns: int = latency.TURNS
    sparsest: int = 3
    node: Path | None = None


@dataclass(frozen=True)
class Member:
    """One member of a front: bytes, times as parts of the float32 file's by batch, differences by runtime."""

    study: str
    trial: int
    archive_bytes: int
    onnx_bytes: int
    float32_bytes: int
    times: Mapping[int, float]
    differences: Mapping[str, float]

    @property
    def limit_bytes(self) -> int:
        """What an ONNX file may take beside its archive."""
        return 2 * self.archive_bytes + 4096


@dataclass(frozen=True)
class Slim:
    """One member whole and without dead units: MACs of an example by the files' graphs, speed-ups by batch."""

    study: str
    trial: int
    zeros: float
    units: int
    of_units: int
    macs_whole: int
    macs: int
    whole_bytes: int
    onnx_bytes: int
    speeds: Mapping[int, float]
    difference: float


# ---------------------------------------------------------------------- counting


def zeros(model: torch.nn.Module) -> float:
    """The share of zeros among weights of two axes or more."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))


def difference(wanted: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> float:
    """The largest difference, in parts of the largest absolute value that is wanted."""
    scale = max(float(np.abs(a).max(initial=0.0)) for a in wanted) or 1.0
    return (
        max(float(np.abs(a - b.reshape(a.shape)).max(initial=0.0)) for a, b in zip(wanted, found, strict=True)) / scale
    )


# ---------------------------------------------------------------------- runtimes


def in_onnxruntime(file: Path, inputs: Named) -> list[NDArray[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})


def in_openvino(file: Path, inputs: Named) -> list[NDArray[Any]]:
    import openvino

    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(model({port.any_name: inputs[port.any_name] for port in model.inputs}).to_tuple())


def in_node(file: Path, inputs: Named, modules: Path) -> list[NDArray[Any]]:
    """The float32 outputs in onnxruntime-node, flat. Raises ExportError where it does not run."""
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        told = [{"name": name, "dtype": str(a.dtype), "shape": a.shape} for name, a in inputs.items()]
        (folder / "inputs.json").write_text(json.dumps(told))
        for name, array in inputs.items():
            (folder / f"{name}.in").write_bytes(array.tobytes())
        (folder / "run.mjs").write_text(NODE)
        (folder / "node_modules").symlink_to((modules / "node_modules").absolute())
        words = ["node", "run.mjs", str(file.absolute()), scratch]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ExportError(f"node does not run {file.name}: {' '.join(done.stderr.split())[-300:]}")
        names = [value.name for value in onnx.load(file).graph.output]
        return [np.frombuffer((folder / f"{name}.out").read_bytes(), np.float32) for name in names]


def differences(file: Path, inputs: Named, wanted: Sequence[NDArray[Any]], modules: Path | None) -> dict[str, float]:
    """By runtime that is here the difference of its outputs."""
    found = {"onnxruntime": difference(wanted, in_onnxruntime(file, inputs))}
    if find_spec("openvino") is not None:
        found["openvino"] = difference(wanted, in_openvino(file, inputs))
    if modules is not None:
        found["node"] = difference(wanted, in_node(file, inputs, modules))
    return found


# ---------------------------------------------------------------------- studies


def recorded(task: Task, module: torch.nn.Module, folder: Path) -> Recorder:
    """The module after a call on the first test examples."""
    recorder = Recorder(module.cpu().eval(), folder)
    with torch.no_grad():
        call_model(recorder, first_batch(task.test, EXAMPLES)[0])
    return recorder


def front(study: str, task: Task, points: Sequence[Point], settings: Settings) -> list[Member]:
    """The members' files, measured."""
    times = latency.measure(task, {p.trial: p.artifact for p in points}, batches=settings.batches, turns=settings.turns)
    members = []
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        base = folder / "float32.onnx"
        write_file("onnx", base, recorded(task, copy.deepcopy(task.model), folder), base, slim=False)
        for point in points:
            recorder = recorded(task, load(point.artifact, model=task.model), folder)
            file = folder / f"{point.trial}.onnx"
            write_file("onnx", point.artifact, recorder, file)
            (wanted,) = recorder.outputs.values()
            found = differences(file, recorder.first(EXAMPLES), list(wanted.values()), settings.node)
            sizes = (point.artifact.stat().st_size, file.stat().st_size, base.stat().st_size)
            ratios = {each.batch: each.ratio for each in times[point.trial]}
            members.append(Member(study, point.trial, *sizes, ratios, found))
    return members


def slims(study: str, task: Task, points: Sequence[Point], settings: Settings) -> list[Slim]:
    """The sparsest members, whole and without dead units."""
    modules = {point.trial: load(point.artifact, model=task.model) for point in points}
    chosen = sorted(points, key=lambda point: -zeros(modules[point.trial]))[: settings.sparsest]
    found = []
    for point in chosen:
        with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
            folder = Path(scratch)
            recorder = recorded(task, modules[point.trial], folder)
            whole, small = folder / "whole.onnx", folder / "small.onnx"
            write_file("onnx", point.artifact, recorder, whole, slim=False)
            cut = write_file("onnx", point.artifact, recorder, small)["cut"]
            inputs = recorder.first(max(*settings.batches, EXAMPLES))
            (wanted,) = recorder.outputs.values()
            gap = difference(list(wanted.values()), in_onnxruntime(small, recorder.first(EXAMPLES)))
            found.append(
                Slim(
                    study,
                    point.trial,
                    zeros(modules[point.trial]),
                    cut["dead_units"],
                    cut.get("units", 0),
                    macs(onnx.load(whole)),
                    macs(onnx.load(small)),
                    whole.stat().st_size,
                    small.stat().st_size,
                    {batch: speed(whole, small, inputs, batch, settings.turns) for batch in settings.batches},
                    gap,
                )
            )
    return found


def speed(whole: Path, small: Path, inputs: Named, batch: int, turns: int) -> float:
    """How many times as fast the second file is, one thread, in turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    calls = {}
    for file in (whole, small):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        feed = {v.name: np.resize(inputs[v.name], (batch, *inputs[v.name].shape[1:])) for v in session.get_inputs()}
        calls[file.name] = lambda session=session, feed=feed: session.run(None, feed)
    found = latency.in_turns(calls, turns=turns)
    return found[whole.name].over(found[small.name])


# ---------------------------------------------------------------------- printing


def print_front(members: Sequence[Member], batches: Sequence[int]) -> None:
    times = "".join(f"{f'time, b{batch}':>11s}" for batch in batches)
    print(
        f"{'study':14s}{'trial':>6s}{'archive':>9s}{'ONNX':>9s}{'limit':>9s}{'float32':>10s}{'ONNX/arc':>10s}"
        f"{'f32/ONNX':>10s}{times}{'onnxruntime':>13s}{'OpenVINO':>10s}{'Node.js':>10s}"
    )
    for m in members:
        mark = " " if m.onnx_bytes <= m.limit_bytes else "!"
        gaps = [f"{m.differences[name]:.1e}" if name in m.differences else "-" for name in RUNTIMES]
        print(
            f"{m.study:14s}{m.trial:6d}{m.archive_bytes:9d}{m.onnx_bytes:9d}{m.limit_bytes:8d}{mark}"
            f"{m.float32_bytes:10d}{m.onnx_bytes / m.archive_bytes:10.2f}{m.float32_bytes / m.onnx_bytes:10.1f}"
            + "".join(f"{m.times[batch]:11.2f}" for batch in batches)
            + f"{gaps[0]:>13s}{gaps[1]:>10s}{gaps[2]:>10s}"
        )
    over = [m for m in members if m.onnx_bytes > m.limit_bytes]
    ratio = statistics.median(m.onnx_bytes / m.archive_bytes for m in members)
    print(f"{len(over)} of {len(members)} over the limit of twice the archive and 4 KB; median ratio {ratio:.2f}")


@dataclass(frozen=True)
class Exported:
    """A verified export."""

    study: str
    trial: int
    format: str
    size_bytes: int
    metric_artifact: float
    metric_exported: float
    difference: float
    seconds: float


def exported(study: api.Study, formats: Sequence[str]) -> list[Exported]:
    """The study's smallest plan within a point of the baseline, in each format. Raises ExportError."""
    trial = pick(study.record, max_drop="1%")
    found = []
    for fmt in formats:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            manifest = study.point(trial).export(folder, format=fmt)
            seconds = time.perf_counter() - began
        told = manifest["verification"]
        gap = told["max_abs_difference"] / (told["max_abs_output"] or 1.0)
        metrics = told["metric_artifact"], told["metric_exported"]
        found.append(Exported(study.name, trial.number, fmt, manifest["size_bytes"], *metrics, gap, seconds))
    return found


def print_exported(found: Sequence[Exported]) -> None:
    print(
        f"{'study':14s}{'trial':>6s}  {'format':16s}{'bytes':>10s}{'artifact':>10s}{'file':>10s}"
        f"{'difference':>12s}{'s':>6s}"
    )
    for e in found:
        print(
            f"{e.study:14s}{e.trial:6d}  {e.format:16s}{e.size_bytes:10d}{e.metric_artifact:10.4f}"
            f"{e.metric_exported:10.4f}{e.difference:12.1e}{e.seconds:6.0f}"
        )


def print_slims(found: Sequence[Slim], batches: Sequence[int]) -> None:
    speeds = "".join(f"{f'speed, b{batch}':>11s}" for batch in batches)
    print(
        f"{'study':14s}{'trial':>6s}{'zeros':>8s}{'units cut':>14s}{'MACs whole':>12s}{'MACs':>11s}{'removed':>9s}"
        f"{'whole':>9s}{'ONNX':>9s}{speeds}{'difference':>12s}"
    )
    for s in found:
        print(
            f"{s.study:14s}{s.trial:6d}{s.zeros:8.1%}{f'{s.units} of {s.of_units}':>14s}{s.macs_whole:12d}{s.macs:11d}"
            f"{1 - s.macs / max(1, s.macs_whole):9.1%}{s.whole_bytes:9d}{s.onnx_bytes:9d}"
            + "".join(f"{s.speeds[batch]:11.2f}" for batch in batches)
            + f"{s.difference:12.1e}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY")
    parser.add_argument("--dir", metavar="DIR", help="records folder (AUTOCOMPRESS_DIR, else ./autocompress_runs)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], metavar="B")
    parser.add_argument("--turns", type=int, default=latency.TURNS, metavar="N", help="of each file")
    parser.add_argument("--sparsest", type=int, default=3, metavar="N", help="members whose dead units are cut")
    parser.add_argument("--node", type=Path, metavar="DIR", help="folder in which npm installed onnxruntime-node")
    parser.add_argument("--formats", nargs="+", default=[], metavar="F", help="export in these formats as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    settings = Settings(tuple(options.batch), options.turns, options.sparsest, options.node)
    torch.set_num_threads(1)
    members: list[Member] = []
    slim: list[Slim] = []
    files: list[Exported] = []
    try:
        for name in options.studies:
            study = api.open_study(name, dir=options.dir)
            task, points = study.required_task(), list(study.front)
            members += front(study.name, task, points, settings)
            slim += slims(study.name, task, points, settings)
            files += exported(study, options.formats)
    except AutocompressError as error:
        print(f"bench_deploy: {error}", file=sys.stderr)
        return 1
    if options.json:
        front_json = [asdict(m) | {"limit_bytes": m.limit_bytes} for m in members]
        told = {"front": front_json, "dead_units": [asdict(s) for s in slim], "formats": list(map(asdict, files))}
        print(json.dumps(told, indent=1))
        return 0
    print_front(members, options.batch)
    print()
    print_slims(slim, options.batch)
    if files:
        print()
        print_exported(files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
