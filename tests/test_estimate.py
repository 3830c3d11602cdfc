"""Estimated bytes: near those of the very file that a trial writes, whatever the plan."""

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.codec import container, header, mixed_stream, rans
from autocompress.compress import apply, artifact, clustering, estimate, lowrank, quantize
from autocompress.compress.codes import Code
from autocompress.compress.estimate import Estimator
from autocompress.compress.layers import find_layers
from autocompress.errors import PlanError, TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe

VERSION = "0.1.0"
KERNELS = (estimate.gather, clustering.lloyd)


class Twin(nn.Module):
    """No standard tree: a norm, a shared weight, a buffer, a frozen double, layers out of order."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 48)
        self.first, self.again = nn.Linear(48, 32), nn.Linear(48, 32, bias=False)
        self.again.weight = self.first.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, x):
        return self.head(self.norm(self.first(x) + self.again(x)))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 40, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(160, 60), nn.Linear(60, 10),
    )  # fmt: skip


def made(build, shape):
    """Model, layers and SVDs; some rows and columns are heavier, as in trained layers."""
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                heavy = torch.rand(len(parameter)).add(0.3).view(-1, *(1 for _ in parameter.shape[1:]))
                parameter.copy_(torch.randn_like(parameter) * heavy * torch.rand(parameter.shape[1:]).add(0.3))
    specs = find_layers(model, lambda module: module(torch.randn(1, *shape))).layers
    return model, specs


def svds(model):
    return lambda spec, scheme: lowrank.svd(model.get_submodule(spec.name).weight, scheme)


def written(model, specs, plan, effort="auto"):
    tensors = apply.compress(model, specs, plan, svds(model)).encode()
    return len(artifact.write(model, plan, tensors, VERSION, effort))


CONV, TWIN = made(conv, (1, 8, 8)), made(Twin, (48,))


def plan_of(specs, given, rest):
    return Plan({s.name: given.get(s.name, rest) for s in specs}, Recipe())


PLANS = {
    "default": (CONV, {}, LayerPlan()),
    "3 bits": (CONV, {}, LayerPlan(bits=3)),
    "pruned": (CONV, {}, LayerPlan(bits=5, threshold=0.8)),
    "between knots": (CONV, {}, LayerPlan(bits=6, threshold=1.2)),
    "1 bit": (CONV, {}, LayerPlan(bits=1)),
    "1 bit pruned": (CONV, {}, LayerPlan(bits=1, threshold=0.7)),
    "8 bits": (CONV, {}, LayerPlan(bits=8, threshold=0.4)),
    "16 bits": (CONV, {}, LayerPlan(bits=16)),
    "16 bits pruned": (CONV, {}, LayerPlan(bits=16, threshold=1.3)),
    "32 bits pruned": (CONV, {}, LayerPlan(bits=32, threshold=0.8)),
    "floats hardly pruned": (CONV, {}, LayerPlan(bits=32, threshold=0.2)),
    "just below half": (CONV, {}, LayerPlan(bits=2, threshold=0.35)),
    "above half": (CONV, {}, LayerPlan(bits=2, threshold=0.55)),
    "everything": (CONV, {}, LayerPlan(bits=4, threshold=10.0)),
    "rank": (CONV, {"6": LayerPlan(9, 4, 0.3), "3": LayerPlan(11, 3, 0.6)}, LayerPlan(bits=6)),
    "spatial": (CONV, {"3": LayerPlan(13, 4, 0.5, "spatial"), "6": LayerPlan(1, 2, 1.0)}, LayerPlan(bits=16)),
    "rank and floats": (CONV, {"6": LayerPlan(20, 16, 0.9), "3": LayerPlan(5)}, LayerPlan(bits=2)),
    "uniform": (CONV, {}, LayerPlan(bits=4, threshold=0.6, quantizer="uniform")),
    "uniform 1": (CONV, {"6": LayerPlan(30, 1, quantizer="uniform")}, LayerPlan(bits=1, quantizer="uniform")),
    "uniform 8": (CONV, {}, LayerPlan(bits=8, threshold=0.1, quantizer="uniform")),
    "shared": (TWIN, {"head": LayerPlan(7, 3, 0.4)}, LayerPlan(bits=4, threshold=0.7)),
    "shared floats": (TWIN, {"head": LayerPlan()}, LayerPlan(bits=5)),
}  # fmt: skip


@pytest.fixture(scope="module")
def estimators():
    return {id(made): Estimator(*made, svds(made[0]), VERSION) for made in (CONV, TWIN)}


@pytest.mark.parametrize("name", PLANS)
def test_estimates_are_near_the_file(name, estimators):
    made, given, rest = PLANS[name]
    plan = plan_of(made[1], given, rest)
    real = written(*made, plan)
    assert estimators[id(made)].size_bytes(plan) == pytest.approx(real, rel=0.02, abs=4)


def test_the_uncompressed_file_is_known_exactly(estimators):
    for made in (CONV, TWIN):
        plan = plan_of(made[1], {}, LayerPlan())
        assert estimators[id(made)].size_bytes(plan) == written(*made, plan)


@pytest.mark.parametrize("effort", ["fast", "max"])
def test_estimates_follow_the_effort(effort):
    model, specs = CONV
    estimator = Estimator(model, specs, svds(model), VERSION, effort)
    plan = plan_of(specs, {}, LayerPlan(bits=3, threshold=0.6))
    assert estimator.size_bytes(plan) == pytest.approx(written(model, specs, plan, effort), rel=0.02)


def test_a_large_file_counts_as_coded_fast(monkeypatch):
    model, specs = CONV
    plan = plan_of(specs, {}, LayerPlan(bits=4, threshold=0.6))
    told = [Estimator(model, specs, svds(model), VERSION, effort).size_bytes(plan) for effort in ("auto", "fast")]
    assert told[0] < 0.99 * told[1]
    factorised = plan_of(specs, {"6": LayerPlan(9, 4, 0.6)}, LayerPlan(bits=4, threshold=0.6))
    monkeypatch.setattr(container, "MOST_MIXED", sum(tensor.numel() for tensor in model.state_dict().values()) - 1)
    estimator = Estimator(model, specs, svds(model), VERSION)
    assert estimator.size_bytes(plan) == told[1]
    assert estimator.size_bytes(factorised) == pytest.approx(written(model, specs, factorised), rel=0.02)


def test_a_plan_that_was_near_before_codes_nothing(monkeypatch):
    model, specs = CONV
    estimator = Estimator(model, specs, svds(model), VERSION)
    estimator.size_bytes(plan_of(specs, {"6": LayerPlan(23, 3, 0.7)}, LayerPlan(bits=3, threshold=0.55)))
    plan = plan_of(specs, {"6": LayerPlan(25, 4, 0.9)}, LayerPlan(bits=3, threshold=0.95))
    real = written(model, specs, plan)
    monkeypatch.setattr(mixed_stream, "encode", None)
    assert estimator.size_bytes(plan) == pytest.approx(real, rel=0.02)
    with pytest.raises(TypeError):
        estimator.size_bytes(plan_of(specs, {}, LayerPlan(bits=3, threshold=1.2)))


@pytest.mark.parametrize("name", ["pruned", "rank", "8 bits", "uniform", "16 bits pruned"])
def test_a_sample_of_a_large_layer_is_enough(name, monkeypatch):
    monkeypatch.setattr(estimate, "_MOST", 4000)
    (model, specs), given, rest = PLANS[name]
    plan = plan_of(specs, given, rest)
    real = written(model, specs, plan)
    assert Estimator(model, specs, svds(model), VERSION).size_bytes(plan) == pytest.approx(real, rel=0.04)


def test_a_sample_has_the_whole_tensors_entropy(monkeypatch):
    weight, parts = CONV[0][6].weight.detach(), lowrank.svd(CONV[0][6].weight)
    spec = next(s for s in CONV[1] if s.name == "6")
    layers = LayerPlan(bits=3, threshold=0.7), LayerPlan(30, bits=5, threshold=0.3)
    for layer in layers:
        found = []
        for most in (1 << 20, 2000):
            monkeypatch.setattr(estimate, "_MOST", most)
            at = ("6", "channel", -1 if layer.rank is None else 0)
            piece = (
                estimate._Whole(at, weight) if layer.rank is None else estimate._Factor(at, spec, parts, torch.float32)
            )
            found.append(estimate._base(piece.ordered(layer.rank), layer)[0])
        assert found[0] != found[1]
        assert found[0] == pytest.approx(found[1], rel=0.05)


def test_bad_plans_and_weights_are_told():
    model, specs = made(conv, (1, 8, 8))
    estimator = Estimator(model, specs, svds(model), VERSION)
    with pytest.raises(PlanError, match="layer '6': rank is 99"):
        estimator.size_bytes(plan_of(specs, {"6": LayerPlan(99)}, LayerPlan()))
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    with pytest.raises(TrialFailed, match="layer '6' holds weights that are not finite"):
        estimator.size_bytes(plan_of(specs, {}, LayerPlan(bits=3)))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 2.2])
@pytest.mark.parametrize("rank", [None, 17])
def test_histograms_are_those_of_the_codes(bits, threshold, rank):
    """The base is the entropy of what is coded: k-means and grid steps come out as those that really run."""
    model, specs = CONV
    spec = next(s for s in specs if s.name == "6")
    piece = (
        estimate._Whole(("6", "", -1), model[6].weight.detach())
        if rank is None
        else estimate._Factor(("6", "channel", 1), spec, lowrank.svd(model[6].weight), torch.float32)
    )
    for quantizer in ("codebook", "uniform"):
        layer = LayerPlan(rank, bits, threshold, quantizer=quantizer)
        coded = Code(piece.weight(rank), layer, {}, "").encode()
        assert piece.shape(rank) == coded.shape
        counts = np.bincount(coded.symbols.ravel())
        base, table, most = estimate._base(piece.ordered(rank), layer)
        assert 8 * (base - estimate._OVERHEAD) == pytest.approx(rans.entropy(counts), rel=1e-3)
        assert table.size == coded.table.size
        assert most == pytest.approx(counts.max() / counts.sum(), abs=1e-3)
        if quantizer == "codebook":
            assert np.allclose(table, coded.table, rtol=2**-7)


def test_weights_of_few_values_are_their_own_codebook():
    weight = torch.tensor([0.5, -0.25, 0.5, 0.0, 0.75, -0.25] * 20).view(10, 12)
    for layer in (LayerPlan(bits=3), LayerPlan(bits=3, threshold=0.3), LayerPlan(bits=1), LayerPlan(bits=8)):
        coded = Code(weight, layer, {}, "").encode()
        base, table, _ = estimate._base(estimate._Whole(("", "", -1), weight).ordered(None), layer)
        assert np.array_equal(table, coded.table)
        counts = np.bincount(coded.symbols.ravel())
        assert 8 * (base - estimate._OVERHEAD) == pytest.approx(rans.entropy(counts))


def test_a_layer_of_zeros_has_an_estimate():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    specs = find_layers(model, lambda module: module(torch.randn(1, 30))).layers
    estimator = Estimator(model, specs, svds(model), VERSION)
    for layer in (LayerPlan(bits=2), LayerPlan(bits=3, threshold=1.0), LayerPlan(bits=4, quantizer="uniform")):
        plan = plan_of(specs, {}, layer)
        assert estimator.size_bytes(plan) == pytest.approx(written(model, specs, plan), abs=8)


def test_kmeans_is_that_of_trials():
    values = torch.randn(6000, generator=torch.Generator().manual_seed(1))
    whole = estimate._Whole(("", "", -1), values).ordered(None)
    for k in (2, 7, 64, 256):
        real = quantize.kmeans(values, k)
        assert np.allclose(estimate._codebook(whole, 0, 0, k), real.numpy(), rtol=2**-8)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_kernels_are_their_python(kernel):
    random = np.random.default_rng(2)
    values = np.sort(random.integers(-(1 << 20), 1 << 20, 300))
    if kernel is estimate.gather:
        ranks = random.integers(0, 9, 300).astype(np.uint16)
        both = [(np.zeros(301, np.int64), np.zeros(301, np.int64)) for _ in range(2)]
        found = [run(values, ranks, 300, 4, *to) for run, to in zip((kernel, kernel.python), both, strict=True)]
        assert found[0] == found[1] == np.count_nonzero(ranks < 4)
        assert np.array_equal(both[0][0][: found[0]], values[ranks < 4])
    else:
        sums = np.concatenate([[0], np.cumsum(values)])
        both = [(np.linspace(values[0], values[-1], 20).astype(np.int64),) for _ in range(2)]
        runs = zip((kernel, kernel.python), both, strict=True)
        found = [run(values, sums, 300, 110, 190, 20, 50, *to) for run, to in runs]
        assert found[0] == found[1] > 5
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


def test_kinds_in_the_head_are_known():
    for layer in (
        LayerPlan(),
        LayerPlan(bits=16, threshold=1.0),
        LayerPlan(bits=2),
        LayerPlan(bits=2, quantizer="uniform"),
    ):
        assert estimate._told(layer, torch.zeros(1))[0] in header.KINDS


@pytest.mark.parametrize("threshold", [1.45, 1.6, 1.7])
def test_weights_that_end_between_two_knots(threshold):
    """Those of a fresh nn.Linear are uniform: at two standard deviations nothing is left of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    layers = find_layers(model, lambda m: m(torch.ones(1, 400))).layers
    plan = Plan({"0": LayerPlan(bits=4, threshold=threshold)})
    svds = lambda spec, scheme: lowrank.svd(model[0].weight, scheme)  # noqa: E731
    data = artifact.write(model, plan, apply.compress(model, layers, plan, svds).encode(), "test")
    assert Estimator(model, layers, svds, "test").size_bytes(plan) == pytest.approx(len(data), rel=0.03)


@pytest.mark.parametrize("layer", [LayerPlan(bits=2), LayerPlan(bits=4, threshold=1.0), LayerPlan(bits=6, rank=8)])
def test_under_a_rate_layers_lie_on_a_grid(layer):
    model, specs = made(lambda: nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 70)), (64,))
    plan = Plan({s.name: layer for s in specs}, Recipe(rate=1.0))
    found, real = Estimator(model, specs, svds(model), VERSION).size_bytes(plan), written(model, specs, plan)
    assert real <= found <= 1.07 * real
