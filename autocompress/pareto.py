"""Non-dominated sorting, hypervolume and the knee point. Everything is minimised.

`points` is always an array of shape (n, m): n points, m objectives, finite numbers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray


def dominates(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """An (n, n) table: entry [i, j] is true where point i is at most j everywhere, below somewhere."""
    no_worse = np.all(points[:, None, :] <= points[None, :, :], axis=2)
    better = np.any(points[:, None, :] < points[None, :, :], axis=2)
    return np.asarray(no_worse & better)


def nondominated_rank(points: ArrayLike) -> NDArray[np.int64]:
    """The rank of each point, in the order given: 0 on the front, 1 on the front of the rest, ..."""
    values = _as_points(points)
    beats = dominates(values)
    ranks = np.full(len(values), -1, dtype=np.int64)
    rank = 0
    while (left := ranks < 0).any():
        beaten = beats[left].any(axis=0)
        ranks[left & ~beaten] = rank
        rank += 1
    return ranks


def front(points: ArrayLike) -> NDArray[np.int64]:
    """Indices of the non-dominated points, the first of equal ones only, by rising first objective."""
    values = _as_points(points)
    if not len(values):
        return np.empty(0, dtype=np.int64)
    unique, first = np.unique(values, axis=0, return_index=True)
    if values.shape[1] == 2:  # sorted by the first objective: a point is beaten by any lower one before it
        lowest = np.minimum.accumulate(unique[:, 1])
        beaten = np.concatenate([[False], unique[1:, 1] >= lowest[:-1]])
    else:
        beaten = np.asarray(dominates(unique).any(axis=0))
    chosen: NDArray[np.int64] = first[~beaten].astype(np.int64)
    return chosen


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume dominated by points of two or more objectives, up to the reference point; exact.

    Zitzler & Thiele 1999. For two objectives a sum of rectangles along the front, for more a sum of slices between
    neighbouring values of the last one (Knowles 2002): O(n^(m - 1)) slices of n log n, for fronts of some hundred.
    Points that do not lie below the reference add nothing.
    """
    values, limit = _as_points(points), np.asarray(reference, dtype=np.float64)
    if limit.ndim != 1 or len(limit) < 2 or (len(values) and values.shape[1] != len(limit)):
        raise ValueError(f"two or more objectives are needed, as many in points and reference: {limit.shape}")
    values = values[(values < limit).all(axis=1)] if len(values) else values
    return _volume(values[front(values)], limit)


def _volume(values: NDArray[np.float64], limit: NDArray[np.float64]) -> float:
    """`hypervolume` of points that lie below the limit and do not dominate each other."""
    if len(limit) == 2:
        ends = np.append(limit[1], values[:-1, 1])  # by rising first objective the second falls
        return float(((limit[0] - values[:, 0]) * (ends - values[:, 1])).sum())
    total = 0.0
    levels = np.append(np.unique(values[:, -1]), limit[-1])
    for low, high in pairwise(levels):
        part = values[values[:, -1] <= low, :-1]
        total += (high - low) * _volume(part[front(part)], limit[:-1])
    return float(total)


def knee(points: ArrayLike) -> int:
    """The index of the point farthest below the line (of more objectives, the plane) between the front's ends.

    All objectives are scaled to 0..1 over the front first (Das 1999). With one or two points
    on the front, the one with the smallest sum of scaled objectives, the first on a tie.
    """
    values = _as_points(points)
    if not len(values):
        raise ValueError("a knee needs at least one point")
    chosen = front(values)
    on_front = values[chosen]
    low, high = on_front.min(axis=0), on_front.max(axis=0)
    scaled = (on_front - low) / np.where(high > low, high - low, 1.0)
    return int(chosen[np.argmin(scaled.sum(axis=1))])


def _as_points(points: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return values.reshape(0, 2)
    if values.ndim != 2:
        raise ValueError(f"points must have shape (n, m), not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("points must be finite")
    return values
