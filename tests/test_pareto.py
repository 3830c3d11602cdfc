"""Fronts, ranks, hypervolume and knee against brute force, closed forms and inclusion-exclusion."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress import pareto

# a coarse grid, so that ties and equal points are common
grid = st.integers(0, 6).map(float)
points_2d = st.lists(st.tuples(grid, grid), max_size=14)
points_3d = st.lists(st.tuples(grid, grid, grid), min_size=1, max_size=14)


def beats(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def brute_ranks(points):
    left, ranks, rank = set(range(len(points))), [-1] * len(points), 0
    while left:
        best = {i for i in left if not any(beats(points[j], points[i]) for j in left)}
        for i in best:
            ranks[i] = rank
        left, rank = left - best, rank + 1
    return ranks


@given(points_2d | points_3d)
def test_ranks_are_those_of_peeling_front_after_front(points):
    assert pareto.nondominated_rank(points).tolist() == brute_ranks(points)


@given(points_2d | points_3d)
def test_the_front_is_each_undominated_point_once_by_rising_first_objective(points):
    chosen = pareto.front(points).tolist()
    wanted = {p for p in points if not any(beats(q, p) for q in points)}
    assert [points[i] for i in chosen] == sorted(wanted)
    assert all(points.index(points[i]) == i for i in chosen)  # the first of equal ones


def inclusion_exclusion(points, reference):
    """The area of a union of rectangles, each from a point to the reference."""
    boxes = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for group in combinations(boxes, size):
            corner = [max(values) for values in zip(*group, strict=True)]
            total += (-1) ** (size + 1) * math.prod(r - c for r, c in zip(reference, corner, strict=True))
    return total


@given(st.lists(st.tuples(grid, grid), max_size=9), st.tuples(grid, grid))
def test_hypervolume_is_the_area_of_the_union(points, reference):
    assert pareto.hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-9)


@given(
    st.integers(3, 4).flatmap(lambda m: st.tuples(st.lists(st.tuples(*[grid] * m), max_size=8), st.tuples(*[grid] * m)))
)
def test_hypervolume_of_more_objectives_is_the_volume_of_the_union(drawn):
    points, reference = drawn
    assert pareto.hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-9)


def test_hypervolume_of_shuffled_random_points_by_counting_cells():
    draw = np.random.default_rng(0)
    for count in (1, 5, 60):
        points = draw.integers(0, 40, (count, 2)).astype(float)
        x, y = np.meshgrid(np.arange(32), np.arange(36), indexing="ij")  # unit cells below the reference
        covered = np.zeros(x.shape, bool)
        for a, b in points:
            covered |= (x >= a) & (y >= b)
        for _ in range(3):
            assert pareto.hypervolume(draw.permutation(points), (32, 36)) == covered.sum()


def test_hypervolume_of_known_fronts():
    steps = [(k, 9 - k) for k in range(10)]  # a staircase: 1 + 2 + ... + 10
    assert pareto.hypervolume(steps, (10, 10)) == 55
    assert pareto.hypervolume([(0, 0)], (3, 4)) == 12
    assert pareto.hypervolume([(-2.5, 0.25)], (0, 1)) == 1.875
    assert pareto.hypervolume([], (1, 1)) == 0
    assert pareto.hypervolume([(1, 0), (2, 2)], (1, 1)) == 0  # on and above the reference
    x = np.linspace(0, 1, 20001)
    circle = np.stack([1 - np.sin(x * np.pi / 2), 1 - np.cos(x * np.pi / 2)], axis=1)
    assert pareto.hypervolume(circle, (1, 1)) == pytest.approx(np.pi / 4, abs=1e-3)


def test_the_knee_is_farthest_from_the_line_between_the_ends():
    draw = np.random.default_rng(1)
    for _ in range(50):
        points = draw.random((30, 2)) * [1e6, 1e-3]  # unlike scales
        chosen = points[pareto.front(points)]
        if len(chosen) < 3:
            continue
        (x0, y0), (x1, y1) = chosen[0], chosen[-1]
        below = [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in chosen]
        distance = [v - u for u, v in below]  # of the line from (0, 0) to (1, 1) on these axes
        if max(distance) > 1e-9:
            assert points[pareto.knee(points)].tolist() == chosen[int(np.argmax(distance))].tolist()


def test_the_knee_of_few_points():
    assert pareto.knee([(4, 4)]) == 0
    assert pareto.knee([(9, 9), (4, 4)]) == 1
    assert pareto.knee([(2, 1), (1, 2), (3, 3)]) == 1  # a tie: the first along the front
    assert pareto.knee([(10, 0), (0, 10), (1, 1), (2, 0.9)]) == 2
    with pytest.raises(ValueError, match="at least one point"):
        pareto.knee([])


def test_points_that_are_no_points_are_refused():
    with pytest.raises(ValueError, match="finite"):
        pareto.front([(1, math.nan)])
    with pytest.raises(ValueError, match="finite"):
        pareto.nondominated_rank([(1, math.inf)])
    with pytest.raises(ValueError, match=r"shape \(n, m\)"):
        pareto.front([1, 2, 3])
    with pytest.raises(ValueError, match="two or more objectives"):
        pareto.hypervolume([(1, 2, 3)], (4, 4))
    assert pareto.front([]).size == 0
    assert pareto.nondominated_rank([]).size == 0
