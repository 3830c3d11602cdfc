"""The graph of a module as torch.export gives it: what dead units are found in, and what is written for deployment."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from autocompress.errors import ExportError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

_READS = ("DataDependent", "data-dependent", "<method 'item' of", ".numpy() is not supported")
"""By these an exporter's error is one of a model that reads values of tensors."""


def exported(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, *, largest: int | None = None
) -> ExportedProgram:
    """The module's graph as torch.export gives it, the batch size dynamic, or up to `largest`; fixed if that is 1.

    `module` is in eval mode, on the CPU; `inputs` are example tensors of two or more examples along the first axis,
    passed by name if `keywords`, else in order. Raises ExportError for a model that torch.export refuses.
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
            told = reads_values(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ExportError(f"{type(module).__name__} cannot be exported by torch.export: {told}") from error


def reads_values(error: BaseException) -> str | None:
    """What to tell of an exporter's error where the model reads values of tensors, which no graph can; else None."""
    found: BaseException | None = error
    while found is not None:
        text = str(found)
        if any(sign in f"{type(found).__name__} {text}" for sign in _READS):
            place = re.search(r"([^/\\()]+:\d+) in \w+\)", text)
            where = f" at {place[1]}" if place else ""
            return (
                f"its forward reads values of tensors{where} (.item(), int(), .numpy(), or an if on a tensor), which a "
                "graph cannot: let it compute with tensors alone, such as torch.where"
            )
        found = found.__cause__ or found.__context__
    return None


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
