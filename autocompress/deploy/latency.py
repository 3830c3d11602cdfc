"""How long a call of exported files takes beside the float32 model's export: in turns, on one and the same machine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autocompress.compress.artifact import load
from autocompress.deploy.export import Named, Recorder, write_file
from autocompress.deploy.sessions import Session, session_of
from autocompress.deploy.turns import TURN_SECONDS, TURNS, Call, in_turns
from autocompress.errors import UsageError
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

TARGETS = ("onnx", "onnx-int8")
"""Formats that can be timed, in onnxruntime."""
MOST = {"batch": 65536, "threads": 1024}
"""The largest values allowed."""


def check_timed(target: str, batches: Sequence[int] = (1,), threads: int = 1) -> None:
    """Raise UsageError for a target that is not one of `TARGETS`, batch sizes and threads beyond `MOST`."""
    if target not in TARGETS:
        raise UsageError(f"target is {target!r}, allowed: {', '.join(TARGETS)}")
    for what, value in (("threads", threads), *(("batch", size) for size in batches)):
        if not 1 <= value <= MOST[what]:
            raise UsageError(f"{what} is {value}, allowed: 1 to {MOST[what]}")


def measure(
    task: Task,
    artifacts: Mapping[int, Path],
    *,
    target: str = "onnx",
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
) -> dict[int, tuple[Latency, ...]]:
    """By trial the latencies of its artifact's file for the target in onnxruntime, one for each batch size.

    Inputs are the first test examples, repeated where there are fewer. Raises ExportError for what cannot be
    exported or run, UsageError as `check_timed`.
    """
    check_timed(target, batches, threads)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        base = float32(task, task.test, folder, max(batches))
        files: dict[int, Path] = {}
        for number, artifact in artifacts.items():
            recorder = Recorder(load(artifact, model=task.model), folder, keywords=base.keywords)
            recorder.run("example", base.first(2))
            files[number] = folder / f"{number}.onnx"
            write_file(target, artifact, recorder, files[number], task=task)
        return in_files(base, files, target, batches, threads, turns=turns, seconds=seconds)


def float32(task: Task, data: Any, folder: Path, examples: int) -> Recorder:
    """The float32 model on the CPU, called with so many examples of the data, and its export `folder`/float32.onnx."""
    base = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
    with torch.no_grad():
        call_model(base, to_device(first_batch(data, examples)[0], "cpu"))
    write_file("onnx", folder, base, folder / "float32.onnx", slim=False)
    return base


def in_files(
    base: Recorder,
    files: Mapping[int, Path],
    target: str,
    batches: Sequence[int],
    threads: int,
    *,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
) -> dict[int, tuple[Latency, ...]]:
    """As `measure`, of files that are there; `base` is what `float32` gave."""
    sessions = {number: session_of(file, threads) for number, file in files.items()}
    whole = session_of(base.folder / "float32.onnx", threads)
    found: dict[int, list[Latency]] = {number: [] for number in files}
    for size in batches:
        inputs = resized(base.first(size), size)
        calls = {"float32": call_of(whole, inputs), **{str(n): call_of(s, inputs) for n, s in sessions.items()}}
        times = in_turns(calls, turns=turns, seconds=seconds)
        _, middle, _ = times["float32"].quartiles
        for number, file in files.items():
            low, median, high = times[str(number)].quartiles
            ratio = times[str(number)].over(times["float32"])
            length = file.stat().st_size
            found[number].append(Latency(target, size, threads, median, low, high, middle, ratio, length))
    return {number: tuple(latencies) for number, latencies in found.items()}


def resized(inputs: Named, size: int) -> Named:
    """The inputs of so many examples, repeated where there are fewer."""
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}


def call_of(session: Session, inputs: Named) -> Call:
    """A call of the session."""
    feed = session.feed(inputs)
    return lambda: session.run(None, feed)
