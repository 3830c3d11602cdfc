"""The Python API: `search`, `open_study`, and what they give back."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import autocompress
from autocompress import report
from autocompress.errors import ArtifactError, StudyError, UsageError
from autocompress.folders import Records
from autocompress.plan import Plan
from autocompress.record import StudyRecord, TrialRecord, parse_size
from autocompress.search.study import Settings, StudyStore
from autocompress.tasks.task import Task

if TYPE_CHECKING:
    from torch import nn

    from autocompress.preflight import Preflight
    from autocompress.session import Listener, Session
    from autocompress.trial import Workbench

_log = logging.getLogger("autocompress")
DEFAULT_TRIALS = 40
RUNGS = (0.0, 0.25, 1.0)
"""Shares of the finetuning at which a trial is measured; it may be stopped at the one in the middle."""
_PACKAGES = ("torch", "optuna", "ray", "mlflow", "numpy", "constriction")


@dataclass(frozen=True)
class Point:
    """A member of the front. `metric_test` is None until the search has ended."""

    trial: int
    size_bytes: int
    ratio: float
    metric_val: float
    metric_test: float | None
    macs: int
    plan: Plan
    artifact: Path
    _study: Study = field(repr=False, compare=False)

    def model(self) -> nn.Module:
        """The compressed model, in eval mode, as `autocompress.load` gives it."""
        from autocompress.compress.artifact import load

        task = self._study.task
        return load(self.artifact, model=None if task is None else task.model)

    def export(self, out: str | Path, format: str = "onnx") -> dict[str, Any]:
        """Write and verify a deployment ("onnx", "torch" or "archive") in the folder; its manifest.

        Raises ExportError where it cannot be made or does not give the artifact's results.
        """
        return export_point(self._study, self, Path(out), format)


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

    def smallest(self, max_drop: str | float | None = None, max_size: str | int | None = None) -> Point:
        """The smallest point within the limits on validation data.

        `max_drop`: how much worse than the baseline, in the metric's units (0.01) or as "1%".
        Raises UsageError that names the nearest point where none is within them.
        """
        return self._one(pick(self.record, max_drop=max_drop, max_size=max_size, choice="smallest"))

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
    """A study on disk. `task` is None when it was opened without its task."""

    record: StudyRecord
    records: Records
    task: Task | None = None

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
            _study=self,
        )


def search(
    task: Task | str,
    *,
    trials: int = DEFAULT_TRIALS,
    workers: int | None = None,
    name: str | None = None,
    dir: str | Path | None = None,
    seed: int = 0,
    space: str | Path | dict[str, Any] | None = None,
    sampler: str = "tpe",
    time_budget: str | float | None = None,
    finetune_epochs: float | None = None,
    tracking_uri: str | None = None,
    data_dir: str | Path | None = None,
    address: str | None = None,
    command: str | None = None,
    listener: Listener | None = None,
    on_preflight: Callable[[str, Preflight], None] | None = None,
) -> Study:
    """Search plans for a task and give back the study with its Pareto front.

    `trials` counts all trials of the study. A study of that `name` is continued if task, data,
    space and seed are the same (StudyError otherwise). `time_budget` ("10m" or seconds) ends the
    search early; what is finished is kept. The task's model is never changed. Raises TaskError,
    SpaceError, StudyError, UsageError for mistakes, KeyboardInterrupt when it is stopped.
    """
    check_numbers(trials, seed, finetune_epochs)
    budget = None if time_budget is None else parse_time(time_budget)
    origin = None
    if isinstance(task, str):
        origin = origin_of(task, data_dir)
        task = load(origin)
    return _search(
        task,
        records=Records.find(dir),
        origin=origin,
        trials=trials,
        workers=workers,
        name=name,
        seed=seed,
        space=space,
        sampler=sampler,
        budget=budget,
        epochs=finetune_epochs,
        tracking_uri=tracking_uri,
        address=address,
        command=command or f"autocompress.search({task.name!r})",
        listener=listener,
        on_preflight=on_preflight,
    )


def resume(
    study: str | None = None,
    *,
    trials: int | None = None,
    workers: int | None = None,
    dir: str | Path | None = None,
    time_budget: str | float | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    task: Task | None = None,
    listener: Listener | None = None,
    on_preflight: Callable[[str, Preflight], None] | None = None,
) -> Study:
    """Go on with a study after any stop, to the number of trials asked for then, or now.

    A study begun from Python with a `Task` object needs that task again.
    """
    records = Records.find(dir)
    name = records.existing(study)
    store = StudyStore.open(records.file(name))
    settings = store.settings
    if task is None:
        if settings.origin is None:
            raise StudyError(
                f"study {name!r} was begun from Python with a Task object: go on with "
                f"autocompress.resume({name!r}, task=...)"
            )
        task = load(settings.origin)
    if trials is not None:
        check_numbers(trials, 0, None)
    return _search(
        task,
        records=records,
        origin=settings.origin,
        trials=store.asked if trials is None else trials,
        workers=store.workers if workers is None else workers,
        name=name,
        seed=settings.seed,
        space=dict(settings.space),
        sampler=settings.sampler,
        budget=None if time_budget is None else parse_time(time_budget),
        epochs=settings.epochs,
        tracking_uri=tracking_uri or store.record().tracking_uri,
        address=address,
        command=settings.command,
        listener=listener,
        on_preflight=on_preflight,
    )


def open_study(name: str | None = None, dir: str | Path | None = None, task: Task | None = None) -> Study:
    """A study on disk, the latest when no name is given. Raises StudyError where there is none."""
    records = Records.find(dir)
    return Study(_read(records, records.existing(name)), records, task)


def _search(
    task: Task,
    *,
    records: Records,
    origin: Mapping[str, str] | None,
    trials: int,
    workers: int | None,
    name: str | None,
    seed: int,
    space: Any,
    sampler: str,
    budget: float | None,
    epochs: float | None,
    tracking_uri: str | None,
    address: str | None,
    command: str,
    listener: Listener | None,
    on_preflight: Callable[[str, Preflight], None] | None,
) -> Study:
    from autocompress import engine, preflight
    from autocompress.search.samplers import check_sampler
    from autocompress.search.space import ladder
    from autocompress.search.space_file import load_space
    from autocompress.session import Session, Silent
    from autocompress.tasks.batches import metric_name
    from autocompress.tasks.checking import check_task
    from autocompress.tasks.fingerprint import fingerprint
    from autocompress.trial import Workbench

    cluster = engine.plan_cluster(workers, address)
    check_sampler(sampler)
    if name is not None:
        records.folder(name)
    check_task(task)
    bench = Workbench(task)
    found = load_space(space, bench.layers)
    settings = Settings(
        study=name or records.new_name(task.name),
        task=task.name,
        metric=metric_name(task),
        direction=task.direction,
        seed=seed,
        sampler=sampler,
        baseline_bytes=bench.baseline_bytes(),
        layers=bench.layers,
        space=found.source,
        fingerprint={**fingerprint(task), "space": found.fingerprint()},
        epochs=bench.default_epochs if epochs is None else epochs,
        rungs=RUNGS,
        steps=preflight.uniform_steps(trials),
        command=command,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        versions=versions(),
        origin=origin,
    )
    with records.lock(settings.study):
        store = _store(records, settings)
        settings = store.settings
        steps = ladder(found, bench.layers, settings.steps) if settings.steps else []
        store.begin(found, steps, trials, cluster.workers)
        left = max(0, trials - sum(t.state != "running" for t in store.record().trials))
        if on_preflight is not None:
            expected = preflight.preflight(
                bench,
                found,
                trials=left,
                workers=cluster.workers,
                threads=cluster.threads,
                epochs=settings.epochs,
                rungs=len(settings.rungs),
                startup=left > 0,
            )
            on_preflight(settings.study, expected)
        deadline = None if budget is None else time.monotonic() + budget
        session = Session(store, records, listener or Silent(), deadline)
        session.tracker = _tracker(records, tracking_uri, session.homes.put)
        with _tracked(session):
            if left:
                engine.run(task, session, cluster, left, settings.rungs)
            _note_tests(store, records, task, bench)
        return Study(records_of(records, store), records, task)


def _store(records: Records, settings: Settings) -> StudyStore:
    """The study of that name, which must be of the same task, data, space, seed and finetuning, or a new one."""
    file = records.file(settings.study)
    if not file.exists():
        return StudyStore.create(file, settings)
    store = StudyStore.open(file)
    _same_study(store.settings, settings)
    return store


@contextlib.contextmanager
def _tracked(session: Session) -> Iterator[None]:
    """MLflow follows the session in here; what was still to be written is written at the end, however it comes."""
    session.tracker.start(session.record)
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    finally:
        session.note_homes()
        session.drop_artifacts()
        study = session.store.settings.study
        session.tracker.finish(records_of(session.records, session.store), status)
        session.note_homes()
        if session.tracker.problem:
            _log.warning("%s; when it is back, run: autocompress sync %s", session.tracker.problem, study)


def _note_tests(store: StudyStore, records: Records, task: Task, bench: Workbench) -> None:
    """Measure the front's members and the baseline on the test split, once each."""
    from autocompress.compress.artifact import load
    from autocompress.session import measure_tests
    from autocompress.tasks.batches import evaluate

    def measure(trial: TrialRecord) -> float:
        model = load(records.root / str(trial.artifact), model=task.model)
        return evaluate(task, model.to(bench.device), "test")

    store.note_tests(measure_tests(records_of(records, store), measure))


