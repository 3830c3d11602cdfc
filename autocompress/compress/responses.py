"""Inputs of layers, sampled on calibration batches: their moments, rows to fit factors to, others to check them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.plan import LayerSpec

ROWS = 8192
"""Inputs of a layer that are kept to fit at most; its moments are those of more, and of twice its width at least."""
BYTES = 1 << 29
"""Memory of all rows together, but for `LEAST` a layer."""
LEAST = 2048
_PRODUCTS = 40_000_000_000
"""Multiplications for the moments of a layer, which are those of up to eight times `ROWS` inputs."""
WIDEST = 4096
"""The widest input whose second moments are summed up; wider ones have those of the rows to fit, when asked for."""


@dataclass(frozen=True)
class Inputs:
    """Inputs x of one layer, a patch (in x kernel) for a convolution, in float32.

    `mean` (d,) of x; `gram` (d, d), E[x x^T], None for more than `WIDEST`; `fit` (n, d) and `check` (m, d) are rows,
    those to check from other batches.
    """

    mean: Tensor
    gram: Tensor | None
    fit: Tensor
    check: Tensor


def rows_of(layer: nn.Module, inputs: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many of the vectors (n, d) that the layer multiplies its weight (out, d) with, drawn at random."""
    if isinstance(layer, nn.Linear):
        flat = inputs.reshape(-1, layer.in_features)
        return flat[_draw(len(flat), most, generator).to(flat.device)]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    axes = len(layer.kernel_size)
    x = inputs if inputs.dim() == axes + 2 else inputs[None]
    around: Any = layer._reversed_padding_repeated_twice
    if any(around):
        x = F.pad(x, around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]  # (n, in, positions ..., kernel ...)
    x = x.movedim(1, 1 + axes)
    places = x.shape[: 1 + axes]
    drawn = _draw(places.numel(), most, generator).to(x.device)
    return x[torch.unravel_index(drawn, places)].flatten(1)


def _draw(count: int, most: int, generator: torch.Generator) -> Tensor:
    if count <= 1 << 20:
        return torch.randperm(count, generator=generator)[:most]
    return torch.randint(count, (most,), generator=generator)  # few of many: those drawn twice do not matter


def gather(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Any],
    seed: int = 0,
) -> dict[str, Inputs]:
    """Inputs of each layer by name, from batches of inputs, the last quarter of them (one at least) to check.

    A layer that the model does not call has none. Rows of a single batch are split.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = {spec.name: spec.parameters // spec.shape[0] for spec in specs}
    kept = max(LEAST, min(ROWS, BYTES // (4 * max(1, sum(widths.values())))))
    checked = max(1, len(batches) // 4) if len(batches) > 1 else 0
    fitted = len(batches) - checked
    found = {spec.name: _Sampled() for spec in specs}
    checking = False

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        width = widths[name]
        wanted = max(ROWS, 2 * width, min(8 * ROWS, _PRODUCTS // width**2)) if width <= WIDEST else kept

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor):
                most = -(-kept // (4 * checked)) if checking else -(-wanted // fitted)
                rows = rows_of(layer, x.detach(), most, generator).float()
                found[name].add(rows, checking, kept=-(-kept // fitted), moments=widths[name] <= WIDEST)

        return hook

    hooks = [
        model.get_submodule(spec.name).register_forward_pre_hook(note(spec.name), with_kwargs=True) for spec in specs
    ]
    try:
        with torch.no_grad():
            for index, inputs in enumerate(batches):
                checking = index >= fitted
                call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: made for name, sampled in found.items() if (made := sampled.inputs()) is not None}


class _Sampled:
    """Sums over the rows of a layer so far."""

    def __init__(self) -> None:
        self.fit: list[Tensor] = []
        self.check: list[Tensor] = []
        self.gram: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor, checking: bool, *, kept: int, moments: bool) -> None:
        if checking:
            self.check.append(rows)
            return
        self.fit.append(rows[:kept])
        self.count += len(rows)
        total = rows.sum(dim=0)
        self.total = total if self.total is None else self.total + total
        if moments:
            self.gram = rows.T @ rows if self.gram is None else self.gram.addmm_(rows.T, rows)

    def inputs(self) -> Inputs | None:
        if self.total is None or self.count < 2:
            return None
        fit = torch.cat(self.fit)
        if self.check:
            check = torch.cat(self.check)
        else:
            middle = -(-3 * len(fit) // 4)
            fit, check = fit[:middle], fit[middle:]
        gram = None if self.gram is None else self.gram / self.count
        return Inputs(self.total / self.count, gram, fit, check) if len(fit) and len(check) else None
