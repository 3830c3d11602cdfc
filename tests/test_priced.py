"""Levels that are worth their bits, against brute force, closed forms and what rounding without a price gives."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress import Task
from autocompress.codec import container
from autocompress.compress import apply, artifact, priced, quantize, rate, rounding, solve
from autocompress.compress.calibrate import Moments
from autocompress.compress.layers import find_layers
from autocompress.compress.rate import RatedCode
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.batches import evaluate
from autocompress.trial import Budget, Workbench, run_trial

PLAN = LayerPlan(bits=3, quantizer="uniform", rounding="hessian")


def inputs_of(columns, *, seed=0, count=400, mean=0.3):
    """Correlated inputs (count, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / math.sqrt(columns) + torch.eye(columns)
    return torch.randn(count, columns, generator=generator) @ mixed + mean


def statistics(x):
    moments = Moments()
    moments.add(nn.Linear(x.shape[1], 1), x)
    return moments.statistics()


def weights(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))


def solved(w, x, bit, plan=PLAN):
    """Levels, step and what they cost."""
    found = priced.solve(w, plan, float(w.std(correction=0)), statistics(x), bit=bit)
    level = torch.round(found.weight / found.step)
    return level, found.step, cost(w, x, level, found.step, bit, plan.bits)


def cost(w, x, level, step, bit, bits):
    """The objective from its definition, in float64."""
    return float(errors(w, x, level, step)) + bit * told(level, bits)


def errors(w, x, level, steps):
    """The first part of the objective for each step, (steps.shape)."""
    stats = statistics(x)
    gram = rounding.damped(stats.gram)[0].double()
    spread = gram - torch.outer(stats.mean[0], stats.mean[0]).double()
    variance = torch.einsum("ri,ij,rj->", w.double(), spread, w.double())
    e = w.double() - steps.double()[..., None, None] * level.double()
    return torch.einsum("...ri,ij,...rj->...", e, gram, e) / variance


def told(level, bits):
    """R of all levels, from the definition: shares of nonzero in rows and columns, a histogram, a sign."""
    odds, _ = rate.model_of(level, quantize.levels(bits)[1])
    p = 1 / (1 + 2.0 ** -(odds[0] + odds[1]).double())
    size = level.abs()
    counts = np.bincount(size.flatten().long().numpy(), minlength=2 ** (bits - 1))[1:] + 0.3
    told_size = np.maximum.accumulate(1 - np.log2(counts / counts.sum()))
    total = 0.0
    for i, j in itertools.product(*map(range, level.shape)):
        k = int(size[i, j])
        total += -math.log2(1 - p[i, j]) if k == 0 else -math.log2(p[i, j]) + told_size[k - 1]
    return total


