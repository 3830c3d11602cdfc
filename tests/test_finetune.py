"""Finetuning: the same for a seed, masks and codes kept, rungs met, and the distillation loss in float64."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress import Task
from autocompress.compress import apply, finetune, lowrank, quantize
from autocompress.compress.finetune import Feed, distillation_loss
from autocompress.compress.layers import find_layers
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial

DRAW = torch.Generator().manual_seed(3)
X = torch.randn(64, 10, generator=DRAW)
Y = (X[:, :5].sum(1) > 0).long() + 2 * (X[:, 5:].sum(1) > 0).long()


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24, 4))


def compress(*plans, model=None):
    model = (model or make()).eval()
    layers = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({s.name: layer for s, layer in zip(layers, plans, strict=True)})
    return apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))


def feed(seed=0, batch=8, guides=None):
    def epoch(index):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed * 1000 + index))
        for rows in order.split(batch):
            yield X[rows], Y[rows], None if guides is None else guides[rows]

    return Feed(epoch, 64 // batch)


def run(compressed, epochs=2.0, rate=1e-2, rungs=None, loss=F.cross_entropy, distillation=0.0, **more):
    recipe = Recipe(epochs, rate, distillation)
    return list(finetune.finetune(compressed, feed(**more), loss, recipe, rungs or [epochs]))


def loss_of(compressed):
    with torch.no_grad():
        return F.cross_entropy(apply.call_with(compressed.module.eval(), compressed.substitutes(), X), Y).item()


def state_equal(one, other):
    a, b = one.state().tensors, other.state().tensors
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


TWO = (LayerPlan(rank=3, bits=4, threshold=0.4), LayerPlan(bits=3, quantizer="uniform"))


def test_training_follows_from_the_feed_alone():
    one, same, other = compress(*TWO), compress(*TWO), compress(*TWO)
    run(one), run(same), run(other, seed=1)
    assert state_equal(one, same)
    assert not state_equal(one, other)


def test_rungs_on_the_way_change_nothing():
    one, other = compress(*TWO), compress(*TWO)
    assert run(one, rungs=[0.0, 0.5, 1.25, 2.0]) == [0.0, 0.5, 1.25, 2.0]
    run(other)
    assert state_equal(one, other)


@pytest.mark.parametrize(
    ("epochs", "rungs", "steps"),
    [
        (2.0, [0.0, 1.0, 2.0], [0, 8, 16]),
        (2.0, [0.0, 0.26, 2.0], [0, 2, 16]),
        (0.25, [0.0, 0.01, 0.125, 0.25], [0, 1, 1, 2]),
        (0.001, [0.0, 0.001], [0, 1]),
        (1.0, [0.5], [4]),
        (1.0, [0.0], [0]),
    ],
)
def test_every_rung_comes_after_its_steps(epochs, rungs, steps):
    seen, found = 0, []

    def counting(outputs, targets):
        nonlocal seen
        seen += 1
        return F.cross_entropy(outputs, targets)

    reached = finetune.finetune(compress(*TWO), feed(), counting, Recipe(epochs, 1e-3, 0.0), rungs)
    for rung, wanted in zip(reached, rungs, strict=True):
        assert rung == wanted
        found.append(seen)
    assert found == steps
    assert seen == steps[-1]  # none after the last rung


def test_it_learns_under_every_kind_of_code():
    for layer in (LayerPlan(bits=2), LayerPlan(bits=1, quantizer="uniform"), LayerPlan(bits=3, quantizer="uniform"),
                  LayerPlan(threshold=1.0), LayerPlan(bits=16), LayerPlan(bits=4, threshold=0.8)):  # fmt: skip
        compressed = compress(layer, layer)
        before = loss_of(compressed)
        run(compressed, epochs=10.0)
        assert loss_of(compressed) < 0.7 * before, layer


def test_masks_stay_where_they_were():
    compressed = compress(LayerPlan(threshold=0.9), LayerPlan(threshold=0.5, bits=3))
    zeros = {key: code.values() == 0 for key, code in compressed.codes.items()}
    run(compressed, epochs=6.0, rate=5e-2)
    for key, code in compressed.codes.items():
        assert 0.1 < zeros[key].float().mean() < 0.9
        assert (code.values()[zeros[key]] == 0).all()


def test_codes_are_the_nearest_entries_at_every_step_though_entries_pass_each_other():
    """At 8 bits the entries of a table lie closer than a few steps of training move them."""
    compressed = compress(LayerPlan(bits=8), LayerPlan(bits=6))
    passed = 0

    def loss(outputs, targets):
        nonlocal passed
        for code in compressed.codes.values():
            table = code.table.detach()
            passed += bool((table[1:] < table[:-1]).any())
            told = table.bfloat16().float()  # as the file carries it
            distance = (code.weights.detach()[:, None] - told).abs()
            error = (code.values().detach().flatten() - code.weights.detach()).abs()
            assert torch.allclose(error, distance.min(1).values, atol=1e-7)
        return F.cross_entropy(outputs, targets)

    run(compressed, epochs=3.0, rate=5e-2, loss=loss)
    assert passed > 10
    for key, entry in compressed.encode().items():
        if key in compressed.codes:
            assert (np.diff(entry.table) > 0).all()


def test_tables_and_steps_learn_at_a_tenth_of_the_rate():
    compressed = compress(LayerPlan(bits=3), LayerPlan(bits=3, quantizer="uniform"))
    groups = finetune._optimiser(compressed, 0.5).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    first, second = compressed.codes.values()
    assert rates[id(first.table)] == rates[id(second.step)] == pytest.approx(0.05)
    assert rates[id(first.weights)] == rates[id(compressed.module[0].bias)] == 0.5
    assert len(rates) == 2 + 2 + 2 + 2  # weights, table and step, biases, batch norm: each once


@pytest.mark.parametrize("total", [1, 2, 7, 50, 5000])
def test_the_rate_warms_up_and_ends_low(total):
    rates = [finetune._rate(step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    warm = min(20, total // 10)
    assert all(a < b for a, b in pairwise(rates[:warm]))
    assert all(a > b for a, b in pairwise(rates[warm:]))
    if total >= 50:
        assert max(rates) > 0.95
        assert rates[0] < 0.2
        assert rates[-1] < 0.02


def test_the_rate_is_used():
    still, moved = compress(*TWO), compress(*TWO)
    run(still, rate=1e-12)
    run(moved, rate=1e-2)
    start = compress(*TWO).state().tensors
    assert torch.allclose(still.state().tensors["3.weight"], start["3.weight"], atol=1e-7)
    assert not torch.allclose(moved.state().tensors["3.weight"], start["3.weight"], atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_the_trial_at_its_step(value):
    seen = 0

    def loss(outputs, targets):
        nonlocal seen
        seen += 1
        return F.cross_entropy(outputs, targets) * (value if seen == 6 else 1)

    with pytest.raises(TrialFailed, match=f"loss became {value} at step 5 of 16"):
        run(compress(*TWO), loss=loss)


def test_a_feed_without_batches_fails_the_trial():
    reached = finetune.finetune(compress(*TWO), Feed(lambda i: iter(()), 8), F.cross_entropy, Recipe(), [1.0])
    with pytest.raises(TrialFailed, match="the training data gave no batch"):
        next(reached)


def test_the_random_state_of_a_model_without_dropout_is_untouched():
    compressed = compress(*TWO)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(compressed)
    compressed.encode()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_frozen_parts_keep_their_statistics_and_a_frozen_model_is_left_alone():
    model = make()
    model[2].requires_grad_(False)
    compressed = compress(*TWO, model=model)
    run(compressed)
    state = compressed.state().tensors
    for key in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        assert torch.equal(state[f"2.{key}"], model.state_dict()[f"2.{key}"]), key
    frozen = compress(LayerPlan(), LayerPlan(), model=make().requires_grad_(False))
    assert run(frozen, rungs=[0.0, 2.0]) == [0.0, 2.0]
    assert all(torch.equal(t, make().state_dict()[key]) for key, t in frozen.state().tensors.items())


# --- distillation ----------------------------------------------------------------------------


def softened(scores):
    scaled = scores / 2.0
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)


def divergence(outputs, guide):
    """T^2 x KL(guide || outputs) of distributions softened along axis 1, T = 2, mean over positions."""
    p, q = softened(outputs), softened(guide)
    return 4 * (q * (np.log(q) - np.log(p))).sum(axis=1).mean()


def scores(*shape, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(0, 3, shape), draw.normal(0, 3, shape)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2)])
def test_class_scores_along_axis_1(shape):
    outputs, guide = scores(*shape)
    targets = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    found = distillation_loss(torch.tensor(outputs), torch.tensor(guide), targets)
    assert found.item() == pytest.approx(divergence(outputs, guide))


def test_class_scores_along_the_last_axis():
    outputs, guide = scores(3, 7, 11)  # batch, time, vocabulary
    found = distillation_loss(torch.tensor(outputs), torch.tensor(guide), torch.zeros(3, 7, dtype=torch.int64))
    assert found.item() == pytest.approx(divergence(outputs.swapaxes(1, 2), guide.swapaxes(1, 2)))


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(6, 4),  # regression
        torch.zeros(6, 4, dtype=torch.int64),  # several labels at once
        torch.zeros(6),
        {"label": torch.zeros(6, dtype=torch.int64)},
        None,
    ],
)
def test_anything_else_is_a_mean_squared_difference(targets):
    outputs, guide = scores(6, 4)
    found = distillation_loss(torch.tensor(outputs), torch.tensor(guide), targets)
    assert found.item() == pytest.approx(((outputs - guide) ** 2).mean())


def test_a_single_score_with_whole_targets_is_a_mean_squared_difference():
    outputs, guide = scores(6, 1)  # a softmax over one score would say nothing
    found = distillation_loss(torch.tensor(outputs), torch.tensor(guide), torch.zeros(6, dtype=torch.int64))
    assert found.item() == pytest.approx(((outputs - guide) ** 2).mean())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_objective_mixes_loss_and_distillation(weight):
    outputs, guide = (torch.tensor(s) for s in scores(6, 4))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    found = finetune._objective(outputs, targets, guide, F.cross_entropy, weight)
    wanted = (1 - weight) * F.cross_entropy(outputs, targets) + weight * divergence(outputs.numpy(), guide.numpy())
    assert found.item() == pytest.approx(wanted.item())
    assert finetune._objective(outputs, targets, None, F.cross_entropy, weight) == F.cross_entropy(outputs, targets)


def test_distillation_alone_needs_no_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        guides = model(X)

    def loss(outputs, targets):
        raise AssertionError("the loss is not wanted at a distillation of 1")

    def distance(compressed):
        with torch.no_grad():
            outputs = apply.call_with(compressed.module.eval(), compressed.substitutes(), X)
        return distillation_loss(outputs, guides, Y).item()

    compressed = compress(LayerPlan(bits=2), LayerPlan(bits=2), model=model)
    before = distance(compressed)
    run(compressed, epochs=8.0, loss=loss, distillation=1.0, guides=guides)
    assert distance(compressed) < 0.5 * before


def test_the_gradient_of_a_step_reaches_weights_tables_and_biases():
    """One step of plain descent by hand: what the optimiser is given is the gradient of the file's values."""
    compressed = compress(LayerPlan(bits=2), LayerPlan())
    outputs = apply.call_with(compressed.module, compressed.substitutes(), X)
    F.cross_entropy(outputs, Y).backward()
    code = compressed.codes["0.weight"]
    values = code.values().detach().requires_grad_()
    layers = compressed.module
    hidden = layers[2](torch.relu(F.linear(X, values, layers[0].bias.detach().bfloat16().float())))
    F.cross_entropy(layers[3](hidden), Y).backward()
    assert torch.allclose(code.weights.grad, values.grad.flatten(), atol=1e-7)
    codes = quantize.nearest(code.weights.detach(), code.table.detach())
    for entry in range(4):
        assert code.table.grad[entry].item() == pytest.approx(
            values.grad.flatten()[codes == entry].sum().item(), abs=1e-6
        )


