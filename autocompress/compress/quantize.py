"""Weights of few values: k-means codebooks and uniform grids, and how gradients pass them.

Notation: w (n,) the weights that are kept, T (k,) the table of values, c (n,) codes into it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from autocompress.compress import clustering

CELLS = 2048
"""Equal parts of a codebook's range from which a weight's code is found."""
_CACHED = 1 << 17
"""Weights at a time whose numbers on the way stay in a processor's cache."""

_SMALL = 4096
"""Weights up to which it is looked for whether they have few distinct values."""


def kmeans(weights: Tensor, k: int, *, importance: Tensor | None = None) -> Tensor:
    """At most k centroids, rising, of nearly the least squared distance to the weights; k where so many differ.

    `clustering`: the best runs of cells of a histogram, then Lloyd's algorithm, exact in one dimension from prefix sums
    over the sorted weights. Even spacing, which Deep Compression found best (arXiv 1510.00149, section 3.2), leaves
    centroids that no weight is near, half of them where a layer is pruned. `importance`, of the weights' shape, weighs
    the squares; centroids are then the means of the histogram's runs.
    """
    values = weights.detach().double().cpu().numpy().ravel()
    if importance is not None:
        return torch.from_numpy(_weighted(values, importance.detach().double().cpu().numpy().ravel(), k)).to(weights)
    whole, scale = clustering.scaled(values)
    whole.sort()
    distinct = np.unique(values) if values.size <= _SMALL or values.size <= k else values
    if distinct.size <= k:
        return torch.from_numpy(distinct).to(weights)
    sums = np.concatenate([[0], np.cumsum(whole)])
    found = clustering.clustered(whole, sums, whole.size, 0, 0, k)
    return torch.from_numpy(found / scale).to(weights)


def _weighted(values: NDArray[np.float64], importance: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([low])
    bins = ((values - low) * (clustering.BINS / (high - low))).astype(np.int64).clip(0, clustering.BINS - 1)
    sizes = np.bincount(bins, importance, clustering.BINS)
    return clustering.centres(sizes, np.bincount(bins, importance * values, clustering.BINS), k)


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
    return _codes(weights, table).long()


def _codes(weights: Tensor, table: Tensor) -> Tensor:
    """What `nearest` gives, as int32."""
    edges = (table[1:] + table[:-1]) / 2
    fine = weights.dtype in (torch.float32, torch.float64)  # others cannot tell the cells apart
    if fine and weights.device.type == "cpu" and weights.numel() > CELLS and len(edges) > 0:
        codes = _by_cells(weights.flatten(), edges)
        if codes is not None:
            return codes.view(weights.shape)
    return torch.bucketize(weights, edges, out_int32=True)


def _by_cells(weights: Tensor, edges: Tensor) -> Tensor | None:
    """What `torch.bucketize` gives, in a time that does not grow with the edges: 3 to 10 times less on a CPU.

    The range of the edges is cut into equal cells. A weight starts from the code at the low end of the cell before
    its own, which is the right one or one too low where no three neighbouring cells hold two edges, and is compared
    with the edge above. A cell of margin on either side makes up for rounding. None where edges are closer.
    """
    low, high = float(edges[0]), float(edges[-1])
    scale = (CELLS - 4) / (high - low) if high > low else 1.0
    if not max(abs(low), abs(high)) * scale < 2**20:  # cells would be as small as rounding errors; NaN
        return None
    starts = torch.bucketize(torch.arange(-2, CELLS - 2).to(edges).div_(scale).add_(low), edges, out_int32=True)
    if bool((starts[3:] - starts[:-3] > 1).any()):
        return None
    above = F.pad(edges, (0, 1), value=math.inf)
    codes = torch.empty_like(weights, dtype=torch.int32)
    for part, found in zip(torch.split(weights, _CACHED), torch.split(codes, _CACHED), strict=True):
        cells = part.sub(low).mul_(scale).add_(1).clamp_(0, CELLS - 1).int().clamp_(min=0)  # NaN: the first
        torch.index_select(starts, 0, cells, out=found)
        found.add_(part > above.index_select(0, found))
    return codes


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
        codes = _codes(weights, table)
        ctx.save_for_backward(codes)
        ctx.size = table.numel()
        return table.index_select(0, codes.flatten()).view(codes.shape)

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
        u = weights / step
        level = to_grid(weights, bits, step) if bits == 1 else u.round().clamp_(*levels(bits))
        ctx.save_for_backward(u, level)
        ctx.bits, ctx.shape = bits, step.shape
        return level * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        u, level = ctx.saved_tensors
        (grad,) = grads
        high = levels(ctx.bits)[1]
        scale = 1.0 / max(1.0, (u.numel() * high) ** 0.5)
        if ctx.bits == 1:
            return grad, _inner(grad, level).reshape(ctx.shape) * scale, None
        bound = high * (1 + 1e-6)  # what is on the last level is inside
        inside = torch.ops.aten.hardtanh_backward(grad, u, -bound, bound)
        on_step = _inner(grad - inside, level) + _inner(inside, level - u)
        return inside, on_step.reshape(ctx.shape) * scale, None


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return torch.dot(one.flatten(), other.flatten())
