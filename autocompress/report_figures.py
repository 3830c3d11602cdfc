"""The front's figures: a PNG by matplotlib and an interactive page by plotly, both offline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from autocompress.record import StudyRecord, TrialRecord, name_points
from autocompress.report import human_bytes, metric_text, plan_summary

GREY, BLUE, ORANGE = "#9aa5b1", "#1f5fa8", "#d9480f"
MOST_LAYERS_IN_HOVER = 12


def front_png(record: StudyRecord, path: Path) -> None:
    """Draw all measured trials, the front and the baseline: size on a logarithmic axis against the metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    others = _others(record)
    axes.scatter(*_points(others), s=22, color=GREY, alpha=0.7, linewidths=0, label="other trials", zorder=2)
    axes.plot(
        *_points(record.front), "-o", color=BLUE, markersize=6, drawstyle="steps-post", label="Pareto front", zorder=3
    )
    if record.baseline is not None and record.baseline.best is not None:
        metric = record.baseline.best.metric_val
        axes.axhline(metric, color=ORANGE, linewidth=1, linestyle=":", zorder=1)
        axes.plot([record.baseline_bytes], [metric], "*", color=ORANGE, markersize=14, label="float32 model", zorder=4)
    for name, trial in name_points(record):
        assert trial.best is not None
        text = f"{name}\n{human_bytes(trial.best.size_bytes)}, {metric_text(trial.best.metric_val)}"
        axes.annotate(
            text,
            (trial.best.size_bytes, trial.best.metric_val),
            xytext=(8, -8) if record.direction == "maximize" else (8, 8),
            textcoords="offset points",
            va="top" if record.direction == "maximize" else "bottom",
            fontsize=8,
            color=BLUE,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda size, _: human_bytes(size).replace(".00", "").replace(".0 ", " "))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel("file size (1 KB = 1000 B)")
    axes.set_ylabel(_metric_label(record))
    axes.set_title(_title(record), loc="left", fontsize=11)
    axes.grid(visible=True, alpha=0.25)
    axes.margins(0.06)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right" if record.direction == "maximize" else "upper right", fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def front_html(record: StudyRecord, path: Path) -> None:
    """Write an interactive page that needs no network; hovering over a point shows its plan."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_trace(_trace(record, _others(record), "other trials", mode="markers", color=GREY, size=7))
    figure.add_trace(_trace(record, record.front, "Pareto front", mode="lines+markers", color=BLUE, size=10))
    if record.baseline is not None and record.baseline.best is not None:
        figure.add_trace(
            go.Scatter(
                x=[record.baseline_bytes],
                y=[record.baseline.best.metric_val],
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


def _trace(record: StudyRecord, trials: Sequence[TrialRecord], name: str, *, mode: str, color: str, size: int) -> Any:
    import plotly.graph_objects as go

    sizes, metrics = _points(trials)
    return go.Scatter(
        x=sizes,
        y=metrics,
        name=name,
        mode=mode,
        line={"shape": "hv"},
        marker={"color": color, "size": size},
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
        plan_summary(record, trial.plan),
    ]
    layers = list(trial.plan.layers.items())
    for name, layer in layers[:MOST_LAYERS_IN_HOVER]:
        rank = "full" if layer.rank is None else layer.rank
        lines.append(f"{escape(name or 'model')}: rank {rank}, {layer.bits} bits, below {layer.threshold:.2f} σ")
    if len(layers) > MOST_LAYERS_IN_HOVER:
        lines.append(f"and {len(layers) - MOST_LAYERS_IN_HOVER} more layers")
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
    return f"{record.study}: {len(record.measured)} trials, {len(record.front)} on the front"
