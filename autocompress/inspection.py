"""What a task holds (the preflight without a search) and what a file holds (where its bytes are)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from autocompress.preflight import Preflight


@dataclass(frozen=True)
class FileRow:
    """One tensor of an artifact and where its bytes are.

    `mask_bytes` tell where it is zero, `code_bytes` which values stand elsewhere, `table_bytes` what
    the codes mean (see `codec.container.Sizes`). `entropy_bytes`: mask and codes at the order-0
    entropy of the symbols, None where there are none. `plain_bytes`: the tensor in float32, or as it
    is where it is no float.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    mask_bytes: int
    code_bytes: int
    table_bytes: int
    entropy_bytes: int | None
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
    from autocompress.codec.tensors import Coded
    from autocompress.compress.artifact import SCALE, opened

    rows = []
    with opened(path) as archive:
        for name, entry in archive.entries.items():
            tensor = archive.tensor(name)
            sizes = archive.sizes(name, tensor)
            entropy = _entropy_bytes(tensor.symbols) if isinstance(tensor, Coded) else None
            width = 4 if "float" in entry.dtype else max(1, int("".join(filter(str.isdigit, entry.dtype)) or 8) // 8)
            plain = 0 if name.endswith(SCALE) else entry.elements * width  # the uncompressed model has no scales
            shares = sizes.mask, sizes.codes, sizes.table, entropy, plain
            rows.append(FileRow(name, entry.kind, entry.dtype, entry.shape, entry.length, *shares))
    used = sum(row.size_bytes for row in rows)
    return FileReport(str(path), archive.size, archive.size - used, tuple(rows), archive.header)


def _entropy_bytes(symbols: NDArray[np.uint16]) -> int:
    """Bytes of the symbols at the entropy of their histogram."""
    import numpy as np

    counts = np.bincount(symbols.reshape(-1))
    counts = counts[counts > 0]
    return math.ceil(float(-(counts * np.log2(counts / max(1, symbols.size))).sum()) / 8)


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
    for column in ("tensor", "kind", "shape", "bytes", "mask", "codes", "table", "entropy", "float32", "bits a value"):
        table.add_column(column, justify="left" if column in ("tensor", "kind", "shape") else "right")
    for row in found.rows:
        bits = 8 * row.size_bytes / max(1, math.prod(row.shape))
        shape = "x".join(map(str, row.shape))
        name = Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in row.name))  # may be anything: no markup
        shares = (row.size_bytes, row.mask_bytes, row.code_bytes, row.table_bytes, row.entropy_bytes)
        told = ["" if share is None else str(share) for share in shares]
        table.add_row(name, row.kind, shape, *told, human_bytes(row.plain_bytes), f"{bits:.2f}")
    table.add_row("(header)", "", "", str(found.header_bytes))
    rows = found.rows
    sums = [sum(each) for each in zip(*((r.mask_bytes, r.code_bytes, r.table_bytes) for r in rows), strict=True)]
    table.add_row("(all)", "", "", str(found.size_bytes), *map(str, sums))
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
    from autocompress.search.continuation import is_continuable
    from autocompress.search.space_file import load_space, read_space
    from autocompress.tasks.checking import check_task
    from autocompress.trial import Workbench

    api.check_numbers(trials, 0, epochs)
    cluster = engine.plan_cluster(workers)
    read_space(space)  # a task may take long to load
    loaded = load_origin(origin_of(task, data_dir))
    check_task(loaded)
    bench = Workbench(loaded)
    found = load_space(space, bench.layers, bench.rank_errors)
    found, _ = preflight.where_seen(found, bench)
    found, _ = preflight.where_cut(found, bench)
    preflight.check_space(found, bench)
    sweep = preflight.sweep_trials(trials, cluster.workers) if is_continuable(found) else 0
    return preflight.preflight(
        bench,
        found,
        trials=trials,
        workers=cluster.workers,
        threads=cluster.threads,
        epochs=bench.default_epochs if epochs is None else epochs,
        rungs=len(api.RUNGS),
        startup=True,
        unstopped=sweep or preflight.uniform_steps(trials),
    )
