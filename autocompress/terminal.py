"""What a search shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autocompress.plan import Measurement
from autocompress.record import StudyRecord, TrialRecord, name_points
from autocompress.report import human_bytes, human_count, latency_text, metric_text, trial_summary

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from autocompress.engine import Job
    from autocompress.preflight import CoverageRow, Preflight

_ROWS = 8


def human_time(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def preflight_lines(name: str, found: Preflight) -> list[str]:
    """The preflight in a few lines."""
    if not found.trials:
        return [f"study {name}: all its trials are done; raise --trials for more"]
    plans = "unlimited plans (some knobs are real numbers)" if math.isinf(found.plans) else f"{found.plans:.3g} plans"
    return [
        f"study {name}: {found.trials} trials to run, {found.workers} at a time with {found.threads} "
        f"thread{'s' * (found.threads > 1)} each, {_epochs(found.epochs)} of finetuning a trial",
        f"space: {found.knobs} knobs, {plans}; {found.share:.1%} of {human_count(found.compressed + found.kept)} "
        f"values compressible, float32 model {human_bytes(found.baseline_bytes)}",
        f"expected: {_expected(found)}, {human_bytes(found.memory_bytes)} of memory",
    ]


def _epochs(count: float) -> str:
    told = f"{count:.3g}"
    return f"{told} epoch{'s' * (told != '1')}"


def _expected(found: Preflight) -> str:
    if found.seconds is None:
        return f"no estimate of time ({found.problem})"
    return f"about {human_time(found.seconds)}"


def coverage_table(found: Preflight, most: int | None = None) -> Table:
    """Every tensor of the model: compressed, or kept and why. With `most`, kept ones are summed up by reason,
    and at most so many layers have a row of their own."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "kind", "shape", "values", "MACs", "note"):
        table.add_column(column, justify="right" if column in ("values", "MACs") else "left")
    for row in found.coverage if most is None else summed_up(found.coverage, most):
        shape = "x".join(map(str, row.shape))
        macs = human_count(row.macs) if row.macs else ""
        table.add_row(row.name, row.kind, shape, human_count(row.elements), macs, row.note)
    return table


def summed_up(rows: Sequence[CoverageRow], most: int) -> list[CoverageRow]:
    """The rows with kept tensors of one reason in one row, and layers beyond `most` in another."""
    layers = [row for row in rows if row.kind != "kept"]
    reasons: dict[str, list[CoverageRow]] = {}
    for row in rows:
        if row.kind == "kept":
            reasons.setdefault(row.note, []).append(row)
    shown = layers[:most] if len(layers) > most + 1 else layers
    result = [*shown, *([_sum(layers[len(shown) :], "more layers")] if len(shown) < len(layers) else [])]
    return result + [group[0] if len(group) == 1 else _sum(group, "tensors") for group in reasons.values()]


def _sum(rows: Sequence[CoverageRow], what: str) -> CoverageRow:
    kinds = {row.kind for row in rows}
    notes = {row.note for row in rows}
    return replace(
        rows[0],
        name=f"{len(rows)} {what}",
        kind=kinds.pop() if len(kinds) == 1 else "",
        shape=(),
        elements=sum(row.elements for row in rows),
        macs=sum(row.macs for row in rows),
        note=notes.pop() if len(notes) == 1 else "listed by inspect",
    )


