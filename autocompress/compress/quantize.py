"""Weights of few values: k-means codebooks and uniform grids, and how gradients pass them.

Notation: w (n,) the weights that are kept, T (k,) the table of values, c (n,) codes into it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def kmeans(weights: Tensor, k: int, iterations: int = 50) -> Tensor:
    """At most k centroids, rising, that (locally) minimise the squared distance to the weights.

    Lloyd's algorithm from evenly spaced centroids, the initialisation that Deep Compression
    found best (arXiv 1510.00149, section 3.2). In one dimension a step is exact from prefix sums
    over the sorted weights: O(k log n). Centroids that no weight is near are dropped.
    """
    values = np.sort(weights.detach().double().cpu().numpy().ravel())
    distinct = np.unique(values)
    if distinct.size <= k:
        return torch.from_numpy(distinct).to(weights)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centroids: NDArray[np.float64] = np.linspace(values[0], values[-1], k)
    for _ in range(iterations):
        edges = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2, side="right")
        bounds = np.concatenate([[0], edges, [values.size]])
        sizes = np.diff(bounds)
        taken = sizes > 0
        moved = np.diff(sums[bounds])[taken] / sizes[taken]
        if moved.size == centroids.size and np.allclose(moved, centroids, rtol=1e-7, atol=0):
            break
        centroids = moved
    return torch.from_numpy(centroids).to(weights)


def levels(bits: int) -> tuple[int, int]:
    """Lowest and highest integer of a symmetric grid of that bit-width; 1 bit is -1 and +1 (no 0)."""
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)


def grid_step(weights: Tensor, bits: int) -> float:
    """The step of the symmetric grid with the least squared rounding error, of 80 tried.

    1 bit: the mean magnitude, which is the least-squares scale (Rastegari et al. 2016, XNOR-Net).
    """
    w = weights.detach().double()
    largest = float(w.abs().max()) if w.numel() else 0.0
    if largest == 0.0:
        return 1.0
    if bits == 1:
        return float(w.abs().mean())
    high = levels(bits)[1]
    sample = w if w.numel() <= 65536 else w[:: w.numel() // 65536 + 1]
    steps = largest / high * torch.linspace(0.2, 1.0, 80, dtype=torch.float64, device=w.device)
    errors = [float(((torch.round(sample / s).clamp(-high, high) * s - sample) ** 2).sum()) for s in steps]
    return float(steps[int(np.argmin(errors))])


def nearest(weights: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest entries of a rising table; int64, the weights' shape."""
    return torch.bucketize(weights, (table[1:] + table[:-1]) / 2)


def to_grid(weights: Tensor, bits: int, step: Tensor) -> Tensor:
    """Levels (integers in the weights' dtype) of the nearest grid points."""
    low, high = levels(bits)
    if bits == 1:
        return torch.where(weights >= 0, 1.0, -1.0).to(weights)
    return torch.round(weights / step).clamp(low, high)


class CodebookWeight(torch.autograd.Function):
    """(w, T) -> T[c], c the nearest codes. Straight through to w; a centroid gets its members' sum.

    The sum is Deep Compression's weight sharing (arXiv 1510.00149, equation 3).
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor) -> Tensor:
        codes = nearest(weights, table)
        ctx.save_for_backward(codes)
        ctx.size = table.numel()
        return table[codes]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (codes,) = ctx.saved_tensors
        (grad,) = grads
        return grad, torch.bincount(codes, grad, minlength=ctx.size).to(grad)


class GridWeight(torch.autograd.Function):
    """(w, s, bits) -> s * q, q the level nearest w / s. Learned step size quantization.

    Esser et al. 2020, arXiv 1902.08153: gradient to w straight through inside the range, to s
    by equation 3, scaled by 1 / sqrt(n * highest level).
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, step: Tensor, bits: int) -> Tensor:
        level = to_grid(weights, bits, step)
        ctx.save_for_backward(weights, level, step)
        ctx.bits = bits
        return level * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, level, step = ctx.saved_tensors
        (grad,) = grads
        high = levels(ctx.bits)[1]
        inside = (weights / step).abs() <= high if ctx.bits > 1 else torch.ones_like(level, dtype=torch.bool)
        residual = torch.where(inside, level - weights / step, level) if ctx.bits > 1 else level
        scale = 1.0 / max(1.0, (weights.numel() * high) ** 0.5)
        return grad * inside, (grad * residual).sum().reshape(step.shape) * scale, None
