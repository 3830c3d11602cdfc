"""Grids with a scale for each row or group: against brute force, and LSQ's formula written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autocompress.compress import quantize, scales


@given(st.integers(1, 60), st.one_of(st.just("channel"), st.just("tensor"), st.integers(1, 80)))
def test_groups_are_runs_of_columns_of_nearly_one_length(columns, granularity):
    count = scales.count_groups(columns, granularity)
    lengths = torch.bincount(scales.groups_of(columns, count), minlength=count)
    assert lengths.min() >= 1
    assert lengths.max() - lengths.min() <= 1
    assert (scales.groups_of(columns, count).diff() >= 0).all()
    if isinstance(granularity, int) and columns % granularity == 0:
        assert set(lengths.tolist()) == {granularity}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 5])
def test_a_fit_is_near_the_best_scale_of_a_fine_scan(bits, asymmetric, granularity):
    draw = np.random.default_rng(bits)
    weight = torch.from_numpy(draw.laplace(0.1 * asymmetric, 1, (4, 10)))
    importance = torch.from_numpy(draw.exponential(size=(4, 10)))
    grid = scales.fit(weight, importance, bits, granularity, asymmetric=asymmetric)
    count = scales.count_groups(10, granularity)
    pieces = (
        [(weight.flatten(), importance.flatten())]
        if granularity == "tensor"
        else [
            (weight[r, scales.groups_of(10, count) == g], importance[r, scales.groups_of(10, count) == g])
            for r in range(4)
            for g in range(count)
        ]
    )
    assert grid.step.numel() == len(pieces)
    for k, (w, h) in enumerate(pieces):

        def error(step, low, w=w, h=h):
            top = quantize.levels(bits)[1] if low is None else low + 2**bits - 1
            level = torch.round(w / step).clamp(-top if low is None else low, top)
            if bits == 1 and low is None:
                level = torch.where(w >= 0, 1.0, -1.0)
            return float((h * (w - level * step) ** 2).sum())

        low = None if grid.low is None else float(grid.low.flatten()[k])
        found = error(float(grid.step.flatten()[k]), low)
        span = float(w.abs().max())
        lows = [None] if not asymmetric else range(-(2**bits) + 1, 1) if bits < 5 else [low]
        best = min(error(s, at) for s in np.linspace(0.01, 1.2, 400) * 2 * span / max(1, 2**bits - 2) for at in lows)
        slack = 1.15 if not asymmetric else 2.0 if bits > 1 else 10  # the zero is where the range puts it
        assert found <= slack * best + 0.02 * float((h * w * w).sum())


def test_pruned_weights_do_not_count_and_a_row_of_zeros_has_a_scale():
    weight = torch.tensor([[1.0, -1.0, 900.0], [0.0, 0.0, 0.0]])
    grid = scales.fit(weight, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), 2, "channel", asymmetric=False)
    assert grid.step.flatten().tolist() == pytest.approx([1.0, 1.0], rel=0.3)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_equation_3_of_lsq_in_each_group(asymmetric, bits):
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    grad = torch.randn(24, generator=draw, dtype=torch.float64)
    fitted = scales.fit(weight, torch.ones(1, 1), bits, 4, asymmetric=asymmetric)
    step = (0.5 * fitted.step).requires_grad_()  # so that some are beyond the grid
    grid = scales.Grid(step, fitted.low, bits)
    flat = weight.flatten().requires_grad_()
    values = scales.ScaledWeight.apply(flat, step, grid, scales.places(step, (3, 8)))
    values.backward(grad)
    for k in range(6):
        mine = slice(4 * k, 4 * k + 4)
        s, w = float(step.detach().flatten()[k]), weight.flatten()[mine].numpy()
        low, high = (float(bound.flatten()[k]) for bound in grid.bounds())
        inside = (w / s >= low) & (w / s <= high)
        level = np.clip(np.round(w / s), low, high)
        assert np.allclose(values.detach()[mine], level * s)
        wanted = (grad[mine].numpy() * np.where(inside, level - w / s, level)).sum()
        wanted /= (4 * quantize.levels(bits)[1]) ** 0.5
        assert np.isclose(step.grad.flatten()[k], wanted)
        assert np.allclose(flat.grad[mine], grad[mine].numpy() * inside)
