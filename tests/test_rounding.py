"""Hessian-aware rounding and pruning against brute force, closed forms and the papers' own recursions."""

import itertools

import numpy as np
import pytest
import torch

from autocompress.compress import calibrate, prune, quantize, rounding, solve
from autocompress.plan import LayerPlan


def problem(rows=6, columns=10, groups=1, seed=0):
    """Weights (g, r, d) and H (g, d, d) of correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(groups, 200, columns, generator=draw, dtype=torch.float64) @ mix
    weight = torch.randn(groups, rows, columns, generator=draw, dtype=torch.float64)
    return weight, rounding.damped(x.transpose(1, 2) @ x / 200)


def on_grid(step):
    return lambda wanted, j: torch.round(wanted / step).clamp(-3, 3) * step


def gptq(weight, hessian, step):
    """Algorithm 1 of arXiv 2210.17323 for one group, blocks left out."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, q = weight.copy(), np.zeros_like(weight)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.round(w[:, j] / step), -3, 3) * step
        w[:, j:] -= np.outer((w[:, j] - q[:, j]) / upper[j, j], upper[j, j:])
    return q


@pytest.mark.parametrize("columns", [10, 64, 131])
def test_a_sweep_is_gptq(columns):
    weight, hessian = problem(columns=columns, groups=2)
    values, wanted = rounding.sweep(weight, hessian, on_grid(0.4))
    for g in range(2):
        assert np.allclose(values[g], gptq(weight[g].numpy(), hessian[g].numpy(), 0.4))
    assert torch.equal(on_grid(0.4)(wanted, 0), values)


@pytest.mark.parametrize("columns", [10, 131])
def test_descent_takes_each_value_in_turn_where_it_is_best(columns):
    weight, hessian = problem(columns=columns)
    start = on_grid(0.5)(weight, 0)
    values, wanted = rounding.descend(weight, start, hessian, on_grid(0.5))
    grid = torch.arange(-3, 4, dtype=torch.float64) * 0.5
    current = start.clone()
    for j in range(columns):  # brute force over the seven levels
        tried = current.repeat(7, 1, 1)
        tried[:, :, j] = grid[:, None]
        e = weight - tried
        current[0, :, j] = grid[((e @ hessian[0]) * e).sum(2).argmin(0)]
    assert torch.allclose(values, current)
    assert torch.equal(on_grid(0.5)(wanted, 0), values)
    assert rounding.error(weight, values, hessian) <= rounding.error(weight, start, hessian)


def test_least_squares_on_a_support_is_that_of_the_normal_equations():
    weight, hessian = problem(groups=2)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    found = rounding.least_squares(weight, mask, hessian)
    for g, r in itertools.product(range(2), range(6)):
        s = mask[g, r].numpy()
        h, w = hessian[g].numpy(), weight[g, r].numpy()
        wanted = np.linalg.solve(h[np.ix_(s, s)], h[s] @ w)
        assert np.allclose(found[g, r].numpy()[s], wanted, atol=1e-3 * np.abs(wanted).max())
    assert not found[~mask].any()


def test_one_weight_goes_as_the_optimal_brain_surgeon_says():
    weight, hessian = problem(rows=1, columns=8)
    inverse = np.linalg.inv(hessian[0].numpy())
    w = weight[0, 0].numpy()
    least = int((w**2 / np.diag(inverse)).argmin())
    mask, fitted = prune.hessian_pruned(weight, hessian, 1)
    assert (~mask).flatten().nonzero().tolist() == [[least]]
    wanted = w - w[least] / inverse[least, least] * inverse[least]
    assert np.allclose(fitted[0, 0], wanted, atol=1e-3)


