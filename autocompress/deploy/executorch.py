"""ExecuTorch programs (.pte) that XNNPACK runs, in float32 or with int8 weights and activations.

A program plans its memory for the largest batch, so there is one: sizes from 1 to `MAX_BATCH` run. A model whose
code bears no dynamic batch gets a program for one example at a time. The package executorch is an extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.compress.tracing import exported, quiet
from autocompress.errors import ExportError
from autocompress.tasks.wording import one_line, without_paths

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

FLOAT, INT8 = "executorch", "executorch-int8"
"""The names of the formats."""
MAX_BATCH = 64


def write(
    fmt: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    keywords: bool,
    path: Path,
    *,
    calibration: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, Any]:
    """What the manifest says of the batch sizes of the written program.

    `module` (in eval mode, on the CPU) and `inputs` as in `tracing.exported`. `INT8` quantizes weights (per
    channel) and activations (per tensor) by the ranges that `calibration`, batches of inputs, shows.
    Raises ExportError where executorch is missing or refuses the model.
    """
    require(fmt)
    held = calibration if fmt == INT8 else None
    batch: dict[str, Any] = {"max": MAX_BATCH}
    try:
        program = _program(module, inputs, keywords, MAX_BATCH, held)
    except ExportError as error:
        if not _fixes_its_batch(error):
            raise
        batch = {"fixed": 1, "because": without_paths(str(error))}
        program = _program(module, inputs, keywords, 1, held)
    path.write_bytes(program)
    return {"batch": batch}


def _fixes_its_batch(error: BaseException | None) -> bool:
    """Whether torch raised it, or what it followed from, for code that fixes a size that should be free."""
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    while error is not None and not isinstance(error, ConstraintViolationError):
        error = error.__cause__ or error.__context__
    return error is not None


def require(fmt: str) -> None:
    """Raises ExportError, which names the extra, where executorch is not installed."""
    try:
        with quiet():
            import executorch.exir  # noqa: F401
            import torchao.quantization.pt2e  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"format {fmt} needs the package executorch: pip install 'autocompress[executorch]'"
        ) from error


def _program(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    keywords: bool,
    largest: int,
    calibration: Sequence[Mapping[str, Tensor]] | None,
) -> bytes:
    """The program's bytes, in int8 if there is a calibration.

    The example has as many examples as the largest batch: what torch assumes of the size of a smaller one, such as
    which of two axes is longer, would bound the program's memory.
    """
    import torch

    example = {name: torch.from_numpy(_resized(tensor, largest)) for name, tensor in inputs.items()}
    graph = exported(module, example, keywords, largest=largest)
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            if calibration is not None:
                graph = exported(_quantized(graph, keywords, largest, calibration), example, keywords, largest=largest)
            lowered = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
        except Exception as error:  # each pass of its compiler raises what it likes
            raise ExportError(f"{type(module).__name__} cannot be lowered by executorch: {one_line(error)}") from error


def _resized(tensor: Tensor, count: int) -> Any:
    array = tensor.numpy()
    return np.resize(array, (count, *array.shape[1:]))


def _quantized(
    graph: ExportedProgram, keywords: bool, largest: int, calibration: Sequence[Mapping[str, Tensor]]
) -> nn.Module:
    """The graph in int8, by the ranges of what it computes for the calibration, up to `largest` examples a call."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    observed = prepare_pt2e(graph.module(), xnnpack_quantizer.XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for batch in calibration:
            for parts in zip(*(torch.split(tensor, largest) for tensor in batch.values()), strict=True):
                observed(**dict(zip(batch, parts, strict=True))) if keywords else observed(*parts)
    quantized: nn.Module = convert_pt2e(observed)
    return quantized
