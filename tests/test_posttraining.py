"""Plans that look at inputs and have scales, from the plan to the loaded file."""

import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autocompress
from autocompress import Task
from autocompress.compress import apply, artifact, lineage, prepare
from autocompress.compress.codes import Code
from autocompress.compress.estimate import Estimator
from autocompress.compress.layers import find_layers
from autocompress.errors import ArtifactError, PlanError, SpaceError, TrialFailed
from autocompress.inspection import inspect_file
from autocompress.plan import LayerPlan, Plan, Recipe, check
from autocompress.search.space_file import load_space
from autocompress.trial import Budget, Workbench, run_trial

DECODER = Path(__file__).parents[1] / "scripts" / "decode_artifact.py"
GRIDS = list(itertools.product(["uniform", "asymmetric"], ["tensor", "channel", 7], [1, 3, 8]))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, 1),
    ).eval()  # fmt: skip


X = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 3).view(3, 1, 1)


def compressed(model, layer, start=None, recipe=None):
    specs = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({spec.name: layer for spec in specs}, recipe or Recipe())
    check(plan, specs)
    return plan, apply.compress(model, specs, plan, None, start, calibration=lambda: X)


def bench(model=None, metric="mse"):
    model = net() if model is None else model
    with torch.no_grad():
        y = model(X)
    data = X, y
    return Workbench(
        Task(model, data, data, data, nn.functional.mse_loss, lambda a, b: float(((a - b) ** 2).mean()),
             direction="minimize", batch_size=10, name="t"),
        "cpu",
    )  # fmt: skip


@pytest.mark.parametrize(("quantizer", "granularity", "bits"), GRIDS)
@pytest.mark.parametrize("rounding", ["nearest", "hessian"])
def test_a_file_gives_back_what_the_trial_computed_with(tmp_path, quantizer, granularity, bits, rounding):
    layer = LayerPlan(bits=bits, threshold=0.5, quantizer=quantizer, granularity=granularity, rounding=rounding)
    plan, model = compressed(net(), layer)
    path = tmp_path / "m.acz"
    path.write_bytes(artifact.write(net(), plan, model.encode(), "0"))
    loaded = artifact.load(path)
    restored = artifact.restore(artifact.read(path))
    for key, code in model.codes.items():
        values = code.values().detach()
        assert torch.equal(loaded.get_parameter(key), values)
        assert torch.equal(restored.get_parameter(key), values)
        rows = values.flatten(1)
        assert (rows == 0).float().mean() > 0.2
        if granularity == "channel" and bits < 8:
            assert max(len(row.unique()) for row in rows) <= 2**bits + 1


def test_the_independent_decoder_and_inspect_know_scales(tmp_path):
    path, out = tmp_path / "m.acz", tmp_path / "m.npz"
    plan, model = compressed(net(), LayerPlan(bits=4, quantizer="asymmetric", granularity=9))
    path.write_bytes(artifact.write(net(), plan, model.encode(), "0"))
    subprocess.run([sys.executable, DECODER, path, out], check=True)
    found = np.load(out)
    for key, code in model.codes.items():
        assert np.array_equal(found[key], code.values().detach().numpy())
    assert not any("#" in name for name in found.files)
    rows = {row.name: row for row in inspect_file(path).rows}
    assert rows["0.weight#scale"].shape == (8, 3)
    assert rows["0.weight#scale"].plain_bytes == 0


@pytest.mark.parametrize("shape", [(7,), (8, 0), (8, 28), (8, 3, 1), ()])
def test_scales_that_do_not_fit_are_refused(tmp_path, shape):
    plan, model = compressed(net(), LayerPlan(bits=4, quantizer="uniform", granularity="channel"))
    tensors = model.encode() | {"0.weight#scale": artifact.raw_tensor(torch.ones(shape))}
    path = tmp_path / "m.acz"
    path.write_bytes(artifact.write(net(), plan, tensors, "0"))
    with pytest.raises(ArtifactError, match="has scales of shape"):
        artifact.load(path)


def test_a_plan_of_old_keeps_its_very_bytes():
    """Without scales a file has no name and no number more."""
    for quantizer in ("codebook", "uniform"):
        _, model = compressed(net(), LayerPlan(bits=4, quantizer=quantizer))
        assert set(model.encode()) == set(net().state_dict())


def test_layers_are_looked_at_behind_those_that_are_compressed_already():
    model = net()
    seen = {}

    def solve(key, weight, moments, groups):
        seen[key] = moments.statistics(), groups
        return prepare.Prepared(weight * 0.5, torch.ones_like(weight, dtype=torch.bool))

    keys = {"0.weight": "0", "5.weight": "5"}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepare.prepare(model, {"2.weight": torch.zeros(8, 2, 3, 3)}, keys, solve, lambda k, p: p.weight, lambda m: m(X))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with torch.no_grad():
        hidden = torch.relu(model[2].bias)[None, :, None, None].expand(40, 8, 4, 4).flatten(1)  # its weight is zero
    torch.testing.assert_close(seen["5.weight"][0].gram[0], hidden.T @ hidden / 40)
    assert seen["0.weight"][0].count == 40 * 36


