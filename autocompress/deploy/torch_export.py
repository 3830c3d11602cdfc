"""torch.export files (.pt2) with a dynamic batch size.

`torch.export.load` runs code that such a file may hold, so it is for files of one's own: check the
sha256 of the manifest before loading one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.compress.tracing import exported, quiet
from autocompress.errors import ExportError
from autocompress.tasks.wording import one_line

if TYPE_CHECKING:
    from torch import nn


def write(module: nn.Module, inputs: Mapping[str, Any], keywords: bool, path: Path) -> None:
    """Writes `module` (in eval mode, on the CPU) as a torch.export file, its weights as they are.

    `inputs` and `keywords` as in `tracing.exported`. The file keeps neither the inputs nor the source positions that
    torch notes for each operator.
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