class Board:
    """A `session.Listener` that shows the search: live where the console is a terminal.

    `budget` are the seconds that it may take, where they are limited.
    """

    def __init__(self, console: Console, budget: float | None = None) -> None:
        self.console, self.budget = console, budget
        self.live: Any = None
        self._began = time.monotonic()
        self._rows: dict[int, str] = {}
        self._ended: list[TrialRecord] = []
        self._first_done = 0.0
        self._record: StudyRecord | None = None
        self._doing = ""
        self._status: Any = None

    def __enter__(self) -> Board:
        self._end_status()
        self._began = time.monotonic()
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._end_status()
        if self.live is not None:
            self.live.stop()

    def doing(self, what: str) -> None:
        """What is done before the first trial, and after the last: a line, on a terminal gone with the next."""
        self._doing = what
        if not self.console.is_terminal:
            self.console.print(what, highlight=False, markup=False, soft_wrap=True)
        elif self.live is None:
            self._end_status()
            from rich.text import Text

            self._status = self.console.status(Text(what))
            self._status.start()

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def started(self, job: Job) -> None:
        """A trial was handed to a worker."""
        if not self._rows and not self._ended:
            self.doing("workers load torch and the task")
        self._rows[job.number] = "starting"

    def measured(self, number: int, measurement: Measurement) -> None:
        """A trial reached a rung."""
        size, metric = human_bytes(measurement.size_bytes), metric_text(measurement.metric_val)
        self._rows[number] = f"epoch {measurement.epoch:.3g}  {size}  {metric}"

    def ended(self, trial: TrialRecord, record: StudyRecord) -> None:
        """A trial is over."""
        self._rows.pop(trial.number, None)
        self._ended.append(trial)
        self._doing = ""
        self._first_done = self._first_done or time.monotonic()
        self._record = record
        if self.live is None:
            self.console.print(self._line(trial, record), highlight=False, markup=False, soft_wrap=True)
        elif trial.state == "failed":
            self.console.print(f"trial {trial.number} failed: {trial.error}", highlight=False, markup=False)

    def _line(self, trial: TrialRecord, record: StudyRecord) -> str:
        done = sum(t.state != "running" for t in record.trials)
        tail = f"[{done}/{record.asked}, hypervolume {record.hypervolume():.3f}{self._left(done, record.asked)}]"
        if trial.best is None or trial.state == "failed":
            return f"trial {trial.number:>3} failed: {trial.error} {tail}"
        timed = "" if record.timing is None else f"  latency {latency_text(record, trial)}"
        mark = "  front" if any(t.number == trial.number for t in record.front) else ""
        return (
            f"trial {trial.number:>3} {trial.state:<8} {human_bytes(trial.best.size_bytes):>8} "
            f"{record.ratio(trial):6.1f}x  {record.metric} {metric_text(trial.best.metric_val)}{timed}{mark}  {tail}"
        )

    def _left(self, done: int, asked: int) -> str:
        mine = len(self._ended) - 1
        if mine < 2 or done >= asked:
            return ""
        now = time.monotonic()
        left = (now - self._first_done) / mine * (asked - done)  # not from the start, when workers were still starting
        if self.budget is not None:
            left = max(0.0, min(left, self._began + self.budget - now))
        return f", {human_time(left)} left"

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        record = self._record
        done, asked = (sum(t.state != "running" for t in record.trials), record.asked) if record else (0, 0)
        head = Table.grid(padding=(0, 1))
        elapsed = human_time(time.monotonic() - self._began)
        volume = f"hypervolume {record.hypervolume():.3f}" if record and not self._doing else self._doing
        progress = ProgressBar(total=asked or None, completed=done, width=30)
        trials = f"{done}/{asked} trials" if record else ""
        head.add_row(progress, trials, volume, f"{elapsed}{self._left(done, asked)}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        metric = record.metric if record else "metric"
        timed = ["latency"] if record and record.timing is not None else []
        for column in ("trial", "state", "size", "ratio", metric, *timed, "epoch"):
            table.add_column(column, justify="left" if column == "state" else "right")
        for number, text in sorted(self._rows.items()):
            table.add_row(str(number), Text(text, style="cyan"))
        front = {t.number for t in record.front} if record else set()
        for trial in self._ended[::-1][: max(0, _ROWS - len(self._rows))]:
            self._add(table, record, trial, trial.number in front)
        parts: list[RenderableType] = [head, table]
        if record and record.front:
            parts.append(Text("front", style="bold"))
            parts += [Text(f"  {name:<9}{trial_summary(record, trial)}") for name, trial in name_points(record)]
        return Group(*parts)

    def _add(self, table: Table, record: StudyRecord | None, trial: TrialRecord, on_front: bool) -> None:
        from rich.text import Text

        if trial.best is None or record is None:
            table.add_row(str(trial.number), Text(f"failed: {trial.error}", style="red"))
            return
        table.add_row(
            str(trial.number),
            Text("front" if on_front else trial.state, style="bold green" if on_front else ""),
            human_bytes(trial.best.size_bytes),
            f"{record.ratio(trial):.1f}x",
            metric_text(trial.best.metric_val),
            *([latency_text(record, trial)] if record.timing is not None else []),
            f"{trial.best.epoch:.3g}",
        )