def test_the_inputs_that_a_layer_should_have_are_known():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x = torch.randn(30, 4)
    drifts = {}

    def solve(key, weight, moments, groups):
        drifts[key] = moments.drift
        return prepare.Prepared(weight * 0.5, torch.ones_like(weight, dtype=torch.bool))

    prepare.prepare(model, {}, {"0.weight": "0", "1.weight": "1"}, solve, lambda k, p: p.weight, lambda m: m(x))
    with torch.no_grad():
        should, gets = model[0](x), nn.functional.linear(x, model[0].weight * 0.5, model[0].bias)
    assert not drifts["0.weight"].any()
    torch.testing.assert_close(drifts["1.weight"][0], (should - gets).T @ gets / 30)


def test_what_a_model_raises_comes_out_and_leaves_it_as_it_was():
    model = net()
    weight = model[0].weight.data.clone()

    def solve(key, weight, moments, groups):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        prepare.prepare(model, {}, {"0.weight": "0"}, solve, lambda k, p: p.weight, lambda m: m(X))
    assert torch.equal(model[0].weight, weight)
    assert not model[0]._forward_pre_hooks


def test_a_recurrent_layer_is_solved_by_all_its_calls():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            h = torch.zeros(len(x), 6)
            for step in x.flatten(1).split(6, 1):
                h = torch.tanh(self.inner(h) + step)
            return self.out(h)

    _, model = compressed(Recurrent(), LayerPlan(bits=3, rounding="hessian", quantizer="uniform"))
    assert set(model.codes) == {"inner.weight", "out.weight"}


def test_a_layer_that_cannot_be_seen_is_named_and_rounded_to_nearest():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    specs = find_layers(model, lambda m: m(x)).layers
    layer = LayerPlan(bits=3, rounding="hessian", quantizer="uniform")
    plan = Plan({spec.name: layer for spec in specs})
    with pytest.warns(UserWarning, match=r"'self_attn\.out_proj'"):
        found = apply.compress(model, specs, plan, None, calibration=lambda: x)
    nearest = Code(model.self_attn.out_proj.weight, LayerPlan(bits=3, quantizer="uniform"), {}, "k")
    assert torch.equal(found.codes["self_attn.out_proj.weight"].values(), nearest.values())


def test_trials_calibrate_finetune_and_go_on():
    layer = LayerPlan(bits=3, threshold=0.4, quantizer="asymmetric", granularity="channel", saliency="hessian",
                      rounding="hessian")  # fmt: skip
    task = bench()
    plan = Plan({spec.name: layer for spec in task.layers}, Recipe(epochs=20, learning_rate=1e-3))
    nearest = Plan(
        {spec.name: LayerPlan(bits=3, threshold=0.4, quantizer="asymmetric", granularity="channel")
         for spec in task.layers}, plan.recipe,
    )  # fmt: skip
    metrics = {}
    for name, each in (("hessian", plan), ("nearest", nearest)):
        outcomes = [(outcome.measurement.metric_val, outcome.state()) for outcome in run_trial(task, each, Budget())]
        metrics[name] = outcomes[0][0]
        assert outcomes[1][0] < outcomes[0][0]  # finetuning helps
        state = outcomes[1][1]
        assert state.tensors["0.weight#step"].shape == (8, 1)
        again = next(run_trial(task, each, Budget((0.0,)), start=state)).measurement.metric_val
        assert name == "nearest" or again == outcomes[1][0]  # by magnitude, trained weights are judged anew
        state = lineage.unpack(lineage.pack(state))
        assert next(run_trial(task, each, Budget((0.0,)), start=state)).measurement.metric_val < outcomes[0][0]
    assert metrics["hessian"] < metrics["nearest"]


