"""`bench FILE`: what kind of file it is, its times, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import UsageError
from autocompress.timing import BATCHES

if TYPE_CHECKING:
    from rich.table import Table

    from autocompress.deploy.file_times import FileTimes


def bench_file(
    file: str | Path,
    *,
    task: str | None = None,
    baseline: str | Path | None = None,
    target: str | None = None,
    batches: Sequence[int] | None = None,
    threads: int = 1,
    lengths: Mapping[str, int] | None = None,
    data_dir: str | None = None,
) -> FileTimes:
    """The times of an ONNX file beside `baseline`'s, or of an archive of `task` exported for `target` ("onnx").

    An archive's are beside the float32 model's. Raises UsageError for options that do not go with the kind of file,
    and as `deploy.file_times` does.
    """
    path = Path(file)
    with path.open("rb") as opened:
        archive = opened.read(3) == b"ACZ"
    wrong = {"baseline": baseline, "dim": lengths} if archive else {"task": task, "target": target}
    for option, value in wrong.items():
        if value:
            kind = "an archive, timed beside the float32 model's export" if archive else "no archive"
            raise UsageError(f"--{option} is {_shown(value)}, but {str(file)!r} is {kind}")
    if archive and task is None:
        raise UsageError(f"{str(file)!r} is an archive: say with --task what makes its model")
    if not archive and path.suffix != ".onnx":
        raise UsageError(f"{str(file)!r} is neither an archive nor a file that ends in .onnx")
    if baseline is not None and not Path(baseline).is_file():
        raise UsageError(f"file {str(baseline)!r} of --baseline does not exist")
    from autocompress.deploy.file_times import times_of_archive, times_of_onnx

    if task is None:
        beside = None if baseline is None else Path(baseline)
        return times_of_onnx(path, baseline=beside, batches=batches, threads=threads, lengths=lengths)
    from autocompress.deploy import latency
    from autocompress.origins import load_origin, origin_of
    from autocompress.tasks.checking import check_task

    latency.check(batches or BATCHES, threads)
    loaded = load_origin(origin_of(task, data_dir))
    check_task(loaded)
    return times_of_archive(path, loaded, target=target or "onnx", batches=batches or BATCHES, threads=threads)


def _shown(value: object) -> str:
    return " ".join(f"{name}={length}" for name, length in value.items()) if isinstance(value, Mapping) else repr(value)


def bench_summary(found: FileTimes) -> str:
    """One line: the file, its bytes, MACs and threads."""
    from autocompress.report import human_bytes, human_count

    macs = "" if found.macs is None else f", {human_count(found.macs)} MACs an example"
    what = f" as {found.target}" if found.archive else ""
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    return f"{found.file}{what}: {human_bytes(found.size_bytes)}{macs}, {threads}"


def bench_table(found: FileTimes) -> Table:
    """Milliseconds and memory by batch size, and the baseline's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from autocompress.report import human_bytes

    def memory(count: int | None) -> str:
        return "-" if count is None else human_bytes(count)

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    beside = ("its ms", "its memory", "ratio") if found.baseline else ()
    for header in ("batch", "ms", "+-", "memory", *beside):
        table.add_column(header, justify="right")
    for one in found.times:
        spread = f"{100 * (one.high - one.low) / 2 / one.median:.0f} %"
        cells = [str(one.batch), f"{1e3 * one.median:.3g}", spread, memory(one.memory_bytes)]
        if one.baseline is not None and one.ratio is not None:
            cells += [f"{1e3 * one.baseline:.3g}", memory(one.baseline_memory_bytes), f"{one.ratio:.2f}x"]
        table.add_row(*cells)
    return table
