"""One layer under its plan, given what its inputs are: which weights stay, what they become, on which grid or table.

Notation as in `rounding`: W (g, r, d), H (g, d, d).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from autocompress.compress import calibrate, prune, quantize, rounding, scales
from autocompress.compress.calibrate import Statistics
from autocompress.plan import LayerPlan

AIM = 0.5
"""Of the way to the weights that make good for the compressed layers before."""
_FACTORS = (0.92, 1.06, 0.86)
"""By which scales of the least weighted error are multiplied to see what a sweep makes of them; rows choose."""


@dataclass(frozen=True)
class Prepared:
    """`weight`: floats, of the layer's shape, that give the layer's values when each goes to the nearest of the grid
    or the table; `mask`: those that stay; `step`, `low` as in `scales.Grid` (`step` () where there is one for all) or
    `table`, None where the nearest rounding may choose its own.
    """

    weight: Tensor
    mask: Tensor
    step: Tensor | None = None
    low: Tensor | None = None
    table: Tensor | None = None

    def learned(self, key: str) -> dict[str, Tensor]:
        """What is given of grid and table, named as in a `lineage.State`."""
        found = {f"{key}#step": self.step, f"{key}#low": self.low, f"{key}#table": self.table}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def is_calibrated(plan: LayerPlan) -> bool:
    """Whether a plan asks for the layer's inputs."""
    return (plan.threshold > 0 and plan.saliency != "magnitude") or (plan.bits <= 8 and plan.rounding == "hessian")


def solve(
    weight: Tensor, plan: LayerPlan, unit: float, inputs: Statistics, *, drift: Tensor | None = None, groups: int = 1
) -> Prepared:
    """What becomes of a layer's weight (out, ...); thresholds count in `unit`, `inputs` are those of its groups.

    `drift` (g, d, d): see `towards`.
    """
    problem = posed(weight, plan, unit, inputs, drift=drift, groups=groups)
    if plan.bits > 8 or plan.rounding != "hessian":
        found = Prepared(problem.layout.whole(problem.weight), problem.layout.whole(problem.mask))
    else:
        found = _on_table(problem, plan) if plan.quantizer == "codebook" else on_grid(problem, plan)
    return shaped(found, weight)


def posed(
    weight: Tensor, plan: LayerPlan, unit: float, inputs: Statistics, *, drift: Tensor | None = None, groups: int = 1
) -> Problem:
    """The problem of a layer's weight, pruned; arguments as in `solve`."""
    matrix = weight.detach().float().flatten(1)
    layout = Layout(groups, inputs.parts)
    w, hessian = layout.parted(matrix), rounding.damped(inputs.gram.to(matrix))
    aim = w if drift is None else towards(w, hessian, drift.to(w))
    by_size = prune.magnitude_mask(w, plan.threshold, unit)
    count = int((~by_size).sum())
    fitted, mask = aim, by_size
    if count and plan.saliency == "activation":
        mask = prune.activation_mask(w, hessian.diagonal(dim1=1, dim2=2), count)
    elif count and plan.saliency == "hessian":
        mask, fitted = prune.hessian_pruned(aim, hessian, count)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    return Problem(layout, fitted, mask, hessian, order)


def shaped(found: Prepared, weight: Tensor) -> Prepared:
    """What was found for a layer's matrix, in the shape and dtype of its weight."""
    return replace(found, weight=found.weight.reshape(weight.shape).to(weight), mask=found.mask.reshape(weight.shape))


def of_rows(
    weight: Tensor, inputs: Statistics, drift: Tensor | None, groups: int, rows: Tensor
) -> tuple[Tensor, Statistics, Tensor | None, int]:
    """The problem of the rows that stay (bool (out,)); of a depthwise convolution with the inputs of these alone."""
    own = weight[rows.to(weight.device)]
    if groups == 1:
        return own, inputs, drift, groups
    chosen = rows.to(inputs.gram.device)
    left = Statistics(inputs.gram[chosen], inputs.mean[chosen], inputs.count)
    return own, left, None if drift is None else drift[chosen], len(own)