class Gated(nn.Module):
    """Gates that are always on get no gradient, and must stay; unit 0 of the body is off, and may go."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.body, self.head = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(6, 4)
        with torch.no_grad():
            self.gate.weight.mul_(0.01)
            self.gate.bias.fill_(6.0)
            self.body.bias[0] = -9.0

    def forward(self, x):
        return self.head(F.hardsigmoid(self.gate(x)) * F.relu(self.body(x)))


def priced(model, recipe):
    specs = find_layers(model.eval(), lambda m: m(X[:1])).layers
    plan = Plan({spec.name: LayerPlan(bits=5) for spec in specs}, recipe)
    return apply.compress(model, specs, plan, None)


def test_saturated_gates_survive_and_dead_units_do_not():
    recipe = Recipe(31.0, 1e-3, 0.0, 0.1)  # 248 steps, of which the 200th clears
    compressed = priced(Gated(), recipe)
    list(finetune.finetune(compressed, feed(), F.cross_entropy, recipe, [31.0]))
    assert compressed.codes["gate.bias"].values().min() > 3.0
    assert not compressed.codes["body.weight"].values()[0].any()
    assert compressed.codes["body.weight"].values()[1:].any(1).all()


def test_batches_of_a_step_under_a_price_count_as_their_mean(monkeypatch):
    """One step of two batches is one of both together: loss and price weigh the same."""

    def stepped(accumulation, batch):
        recipe = Recipe(1.0, 1e-3, 0.0, 50.0, accumulation=accumulation)
        compressed = priced(make()[:2].append(nn.Linear(24, 4)), recipe)
        monkeypatch.setattr(finetune, "_optimiser", lambda model, rate: torch.optim.SGD(
            [{"params": [t for code in model.codes.values() for t in code.trained()[0]], "lr": 0.1}]))  # fmt: skip
        list(finetune.finetune(compressed, feed(batch=batch), F.cross_entropy, recipe, [1.0]))
        return compressed

    one, two = stepped(1, 32), stepped(2, 16)
    for key, code in one.codes.items():
        torch.testing.assert_close(code.weights, two.codes[key].weights, rtol=1e-5, atol=1e-6)


def test_the_price_is_told_what_was_paid_before_and_what_an_epoch_is(monkeypatch):
    told = []
    real = finetune.Charge
    monkeypatch.setattr(
        finetune, "Charge", lambda codes, *a, **k: told.append((len(codes), *a, k)) or real(codes, *a, **k)
    )
    recipe = Recipe(2.0, 1e-3, 0.0, 4.0, accumulation=2)
    compressed = priced(Gated(), recipe)
    compressed.paid = 1.5
    list(finetune.finetune(compressed, feed(), F.cross_entropy, recipe, [2.0]))
    assert told == [(6, 4.0, 1.5, 8, {"epoch": 4.0})]


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


class Viewing(nn.Module):
    """`view` after a convolution works in the usual layout alone; a mask of infinities is a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 4)
        self.register_buffer("mask", torch.full((4,), -math.inf).masked_fill(torch.arange(4) < 4, 0.0))
        self.register_buffer("unused", torch.full((2,), -math.inf))

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).view(-1, 4 * 36)) + self.mask


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_model_that_views_images_trains(rate):
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))
    task = Task(Viewing().eval(), (x, y), (x, y), (x, y), F.cross_entropy, accuracy)
    bench = Workbench(task, "cpu")
    plan = Plan({s.name: LayerPlan(bits=5) for s in bench.layers}, Recipe(3.0, 1e-3, 0.5, rate))
    *_, last = run_trial(bench, plan, Budget((0.0, 1.0)))
    assert last.measurement.epoch == 3.0


