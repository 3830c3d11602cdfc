"""A study for people: tables, one-line summaries, the front's files and its Markdown description."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.record import Latency, StudyRecord, TrialRecord, name_points

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS, MOST_LAYERS = 12, 12
"""Rows of the description's table, layers of a point's hover text: both are shown in small frames."""
CSV_COLUMNS = ("trial", "size_bytes", "ratio", "metric_val", "metric_test", "macs", "artifact")
GREY, BLUE, ORANGE = "#9aa5b1", "#1f5fa8", "#d9480f"


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
    return f"{value:z.4f}" if abs(value) < 10 else f"{value:.5g}"


def plan_summary(record: StudyRecord, plan: Plan) -> str:
    """A plan in a few words, its means weighted by the layers' parameters.

    "3.2 bits, rank 40 %, width 60 %, < 0.8 std": bits a weight, rank over full rank, the share of units that is
    kept, and the pruning threshold in standard deviations; where there are such, bits of layers' inputs, the price
    of a bit, the weight of InfoMax, a precision other than float32. Empty where the record does not know the layers.
    """
    specs = {spec.name: spec for spec in record.layers}
    if not plan.layers or not plan.layers.keys() <= specs.keys():
        return ""
    if all(
        layer.rank is None
        and layer.bits == layer.activation_bits == LayerPlan.bits
        and not layer.threshold
        and layer.width == LayerPlan.width
        for layer in plan.layers.values()
    ):
        return "uncompressed"

    def mean(values: Mapping[str, float]) -> float:
        total = sum(specs[name].parameters for name in values)
        return sum(specs[name].parameters * value for name, value in values.items()) / total

    parts = [f"{mean({name: layer.bits for name, layer in plan.layers.items()}):.1f} bits"]
    if any(layer.rank is not None for layer in plan.layers.values()):
        ranks = {
            name: 1.0 if layer.rank is None else layer.rank / specs[name].full_rank(layer.scheme)
            for name, layer in plan.layers.items()
        }
        parts.append(f"rank {100 * mean(ranks):.0f} %")
    if any(layer.width != LayerPlan.width for layer in plan.layers.values()):
        parts.append(f"width {100 * mean({name: layer.width for name, layer in plan.layers.items()}):.0f} %")
    if any(layer.threshold for layer in plan.layers.values()):
        parts.append(f"< {mean({name: layer.threshold for name, layer in plan.layers.items()}):.1f} std")
    inputs = {name: layer.activation_bits for name, layer in plan.layers.items() if specs[name].seen}
    if any(bits != LayerPlan.activation_bits for bits in inputs.values()):
        parts.append(f"inputs {mean(inputs):.1f} bits")
    if plan.recipe.rate:
        parts.append(f"rate {plan.recipe.rate:.2g}")
    if plan.recipe.infomax:
        parts.append(f"infomax {plan.recipe.infomax:.2g}")
    if plan.recipe.precision != Recipe.precision:
        parts.append(plan.recipe.precision)
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
    latency = latency_text(record, trial) if record.timing is not None else ""
    parts = [size, metric, latency and f"latency {latency}", plan_summary(record, trial.plan), stopped]
    return f"trial {trial.number}: " + ", ".join(part for part in parts if part)


def latency_text(record: StudyRecord, trial: TrialRecord) -> str:
    """The time of a call over the float32 model's: "0.52x", or "-" where it was not measured."""
    ratio = record.latency(trial)
    return "-" if ratio is None else f"{ratio:.2f}x"


def baseline_text(record: StudyRecord) -> str:
    """The uncompressed model on one line."""
    base = record.baseline
    if base is None or base.best is None:
        return f"baseline  {human_bytes(record.baseline_bytes)} {_of_float32(record)}, not measured yet"
    val, test = metric_text(base.best.metric_val), metric_text(base.metric_test)
    timed = "" if record.timing is None else f", {1e3 * record.timing.baseline:.3g} ms a call of {record.timing.batch}"
    said = f"{human_bytes(record.baseline_bytes)} {_of_float32(record)}, {record.metric} {val} (test {test}){timed}"
    return f"baseline  {said}"


