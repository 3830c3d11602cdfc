"""The rate term against sums over elements in float64 and autograd; what it does to a small net."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune import X, Y, compress, feed, make
from torch.nn import functional as F

from autocompress.codec import container
from autocompress.codec.tensors import Artifact
from autocompress.compress import apply, finetune, lineage, lowrank, rate
from autocompress.compress.layers import find_layers
from autocompress.compress.rate import RatedCode
from autocompress.errors import PlanError, RecordError, TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe, check

FIVE = LayerPlan(bits=5, quantizer="uniform")


def bits(levels, top, given=None):
    """R of every level 0..top at every element, by the formulas at the head of `rate`, element by element.

    `given`: the log odds of nonzero, where they do not follow from rows and columns alone.
    """
    q = np.abs(levels.reshape(len(levels), -1) if levels.ndim > 1 else levels[None]).astype(np.int64)
    rows, columns = q.shape

    def odds(share):
        return math.log2(share / (1 - share))

    histogram = np.array([(q == k).sum() + 0.3 for k in range(1, top + 1)])
    value = [1 - math.log2(h / histogram.sum()) for h in histogram]
    value = [max(value[: k + 1]) for k in range(top)]
    cost = np.zeros((top + 1, rows, columns))
    for i in range(rows):
        for j in range(columns):
            row = ((q[i] > 0).sum() + 0.4) / (columns + 1)
            column = ((q[:, j] > 0).sum() + 0.4) / (rows + 1)
            middle = ((q > 0).sum() + 0.4) / (q.size + 1)
            both = odds(row) + odds(column) - odds(middle) if given is None else given[i, j]
            p = 1 / (1 + 2**-both)
            cost[0, i, j] = -math.log2(1 - p)
            for k in range(1, top + 1):
                cost[k, i, j] = -math.log2(p) + value[k - 1]
    return cost


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(3, 5), (4, 2, 3), (7,), (1, 1)]), st.sampled_from([1, 3, 7]))
def test_slopes_are_differences_of_the_models_bits(seed, shape, top):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5
    level = u.round().clamp(-top, top)
    (row, column), rises = rate.model_of(level, top)
    found = rate.slopes(u, row + column, rises).numpy().ravel()
    cost = bits(level.numpy(), top).reshape(top + 1, -1)
    for index, value in enumerate(u.numpy().ravel()):
        low = math.floor(abs(value))
        rise = cost[low + 1, index] - cost[low, index] if low < top else 0.0
        assert found[index] == pytest.approx(rise * math.copysign(1, value), abs=1e-9)


def test_charge_is_the_gradient_of_the_price_times_the_bits():
    torch.manual_seed(0)
    code = RatedCode(torch.randn(6, 9, dtype=torch.float64), 4, 0.4, 1.0)
    cost = torch.from_numpy(bits(code.levels().numpy(), code.top, code.odds.numpy()))
    code.weights.grad, code.log_step.grad = torch.zeros_like(code.weights), torch.zeros_like(code.log_step)
    code.charge(0.7)
    weights, log_step = code.weights.detach().requires_grad_(), code.log_step.detach().requires_grad_()
    size = (weights / log_step.exp()).abs()
    low = size.detach().floor().clamp(max=code.top - 1).long()
    below, above = cost.gather(0, low[None])[0], cost.gather(0, low[None] + 1)[0]
    inside = size < code.top
    (0.7 * torch.where(inside, below + (above - below) * (size - low), above)).sum().backward()
    torch.testing.assert_close(code.weights.grad, weights.grad)
    torch.testing.assert_close(code.log_step.grad, log_step.grad)


def test_straight_through_gradients_and_values():
    weights = torch.tensor([[0.26, -0.9], [0.1, 9.0]], dtype=torch.float64)
    code = RatedCode(weights, 3, 0.5, 1.0)
    values = code.values()
    torch.testing.assert_close(values, torch.tensor([[0.5, -1.0], [0.0, 1.5]], dtype=torch.float64))
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    values.backward(upstream)
    torch.testing.assert_close(code.weights.grad, upstream)
    u = code.weights.detach() / 0.5  # the weight beyond the grid came back to its end
    residual = (values.detach() / 0.5 - u) * 0.5  # d/d log s = s d/ds
    torch.testing.assert_close(code.log_step.grad, (upstream * residual).sum())


def test_the_model_is_near_the_coder_on_rows_and_columns_of_unequal_density():
    generator = torch.Generator().manual_seed(5)
    row, column = torch.rand(200, 1, generator=generator), torch.rand(1, 300, generator=generator) ** 3
    kept = torch.rand(200, 300, generator=generator) < 0.6 * row * column
    weights = kept * torch.randn(200, 300, generator=generator).abs().add(0.5) * torch.randn(200, 300).sign()
    code = RatedCode(weights, 5, 0.5, 1.0)
    cost = torch.from_numpy(bits(code.levels().numpy(), code.top))
    expected = cost.gather(0, code.levels().abs().long()[None]).sum().item() / 8
    found = len(container.pack(Artifact({"w": code.encode()})))
    assert found == pytest.approx(expected, rel=0.06)


def cleared(*codes, outputs=lambda: []):
    """Clear what is silent, in the step for it."""
    charge = rate.Charge(codes, 1.0, 0.0, 1000)
    for step in (0, 199, 200):
        charge.clear(step, outputs)


def test_silent_rows_and_columns_are_cleared_and_nothing_else():
    code = RatedCode(torch.ones(3, 4), 4, 0.5, 1.0)
    code.log_step.grad = torch.zeros(())
    for row in (0, 1):  # no gradient ever reaches row 2 and column 3
        code.weights.grad = torch.zeros(3, 4)
        code.weights.grad[row, :3] = 1e-30
        code.charge(1e-3)
    cleared(code)
    assert torch.equal(code.weights.detach(), torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]))
    cleared(code)  # nothing was heard at all since: the tensor is not in use
    assert code.weights.any()
    code.weights.grad = torch.zeros(3, 4)
    code.weights.grad[0, :3] = 1.0
    code.charge(1e-3)
    cleared(code)  # what was heard before counts no longer
    assert code.weights.any(1).tolist() == [True, False, False]


def test_what_outputs_need_is_not_cleared_though_silent():
    """A saturated unit gets no gradient, as a dead one does."""
    saturated, dead = (RatedCode(torch.ones(3, 4), 4, 0.5, 1.0) for _ in range(2))
    for code in (saturated, dead):
        code.log_step.grad = torch.zeros(())
        code.weights.grad = torch.zeros(3, 4)
        code.weights.grad[:2] = 1.0
        code.charge(1e-3)
    cleared(saturated, dead, outputs=lambda: [saturated.values().sum(1), dead.values()[:2]])
    assert saturated.weights.all()
    assert dead.weights.any(1).tolist() == [True, True, False]


def charged(charge, code, step, grad=0.0):
    """The gradients of the weights and of the step's logarithm after a step in which the loss gave `grad`."""
    charge.clear(step, list)
    code.weights.grad = torch.zeros_like(code.weights) + grad
    code.log_step.grad = torch.zeros_like(code.log_step)
    charge(step)
    return code.weights.grad - grad, code.log_step.grad


