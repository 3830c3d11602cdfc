"""Factors of least output error: SVDs and Tucker-2 in the metric of a layer's inputs.

Notation: W a layer's weight as (out, d), d = in x kernel; x an input of it (d,), a patch for a convolution;
G (d, d) the second moments of x, centred where the mean output error can go into a bias. The error of W' is
E |W x - W' x|^2 = tr((W - W') G (W - W')^T).

channel: the best W' of rank r is U U^T W, U the leading r eigenvectors of W G W^T: the principal components of the
    outputs. It is the truncated SVD of the whitened weight W G^(1/2) (SVD-LLM, arXiv 2403.07378, section 3.2; Drone,
    Chen et al. 2021), without a root or an inverse of G.
spatial and tucker: no closed form under a full G. Their input side is found under the nearest G that is a product of
    two small ones (partial traces), where it is an SVD again; then the output side is solved exactly under G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.compress.lowrank import Svd, as_matrix

_DAMPING = 1e-6
"""Part of the mean second moment that is added to each: inputs never seen count a little, as they do for plain SVD."""


def damped(gram: Tensor) -> Tensor:
    """Second moments (d, d) in float64, symmetric, with a little on the diagonal."""
    whole = gram.to(torch.float64, copy=True)
    whole += whole.T.clone()
    whole *= 0.5
    mean = whole.diagonal().mean()
    whole.diagonal().add_(torch.where(mean > 0, _DAMPING * mean, 1.0))  # inputs that never vary are all alike
    return whole


def root_of(gram: Tensor) -> Tensor:
    """A lower triangular L with L L^T the second moments, damped as much as that needs (tenfold each time)."""
    whole, mean = damped(gram), gram.diagonal().mean().double()
    for power in range(-5, 3):
        root, failed = torch.linalg.cholesky_ex(whole)
        if not int(failed):
            break
        whole.diagonal().add_(10.0**power * mean)
    made: Tensor = root
    return made


def output_error(difference: Tensor, gram: Tensor | None) -> float:
    """E |D x|^2 for D (out, d); its squared norm without second moments."""
    flat = difference.double()
    return float((flat * flat).sum() if gram is None else ((flat @ gram) * flat).sum())


def channel_svd(matrix: Tensor, gram: Tensor) -> Svd:
    """U, S, V^T (as `lowrank.svd` gives them, terms in the order of the outputs' energy) for W (out, d) and G (d, d).

    Columns of U and rows of V^T have length 1; V^T is not orthogonal.
    """
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        return component_svd(matrix, matrix @ gram @ matrix.T)
    root = root_of(gram)
    whitened = matrix @ root
    basis = leading(whitened.T @ whitened)
    right = torch.linalg.solve_triangular(root, basis.T.contiguous(), upper=False, left=False)
    return _terms(whitened @ basis, right)


def component_svd(matrix: Tensor, outputs: Tensor) -> Svd:
    """The same from the second moments of the outputs (out, out)."""
    left = leading(outputs)
    return _terms(left, left.T @ matrix.double())


def spatial_svd(weight: Tensor, gram: Tensor) -> Svd:
    """The same for the spatial scheme's matrix, under the product of (in x height) and width moments by trace."""
    _, inner, height, width = weight.shape
    four = gram.reshape(inner * height, width, inner * height, width)
    rows, columns = torch.einsum("awbw->ab", four), torch.einsum("avaw->vw", four)
    columns = columns / columns.trace()
    root = root_of(columns)
    matrix = as_matrix(weight.double(), "spatial")
    whitened = (matrix.reshape(len(matrix), -1, width) @ root).reshape(len(matrix), -1)
    values, basis = torch.linalg.eigh(whitened.T @ rows @ whitened)
    basis = basis[:, values.argsort(descending=True)][:, : min(matrix.shape)]
    right = basis.T.reshape(basis.shape[1], -1, width)
    right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return _terms(whitened @ basis, right.flatten(1))


def leading(square: Tensor) -> Tensor:
    """All eigenvectors of a symmetric matrix, that of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh((square + square.T) / 2)[1]
    return vectors.flip(1)


def _terms(left: Tensor, right: Tensor) -> Svd:
    """Rank-one terms with vectors of length 1, and their sizes."""
    tiny = torch.finfo(torch.float64).tiny
    tall, wide = left.norm(dim=0), right.norm(dim=1)
    return left / tall.clamp_min(tiny), tall * wide, right / wide.clamp_min(tiny)[:, None]


def refitted(matrix: Tensor, gram: Tensor | None, maps: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """L (out, rank) and R (rank, k) of least E |W x - L R F x|^2, for W (out, d) and features F x of `mapped`.

    Reduced-rank regression (Izenman 1975) of the outputs on the features. Without a rank R is the identity; without
    second moments they are those of white inputs.
    """
    matrix, size = matrix.double(), matrix.shape[1] // maps.shape[1]
    if gram is None:
        inner = torch.kron(maps @ maps.T, torch.eye(size, dtype=maps.dtype, device=maps.device))
        cross = mapped(matrix, maps)
    else:
        seen = mapped(gram, maps)
        inner, cross = mapped(seen.T, maps), matrix @ seen
    least = torch.cholesky_solve(cross.T, root_of(inner)).T
    if rank is None:
        return least, torch.eye(least.shape[1], dtype=least.dtype, device=least.device)
    left = leading(least @ inner @ least.T)[:, :rank]
    return left, left.T @ least


def mapped(rows: Tensor, maps: Tensor) -> Tensor:
    """Features (n, k x s) of rows (n, d) by maps (k, d / s) that act on each of s positions, which move fastest.

    So the first factor of the spatial scheme acts on (in x height) at each column of a patch, that of Tucker-2 on the
    channels at each place of the kernel.
    """
    parts = rows.reshape(len(rows), maps.shape[1], -1)
    return (maps @ parts).flatten(1)


def tucker_bases(weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Input maps (in, in), an output basis (out, out), both with the leading rows or columns first, and what is lost.

    The last (in, out) is the squared error of each pair of ranks, by the weights' higher-order SVD (De Lathauwer et
    al. 2000) under the product of input and kernel moments nearest by trace.
    """
    out, inner, *kernel = weight.shape
    whitened = weight.double().reshape(out, inner, -1)
    root = None
    if gram is not None:
        size = math.prod(kernel)
        four = gram.reshape(inner, size, inner, size)
        root = root_of(torch.einsum("ikjk->ij", four))
        places = torch.einsum("ikil->kl", four)
        around = root_of(places / places.trace())
        whitened = torch.einsum("oik,ij,kl->ojl", whitened, root, around)
    inputs = leading(torch.einsum("oik,ojk->ij", whitened, whitened))
    outputs = leading(torch.einsum("oik,pik->op", whitened, whitened))
    energy = torch.einsum("oik,ia,ob->abk", whitened, inputs, outputs).square().sum(dim=2)
    kept = energy.cumsum(0).cumsum(1)
    maps = (
        inputs.T
        if root is None
        else torch.linalg.solve_triangular(root, inputs.T.contiguous(), upper=False, left=False)
    )
    return maps, outputs, (kept[-1, -1] - kept).clamp_min(0.0)


def tucker_ranks(lost: Tensor, weights: int, kernel: int) -> tuple[int, int]:
    """Input and output ranks of least error of all whose factors have at most so many weights; `lost` (in, out)."""
    inner, out = lost.shape
    best, pair = math.inf, (1, 1)
    for few in range(1, inner + 1):
        many = min(out, (weights - inner * few) // (few * kernel + out))
        if many < 1:
            break
        if float(lost[few - 1, many - 1]) < best:
            best, pair = float(lost[few - 1, many - 1]), (few, many)
    return pair


def tucker_factors(weight: Tensor, gram: Tensor | None, maps: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, ...]:
    """The three factors at these ranks (float64), output side and core exact for the input map's leading rows."""
    (out, inner, *kernel), (few, many) = weight.shape, ranks
    first = maps[:few].contiguous()
    last, core = refitted(weight.flatten(1), gram, first, many)
    core = core.reshape(many, few, *kernel)
    return balanced((first.reshape(few, inner, 1, 1), core, last.reshape(out, many, 1, 1)))


def balanced(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors (outputs first in each) with every channel between two of them equally large on both sides."""
    made = list(factors)
    tiny = torch.finfo(torch.float64).tiny
    for i in range(len(made) - 1):
        one, other = made[i], made[i + 1]
        own = one.flatten(1).norm(dim=1).clamp_min(tiny)
        read = other.transpose(0, 1).flatten(1).norm(dim=1).clamp_min(tiny)
        scale = (read / own).sqrt()
        made[i] = one * scale.reshape(-1, *[1] * (one.dim() - 1))
        made[i + 1] = other / scale.reshape(1, -1, *[1] * (other.dim() - 2))
    return tuple(made)
