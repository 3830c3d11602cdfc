"""Inputs of layers against torch's own unfold, what follows layers against running them, fits against linear ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.compress import after_activation, reduced_rank
from autocompress.compress.activations import find_activations
from autocompress.compress.layers import find_layers
from autocompress.compress.responses import gather, rows_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    nn.Conv1d(3, 4, 3, padding=1), nn.Conv3d(3, 4, 2, stride=2), nn.Linear(5, 4),
], ids=lambda la: str(la)[:60])  # fmt: skip
def test_rows_times_the_weight_are_the_layers_outputs(layer):
    x = normal(2, 5) if isinstance(layer, nn.Linear) else normal(2, 3, *[6] * (layer.weight.dim() - 2))
    rows = rows_of(layer, x, 10**6, seeded())
    got = rows @ layer.weight.flatten(1).T + layer.bias
    wanted = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    wanted = wanted.reshape(-1, 4)
    order = [int((got - row).abs().sum(dim=1).argmin()) for row in wanted]  # rows are in any order
    assert sorted(order) == list(range(len(wanted)))
    assert torch.allclose(got[order], wanted, atol=1e-5)


def test_rows_are_drawn_without_favour():
    counts = torch.zeros(20)
    for seed in range(300):
        rows = rows_of(nn.Linear(1, 2), torch.arange(20.0)[:, None], 5, seeded(seed))
        counts[rows.flatten().long()] += 1
    assert len(rows) == 5
    assert counts.min() > 40
    assert counts.sum() == 1500


def test_moments_are_those_of_the_rows_and_checks_come_from_other_batches():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    specs = find_layers(model, lambda m: m(normal(1, 4))).layers
    batches = [normal(50, 4, seed=i) for i in range(8)]
    found = gather(model, specs, batches, lambda m, x: m(x))
    fit, check = torch.cat(batches[:6]), torch.cat(batches[6:])
    assert torch.allclose(found["0"].gram, fit.T @ fit / 300, atol=1e-5)
    assert torch.allclose(found["0"].mean, fit.mean(dim=0), atol=1e-6)
    assert sorted(found["0"].check[:, 0].tolist()) == sorted(check[:, 0].tolist())
    assert sorted(found["0"].fit[:, 0].tolist()) == sorted(fit[:, 0].tolist())
    single = gather(model, specs, batches[:1], lambda m, x: m(x))["2"]
    assert len(single.fit) + len(single.check) == 50
    assert not model[0]._forward_pre_hooks


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pooled = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.added, self.gated, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.up, self.down, self.unused = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.pooled_gelu = nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            for name in ("running_mean", "weight", "bias"):
                getattr(self.norm, name).copy_(normal(4, seed=4))
            self.norm.running_var.copy_(normal(4, seed=5).abs() + 0.5)

    def forward(self, x):
        x = F.relu6(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(self.pooled(x), 2).clamp_(min=0)
        x = F.gelu(F.max_pool2d(self.pooled_gelu(x), 2))
        x = x.flatten(1)[:, :4]
        x = F.relu(self.added(x) + x)
        gate = self.gate(x)
        x = self.gated(x) * gate * torch.sigmoid(gate)
        return self.down(F.gelu(self.up(x).reshape(-1, 6), approximate="tanh"))


def test_what_follows_is_found_or_said_why_not():
    model = Branches().eval()
    images = normal(3, 2, 10, 10)
    specs = find_layers(model, lambda m: m(images[:1])).layers
    with torch.no_grad():
        before = model(images)
        found = find_activations(model, specs, lambda m: m(images))
        assert torch.equal(model(images), before)
    names = {name: f.name or f.why for name, f in found.items()}
    assert names["conv"] == "relu6"
    assert found["conv"].norm == "norm"
    assert names["pooled"] == "clamp"
    assert names["pooled_gelu"] == "gelu follows"  # which is not rising: maxima before are no maxima after
    assert names["added"] == "add follows"
    assert names["gated"] == "mul follows"
    assert names["gate"] == "several functions read its outputs"
    assert names["up"] == "gelu"
    assert names["down"] == "nothing follows"
    assert names["unused"] == "the model does not call it"
    rows = normal(9, 4) * 4
    wanted = F.relu6(F.batch_norm(rows, model.norm.running_mean, model.norm.running_var, model.norm.weight,
                                  model.norm.bias))  # fmt: skip
    assert torch.allclose(found["conv"].function(found["conv"].before(rows)), wanted, atol=1e-5)
    assert torch.equal(found["pooled"].function(rows), rows.clamp(min=0))
    assert torch.equal(found["up"].function(rows), F.gelu(rows, approximate="tanh"))
    assert not model.conv._forward_hooks


ACTIVATIONS = [nn.ReLU(), nn.ReLU(True), nn.ReLU6(True), nn.LeakyReLU(0.2, True), nn.ELU(0.5), nn.SELU(True),
               nn.CELU(0.7), nn.GELU("tanh"), nn.SiLU(True), nn.Mish(), nn.Softplus(2.0), nn.Tanh(), nn.Sigmoid(),
               nn.Hardswish(True), nn.Hardsigmoid(), nn.Hardtanh(-0.5, 2.0, True), nn.PReLU(4)]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_standard_activation_is_repeated_with_its_settings(activation):
    model = nn.Sequential(nn.Linear(3, 4), activation).eval()
    specs = find_layers(model, lambda m: m(normal(1, 3))).layers
    found = find_activations(model, specs, lambda m: m(normal(2, 3)))["0"]
    assert found.name
    rows = 3 * normal(7, 4)
    assert torch.allclose(found.function(rows.clone()), activation(rows.clone()))


def test_without_an_activation_the_fit_is_the_linear_optimum():
    x, weight = normal(500, 6) * torch.arange(1.0, 7), normal(5, 6, seed=1)
    y = x @ weight.T + 3
    fit = after_activation.fitted(x, y, lambda rows: rows, rank=2)
    used = after_activation.fitted_rows(500)
    centred = (x[:used] - x[:used].mean(dim=0)).double()
    left, scale, right = reduced_rank.channel_svd(weight, reduced_rank.damped(centred.T @ centred / used))
    whole = left[:, :2] * scale[:2] @ right[:2]
    assert torch.allclose(fit.left @ fit.right, whole, atol=1e-3)


def optimum(fit, x, wanted, function):
    """The fit polished by L-BFGS on the true error."""
    sides = [side.float().clone(memory_format=torch.contiguous_format).requires_grad_() for side in (
        fit.left, fit.right, fit.shift)]  # fmt: skip
    optimiser = torch.optim.LBFGS(sides, max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        left, right, shift = sides
        error = (function(F.linear(F.linear(x, right), left, shift)) - wanted).square().mean()
        error.backward()
        return error

    optimiser.step(loss)
    return tuple(side.detach() for side in sides)


@pytest.mark.parametrize("function", [torch.relu, F.gelu], ids=["relu", "gelu"])
def test_the_error_after_the_activation_is_nearly_the_least(function):
    x, weight = normal(3000, 20), normal(16, 20, seed=1) / 3
    y = x @ weight.T - 0.5
    linear = after_activation.fitted(x, y, function, rank=4, steps=0)
    fit = after_activation.fitted(x, y, function, rank=4)
    assert fit.left.shape == (16, 4)
    others = normal(3000, 20, seed=7)
    wanted = function(others @ weight.T - 0.5)

    def error(sides):
        return float((function(after_activation.predicted(sides, others)) - wanted).square().mean())

    found, start, best = (error(s) for s in (
        (fit.left, fit.right, fit.shift), (linear.left, linear.right, linear.shift),
        optimum(fit, x, function(y), function)))  # fmt: skip
    assert found < 0.95 * start
    assert found < 1.02 * best


def test_a_shift_that_is_given_is_kept():
    x, weight, shift = normal(800, 6) + 1, normal(5, 6, seed=1), normal(5, seed=2)
    fit = after_activation.fitted(x, x @ weight.T + shift, torch.relu, rank=3, shift=shift)
    assert torch.equal(fit.shift, shift.double())


def test_the_relative_error_is_one_for_the_mean():
    rows = normal(50, 3)
    assert after_activation.relative_error(rows.mean(dim=0).expand(50, 3), rows) == pytest.approx(1)
    assert after_activation.relative_error(rows, rows) == 0
    constant = torch.ones(4, 2)
    assert after_activation.relative_error(constant, constant) == 0


def test_a_prior_makes_the_first_step_the_best_of_its_rank_whatever_the_rows():
    weight, few = normal(5, 6, seed=1), normal(40, 6)
    scales = torch.arange(1.0, 7).double() ** 2
    prior = after_activation.Prior(weight.double(), scales.diag(), torch.zeros(6).double())
    fit = after_activation.fitted(few, few @ weight.T + 2, torch.relu, rank=2, prior=prior, steps=0)
    left, scale, right = reduced_rank.channel_svd(weight, scales.diag())
    assert torch.allclose(fit.left @ fit.right, left[:, :2] * scale[:2] @ right[:2], atol=1e-3)
    better = after_activation.fitted(few, few @ weight.T + 2, torch.relu, rank=2, prior=prior)
    assert better.error <= fit.error
