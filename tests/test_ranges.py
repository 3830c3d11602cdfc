"""Inputs of few values: torch's own fake quantization and brute force say what is right; files carry the ranges."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress import preflight
from autocompress.codec import container
from autocompress.compress import apply, artifact, lineage, lowrank, ranges
from autocompress.compress.finetune import finetune
from autocompress.compress.layers import find_layers
from autocompress.compress.ranges import Grid, Range, fitted
from autocompress.deploy.export import export
from autocompress.errors import ArtifactError, PlanError
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.search.space_file import load_space
from autocompress.trial import Workbench, run_trial

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=DRAW)
Y = (X[:, :3].sum(1) > 0).long()


def inputs(seed=0, count=500):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2


GRIDS = st.builds(
    lambda bits, scale, share: Grid(bits, scale, round(share * (2**bits - 1))),
    st.sampled_from([1, 4, 8]),
    st.floats(1e-4, 10).map(lambda x: float(f"{x:.6g}")),
    st.floats(0, 1),
)


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.integers(0, 100))
def test_a_grid_is_torchs_fake_quantization_bit_for_bit(grid, seed):
    x = inputs(seed)
    wanted = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, grid.top)
    assert torch.equal(grid(x), wanted)


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.integers(0, 100))
def test_a_range_has_torchs_learnable_values_and_gradients(grid, seed):
    x, push = inputs(seed).requires_grad_(), inputs(seed + 1)
    found = Range(grid)
    scale = found.log_scale.detach().exp().requires_grad_()
    zero = (found.shift.detach() * grid.top).requires_grad_()
    value = ranges._FakeQuantize.apply(x, scale, zero, grid.top)
    value.backward(push)
    other, its_scale, its_zero = x.detach().clone().requires_grad_(), *(
        t.detach().clone().reshape(1).requires_grad_() for t in (scale, zero)
    )  # fmt: skip
    wanted = torch._fake_quantize_learnable_per_tensor_affine(other, its_scale, its_zero, 0, grid.top, 1.0)
    wanted.backward(push)
    assert torch.equal(value, wanted)
    assert torch.equal(x.grad, other.grad)
    size = float(push.abs().sum())
    assert scale.grad.item() == pytest.approx(its_scale.grad.item(), rel=1e-3, abs=1e-5 * size * grid.top)
    assert zero.grad.item() == pytest.approx(its_zero.grad.item(), rel=1e-3, abs=1e-5 * size * grid.scale)


def test_gradients_pass_a_grid_inside_its_range_only():
    x = torch.tensor([-9.0, -0.9, 0.2, 7.0], requires_grad=True)
    grid = Grid(4, 0.5, 4)
    value = grid(x)
    value.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert torch.equal(value.detach(), grid(x.detach()))


@pytest.mark.parametrize("values", [inputs().relu(), inputs(), -inputs().relu(), torch.zeros(9), inputs() + 20])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clipping", ["minmax", "percentile", "fitted"])
def test_zero_is_a_level_and_ranges_hold_their_values(values, bits, clipping):
    grid = fitted(values, bits, clipping)
    assert grid(torch.zeros(3)).tolist() == [0.0] * 3
    assert 0 <= grid.zero_point <= grid.top
    if clipping == "minmax":
        assert (grid(values) - values).abs().max() <= grid.scale * 0.501 + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 50), st.sampled_from([4, 8]))
def test_the_fitted_range_has_the_least_error_of_those_tried(seed, bits):
    values = torch.cat([inputs(seed).double(), torch.tensor([-30.0, 40.0]).double()])
    low, high = float(values.min()), float(values.max())

    def error(grid):
        levels = np.arange(grid.top + 1) - grid.zero_point
        return (np.abs(values.numpy()[:, None] - grid.scale * levels).min(1) ** 1.5).sum()  # the nearest, by search

    found = error(fitted(values, bits))
    for share in ranges._SHARES:
        assert found <= error(ranges._between(low * share, high * share, bits)) * (1 + 1e-9)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)).eval()


def task(model=None, data=(X, Y), **more):
    def accuracy(outputs, targets):
        return float((outputs.argmax(1) == targets).double().mean())

    return ac.Task(model or net(), data, data, data, F.cross_entropy, accuracy, batch_size=16, **more)


def plan_of(bench, recipe, **layer):
    return Plan({spec.name: LayerPlan(**layer) for spec in bench.layers}, recipe)


def test_the_loaded_model_computes_what_the_trial_did(tmp_path):
    bench = Workbench(task())
    plan = plan_of(bench, Recipe(2.0, 1e-2), bits=4, activation_bits=4)
    outcome = list(run_trial(bench, plan))[-1]
    (tmp_path / "a.acz").write_bytes(outcome.artifact)
    loaded = ac.load(tmp_path / "a.acz")
    assert list(loaded.state_dict()) == list(bench.model.state_dict())
    model = apply.compress(bench.model, bench.layers, plan, bench.svd, outcome.state(), grids=bench.grids)
    grids, learned = ranges.attached(loaded), ranges.attached(model.module)
    assert grids.keys() == learned.keys() == {"0", "2", "4"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), apply.call_with(model.module, model.substitutes(), X))
        step = loaded
        plain = copy.deepcopy(loaded)
        for part in plain.modules():
            part._forward_pre_hooks.clear()
        assert not torch.allclose(step(X), plain(X), atol=1e-3)
        x = X  # by hand, with torch's own function
        for name, part in loaded.named_children():
            if name in grids:
                grid = grids[name]
                x = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, 0, grid.top)
            x = F.linear(x, part.weight, part.bias) if name in grids else part(x)
        assert torch.equal(x, loaded(X))


@pytest.mark.parametrize("runtime", ["dense", "sparse", "auto"])
def test_each_runtime_rounds_the_inputs(tmp_path, runtime):
    bench = Workbench(task())
    plan = Plan(
        {"0": LayerPlan(rank=2, activation_bits=4), "2": LayerPlan(bits=3, threshold=1.8, activation_bits=4),
         "4": LayerPlan()}, Recipe(0.0),
    )  # fmt: skip
    (tmp_path / "a.acz").write_bytes(next(run_trial(bench, plan)).artifact)
    plain, other = ac.load(tmp_path / "a.acz"), ac.load(tmp_path / "a.acz", runtime=runtime)
    assert ranges.attached(other) == ranges.attached(plain)
    torch.testing.assert_close(other(X), plain(X))


def test_factors_get_the_rounded_input_of_the_layer():
    bench = Workbench(task())
    plan = Plan({"0": LayerPlan(rank=2, activation_bits=4), "2": LayerPlan(), "4": LayerPlan()}, Recipe(0.0))
    loaded = artifact.restore(container.unpack(next(run_trial(bench, plan)).artifact))
    (grid,) = ranges.attached(loaded).values()
    first, second = loaded[0]
    assert torch.equal(second(first(grid(X))), loaded[0](X))
    assert ranges.attached(loaded).keys() == {"0"}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.embed = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(6, 6)
        self.two.weight = self.embed.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)) + self.embed(torch.zeros(1, dtype=torch.long)))


def test_modules_of_a_shared_weight_share_the_range_but_not_an_embedding():
    torch.manual_seed(1)
    model = Shared().eval()
    bench = Workbench(task(model))
    (name,) = (spec.name for spec in bench.layers)
    data = next(run_trial(bench, Plan({name: LayerPlan(activation_bits=8)}, Recipe(0.0)))).artifact
    loaded = artifact.restore(container.unpack(data), model)
    assert ranges.attached(loaded).keys() == {"one", "two"}
    assert loaded.embed(torch.tensor([1])).shape == (1, 6)


def test_ranges_are_learned_and_go_on_from_a_state():
    bench = Workbench(task())
    plan = plan_of(bench, Recipe(4.0, 1e-2, 0.0), activation_bits=4)
    model = apply.compress(bench.model, bench.layers, plan, bench.svd, grids=bench.grids)
    before = model.grids()
    list(finetune(model, bench.feed(0, False), F.cross_entropy, plan.recipe, [4.0]))
    after = model.grids()
    assert [name for name in before if before[name].scale != after[name].scale] == ["2", "4"]  # not the data's own
    state = lineage.unpack(lineage.pack(model.state()))
    again = apply.compress(bench.model, bench.layers, plan, bench.svd, state, grids=bench.grids)
    assert again.grids() == after
    other = replace(plan, layers={name: LayerPlan(activation_bits=8) for name in plan.layers})
    anew = apply.compress(bench.model, bench.layers, other, bench.svd, state, grids=bench.grids)
    assert all(grid == bench.grids(spec, 8) for spec, grid in zip(bench.layers, anew.grids().values(), strict=True))


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_a_range_that_is_far_off_learns_to_be_near_the_best(scale):
    x = inputs(count=2000).requires_grad_()
    found = Range(Grid(4, scale, 8))
    optimiser = torch.optim.Adam(found.trained, 0.02)
    errors = []
    for _ in range(200):
        error = F.mse_loss(found(x), x.detach())
        errors.append(error.item())
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    best = F.mse_loss(fitted(x.detach(), 4, power=2.0)(x.detach()), x.detach()).item()
    assert errors[0] > 5 * best
    assert errors[-1] < 1.2 * best


def test_files_without_it_say_nothing_and_damage_is_named():
    bench = Workbench(task())
    data = next(run_trial(bench, plan_of(bench, Recipe(0.0), bits=4))).artifact
    assert "activations" not in container.unpack(data).header
    good = next(run_trial(bench, plan_of(bench, Recipe(0.0), activation_bits=8))).artifact
    read = container.unpack(good)
    assert read.header["activations"].keys() == {"0", "2", "4"}
    for bad in ([8, 0.1], [8, -1.0, 3], [8, 0.1, 256], [True, 0.1, 0], [8, float("inf"), 0], "x", [8, 0.1, 1.5]):
        header = dict(read.header) | {"activations": {"0": bad}}
        with pytest.raises(ArtifactError, match="activations of '0' are"):
            artifact.restore(replace(read, header=header))
    with pytest.raises(ArtifactError, match="no table"):
        artifact.restore(replace(read, header=dict(read.header) | {"activations": [1]}))
    with pytest.raises(ArtifactError, match="has a layer 'nine'"):
        artifact.restore(replace(read, header=dict(read.header) | {"activations": {"nine": [8, 0.1, 1]}}))


def test_the_estimate_counts_the_ranges():
    bench = Workbench(task())
    plan = plan_of(bench, Recipe(0.0), bits=4, activation_bits=8)
    assert bench.estimate(plan) == pytest.approx(next(run_trial(bench, plan)).measurement.size_bytes, rel=0.03)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.head(self.attention(x, x, x)[0][:, 0])


def test_a_layer_whose_inputs_cannot_be_seen_is_named():
    torch.manual_seed(0)
    bench = Workbench(task(Attentive().eval()))
    plan = plan_of(bench, Recipe(0.0), activation_bits=8)
    whole = {"attention.in_proj_weight": LayerPlan()}
    with pytest.raises(PlanError, match=r"layer 'attention.out_proj': activation_bits is 8, allowed: 32"):
        next(run_trial(bench, replace(plan, layers={**plan.layers, **whole})))
    joined = r"layer 'attention.in_proj_weight': activation_bits is 8, allowed: 32 \(one of several weights of an att"
    with pytest.raises(PlanError, match=joined):
        next(run_trial(bench, plan))
    model = net()
    layers = find_layers(model, lambda m: m(X)).layers
    with pytest.raises(PlanError, match="layer '0': activation_bits is 8, allowed: 32"):
        apply.compress(
            model, layers, Plan({s.name: LayerPlan(activation_bits=8) for s in layers}), lambda s, k: lowrank.svd(X)
        )


def test_a_space_leaves_inputs_that_cannot_be_seen_whole():
    torch.manual_seed(0)
    bench = Workbench(task(Attentive().eval()))
    source = {"version": 1, "layers": [{"match": "*", "bits": [3, 6], "activation_bits": [4, 8]}]}
    space, unseen = preflight.where_seen(load_space(source, bench.layers), bench)
    assert unseen == ["attention.in_proj_weight", "attention.out_proj"]
    plan = space.middle(0.0)
    assert plan.layers["attention.out_proj"].activation_bits == 32
    assert plan.layers["head"].activation_bits in (4, 8)
    assert next(run_trial(bench, plan)).measurement.size_bytes > 0
    plain = load_space({"version": 1, "layers": [{"match": "*", "bits": [3, 6]}]}, bench.layers)
    assert preflight.where_seen(plain, bench) == (plain, [])


def test_bfloat16_inputs_keep_their_dtype():
    x = inputs().bfloat16()
    assert Grid(8, 0.1, 100)(x).dtype == torch.bfloat16
    assert Range(Grid(8, 0.1, 100))(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [0, 2, 16, 7.5])
def test_bad_activation_bits_name_what_is_allowed(bits):
    plan = Plan({"0": LayerPlan(), "2": LayerPlan(), "4": LayerPlan(activation_bits=bits)}, Recipe(0.0))
    with pytest.raises(PlanError, match=rf"layer '4': activation_bits is {bits}, allowed: 4, 8, 32"):
        next(run_trial(task(), plan))


def test_plans_of_old_studies_still_load():
    plan = plan_of(Workbench(task()), Recipe(), bits=4)
    old = plan.to_json()
    for layer in old["layers"].values():
        del layer["activation_bits"]
    assert Plan.from_json(old) == plan


def test_a_trial_follows_from_its_seed():
    bench = Workbench(task())
    plan = plan_of(bench, Recipe(2.0, 1e-2, precision="bfloat16", infomax=0.2), bits=4, activation_bits=4)
    one, same, other = (list(run_trial(bench, plan, seed=seed)) for seed in (1, 1, 2))
    assert [o.artifact for o in one] == [o.artifact for o in same]
    assert one[-1].artifact != other[-1].artifact


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["onnx", "torch", "archive"])
def test_exports_round_the_inputs_too(tmp_path, fmt):
    made = task()
    plan = plan_of(Workbench(made), Recipe(1.0, 1e-2), bits=4, activation_bits=8)
    (tmp_path / "a.acz").write_bytes(list(run_trial(made, plan))[-1].artifact)
    checks = export(tmp_path / "a.acz", made, fmt, tmp_path / "out", {})["verification"]
    assert checks["metric_exported"] == checks["metric_artifact"]
    assert checks["max_abs_difference"] < 0.1 * checks["max_abs_output"]


def test_a_state_brings_a_range_back_with_its_zero_point():
    learned = Range(Grid(4, 0.3, 6))
    with torch.no_grad():
        learned.log_scale += 0.2
        learned.shift += 0.07
    again = Range(Grid(4, 1.0, 3))
    again.with_state(learned.state())
    assert again.grid() == learned.grid()
    assert learned.grid().zero_point == 7
