"""An artifact -> a file for its target, verified on the whole test set, and a manifest that tells the truth."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from autocompress.codec import container
from autocompress.compress.artifact import load
from autocompress.compress.ranges import attached
from autocompress.deploy import latency, verify
from autocompress.deploy.files import FILES, QUANTIZED, write_file
from autocompress.deploy.int8_choose import Choosing
from autocompress.deploy.recorder import (
    Recorder,
    arrays_of,
    call_module,
    examples_of,
    output_tensors,
    structured,
)
from autocompress.errors import ExportError, UsageError
from autocompress.tasks.batches import finite_metric, metric_name, predict

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

_TURNS, _MOST_SECONDS = 15, 10.0
_BATCH = 256
_SMALL_BATCHES = (1, 64)


def export(
    artifact: Path,
    task: Task,
    fmt: str,
    out: Path,
    facts: Mapping[str, Any],
    *,
    effort: str | None = None,
    batch: int = 1,
    decided: Mapping[str, Any] | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """The manifest of the files written to the folder `out`: one of `FILES` and manifest.json.

    The file is made from `artifact` alone (`task.model` gives the architecture) and compared with it on the whole
    of `task.test` before anything appears in `out`; other files there are left alone. `facts` (plain JSON) go into
    the manifest as "recorded". `effort` codes an archive anew. A call of `batch` examples is timed, unless `timed` is
    false; by such calls the forms of 8-bit layers are chosen, unless they were `decided` (`int8_choose.decided_in`).
    Raises ExportError where the export fails, does not do what the artifact does or cannot be written,
    UsageError for an unknown format, ArtifactError for a damaged artifact.
    """
    if fmt not in FILES:
        raise UsageError(f"unknown export format {fmt!r}; allowed: {', '.join(FILES)}")
    if effort is not None and effort not in container.EFFORTS:
        raise UsageError(f"effort is {effort!r}, allowed: {', '.join(container.EFFORTS)}")
    if effort is not None and fmt != "archive":
        raise UsageError(f"effort is {effort!r} and the format {fmt!r}: only the format archive can be coded anew")
    module = load(artifact, model=task.model)
    with _staging(Path(out)) as folder, tempfile.TemporaryDirectory(prefix="autocompress-") as calls:
        recorder = Recorder(module, Path(calls))
        outputs, targets = predict(recorder, task.test, batch_size=_BATCH)
        for size in _SMALL_BATCHES:
            recorder.run(f"batch-{size:06d}", recorder.first(size))
        file = folder / FILES[fmt]
        choosing = Choosing(batch, decided)
        details = write_file(fmt, artifact, recorder, file, effort, task=task, choosing=choosing)
        runtime = _run(fmt, task, recorder, file)
        expected = finite_metric(task, outputs, targets, "test")
        checks = _compared(task, recorder, expected, targets, file, quantized=fmt in QUANTIZED)
        if "batch" in details:
            checks["batch_sizes"] = _in_parts(checks["batch_sizes"], details["batch"])
        if timed:
            checks["latency"] = _latency(task, fmt, file, Path(calls), batch)
        manifest = {
            "format": fmt,
            "file": file.name,
            "size_bytes": file.stat().st_size,
            "sha256": _sha256(file),
            "artifact": {"size_bytes": artifact.stat().st_size, "sha256": _sha256(artifact)},
            "float32_model_bytes": (facts.get("baseline") or {}).get("size_bytes"),
            **details,
            "verification": {
                "metric": metric_name(task),
                **checks,
                "runtime": runtime,
                "fresh_process": fmt != "archive",
            },
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "recorded": dict(facts),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _publish(folder, Path(out))
    return manifest


def _run(fmt: str, task: Task, recorder: Recorder, file: Path) -> str:
    """Runs the recorded calls through the written file; the runtime and its version."""
    if fmt == "mlflow":
        from autocompress.tracking.register import RUNNER

        return verify.run_apart(str(RUNNER), file, recorder.folder, keywords=recorder.keywords)
    if fmt != "archive":
        return verify.run_apart(fmt.removesuffix("-int8"), file, recorder.folder, keywords=recorder.keywords)
    from autocompress import __version__

    module = load(file, model=task.model)

    def run(inputs: Mapping[str, NDArray[Any]]) -> verify.Arrays:
        tensors = output_tensors(recorder.model, call_module(module, dict(inputs), recorder.keywords))
        return list(arrays_of(recorder.model, "output", tensors).values())

    verify.run_calls(recorder.folder, run)
    return f"autocompress {__version__}, torch {torch.__version__}"


def _latency(task: Task, fmt: str, file: Path, folder: Path, batch: int) -> dict[str, Any]:
    """What the manifest says of a call in the format's runtime, beside the float32 model's export there."""
    base = latency.float32(task, task.test, folder, [batch], 1, fmt=fmt)
    ((found,),) = latency.in_files(base, {0: file}, fmt, 1, turns=_TURNS, most=_MOST_SECONDS).values()
    return {
        "batch": found.batch,
        "threads": None if fmt.startswith("executorch") else found.threads,  # it takes as many as it likes
        "seconds": found.median,
        "quartiles": [found.low, found.high],
        "float32_seconds": found.baseline,
        "ratio": found.ratio,
    }


def _compared(
    task: Task, recorder: Recorder, expected: float, targets: Any, file: Path, *, quantized: bool = False
) -> dict[str, Any]:
    """The figures of the comparison. Raises ExportError where the file does not do what the artifact does."""
    exact = file.name == FILES["archive"]
    stepped = bool(attached(recorder.module))  # a last bit may tip an input over to the next level: few do
    found = {call: verify.load_outputs(recorder.folder, call) for call in recorder.outputs}
    difference = largest = 0.0
    for call, outputs in recorder.outputs.items():
        for (name, wanted), got in zip(outputs.items(), found[call], strict=True):
            if not exact and wanted.dtype.kind != "f":
                continue  # a class number may tip over between two equal scores: the metric tells whether it matters
            gap, scale = verify.largest_difference(wanted, got), float(np.abs(wanted).max(initial=0.0))
            held = verify.mean_difference(wanted, got) if stepped and not exact else gap
            close = held <= (0.0 if exact else verify.OUTPUT_TOLERANCE * scale)
            if not (np.isfinite(gap) if quantized else close):
                raise ExportError(
                    f"{file.name} does not compute what the artifact does: {name!r} differs by {gap:.3g} at batch size "
                    f"{len(wanted)}, its largest value is {scale:.3g}"
                )
            difference, largest = max(difference, gap), max(largest, scale)
    joined = [
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*(found[c] for c in recorder.tests), strict=True)
    ]
    metric = finite_metric(task, structured(recorder.structure, joined), targets, "test")
    agree = verify.metrics_agree(expected, metric)
    if not (verify.quantized_metric_holds(expected, metric, task.direction) if quantized else agree):
        raise ExportError(
            f"{file.name} has a test {metric_name(task)} of {metric:.6g}, the artifact has {expected:.6g}"
        )
    sizes = {examples_of(recorder.model, verify.load_inputs(recorder.folder, call)) for call in recorder.outputs}
    return {
        "examples": recorder.examples,
        "batch_sizes": sorted(sizes),
        "metric_artifact": expected,
        "metric_exported": metric,
        "metric_difference": metric - expected,
        "max_abs_difference": difference,
        "max_abs_output": largest,
    }


def _in_parts(sizes: Sequence[int], batch: Mapping[str, Any]) -> list[int]:
    """The sizes of the calls that calls of these sizes became for a program of a largest or fixed batch."""
    most = int(batch.get("fixed") or batch["max"])
    return sorted({part for size in sizes for part in (min(size, most), size % most) if part})


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder on the same file system as `out`, gone at the end."""
    try:
        base = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not base.is_dir():
            raise NotADirectoryError(0, f"{base} is a file")
        folder = Path(tempfile.mkdtemp(prefix=".autocompress-", dir=base))
    except OSError as error:
        raise ExportError(f"cannot write to folder {str(out)!r}: {error.strerror or error}") from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"the export to {str(out)!r} failed: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Moves the files to `out`; at no time does a manifest there speak of others. What fails puts the old ones back."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == "manifest.json")
    old = folder / ".old"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (out / name).is_dir():
                raise IsADirectoryError(0, f"its {name} is a folder")
        old.mkdir()
        try:
            for name in reversed(names):
                if (out / name).exists():
                    os.replace(out / name, old / name)
            for name in names:
                os.replace(folder / name, out / name)
        except BaseException:  # a signal too
            for name in names:
                if (old / name).exists():
                    os.replace(old / name, out / name)
                elif not (folder / name).exists():
                    (out / name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"cannot write to folder {str(out)!r}: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