def test_without_calibration_such_a_plan_fails_with_a_message():
    model = net()
    specs = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({spec.name: LayerPlan(bits=3, rounding="hessian") for spec in specs})
    with pytest.raises(TrialFailed, match="layer '0' needs calibration data"):
        apply.compress(model, specs, plan, None)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan(saliency="taylor"), "saliency is 'taylor', allowed: magnitude, activation, hessian"),
        (LayerPlan(rounding="up"), "rounding is 'up', allowed: nearest, hessian"),
        (LayerPlan(granularity=0), "granularity is 0, allowed: tensor, channel, a whole number from 1"),
        (LayerPlan(granularity=True), "granularity is True"),
        (LayerPlan(bits=4, granularity="channel"), "'channel', allowed: tensor where quantizer is codebook"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused_by_name(layer, message):
    with pytest.raises(PlanError, match=message):
        compressed(net(), layer)


def test_a_rate_has_grids_of_its_own():
    with pytest.raises(PlanError, match="granularity is 'channel', allowed: tensor where rate is above 0"):
        compressed(net(), LayerPlan(bits=4, quantizer="uniform", granularity="channel"), recipe=Recipe(rate=1.0))
    with pytest.raises(PlanError, match="quantizer is 'asymmetric'"):
        compressed(net(), LayerPlan(bits=4, quantizer="asymmetric"), recipe=Recipe(rate=1.0))


def test_spaces_have_the_same_words(tmp_path):
    specs = find_layers(net(), lambda m: m(X[:1])).layers
    text = 'version: 1\nlayers:\n  - {match: "*", bits: [2, 4], quantizer: uniform, '
    path = tmp_path / "s.yaml"
    path.write_text(text + "saliency: hessian, rounding: hessian, granularity: 32}\n")
    space = load_space(str(path), specs)
    layer = next(
        iter(space.plan(space.params_for(Plan({s.name: LayerPlan(bits=3) for s in specs})), 1).layers.values())
    )
    assert layer == LayerPlan(
        bits=3, quantizer="uniform", saliency="hessian", rounding="hessian", granularity=32
    )  # fmt: skip
    for bad, message in (("granularity: chanel", "did you mean 'channel'"), ("rounding: up", "nearest, hessian")):
        path.write_text(text + bad + "}\n")
        with pytest.raises(SpaceError, match=message):
            load_space(str(path), specs)
    path.write_text('version: 1\nlayers:\n  - {match: "*", bits: 4, granularity: channel}\n')
    with pytest.raises(SpaceError, match="tensor where quantizer is codebook"):
        load_space(str(path), specs)


@pytest.mark.parametrize("granularity", ["channel", 16])
@pytest.mark.parametrize("quantizer", ["uniform", "asymmetric"])
def test_estimates_know_scales(granularity, quantizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64))
    specs = find_layers(model, lambda m: m(torch.randn(2, 128))).layers
    estimator = Estimator(model, specs, None, autocompress.__version__)
    for bits, threshold in ((2, 0.0), (3, 0.5), (4, 1.0), (6, 0.0)):
        layer = LayerPlan(bits=bits, threshold=threshold, quantizer=quantizer, granularity=granularity)
        plan = Plan({spec.name: layer for spec in specs})
        tensors = apply.compress(model, specs, plan, None).encode()
        real = len(artifact.write(model, plan, tensors, autocompress.__version__))
        assert estimator.size_bytes(plan) == pytest.approx(real, rel=0.04)


def test_warnings_are_rare():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed(net(), LayerPlan(bits=3, rounding="hessian", saliency="hessian", threshold=0.5))


class Experts(nn.Module):
    """Each example goes to the expert that a gate tells; one never gets any."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 2)
        with torch.no_grad():
            self.gate.bias[2] = -1e3

    def forward(self, x):
        way = self.gate(x).argmax(1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if (way == index).any():
                y[way == index] = expert(x[way == index])
        return self.last(y)


@pytest.mark.filterwarnings("ignore:the inputs of 'experts.2'")
def test_a_model_that_sends_examples_other_ways_once_compressed_is_calibrated_without_drift():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    model = Experts().eval()
    specs = find_layers(model, lambda m: m(x)).layers
    plan = Plan({spec.name: LayerPlan(bits=2, quantizer="uniform", rounding="hessian") for spec in specs})
    codes = apply.compress(model, specs, plan, None, calibration=lambda: x).codes
    with torch.no_grad():
        moved = model.gate(x).argmax(1) != apply.call_with(
            model.gate, {"weight": codes["gate.weight"].values(), "bias": model.gate.bias}, x
        ).argmax(1)
    assert moved.any()  # so the experts' inputs differ in number
    assert set(codes) == {f"{spec.name}.weight" for spec in specs}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_inputs_that_are_not_finite_name_the_layer(rate):
    model = net()
    specs = find_layers(model, lambda m: m(X[:1])).layers
    plan = Plan({spec.name: LayerPlan(bits=3, rounding="hessian") for spec in specs}, Recipe(rate=rate))
    with pytest.raises(TrialFailed, match=r"layer '0': its calibration inputs are not finite"):
        apply.compress(model, specs, plan, None, calibration=lambda: X * math.inf)


def test_an_outlying_bias_is_within_its_grid_at_first():
    layer = nn.Linear(3, 4096)
    with torch.no_grad():
        layer.bias.zero_()
        layer.bias[7] = 3.0
    specs = find_layers(nn.Sequential(layer), lambda m: m(torch.zeros(1, 3))).layers
    plan = Plan({"0": LayerPlan(bits=5)}, Recipe(rate=1.0))
    code = apply.compress(nn.Sequential(layer), specs, plan, None).codes["0.bias"]
    assert float(code.values().detach()[7]) == pytest.approx(3.0)


@pytest.mark.parametrize(("mean", "dtype"), [(100.0, "float32"), (0.5, "bfloat16")])
def test_a_running_mean_far_from_zero_keeps_its_bits(mean, dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    model[1].running_mean.fill_(mean)
    specs = find_layers(model, lambda m: m(torch.zeros(2, 4))).layers
    entries = apply.compress(model, specs, Plan({"0": LayerPlan(bits=4)}), None).encode()
    assert entries["1.running_mean"].dtype == dtype
    assert entries["1.running_var"].dtype == "bfloat16"
