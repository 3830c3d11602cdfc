"""A study as a value: what was asked, every trial, and the Pareto front.

Read from the Optuna study by `search.study`, shown by `tracking`, `report` and the command line.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from autocompress import pareto
from autocompress.errors import UsageError
from autocompress.limits import parse_drop, parse_latency
from autocompress.plan import LayerSpec, Measurement, Plan
from autocompress.timing import Timing, ratio_of, step, timed_format

STATES = ("running", "complete", "stopped", "failed")


@dataclass(frozen=True)
class Latency:
    """The time of a call in a target's runtime: seconds, the median and the quartiles on either side.

    `baseline` is the median of the float32 model's export in the same run, `ratio` the median of the ratios to it in
    each round of turns, `size_bytes` the file's length. `memory_bytes` is what loading it and one call add to the peak
    memory of a process, of the float32 file `baseline_memory_bytes`; `macs` of an example without dead units. These
    are None where they are not known.
    """

    target: str
    batch: int
    threads: int
    median: float
    low: float
    high: float
    baseline: float
    ratio: float
    size_bytes: int
    memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    macs: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What one measurement replaces another for."""
        return self.target, self.batch, self.threads

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrialRecord:
    """One trial. `measurements` are in rung order; the best of them by validation counts.

    `complete` trials went through their last rung, `stopped` ones were ended at an earlier rung
    and hold what they reached, `failed` ones say why in `error`. `artifact` is a path relative
    to the records folder, None unless the trial is on the front or the baseline. `latencies` are those that
    `bench` measured.
    """

    number: int
    state: str
    plan: Plan
    seed: int
    measurements: tuple[Measurement, ...] = ()
    best: Measurement | None = None
    metric_test: float | None = None
    latencies: tuple[Latency, ...] = ()
    artifact: str | None = None
    sha256: str | None = None
    parent: int | None = None
    error: str | None = None
    seconds: float = 0.0
    origin: str = "sampler"


