"""A study for people: tables, one-line summaries, the front's files and its Markdown description.

`report_figures` draws; everything here is text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.plan import LayerPlan, Plan
from autocompress.record import StudyRecord, TrialRecord, name_points

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 12
"""Rows of the description's table: MLflow shows it in a small frame."""


def human_bytes(n: float) -> str:
    """A size with three significant digits: "800 B", "12.3 KB", "1.50 MB"; 1 KB is 1000 B."""
    return f"{n:.0f} B" if n < 999.5 else _scaled(n, "B")


def human_count(n: float) -> str:
    """A count with three significant digits: "800", "12.3 K", "1.50 M"."""
    return f"{n:.0f}" if n < 999.5 else _scaled(n, "")


def _scaled(n: float, unit: str) -> str:
    for prefix in "KMGTP":
        n /= 1000
        if n < 999.5 or prefix == "P":
            break
    digits = 2 if n < 9.995 else 1 if n < 99.95 else 0
    return f"{n:.{digits}f} {prefix}{unit}"


def metric_text(value: float | None) -> str:
    """A metric's value to four places, or to five digits where it is 10 or more; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def plan_summary(record: StudyRecord, plan: Plan) -> str:
    """A plan in a few words, its means weighted by the layers' parameters.

    "3.2 bits, rank 40 %, below 0.8 σ": bits a weight, rank over full rank, and the pruning
    threshold in standard deviations. Empty where the record does not know the layers.
    """
    specs = {spec.name: spec for spec in record.layers}
    if not plan.layers or not plan.layers.keys() <= specs.keys():
        return ""
    if all(
        layer.rank is None and layer.bits == LayerPlan.bits and not layer.threshold for layer in plan.layers.values()
    ):
        return "uncompressed"
    total = sum(specs[name].parameters for name in plan.layers)

    def mean(values: dict[str, float]) -> float:
        return sum(specs[name].parameters * value for name, value in values.items()) / total

    parts = [f"{mean({name: layer.bits for name, layer in plan.layers.items()}):.1f} bits"]
    if any(layer.rank is not None for layer in plan.layers.values()):
        ranks = {
            name: 1.0 if layer.rank is None else layer.rank / specs[name].full_rank(layer.scheme)
            for name, layer in plan.layers.items()
        }
        parts.append(f"rank {100 * mean(ranks):.0f} %")
    if any(layer.threshold for layer in plan.layers.values()):
        parts.append(f"below {mean({name: layer.threshold for name, layer in plan.layers.items()}):.1f} σ")
    return ", ".join(parts)


def trial_summary(record: StudyRecord, trial: TrialRecord) -> str:
    """One line: "trial 12: 5.20 KB (31.2x), accuracy 0.9712 (-0.0031), 3.2 bits, rank 40 %"."""
    if trial.best is None:
        return f"trial {trial.number}: {trial.state}" + (f": {trial.error}" if trial.error else "")
    size = f"{human_bytes(trial.best.size_bytes)} ({record.ratio(trial):.1f}x)"
    metric = f"{record.metric} {metric_text(trial.best.metric_val)}"
    if record.baseline is not None and trial.number != 0:
        metric += f" ({trial.best.metric_val - _baseline_metric(record):+.4f})"
    stopped = "stopped" if trial.state == "stopped" else ""
    parts = [size, metric, plan_summary(record, trial.plan), stopped]
    return f"trial {trial.number}: " + ", ".join(part for part in parts if part)


def front_table(record: StudyRecord) -> Table:
    """The front for the terminal, smallest first; the points worth naming carry their names."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{record.study}: {_counts(record)}"), title_justify="left")
    for header in _headers(record):
        table.add_column(header, justify="left" if header in ("", "plan") else "right", no_wrap=header != "plan")
    for row in _rows(record, record.front):
        table.add_row(*map(Text, row))
    return table


