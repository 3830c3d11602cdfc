"""The sizes that `autocompress search TASK --sampler continuation` finds at given errors, over several seeds.

    python scripts/bench_continuation.py mnist-lenet300 --errors 1.58 1.9 --trials 100 --epochs 4 --seeds 3

Each seed is one search from the command line, as a user would start it. For each error the smallest file whose
validation error is at most that is taken; its test error is what is reported beside its bytes. Searches that are
there already (in --dir) are not run again, so that a table can be printed anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from autocompress import open_study
from autocompress.record import StudyRecord


@dataclass(frozen=True)
class Point:
    """A file of a front: bytes, and errors in per cent."""

    size: int
    val: float
    test: float


def chosen(record: StudyRecord, error: float) -> Point | None:
    """The smallest file of the front whose validation error, in per cent, is at most `error`."""
    points = [
        Point(t.best.size_bytes, 100 * (1 - t.best.metric_val), 100 * (1 - t.metric_test))
        for t in record.front
        if t.best is not None and t.metric_test is not None
    ]
    return min((p for p in points if p.val <= error + 1e-9), key=lambda p: p.size, default=None)


def searched(options: argparse.Namespace, seed: int) -> tuple[StudyRecord, float | None]:
    """The study of that seed, and the seconds that it took if it was run now."""
    name = f"{options.task}-{options.sampler}-{options.trials}x{options.epochs:g}-{seed}"
    began, seconds = time.monotonic(), None
    if not (options.dir / "studies" / name / "study.db").exists():
        command = [sys.executable, "-m", "autocompress.cli", "search", options.task, "--sampler", options.sampler]
        command += ["--trials", str(options.trials), "--finetune-epochs", str(options.epochs), "--seed", str(seed)]
        subprocess.run([*command, "--study", name, "--dir", str(options.dir)], check=True, stdout=sys.stderr)
        seconds = time.monotonic() - began
    return open_study(name, dir=options.dir).record, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a built-in task whose metric is an accuracy")
    parser.add_argument("--errors", type=float, nargs="+", default=[1.58, 1.9], help="validation errors in per cent")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sampler", default="continuation")
    parser.add_argument("--dir", type=Path, default=Path("continuation_runs"))
    options = parser.parse_args()
    found: dict[float, list[Point]] = {error: [] for error in options.errors}
    for seed in range(options.seeds):
        record, seconds = searched(options, seed)
        base = record.baseline
        assert base is not None
        assert base.best is not None
        assert base.metric_test is not None
        took = "" if seconds is None else f", {seconds / 60:.1f} minutes"
        errors = f"{100 * (1 - base.best.metric_val):.2f} % val, {100 * (1 - base.metric_test):.2f} % test"
        print(f"seed {seed}: base {record.baseline_bytes} bytes, {errors}; {len(record.measured)} trials{took}")
        for error in options.errors:
            point = chosen(record, error)
            text = "no such file"
            if point is not None:
                found[error].append(point)
                ratio = record.baseline_bytes / point.size
                text = f"{point.size} bytes ({ratio:.0f}x), {point.val:.2f} % val, {point.test:.2f} % test"
            print(f"  at most {error:g} %: {text}")
    for error, points in found.items():
        if len(points) > 1:
            sizes, tests = [p.size for p in points], [p.test for p in points]
            spread = f"{mean(sizes):.0f} +- {stdev(sizes):.0f} bytes, {mean(tests):.2f} +- {stdev(tests):.2f} % test"
            print(f"mean of {len(points)} seeds at most {error:g} %: {spread}")


if __name__ == "__main__":
    main()
