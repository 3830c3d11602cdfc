"""How long a call of exported files takes beside the float32 model's export: in turns, on one and the same machine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autocompress.compress.artifact import load
from autocompress.deploy.files import write_file
from autocompress.deploy.memory import peak_bytes
from autocompress.deploy.recorder import Named, Recorder
from autocompress.deploy.sessions import Session, session_of
from autocompress.deploy.turns import MOST_SECONDS, TURN_SECONDS, TURNS, Call, in_turns
from autocompress.deploy.verify import save_inputs
from autocompress.errors import UsageError
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device
from autocompress.timing import BATCHES, FORMATS

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

MOST = {"batch": 65536, "threads": 1024}
"""The largest values allowed."""


@dataclass(frozen=True)
class Float32:
    """The float32 model's export, that other files are timed beside, loaded, and the inputs: by batch size, and two
    examples. They are passed by name if `keywords`.
    """

    file: Path
    session: Session
    inputs: Mapping[int, Named]
    example: Named
    keywords: bool


def measure(
    task: Task,
    artifacts: Mapping[int, Path],
    *,
    target: str = "onnx",
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
) -> dict[int, tuple[Latency, ...]]:
    """By trial the latencies of its artifact's file for the target in onnxruntime, one for each batch size.

    Inputs are the first test examples, repeated where there are fewer. Raises ExportError for what cannot be
    exported or run, UsageError for a target that is not one of `FORMATS` and as `check`.
    """
    if target not in FORMATS:
        raise UsageError(f"target is {target!r}, allowed: {', '.join(FORMATS)}")
    check(batches, threads)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        base = float32(task, task.test, folder, batches, threads)
        files: dict[int, Path] = {}
        macs: dict[int, int | None] = {}
        for number, artifact in artifacts.items():
            recorder = Recorder(load(artifact, model=task.model), folder, keywords=base.keywords)
            recorder.run("example", base.example)
            files[number] = folder / f"{number}.onnx"
            details = write_file(target, artifact, recorder, files[number], task=task)
            macs[number] = details.get("cut", {}).get("macs")
        found = in_files(base, files, target, threads, turns=turns, seconds=seconds)
        return _with_memory(base, files, found, macs, threads)


def check(batches: Sequence[int], threads: int) -> None:
    """Raise UsageError for batch sizes and threads beyond `MOST`."""
    for what, value in (("threads", threads), *(("batch", size) for size in batches)):
        if not 1 <= value <= MOST[what]:
            raise UsageError(f"{what} is {value}, allowed: 1 to {MOST[what]}")


def float32(task: Task, data: Any, folder: Path, batches: Sequence[int], threads: int) -> Float32:
    """The float32 model's export in the folder, with the first examples of the data, repeated where there are fewer.

    Raises ExportError.
    """
    recorder = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
    with torch.no_grad():
        call_model(recorder, to_device(first_batch(data, max(batches))[0], "cpu"))
    file = folder / "float32.onnx"
    write_file("onnx", folder, recorder, file, slim=False)
    inputs = {size: recorder.repeated(size) for size in batches}
    return Float32(file, session_of(file, threads), inputs, recorder.repeated(2), recorder.keywords)


def in_files(
    base: Float32,
    files: Mapping[int, Path],
    target: str,
    threads: int,
    *,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
    most: float = MOST_SECONDS,
) -> dict[int, tuple[Latency, ...]]:
    """By number the latencies of files for the target, one for each of the baseline's batch sizes, all in turns."""
    sessions = {str(number): session_of(file, threads) for number, file in files.items()}
    sessions["float32"] = base.session
    found: dict[int, list[Latency]] = {number: [] for number in files}
    for size, inputs in base.inputs.items():
        calls = {name: _call(session, inputs) for name, session in sessions.items()}
        times = in_turns(calls, turns=turns, seconds=seconds, most=most)
        _, whole, _ = times["float32"].quartiles
        for number, file in files.items():
            low, median, high = times[str(number)].quartiles
            ratio = times[str(number)].over(times["float32"])
            length = file.stat().st_size
            found[number].append(Latency(target, size, threads, median, low, high, whole, ratio, length))
    return {number: tuple(latencies) for number, latencies in found.items()}


def _with_memory(
    base: Float32,
    files: Mapping[int, Path],
    found: Mapping[int, Sequence[Latency]],
    macs: Mapping[int, int | None],
    threads: int,
) -> dict[int, tuple[Latency, ...]]:
    """The latencies of `in_files` with peak memory of the files and the baseline, and MACs."""
    full: dict[int, list[Latency]] = {number: [] for number in files}
    for place, inputs in enumerate(base.inputs.values()):
        stored = save_inputs(base.file.parent, "timed", inputs)
        whole = peak_bytes(base.file, stored, threads)
        for number, file in files.items():
            held = peak_bytes(file, stored, threads)
            one = replace(found[number][place], memory_bytes=held, baseline_memory_bytes=whole, macs=macs[number])
            full[number].append(one)
    return {number: tuple(latencies) for number, latencies in full.items()}


def _call(session: Session, inputs: Named) -> Call:
    feed = session.feed(inputs)
    return lambda: session.run(None, feed)