def describe(record: StudyRecord) -> str:
    """The study as short Markdown: task, baseline, the front's table, how to look and export."""
    chosen = _spread_out(record.front, MOST_ROWS)
    lines = [f"**{_escape(record.study)}**: task `{record.task}`, {_counts(record)}.", ""]
    if record.baseline is not None:
        test = f", test {metric_text(record.baseline.metric_test)}" if record.baseline.metric_test is not None else ""
        lines += [
            f"Baseline: {human_bytes(record.baseline_bytes)} as float32, {_escape(record.metric)} "
            f"{metric_text(_baseline_metric(record))} on validation{test}. "
            f"Hypervolume {record.hypervolume():.3f}.",
            "",
        ]
    if chosen:
        shown = (
            f"Pareto front ({len(chosen)} of {len(record.front)} points):" if len(chosen) < len(record.front) else ""
        )
        headers = _headers(record)
        lines += [shown or "Pareto front:", "", _markdown_row(headers), _markdown_row(["---"] * len(headers))]
        lines += [_markdown_row(row) for row in _rows(record, chosen)]
    else:
        lines.append("No trial has finished yet.")
    lines += [
        "",
        f"Look: `autocompress front {record.study}`, `autocompress ui {record.study}`, and `front/front.html` "
        "among the artifacts. "
        f"Export: `autocompress export {record.study} --pick knee --format onnx -o deploy`.",
    ]
    return "\n".join(lines)


def write_front(record: StudyRecord, folder: Path, *, html: bool = True) -> list[Path]:
    """Write front.json, front.csv, front.png and front.html (4.8 MB, unless `html` is false) into a folder."""
    from autocompress.report_figures import front_html, front_png

    folder.mkdir(parents=True, exist_ok=True)
    data = record.to_front_json()
    files = [folder / "front.json", folder / "front.csv", folder / "front.png"]
    files[0].write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        rows = [_flat(point) for point in data["front"]]
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else list(CSV_COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    front_png(record, files[2])
    if html:
        files.append(folder / "front.html")
        front_html(record, files[3])
    return files


CSV_COLUMNS = ("trial", "size_bytes", "ratio", "metric_val", "metric_test", "macs", "artifact")


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    """A point of front.json as one row of front.csv: LAYER.rank and so on in columns of their own.

    What is not known is empty; a rank that is not limited is "full".
    """
    row: dict[str, Any] = {key: point[key] for key in CSV_COLUMNS}
    for name, layer in point["plan"].items():
        row |= {f"{name or 'model'}.{key}": "full" if value is None else value for key, value in layer.items()}
    return row | {f"recipe.{key}": value for key, value in point["recipe"].items()}


def _headers(record: StudyRecord) -> list[str]:
    metric = record.metric or "metric"
    return ["trial", "size", "ratio", f"{metric} val", "drop", f"{metric} test", "MACs", "plan", ""]


def _rows(record: StudyRecord, trials: Sequence[TrialRecord]) -> list[list[str]]:
    names = {trial.number: name for name, trial in name_points(record)}
    rows = []
    for trial in trials:
        assert trial.best is not None
        rows.append(
            [
                str(trial.number),
                human_bytes(trial.best.size_bytes),
                f"{record.ratio(trial):.1f}x",
                metric_text(trial.best.metric_val),
                metric_text(record.drop(trial)) if record.baseline else "-",
                metric_text(trial.metric_test),
                human_count(trial.best.macs),
                plan_summary(record, trial.plan),
                names.get(trial.number, ""),
            ]
        )
    return rows


def _counts(record: StudyRecord) -> str:
    states = [(record.count(state), state) for state in ("complete", "stopped", "failed")]
    told = ", ".join(f"{number} {state}" for number, state in states if number) or "none yet"
    return f"{len(record.front)} on the front of {len(record.measured)} measured trials ({told})"


def _baseline_metric(record: StudyRecord) -> float:
    assert record.baseline is not None and record.baseline.best is not None
    return record.baseline.best.metric_val


def _spread_out(trials: Sequence[TrialRecord], most: int) -> list[TrialRecord]:
    """At most that many, evenly spread, both ends among them."""
    if len(trials) <= most:
        return list(trials)
    return [trials[round(i * (len(trials) - 1) / (most - 1))] for i in range(most)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
