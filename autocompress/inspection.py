"""What a task holds (the preflight without a search) and what a file holds (where its bytes are)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from autocompress.preflight import Preflight


@dataclass(frozen=True)
class FileRow:
    """One tensor of an artifact. `plain_bytes`: in float32, or as it is where it is no float."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    plain_bytes: int


@dataclass(frozen=True)
class FileReport:
    """An artifact: its rows and header. `header_bytes` is all that is no tensor."""

    path: str
    size_bytes: int
    header_bytes: int
    rows: tuple[FileRow, ...]
    header: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_file(path: Path) -> FileReport:
    """Where the bytes of an artifact are. Raises ArtifactError for a file that does not decode."""
    from autocompress.codec import header
    from autocompress.compress.artifact import read

    decoded = read(path)
    data = path.read_bytes()
    rows = []
    for entry in header.read(data).entries:
        width = 4 if "float" in entry.dtype else max(1, int("".join(filter(str.isdigit, entry.dtype)) or 8) // 8)
        rows.append(FileRow(entry.name, entry.kind, entry.dtype, entry.shape, entry.length, entry.elements * width))
    used = sum(row.size_bytes for row in rows)
    return FileReport(str(path), len(data), len(data) - used, tuple(rows), decoded.header)


def file_summary(found: FileReport) -> str:
    """One line: the file, its bytes, and how many times smaller than its float32 values it is."""
    plain = sum(row.plain_bytes for row in found.rows)
    return f"{found.path}: {found.size_bytes} bytes, {plain / found.size_bytes:.1f}x smaller than its float32 values"


def file_table(found: FileReport) -> Table:
    """The report for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from autocompress.report import human_bytes

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "kind", "shape", "bytes", "float32", "bits a value"):
        table.add_column(column, justify="left" if column in ("tensor", "kind", "shape") else "right")
    for row in found.rows:
        bits = 8 * row.size_bytes / max(1, math.prod(row.shape))
        shape = "x".join(map(str, row.shape))
        name = Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in row.name))  # may be anything: no markup
        table.add_row(name, row.kind, shape, str(row.size_bytes), human_bytes(row.plain_bytes), f"{bits:.2f}")
    table.add_row("(header)", "", "", str(found.header_bytes), "", "")
    return table


def inspect_task(
    task: str,
    *,
    space: str | None = None,
    trials: int = 40,
    workers: int | None = None,
    epochs: float | None = None,
    data_dir: str | None = None,
) -> Preflight:
    """The preflight of a search that is not run. Raises TaskError, SpaceError and UsageError as `search` does."""
    from autocompress import api, engine, preflight
    from autocompress.origins import load_origin, origin_of
    from autocompress.search.space_file import load_space
    from autocompress.tasks.checking import check_task
    from autocompress.trial import Workbench

    api.check_numbers(trials, 0, epochs)
    cluster = engine.plan_cluster(workers)
    loaded = load_origin(origin_of(task, data_dir))
    check_task(loaded)
    bench = Workbench(loaded)
    return preflight.preflight(
        bench,
        load_space(space, bench.layers),
        trials=trials,
        workers=cluster.workers,
        threads=cluster.threads,
        epochs=bench.default_epochs if epochs is None else epochs,
        rungs=len(api.RUNGS),
        startup=True,
    )
