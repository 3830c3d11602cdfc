"""A study's results: its Pareto front, the points on it, and choosing among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from autocompress import report
from autocompress.errors import ArtifactError, StudyError, UsageError
from autocompress.folders import Records
from autocompress.limits import parse_size
from autocompress.origins import load_origin
from autocompress.plan import Plan
from autocompress.record import (
    StudyRecord,
    TrialRecord,
    best_of,
    fastest_of,
    without_folders,
    without_password,
)
from autocompress.search.study import StudyStore
from autocompress.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

CHOICES = ("knee", "smallest", "fastest", "best")
"""The members of a front that have a name, beside trial=N."""


@dataclass(frozen=True)
class Point:
    """A member of the front. `metric_test` is None until the search has ended.

    `latency` is the time of a call over the float32 model's, None where it was not measured.
    """

    trial: int
    size_bytes: int
    ratio: float
    metric_val: float
    metric_test: float | None
    macs: int
    plan: Plan
    artifact: Path
    latency: float | None = None
    _study: Study = field(repr=False, compare=False, kw_only=True)
    _sha256: str | None = field(default=None, repr=False, compare=False)

    def model(self) -> nn.Module:
        """The compressed model, in eval mode, as `autocompress.load` gives it."""
        from autocompress.compress.artifact import load

        self.check_file()
        task = self._study.task
        return load(self.artifact, model=None if task is None else task.model)

    def export(
        self,
        out: str | Path,
        format: str = "onnx",
        effort: str | None = None,
        *,
        register: str | None = None,
        alias: str | None = None,
    ) -> dict[str, Any]:
        """Write and verify a deployment, of a format of `deploy.export.FILES`, in the folder; its manifest.

        `effort` codes an archive anew ("auto", "fast", "max" or "huffman"); without it the archive
        is the trial's own file. `register` logs the folder of the format "mlflow" to the study's tracking store and
        makes it the next version of the registered model of that name, `alias` points to it then; what came of it
        is in the manifest as "registered". Raises ExportError where the deployment cannot be made or does not give
        the artifact's results, TrackingError where it cannot be registered; what was written stays.
        """
        from autocompress.deploy.export import export

        uri = self._registry(format, register, alias)
        self.check_file()
        record = self._study.record
        manifest = export(
            self.artifact,
            self._study.required_task(),
            format,
            Path(out),
            self._facts(),
            effort=effort,
            batch=record.batch,
            decided=record.decided(self.trial, format),
        )
        if register is None or uri is None:
            return manifest
        from autocompress.tracking import register as registry

        found = registry.register(self._study.record, uri, Path(out), manifest, name=register, alias=alias)
        told = {"name": found.name, "version": found.version, "alias": found.alias, "uri": found.uri}
        return manifest | {"registered": told | {"tracking_uri": without_password(uri)}}

    def _registry(self, format: str, register: str | None, alias: str | None) -> str | None:
        """The store to register in. Raises UsageError for names and formats that do not go together."""
        if register is None and alias is None:
            return None
        from autocompress.tracking.register import check_names

        if format != "mlflow":
            what, value = ("register", register) if register is not None else ("alias", alias)
            raise UsageError(f"{what} is {value!r} and the format {format!r}: only the format mlflow can be registered")
        check_names(register, alias)
        record = self._study.record
        if record.tracking_uri is None:
            raise UsageError(f"study {record.study!r} is not in MLflow yet: run autocompress sync {record.study}")
        return record.tracking_uri

    def _facts(self) -> dict[str, Any]:
        """What a manifest says of where the file came from."""
        record = self._study.record
        base = record.to_front_json()["baseline"]
        return {
            "study": record.study,
            "task": record.task,
            "trial": self.trial,
            "plan": self.plan.to_json()["layers"],
            "recipe": self.plan.recipe.to_json(),
            "target": record.target,
            "metric": record.metric,
            "direction": record.direction,
            "size_bytes": self.size_bytes,
            "metric_val": self.metric_val,
            "metric_test": self.metric_test,
            **({"latency": self.latency} if self.latency is not None else {}),
            "baseline": base,
            "seed": record.seed,
            "command": without_folders(record.command),
            "versions": dict(record.versions),
        }

    def check_file(self) -> None:
        """Raise ArtifactError unless the file is there and is the one that was measured."""
        try:
            digest = hashlib.sha256(self.artifact.read_bytes()).hexdigest()
        except OSError as error:
            raise ArtifactError(
                f"artifact {str(self.artifact)!r} of trial {self.trial} cannot be read: {error.strerror}"
            ) from error
        if self._sha256 is not None and digest != self._sha256:
            raise ArtifactError(
                f"artifact {str(self.artifact)!r} of trial {self.trial} is not the file that was measured"
            )


@dataclass(frozen=True)
class Front(Sequence[Point]):
    """The Pareto front by rising size."""

    points: tuple[Point, ...]
    record: StudyRecord = field(repr=False)

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> Point: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Point, ...]: ...

    def __getitem__(self, index: int | slice) -> Point | tuple[Point, ...]:
        return self.points[index]

    def smallest(
        self,
        max_drop: str | float | None = None,
        max_size: str | int | None = None,
        max_latency: str | float | None = None,
    ) -> Point:
        """The smallest point within the limits on validation data.

        `max_drop`: how much worse than the baseline, in the metric's units (0.01) or as "1%"; `max_latency`: times the
        float32 model's, "0.7x", or a time, "2ms".
        Raises UsageError that names the nearest point where none is within them.
        """
        found = pick(self.record, max_drop=max_drop, max_size=max_size, max_latency=max_latency, choice="smallest")
        return self._one(found)

    def fastest(self, max_drop: str | float | None = None, max_size: str | int | None = None) -> Point:
        """The point of the least latency within the limits. Raises UsageError where none was measured."""
        return self._one(pick(self.record, max_drop=max_drop, max_size=max_size, choice="fastest"))

    def best(self, max_size: str | int | None = None) -> Point:
        """The point with the best validation metric, among those within the size limit."""
        return self._one(pick(self.record, max_size=max_size, choice="best"))

    def knee(self) -> Point:
        """The point where the front bends most, sizes on a logarithmic scale."""
        return self._one(self.record.knee())

    def _one(self, trial: TrialRecord) -> Point:
        return next(p for p in self.points if p.trial == trial.number)


@dataclass(frozen=True)
class Study:
    """A study on disk. `origin` is where its task comes from, None for one begun with a `Task` object."""

    record: StudyRecord
    records: Records
    given: Task | None = None
    origin: Mapping[str, str] | None = None

    @cached_property
    def task(self) -> Task | None:
        """The study's task: the one given, else loaded again from its origin, else None."""
        if self.given is not None or self.origin is None:
            return self.given
        return load_origin(self.origin)

    def required_task(self) -> Task:
        """The task. Raises StudyError where it is not at hand."""
        if self.task is None:
            raise StudyError(
                f"study {self.name!r} was begun from Python with a Task object: give it as "
                f"autocompress.open_study({self.name!r}, task=...)"
            )
        return self.task

    @property
    def name(self) -> str:
        """The study's name."""
        return self.record.study

    @property
    def front(self) -> Front:
        """The Pareto front of size and validation metric."""
        return Front(tuple(self.point(t) for t in self.record.front), self.record)

    def point(self, trial: TrialRecord) -> Point:
        """A finished trial whose artifact is kept, as a point."""
        best, artifact = trial.best, trial.artifact
        if best is None or artifact is None:
            raise UsageError(f"trial {trial.number} of {self.name!r} is not on the front: no file of it is kept")
        return Point(
            trial=trial.number,
            size_bytes=best.size_bytes,
            ratio=self.record.ratio(trial),
            metric_val=best.metric_val,
            metric_test=trial.metric_test,
            macs=best.macs,
            plan=trial.plan,
            artifact=self.records.root / artifact,
            latency=self.record.latency(trial),
            _study=self,
            _sha256=trial.sha256,
        )


