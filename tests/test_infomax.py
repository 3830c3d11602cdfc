"""InfoNCE against a double loop in float64; features where they are taken; trials with it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trial import Residual, data, task_of, tree
from torch import nn
from torch.nn import functional as F

from autocompress.compress import infomax
from autocompress.compress.infomax import Tap, info_nce, last_layer, pooled
from autocompress.compress.layers import find_layers
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial


def brute_force(f, g, temperature):
    """The mean over both directions of -log(exp(own) / sum of exp), pair by pair."""
    count, total = len(f), 0.0
    for one, other in ((f, g), (g, f)):
        for i in range(count):
            scores = [
                math.exp(float(one[i] @ other[j]) / np.linalg.norm(one[i]) / np.linalg.norm(other[j]) / temperature)
                for j in range(count)
            ]
            total -= math.log(scores[i] / sum(scores)) / count / 2
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**31))
def test_the_loss_is_info_nce(count, width, seed):
    draw = np.random.default_rng(seed)
    f, g = draw.normal(0, 2, (count, width)), draw.normal(0, 2, (count, width))
    found = info_nce(torch.from_numpy(f), torch.from_numpy(g)).item()
    assert found == pytest.approx(brute_force(f, g, infomax.TEMPERATURE), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("count", "width"), [(1, 3), (5, 2), (7, 16)])
def test_the_gradient_is_that_of_two_cross_entropies(count, width):
    torch.manual_seed(count)
    features, others = torch.randn(count, width, requires_grad=True), torch.randn(count, width)
    (found,) = torch.autograd.grad(3 * info_nce(features, others), features)
    scores = F.normalize(features, dim=1) @ F.normalize(others, dim=1).T / infomax.TEMPERATURE
    own = torch.arange(count)
    wanted = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(found, torch.autograd.grad(3 * wanted, features)[0], rtol=1e-4, atol=1e-5)


def test_log_n_less_the_loss_bounds_the_mutual_information():
    """Of K equal clusters that both know of, and nothing more, it is log K nats."""
    cluster = torch.arange(64) % 4
    features = torch.eye(4)[cluster]
    bound = math.log(64) - info_nce(features, 3 * features).item()
    assert math.log(4) - 0.01 < bound <= math.log(4)
    assert math.log(64) - info_nce(features, features[torch.randperm(64)]).item() < 0.5 * math.log(4)


def test_a_large_batch_is_compared_in_part(monkeypatch):
    monkeypatch.setattr(infomax, "MOST", 5)
    f, g = torch.randn(9, 3), torch.randn(9, 3)
    assert info_nce(f, g) == info_nce(f[:5], g[:5])


@pytest.mark.parametrize(
    ("shape", "kind", "axes"),
    [((3, 4), "linear", ()), ((3, 5, 4), "linear", (1,)), ((3, 2, 5, 4), "linear", (1, 2)),
     ((3, 4, 6), "conv1d", (2,)), ((3, 4, 6, 2), "conv2d", (2, 3))],
)  # fmt: skip
def test_features_are_means_over_places(shape, kind, axes):
    x = torch.randn(shape)
    torch.testing.assert_close(pooled(x, kind), x.mean(axes) if axes else x)
    assert pooled(x, kind).shape == (3, 4)


class Backwards(nn.Module):
    """Layers that run in another order than they are held, one of them by keyword."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

    def forward(self, x):
        return self.last(input=torch.relu(self.first(x)))


def test_the_last_layer_is_the_one_that_runs_last():
    x = torch.randn(4, 3)
    net = Backwards()
    layers = find_layers(net, lambda m: m(x)).layers
    layer = last_layer(net, layers, lambda: net(x))
    assert layer.name == "last"
    with Tap(net, layer) as tap:
        net(x)
    torch.testing.assert_close(tap.features, torch.relu(net.first(x)))
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(TrialFailed, match="calls none"):
        last_layer(net, layers, lambda: None)
    with pytest.raises(TrialFailed, match="layer 'last' did not run"), Tap(net, layer) as tap:
        tap.features  # noqa: B018 - it raises


def no_loss(outputs, targets):
    raise AssertionError("the loss is not wanted at a distillation of 1")


PLAN = Plan({"0": LayerPlan(threshold=1.0), "4": LayerPlan(bits=2)}, Recipe(12.0, 1e-2, 1.0, infomax=1.0))


def distance(bench, outcome):
    """InfoNCE of the trial's features."""
    from autocompress.compress import apply

    model = apply.compress(bench.model, bench.layers, PLAN, bench.svd, outcome.state())
    x = data(60, 1)[0]
    with torch.no_grad(), Tap(model.module, bench._last_layer) as mine, Tap(bench.model, bench._last_layer) as other:
        apply.call_with(model.module.eval(), model.substitutes(), x)
        bench.model(x)
    return info_nce(mine.features, other.features).item()


def test_it_works_without_labels_and_brings_the_features_together():
    def run(weight):
        bench = Workbench(task_of(tree, loss=no_loss), "cpu")
        plan = replace(PLAN, recipe=replace(PLAN.recipe, infomax=weight))
        return [distance(bench, outcome) for outcome in run_trial(bench, plan, Budget((0.0, 1.0)))]

    before, after = run(1.0)
    assert after < before
    assert after < run(0.0)[1] - 0.1  # outputs alone do not hold the features


@pytest.mark.parametrize("augment", [None, torch.neg])
def test_a_feed_tells_features_of_its_inputs(augment):
    bench = Workbench(task_of(tree, augment=augment), "cpu")
    for x, _, guide, features in bench.feed(0, True, True).epoch(0):
        torch.testing.assert_close(guide, bench.model(x))
        torch.testing.assert_close(features, bench.model[:4](x))
    for _, _, guide, _ in bench.feed(0, False, True).epoch(0):
        assert guide is None


def test_a_users_own_module_with_all_options():
    task = task_of(lambda: Residual(4))
    recipe = Recipe(1.0, 1e-2, 0.5, 0.01, precision="bfloat16", accumulation=2, infomax=0.1)
    layers = {"first": LayerPlan(rank=3, bits=4), "again": LayerPlan(bits=4, threshold=0.5), "head": LayerPlan(bits=3)}
    first, same = (
        list(run_trial(Workbench(task, "cpu"), Plan(layers, recipe), Budget((0.0, 1.0)), seed=2)) for _ in range(2)
    )
    assert [o.artifact for o in first] == [o.artifact for o in same]
    assert first[0].artifact != first[1].artifact