def _of_float32(record: StudyRecord) -> str:
    return "of float32" if record.target == "archive" else f"of float32 (sizes are those of {record.target} files)"


def front_table(record: StudyRecord) -> Table:
    """The front for the terminal, smallest first; the points worth naming carry their names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{record.study}: {_counts(record)}"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for header in _headers(record):
        at_left = header in ("trial", "plan")
        table.add_column(Text(header), justify="left" if at_left else "right", no_wrap=header != "plan")
    for row in _rows(record, record.front):
        table.add_row(*map(Text, row))
    return table


def describe(record: StudyRecord) -> str:
    """The study as short Markdown: task, baseline, the front's table, how to look and export."""
    chosen = _most_telling(record, MOST_ROWS)
    lines = [f"**{_escape(record.study)}**: task `{record.task}`, {_counts(record)}.", ""]
    if record.baseline is not None:
        test = f", test {metric_text(record.baseline.metric_test)}" if record.baseline.metric_test is not None else ""
        lines += [
            f"Baseline: {human_bytes(record.baseline_bytes)} as float32, {_escape(record.metric)} "
            f"{metric_text(_baseline_metric(record))} on validation{test}. "
            f"Hypervolume {record.hypervolume():.3f} octaves.",
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
        f"Export: `autocompress export {record.study} --pick knee --format {record.format} -o deploy`.",
    ]
    return "\n".join(lines)


def write_front(record: StudyRecord, folder: Path, *, html: bool = True) -> list[Path]:
    """Write front.json, front.csv, front.png and front.html (4.8 MB, unless `html` is false) into a folder."""
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


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    """A point of front.json as one row of front.csv: LAYER.rank and so on in columns of their own.

    What is not known is empty; a rank that is not limited is "full".
    """
    row: dict[str, Any] = {key: point[key] for key in CSV_COLUMNS}
    if "latency" in point:
        row["latency"] = point["latency"]
    for name, layer in point["plan"].items():
        row |= {f"{name or 'model'}.{key}": "full" if value is None else value for key, value in layer.items()}
    return row | {f"recipe.{key}": value for key, value in point["recipe"].items()}


def _headers(record: StudyRecord) -> list[str]:
    metric = record.metric or "metric"
    timed = ["latency"] if record.timing is not None else []
    return ["trial", "size", "ratio", f"{metric} val", "drop", f"{metric} test", *timed, "MACs", "plan"]


def _rows(record: StudyRecord, trials: Sequence[TrialRecord]) -> list[list[str]]:
    names = {trial.number: name for name, trial in name_points(record)}
    rows = []
    for trial in trials:
        assert trial.best is not None
        rows.append(
            [
                f"{trial.number} {names.get(trial.number, '')}".strip(),
                human_bytes(trial.best.size_bytes),
                f"{record.ratio(trial):.1f}x",
                metric_text(trial.best.metric_val),
                metric_text(record.drop(trial)) if record.baseline else "-",
                metric_text(trial.metric_test),
                *([latency_text(record, trial)] if record.timing is not None else []),
                human_count(trial.best.macs),
                plan_summary(record, trial.plan),
            ]
        )
    return rows


