"""One weight's code: the floats that stay, and how they become values.

Training sees the values that a file will hold; gradients reach the floats straight through (`quantize`, `scales`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.codec.tensors import Coded, Raw, grid_table
from autocompress.compress import prune, quantize, scales, solve
from autocompress.compress.artifact import raw_tensor
from autocompress.plan import LayerPlan


class Code:
    """One weight: the floats that stay, their positions, and the table or step that they go by.

    `weights` (n,) and `table` (k,) or `step` () are leaf tensors that an optimiser may train;
    a table's entries may pass each other in training. Of the rows that do not stay (`rows`, bool (out,)) none does.
    """

    def __init__(
        self,
        weight: Tensor,
        plan: LayerPlan,
        start: Mapping[str, Tensor],
        key: str,
        prepared: solve.Prepared | None = None,
        *,
        rows: Tensor | None = None,
    ) -> None:
        self.shape, self.bits, self.kind = tuple(weight.shape), plan.bits, plan.quantizer
        self.dense = weight.detach().clone()
        self.unit = unit_of(weight, start, key)
        if prepared is None:
            found = start.get(f"{key}#mask")
            mask = (
                prune.kept_mask(weight, plan.threshold, self.unit, rows) if found is None else found.to(weight.device)
            )
        else:
            mask, start = prepared.mask, prepared.learned(key)
            self.dense = torch.where(mask, prepared.weight, self.dense)
        self.pruned = not bool(mask.all())
        self.chosen = plan.saliency != "magnitude" and self.pruned
        self.positions = mask.flatten().nonzero().squeeze(1)
        self.weights = self.dense.flatten()[self.positions].clone().requires_grad_()
        self.table: Tensor | None = None
        self.step: Tensor | None = None
        self.low: Tensor | None = None
        self.place: Tensor | None = None
        if self.bits <= 8 and (plan.granularity != "tensor" or self.kind == "asymmetric"):
            self._take_grid(mask, plan, start, key)
        elif self.bits <= 8 and self.kind == "codebook":
            table = start.get(f"{key}#table")
            if table is None:
                table = quantize.kmeans(self.weights, 2**self.bits)
            self.table = table.to(self.weights).detach().clone().requires_grad_()
        elif self.bits <= 8:
            step = start.get(f"{key}#step")
            value = torch.tensor(quantize.grid_step(self.weights, self.bits)) if step is None else step
            self.step = value.to(self.weights).detach().clone().requires_grad_()

    def _take_grid(self, mask: Tensor, plan: LayerPlan, start: Mapping[str, Tensor], key: str) -> None:
        """Scales of rows or groups, or levels that are not symmetric: those given, else fitted."""
        matrix = self.dense.reshape(self.shape[0], -1)
        step, low = start.get(f"{key}#step"), start.get(f"{key}#low")
        if step is None:
            kept = mask.reshape(matrix.shape).to(matrix)
            asymmetric = self.kind == "asymmetric"
            grid = scales.fit(matrix, kept, self.bits, plan.granularity, asymmetric=asymmetric)
            step, low = (None if part is None else part.squeeze() if part.numel() == 1 else part for part in grid.parts)
        assert step is not None
        self.step = step.to(matrix).detach().clone().requires_grad_()
        self.low = None if low is None else low.to(matrix).detach().clone()
        if self.step.dim():
            self.place = scales.places(self.step, (matrix.shape[0], matrix.shape[1]))[self.positions]

    def grid(self) -> scales.Grid:
        """The grid as files carry it; differentiable in `step`."""
        assert self.step is not None
        step = self.step if self.place is None else in_short(self.step)
        return scales.Grid(step, self.low, self.bits)

    def values(self) -> Tensor:
        """The weight that the model computes with, in the weight's shape; differentiable."""
        if self.table is not None:
            kept = quantize.CodebookWeight.apply(self.weights, self.rising())  # type: ignore[no-untyped-call]
        elif self.place is not None or self.low is not None:
            grid = self.grid()
            kept = scales.ScaledWeight.apply(self.weights, grid.step, grid, self.place)  # type: ignore[no-untyped-call]
        elif self.step is not None:
            kept = quantize.GridWeight.apply(self.weights, self.step, self.bits)  # type: ignore[no-untyped-call]
        elif self.bits == 16:
            kept = self.weights + (self.weights.half().to(self.weights) - self.weights).detach()
        else:
            kept = self.weights
        if not self.pruned:
            return kept.view(self.shape)  # type: ignore[no-any-return]
        return _Placed.apply(kept, self.positions, self.shape)  # type: ignore[no-untyped-call, no-any-return]

    @torch.no_grad()
    def encode(self) -> Coded | Raw:
        """The tensor as the artifact holds it; its values equal `values()` in float32."""
        if self.table is None and self.step is None:
            dtype = torch.float16 if self.bits == 16 else self.dense.dtype
            return raw_tensor(self.values().to(dtype))
        grid: tuple[float, int] | None = None
        if self.table is not None:
            rising = self.rising()
            entries = torch.cat([rising, rising.new_zeros(int(self.pruned))]).float()  # pruned ones have the last code
            codes, rest = quantize.nearest(self.weights, rising), len(rising)
        else:
            assert self.step is not None
            level = self.levels()
            low = min(int(level.min()), 0)
            grid = (float(np.float32(self.step.item())) if self.place is None else 1.0, low)
            codes, rest = level - low, -low
            entries = torch.from_numpy(grid_table(*grid, max(int(level.max()), 0) - low + 1))
        symbols = codes.new_full((self.dense.numel(),), rest)
        symbols[self.positions] = codes
        if grid is None:  # the values that occur, once each, rising
            occurs = torch.bincount(symbols, minlength=len(entries)) > 0
            used, place = torch.unique(entries[occurs], return_inverse=True)
            places = torch.zeros(len(entries), dtype=torch.long, device=symbols.device)
            places[occurs] = place
            entries, symbols = used, places[symbols]
        array = symbols.view(self.shape).cpu().numpy().astype(np.uint16)
        return Coded(array, entries.cpu().numpy(), _name(self.dense.dtype), grid)

    def levels(self) -> Tensor:
        """The levels of the weights that stay, whole numbers."""
        assert self.step is not None
        if self.place is None and self.low is None:
            return quantize.to_grid(self.weights, self.bits, self.step).long()
        return self.grid().rounded(self.weights, self.place).long()

    def scale(self) -> Raw | None:
        """The scales beside the levels, (rows,) or (rows, groups) in bfloat16, where there are several."""
        if self.place is None:
            return None
        step = self.grid().step.detach()
        return raw_tensor((step.squeeze(1) if step.shape[1] == 1 else step).bfloat16())

    def trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """The leaf tensors that learn at the recipe's rate, and those at a tenth of it."""
        return [self.weights], [tensor for tensor in (self.table, self.step) if tensor is not None]

    def rising(self) -> Tensor:
        """The codebook in rising order and in bfloat16's precision, in which files carry it; differentiable."""
        assert self.table is not None
        return in_short(self.table.sort().values)

    def mask(self) -> Tensor:
        """True where a weight stays; bool, the weight's shape."""
        flat = torch.zeros(self.dense.numel(), dtype=torch.bool, device=self.dense.device)
        flat[self.positions] = True
        return flat.view(self.shape)

    def full(self) -> Tensor:
        """All float weights: the trained ones, and the pruned ones as they were."""
        flat = self.dense.flatten().clone()
        flat[self.positions] = self.weights.detach()
        return flat.view(self.shape)


class _Placed(torch.autograd.Function):
    """(values (n,), their positions, shape) -> a tensor of that shape, zeros elsewhere.

    torch's own gradient of `scatter` takes twice the time.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(positions)
        return values.new_zeros(math.prod(shape)).scatter_(0, positions, values).view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        (grad,) = grads
        return grad.flatten().index_select(0, positions), None, None


def unit_of(weight: Tensor, start: Mapping[str, Tensor], key: str) -> float:
    """What thresholds count in: the deviation of the weights, or of those at first that a state tells of."""
    unit = start.get(f"{key}#unit")
    return float(weight.detach().double().std(correction=0)) if unit is None else float(unit)


def in_short(tensor: Tensor) -> Tensor:
    """The tensor at bfloat16's precision, in its own dtype; gradients pass straight through."""
    return tensor + (tensor.detach().bfloat16().to(tensor) - tensor.detach())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