@pytest.mark.parametrize("saliency", ["magnitude", "activation", "hessian"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_every_saliency_prunes_as_many(saliency, threshold):
    weight, hessian = problem(rows=30, columns=20)
    w = weight[0].float()
    statistics = calibrate.Statistics(hessian.float(), torch.zeros(1, 20), 200)
    plan = LayerPlan(threshold=threshold, saliency=saliency)
    found = solve.solve(w, plan, float(w.std()), statistics)
    assert (~found.mask).sum() == (w.abs() < threshold * w.std()).sum() > 50


def test_the_error_of_the_outputs_falls_from_saliency_to_saliency():
    weight, hessian = problem(rows=40, columns=32, seed=3)
    hessian = rounding.damped(hessian * torch.logspace(-1, 1, 32).sqrt().outer(torch.logspace(-1, 1, 32).sqrt()))
    statistics = calibrate.Statistics(hessian.float(), torch.zeros(1, 32), 200)
    w, errors = weight[0].float(), []
    for saliency in ("magnitude", "activation", "hessian"):
        found = solve.solve(w, LayerPlan(threshold=0.8, saliency=saliency), 1.0, statistics)
        errors.append(rounding.error(w[None], (found.weight * found.mask)[None], hessian.float()))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


@pytest.mark.parametrize("quantizer", ["uniform", "asymmetric", "codebook"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_rounding_leaves_less_error_than_the_nearest_values(quantizer, bits, threshold):
    from autocompress.compress.codes import Code

    weight, hessian = problem(rows=24, columns=40, seed=bits)
    w = weight[0].float()
    statistics = calibrate.Statistics(hessian.float(), torch.zeros(1, 40), 200)
    granularity = "tensor" if quantizer == "codebook" else 10
    nearest = LayerPlan(bits=bits, threshold=threshold, quantizer=quantizer, granularity=granularity)
    plan = LayerPlan(**nearest.to_json() | {"rounding": "hessian"})
    found = solve.solve(w, plan, 1.0, statistics)
    plain = Code(w, nearest, {}, "k").values().detach()
    ours = Code(w, plan, {}, "k", found).values().detach()
    assert not ours[~found.mask].any()
    errors = [rounding.error(w[None], values[None], hessian.float()) for values in (plain, ours)]
    assert errors[1] < (0.8 if bits > 1 else 1.02) * errors[0]


def test_weights_move_towards_what_makes_good_for_changed_inputs():
    draw = torch.Generator().manual_seed(5)
    should = torch.randn(500, 6, generator=draw)
    gets = should + 0.3 * torch.randn(500, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
    weight = torch.randn(1, 4, 6, generator=draw)
    hessian = gets.T[None] @ gets / 500
    moved = solve.towards(weight, hessian, (should - gets).T[None] @ gets / 500)
    best = torch.linalg.lstsq(gets, should @ weight[0].T).solution.T
    assert torch.allclose(moved[0], (1 - solve.AIM) * weight[0] + solve.AIM * best, atol=1e-4)


def test_parts_and_groups_lie_as_the_matrix_does():
    matrix = torch.arange(6 * 8.0).reshape(6, 8)
    layout = solve.Layout(3, 2)
    parted = layout.parted(matrix)
    assert parted.shape == (6, 2, 4)
    assert torch.equal(parted[3], matrix[2:4, 4:])  # the second group's rows, its second part's columns
    assert torch.equal(layout.whole(parted), matrix)


@pytest.mark.parametrize(("quantizer", "name"), [("uniform", "refit"), ("codebook", "_refit_table")])
def test_refits_of_scales_and_tables_lower_the_error(quantizer, name, monkeypatch):
    plan = LayerPlan(bits=2, quantizer=quantizer, rounding="hessian")

    def wrong(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(20, 16, generator=generator)
        rows = torch.randn(300, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
        moments = calibrate.Moments()
        moments.add(torch.nn.Linear(16, 20), rows)
        found = solve.solve(weight, plan, 1.0, moments.statistics())
        table = found.table if found.table is not None else found.step * torch.arange(-1, 2)
        values = table[quantize.nearest(found.weight, table.contiguous())]
        return rounding.error(weight[None], values[None], moments.statistics().gram)

    with_refits = [wrong(seed) for seed in range(4)]
    kept = (lambda problem, level, step: step) if name == "refit" else (lambda w, h, table, code, mask: (table, code))
    monkeypatch.setattr(solve, name, kept)
    assert sum(with_refits) < sum(wrong(seed) for seed in range(4))