def pick(
    record: StudyRecord,
    *,
    max_drop: str | float | None = None,
    max_size: str | int | None = None,
    max_latency: str | float | None = None,
    choice: str = "smallest",
) -> TrialRecord:
    """The front's member that a choice means: knee, smallest, fastest, best, or trial=N, within the limits.

    Raises UsageError for an unknown choice, and where no member is within the limits (it names the nearest).
    """
    if choice.startswith("trial="):
        number = choice.removeprefix("trial=")
        members = {str(t.number): t for t in (*record.front, *([record.baseline] if record.baseline else []))}
        if number not in members:
            raise UsageError(f"pick is {choice!r}, allowed: trials on the front: {', '.join(sorted(members, key=int))}")
        if max_drop is not None or max_size is not None or max_latency is not None:
            known = ", ".join(CHOICES)
            raise UsageError(f"pick is {choice!r}, allowed with max-drop, max-size and max-latency: {known}")
        return members[number]
    if choice not in CHOICES:
        raise UsageError(f"pick is {choice!r}, allowed: {', '.join(CHOICES)}, trial=N")
    drop = record.metric_limit(max_drop)
    size = None if max_size is None else parse_size(max_size)
    latency = record.latency_limit(max_latency)
    inside = record.within(drop, size, latency)
    if not inside:
        near = record.nearest(drop, size, latency)
        given = {"max-drop": max_drop, "max-size": max_size, "max-latency": max_latency}
        wanted = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise UsageError(f"no plan is within {wanted}; the nearest is {report.trial_summary(record, near)}")
    if choice == "knee":
        return (record if len(inside) == len(record.front) else replace(record, trials=inside)).knee()
    if choice == "fastest":
        return fastest_of(record, inside)
    return best_of(record, inside) if choice == "best" else inside[0]


def records_of(records: Records, store: StudyStore) -> StudyRecord:
    """The study's record, with no `artifact` where the file is not there."""
    record = store.record()
    trials = (
        t if t.artifact is None or (records.root / t.artifact).is_file() else replace(t, artifact=None)
        for t in record.trials
    )
    return replace(record, trials=tuple(trials))