def records_of(records: Records, store: StudyStore) -> StudyRecord:
    """The study's record, artifacts relative to the records folder, None where the file is not there."""
    record = store.record()

    def placed(trial: TrialRecord) -> TrialRecord:
        if trial.artifact is None:
            return trial
        path = records.artifact(record.study, trial.artifact)
        return replace(trial, artifact=records.relative(path) if path.is_file() else None)

    return replace(record, trials=tuple(placed(t) for t in record.trials))


def _read(records: Records, name: str) -> StudyRecord:
    return records_of(records, StudyStore.open(records.file(name)))


def pick(
    record: StudyRecord,
    *,
    max_drop: str | float | None = None,
    max_size: str | int | None = None,
    choice: str = "smallest",
) -> TrialRecord:
    """The front's member that a choice means: knee, smallest, best, or trial=N, within the limits.

    Raises UsageError for an unknown choice, and where no member is within the limits (it names the nearest).
    """
    if choice.startswith("trial="):
        number = choice.removeprefix("trial=")
        members = {str(t.number): t for t in (*record.front, *([record.baseline] if record.baseline else []))}
        if number not in members:
            raise UsageError(f"pick is {choice!r}, allowed: trials on the front: {', '.join(sorted(members, key=int))}")
        return members[number]
    if choice not in ("knee", "smallest", "best"):
        raise UsageError(f"pick is {choice!r}, allowed: knee, smallest, best, trial=N")
    drop = record.metric_limit(max_drop)
    size = None if max_size is None else parse_size(max_size)
    inside = record.within(drop, size)
    if not inside:
        near = record.nearest(drop, size)
        limits = [f"max-drop {max_drop}" if max_drop is not None else "", f"max-size {max_size}" if max_size else ""]
        wanted = " and ".join(filter(None, limits))
        raise UsageError(f"no plan is within {wanted}; the nearest is {report.trial_summary(record, near)}")
    if choice == "knee" and drop is None and size is None:
        return record.knee()
    if choice == "knee":
        return replace(record, trials=inside).knee()
    return inside[-1] if choice == "best" else inside[0]


