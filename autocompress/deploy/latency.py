"""How long a call of exported files takes beside the float32 model's export: in turns, on one and the same machine."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autocompress.compress.artifact import load
from autocompress.deploy.files import FILES, write_file
from autocompress.deploy.int8_choose import Choosing
from autocompress.deploy.memory import peak_bytes
from autocompress.deploy.recorder import Named, Recorder, call_module
from autocompress.deploy.sessions import session_of
from autocompress.deploy.turns import MOST_SECONDS, TURN_SECONDS, TURNS, Call, Turns, in_turns
from autocompress.deploy.verify import runner, save_inputs
from autocompress.errors import AutocompressError, ExportError, UsageError
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device
from autocompress.tasks.wording import one_line
from autocompress.timing import BATCHES, FORMATS

if TYPE_CHECKING:
    from torch import nn

    from autocompress.tasks.task import Task

MOST = {"batch": 65536, "threads": 1024}
"""The largest values allowed."""

Loaded = Callable[[Named], Call]
"""A file in its runtime: a call of it with some inputs."""


@dataclass(frozen=True)
class Float32:
    """The float32 model's export, that other files are timed beside, loaded, and the inputs: by batch size, and two
    examples. They are passed by name if `keywords`. `model` gives an archive its architecture.
    """

    file: Path
    loaded: Loaded
    inputs: Mapping[int, Named]
    example: Named
    keywords: bool
    model: nn.Module


def measure(
    task: Task,
    artifacts: Mapping[int, Path],
    *,
    target: str = "onnx",
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
    batch: int = 1,
    decided: Mapping[int, Any] | None = None,
) -> dict[int, tuple[Latency, ...]]:
    """By trial the latencies of its artifact's file for the target in onnxruntime, one for each batch size.

    `batch` and, by trial, `decided` are as in `export`.
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
            choosing = Choosing(batch, (decided or {}).get(number))
            details = write_file(target, artifact, recorder, files[number], task=task, choosing=choosing)
            macs[number] = details.get("cut", {}).get("macs")
        found = in_files(base, files, target, threads, turns=turns, seconds=seconds)
        return _with_memory(base, files, found, macs, threads)


def check(batches: Sequence[int], threads: int) -> None:
    """Raise UsageError for batch sizes and threads beyond `MOST`."""
    for what, value in (("threads", threads), *(("batch", size) for size in batches)):
        if not 1 <= value <= MOST[what]:
            raise UsageError(f"{what} is {value}, allowed: 1 to {MOST[what]}")


def float32(task: Task, data: Any, folder: Path, batches: Sequence[int], threads: int, *, fmt: str = "onnx") -> Float32:
    """The float32 model's export in the folder, with the first examples of the data, repeated where there are fewer.

    Of a format that quantizes, the one of its runtime that does not; beside an archive the model itself. Raises
    ExportError.
    """
    recorder = Recorder(copy.deepcopy(task.model).cpu().eval(), folder)
    with torch.no_grad():
        call_model(recorder, to_device(first_batch(data, max(batches))[0], "cpu"))
    kind = "onnx" if fmt == "mlflow" else fmt.removesuffix("-int8")
    file = folder / f"float32-{FILES[kind]}"
    if kind == "archive":
        loaded: Loaded = partial(_module_call, recorder.module, recorder.keywords)
    else:
        write_file(kind, folder, recorder, file, slim=False)
        loaded = _in_runtime(kind, file, recorder.keywords, threads)
    inputs = {size: recorder.repeated(size) for size in batches}
    return Float32(file, loaded, inputs, recorder.repeated(2), recorder.keywords, task.model)


def seconds_of(base: Float32) -> float:
    """The median time of a call of the baseline alone, of its first batch size."""
    times = _timed({"float32": base.loaded}, next(iter(base.inputs.values())), 1)
    return times["float32"].quartiles[1]


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
    loaded = {str(number): _loaded(target, file, base, threads) for number, file in files.items()}
    loaded["float32"] = base.loaded
    found: dict[int, list[Latency]] = {number: [] for number in files}
    for size, inputs in base.inputs.items():
        times = _timed(loaded, inputs, threads, turns=turns, seconds=seconds, most=most)
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


def _loaded(fmt: str, file: Path, base: Float32, threads: int) -> Loaded:
    """A file of that format in its runtime. Raises ExportError."""
    if fmt == "archive":
        return partial(_module_call, load(file, model=base.model), base.keywords)
    return _in_runtime(fmt, file, base.keywords, threads)


def _in_runtime(fmt: str, file: Path, keywords: bool, threads: int) -> Loaded:
    if file.suffix == ".onnx":
        session = session_of(file, threads)
        return lambda inputs: partial(session.run, None, session.feed(inputs))
    with _threads(threads), _told(file):  # the runner sets torch's
        run, _ = runner(fmt.removesuffix("-int8"), str(file), keywords)
    return lambda inputs: partial(run, inputs)


def _module_call(module: nn.Module, keywords: bool, inputs: Named) -> Call:
    return partial(call_module, module, inputs, keywords)


def _timed(loaded: Mapping[str, Loaded], inputs: Named, threads: int, **how: Any) -> dict[str, Turns]:
    """The times of calls that take turns. Raises ExportError for what cannot run them."""
    calls = {name: made(inputs) for name, made in loaded.items()}
    with _threads(threads), _told("the exported file"):
        return in_turns(calls, **how)


@contextlib.contextmanager
def _told(file: Path | str) -> Iterator[None]:
    """What a runtime raises in here is an ExportError."""
    try:
        yield
    except AutocompressError:
        raise
    except Exception as error:  # the runtimes' own exceptions have no common base
        name = file if isinstance(file, str) else f"the exported {file.name}"
        raise ExportError(f"{name} does not run: {one_line(error)}") from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch computes on so many threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
