"""Recalibrated statistics against the moments of the layers' inputs, counted by hand in float64."""

import copy

import pytest
import torch
from test_finetune import X, compress
from test_trial import data, task_of, tree
from torch import nn
from torch.nn import functional as F

from autocompress.compress import apply, finetune, recalibrate
from autocompress.plan import LayerPlan, Plan, Recipe, uncompressed
from autocompress.trial import Budget, Workbench, run_trial

TWO = (LayerPlan(threshold=1.0, bits=3), LayerPlan(bits=3))
BATCHES = (X[:32], X[32:48], X[48:])


def deep():
    """Two normalisations behind two layers: the second sees what the first gives."""
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 6, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 5)), conv, nn.BatchNorm2d(6, momentum=0.3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(),
        nn.Linear(60, 8), nn.BatchNorm1d(8, affine=False, momentum=None),
    )  # fmt: skip


def by_hand(compressed, batches):
    """Means and unbiased variances over examples and places, averaged over batches; batches normalise themselves."""
    values = {key: value.detach().double() for key, value in compressed.substitutes().items()}
    net = compressed.module.double()
    found = []
    for x in batches:
        h = F.conv2d(x.double().view(-1, 1, 2, 5), values["1.weight"], values["1.bias"], padding=1)
        first = h.mean((0, 2, 3)), h.var((0, 2, 3))
        biased = h.var((0, 2, 3), correction=0)
        h = (h - first[0].view(-1, 1, 1)) / (biased + net[2].eps).sqrt().view(-1, 1, 1)
        h = values["2.weight"].view(-1, 1, 1) * h + values["2.bias"].view(-1, 1, 1)  # dropout is off
        h = F.linear(h.relu().flatten(1), values["6.weight"], values["6.bias"])
        found.append((*first, h.mean(0), h.var(0)))
    return [torch.stack(column).mean(0) for column in zip(*found, strict=True)]


def test_statistics_are_the_moments_of_the_layers_inputs_under_the_codes():
    compressed = compress(*TWO, model=deep())
    recalibrate.recalibrate(compressed, BATCHES)
    wanted = by_hand(copy.deepcopy(compressed), BATCHES)
    first, second = compressed.module[2], compressed.module[7]
    found = (first.running_mean, first.running_var, second.running_mean, second.running_var)
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def test_nothing_else_changes_and_no_random_number_is_drawn():
    compressed = compress(*TWO, model=deep())
    compressed.module[2].num_batches_tracked.fill_(7)
    before, random = compressed.state().tensors, torch.get_rng_state()
    recalibrate.recalibrate(compressed, BATCHES)
    after = compressed.state().tensors
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"2.running_mean", "2.running_var", "7.running_mean", "7.running_var"}
    assert (compressed.module[2].momentum, compressed.module[7].momentum) == (0.3, None)
    assert torch.equal(random, torch.get_rng_state())


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.spare = deep(), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.net(x)


def test_frozen_and_unreached_layers_keep_their_statistics():
    model = Unreached()
    model.net[2].requires_grad_(False)
    with torch.no_grad():
        model.spare.running_mean.fill_(3.0)
    compressed = compress(*TWO, model=model)
    before = compressed.state().tensors
    recalibrate.recalibrate(compressed, BATCHES)
    after = compressed.state().tensors
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"net.7.running_mean", "net.7.running_var"}


def test_every_rung_is_measured_with_statistics_of_its_own_weights():
    """A shift that pruning brings is taken out before rung 0 and after finetuning alike."""
    task = task_of(model=tree)
    plan = Plan({"0": LayerPlan(bits=2), "4": LayerPlan()}, Recipe(1.0, 1e-2, 0.0))
    seen = []
    for outcome in run_trial(Workbench(task, "cpu"), plan, Budget((0.0, 1.0))):
        state = outcome.state().tensors
        table = state["0.weight#table"].sort().values.bfloat16().float()
        weight = table[(state["0.weight"].flatten()[:, None] - table).abs().argmin(1)].view(32, 8)
        inputs = F.linear(data(150, 0)[0].double(), weight.double(), state["0.bias"].bfloat16().double())
        torch.testing.assert_close(state["1.running_mean"].double(), inputs.mean(0), rtol=0, atol=0.05)
        torch.testing.assert_close(state["1.running_var"].double(), inputs.var(0), rtol=0.15, atol=0.0)
        seen.append(state["1.running_mean"])
    assert not torch.equal(*seen)


def test_a_plan_that_compresses_nothing_keeps_the_models_own(monkeypatch):
    monkeypatch.setattr(recalibrate, "recalibrate", None)  # not to be called
    task = task_of(model=tree)
    bench = Workbench(task, "cpu")
    (outcome,) = run_trial(bench, uncompressed(bench.layers))
    assert torch.equal(outcome.state().tensors["1.running_mean"], task.model[1].running_mean)


@pytest.mark.parametrize("rungs", [(0.0, 1.0), (0.0, 0.3, 0.7, 1.0)])
def test_measuring_on_the_way_does_not_change_where_training_ends(rungs):
    plan = Plan({"0": LayerPlan(bits=3), "4": LayerPlan(bits=3)}, Recipe(1.0, 1e-2, 0.0))
    *_, last = run_trial(Workbench(task_of(model=tree), "cpu"), plan, Budget(rungs), seed=3)
    *_, alone = run_trial(Workbench(task_of(model=tree), "cpu"), plan, Budget((1.0,)), seed=3)
    assert last.artifact == alone.artifact


def test_modules_in_training_mode_are_those_that_are_recalibrated():
    """`is_frozen` is the rule of both."""
    net = deep()
    net[2].requires_grad_(False)
    finetune._train_mode(net)
    trained = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    assert trained == list(recalibrate.recalibratable(net)) == [net[7]]


def test_inputs_are_augmented_as_those_of_finetuning_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    seen = []

    def augment(x):
        seen.append(5 * x + torch.rand(1))
        return seen[-1]

    bench = Workbench(task_of(lambda: net, augment=augment))
    plan = Plan({"1": LayerPlan(bits=3)}, Recipe(0.0))
    found = []
    random = torch.get_rng_state()
    for _ in range(2):
        seen.clear()
        model = apply.compress(bench.model, bench.layers, plan, bench.svd)
        bench.recalibrate(model)
        found.append(model.module[0].running_mean.clone())
        wanted = torch.stack([x.mean(0) for x in seen]).mean(0)
        torch.testing.assert_close(found[-1], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(*found)
    assert torch.equal(random, torch.get_rng_state())