def export_point(study: Study, point: Point, out: Path, format: str) -> dict[str, Any]:
    """`Point.export`: the study's task is loaded again where it is not at hand."""
    from autocompress.deploy.export import export

    record = study.record
    if not point.artifact.is_file():
        raise ArtifactError(f"artifact {str(point.artifact)!r} of trial {point.trial} is missing")
    task = study.task
    if task is None:
        origin = StudyStore.open(study.records.file(study.name)).settings.origin
        if origin is None:
            raise StudyError(
                f"study {study.name!r} was begun from Python: export with "
                f"autocompress.open_study({study.name!r}, task=...).front"
            )
        task = load(origin)
    base = record.baseline
    facts = {
        "study": record.study,
        "task": record.task,
        "trial": point.trial,
        "plan": point.plan.to_json()["layers"],
        "recipe": point.plan.recipe.to_json(),
        "metric": record.metric,
        "direction": record.direction,
        "size_bytes": point.size_bytes,
        "metric_val": point.metric_val,
        "metric_test": point.metric_test,
        "baseline": {
            "size_bytes": record.baseline_bytes,
            "metric_val": base.best.metric_val if base and base.best else None,
            "metric_test": base.metric_test if base else None,
        },
        "seed": record.seed,
        "command": record.command,
        "versions": dict(record.versions),
    }
    return export(point.artifact, task, format, out, facts)


