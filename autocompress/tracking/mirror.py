"""Writes to a MLflow store what it does not hold yet of a study."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from autocompress.record import StudyRecord, TrialRecord
from autocompress.tracking import runs, view
from autocompress.tracking.curve import Curve
from autocompress.tracking.parent import create_parent, find_parent
from autocompress.tracking.store import Home, home_url, is_http, one_line

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 800
PLAN_TAG, PLAN_FILE = "autocompress.plan", "plan.json"


@dataclass
class _Stored:
    """A trial's run in the store, as far as it is known."""

    run_id: str
    artifact_uri: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    latest: dict[str, float]
    start_ms: int


class Mirror:
    """One study in one store. Knows what the store holds and writes only what differs.

    Not for several threads. Every method may raise whatever the store raises; after that the
    mirror is of no use any more and a new one has to be opened. Opening one finds or creates the
    study's experiment and parent run and reads what they hold. `alive` is called after each
    answer of the store; what it raises ends the work.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        record: StudyRecord,
        artifact_root: Path | None = None,
        alive: Callable[[], None] = lambda: None,
    ):
        self._client, self._uri, self._alive = client, uri, alive
        self._curve = Curve()
        self._settled: dict[int, tuple[object, ...]] = {}
        self.artifact_problem: str | None = None
        root = None if artifact_root is None or is_http(uri) else artifact_root.absolute().as_uri()
        self._parent = find_parent(client, record) or create_parent(client, record, root)
        self._alive()
        info = self._parent.info
        self.home = Home(uri, info.experiment_id, info.run_id, home_url(uri, info.experiment_id))
        self._parent_tags = dict(self._parent.data.tags)
        self._trials = self._read_trials()
        self._hypervolumes = self._read_hypervolumes()
        self._prepare(record)

    def update(self, record: StudyRecord, ended: Mapping[int, float], *, final: bool = False) -> None:
        """Write the settled trials that are new or changed, and the hypervolume after each.

        `ended` are the times (seconds since the epoch) at which trials ended, where they are
        known. `final` waits for no running trial.
        """
        front = {trial.number for trial in record.front}
        with tempfile.TemporaryDirectory() as scratch:
            for trial in record.trials:
                on_front = trial.number in front
                signature = (trial.state, trial.best, trial.metric_test, trial.latencies, on_front)
                if trial.state in runs.SETTLED and self._settled.get(trial.number) != signature:
                    self._write_trial(record, trial, on_front, ended.get(trial.number), Path(scratch))
                    self._settled[trial.number] = signature
        self._write_hypervolumes(record, ended, final)

    def describe(self, record: StudyRecord, text: str) -> None:
        """Write the parent's description, and the view with the knobs that vary most by now."""
        self._tag_parent(runs.study_tags(record) | {"mlflow.note.content": runs.cut(text)})
        self._write_view(record)

    def write_artifacts(self, files: Iterable[Path], folder: str | None) -> None:
        """Copy files into a folder of the parent's artifacts (None: their root)."""
        for file in files:
            self._log_artifact(self._parent.info.artifact_uri, file, folder)
            self._alive()

    def end(self, status: str) -> None:
        """End the parent run."""
        self._client.set_terminated(self.home.run_id, status)
        self._alive()

    # the parent

    def _prepare(self, record: StudyRecord) -> None:
        from mlflow.entities import Param

        params = {k: v for k, v in runs.study_params(record).items() if v and k not in self._parent.data.params}
        self._client.log_batch(self.home.run_id, params=[Param(k, v) for k, v in params.items()])
        self._tag_parent(runs.study_tags(record))
        if self._parent.info.status != "RUNNING":
            self._client.update_run(self.home.run_id, "RUNNING")
        experiment = self._client.get_experiment(self.home.experiment_id)
        for key, value in view.EXPERIMENT_TAGS.items():
            if experiment.tags.get(key) != value:
                self._client.set_experiment_tag(self.home.experiment_id, key, value)
        self._view = experiment.tags.get(view.VIEW_TAG)
        self._write_view(record)
        with tempfile.TemporaryDirectory() as folder:
            space, settings = Path(folder, "space.json"), Path(folder, "study.json")
            space.write_text(_json(dict(record.space)), encoding="utf-8")
            settings.write_text(_json(runs.study_settings(record)), encoding="utf-8")
            self.write_artifacts([space, settings], None)

    def _tag_parent(self, tags: Mapping[str, str]) -> None:
        self._write_tags(self.home.run_id, self._parent_tags, tags)
        self._alive()

    def _write_view(self, record: StudyRecord) -> None:
        if self._view is not None and view.read_view_tag(self._view) == view.view_state(record):
            return
        self._view = view.view_tag(record, _now_ms())
        self._client.set_experiment_tag(self.home.experiment_id, view.VIEW_TAG, self._view)
        self._alive()

    # the trials

    def _read_trials(self) -> dict[int, _Stored]:
        """The trials' runs by number; of a number that is there twice, all but the first are deleted."""
        where = f"tags.`autocompress.role` = 'trial' and tags.`mlflow.parentRunId` = '{self.home.run_id}'"
        found: dict[int, _Stored] = {}
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.home.experiment_id],
                where,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            self._alive()
            for run in page:
                number = int(run.data.tags["autocompress.trial"])
                if number in found:
                    self._client.delete_run(run.info.run_id)
                else:
                    found[number] = _stored(run)
            token = page.token
            if not token:
                return found

    def _write_trial(
        self, record: StudyRecord, trial: TrialRecord, on_front: bool, ended: float | None, scratch: Path
    ) -> None:
        wanted = runs.trial_run(record, trial, on_front)
        stored = self._trials.get(trial.number)
        if stored is not None and not _grows_into(stored, wanted):
            self._client.delete_run(stored.run_id)
            stored = None
        if stored is None:
            stored = self._create_trial(trial, wanted, _start_ms(record, trial, ended), scratch)
            self._trials[trial.number] = stored
        elif stored.tags.get(PLAN_TAG) != PLAN_FILE:
            self._write_plan(stored, trial, scratch)
        self._write_points(stored, wanted)
        self._write_tags(stored.run_id, stored.tags, wanted.tags)
        if stored.status != wanted.status:
            end_ms = stored.start_ms + max(1, round(1000 * trial.seconds))
            self._client.set_terminated(stored.run_id, wanted.status, end_ms)
            stored.status = wanted.status
        self._alive()

    def _create_trial(self, trial: TrialRecord, wanted: runs.Run, start_ms: int, scratch: Path) -> _Stored:
        tags = {"mlflow.parentRunId": self.home.run_id, PLAN_TAG: PLAN_FILE, **wanted.tags}
        run = self._client.create_run(self.home.experiment_id, start_ms, tags, wanted.name)
        stored = _stored(run)
        self._write_plan(stored, trial, scratch)
        return stored

    def _write_plan(self, stored: _Stored, trial: TrialRecord, scratch: Path) -> None:
        """Write the plan as an artifact; where artifacts are refused, tag the run so that a sync tries again."""
        written = False
        if self.artifact_problem is None:
            plan = scratch / PLAN_FILE
            plan.write_text(_json(trial.plan.to_json()), encoding="utf-8")
            written = self._log_artifact(stored.artifact_uri, plan, None)
        self._write_tags(stored.run_id, stored.tags, {PLAN_TAG: PLAN_FILE if written else "missing"})

    def _write_points(self, stored: _Stored, wanted: runs.Run) -> None:
        """Write the parameters and the metrics of a new run, or the metrics that an old one lacks."""
        from mlflow.entities import Metric, Param

        params = [Param(k, v) for k, v in wanted.params.items() if k not in stored.params]
        metrics = [
            Metric(point.key, point.value, stored.start_ms + round(1000 * point.seconds), point.step)
            for point in wanted.points
            if point.key not in stored.latest
        ]
        while params or metrics:
            self._client.log_batch(stored.run_id, metrics[:METRICS_PER_BATCH], params[:PARAMS_PER_BATCH])
            params, metrics = params[PARAMS_PER_BATCH:], metrics[METRICS_PER_BATCH:]
        stored.params, stored.latest = dict(wanted.params), wanted.latest

    def _write_tags(self, run_id: str, stored: dict[str, str], wanted: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = {key: value for key, value in wanted.items() if stored.get(key) != value}
        if changed:
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in changed.items()])
            stored.update(changed)

    def _log_artifact(self, artifact_uri: str, file: Path, folder: str | None) -> bool:
        """Copy a file to where a run's artifacts go. A store that refuses is remembered, not raised:
        artifacts often live elsewhere than runs, and the runs must go on."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        try:
            get_artifact_repository(artifact_uri, tracking_uri=self._uri).log_artifact(str(file), folder)
        except Exception as error:
            self.artifact_problem = f"artifact {file.name} was refused: {one_line(error)}"
            return False
        return True

    # the hypervolume

    def _read_hypervolumes(self) -> dict[int, float]:
        if "hypervolume" not in self._parent.data.metrics:
            return {}
        history = self._client.get_metric_history(self.home.run_id, "hypervolume")
        return {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}

    def _write_hypervolumes(self, record: StudyRecord, ended: Mapping[int, float], final: bool) -> None:
        from mlflow.entities import Metric

        values = self._curve.extend(record, final=final)
        last = max(values, default=-1)
        points = [
            Metric("hypervolume", value, round(1000 * ended[number]) if number in ended else _now_ms(), number)
            for number, value in values.items()
            if number not in self._hypervolumes
            or (number == last and not math.isclose(self._hypervolumes[number], value))
        ]
        for start in range(0, len(points), METRICS_PER_BATCH):
            self._client.log_batch(self.home.run_id, points[start : start + METRICS_PER_BATCH])
        if points:
            self._hypervolumes |= values
            self._alive()


def _stored(run: Any) -> _Stored:
    info, data = run.info, run.data
    return _Stored(
        info.run_id,
        info.artifact_uri,
        info.status,
        dict(data.tags),
        dict(data.params),
        dict(data.metrics),
        info.start_time,
    )


def _grows_into(stored: _Stored, wanted: runs.Run) -> bool:
    """Whether the run can become the wanted one by adding to it: what MLflow holds of parameters
    and metrics cannot be changed, and all but the test metric and latencies is written at once."""
    latest = wanted.latest
    missing, extra = latest.keys() - stored.latest.keys(), stored.latest.keys() - latest.keys()
    return (
        stored.params == wanted.params
        and all(key == "metric_test" or key.startswith("latency_") for key in missing)
        and not extra
        and all(math.isclose(latest[key], value) for key, value in stored.latest.items())
    )


def _start_ms(record: StudyRecord, trial: TrialRecord, ended: float | None) -> int:
    """When a trial began: from its end where that is known, else the study's beginning."""
    if ended is not None:
        return round(1000 * (ended - trial.seconds))
    try:
        return round(1000 * datetime.fromisoformat(record.created).timestamp()) + trial.number
    except ValueError:
        return _now_ms() + trial.number


def _now_ms() -> int:
    return round(1000 * time.time())


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str)