def latency_table(record: StudyRecord) -> Table:
    """The front's members with latencies, smallest first: bytes and milliseconds of their files, and over float32's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    trials = [trial for trial in record.front if trial.latencies]
    keys = sorted({latency.key for trial in trials for latency in trial.latencies})
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("trial", record.target, f"{record.metric} val", "MACs"):
        table.add_column(header, justify="right")
    for target, batch, threads in keys:
        told = f", {threads} threads" if threads > 1 else ""
        table.add_column(f"{target}, batch {batch}{told}", justify="right")
    for trial in trials:
        assert trial.best is not None
        by_key = {latency.key: latency for latency in trial.latencies}
        cells = [_latency_text(by_key[key]) if key in by_key else "-" for key in keys]
        start = str(trial.number), human_bytes(trial.best.size_bytes), metric_text(trial.best.metric_val)
        macs = next((one.macs for one in trial.latencies if one.macs is not None), trial.best.macs)
        table.add_row(*start, human_count(macs), *cells)
    return table


def _latency_text(latency: Latency) -> str:
    spread = 100 * (latency.high - latency.low) / 2 / latency.median
    size = human_bytes(latency.size_bytes)
    memory = "" if latency.memory_bytes is None else f"  {human_bytes(latency.memory_bytes)} memory"
    return f"{size}  {1e3 * latency.median:.3g} ms +- {spread:.0f} %  {latency.ratio:.2f}x{memory}"


def _counts(record: StudyRecord) -> str:
    states = [(record.count(state), state) for state in ("complete", "stopped", "failed")]
    told = ", ".join(f"{number} {state}" for number, state in states if number) or "none yet"
    return f"{len(record.front)} on the front of {len(record.measured)} measured trials ({told})"


def _baseline_metric(record: StudyRecord) -> float:
    assert record.baseline is not None
    assert record.baseline.best is not None
    return record.baseline.best.metric_val


def _most_telling(record: StudyRecord, most: int) -> list[TrialRecord]:
    """At most that many of the front's points: evenly spread ones, both ends and the knee among them."""
    front = record.front
    if len(front) <= most:
        return list(front)
    spread = {round(i * (len(front) - 1) / (most - 2)) for i in range(most - 1)}
    return [front[i] for i in sorted(spread | {front.index(record.knee())})]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def front_png(record: StudyRecord, path: Path) -> None:
    """Draw all measured trials, the front and the baseline: size on a logarithmic axis against the metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*_points(_others(record)), s=22, color=GREY, alpha=0.7, linewidths=0, label="other trials", zorder=2)
    style: dict[str, Any] = {"color": BLUE, "drawstyle": "steps-post", "zorder": 3}
    if record.timing is None:
        axes.plot(*_points(record.front), "-o", markersize=6, label="Pareto front", **style)
    else:
        axes.plot(*_points(_flat_front(record)), "-", linewidth=1, **style)
        shown = axes.scatter(
            *_points(record.front), c=_latencies(record), s=40, cmap="viridis", label="Pareto front", zorder=4
        )
        figure.colorbar(shown, label="time of a call over float32's")
    if record.baseline is not None:
        metric = _baseline_metric(record)
        axes.axhline(metric, color=ORANGE, linewidth=1, linestyle=":", zorder=1)
        axes.plot([record.baseline_bytes], [metric], "*", color=ORANGE, markersize=14, label="float32 model", zorder=4)
    _label_points(record, axes)
    _size_axis(record, axes)
    axes.set_ylabel(_metric_label(record))
    axes.set_title(_title(record), loc="left", fontsize=11)
    axes.grid(visible=True, alpha=0.25)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right" if record.direction == "maximize" else "upper right", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def _label_points(record: StudyRecord, axes: Any) -> None:
    """Write name, size and metric beside the smallest, the knee and the best, away from the front."""
    up = record.direction == "minimize"
    style = {"textcoords": "offset points", "fontsize": 8, "color": BLUE, "zorder": 5}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.5, "pad": 1}
    for name, trial in name_points(record):
        if trial.best is not None and trial.number != 0:
            text = f"{name}\n{human_bytes(trial.best.size_bytes)}, {metric_text(trial.best.metric_val)}"
            where = (trial.best.size_bytes, trial.best.metric_val)
            axes.annotate(text, where, xytext=(7, 7 if up else -7), va="bottom" if up else "top", bbox=box, **style)
    if not record.measured:
        axes.text(0.5, 0.5, "no finished trial yet", transform=axes.transAxes, ha="center", color=GREY)


def _size_axis(record: StudyRecord, axes: Any) -> None:
    """A logarithmic axis of sizes, labelled "5 KB", at least a factor of ten wide."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = [*_points(record.measured)[0], record.baseline_bytes]
    low, high = min(sizes) / 1.25, max(sizes) * 1.25
    low = min(low, high / 10)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 400 * low else (1,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda size, _: human_bytes(size).replace(".00", "").replace(".0 ", " "))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("file size (1 KB = 1000 B)")


