"""Factors of least output error against whitened SVDs, least squares and brute force, in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocompress.compress import lowrank, reduced_rank
from autocompress.plan import LayerPlan, LayerSpec

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def moments(width, seed=1):
    """Second moments of correlated inputs of very different sizes."""
    draws = normal(3 * width, width, seed=seed) @ normal(width, width, seed=seed + 1) * normal(width, seed=seed + 2)
    return reduced_rank.damped(draws.T @ draws / len(draws))


def error(weight, other, gram):
    return reduced_rank.output_error((weight - other).flatten(1), gram)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_each_rank_loses_the_tail_of_the_whitened_singular_values(out, width, seed):
    weight, gram = normal(out, width, seed=seed), moments(width, seed)
    values, vectors = np.linalg.eigh(gram.numpy())
    whitened = np.linalg.svd(weight.numpy() @ (vectors * np.sqrt(values)), compute_uv=False)
    parts = reduced_rank.channel_svd(weight, gram)
    for rank in range(1, min(out, width) + 1):
        whole = lowrank.product(*lowrank.factor_weights((out, width), parts, rank, "channel"), (out, width), "channel")
        assert error(weight, whole, gram) == pytest.approx((whitened[rank:] ** 2).sum(), rel=1e-6, abs=1e-7)


def test_factors_are_as_large_on_both_sides_and_plain_svd_is_the_case_of_equal_moments():
    weight = normal(6, 10)
    parts, plain = reduced_rank.channel_svd(weight, torch.eye(10, dtype=F64)), lowrank.svd(weight)
    assert torch.allclose(parts[1], plain[1])
    first, second = lowrank.factor_weights((6, 10), reduced_rank.channel_svd(weight, moments(10)), 3, "channel")
    assert torch.allclose(first.norm(dim=1), second.norm(dim=0))


def test_inputs_that_never_occur_do_no_harm():
    gram = moments(8)
    gram[5:] = gram[:, 5:] = 0
    for out in (4, 12):
        parts = reduced_rank.channel_svd(normal(out, 8), reduced_rank.damped(gram))
        assert all(torch.isfinite(part).all() for part in parts)
        assert torch.allclose(parts[0] * parts[1] @ parts[2], normal(out, 8), atol=1e-6)


def test_the_output_side_is_least_squares():
    weight, features = normal(5, 7), normal(4, 7, seed=9)
    x = normal(200, 7, seed=3)
    left, right = reduced_rank.refitted(weight, x.T @ x / 200, features)
    wanted = np.linalg.lstsq((x @ features.T).numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    assert np.allclose((left @ right).numpy(), wanted, atol=1e-4)


def test_reduced_rank_regression_beats_other_factors_of_its_rank():
    weight, features, gram = normal(5, 7), normal(4, 7, seed=9), moments(7)
    left, right = reduced_rank.refitted(weight, gram, features, 2)
    best = error(weight, left @ right @ features, gram)
    for seed in range(20):
        noise = [0.05 * normal(*side.shape, seed=seed) for side in (left, right)]
        assert error(weight, (left + noise[0]) @ (right + noise[1]) @ features, gram) >= best


SHAPE = (6, 5, 3, 3)
SPEC = LayerSpec("c", "conv2d", SHAPE, 1)


def test_the_spatial_scheme_under_moments_of_a_product_is_an_exact_optimum():
    rows, columns = moments(15, 3), moments(3, 8)
    weight = normal(*SHAPE)
    matrix = lowrank.as_matrix(weight, "spatial")
    roots = np.linalg.cholesky(rows.numpy()).T, np.linalg.cholesky(columns.numpy())
    whitened = roots[0] @ matrix.numpy() @ np.kron(np.eye(6), roots[1])
    values = np.linalg.svd(whitened, compute_uv=False)
    gram = torch.kron(rows, columns)
    parts = reduced_rank.spatial_svd(weight, gram)
    for rank in (1, 4, 9):
        pair = lowrank.factor_weights(SHAPE, parts, rank, "spatial")
        lost = error(weight, lowrank.product(*pair, SHAPE, "spatial"), gram)
        assert lost == pytest.approx((values[rank:] ** 2).sum(), rel=1e-6)


def test_features_are_what_the_next_factor_reads():
    column, point, x = normal(2, 5, 3, 1), normal(2, 5, 1, 1), normal(4, 5, 3, 3)
    for first in (column, point):
        got = reduced_rank.mapped(x.flatten(1), first.flatten(1))
        assert torch.allclose(got, torch.nn.functional.conv2d(x, first).flatten(1))
    white = torch.eye(45, dtype=F64)
    for rank in (None, 3):
        one, other = (
            reduced_rank.refitted(normal(6, 45), moments, point.flatten(1), rank) for moments in (None, white)
        )
        assert torch.allclose(one[0] @ one[1], other[0] @ other[1])


@pytest.mark.parametrize("gram", [None, moments(45)], ids=["plain", "aware"])
def test_tucker_at_full_ranks_is_the_weight_and_errors_fall_with_ranks(gram):
    weight = normal(*SHAPE)
    maps, _, lost = reduced_rank.tucker_bases(weight, gram)
    assert lost.shape == (5, 6)
    errors = {}
    for few, many in itertools.product((1, 3, 5), (1, 4, 6)):
        factors = reduced_rank.tucker_factors(weight, gram, maps, (few, many))
        assert [tuple(f.shape) for f in factors] == [(few, 5, 1, 1), (many, few, 3, 3), (6, many, 1, 1)]
        whole = lowrank.multiplied(factors, SHAPE, "tucker")
        errors[few, many] = error(weight, whole, gram)
        if gram is None:  # the output side is solved for, so that it is as good as the higher-order SVD at least
            assert errors[few, many] <= float(lost[few - 1, many - 1]) + 1e-6
    assert errors[5, 6] == pytest.approx(0, abs=1e-4)
    for (few, many), value in errors.items():
        assert all(value <= other + 1e-9 for (f, m), other in errors.items() if f <= few and m <= many)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(2, 9), st.integers(0, 99), st.floats(0.1, 1.0))
def test_tuckers_ranks_are_the_best_of_all_that_cost_no_more(inner, out, kernel, seed, share):
    lost = normal(inner, out, seed=seed).abs().flip(0, 1).cumsum(0).cumsum(1).flip(0, 1)
    budget = max(inner + kernel + out, int(share * inner * out * kernel))
    few, many = reduced_rank.tucker_ranks(lost, budget, kernel)
    pairs = [
        (a, b) for a in range(1, inner + 1) for b in range(1, out + 1) if inner * a + a * b * kernel + b * out <= budget
    ]
    assert (few, many) in pairs
    assert float(lost[few - 1, many - 1]) == min(float(lost[a - 1, b - 1]) for a, b in pairs)


@pytest.mark.parametrize("settings", [
    {"stride": 2, "padding": 1}, {"dilation": (1, 2), "padding": "same"}, {"padding": 2, "padding_mode": "reflect"},
], ids=str)  # fmt: skip
def test_three_layers_are_one_with_the_product_of_their_weights(settings):
    layer = nn.Conv2d(5, 6, 3, dtype=F64, **settings)
    places = lowrank.factorised(layer, LayerPlan(rank=2, scheme="tucker", core=(3, 4)))
    factors = [normal(*place.weight.shape, seed=i) for i, place in enumerate(places)]
    with torch.no_grad():
        for place, factor in zip(places, factors, strict=True):
            place.weight.copy_(factor)
        layer.weight.copy_(lowrank.multiplied(factors, SHAPE, "tucker"))
        x = normal(2, 5, 8, 9)
        assert torch.allclose(places(x), layer(x))
    assert [place.bias is not None for place in places] == [False, False, True]
    assert sum(f.numel() for f in factors) == SPEC.weights(LayerPlan(rank=2, scheme="tucker", core=(3, 4)))


def test_balancing_changes_no_product():
    factors = (normal(3, 5, 1, 1) * 100, normal(4, 3, 3, 3), normal(6, 4, 1, 1) / 100)
    made = reduced_rank.balanced(factors)
    assert torch.allclose(lowrank.multiplied(made, SHAPE, "tucker"), lowrank.multiplied(factors, SHAPE, "tucker"))
    last, core = made[2].flatten(1).norm(dim=0), made[1].flatten(1).norm(dim=1)
    assert torch.allclose(last, core)
