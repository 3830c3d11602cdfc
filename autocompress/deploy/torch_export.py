"""torch.export files (.pt2) with a dynamic batch size.

`torch.export.load` runs code that such a file may hold, so it is for files of one's own: check the
sha256 of the manifest before loading one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.errors import ExportError
from autocompress.tasks.wording import one_line

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def write(module: nn.Module, inputs: Mapping[str, Any], keywords: bool, path: Path) -> None:
    """Writes `module` (in eval mode, on the CPU) as a torch.export file, its weights as they are.

    `inputs` are example tensors of two or more examples along the first axis, passed by name if `keywords`, else
    in order. The file keeps neither them nor the source positions that torch notes for each operator.
    Raises ExportError for a model that torch.export refuses.
    """
    import torch

    program = exported(module, inputs, keywords)
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with quiet():
        try:
            torch.export.save(program, path)
        except Exception as error:  # whatever its serialiser meets
            raise ExportError(f"{type(module).__name__} cannot be saved by torch.export: {one_line(error)}") from error


def exported(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, *, largest: int | None = None
) -> ExportedProgram:
    """The module's graph as torch.export gives it, the batch size dynamic, or up to `largest`; fixed if that is 1.

    Arguments and errors as in `write`.
    """
    import torch

    size = {} if largest == 1 else {0: torch.export.Dim("batch", min=1, max=largest)}
    batch = dict.fromkeys(inputs, size)
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                module,
                () if keywords else tuple(inputs.values()),
                dict(inputs) if keywords else None,
                dynamic_shapes=batch if keywords else tuple(batch.values()),
                strict=False,
            )
        except Exception as error:  # torch.export raises whatever the model's own code raises, too
            raise ExportError(
                f"{type(module).__name__} cannot be exported by torch.export: {one_line(error)}"
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings, log lines and prints of torch's, onnxscript's and executorch's exporters from the user."""
    names = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torchao", "executorch", "")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
