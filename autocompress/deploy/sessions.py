"""onnxruntime on one thread of the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from autocompress.errors import ExportError
from autocompress.tasks.wording import one_line

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Session:
    """A loaded model: `run` by arrays of its inputs' names; others are left aside."""

    inner: Any

    def feed(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Those of the inputs that the model has."""
        names = {value.name for value in self.inner.get_inputs()}
        return {name: array for name, array in inputs.items() if name in names}

    def run(self, outputs: list[str] | None, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs, all if None. Raises ExportError for inputs that the model cannot run."""
        try:
            found: Arrays = self.inner.run(outputs, feed)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise ExportError(f"onnxruntime does not run the graph: {one_line(error)}") from error
        return found


def session_of(model: Any, threads: int = 1) -> Session:
    """The session of a model, or of its file. Raises ExportError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return Session(onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]))
    except Exception as error:  # onnxruntime's own exceptions have no common base
        name = model.name if isinstance(model, Path) else "the graph"
        raise ExportError(f"onnxruntime does not load {name}: {one_line(error)}") from error
