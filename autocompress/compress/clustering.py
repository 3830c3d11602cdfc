"""K-means in one dimension, near its optimum: the best cells of a fine histogram, then Lloyd's algorithm.

Notation: v (n,) the values, rising; k centroids. A kernel gets values as whole numbers (`scaled`).
"""

# ruff: noqa: PLR0917  (kernels take plain numbers and arrays)
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec.jit import Int, Int64s, kernel

BINS = 4096
"""Of the even histogram that density is read off."""
CELLS = 512
"""Among which the best neighbours to join are found exactly, for up to `EXACT` centroids."""
EXACT = 64
SMOOTHED = 33
"""Bins over which density is taken, and more than which without a value are a gap."""
ITERATIONS = 50
"""Of Lloyd's algorithm at most."""


def scaled(values: NDArray[Any]) -> tuple[NDArray[np.int64], float]:
    """Values as whole numbers whose sum fits 62 bits, and the scale."""
    largest = float(np.abs(values).max(initial=0.0))
    scale = 2.0 ** min(43, 61 - values.size.bit_length()) / largest if largest else 1.0
    return np.rint(values * scale).astype(np.int64), scale


def clustered(
    values: NDArray[np.int64],
    sums: NDArray[np.int64],
    count: int,
    first: int,
    last: int,
    k: int,
    iterations: int = ITERATIONS,
) -> NDArray[np.int64]:
    """At most k centroids, rising, of the first `count` values, those in places first to last - 1 left out.

    `sums[i]` is the sum of the first i values.
    """  # fmt: skip
    kept = count - (last - first)
    if kept <= 0:
        return np.zeros(1, np.int64)
    low = int(values[0] if first else values[last])
    high = int(values[count - 1] if last < count else values[first - 1])
    edges = low + (high - low) * np.arange(1, BINS) // BINS
    places = np.concatenate([[0], np.searchsorted(values[:count], edges, side="right"), [count]])
    inside = np.clip(places, first, last)
    sizes = np.diff(places - (inside - first))
    totals = np.diff(sums[places] - (sums[inside] - sums[first]))
    found = np.rint(centres(sizes, totals, k)).astype(np.int64)
    made = lloyd(values, sums, count, first, last, len(found), iterations, found)
    return found[:made]


def centres(sizes: NDArray[Any], totals: NDArray[Any], k: int) -> NDArray[np.float64]:
    """At most k rising means near the best, given the weights and the sums of values in rising bins of even width.

    Many of them: the density of the best centroids is the cube root of the values' (Panter & Dite 1951).
    """
    cells = k if k > EXACT else CELLS
    roots = np.cbrt(np.convolve(sizes, np.ones(SMOOTHED), "same"))
    taken = np.flatnonzero(sizes)
    apart = np.cumsum(np.diff(taken, prepend=taken[:1]) > SMOOTHED)  # no cell reaches over a gap
    reached = np.cumsum(np.where(sizes > 0, roots, 0.0))[taken]
    share = (reached - roots[taken] / 2) / reached[-1]
    starts = np.unique(np.floor(share * (cells - apart[-1])) + apart, return_index=True)[1]
    starts = np.union1d(starts, np.flatnonzero(np.diff(apart)) + 1)
    weights, sums = (np.add.reduceat(each[taken].astype(np.float64), starts) for each in (sizes, totals))
    return best_cells(weights, sums, k) if len(weights) > k else sums / weights


def best_cells(weights: NDArray[np.float64], sums: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """The means of the at most k runs of neighbours with the least squared error, given weights and sums of cells.

    By dynamic programming (Wang & Song 2011): best(m, i) = max over j of best(m - 1, j) + gain(j, i), the gain of a
    run being the square of its sum over its weight.
    """
    count = len(weights)
    k = min(k, count)
    weight, total = (np.concatenate([[0.0], np.cumsum(each)]) for each in (weights, sums))
    below = np.tri(count + 1, k=-1, dtype=bool)
    spans = np.where(below, weight[:, None] - weight[None, :], 1.0)
    gain = np.where(below, (total[:, None] - total[None, :]) ** 2 / spans, -np.inf)  # of the cells j to i - 1 at [i, j]
    best, choices = gain[:, 0], []
    for _ in range(k - 1):
        every = best + gain
        choices.append(every.argmax(axis=1))
        best = every[np.arange(count + 1), choices[-1]]
    ends = [count]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    bounds = np.array([0, *ends[::-1]])
    means: NDArray[np.float64] = np.diff(total[bounds]) / np.diff(weight[bounds])
    return means


@kernel
def lloyd(
    values: Int64s, sums: Int64s, count: Int, first: Int, last: Int, k: Int, iterations: Int, centroids: Int64s
) -> Int:
    """K-means over rising values, those in places first to last - 1 left out; `centroids` in place, their new number.

    Lloyd's algorithm until it no longer moves them, sums[i] being the sum of the first i values.
    """
    for _ in range(iterations):
        made = 0
        changed = 0
        start = 0
        for c in range(k):
            end = count
            if c < k - 1:
                middle = (centroids[c] + centroids[c + 1]) >> 1
                end = start
                above = count
                while end < above:
                    at = (end + above) >> 1
                    if values[at] > middle:
                        above = at
                    else:
                        end = at + 1
            size = end - start
            total = sums[end] - sums[start]
            if start < last and end > first:
                size -= min(end, last) - max(start, first)
                total -= sums[min(end, last)] - sums[max(start, first)]
            if size > 0:
                mean = total // size
                changed |= int(made != c) | int(abs(mean - centroids[c]) > abs(centroids[c]) // 10000000)
                centroids[made] = mean
                made += 1
            start = end
        changed |= int(made != k)
        k = made
        if not changed:
            break
    return k
