"""How long a call of exported files takes beside the float32 model's export: in turns, on one and the same machine."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autocompress.compress.artifact import load
from autocompress.deploy.export import Named, Recorder, write_file
from autocompress.errors import ExportError, UsageError
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device
from autocompress.tasks.wording import one_line

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

TURNS = 30
"""Of each file for a batch size."""
TURN_SECONDS = 0.02
"""Of a turn, after as long to warm up; at least three calls each."""
_FEWEST = 3
MOST = {"batch": 65536, "threads": 1024}
"""The largest values allowed."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """Seconds of a call, the median of each turn; in round i each file has its turn i."""

    medians: tuple[float, ...]

    def over(self, other: Turns) -> float:
        """The median ratio of turns of the same round."""
        return statistics.median(a / b for a, b in zip(self.medians, other.medians, strict=True))

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first, the median and the last."""
        low, middle, high = statistics.quantiles(self.medians, n=4, method="inclusive")
        return low, middle, high


def in_turns(calls: Mapping[str, Call], *, turns: int = TURNS, seconds: float = TURN_SECONDS) -> dict[str, Turns]:
    """By name the times of calls that take turns, warm in each: the order goes round, so that none is always first."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _timed(calls[name], seconds)
            found[name].append(statistics.median(_timed(calls[name], seconds)))
    return {name: Turns(tuple(medians)) for name, medians in found.items()}


def _timed(call: Call, seconds: float) -> list[float]:
    """Seconds of single calls, for about so long in all."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _FEWEST or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def measure(
    task: Task,
    artifacts: Mapping[int, Path],
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
) -> dict[int, tuple[Latency, ...]]:
    """By trial the latencies of its artifact's ONNX file in onnxruntime, one for each batch size.

    Inputs are the first test examples, repeated where there are fewer. Raises ExportError for what cannot be
    exported or run, UsageError for batch sizes and threads beyond `MOST`.
    """
    for what, value in (("threads", threads), *(("batch", size) for size in batches)):
        if not 1 <= value <= MOST[what]:
            raise UsageError(f"{what} is {value}, allowed: 1 to {MOST[what]}")
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        base = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
        with torch.no_grad():
            call_model(base, to_device(first_batch(task.test, max(batches))[0], "cpu"))
        inputs = {size: _resized(base.first(size), size) for size in batches}
        files = {"float32": folder / "float32.onnx"}
        write_file("onnx", folder, base, files["float32"], slim=False)
        for number, artifact in artifacts.items():
            recorder = Recorder(load(artifact, model=task.model), folder, keywords=base.keywords)
            recorder.run("example", base.first(2))
            files[str(number)] = folder / f"{number}.onnx"
            write_file("onnx", artifact, recorder, files[str(number)])
        sessions = {name: _session(file, threads) for name, file in files.items()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        found: dict[int, list[Latency]] = {number: [] for number in artifacts}
        for size in batches:
            calls = {name: _call(session, inputs[size]) for name, session in sessions.items()}
            times = in_turns(calls, turns=turns, seconds=seconds)
            _, whole, _ = times["float32"].quartiles
            for number in artifacts:
                low, median, high = times[str(number)].quartiles
                ratio = times[str(number)].over(times["float32"])
                found[number].append(
                    Latency("onnx", size, threads, median, low, high, whole, ratio, sizes[str(number)])
                )
    return {number: tuple(latencies) for number, latencies in found.items()}


def _resized(inputs: Named, size: int) -> Named:
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in inputs.items()}


def _session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ExportError(f"onnxruntime does not load {file.name}: {one_line(error)}") from error


def _call(session: Any, inputs: Named) -> Call:
    names = {value.name for value in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in names}
    return lambda: session.run(None, feed)
