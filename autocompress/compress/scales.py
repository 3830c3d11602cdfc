"""Grids with a scale for each row or group of a weight, and their fit.

Notation: W (r, d) the weights as a matrix, outputs first; G groups a row, of columns that lie together: column j is in
group floor(j G / d); s (r, G) the scales, l (r, G) the lowest level of each group. A weight's value is s q, q a whole
number from l to the highest level, and q = 0 is zero exactly. One scale for all: (1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autocompress.compress.quantize import levels

SHARES = (*(0.3 + 0.05 * k for k in range(15)),)
"""Parts of the range up to its largest weight that are tried as a grid's range; half and a quarter of a part around the
best are then tried too."""


@dataclass(frozen=True)
class Grid:
    """`step` and `low` (r, G), or (1, 1), in the weights' dtype; `low` None: symmetric."""

    step: Tensor
    low: Tensor | None
    bits: int

    @property
    def binary(self) -> bool:
        """Whether levels are -1 and 1, without 0."""
        return self.bits == 1 and self.low is None

    @property
    def parts(self) -> tuple[Tensor, Tensor | None]:
        """`step` and `low`."""
        return self.step, self.low

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level of each group, of `step`'s shape."""
        if self.low is None:
            low, high = levels(self.bits)
            return torch.full_like(self.step, low), torch.full_like(self.step, high)
        return self.low, self.low + 2**self.bits - 1

    def rounded(self, weights: Tensor, place: Tensor | None = None) -> Tensor:
        """The levels of some weights, whose groups' places in the flattened step are given (None: all the same)."""
        step, (low, high) = self.step.flatten(), (bound.flatten() for bound in self.bounds())
        if place is not None:
            step, low, high = step[place], low[place], high[place]
        if self.binary:
            return torch.where(weights >= 0, 1.0, -1.0).to(weights)
        return torch.maximum(torch.minimum(torch.round(weights / step), high), low)


def count_groups(columns: int, granularity: str | int) -> int:
    """The number of groups in a row of so many columns."""
    return max(1, round(columns / granularity)) if isinstance(granularity, int) else 1


def groups_of(columns: int, count: int, device: torch.device | None = None) -> Tensor:
    """The group of each column, (d,)."""
    return torch.arange(columns, device=device) * count // columns


def expanded(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """(r, G) or (1, 1) values for each weight of a matrix of that shape."""
    return values[:, groups_of(shape[1], values.shape[1], values.device)].expand(shape)


def places(step: Tensor, shape: tuple[int, int]) -> Tensor:
    """For each weight of a matrix the place of its scale among the flattened ones, (r d,)."""
    rows = torch.arange(shape[0], device=step.device)[:, None] * step.shape[1]
    return (rows + groups_of(shape[1], step.shape[1], step.device)).flatten()


class ScaledWeight(torch.autograd.Function):
    """(w (n,), s, grid, places) -> s q: `quantize.GridWeight` for the levels of a `Grid`, each group with its own s.

    Esser et al. 2020, arXiv 1902.08153, equation 3; the scale of a group's gradient counts its weights.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, step: Tensor, grid: Grid, place: Tensor | None) -> Tensor:
        level = grid.rounded(weights, place)
        each = step if place is None else step.flatten()[place]
        ctx.save_for_backward(weights, level, each, place)
        ctx.grid, ctx.shape = grid, step.shape
        return level * each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, level, step, place = ctx.saved_tensors
        (grad,) = grads
        u = weights / step
        low, high = (bound if place is None else bound.flatten()[place] for bound in ctx.grid.bounds())
        inside = (u >= low) & (u <= high) if not ctx.grid.binary else torch.ones_like(u, dtype=torch.bool)
        residual = grad * torch.where(inside & (not ctx.grid.binary), level - u, level)
        top = max(1.0, levels(ctx.grid.bits)[1])
        if place is None:
            return grad * inside, residual.sum().reshape(ctx.shape) / max(1.0, (u.numel() * top) ** 0.5), None, None
        size = ctx.shape.numel()
        count = torch.bincount(place, minlength=size).clamp(min=1)
        total = residual.new_zeros(size).index_add_(0, place, residual)
        return grad * inside, (total / (count * top).sqrt()).reshape(ctx.shape), None, None


def fit(weight: Tensor, importance: Tensor, bits: int, granularity: str | int, *, asymmetric: bool) -> Grid:
    """The grid of least squared error, weighted by `importance` (broadcast to (r, d)), among some for each group.

    A weight of no importance does not count. Scales are rounded to bfloat16 where there are several.
    """
    importance = importance.expand(weight.shape)
    one = granularity == "tensor"
    matrix, weights = (weight.reshape(1, -1), importance.reshape(1, -1)) if one else (weight, importance)
    count = count_groups(matrix.shape[1], granularity)
    member = torch.nn.functional.one_hot(groups_of(matrix.shape[1], count, weight.device), count).to(matrix)
    masked = torch.where(weights > 0, matrix, 0.0)
    ends = _per_group(masked, count)
    if bits == 1 and not asymmetric:
        total = (weights * masked.abs()) @ member
        step = total / (weights @ member)
        return Grid(_usable(step, one), None, 1)
    tried, best, grid = list(SHARES), torch.full_like(ends[0], torch.inf), None
    for attempt in range(len(SHARES) + 4):
        if attempt < len(SHARES):
            share = torch.full_like(ends[0], tried[attempt])
        else:  # around the best of each group
            assert grid is not None
            share = (grid[2] + (0.025, -0.025, 0.0125, -0.0125)[attempt - len(SHARES)]).clamp(min=0.05)
        step, low = _grid(ends, share, bits, asymmetric, one)
        found = Grid(step, low if asymmetric else None, bits)
        wrong = (weights * (matrix - _values(found, matrix)).square()) @ member
        if grid is None:
            grid, best = (step, low, share), wrong
        else:
            better = wrong < best
            best = torch.where(better, wrong, best)
            grid = tuple(torch.where(better, new, old) for new, old in zip((step, low, share), grid, strict=True))  # type: ignore[assignment]
    assert grid is not None
    return Grid(grid[0], grid[1] if asymmetric else None, bits)


def _values(grid: Grid, matrix: Tensor) -> Tensor:
    shape = (matrix.shape[0], matrix.shape[1])
    step = expanded(grid.step, shape)
    low, high = (expanded(bound, shape) for bound in grid.bounds())
    return torch.maximum(torch.minimum(torch.round(matrix / step), high), low) * step


def _per_group(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each group, zero among them, (r, G)."""
    columns = groups_of(matrix.shape[1], count, matrix.device).expand(matrix.shape)
    zero = matrix.new_zeros(matrix.shape[0], count)
    return (
        zero.scatter_reduce(1, columns, matrix, "amin"),
        zero.scatter_reduce(1, columns, matrix, "amax"),
    )


def _grid(ends: tuple[Tensor, Tensor], share: Tensor, bits: int, asymmetric: bool, one: bool) -> tuple[Tensor, Tensor]:
    low, high = ends
    if not asymmetric:
        top = levels(bits)[1]
        step = _usable(share * torch.maximum(-low, high) / top, one)
        return step, torch.full_like(step, -top)
    step = _usable(share * (high - low) / (2**bits - 1), one)
    return step, torch.round(share * low / step).clamp(-(2**bits) + 1, 0)


def _usable(step: Tensor, one: bool) -> Tensor:
    """Scales that can be divided by, in bfloat16's precision where there are several: 1 for a group of zeros."""
    short = step if one else step.bfloat16().to(step)
    return torch.where(short > 0, short, 1.0)
