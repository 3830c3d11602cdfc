"""Weights to values of few, such that a layer's outputs change the least: Hessian-aware rounding and pruning.

Notation: W (g, r, d) the weights, g groups of r rows; H (g, d, d) the damped second moments of the inputs, which are
the Hessian of the squared output error but for a factor; Q the values that W becomes, E = W - Q. All of it minimises
the sum over rows of E H E^T, the expected squared error of the layer's outputs.

Sweep (GPTQ, Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, the later ones make good
for the earlier. With H = R R^T, R upper triangular, E H E^T = |E R|^2, whose j-th entry the j-th column settles:
the value wanted there is w_j + sum_{i < j} e_i R_ij / R_jj. It is GPTQ without an inverse.
Descent: each value in turn goes where it is best given all others: q_j + (E H)_j / H_jj (QuantEase, Behdin et al. 2023,
arXiv 2309.01885). Neither it nor a refit of scales and tables can make the error greater.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""
BLOCK = 64
"""Columns between two large products."""
ROUNDS = 2
"""Refits of the scales, each with a descent."""
PRUNING_STEPS, REFIT_STEPS = 12, 6
"""Of conjugate gradients for the weights that stay, and for scales and tables."""
Rounder = Callable[[Tensor, int], Tensor]
"""(values wanted (g, r), column) -> values."""


def damped(gram: Tensor) -> Tensor:
    """Second moments (g, d, d) with `DAMPING`: positive definite."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean > 0, DAMPING * mean, 1.0)
    return gram + torch.diag_embed(added[:, None].expand(gram.shape[:2]))


def factor(hessian: Tensor) -> Tensor:
    """R upper triangular with H = R R^T, in H's dtype."""
    lower: Tensor = torch.linalg.cholesky(_exact(hessian.flip(1, 2)))
    return lower.flip(1, 2).to(hessian)


def inverse_diagonal(hessian: Tensor) -> Tensor:
    """The diagonal of the inverse, (g, d)."""
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(_exact(hessian)))
    return inverse.diagonal(dim1=1, dim2=2).to(hessian)


def solved(hessian: Tensor, right: Tensor) -> Tensor:
    """B H^-1, for B (g, r, d)."""
    lower = torch.linalg.cholesky(_exact(hessian))
    return torch.cholesky_solve(right.to(lower).transpose(1, 2), lower).transpose(1, 2).to(right)


def _exact(hessian: Tensor) -> Tensor:
    """In float64 where that takes no long time; damped moments of more inputs are tame enough for float32."""
    return hessian.double() if hessian.shape[1] <= 1024 else hessian


def error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """The mean squared error of the outputs, summed over rows."""
    e = weight - values
    return float((torch.bmm(e, hessian) * e).sum(dtype=torch.float64))


def sweep(weight: Tensor, hessian: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor]:
    """Values and what was wanted before rounding, (g, r, d) both."""
    upper = factor(hessian)
    values, wanted, left = torch.empty_like(weight), torch.empty_like(weight), torch.zeros_like(weight)
    for start in range(0, weight.shape[2], BLOCK):
        stop = min(start + BLOCK, weight.shape[2])
        block = upper[:, :stop, start:stop] / upper.diagonal(dim1=1, dim2=2)[:, None, start:stop]
        target = weight[:, :, start:stop] + torch.bmm(left[:, :, :start], block[:, :start])
        errors = left[:, :, start:stop]
        for j in range(start, stop):
            k = j - start
            want = target[:, :, k]
            if k:
                want = want + torch.bmm(errors[:, :, :k], block[:, start:j, k : k + 1]).squeeze(2)
            value = rounder(want, j)
            wanted[:, :, j], values[:, :, j] = want, value
            errors[:, :, k] = weight[:, :, j] - value
    return values, wanted


def descend(weight: Tensor, values: Tensor, hessian: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent from some values: values and what was wanted before rounding."""
    values, wanted = values.clone(), torch.empty_like(values)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    left = weight - values
    for start in range(0, weight.shape[2], BLOCK):
        stop = min(start + BLOCK, weight.shape[2])
        slope = torch.bmm(left, hessian[:, :, start:stop])
        block = hessian[:, start:stop, start:stop]
        for j in range(start, stop):
            k = j - start
            old = values[:, :, j].clone()
            want = old + slope[:, :, k] / diagonal[:, None, j]
            value = rounder(want, j)
            slope -= (value - old).unsqueeze(2) * block[:, k : k + 1]
            wanted[:, :, j], values[:, :, j] = want, value
        left[:, :, start:stop] = weight[:, :, start:stop] - values[:, :, start:stop]
    return values, wanted


def least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The weights that are zero where `mask` is false and whose outputs are nearest to the layer's, (g, r, d).

    What the optimal brain surgeon does, for all weights that go at once; each row by itself.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2).unsqueeze(1).expand(weight.shape)
    right = torch.bmm(weight, hessian) * mask
    return conjugate(lambda x: torch.bmm(x, hessian) * mask, right, diagonal, weight * mask, PRUNING_STEPS)


def conjugate(
    product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, x: Tensor, steps: int, *, rows: bool = True
) -> Tensor:
    """x after some steps of conjugate gradients towards product(x) = right, preconditioned by a diagonal.

    `rows`: the equations of each row (all axes but the last) are their own.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True) if rows else (a * b).sum()

    residual = right - product(x)
    scaled = residual / diagonal
    direction, now = scaled, dot(residual, scaled)
    for _ in range(steps):
        along = product(direction)
        curve = dot(direction, along)
        length = torch.where(curve > 0, now / curve, 0.0)
        x = x + length * direction
        residual = residual - length * along
        scaled = residual / diagonal
        before, now = now, dot(residual, scaled)
        direction = scaled + torch.where(before > 0, now / before, 0.0) * direction
    return x
