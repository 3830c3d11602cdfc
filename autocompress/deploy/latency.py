"""How long a call of exported files takes beside the float32 model's export: in turns, on one and the same machine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autocompress.compress.artifact import load
from autocompress.deploy.export import write_file
from autocompress.deploy.memory import peak_bytes
from autocompress.deploy.recorder import Named, Recorder
from autocompress.deploy.sessions import Session, session_of
from autocompress.deploy.turns import TURN_SECONDS, TURNS, Call, in_turns
from autocompress.deploy.verify import save_inputs
from autocompress.errors import UsageError
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

TARGETS = ("onnx", "onnx-int8")
"""Formats that can be timed, in onnxruntime."""
MOST = {"batch": 65536, "threads": 1024}
"""The largest values allowed."""


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
    exported or run, UsageError for a target that is not one of `TARGETS`, batch sizes and threads beyond `MOST`.
    """
    if target not in TARGETS:
        raise UsageError(f"target is {target!r}, allowed: {', '.join(TARGETS)}")
    check(batches, threads)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        base = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
        with torch.no_grad():
            call_model(base, to_device(first_batch(task.test, max(batches))[0], "cpu"))
        inputs = {size: _resized(base.first(size), size) for size in batches}
        files = {"float32": folder / "float32.onnx"}
        write_file("onnx", folder, base, files["float32"], slim=False)
        macs: dict[int, int | None] = {}
        for number, artifact in artifacts.items():
            recorder = Recorder(load(artifact, model=task.model), folder, keywords=base.keywords)
            recorder.run("example", base.first(2))
            files[str(number)] = folder / f"{number}.onnx"
            details = write_file(target, artifact, recorder, files[str(number)], task=task)
            macs[number] = details.get("cut", {}).get("macs")
        sessions = {name: session_of(file, threads) for name, file in files.items()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        found: dict[int, list[Latency]] = {number: [] for number in artifacts}
        for size in batches:
            calls = {name: _call(session, inputs[size]) for name, session in sessions.items()}
            times = in_turns(calls, turns=turns, seconds=seconds)
            _, whole, _ = times["float32"].quartiles
            save_inputs(folder, "timed", inputs[size])
            held = {name: peak_bytes(file, folder / "timed.inputs.npz", threads) for name, file in files.items()}
            for number in artifacts:
                low, median, high = times[str(number)].quartiles
                ratio = times[str(number)].over(times["float32"])
                told = held[str(number)], held["float32"], macs[number]
                found[number].append(
                    Latency(target, size, threads, median, low, high, whole, ratio, sizes[str(number)], *told)
                )
    return {number: tuple(latencies) for number, latencies in found.items()}


def check(batches: Sequence[int], threads: int) -> None:
    """Raise UsageError for batch sizes and threads beyond `MOST`."""
    for what, value in (("threads", threads), *(("batch", size) for size in batches)):
        if not 1 <= value <= MOST[what]:
            raise UsageError(f"{what} is {value}, allowed: 1 to {MOST[what]}")


def _resized(inputs: Named, size: int) -> Named:
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}


def _call(session: Session, inputs: Named) -> Call:
    feed = session.feed(inputs)
    return lambda: session.run(None, feed)
