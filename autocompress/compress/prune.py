"""Which weights go: thresholds to masks, and what the others become.

A threshold fixes the share of a layer's weights by the magnitude rule, whatever the saliency; the saliency says which
weights these are. So the same plan gives the same sparsity under each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.compress import rounding

STAGES = (0.5, 0.8, 1.0)
"""Shares of the weights to prune after which the others are fitted anew and judged again (saliency "hessian")."""


def magnitude_mask(weight: Tensor, threshold: float, unit: float) -> Tensor:
    """True where a weight stays: |w| >= threshold x unit. Bool, the weight's shape.

    `unit` is the standard deviation of the layer's weights before any training: Deep Compression's rule (Han et
    al. 2015, arXiv 1510.00149). The largest weight always stays, so that no layer dies whole.
    """
    size = weight.detach().abs()
    if threshold <= 0:
        return torch.ones_like(size, dtype=torch.bool)
    return size >= min(threshold * unit, float(size.max()))


def kept_mask(weight: Tensor, threshold: float, unit: float, rows: Tensor | None) -> Tensor:
    """`magnitude_mask` among the rows (out,) that stay, False in the others; None: all stay."""
    if rows is None:
        return magnitude_mask(weight, threshold, unit)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[rows] = magnitude_mask(weight[rows], threshold, unit)
    return mask


def without_least(saliency: Tensor, count: int) -> Tensor:
    """True but for the `count` entries of least saliency; bool, its shape."""
    mask = torch.ones(saliency.numel(), dtype=torch.bool, device=saliency.device)
    mask[saliency.flatten().argsort(stable=True)[:count]] = False
    return mask.view_as(saliency)


def activation_mask(weight: Tensor, squares: Tensor, count: int) -> Tensor:
    """`count` weights (g, r, d) go, those of least |w| sqrt(E[x^2]) in the layer, `squares` (g, d) being E[x^2].

    The saliency of Wanda (Sun et al. 2023, arXiv 2306.11695), the output error that a weight alone would leave; they
    compare within a row, here within the layer, whose sum of errors is then the least.
    """
    return without_least(weight.abs() * squares.sqrt().unsqueeze(1), count)


def hessian_pruned(weight: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mask without `count` weights (g, r, d), of least w^2 / [H^-1]_jj, and the weights that make up for them.

    Optimal brain surgeon's saliency (Hassibi and Stork 1993; for layers: OBC, arXiv 2208.11580, SparseGPT,
    arXiv 2301.00774). Instead of one weight at a time, some go at once and the others then take the least-squares
    values for all that went; in stages, since saliencies change.
    """
    scale = rounding.inverse_diagonal(hessian).unsqueeze(1)
    fitted, mask = weight, torch.ones_like(weight, dtype=torch.bool)
    for share in STAGES:
        saliency = torch.where(mask, fitted.square() / scale, -1.0)
        mask = without_least(saliency, round(share * count))
        fitted = rounding.least_squares(weight, mask, hessian)
    return mask, fitted
