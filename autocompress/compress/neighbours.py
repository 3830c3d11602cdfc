"""How nonzero weights attract each other: an auto-logistic model of a matrix of zeros and ones.

Notation: z_i whether weight i is nonzero, b_i its log odds by row and column (`rate.model_of`), N_k(i) the two
neighbours of i at offset k and minus k: beside it, above and below, and where one is known a lag away (a kernel's row,
an image's row in the columns of a layer that reads images), as the coder's contexts have it (`codec.mixing`).

    log odds of z_i given all others = t_0 + t_1 b_i + sum_k t_k (sum over N_k(i) of z_j - p_j),    p = sigmoid(b)

t maximises the pseudo-likelihood, the product of these conditional probabilities (Besag 1975, "Statistical analysis of
non-lattice data"), by Newton steps. Terms are pairwise and symmetric: so the derivative of the bits of all by z_i is
minus the log odds of z_i given all others, each pair's part told once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autocompress.codec.mixed_stream import repeat_of

Offset = tuple[int, int]
"""Rows and columns."""

MOST_ODDS = 13.0
"""In bits, either way."""
_LN2 = math.log(2)
_BLOCK = 1 << 20
"""Elements looked at together."""
_PRIOR = 1.0
"""The strength of the prior, that rows and columns alone tell."""
FIRST, EVERY = 4, 5
"""Steps of Newton's at first, and calls from one step to the next."""


class Attraction:
    """What a weight's elements tell of their neighbours, learned anew from time to time as the weight changes."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self._calls = 0

    def odds(self, nonzero: Tensor, odds: Tensor) -> Tensor:
        """Log odds (base 2) given all others, (r, c), of zeros and ones (r, c) and their log odds by row and column."""
        steps = 0 if self._calls % EVERY else 1
        if not self._calls:
            steps, self._offsets = FIRST, offsets_of(nonzero, self._shape)
            self._t = prior(self._offsets)
        elif steps and (found := offsets_of(nonzero, self._shape)) != self._offsets:
            steps, self._offsets, self._t = FIRST, found, prior(found)
        self._calls += 1
        given, self._t = fit(nonzero, odds, self._offsets, self._t, steps)
        return given


def offsets_of(nonzero: Tensor, shape: Sequence[int]) -> tuple[Offset, ...]:
    """Where neighbours stand in a weight of that shape, whose nonzero elements are 1 in the matrix `nonzero` (r, c)."""
    rows, columns = nonzero.shape
    found = [(0, 1), (1, 0)]
    if len(shape) > 2:
        kernel = columns // shape[1]
        found += [(0, lag) for lag in (shape[-1], kernel) if lag > 1]
    else:
        found.append((0, repeat_of(nonzero.sum(0, dtype=torch.float64).cpu().numpy())))
    return tuple(sorted({(r, c) for r, c in found if r < rows and c < columns and (r, c) != (0, 0)}))


def prior(offsets: Sequence[Offset]) -> Tensor:
    """t where rows and columns alone tell, (2 + offsets,) in float64."""
    return torch.tensor([0.0, 1.0, *(0.0 for _ in offsets)], dtype=torch.float64)


def fit(nonzero: Tensor, odds: Tensor, offsets: Sequence[Offset], t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Log odds (base 2) of each element given all others, (r, c), and t after so many steps of Newton's from `t`.

    `nonzero` (r, c) holds zeros and ones, `odds` (r, c) the log odds (base 2) by row and column, t is on the CPU.
    """
    known = list(_features(nonzero, odds, offsets)) if nonzero.numel() <= _BLOCK else None
    start = prior(offsets)
    for _ in range(steps):
        curvature, slope = _PRIOR * torch.eye(len(t), dtype=torch.float64), _PRIOR * (start - t)
        for rows, features in known or _features(nonzero, odds, offsets):
            p = torch.sigmoid(_given(t, features))
            x = torch.stack([torch.ones_like(p), *features]).flatten(1)
            slope += (x @ (nonzero[rows] - p).flatten()).cpu()
            curvature += ((x * (p - p.square()).flatten()) @ x.T).cpu()
        t = t + torch.linalg.solve(curvature, slope).clamp(-1, 1)
    given = torch.empty_like(nonzero)
    for rows, features in known or _features(nonzero, odds, offsets):
        given[rows] = _given(t, features)
    return given.div_(_LN2).clamp_(-MOST_ODDS, MOST_ODDS), t


def _given(t: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Natural log odds of the elements that the features are of."""
    first, second, *rest = t.tolist()
    found = features[0].mul(second).add_(first)
    for feature, factor in zip(features[1:], rest, strict=True):
        found.add_(feature, alpha=factor)
    return found


def _features(nonzero: Tensor, odds: Tensor, offsets: Sequence[Offset]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows, and what t_1, t_2, ... are multiplied by there, each (rows, c)."""
    rows, columns = nonzero.shape
    halo = max((r for r, _ in offsets), default=0)
    many = max(1, _BLOCK // columns)
    for first in range(0, rows, many):
        last = min(rows, first + many)
        top, bottom = max(0, first - halo), min(rows, last + halo)
        natural = odds[top:bottom] * _LN2
        beyond = nonzero[top:bottom] - torch.sigmoid(natural)
        inner = slice(first - top, last - top)
        yield slice(first, last), [natural[inner], *(_both(beyond, at)[inner] for at in offsets)]


def _both(values: Tensor, offset: Offset) -> Tensor:
    """The sum of each element's neighbours at the offset and minus it, where there are such."""
    r, c = offset
    rows, columns = values.shape
    found = torch.zeros_like(values)
    found[r:, c:] = values[: rows - r, : columns - c]
    found[: rows - r, : columns - c] += values[r:, c:]
    return found
