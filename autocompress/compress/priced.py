"""Levels that are worth their bits: rounding by the error of a layer's outputs and the price of what is coded.

Notation as in `solve` and `rate`: W (g, r, d), H (g, d, d), levels Q on a grid of step s, R(Q) their bits under the
model of the coder, counted from Q itself. What is to be least is

    |W - s Q|^2_H / V + bit x R(Q)

V being the variance of the layer's outputs, so that layers compare, and `bit` the price of one. As in `rounding` a
sweep goes over the columns, later ones make good for earlier ones, and descents follow; only that a value does not go
to the nearest level but to the one that costs the least. Between descents the model is counted anew and the step
refitted. A sweep pays a share of the price alone: what it makes zero early, no later column can mend.

Rate-distortion optimised quantisation of weights: Wiedemann et al. 2020, DeepCABAC, arXiv 1907.11900, section III,
there with a diagonal of the Hessian and a grid of steps and prices to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autocompress.compress import quantize, rate, rounding
from autocompress.compress.calibrate import Statistics
from autocompress.compress.solve import Prepared, Problem, on_grid, posed, refit, shaped
from autocompress.plan import LayerPlan

EXCHANGE = 0.005
"""The relative squared error of one layer's outputs that a rate of 1 takes for a bit an element."""
SWEPT = 0.2
"""The share of the price that a sweep pays."""
DESCENTS = 3
"""Of the best step: each with the model counted and the step fitted anew."""
FINEST = 5
"""Bits of the finest grid that is tried; more levels are there to be used, not to be filled."""
_INSIDE = 0.45
"""How far from its level, in steps, a float weight may be at most."""


@dataclass(frozen=True)
class Rounded:
    """Levels (g, r, d) on a grid of step s (), the floats that wanted to be there, and what it costs in all."""

    step: Tensor
    level: Tensor
    wanted: Tensor
    cost: float


class Pricer:
    """One layer's problem, columns sorted: levels for a step, and their cost. `bit`: the price of one, relative."""

    def __init__(self, problem: Problem, bits: int, variance: float, bit: float) -> None:
        self.problem, self.top = problem, quantize.levels(bits)[1]
        self.variance, self.bit = variance, bit
        self.hessian = problem.sorted_hessian()
        self.weight, self.mask = problem.sorted(problem.weight), problem.sorted(problem.mask)

    def cost(self, step: Tensor, level: Tensor) -> float:
        """What is to be least."""
        matrix = self._matrix(level)
        bits = rate.bits_of(matrix, *rate.model_of(matrix, self.top)).sum(dtype=torch.float64)
        return rounding.error(self.weight, step * level, self.hessian) / self.variance + self.bit * float(bits)

    def swept(self, step: Tensor) -> Rounded:
        """A sweep and a descent from the nearest levels' model."""
        nearest = (self.weight * self.mask / step).round().clamp(-self.top, self.top)
        scale = rounding.factor(self.hessian).diagonal(dim1=1, dim2=2).square()
        values, _ = rounding.sweep(self.weight, self.hessian, self._rounder(step, nearest, scale, SWEPT))
        return self.descended(step, torch.round(values / step))

    def descended(self, step: Tensor, level: Tensor) -> Rounded:
        """One descent at the full price."""
        rounder = self._rounder(step, level, self.hessian.diagonal(dim1=1, dim2=2), 1.0)
        values, wanted = rounding.descend(self.weight, step * level, self.hessian, rounder)
        level = torch.round(values / step)
        return Rounded(step, level, wanted, self.cost(step, level))

    def usual(self, prepared: Prepared) -> Rounded:
        """What rounding without a price found."""
        assert prepared.step is not None
        wanted = self.problem.sorted(self.problem.layout.parted(prepared.weight))
        level = torch.round(wanted / prepared.step).clamp(-self.top, self.top) * self.mask
        return Rounded(prepared.step, level, wanted, self.cost(prepared.step, level))

    def refined(self, found: Rounded) -> Rounded:
        """The best of some more descents, each after a fit of the step."""
        best = found
        for _ in range(DESCENTS):
            step = refit(self.problem, self.problem.unsorted(found.level), found.step.reshape(1, 1)).reshape(())
            found = self.descended(step, found.level)
            best = min(best, found, key=lambda one: one.cost)
        return best

    def _matrix(self, level: Tensor) -> Tensor:
        return self.problem.layout.whole(self.problem.unsorted(level))

    def _rounder(self, step: Tensor, level: Tensor, scale: Tensor, share: float) -> rounding.Rounder:
        """Each value to the level of least scale x error + price; the model is that of `level`."""
        (rows, columns), rises = rate.model_of(self._matrix(level), self.top)
        paid = share * self.bit * self.variance
        odds = paid * self.problem.sorted(self.problem.layout.parted(rows + columns))
        table = paid * rate.excess(rises)

        def rounded(wanted: Tensor, j: int) -> Tensor:
            size = (wanted / step).abs()
            below = size.floor().clamp(max=self.top)
            most = scale[:, None, j] * step.square()
            best, least = torch.zeros_like(size), most * size.square()
            for other in (below, (below + 1).clamp(max=self.top), (below - 1).clamp(min=0)):
                cost = most * (size - other).square() + table[other.long()] - odds[:, :, j]
                better = (cost < least) & (other > 0)
                best, least = torch.where(better, other, best), torch.where(better, cost, least)
            return wanted.sign() * best * step * self.mask[:, :, j]

        return rounded


def solve(
    weight: Tensor,
    plan: LayerPlan,
    unit: float,
    inputs: Statistics,
    *,
    bit: float,
    drift: Tensor | None = None,
    groups: int = 1,
) -> Prepared:
    """What becomes of a layer's weight where a bit costs `bit`, in shares of the variance of the layer's outputs.

    Never costlier than what rounding without a price gives. Other arguments as in `solve.solve`; one step for all.
    """
    plain = replace(plan, quantizer="uniform", granularity="tensor")
    problem = posed(weight, plain, unit, inputs, drift=drift, groups=groups)
    pricer = Pricer(problem, plan.bits, _variance(problem, inputs), bit)
    tried = _first(pricer.swept(step) for step in _steps(problem.weight[problem.mask], plan.bits))
    best = min(pricer.usual(on_grid(problem, plain)), pricer.refined(tried), key=lambda found: found.cost)
    near = _INSIDE * best.step
    floats = torch.clamp(best.wanted, best.step * best.level - near, best.step * best.level + near)
    whole = problem.layout.whole
    return shaped(Prepared(whole(problem.unsorted(floats)), whole(problem.mask), step=best.step), weight)


def _variance(problem: Problem, inputs: Statistics) -> float:
    """Of the layer's outputs, summed over them."""
    mean = inputs.mean.reshape(len(inputs.gram), 1, -1).to(problem.weight)
    spread = problem.hessian - mean.transpose(1, 2) * mean
    return max(rounding.error(problem.weight, torch.zeros_like(problem.weight), spread), 1e-30)


def _first(tries: Iterator[Rounded]) -> Rounded:
    """The best of those up to the first that is worse than one before."""
    best = next(tries)
    for found in tries:
        if found.cost >= best.cost:
            break
        best = found
    return best


def _steps(weights: Tensor, bits: int) -> Iterator[Tensor]:
    """Steps to try, the coarsest first: the least-squares ones of few bits."""
    coarsest = quantize.grid_step(weights, 2)
    yield weights.new_tensor(1.5 * coarsest)
    for few in range(2, min(bits, FINEST) + 1):
        yield weights.new_tensor(quantize.grid_step(weights, few))