def test_images_are_trained_in_the_fast_layout_where_the_model_bears_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()
    specs = find_layers(net, lambda m: m(torch.randn(1, 3, 8, 8))).layers
    compressed = apply.compress(net, specs, Plan({s.name: LayerPlan(bits=5) for s in specs}), None)
    batches = Feed(lambda _: iter([(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), None)]), 1)
    list(finetune.finetune(compressed, batches, F.cross_entropy, Recipe(1.0, 1e-3, 0.0), [1.0]))
    assert compressed.fast_layout
    assert compressed.substitutes()["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_step_takes_no_more_batches_than_an_epoch_has():
    recipe = Recipe(2.0, 1e-3, 0.0, accumulation=10**9)
    seen = []

    def counted(outputs, targets):
        seen.append(len(targets))
        return F.cross_entropy(outputs, targets)

    list(finetune.finetune(compress(*TWO), feed(), counted, recipe, [2.0]))
    assert sum(seen) == 2 * 64


def test_what_is_not_finite_after_training_fails_the_trial():
    def ruined(model, feed, loss, recipe, rungs):
        for rung in rungs:
            with torch.no_grad():
                next(model.others()).fill_(math.nan)
            yield rung

    task = Task(make().eval(), (X, Y), (X, Y), (X, Y), F.cross_entropy, accuracy, finetune=ruined)
    bench = Workbench(task, "cpu")
    plan = Plan({s.name: LayerPlan(bits=5) for s in bench.layers}, Recipe(1.0))
    with pytest.raises(TrialFailed, match=r"after 0 epochs of finetuning '0.bias' holds values that are not finite"):
        list(run_trial(bench, plan, Budget((0.0, 1.0))))