def sync(study: str | None = None, *, dir: str | Path | None = None, tracking_uri: str | None = None) -> Any:
    """Write the study to MLflow as it is on disk; where it is shown then (`tracking.Home`)."""
    from autocompress import tracking

    records = Records.find(dir)
    name = records.existing(study)
    with records.lock(name):
        store = StudyStore.open(records.file(name))
        uri = tracking_uri or store.record().tracking_uri or tracking.default_uri(records.root)
        home = tracking.sync(
            records_of(records, store),
            uri,
            artifact_root=_artifact_root(records, uri),
            write_front=report.write_front,
            describe=report.describe,
        )
        store.note_tracking(home.tracking_uri, home.experiment_id, home.run_id)
    return home


def _tracker(records: Records, uri: str | None, on_home: Callable[[Any], None]) -> Any:
    from autocompress import tracking

    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(records.root)
    return tracking.MlflowTracker(
        chosen,
        artifact_root=_artifact_root(records, chosen),
        write_front=report.write_front,
        write_live=partial(report.write_front, html=False),
        describe=report.describe,
        on_home=on_home,
    )


def _artifact_root(records: Records, uri: str) -> Path | None:
    return None if uri.startswith(("http://", "https://")) else records.mlflow_artifacts


def _same_study(old: Settings, new: Settings) -> None:
    """Raise StudyError unless a study that exists is of this task, data, metric, space, seed and finetuning."""
    for what, value in new.fingerprint.items():
        if old.fingerprint.get(what) != value:
            raise StudyError(
                f"study {old.study!r} exists with another {what} (fingerprint {old.fingerprint.get(what)}, "
                f"now {value}): give another --study name, or the same {what} as before"
            )
    pairs = (
        ("seed", old.seed, new.seed),
        ("sampler", old.sampler, new.sampler),
        ("finetune-epochs", old.epochs, new.epochs),
    )
    for what, before, now in pairs:
        if before != now:
            raise StudyError(f"study {old.study!r} exists with {what} {before}, not {now}: give another --study name")


def origin_of(spec: str, data_dir: str | Path | None) -> dict[str, str]:
    """Where a task comes from, in a form that works from any folder."""
    path, colon, function = spec.rpartition(":")
    file = path if colon and path.endswith(".py") else spec if spec.endswith(".py") else None
    if file is not None:
        spec = f"{Path(file).expanduser().absolute()}{colon and ':' + function if file == path else ''}"
    data = {} if data_dir is None else {"data_dir": str(Path(data_dir).expanduser().absolute())}
    return {"task": spec, "folder": os.getcwd(), **data}


def load(origin: Any) -> Task:
    """The task of an origin. A module is looked for in the folder that the study was begun in, too."""
    from autocompress.tasks.loading import load_task

    with _folder_on_path(origin["folder"]):
        return load_task(origin["task"], data_dir=origin.get("data_dir"))


@contextlib.contextmanager
def _folder_on_path(folder: str) -> Iterator[None]:
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the packages that decide results."""
    from importlib.metadata import version

    found = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "autocompress": autocompress.__version__, **found}


def parse_time(text: str | float) -> float:
    """Seconds from "90s", "10m", "2h", "600" or a number. Raises UsageError for anything else."""
    raw = str(text).strip().lower()
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(raw[-1:], 1.0)
    try:
        seconds = float(raw[:-1] if raw[-1:] in units else raw) * unit
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"time-budget is {text!r}, allowed: such as 90s, 10m, 2h, more than 0")
    return seconds


def check_numbers(trials: int, seed: int, epochs: float | None) -> None:
    if not (isinstance(trials, int) and 1 <= trials <= 1_000_000):
        raise UsageError(f"trials is {trials!r}, allowed: 1 to 1000000")
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise UsageError(f"seed is {seed!r}, allowed: 0 to {2**31 - 1}")
    if epochs is not None and not 0 <= epochs < 1e6:
        raise UsageError(f"finetune-epochs is {epochs!r}, allowed: 0 to 1000000")