def among_rows(found: Prepared, weight: Tensor, rows: Tensor) -> Prepared:
    """What was found for the rows that stay, among all of a weight's: the others are as they were, and masked.

    Scales and lowest levels that rows have of their own are those of the first row where it does not stay.
    """

    def spread(part: Tensor, others: Tensor) -> Tensor:
        whole = others.clone()
        whole[rows.to(whole.device)] = part
        return whole

    def own(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.dim() < 2 else spread(part, part[:1].repeat(len(rows), 1))

    mask = spread(found.mask, torch.zeros_like(weight, dtype=torch.bool))
    return replace(
        found, weight=spread(found.weight, weight.detach()), mask=mask, step=own(found.step), low=own(found.low)
    )


def towards(weight: Tensor, hessian: Tensor, drift: Tensor) -> Tensor:
    """The weights whose outputs for the inputs x are nearest to those of `weight` for x', `AIM` of the way there.

    x are what compressed layers before give, x' what the uncompressed model does; drift is E[(x' - x) x^T]. W' = W +
    W drift H^-1: the least-squares target of GPTAQ (Li et al. 2025, arXiv 2504.02692). All the way it fits noise too.
    """
    return weight + AIM * rounding.solved(hessian, torch.bmm(weight, drift))


@dataclass(frozen=True)
class Layout:
    """How a matrix of weights (out, d) lies as (groups * parts, out / groups, d / parts), which is the g, r, d here."""

    groups: int
    parts: int

    def parted(self, matrix: Tensor) -> Tensor:
        """(out, d) as (g, r, d)."""
        return calibrate.in_parts(matrix.reshape(self.groups, -1, matrix.shape[1]), self.parts)

    def whole(self, values: Tensor) -> Tensor:
        """The inverse of `parted`."""
        _, r, d = values.shape
        return values.reshape(self.groups, self.parts, r, d).transpose(1, 2).reshape(-1, self.parts * d)


@dataclass(frozen=True)
class Problem:
    """Weights, those that stay, H, and for each of the g the order of its columns: the greatest diagonal first."""

    layout: Layout
    weight: Tensor
    mask: Tensor
    hessian: Tensor
    order: Tensor

    def sorted(self, values: Tensor) -> Tensor:
        """Columns (g, r, d) in the order of their importance."""
        return values.gather(2, self.order[:, None].expand(values.shape))

    def unsorted(self, values: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        return torch.empty_like(values).scatter_(2, self.order[:, None].expand(values.shape), values)

    def sorted_hessian(self) -> Tensor:
        """H in the order of its diagonal."""
        rows = self.hessian.gather(1, self.order[:, :, None].expand(self.hessian.shape))
        return rows.gather(2, self.order[:, None].expand(self.hessian.shape))

    def importance(self) -> Tensor:
        """The Hessian's diagonal for each weight that stays, of the weights' shape."""
        return self.hessian.diagonal(dim1=1, dim2=2).unsqueeze(1) * self.mask


def on_grid(problem: Problem, plan: LayerPlan) -> Prepared:
    layout, asymmetric = problem.layout, plan.quantizer == "asymmetric"
    matrix = layout.whole(problem.weight)
    grid = scales.fit(matrix, layout.whole(problem.importance()), plan.bits, plan.granularity, asymmetric=asymmetric)
    hessian, weight, mask = problem.sorted_hessian(), problem.sorted(problem.weight), problem.sorted(problem.mask)

    def spread(values: Tensor) -> Tensor:
        return problem.sorted(layout.parted(scales.expanded(values, (matrix.shape[0], matrix.shape[1]))))

    low, high = (spread(bound) for bound in grid.bounds())

    def rounder(step: Tensor) -> rounding.Rounder:
        def rounded(wanted: Tensor, j: int) -> Tensor:
            s = step[:, :, j]
            if plan.bits == 1 and not asymmetric:
                return torch.where(wanted >= 0, s, -s) * mask[:, :, j]
            level = torch.maximum(torch.minimum(torch.round(wanted / s), high[:, :, j]), low[:, :, j])
            return level * s * mask[:, :, j]

        return rounded

    def swept(grid: scales.Grid) -> tuple[scales.Grid, Tensor, Tensor]:
        """The grid, the values and, for each scale's row (or all of them), the error."""
        values, _ = rounding.sweep(weight, hessian, rounder(spread(grid.step)))
        left = weight - values
        wrong = layout.whole(problem.unsorted(torch.bmm(left, hessian) * left)).sum(1, keepdim=True)
        return grid, values, wrong if len(grid.step) > 1 else wrong.sum(0, keepdim=True)

    grid, values, least = swept(grid)
    for factor in _FACTORS:
        other, found, wrong = swept(replace(grid, step=_short(grid.step * factor)))
        better = wrong < least
        step = torch.where(better, other.step, grid.step)
        rows = problem.sorted(layout.parted(better.expand(matrix.shape)))
        grid, values, least = replace(grid, step=step), torch.where(rows, found, values), torch.minimum(wrong, least)
    step = spread(grid.step)
    for _ in range(rounding.ROUNDS):
        level = torch.round(values / step)
        grid = replace(grid, step=refit(problem, problem.unsorted(level), grid.step))
        step = spread(grid.step)
        values, wanted = rounding.descend(weight, level * step, hessian, rounder(step))
    one = grid.step.numel() == 1
    return Prepared(
        layout.whole(problem.unsorted(wanted)),
        layout.whole(problem.mask),
        step=grid.step.reshape(()) if one else grid.step,
        low=grid.low.reshape(()) if one and grid.low is not None else grid.low,
    )


def _short(step: Tensor) -> Tensor:
    """Scales as files carry them: in bfloat16's precision where there are several."""
    return step if step.numel() == 1 else step.bfloat16().to(step)


def refit(problem: Problem, level: Tensor, step: Tensor) -> Tensor:
    """The scales of (nearly) least error for the levels (g, r, d) as they are; an old one where none above 0 is."""
    layout, hessian = problem.layout, problem.hessian
    size = layout.whole(level).shape
    member = one_hot(scales.groups_of(size[1], step.shape[1], level.device), step.shape[1]).to(level)

    def by_scale(values: Tensor) -> Tensor:
        total = layout.whole(values) @ member
        return total if len(step) > 1 else total.sum(0, keepdim=True)

    def product(scale: Tensor) -> Tensor:
        spread = layout.parted(scales.expanded(scale, (size[0], size[1])))
        return by_scale(torch.bmm(spread * level, hessian) * level)

    diagonal = by_scale(level.square() * hessian.diagonal(dim1=1, dim2=2).unsqueeze(1)).clamp(min=1e-30)
    right = by_scale(torch.bmm(problem.weight, hessian) * level)
    steps = 1 if step.shape[1] == 1 else rounding.REFIT_STEPS
    found = rounding.conjugate(product, right, diagonal, step, steps)
    found = _short(found)
    usable = (torch.isfinite(found) & (found > 0)).all(1, keepdim=True)  # the scales of a row belong together
    return torch.where(usable, found, step)


def _on_table(problem: Problem, plan: LayerPlan) -> Prepared:
    w, mask = problem.weight, problem.mask
    table = quantize.kmeans(w[mask], 2**plan.bits, importance=problem.importance()[mask]).bfloat16().to(w)
    hessian, weight, kept = problem.sorted_hessian(), problem.sorted(w), problem.sorted(mask)

    def rounder(table: Tensor) -> rounding.Rounder:
        return lambda wanted, j: table[quantize.nearest(wanted.contiguous(), table)] * kept[:, :, j]

    _, wanted = rounding.sweep(weight, hessian, rounder(table))
    for _ in range(rounding.ROUNDS):
        code = quantize.nearest(wanted, table)
        table, code = _refit_table(weight, hessian, table, code, kept)
        _, wanted = rounding.descend(weight, table[code] * kept, hessian, rounder(table))
    whole = problem.layout.whole
    return Prepared(whole(problem.unsorted(wanted)), whole(mask), table=table)


def _refit_table(weight: Tensor, hessian: Tensor, table: Tensor, code: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The table of (nearly) least error for the codes, rising, in bfloat16's precision; and the codes into it."""
    chosen = code[mask]

    def by_entry(values: Tensor) -> Tensor:
        return torch.bincount(chosen, values[mask].double(), minlength=table.numel())

    def product(entries: Tensor) -> Tensor:
        return by_entry(torch.bmm(entries.to(weight)[code] * mask, hessian))

    diagonal = by_entry(hessian.diagonal(dim1=1, dim2=2).unsqueeze(1).expand(weight.shape)).clamp(min=1e-30)
    right = by_entry(torch.bmm(weight, hessian))
    found = rounding.conjugate(product, right, diagonal, table.double(), rounding.REFIT_STEPS, rows=False)
    rising, order = found.to(weight).sort()
    return rising.bfloat16().to(weight), order.argsort()[code]
