"""Finds or creates a study's experiment and parent run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from autocompress.record import StudyRecord
from autocompress.tracking import runs


def find_parent(client: Any, record: StudyRecord) -> Any | None:
    """The study's parent run, None where the store has none or it was deleted.

    The run that the record names, else one of the same study in the experiments of its name.
    """
    if record.run_id and (run := _get_run(client, record.run_id)) and _is_parent(run, record):
        return run
    for _, experiment in _experiments(client, record):
        for run in _parents_in(client, experiment):
            if _is_parent(run, record):
                return run
    return None


def create_parent(client: Any, record: StudyRecord, artifact_root: str | None) -> Any:
    """A new parent run in the first experiment of the study's name that is empty or not there yet.

    Experiments that were deleted, or hold another study of this name, are passed over:
    "autocompress/NAME", then "autocompress/NAME-2" and so on. `artifact_root` is a URI.
    """
    name, experiment_id = "", ""
    for name, experiment in _experiments(client, record):
        if experiment is None:
            experiment_id = client.create_experiment(name, artifact_location=artifact_root)
        elif experiment.lifecycle_stage == "active" and not _parents_in(client, experiment):
            experiment_id = experiment.experiment_id
        if experiment_id:
            break
    return client.create_run(experiment_id, tags=runs.study_tags(record), run_name=record.study)


def _experiments(client: Any, record: StudyRecord) -> Iterator[tuple[str, Any | None]]:
    """Names and experiments that may hold the study; the last is a name that is free, with None."""
    for number in count(1):
        name = f"autocompress/{record.study}" + (f"-{number}" if number > 1 else "")
        experiment = client.get_experiment_by_name(name)
        yield name, experiment
        if experiment is None:
            return


def _parents_in(client: Any, experiment: Any | None) -> Sequence[Any]:
    if experiment is None or experiment.lifecycle_stage != "active":
        return []
    where, first = "tags.`autocompress.role` = 'study'", ["attributes.start_time ASC"]
    found: Sequence[Any] = client.search_runs([experiment.experiment_id], where, order_by=first)
    return found


def _is_parent(run: Any, record: StudyRecord) -> bool:
    tags = run.data.tags
    known = tags.get("autocompress.role") == "study" and tags.get("autocompress.id") == runs.study_id(record)
    return known and bool(run.info.lifecycle_stage == "active")


def _get_run(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