def test_the_price_goes_over_to_the_new_one_within_the_ramp():
    code = RatedCode(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), 4, 0.3, 1.0)
    charge = rate.Charge([code], 4.0, 1.0, 200)
    first = charged(charge, code, 0)
    for step, price in ((30, 2.5), (60, 4.0), (199, 4.0)):
        for found, begun in zip(charged(charge, code, step), first, strict=True):
            torch.testing.assert_close(found, begun * price)


def test_slopes_are_kept_for_a_few_steps_and_then_taken_anew():
    code = RatedCode(torch.linspace(-1, 1, 12).view(3, 4), 4, 0.3, 1.0)
    charge = rate.Charge([code], 1.0, 1.0, 100)
    first = charged(charge, code, 0)
    code.weights.data.neg_()
    assert all(map(torch.equal, charged(charge, code, rate.HELD - 1), first))
    torch.testing.assert_close(charged(charge, code, rate.HELD)[0], -first[0])


def test_silent_rows_are_cleared_after_some_hundred_steps_of_a_finetuning():
    code = RatedCode(torch.ones(3, 4), 4, 0.5, 1.0)
    charge = rate.Charge([code], 1.0, 1.0, 1000)
    heard = torch.tensor([[1.0], [1.0], [0.0]])
    for step in range(rate.SILENT[0]):
        charged(charge, code, step, heard)
    assert code.weights.all()
    charged(charge, code, rate.SILENT[0], heard)
    assert code.weights.all(1).tolist() == [True, True, False]


def test_a_row_that_few_examples_reach_stays_if_an_epoch_has_one():
    code = RatedCode(torch.ones(3, 4), 4, 0.5, 1.0)
    charge = rate.Charge([code], 1.0, 1.0, 1000, epoch=300)
    often, once = torch.tensor([[1.0], [1.0], [0.0]]), torch.ones(3, 1)
    for step in range(301):
        charged(charge, code, step, once if step == 250 else often)
    assert code.weights.all()
    for step in range(301, 601):  # an epoch without any
        charged(charge, code, step, often)
    assert code.weights.all(1).tolist() == [True, True, False]


def finetuned(price, epochs=20.0):
    model = compress_rated(price)
    recipe = Recipe(epochs, 1e-2, 0.0, price)
    list(finetune.finetune(model, feed(), F.cross_entropy, recipe, [epochs]))
    return model


def compress_rated(price, start=None, layer=FIVE):
    model = make().eval()
    layers = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({s.name: layer for s in layers}, Recipe(rate=price))
    return apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k), start)


def packed(model):
    return len(container.pack(Artifact(model.encode())))


def error(model):
    with torch.no_grad():
        outputs = apply.call_with(model.module.eval(), model.substitutes(), X)
    return (outputs.argmax(1) != Y).float().mean().item()