@dataclass(frozen=True)
class StudyRecord:
    """One study: its settings, its trials by number, and what follows from them.

    `task` is what the user named (a built-in name, "module:function", "file.py:function"),
    `metric` the metric's name, `baseline_bytes` the model's float32 state as a safetensors file, or its float32 export
    where sizes are those of another `target` than the archive,
    `asked` how many trials were asked for, `space` the search space as it was read, `versions`
    those of the packages that matter, `tracking` the MLflow tracking URI, experiment and run. `timing` says what is
    timed where latency is the third objective, else it is None.
    """

    study: str
    task: str
    metric: str
    direction: str
    seed: int
    baseline_bytes: int
    layers: tuple[LayerSpec, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    asked: int = 0
    command: str = ""
    created: str = ""
    space: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None
    experiment_id: str | None = None
    run_id: str | None = None
    sampler: str = "tpe"
    workers: int = 1
    target: str = "archive"
    timing: Timing | None = None

    @property
    def sign(self) -> float:
        """+1 where the metric is minimised, -1 where it is maximised."""
        return 1.0 if self.direction == "minimize" else -1.0

    @property
    def format(self) -> str:
        """The format that the front's members are exported in: the target's, of the archive ONNX."""
        return "onnx" if self.target == "archive" else self.target

    @property
    def batch(self) -> int:
        """Examples of the calls that are timed."""
        return 1 if self.timing is None else self.timing.batch

    def decided(self, number: int, fmt: str) -> Mapping[str, Any] | None:
        """What the writer of a trial's file of the format decided in the search; None where it made none."""
        best = next((t.best for t in self.trials if t.number == number), None)
        return None if best is None or fmt != self.target else best.decided

    @cached_property
    def measured(self) -> tuple[TrialRecord, ...]:
        """The trials that have a result, by number."""
        return tuple(t for t in self.trials if t.best is not None and t.state in ("complete", "stopped"))

    @cached_property
    def baseline(self) -> TrialRecord | None:
        """Trial 0, the uncompressed model, once it is measured."""
        return next((t for t in self.measured if t.number == 0), None)

    @cached_property
    def front(self) -> tuple[TrialRecord, ...]:
        """The non-dominated trials by rising size; the earlier one of equals.

        What the trials measured decides; of those, and of nothing else, what was timed again in turns with the others
        takes the ones away that are dominated then.
        """
        points = [self.objectives(t.best) for t in self.measured if t.best]
        first = tuple(self.measured[i] for i in pareto.front(points))
        return tuple(first[i] for i in pareto.front([self._latest(t) for t in first]))

    def count(self, state: str) -> int:
        """How many trials are in that state."""
        return sum(t.state == state for t in self.trials)

    def ratio(self, trial: TrialRecord) -> float:
        """How many times smaller than the float32 model the trial's file is."""
        assert trial.best is not None
        return self.baseline_bytes / trial.best.size_bytes

    def objectives(self, measurement: Measurement) -> tuple[float, ...]:
        """What a front compares, all minimised: size, signed metric, and where it is one the step of the latency."""
        two = float(measurement.size_bytes), self.sign * measurement.metric_val
        if self.timing is None:
            return two
        assert measurement.latency is not None
        return (*two, step(measurement.latency))

    def _latest(self, trial: TrialRecord) -> tuple[float, ...]:
        """The trial's objectives, the latency as `latency` tells it."""
        assert trial.best is not None
        return self.objectives(replace(trial.best, latency=self.latency(trial)))

    def hypervolume(self, upto: int | None = None) -> float:
        """Hypervolume of the trials with numbers up to `upto` (all when None), in octaves.

        Objectives: log2(size / baseline size), the metric's loss against the baseline, in
        units of the baseline's metric (its absolute value, or 1 where that is 0), and where latency is an objective
        log2(latency / baseline latency). Reference
        point: (0, 1, 1), that is the baseline's size with a metric of zero (or of twice the
        baseline's where it is minimised) at twice its latency. 5.0 would be a lossless 32x, at the baseline's latency
        if that counts; at half of it 10.0. 0 before trial 0 is measured.
        """
        if self.baseline is None:
            return 0.0
        trials = [t for t in self.measured if upto is None or t.number <= upto]
        points = [
            (-math.log2(self.ratio(t)), self.relative_drop(t), *self.objectives(t.best)[2:]) for t in trials if t.best
        ]
        return pareto.hypervolume(points, (0.0, 1.0) if self.timing is None else (0.0, 1.0, 1.0))

    def latency(self, trial: TrialRecord) -> float | None:
        """The time of a call over the float32 model's: `bench`'s where it measured as the trials do, else the trial's.

        Where latency is no objective, of the target's (else the ONNX) file for one example on one thread. None where
        it was not measured.
        """
        if (found := self._benched(trial)) is not None:
            return found.ratio
        return None if trial.best is None else trial.best.latency

    def _benched(self, trial: TrialRecord) -> Latency | None:
        """What `bench` measured of the call that counts."""
        timing = self.timing or Timing()
        key = timed_format(self.target), timing.batch, timing.threads
        return next((found for found in trial.latencies if found.key == key), None)

    def drop(self, trial: TrialRecord) -> float:
        """How much worse than the baseline's the trial's validation metric is, in the metric's units."""
        assert trial.best is not None
        return self.sign * (trial.best.metric_val - self._baseline_metric())

    def relative_drop(self, trial: TrialRecord) -> float:
        """`drop` in units of the baseline's metric."""
        return self.drop(trial) / (abs(self._baseline_metric()) or 1.0)

    def knee(self) -> TrialRecord:
        """The front's knee point, sizes on a logarithmic scale. Raises UsageError on an empty front."""
        self._require_front()
        points = [(math.log2(size), *rest) for size, *rest in map(self._latest, self.front)]
        return self.front[pareto.knee(points)]

    def best(self) -> TrialRecord:
        """The front's point with the best validation metric, the smallest of equals.

        Raises UsageError on an empty front.
        """
        self._require_front()
        return best_of(self, self.front)

    def within(
        self, max_drop: float | None = None, max_size: int | None = None, max_latency: float | None = None
    ) -> tuple[TrialRecord, ...]:
        """The front's points whose drop (metric units), size (bytes) and latency (ratio) are within the limits."""
        return tuple(t for t in self.front if not self._excess(t, max_drop, max_size, max_latency))

    def nearest(
        self, max_drop: float | None = None, max_size: int | None = None, max_latency: float | None = None
    ) -> TrialRecord:
        """The front's point that misses the limits by the least: relative excesses, summed."""
        self._require_front()
        return min(self.front, key=lambda trial: self._excess(trial, max_drop, max_size, max_latency))

    def _excess(
        self, trial: TrialRecord, max_drop: float | None, max_size: int | None, max_latency: float | None
    ) -> float:
        """How far a trial is beyond the limits, relatively; 0 within them."""
        assert trial.best is not None
        over = 0.0
        if max_drop is not None and self.drop(trial) > max_drop + 1e-12:
            scale = abs(max_drop) or abs(self.drop(self.best())) or 1.0
            over += (self.drop(trial) - max_drop) / scale
        if max_size is not None:
            over += max(0.0, trial.best.size_bytes / max_size - 1)
        if max_latency is not None:
            latency = self.latency(trial)
            over += math.inf if latency is None else max(0.0, latency / max_latency - 1)
        return over

    def latency_limit(self, max_latency: str | float | None) -> float | None:
        """`max_latency` ("0.7x", "2ms") as a ratio to the float32 model's.

        Raises UsageError where it is neither, or where no latency of this study was measured.
        """
        if max_latency is None:
            return None
        parse_latency(max_latency)
        if all(self.latency(t) is None for t in self.front):
            raise UsageError(
                f"max-latency is {max_latency!r}, and study {self.study!r} has no latencies: measure them with "
                f"autocompress bench {self.study}, or search with --latency"
            )
        return ratio_of(max_latency, self._baseline_latency())

    def _baseline_latency(self) -> float:
        """Seconds of a call of the float32 model."""
        if self.timing is not None:
            return self.timing.baseline
        return next(found.baseline for t in self.front if (found := self._benched(t)) is not None)

    def metric_limit(self, max_drop: str | float | None) -> float | None:
        """`max_drop` in the metric's units. "1%" is a point (0.01) for a metric that is a fraction
        to be maximised, else one per cent of the baseline's metric; a number is in metric units.
        Raises UsageError where it is neither."""
        if max_drop is None:
            return None
        number, percent = parse_drop(max_drop)
        if not percent:
            return number
        base = self._baseline_metric()
        is_fraction = self.direction == "maximize" and 0 <= base <= 1
        return number if is_fraction else number * abs(base)

    def to_front_json(self) -> dict[str, Any]:
        """What `autocompress front --json` prints; plain JSON types, None where not known."""
        base = self.baseline
        return {
            "study": self.study,
            "task": self.task,
            "metric": self.metric,
            "direction": self.direction,
            "seed": self.seed,
            **({"target": self.target} if self.target != "archive" else {}),
            **({"latency": self.timing.to_json()} if self.timing is not None else {}),
            "trials": {state: self.count(state) for state in ("complete", "stopped", "failed")},
            "baseline": {
                "size_bytes": self.baseline_bytes,
                "metric_val": base.best.metric_val if base and base.best else None,
                "metric_test": base.metric_test if base else None,
            },
            "hypervolume": self.hypervolume(),
            "tracking_uri": None if self.tracking_uri is None else without_password(self.tracking_uri),
            "run_id": self.run_id,
            "front": [self._point_json(t) for t in self.front],
        }

    def _point_json(self, trial: TrialRecord) -> dict[str, Any]:
        assert trial.best is not None
        return {
            "trial": trial.number,
            "size_bytes": trial.best.size_bytes,
            "ratio": self.ratio(trial),
            "metric_val": trial.best.metric_val,
            "metric_test": trial.metric_test,
            "macs": trial.best.macs,
            **({"latency": self.latency(trial)} if self.timing is not None else {}),
            "artifact": trial.artifact,
            **({"parent": trial.parent} if trial.parent is not None else {}),
            "plan": {name or "model": layer.to_json() for name, layer in trial.plan.layers.items()},
            "recipe": trial.plan.recipe.to_json(),
            **({"latencies": [latency.to_json() for latency in trial.latencies]} if trial.latencies else {}),
        }

    def _baseline_metric(self) -> float:
        if self.baseline is None or self.baseline.best is None:
            raise UsageError(f"study {self.study!r} has no result of trial 0, from which a drop is measured")
        return self.baseline.best.metric_val

    def _require_front(self) -> None:
        if not self.front:
            raise UsageError(f"study {self.study!r} has no finished trial yet")


def without_password(uri: str) -> str:
    """The URI without a user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def without_folders(command: str) -> str:
    """Our command line with files and addresses named by their last part: no folder of a machine, no host."""
    if not command.startswith("autocompress "):
        return command  # a call from Python
    words = [word.partition("=") if word.startswith("-") else ("", "", word) for word in shlex.split(command)]
    return shlex.join(f"{option}{sign}{value.rstrip('/').rpartition('/')[2]}" for option, sign, value in words)


def best_of(record: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord:
    """The one with the best validation metric, the smallest of equals."""
    return min(trials, key=lambda t: (record.sign * t.best.metric_val, t.best.size_bytes) if t.best else (math.inf, 0))


def fastest_of(record: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord:
    """The one of the least latency, the smallest of equals. Raises UsageError where none was measured."""
    found = [(latency, t) for t in trials if (latency := record.latency(t)) is not None]
    if not found:
        raise UsageError(f"study {record.study!r} has no latencies: autocompress bench {record.study} measures them")
    return min(found, key=lambda pair: (pair[0], pair[1].best.size_bytes if pair[1].best else 0))[1]


def name_points(record: StudyRecord) -> Iterable[tuple[str, TrialRecord]]:
    """The front's points worth naming: the smallest, the knee, where time is an objective the fastest, the best."""
    if not record.front:
        return []
    timed = [("fastest", fastest_of(record, record.front))] if record.timing is not None else []
    named = [("smallest", record.front[0]), ("knee", record.knee()), *timed, ("best", record.best())]
    seen: dict[int, tuple[str, TrialRecord]] = {}
    for name, trial in reversed(named):
        seen[trial.number] = (name, trial)
    return list(seen.values())[::-1]
