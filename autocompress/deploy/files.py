"""An artifact's model -> one file of a format."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autocompress.codec import container
from autocompress.compress.artifact import read
from autocompress.deploy.calibration import training_inputs
from autocompress.deploy.int8_choose import Choosing
from autocompress.deploy.recorder import Named, Recorder, output_tensors
from autocompress.errors import AutocompressError, ExportError
from autocompress.tasks.wording import one_line, without_paths

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

FILES = {
    "archive": "model.acz",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "torch": "model.pt2",
    "executorch": "model.pte",
    "executorch-int8": "model.int8.pte",
    "mlflow": "model.onnx",
}
"""The file that each format writes, beside manifest.json; mlflow wraps it in more."""
QUANTIZED = frozenset({"onnx-int8", "executorch-int8"})
"""Formats with activations of 8 bits, which follow the artifact as well as their metric does."""


def write_file(
    fmt: str,
    artifact: Path,
    recorder: Recorder,
    file: Path,
    effort: str | None = None,
    *,
    slim: bool = True,
    task: Task | None = None,
    choosing: Choosing | None = None,
) -> dict[str, Any]:
    """Write the file, from the recorder's module or as the artifact says; what a manifest says of it.

    Without dead units unless `slim` is false. `task` gives the formats of `QUANTIZED` their calibration data;
    `choosing` is how onnx-int8 comes to the forms of its layers.
    Raises ExportError.
    """
    if fmt in QUANTIZED and task is None:
        raise ExportError(f"format {fmt} needs a task, whose training data show ranges")
    example = recorder.repeated(2)
    inputs = {name: torch.from_numpy(array) for name, array in example.items()}
    names = list(output_tensors(recorder.model, recorder.structure))
    cut: dict[str, Any] = {}
    module: nn.Module = recorder.module
    if fmt != "archive" and slim:
        module, cut = _slim(recorder, inputs)
    if fmt in ("onnx", "mlflow"):
        from autocompress.deploy import onnx

        details = onnx.write(module, inputs, recorder.keywords, names, file) | cut
        if fmt == "mlflow":
            from autocompress.tracking import register

            details["files"] = register.write_model(file, details["inputs"], details["outputs"])
        return details
    if fmt == "onnx-int8" and task is not None:
        from autocompress.deploy import int8

        try:
            return int8.write(module, inputs, names, file, recorder=recorder, task=task, choosing=choosing) | cut
        except AutocompressError:
            raise
        except Exception as error:  # a graph that is like none before
            because = without_paths(one_line(error))
            raise ExportError(f"{recorder.model} cannot be exported to ONNX in 8 bits: {because}") from error
    if fmt == "torch":
        from autocompress.deploy import torch_export

        torch_export.write(module, inputs, recorder.keywords, file)
    elif fmt.startswith("executorch"):
        from autocompress.deploy import executorch

        calibration = training_inputs(task, list(example)) if fmt in QUANTIZED and task is not None else ()
        cut |= executorch.write(fmt, module, inputs, recorder.keywords, file, calibration=calibration)
    elif effort is None:
        shutil.copyfile(artifact, file)
    else:
        file.write_bytes(container.pack(read(artifact), effort))
    found = next(iter(recorder.outputs.values()))
    batch = cut.get("batch", {}).get("fixed", "batch")
    return {"inputs": _described(example, batch), "outputs": _described(found, batch)} | cut


def _slim(recorder: Recorder, inputs: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The module without dead units and what the manifest says of it; as it is where that cannot be done."""
    from autocompress.deploy.slim import slimmed

    try:
        module, cut = slimmed(recorder.module, inputs, recorder.keywords)
    except ExportError as error:
        return recorder.module, {"cut": {"dead_units": 0, "because": without_paths(str(error))}}
    except Exception as error:  # a graph of torch.export that is like none before: nothing has to be cut
        because = f"its graph is not understood: {without_paths(one_line(error))}"
        return recorder.module, {"cut": {"dead_units": 0, "because": because}}
    return module if cut.units else recorder.module, {"cut": cut.to_json()}


def _described(arrays: Named, batch: str | int) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": [batch, *array.shape[1:]], "dtype": str(array.dtype)} for name, array in arrays.items()
    ]
