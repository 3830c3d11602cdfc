"""How long a call of one file takes in onnxruntime, and how much memory: any ONNX file, or an archive as ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from autocompress.deploy import latency
from autocompress.deploy.macs import macs
from autocompress.deploy.made_up import check_lengths, fixed_batch, made_up
from autocompress.deploy.memory import peak_bytes
from autocompress.deploy.sessions import session_of
from autocompress.deploy.turns import TURN_SECONDS, TURNS, in_turns
from autocompress.deploy.verify import save_inputs
from autocompress.timing import BATCHES

if TYPE_CHECKING:
    from autocompress.tasks.task import Task


@dataclass(frozen=True)
class Times:
    """A call at one batch size: seconds, the median and the quartiles on either side, and peak bytes of memory.

    Of the baseline, if there is one, its median and memory; `ratio` is the median ratio of turns of the same round.
    """

    batch: int
    median: float
    low: float
    high: float
    memory_bytes: int | None
    ratio: float | None = None
    baseline: float | None = None
    baseline_memory_bytes: int | None = None


@dataclass(frozen=True)
class FileTimes:
    """A file, what was timed beside it, MACs of an example where they are known, and its times.

    Of an archive, size and times are those of its export for the target.
    """

    file: str
    archive: bool
    size_bytes: int
    target: str
    threads: int
    macs: int | None
    times: tuple[Times, ...]
    baseline: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For `bench --json`."""
        return asdict(self)


def times_of_onnx(
    file: Path,
    *,
    baseline: Path | None = None,
    batches: Sequence[int] | None = None,
    threads: int = 1,
    lengths: Mapping[str, int] | None = None,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
) -> FileTimes:
    """The times of an ONNX file with inputs made up from its graph, in turns with `baseline`'s if that is given.

    `batches`: `timing.BATCHES`, or the one size that the file takes. `lengths` as in `made_up`; errors as there and as
    of `check_lengths`, ExportError for a file that onnxruntime does not load or run, UsageError for batch sizes and
    threads beyond `latency.MOST`.
    """
    latency.check(batches or BATCHES, threads)
    files = {"file": file, **({"baseline": baseline} if baseline else {})}
    sessions = {name: session_of(path, threads) for name, path in files.items()}
    inputs = {name: session.inner.get_inputs() for name, session in sessions.items()}
    check_lengths([value for values in inputs.values() for value in values], lengths or {})
    only = fixed_batch(inputs["file"])
    found = []
    for size in batches or ((only,) if only else BATCHES):
        feeds = {name: made_up(inputs[name], size, lengths or {}) for name in files}
        calls = {name: partial(session.run, None, feeds[name]) for name, session in sessions.items()}
        for call in calls.values():
            call()  # what cannot run says so before anything is timed
        times = in_turns(calls, turns=turns, seconds=seconds)
        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            stored = {name: save_inputs(Path(folder), name, feed) for name, feed in feeds.items()}
            held = {name: peak_bytes(path, stored[name], threads) for name, path in files.items()}
        low, median, high = times["file"].quartiles
        other: tuple[Any, ...] = ()
        if baseline:
            other = times["file"].over(times["baseline"]), times["baseline"].quartiles[1], held["baseline"]
        found.append(Times(size, median, low, high, held["file"], *other))
    size_bytes, count = _told(file, lengths or {})
    beside = str(baseline) if baseline else None
    return FileTimes(str(file), False, size_bytes, "onnx", threads, count, tuple(found), beside)


def times_of_archive(
    archive: Path, task: Task, *, target: str = "onnx", batches: Sequence[int] = BATCHES, threads: int = 1
) -> FileTimes:
    """The times of an archive's export for the target beside the float32 model's. Errors as in `latency.measure`."""
    found = latency.measure(task, {0: archive}, target=target, batches=batches, threads=threads)[0]
    times = tuple(Times(**{each.name: getattr(one, each.name) for each in fields(Times)}) for one in found)
    first = found[0]
    return FileTimes(str(archive), True, first.size_bytes, target, threads, first.macs, times, "the float32 model")


def _told(file: Path, lengths: Mapping[str, int]) -> tuple[int, int | None]:
    """Bytes of the file and of those that it names, and MACs of an example where its graph tells them."""
    size = file.stat().st_size
    try:
        model = onnx.load(file, load_external_data=False)
        entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
        size += sum((file.parent / name).stat().st_size for name in {e.value for e in entries if e.key == "location"})
        return size, macs(model, lengths)
    except Exception:  # no rule for an operator, or onnx does not understand what onnxruntime runs
        return size, None
