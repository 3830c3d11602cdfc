"""Rate-aware finetuning: what a tensor's file costs in bits, as a gradient.

Notation: W the float weights, s the step of their grid, u = W / s, q = round(u) the levels, n the
elements of all priced tensors, lambda the price (`Recipe.rate`).

The objective is loss + lambda / n x R, R the bits of all levels under a model of the coder: a weight
is nonzero with a probability p that follows from the shares of nonzero weights in its row and in its
column (their log odds add up) and from its neighbours (`neighbours`), its magnitude costs what the tensor's histogram
says, its sign a bit:

    R(0) = -log2(1 - p)        R(q) = -log2 p - log2 h(|q|) + 1

Between two levels R is linear, so that it has a gradient, dR/du = R(floor u + 1) - R(floor u); the
model is counted anew every few steps. Rounding is straight-through, s is learned (Esser et al. 2020,
arXiv 1902.08153). The idea of training under an entropy model of the weights: Oktay et al. 2020,
arXiv 1906.06624, there in a learned latent space, here under the counts of the file's own coder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.codec.tensors import Coded, grid_table
from autocompress.compress import neighbours, quantize

REFRESH = 20
"""Steps between two counts of the model."""
HELD = 4
"""Steps for which slopes are kept: weights move by some hundredths of a level in them."""
SILENT = 200, 2000
"""Steps, least and most, without any gradient after which a row or a column is cleared; in between an epoch."""
BIAS_BITS = 8
RAMP = 0.3
"""The share of the finetuning in which the price rises from the one before."""


class RatedCode:
    """One tensor under a price: all its floats, on a grid of learned step.

    `weights` (the tensor's shape) and `log_step` () are leaf tensors that an optimiser trains. Nothing is
    masked: what rounds to zero may come back, but for the rows that do not stay (`rows`, bool (out,)). `unit` is what
    thresholds count in. Of a table that is `looked_up` a row may be needed that no training example has: nothing of it
    is ever `silent`, and rows that no gradient has reached cost nothing, else the price alone would make them zero.
    """

    table: Tensor | None = None
    _pulls: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        weights: Tensor,
        bits: int,
        step: Tensor | float,
        unit: float,
        rows: Tensor | None = None,
        *,
        looked_up: bool = False,
    ) -> None:
        self.rows = None if rows is None else rows.to(weights).view(-1, *(1 for _ in weights.shape[1:]))
        self.weights = in_rows(weights.detach(), self.rows).clone().requires_grad_()
        self.log_step = torch.as_tensor(step).to(weights).log().requires_grad_()
        self.top, self.unit, self.looked_up = quantize.levels(bits)[1], unit, looked_up
        self._attraction = neighbours.Attraction(tuple(weights.shape))
        self._heard = torch.zeros_like(self.weights)  # the largest gradient of each weight
        self.count()

    @property
    def step(self) -> Tensor:
        """The grid's step, a scalar."""
        return self.log_step.exp()

    def values(self) -> Tensor:
        """The tensor that the model computes with; differentiable in `weights` (straight through) and `log_step`."""
        return in_rows(_Grid.apply(self.weights, self.step, self.top), self.rows)  # type: ignore[no-untyped-call]

    def trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """The leaf tensors that learn at the recipe's rate, and those at a tenth of it."""
        return [self.weights, self.log_step], []

    @torch.no_grad()
    def levels(self) -> Tensor:
        """The levels in the weights' dtype, -top to top."""
        return (self.weights / self.step).round_().clamp_(-self.top, self.top)

    @torch.no_grad()
    def count(self) -> None:
        """Count the model of the bits anew from the present levels. Weights beyond the grid come back to its ends."""
        bound = (self.top + 0.49) * self.step
        torch.clamp(self.weights, -bound, bound, out=self.weights.data)
        levels = self.levels()
        (row, column), self.rises = model_of(levels, self.top)
        self.odds = row + column
        if min(self.odds.shape) > 1:
            self.odds = self._attraction.odds(levels.abs_().clamp_(max=1).flatten(1), self.odds)

    @torch.no_grad()
    def charge(self, price: float, anew: bool = True) -> None:
        """Add the gradients of price x R to those of the loss: at the present weights, or as they were at last.

        It is also noted where the loss had gradients. A tensor that the loss did not reach in this step (a layer
        that was dropped) is left alone.
        """
        if self.weights.grad is None or self.log_step.grad is None:
            return
        torch.maximum(self._heard, self.weights.grad.abs(), out=self._heard)
        if anew or self._pulls is None:
            step = self.step
            u = self.weights / step
            slope = slopes(u, self.odds, self.rises)
            if self.looked_up:
                slope.mul_(self._met().to(slope))
            self._pulls = slope.div(step), torch.dot(slope.flatten(), u.flatten())
        on_weights, on_step = self._pulls
        self.weights.grad.add_(on_weights, alpha=price)
        self.log_step.grad.sub_(on_step, alpha=price)

    def _met(self) -> Tensor:
        """Which rows any gradient has reached so far, of as many axes as the weights."""
        heard = self._heard.flatten(1).amax(1) != 0
        return heard.view(-1, *(1 for _ in self._heard.shape[1:]))

    @torch.no_grad()
    def silent(self) -> Tensor | None:
        """The weights of rows and columns that no gradient reached since the last call; None where all that is zero."""
        if self.looked_up:
            return None
        heard = self._heard != 0
        heard = heard.flatten(1) if heard.dim() > 1 else heard.unsqueeze(1)
        silent = ~(heard.any(1, keepdim=True) & heard.any(0, keepdim=True)).view_as(self.weights)
        self._heard.zero_()
        if not heard.any() or not (silent & (self.levels() != 0)).any():  # frozen, or unused; or nothing to clear
            return None
        return silent

    @torch.no_grad()
    def encode(self) -> Coded:
        """The tensor as the artifact holds it; its values equal `values()` in float32."""
        level = self.levels().long()
        low, high = min(int(level.min()), 0), max(int(level.max()), 0)
        grid = (float(np.float32(self.step.item())), low)
        symbols = (level - low).cpu().numpy().astype(np.uint16)
        return Coded(symbols, grid_table(*grid, high - low + 1), str(self.weights.dtype).removeprefix("torch."), grid)

    def full(self) -> Tensor:
        """All float weights."""
        return self.weights.detach().clone()


def in_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The tensor, zero but in the rows that stay (1 in a tensor that multiplies it, None for all)."""
    return tensor if rows is None else tensor * rows


class Charge:
    """The rate term of a finetuning: to be called in each step, between `backward` and the optimiser's step.

    `before` is the price that the weights were trained under so far; within the first `RAMP` of the
    `total` steps it goes over to `rate`. `epoch`: steps in which all training data are seen.
    """

    def __init__(self, codes: Sequence[RatedCode], rate: float, before: float, total: int, epoch: float = 0.0) -> None:
        self.codes, self.rate, self.before, self.total = codes, rate, before, total
        self.silent = REFRESH * math.ceil(min(SILENT[1], max(SILENT[0], epoch)) / REFRESH)
        self.elements = sum(code.weights.numel() for code in codes)

    def clear(self, step: int, outputs: Callable[[], Sequence[Tensor]]) -> None:
        """Zero what has been silent for an epoch, if the step of that number is the one to do so.

        No gradient reaches a unit that nobody reads, whose activation is off for all inputs, or whose input is always
        zero. Without this such a row stays full: the model finds its weights cheap. But none reaches a unit either
        whose activation is saturated: so what changes `outputs()`, the model's on a batch, is put back.
        """
        if not step or step % self.silent:
            return
        found = {code: silent for code in self.codes if (silent := code.silent()) is not None}
        if not found:
            return
        before = [tensor.clone() for tensor in outputs()]
        held = {code: code.weights.detach().clone() for code in found}
        for code, silent in found.items():
            code.weights.data.masked_fill_(silent, 0.0)
        if _same(before, outputs()):
            return
        for code, weights in held.items():
            code.weights.data.copy_(weights)
        for code, silent in found.items():
            code.weights.data.masked_fill_(silent, 0.0)
            if not _same(before, outputs()):
                code.weights.data.copy_(held[code])

    def __call__(self, step: int) -> None:
        """Add the term's gradients in the step of that number."""
        if step % REFRESH == 0:
            for code in self.codes:
                code.count()
        share = min(1.0, step / (RAMP * self.total))
        rate = self.before + share * (self.rate - self.before)
        for code in self.codes:
            code.charge(rate / self.elements, anew=step % HELD == 0)


@torch.no_grad()
def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether outputs differ by rounding alone."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    return all(float((a - b).abs().max()) <= 1e-5 * float(a.abs().max()) + 1e-12 for a, b in pairs)


def model_of(levels: Tensor, top: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log odds (base 2) of nonzero by row (r, 1) and column (1, c), which add up, and what each level costs more.

    `levels` (r, ...) count as a matrix (r, c), those of one axis as one row. The second result (top + 1,)
    holds R(k + 1) - R(k), k = 0 .. top - 1, without the odds for k = 0, then 0.
    """
    size = levels.abs().flatten(1) if levels.dim() > 1 else levels.abs().unsqueeze(0)
    nonzero = torch.gt(size, 0, out=torch.empty_like(size))  # as floats: torch is slow with bools
    rows, columns = size.shape
    row = _odds((nonzero.sum(1, keepdim=True) + 0.4) / (columns + 1))
    column = _odds((nonzero.sum(0, keepdim=True) + 0.4) / (rows + 1))
    middle = _odds((nonzero.sum() + 0.4) / (nonzero.numel() + 1))
    counts = torch.bincount(size.flatten().int(), minlength=top + 1)[1:].to(size) + 0.3
    bits = 1 - torch.log2(counts / counts.sum())
    bits = bits.cummax(0).values  # no level is cheaper than a lower one: else weights would gather at the top
    return (row - middle, column), torch.cat([bits[:1], bits.diff(), bits.new_zeros(1)])


def excess(rises: Tensor) -> Tensor:
    """R(k) - R(0) for k = 0 .. top, (top + 1,), without the odds."""
    return torch.cat([rises.new_zeros(1), rises[:-1].cumsum(0)])


def bits_of(levels: Tensor, odds: tuple[Tensor, Tensor], rises: Tensor) -> Tensor:
    """R of each level, as a matrix (r, c), under a model (`model_of`)."""
    size = (levels.abs().flatten(1) if levels.dim() > 1 else levels.abs().unsqueeze(0)).long()
    both = odds[0] + odds[1]
    told = torch.logaddexp2(torch.zeros_like(both), torch.where(size > 0, -both, both))
    return told + excess(rises)[size]


def slopes(u: Tensor, odds: Tensor, rises: Tensor) -> Tensor:
    """dR/du, of u's shape, under the log odds of u as a matrix, (r, c); R is linear between levels."""
    flat = u.flatten(1) if u.dim() > 1 else u.unsqueeze(0)
    size = flat.abs()
    level = size.clamp(max=len(rises) - 1).int()
    slope = rises.index_select(0, level.flatten()).view(size.shape)
    slope.sub_(torch.ops.aten.hardtanh_backward(odds, size, -1.0, 1.0))  # the odds, where size < 1
    return slope.mul_(flat.sign()).view_as(u)


def _odds(share: Tensor) -> Tensor:
    return torch.logit(share, eps=1e-4) / math.log(2)


class _Grid(torch.autograd.Function):
    """(W, s, top) -> s q. Straight through to W, to s the residual q - u."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, step: Tensor, top: int) -> Tensor:
        u = weights / step
        level = u.round().clamp_(-top, top)
        ctx.save_for_backward(torch.sub(level, u, out=u))
        return level.mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (residual,) = ctx.saved_tensors
        (grad,) = grads
        return grad, torch.dot(grad.flatten(), residual.flatten()), None