def test_a_higher_price_gives_a_smaller_file_and_the_loss_still_counts():
    none, low, high = finetuned(1e-6), finetuned(0.3), finetuned(3.0)
    assert packed(none) > packed(low) > packed(high)
    assert error(none) <= 0.1
    assert error(low) <= 0.2


def test_a_layer_without_levels_or_zero_is_not_priced():
    for layer in (LayerPlan(bits=1), LayerPlan(bits=16), LayerPlan()):
        assert not any(isinstance(code, RatedCode) for code in compress_rated(1.0, layer=layer).codes.values())
    rated = compress_rated(1.0, layer=LayerPlan(bits=2)).codes
    assert {"0.weight", "0.bias", "3.weight", "3.bias"} == rated.keys()
    assert not any(isinstance(c, RatedCode) for c in compress(FIVE, FIVE).codes.values())  # no price, no change


def test_a_frozen_bias_stays_as_it_is():
    model = make().eval()
    model[0].bias.requires_grad_(False)
    layers = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({s.name: FIVE for s in layers}, Recipe(rate=1.0))
    made = apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))
    assert {"0.weight", "3.weight", "3.bias"} == made.codes.keys()


def test_a_bias_that_is_not_finite_is_told():
    model = make().eval()
    layers = find_layers(model, lambda m: m(X[:1])).layers
    with torch.no_grad():
        model[3].bias[0] = math.nan
    plan = Plan({s.name: FIVE for s in layers}, Recipe(rate=1.0))
    with pytest.raises(TrialFailed, match=r"bias '3.bias' holds values that are not finite"):
        apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))


def test_a_tensor_that_the_loss_reaches_in_some_steps_only_is_charged_in_these():
    code = RatedCode(torch.linspace(-1, 1, 12).view(3, 4), 4, 0.5, 1.0)
    charge = rate.Charge([code], 1.0, 1.0, 100)
    charge(0)  # a layer that was dropped has no gradient
    assert code.weights.grad is None
    code.weights.grad, code.log_step.grad = torch.zeros(3, 4), torch.zeros(())
    charge(1)
    assert code.weights.grad.any()
    assert code.log_step.grad


def test_factors_are_priced_each():
    codes = compress_rated(1.0, layer=LayerPlan(rank=2, bits=4)).codes
    assert {"0.0.weight", "0.1.weight", "0.1.bias", "3.0.weight", "3.1.weight", "3.1.bias"} == codes.keys()


def test_what_lies_below_the_threshold_starts_at_zero():
    torch.manual_seed(1)
    weight = make()[0].weight.detach()
    code = compress_rated(1.0, layer=LayerPlan(bits=8, threshold=1.0)).codes["0.weight"]
    below = weight.abs() < weight.std(correction=0)
    assert torch.equal(code.weights.detach() == 0, below)


def test_a_state_goes_through_its_file_and_training_goes_on_from_it():
    model = finetuned(0.3)
    state = model.state()
    read = lineage.unpack(lineage.pack(state))
    assert read.plan == state.plan
    assert read.tensors.keys() == state.tensors.keys()
    for key, tensor in state.tensors.items():
        torch.testing.assert_close(read.tensors[key].to(tensor), tensor, rtol=2**-8, atol=0)
        if "#" in key or tensor.dim() == 0:
            assert torch.equal(read.tensors[key], tensor)
    again = compress_rated(0.3, state)
    assert again.paid == 0.3
    assert packed(again) == packed(model)
    from_file = compress_rated(0.3, read)
    same = (from_file.codes["0.weight"].levels() == model.codes["0.weight"].levels()).float().mean()
    assert same > 0.98


def test_what_a_changed_plan_takes_over_of_a_state():
    state = finetuned(0.3, 2.0).state()
    unit, step = state.tensors["0.weight#unit"], state.tensors["0.weight#step"]
    assert unit != pytest.approx(state.tensors["0.weight"].double().std(correction=0).item())
    same = compress_rated(0.3, state).codes["0.weight"]
    narrower = compress_rated(0.3, state, LayerPlan(bits=4)).codes["0.weight"]
    unpriced = compress_rated(0.0, state).codes["0.weight"]
    assert same.unit == narrower.unit == unpriced.unit == unit
    assert same.step.item() == pytest.approx(step.item())
    assert narrower.step.item() != pytest.approx(step.item())
    assert unpriced.step.item() != pytest.approx(step.item())


def test_a_damaged_state_is_told():
    data = lineage.pack(finetuned(0.3, 1.0).state())
    for broken in (b"", data[:40], data[:-3], b"\xff" * 8 + data[8:]):
        with pytest.raises(RecordError, match="state of trial 3 is damaged"):
            lineage.unpack(broken, "state of trial 3")


@pytest.mark.parametrize("price", [-0.1, math.nan, math.inf])
def test_a_price_that_is_none(price):
    layers = find_layers(make(), lambda m: m(X[:1])).layers
    plan = Plan({s.name: FIVE for s in layers}, Recipe(rate=price))
    with pytest.raises(PlanError, match=f"recipe: rate is {price}, allowed: 0 or more"):
        check(plan, layers)
