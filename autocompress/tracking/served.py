"""Runs a MLflow model as `mlflow models serve` does, for `deploy.verify`. Imports nothing of autocompress."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def runner(file: str) -> tuple[Callable[[Mapping[str, Any]], list[Any]], str]:
    """What gives a call's outputs for its inputs by name, and the packages at work; `file` lies in the model's folder.

    MLflow runs code that a folder may name, so this is for folders of one's own.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import pyfunc

    model = pyfunc.load_model(str(Path(file).parent))

    def run(inputs: Mapping[str, Any]) -> list[Any]:
        single = next(iter(inputs.values())) if len(inputs) == 1 else None
        return list(model.predict(dict(inputs) if single is None else single).values())

    return run, f"mlflow {version('mlflow')}, onnxruntime {version('onnxruntime')}"