def front_html(record: StudyRecord, path: Path) -> None:
    """Write an interactive page that needs no network; hovering over a point shows its plan."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_trace(_trace(record, _others(record), "other trials", mode="markers", color=GREY, size=7))
    if record.timing is None:
        figure.add_trace(_trace(record, record.front, "Pareto front", mode="lines+markers", color=BLUE, size=10))
    else:
        flat = "of size and metric"
        figure.add_trace(_trace(record, _flat_front(record), flat, mode="lines", color=BLUE, size=1))
        figure.add_trace(
            _trace(record, record.front, "Pareto front", mode="markers", color=_latencies(record), size=10)
        )
    if record.baseline is not None:
        figure.add_trace(
            go.Scatter(
                x=[record.baseline_bytes],
                y=[_baseline_metric(record)],
                name="float32 model",
                mode="markers",
                marker={"symbol": "star", "size": 15, "color": ORANGE},
                hovertemplate=f"float32 model: {human_bytes(record.baseline_bytes)}<extra></extra>",
            )
        )
    figure.update_layout(
        title=escape(_title(record)),
        template="simple_white",
        xaxis={"type": "log", "title": "file size (bytes)", "tickformat": "~s", "ticksuffix": "B", "showgrid": True},
        yaxis={"title": escape(_metric_label(record)), "showgrid": True},
        legend={"x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
    )
    figure.write_html(path, include_plotlyjs=True, config={"displaylogo": False})


def _flat_front(record: StudyRecord) -> list[TrialRecord]:
    """The front of size and metric alone."""
    return list(replace(record, timing=None).front)


def _latencies(record: StudyRecord) -> list[float]:
    return [latency for trial in record.front if (latency := record.latency(trial)) is not None]


def _trace(
    record: StudyRecord,
    trials: Sequence[TrialRecord],
    name: str,
    *,
    mode: str,
    color: str | list[float],
    size: int,
) -> Any:
    """A trace of trials; a colour for each, by its latency, has a bar."""
    import plotly.graph_objects as go

    sizes, metrics = _points(trials)
    bar = {"title": "time over float32's", "x": 1.02}
    scale = {} if isinstance(color, str) else {"colorscale": "Viridis", "showscale": True, "colorbar": bar}
    return go.Scatter(
        x=sizes,
        y=metrics,
        name=name,
        mode=mode,
        line={"shape": "hv"},
        marker={"color": color, "size": size, **scale},
        text=[_hover(record, trial) for trial in trials],
        customdata=[trial.number for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(record: StudyRecord, trial: TrialRecord) -> str:
    """What a point says: sizes, metrics, the plan in a few words and layer by layer."""
    assert trial.best is not None
    test = f", test {metric_text(trial.metric_test)}" if trial.metric_test is not None else ""
    lines = [
        f"<b>trial {trial.number}</b> ({trial.state})",
        f"{human_bytes(trial.best.size_bytes)}, {record.ratio(trial):.1f}x smaller",
        f"{escape(record.metric)} {metric_text(trial.best.metric_val)}{test}",
        f"latency {latency_text(record, trial)}" if record.timing is not None else "",
        plan_summary(record, trial.plan),
    ]
    layers = list(trial.plan.layers.items())
    for name, layer in layers[:MOST_LAYERS]:
        rank = "full" if layer.rank is None else layer.rank
        lines.append(f"{escape(name or 'model')}: rank {rank}, {layer.bits} bits, < {layer.threshold:.2f} std")
    if len(layers) > MOST_LAYERS:
        lines.append(f"and {len(layers) - MOST_LAYERS} more layers")
    return "<br>".join(line for line in lines if line)


def _others(record: StudyRecord) -> list[TrialRecord]:
    front = {trial.number for trial in record.front}
    return [trial for trial in record.measured if trial.number not in front]


def _points(trials: Sequence[TrialRecord]) -> tuple[list[int], list[float]]:
    best = [trial.best for trial in trials if trial.best is not None]
    return [b.size_bytes for b in best], [b.metric_val for b in best]


def _metric_label(record: StudyRecord) -> str:
    better = "higher" if record.direction == "maximize" else "lower"
    return f"{record.metric or 'metric'} on validation ({better} is better)"


def _title(record: StudyRecord) -> str:
    count = len(record.measured)
    return f"{record.study}: {count} trial{'s' * (count != 1)}, {len(record.front)} on the front"
