"""An exported ONNX file as a MLflow model: its folder, and its place in a study's store and registry."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.errors import TrackingError, UsageError
from autocompress.record import StudyRecord, without_password
from autocompress.tracking.parent import find_parent
from autocompress.tracking.store import connect, one_line, quieten

RUNNER = Path(__file__).with_name("served.py")
"""Runs such a folder in a process of its own (`deploy.verify`)."""
_PACKAGES = ("mlflow", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Registered:
    """A version in a store's model registry. `uri` is what `mlflow models serve -m` takes."""

    name: str
    version: str
    alias: str | None
    tracking_uri: str

    @property
    def uri(self) -> str:
        """models:/NAME@ALIAS, or models:/NAME/VERSION."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def check_names(name: str | None, alias: str | None) -> None:
    """Raises UsageError for a name or an alias that MLflow's registry does not take."""
    if name is not None and not re.fullmatch(r"\w[\w. -]{0,254}", name):
        raise UsageError(f"register is {name!r}, allowed: up to 255 letters, digits, spaces and _ . -")
    if alias is None:
        return
    if name is None:
        raise UsageError(f"alias is {alias!r}, allowed with a name to register only: --register NAME")
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise UsageError(
            f"alias is {alias!r}, allowed: up to 255 letters, digits, _ and -; 'latest' and 'v1', 'v2', ... are taken"
        )


def write_model(file: Path, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the files in the folder of the ONNX file, once it is a MLflow model of the flavour onnx.

    `inputs` and `outputs` have name, shape ("batch" first) and dtype. A single input is passed to the model as it
    is, several by name. The example of an input is one of zeros: no example of the user's data goes along.
    """
    quieten()
    import onnx
    from mlflow import onnx as flavour
    from mlflow.models import ModelSignature

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    example = {value["name"]: np.zeros((1, *value["shape"][1:]), value["dtype"]) for value in inputs}
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch, "model")
        flavour.save_model(
            onnx.load(file),
            made,
            signature=ModelSignature(_schema(inputs, named=len(inputs) > 1), _schema(outputs, named=True)),
            input_example=example if len(example) > 1 else next(iter(example.values())),
            pip_requirements=[f"{package}=={version(package)}" for package in _PACKAGES],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
        for path in made.iterdir():
            if path.name != file.name:
                shutil.move(path, file.parent / path.name)
    return sorted(path.name for path in file.parent.iterdir())


def _schema(values: Sequence[Mapping[str, Any]], *, named: bool) -> Any:
    from mlflow.types import Schema, TensorSpec

    return Schema(
        [
            TensorSpec(np.dtype(value["dtype"]), (-1, *value["shape"][1:]), value["name"] if named else None)
            for value in values
        ]
    )


def register(
    record: StudyRecord, uri: str, folder: Path, manifest: Mapping[str, Any], *, name: str, alias: str | None = None
) -> Registered:
    """The new version of the registered model `name`, which has the files of the exported folder, and the alias.

    They are logged as a model of the trial's run (the study's, where the store has none of the trial). `manifest` is
    that of the export. Raises TrackingError where the study is not in the store, or the store refuses or is away;
    no model is left in it then, but where the alias alone is refused. Raises UsageError for names that MLflow does not
    take.
    """
    check_names(name, alias)
    where = f"MLflow at {without_password(uri)}"
    try:
        client = connect(uri)
        parent = find_parent(client, record)
        if parent is None:
            raise TrackingError(f"study {record.study!r} is not in {where}: run autocompress sync {record.study}")
        trial = int(manifest["recorded"]["trial"])
        run_id = _trial_run(client, parent.info, trial) or parent.info.run_id
        made = _version(client, parent.info.experiment_id, run_id, folder, manifest, name=name)
    except TrackingError:
        raise
    except Exception as error:  # stores raise whatever their database or network raises
        raise TrackingError(f"{where}: the model was not registered: {one_line(error)}") from error
    if alias is not None:
        try:
            client.set_registered_model_alias(name, alias, made)
        except Exception as error:
            told = f"version {made} of {name!r} is registered, but not as {alias!r}: {one_line(error)}"
            raise TrackingError(f"{where}: {told}") from error
    return Registered(name, made, alias, uri)


def _version(
    client: Any, experiment_id: str, run_id: str, folder: Path, manifest: Mapping[str, Any], *, name: str
) -> str:
    """The number of the new version of the model `name`; model and version are deleted where anything fails."""
    from mlflow.entities import LoggedModelOutput

    tags = model_tags(manifest)
    _ensure_name(client, name)
    made: Any = None
    model = client.create_logged_model(experiment_id, f"trial-{manifest['recorded']['trial']}", run_id, tags)
    try:
        for file in (*manifest["files"], "manifest.json"):
            client.log_model_artifact(model.model_id, str(folder / file))
        client.finalize_logged_model(model.model_id, "READY")
        source = model.artifact_location  # models:/ID would be looked up in the store of MLFLOW_TRACKING_URI
        made = client.create_model_version(name, source, run_id, tags, model_id=model.model_id, await_creation_for=0)
        link = [{"name": name, "version": made.version}]  # the store's own, which only a server writes by itself
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(link)})
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])  # last: a run keeps it
    except Exception:
        with contextlib.suppress(Exception):
            if made is not None:
                client.delete_model_version(name, made.version)
            client.delete_logged_model(model.model_id)
        raise
    return str(made.version)


def model_tags(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the tags of a logged model and its version say: study, trial, bytes, metric, sha256."""
    recorded, checks = manifest["recorded"], manifest["verification"]
    return {
        "autocompress.study": str(recorded["study"]),
        "autocompress.trial": str(recorded["trial"]),
        "autocompress.size_bytes": str(manifest["size_bytes"]),
        "autocompress.metric": str(checks["metric"]),
        "autocompress.metric_test": f"{checks['metric_exported']:.6g}",
        "autocompress.sha256": str(manifest["sha256"]),
    }


def _ensure_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _trial_run(client: Any, parent: Any, trial: int) -> str | None:
    """The run of a trial of that parent."""
    where = (
        f"tags.`autocompress.role` = 'trial' and tags.`mlflow.parentRunId` = '{parent.run_id}' "
        f"and tags.`autocompress.trial` = '{trial}'"
    )
    for run in client.search_runs([parent.experiment_id], where, max_results=1):
        return str(run.info.run_id)
    return None
