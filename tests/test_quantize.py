"""Codebooks and grids against brute force and the papers' formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.compress import clustering, prune, quantize


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def sample(kind, count=400, seed=1):
    draw = np.random.default_rng(seed)
    return {
        "normal": draw.normal(size=count),
        "uniform": draw.random(count),
        "laplace": draw.laplace(size=count),
        "pruned": np.concatenate([-1 - draw.exponential(0.3, count // 2), 1 + draw.exponential(0.3, count // 2)]),
    }[kind]


def best_error(values, k):
    """The least squared error of any k values, by dynamic programming over the sorted weights."""
    v = np.sort(values)
    sums, squares = np.cumsum(np.r_[0, v]), np.cumsum(np.r_[0, v * v])
    i = np.arange(len(v) + 1)
    lengths = np.maximum(i[None, :] - i[:, None], 1)
    cost = (squares[None, :] - squares[:, None]) - (sums[None, :] - sums[:, None]) ** 2 / lengths
    cost = np.where(i[:, None] <= i[None, :], cost, np.inf)
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(axis=0)
    return best[-1]


def error_of(values, table):
    return float((np.abs(values[:, None] - np.asarray(table)[None, :]).min(axis=1) ** 2).sum())


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 40])
@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace", "pruned"])
def test_a_codebook_is_near_the_best_there_is(kind, k):
    values = sample(kind)
    table = quantize.kmeans(tensor(values), k).numpy()
    assert len(table) == k  # no centroid is lost, be the middle pruned
    assert best_error(values, k) - 1e-9 <= error_of(values, table) <= 1.05 * best_error(values, k)


@pytest.mark.parametrize("k", [3, 8, 40])
def test_runs_of_cells_are_the_best_of_all(k):
    draw = np.random.default_rng(k)
    values = np.sort(draw.laplace(size=60))
    means = clustering.best_cells(np.ones(60), values, k)
    assert len(means) == k
    assert error_of(values, means) == pytest.approx(best_error(values, k), rel=1e-9)


def test_a_weighted_codebook_is_that_of_repeated_weights():
    draw = np.random.default_rng(3)
    values, times = draw.normal(size=300), draw.integers(1, 9, 300)
    table = quantize.kmeans(tensor(values), 5, importance=tensor(times)).numpy()
    repeated = np.repeat(values, times)
    assert len(table) == 5
    assert error_of(repeated, table) <= 1.05 * best_error(repeated, 5)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=40), st.integers(1, 9))
def test_a_table_rises_lies_within_and_is_a_fixed_point(values, k):
    weights = tensor(values) / 7
    table = quantize.kmeans(weights, k)
    assert 1 <= len(table) <= min(k, len(set(values)))
    assert (table[1:] > table[:-1]).all()
    assert table[0] >= weights.min() - 1e-12
    assert table[-1] <= weights.max() + 1e-12
    codes = quantize.nearest(weights, table)
    for code in range(len(table)):
        assert torch.isclose(weights[codes == code].mean(), table[code])
    if len(set(values)) <= k:
        assert torch.equal(table[codes], weights)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.lists(st.floats(-4, 4), min_size=1, max_size=9, unique=True)
)
def test_nearest_is_nearest(values, table):
    weights, rising = tensor(values), tensor(sorted(table))
    distance = (weights[:, None] - rising[None, :]).abs()
    codes = quantize.nearest(weights, rising)
    assert torch.allclose(distance.gather(1, codes[:, None])[:, 0], distance.min(dim=1).values, atol=1e-12)


def test_a_codebooks_gradients_are_the_members_sums():
    draw = np.random.default_rng(0)
    weights = tensor(draw.normal(size=50)).requires_grad_()
    table = tensor([-1.0, -0.2, 0.3, 1.1]).requires_grad_()
    grad = tensor(draw.normal(size=50))
    values = quantize.CodebookWeight.apply(weights, table)
    values.backward(grad)
    codes = np.abs(weights.detach().numpy()[:, None] - table.detach().numpy()).argmin(axis=1)
    assert np.array_equal(values.detach(), table.detach().numpy()[codes])
    assert torch.equal(weights.grad, grad)  # straight through
    assert np.allclose(table.grad, [grad.numpy()[codes == k].sum() for k in range(4)])  # arXiv 1510.00149, equation 3


def test_a_table_entry_without_members_gets_no_gradient():
    weights, table = tensor([0.0, 0.1]).requires_grad_(), tensor([-9.0, 0.0, 9.0]).requires_grad_()
    quantize.CodebookWeight.apply(weights, table).sum().backward()
    assert table.grad.tolist() == [0, 2, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_gradients_are_equation_3_of_lsq(bits):
    draw = np.random.default_rng(bits)
    v = draw.normal(size=200)
    s, grad = (0.4, 0.3, 0.2, 0.01)[(2, 3, 4, 8).index(bits)], draw.normal(size=200)
    highest = 2 ** (bits - 1) - 1
    scaled = v / s
    level = np.clip(np.round(scaled), -highest, highest)
    inside = (scaled > -highest) & (scaled < highest)
    wanted_step = np.where(inside, -scaled + np.round(scaled), np.sign(scaled) * highest)
    assert inside.any()
    assert not inside.all()

    weights, step = tensor(v).requires_grad_(), tensor(s).requires_grad_()
    values = quantize.GridWeight.apply(weights, step, bits)
    values.backward(tensor(grad))
    assert np.allclose(values.detach(), level * s)
    assert np.allclose(weights.grad, grad * inside)
    assert step.grad.item() == pytest.approx((grad * wanted_step).sum() / np.sqrt(len(v) * highest))
    assert step.grad.shape == step.shape


def test_one_bit_is_a_sign_and_a_scale():
    draw = np.random.default_rng(0)
    v, grad = draw.normal(size=60), draw.normal(size=60)
    weights, step = tensor(v).requires_grad_(), tensor(0.7).requires_grad_()
    values = quantize.GridWeight.apply(weights, step, 1)
    values.backward(tensor(grad))
    assert set(values.tolist()) == {-0.7, 0.7}
    assert np.allclose(values.detach(), 0.7 * np.sign(v))
    assert np.allclose(weights.grad, grad)
    assert step.grad.item() == pytest.approx((grad * np.sign(v)).sum() / np.sqrt(60))
    scale = quantize.grid_step(tensor(v), 1)
    errors = [((s * np.sign(v) - v) ** 2).sum() for s in (scale * 0.99, scale, scale * 1.01)]
    assert errors[1] == min(errors)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
def test_a_grids_step_is_near_the_best_of_a_fine_scan(bits, kind):
    values = sample(kind, 2000)
    highest = 2 ** (bits - 1) - 1

    def error(step):
        return ((np.clip(np.round(values / step), -highest, highest) * step - values) ** 2).sum()

    scan = np.abs(values).max() / highest * np.linspace(0.02, 1.2, 3000)
    assert error(quantize.grid_step(tensor(values), bits)) <= 1.05 * min(map(error, scan))


def test_steps_of_odd_weights():
    assert quantize.grid_step(torch.zeros(5), 4) == 1.0
    assert quantize.grid_step(torch.zeros(0), 4) == 1.0
    assert quantize.grid_step(torch.tensor([-3.0]), 4) == pytest.approx(3 / 7, rel=0.02)
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert quantize.grid_step(weights, 4) == pytest.approx(quantize.grid_step(weights[:60_000], 4), rel=0.1)


def test_levels():
    assert [quantize.levels(bits) for bits in (1, 2, 3, 8)] == [(-1, 1), (-1, 1), (-3, 3), (-127, 127)]


# --- pruning ---------------------------------------------------------------------------------


def test_thresholds_count_in_units_and_keep_what_lies_on_them():
    weight = torch.tensor([[-3.0, -1.0, -0.5], [0.0, 0.5, 2.0]])
    keep = prune.magnitude_mask(weight, 0.5, 2.0)
    assert keep.tolist() == [[True, True, False], [False, False, True]]
    assert prune.magnitude_mask(weight, 0.0, 2.0).all()  # zero prunes nothing, not even zeros


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.floats(0, 50), st.floats(0, 5))
def test_a_mask_is_the_rule_and_never_empty(values, threshold, unit):
    weight = tensor(values)
    keep = prune.magnitude_mask(weight, threshold, unit)
    size = np.abs(values)
    wanted = size >= threshold * unit if threshold > 0 else np.ones(len(values), bool)
    if not wanted.any():
        wanted = size == size.max()
    assert keep.tolist() == wanted.tolist()
    assert keep.any()


def test_the_share_pruned_of_normal_weights_is_that_of_the_normal_distribution():
    from statistics import NormalDist

    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.03
    for threshold in (0.5, 1.0, 2.0):
        gone = 1 - prune.magnitude_mask(weight, threshold, weight.std().item()).float().mean().item()
        assert gone == pytest.approx(1 - 2 * NormalDist().cdf(-threshold), abs=0.005)


def tables(kind, generator):
    """Rising tables of several shapes: even, clustered, with equal entries, far from zero."""
    size = int(torch.randint(2, 257, (), generator=generator))
    draw = torch.randn(size, generator=generator)
    return (
        {"even": draw, "clustered": draw**5, "equal": (4 * draw).round(), "far": 1e4 + 1e-2 * draw}[kind].sort().values
    )


@pytest.mark.parametrize("kind", ["even", "clustered", "equal", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_found_by_cells_are_those_of_a_search(kind, dtype):
    found = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        table = tables(kind, generator).to(dtype)
        edges = (table[1:] + table[:-1]) / 2
        around = table.mean() + 2 * table.std() * torch.randn(3000, generator=generator, dtype=dtype)
        near = torch.cat([edges, *(torch.nextafter(edges, torch.full_like(edges, s * math.inf)) for s in (-1, 1))])
        far = torch.tensor([-math.inf, math.inf, -1e30, 1e30], dtype=dtype)
        weights = torch.cat([around, near, far, table])
        codes = quantize._by_cells(weights, edges)
        if codes is not None:
            assert torch.equal(codes, torch.bucketize(weights, edges))
            found += 1
        many = weights.repeat(3)
        assert torch.equal(quantize.nearest(many, table), torch.bucketize(many, edges))
    assert found > 5 or kind in ("clustered", "equal", "far")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_of_many_weights_are_the_nearest_entries_at_every_precision(dtype):
    torch.manual_seed(0)
    weights = torch.randn(9000).to(dtype)
    table = torch.linspace(-2, 2, 16).to(dtype)
    codes = quantize.nearest(weights, table)
    assert torch.equal(codes, torch.bucketize(weights, (table[1:] + table[:-1]) / 2))