def test_bits_are_those_of_the_definition_and_slopes_lie_between():
    level = torch.randint(-3, 4, (5, 7), generator=torch.Generator().manual_seed(0)).float()
    odds, rises = rate.model_of(level, 3)
    bits = rate.bits_of(level, odds, rises)
    assert float(bits.sum()) == pytest.approx(told(level, 3), rel=1e-5)
    for low in range(3):
        u = torch.full((5, 7), low + 0.5)
        between = rate.bits_of(torch.full((5, 7), low + 1.0), odds, rises) - rate.bits_of(
            torch.full((5, 7), float(low)), odds, rises
        )
        torch.testing.assert_close(rate.slopes(u, odds[0] + odds[1], rises), between, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bit", [0.0, 0.003, 0.03])
@pytest.mark.parametrize("seed", range(2))
def test_no_worse_than_plain_and_near_the_best_of_all(seed, bit):
    """All 7 ** 4 levels of two rows at 20 steps."""
    w, x = weights(2, 2, seed), inputs_of(2, seed=seed)
    _, _, found = solved(w, x, bit)
    usual = solve.solve(w, PLAN, 1.0, statistics(x))
    plain = torch.round(usual.weight / usual.step)
    assert found <= cost(w, x, plain, usual.step, bit, 3) + 1e-6
    steps = float(w.abs().max()) * torch.linspace(0.1, 1.2, 20)
    every = [torch.tensor(q).view(2, 2).float() for q in itertools.product(range(-3, 4), repeat=4)]
    every = [q for q in every if ((q * w) >= 0).all()]
    best = min(float(errors(w, x, q, steps).min()) + bit * told(q, 3) for q in every)
    assert found <= best + 0.1 * abs(best) + 0.02


def test_a_higher_price_buys_fewer_bits():
    w, x = weights(30, 40), inputs_of(40)
    bits, errors = [], []
    for bit in (0.0, 1e-5, 1e-4, 1e-3, 1e-2):
        level, _, total = solved(w, x, bit, replace(PLAN, bits=5))
        bits.append(told(level, 5))
        errors.append(total - bit * bits[-1])
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[-1] < 0.2 * bits[0]


def test_bits_left_over_are_not_filled():
    w, x = weights(30, 40), inputs_of(40)
    few, many = (told(solved(w, x, 2e-4, replace(PLAN, bits=bits))[0], 8) for bits in (4, 8))
    assert many == pytest.approx(few, rel=0.1)


def test_at_an_exorbitant_price_hardly_anything_is_left():
    level, _, _ = solved(weights(20, 30), inputs_of(30), 10.0)
    assert (level != 0).float().mean() < 0.03


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 9), bits=st.integers(2, 8),
    threshold=st.sampled_from([0.0, 0.7, 9.0]),
    saliency=st.sampled_from(["magnitude", "activation", "hessian"]), bit=st.sampled_from([1e-5, 1e-3, 0.1]),
    constant=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_layer(rows, columns, bits, threshold, saliency, bit, constant, seed):
    w, x = weights(rows, columns, seed), inputs_of(columns, seed=seed, count=20)
    if constant:
        x = torch.ones_like(x)
    plan = LayerPlan(bits=bits, threshold=threshold, saliency=saliency, quantizer="codebook", rounding="hessian")
    found = priced.solve(w, plan, float(w.std(correction=0)), statistics(x), bit=bit)
    again = priced.solve(w, plan, float(w.std(correction=0)), statistics(x), bit=bit)
    assert torch.equal(found.weight, again.weight)
    assert torch.equal(found.step, again.step)
    assert found.weight.isfinite().all()
    assert float(found.step) > 0
    code = RatedCode(found.weight, bits, found.step, 1.0)
    level = torch.round(found.weight / found.step)
    assert torch.equal(code.levels(), level)  # nothing lies beyond the grid
    assert not level[~found.mask].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_a_convolution(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=groups)
    moments = Moments()
    moments.add(layer, torch.randn(20, 4, 6, 6))
    found = priced.solve(layer.weight, PLAN, 1.0, moments.statistics(), bit=1e-3, groups=groups)
    assert found.weight.shape == layer.weight.shape
    assert 0 < (torch.round(found.weight / found.step) != 0).float().mean() < 1


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 40), nn.ReLU(),
        nn.Linear(40, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    model = net()
    x = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    x[:, :, ::2] += x[:, :, 1::2]
    with torch.no_grad():
        y = model.eval()(x)
    data = x, y
    task = Task(model, data, data, data, nn.functional.mse_loss, lambda a, b: float(((a - b) ** 2).mean()),
                direction="minimize", batch_size=50, name="priced")  # fmt: skip
    return Workbench(task, "cpu")


def tried(bench, layer, price, epochs=0.0):
    plan = Plan(dict.fromkeys((spec.name for spec in bench.layers), layer), Recipe(epochs, 1e-3, 0.0, price))
    *_, last = run_trial(bench, plan, Budget((epochs,)))
    return last


def test_a_trial_without_finetuning_is_much_smaller_at_about_the_same_loss(bench):
    plain = tried(bench, PLAN, 0.0)
    found = tried(bench, replace(PLAN, bits=5), 1.0)
    nearest = tried(bench, replace(PLAN, bits=5, rounding="nearest"), 1.0)
    assert len(found.artifact) < 0.75 * len(plain.artifact)
    assert found.measurement.metric_val < 1.1 * plain.measurement.metric_val
    assert len(found.artifact) < len(nearest.artifact)
    loaded = artifact.restore(container.unpack(found.artifact), bench.task.model)
    assert evaluate(bench.task, loaded, "val") == pytest.approx(found.measurement.metric_val, rel=1e-6)


def test_finetuning_goes_on_from_the_priced_levels(bench):
    specs, x = find_layers(net(), lambda m: m(torch.zeros(2, 1, 8, 8))).layers, bench.task.train[0]
    plan = Plan(dict.fromkeys((spec.name for spec in specs), PLAN), Recipe(1.0, 1e-3, 0.0, 3.0))
    first = apply.compress(bench.model, specs, plan, None, calibration=lambda: x)
    assert all(isinstance(code, RatedCode) for code in first.codes.values())
    went_on = apply.compress(bench.model, specs, plan, None, first.state(), calibration=None)  # asks for no inputs
    for key, code in first.codes.items():
        assert torch.equal(code.levels(), went_on.codes[key].levels())
        if key.endswith("weight"):
            assert float((code.weights / code.step - code.levels()).detach().abs().max()) <= 0.46
    with pytest.raises(TrialFailed, match="needs calibration data"):
        apply.compress(bench.model, specs, plan, None)
