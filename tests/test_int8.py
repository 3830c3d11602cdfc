"""8-bit ONNX files: what onnxruntime computes with them, which layers they hold, what they refuse."""

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_deploy import FACTS, compressed, make_task
from torch import nn

from autocompress.compress.ranges import Grid, attach
from autocompress.deploy import int8, int8_calibrate, int8_weights, verify
from autocompress.deploy import onnx as deploy_onnx
from autocompress.deploy.export import export
from autocompress.deploy.int8_choose import Choosing, Group, chosen, decided_in, pays
from autocompress.deploy.int8_layers import own_ranges
from autocompress.deploy.recorder import Recorder
from autocompress.deploy.sessions import session_of
from autocompress.errors import ExportError
from autocompress.plan import LayerPlan

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """Convolutions with normalisations, a sum, a pool and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 24, 3, stride=2, groups=2), nn.Linear(24 * 3 * 3, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.body(x)))
        x = F.max_pool2d(F.relu6(self.last(x)), 2, 1)
        return self.head(x.flatten(1))


class Words(nn.Module):
    """Looked-up rows, a block of three axes with a GELU and a norm, and their mean."""

    def __init__(self):
        super().__init__()
        self.rows, self.up, self.down = nn.Embedding(60, 32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, tokens):
        x = self.rows(tokens)
        x = self.norm(x + self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))


def mlp():
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 6))


def pair():
    """A layer of low rank, as its two factors."""
    return nn.Sequential(nn.Linear(40, 8, bias=False), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 6))


NETS = {
    "residual": (Residual, lambda: torch.randn(96, 3, 9, 9)),
    "mlp": (mlp, lambda: torch.randn(96, 40)),
    "pair": (pair, lambda: torch.randn(96, 40)),
    "words": (Words, lambda: torch.randint(0, 60, (96, 7))),
}


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(int8, "_TURNS", 2)
    monkeypatch.setattr(int8, "_TURN_SECONDS", 0.0)


def task_of(name):
    torch.manual_seed(3)
    make, inputs = NETS[name]
    return make_task(make(), (inputs(),))


def net_of(task, tmp_path):
    recorder = Recorder(task.model, tmp_path)
    recorder.run("one", recorder.named(task.test[0][:2]))
    return int8.net_of(task.model, {"input": task.test[0][:2]}, ["output"], recorder, task)


@cache
def known(name):
    """The task and the net of that name, made once."""
    task = task_of(name)
    with TemporaryDirectory() as folder:
        return task, net_of(task, Path(folder))


def everywhere(net, form):
    """Each layer in that form, where it has it."""
    forms = {}
    for layer in net.layers:
        given = "static" if layer.kind in ("conv", "table", "add") else form
        forms[layer] = given
    return forms


def operations(model, tmp_path):
    """What onnxruntime makes of a model."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


# ---------------------------------------------------------------------- the graph


@pytest.mark.parametrize("form", ["static", "dynamic"])
@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_computes_what_the_graph_says(name, form):
    """The reference is onnx's own evaluator in numpy, which knows no fused operation."""
    task, net = known(name)
    model = net.graph(everywhere(net, form))
    onnx.checker.check_model(model, full_check=True)
    inputs = task.test[0][:7].numpy()
    model.opset_import[0].version = 19  # of which the evaluator knows DequantizeLinear; it has not changed
    model.ir_version = 9
    (wanted,) = onnx.reference.ReferenceEvaluator(model).run(None, {"input": inputs})
    (found,) = session_of(model).run(None, {"input": inputs})
    with torch.no_grad():
        float32 = task.model(task.test[0][:7]).numpy()
    step = np.ptp(float32) / 255
    assert np.abs(found - wanted).max() <= 2 * step
    assert np.abs(found - wanted).mean() <= 0.3 * step
    assert np.abs(found - float32).mean() <= 0.03 * np.abs(float32).max()
    assert np.abs(found - float32).max() > 0  # it does round


@pytest.mark.parametrize(
    ("name", "form", "fused", "absent"),
    [
        ("residual", "static", {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1}, {"Conv", "Gemm", "Relu", "Add"}),
        ("mlp", "static", {"QGemm": 3}, {"Gemm", "MatMul", "Relu"}),
        ("pair", "dynamic", {"DynamicQuantizeMatMul": 3}, {"MatMulInteger", "Gemm", "Add"}),
        ("words", "dynamic", {"DynamicQuantizeMatMul": 3}, {"MatMul", "MatMulInteger"}),
        ("words", "static", {"MatMulIntegerToFloat": 2, "QGemm": 1}, {"MatMul", "Gemm"}),
    ],
)
def test_every_layer_becomes_one_operation(name, form, fused, absent, tmp_path):
    _, net = known(name)
    kinds = operations(net.graph(everywhere(net, form)), tmp_path)
    assert {kind: kinds.count(kind) for kind in fused} == fused
    assert not absent & set(kinds)


def test_weights_in_small_forms_are_folded_before_they_are_fused(tmp_path):
    torch.manual_seed(0)
    task = task_of("residual")
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.dim() > 1:
                parameter.copy_((parameter / parameter.std()).round().clamp(-1, 1) * 0.1)
    net = net_of(task, tmp_path)
    forms = everywhere(net, "static")
    (model, small), (plain, none) = net.final(forms, small=True), net.final(forms, small=False)
    assert {form.kind.split(",")[0] for name, form in small.items() if name.endswith(":w")} == {"int8"}
    made, as_it_is = deploy_onnx.inserted(model, small), deploy_onnx.inserted(plain, none)
    assert made.ByteSize() < as_it_is.ByteSize() - 2000
    assert operations(made, tmp_path) == operations(as_it_is, tmp_path)
    feed = {"input": task.test[0][:5].numpy()}
    assert np.array_equal(session_of(made).run(None, feed)[0], session_of(as_it_is).run(None, feed)[0])


def test_a_weight_read_in_two_ways_is_rounded_and_nothing_more(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.mix = nn.Embedding(300, 16), nn.Linear(16, 16)

        def forward(self, tokens):
            return F.linear(self.mix(self.rows(tokens)).mean(1), self.rows.weight)

    task = make_task(Tied(), (torch.randint(0, 300, (64, 5)),))
    net = net_of(task, tmp_path)
    assert [(layer.name, layer.kind) for layer in net.layers] == [("mix.weight", "matmul"), ("rows.weight", "constant")]
    model, forms = net.final({net.layers[0]: "dynamic", net.layers[1]: "weights"}, small=True)
    made = deploy_onnx.inserted(model, forms)
    assert made.ByteSize() < 300 * 16 + 3000
    feed = {"input": task.test[0][:9].numpy()}
    with torch.no_grad():
        wanted = task.model(task.test[0][:9]).numpy()
    assert np.abs(session_of(made).run(None, feed)[0] - wanted).max() < 0.05 * np.abs(wanted).max()


class Twice(nn.Module):
    """A convolution with two normalisations."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        for k, norm in enumerate(self.norms):
            nn.init.uniform_(norm.weight, 1 + 3 * k, 2 + 3 * k)

    def forward(self, x):
        return self.norms[1](self.mix(self.norms[0](self.mix(x)).relu()))


class Turned(nn.Module):
    """A square matrix and its transpose."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        return (x @ self.mix).relu() @ self.mix.T


@pytest.mark.parametrize(("make", "shape"), [(Twice, (16, 6, 6)), (Turned, (5, 64))])
def test_a_weight_with_two_values_is_no_weight_of_8_bits(make, shape, tmp_path):
    torch.manual_seed(0)
    task = make_task(make(), (torch.randn(64, *shape),))
    net = net_of(task, tmp_path)
    assert {layer.kind for layer in net.layers} <= {"constant"}
    net = replace(net, layers=[layer for layer in net.layers if layer.kind != "constant"])
    feed = {"input": task.test[0][:9].numpy()}
    with torch.no_grad():
        wanted = task.model(task.test[0][:9]).numpy()
    (found,) = session_of(net.graph(everywhere(net, "static"))).run(None, feed)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_no_constant_takes_the_place_of_another():
    _, net = known("mlp")
    a, b, *_ = net.layers
    layers = [a, replace(b, name=a.name)]
    weights, biases = ({layer: part[old] for layer, old in zip(layers, (a, b), strict=True)}
                       for part in (net.weights, net.biases))  # fmt: skip
    with pytest.raises(ValueError, match=f"two constants .* {a.name}:w"):
        int8.int8_graph(net.model, dict.fromkeys(layers, "static"), net.ranges, weights, biases)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("kind", ["gemm", "conv"])
def test_a_row_of_zero_or_tiny_weights_keeps_its_bias(kind, few, tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(12, 5) if kind == "gemm" else nn.Conv2d(6, 5, 3)
    with torch.no_grad():
        if few:
            layer.weight.copy_((layer.weight / layer.weight.std()).round().clamp(-1, 1) * 0.5)
        layer.weight[0] = 0.0
        layer.weight[1] *= 1e-9
        layer.weight[2] = 0.0
        layer.weight[3] *= 1e-3
        layer.bias.copy_(torch.tensor([5.0, 3.0, 0.0, -7.0, 0.5]))
        if few:
            layer.bias[0] = 0.003  # smaller than a step of the input
    task = make_task(layer, (torch.randn(64, 12) if kind == "gemm" else torch.randn(64, 6, 5, 5),))
    net = net_of(task, tmp_path)
    (found,) = session_of(net.graph(everywhere(net, "static"))).run(None, {"input": task.test[0].numpy()})
    with torch.no_grad():
        wanted = layer(task.test[0]).numpy()
    error = np.abs(found - wanted).reshape(len(wanted), 5, -1).max((0, 2))
    step = np.ptp(wanted) / 255 if kind == "conv" else 1e-4  # that of what a convolution gives
    assert (error[:3] <= step).all()
    assert (error <= 0.02 * np.ptp(wanted)).all()


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("row", "step"),
    [([0, 0.5, -1.5, 3.5], 0.5), ([0.0, 0.0], 1.0), ([3.0, -3.0], 3.0), ([0.1, 12.7], 0.1), ([0.1, 12.8], 0.0),
     ([1.0, 2**0.5, 3**0.5], 0.0)],
)  # fmt: skip
def test_a_grid_is_found(row, step):
    assert int8_weights.step_of(np.array(row, np.float32), 127) == pytest.approx(step, rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (8, 40), (5, 1, 3, 3)])
def test_no_two_neighbours_overflow(shape):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    found = int8_weights.rounded(weight, 0, alone=False)
    orders = [found.levels, np.moveaxis(found.levels, 1, -1)]
    for order, row in itertools.product(orders, range(shape[0])):
        flat = order[row].reshape(-1).astype(int)
        for a, b in itertools.pairwise(flat):
            for x, y in ((255, 255), (255, 0), (0, 255)):
                assert -(2**15) <= x * a + y * b < 2**15
    scale = np.abs(weight.reshape(shape[0], -1)).max(1) / 64  # what seven bits without that care give
    flat = weight.reshape(shape[0], -1)
    seven = np.rint(flat / scale[:, None]) * scale[:, None]
    assert np.square(found.values() - weight).sum() <= np.square(seven - flat).sum()


def test_a_grid_is_kept_to_the_bit_level():
    rng = np.random.default_rng(1)
    levels = rng.integers(-7, 8, (12, 30))
    scales = rng.uniform(0.01, 1, 12).astype(np.float32)
    weight = levels.astype(np.float32) * scales[:, None]
    found = int8_weights.rounded(weight, 0, alone=False)
    assert found.exact
    np.testing.assert_allclose(found.values(), weight, rtol=1e-6)
    assert (np.abs(found.levels) <= 7).all()


def test_a_table_has_the_step_of_least_error_and_a_lone_outlier_is_cut_off():
    rng = np.random.default_rng(2)
    table = rng.uniform(-0.95, 0.95, (80_000, 3)).astype(np.float32)
    table[0] = 1.2  # its error of 0.18^2 weighs less than what the others gain from a step of 0.85: 2e-6 each
    found = int8_weights.rounded(table, 1, alone=True)
    step = np.abs(table).max(0) / 127
    plain = np.rint(table / step) * step
    assert (np.square(found.values() - table).sum(0) < np.square(plain - table).sum(0) - 0.1).all()


# ---------------------------------------------------------------------- ranges


def seen_of(values):
    return int8_calibrate.Seen([values.reshape(-1)], values, {}, {})


def test_the_range_of_evenly_spread_values_is_all_of_them():
    values = np.linspace(0, 2.55, 10001, dtype=np.float32).reshape(1, -1)
    grid = int8_calibrate.chosen_range(seen_of(values), [])
    assert (grid.scale, grid.zero_point) == (pytest.approx(0.01, rel=2e-3), 0)


def test_a_lone_outlier_is_cut_off():
    """The error of uniform rounding is step^2 / 12 for each value, of clipping (12 - top)^2 for one."""
    rng = np.random.default_rng(0)
    values = np.append(rng.uniform(0, 1, 300_000), 12).astype(np.float32)
    sample = torch.from_numpy(values).double()
    grid = int8_calibrate.chosen_range(seen_of(values), [])
    found = float((grid(sample) - sample).square().mean())
    whole = (12 / 255) ** 2 / 12
    assert found < 0.9 * whole
    assert grid.scale < 0.9 * 12 / 255


def test_the_artifacts_own_ranges_are_used(tmp_path):
    task = task_of("mlp")
    grids = {"0": Grid(8, 0.03, 110), "2": Grid(8, 0.017, 0), "4": Grid(4, 0.2, 0)}
    for name, grid in grids.items():
        attach(task.model, name, grid)
    net = net_of(task, tmp_path)
    found = {layer.name: net.ranges[layer.sources[0]] for layer in net.layers}
    assert [(g.bits, g.scale, g.zero_point) for g in found.values()] == [
        (8, pytest.approx(grid.scale), grid.zero_point) for grid in grids.values()
    ]
    model = net.graph(everywhere(net, "static"))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Round") == 1  # of four bits: its levels are among those of 8, but values beyond are not cut off
    inputs = task.test[0][:50]
    (ours,) = session_of(model).run(None, {"input": inputs.numpy()})
    with torch.no_grad():
        wanted = task.model(inputs).numpy()
    assert np.abs(ours - wanted).mean() < 0.03 * np.abs(wanted).max()


def test_test_data_calibrates_nothing(tmp_path):
    task, net = known("mlp")
    other = net_of(replace(task, test=(1000 * task.test[0], task.test[1])), tmp_path)
    assert other.ranges == net.ranges


class Pooled(nn.Module):
    """Ranges after a sum, behind a pool, and twice on one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Linear(8 * 9, 6), nn.Linear(8 * 9, 6)

    def forward(self, x):
        x = self.a(x).relu()
        x = F.max_pool2d((x + self.b(x)).relu(), 2).flatten(1)
        return self.c(x) + self.d(x).relu()


NARROW = {
    "mlp": (mlp, {"0": Grid(8, 0.004, 120), "2": Grid(8, 0.0007, 0), "4": Grid(8, 0.0003, 0)}),
    "pooled": (Pooled, {"a": Grid(8, 0.005, 100), **dict.fromkeys("bcd", Grid(8, 0.001, 0))}),
    "two": (Pooled, {"c": Grid(8, 0.001, 0), "d": Grid(8, 0.0005, 0)}),
}  # fmt: skip


def narrow(name, tmp_path):
    """A task of which the layers' own ranges are much narrower than the inputs, and its net."""
    torch.manual_seed(3)
    make, grids = NARROW[name]
    task = make_task(make(), (torch.randn(96, 40) if make is mlp else torch.randn(96, 3, 8, 8),))
    for path, grid in grids.items():
        attach(task.model, path, grid)
    return task, net_of(task, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["static", "dynamic", "weights", "float32", "mixed"])
@pytest.mark.parametrize("name", NARROW)
def test_the_artifacts_own_ranges_clip_in_every_form(name, form, tmp_path):
    task, net = narrow(name, tmp_path)
    forms = {}
    for k, layer in enumerate(net.layers):
        given = ("dynamic", "static", "float32")[k % 3] if form == "mixed" else form
        given = "static" if given == "dynamic" and layer.kind in ("conv", "add") else given
        forms[layer] = "float32" if given == "weights" and layer.kind == "add" else given
    made = deploy_onnx.inserted(*net.final(forms, small=False))
    (found,) = session_of(made).run(None, {"input": task.test[0].numpy()})
    with torch.no_grad():
        wanted = task.model(task.test[0]).numpy()
    assert np.abs(found - wanted).max() <= (0.01 if form == "float32" else 0.03) * np.abs(wanted).max()


@pytest.mark.parametrize(("name", "pairs"), [("mlp", 3), ("pooled", 10)])
def test_static_layers_need_no_nodes_for_ranges(name, pairs, tmp_path):
    """One pair for each 8-bit tensor: of "pooled" the input, what a, b, c, d, two sums, pool and flattening give, and
    what a gives in b's range.
    """
    _, net = narrow(name, tmp_path)
    kinds = [node.op_type for node in net.graph(everywhere(net, "static")).graph.node]
    assert "Round" not in kinds
    assert kinds.count("QuantizeLinear") == pairs


@pytest.mark.parametrize("other", [False, True])
def test_a_range_with_other_readers_is_none_of_what_goes_into_it(other, tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x).relu()
            return x + self.a(x) if other else self.a(x)

    torch.manual_seed(0)
    task = make_task(Both(), (torch.randn(64, 8),))
    attach(task.model, "a", Grid(8, 0.0005, 0))
    net = net_of(task, tmp_path)
    fixed = own_ranges(net.model)
    first, second = [layer for layer in net.layers if layer.kind == "gemm"]
    assert set(fixed) == ({second.sources[0]} if other else {second.sources[0], first.result})
    assert fixed[second.sources[0]] == Grid(8, pytest.approx(0.0005), 0)
    with torch.no_grad():
        wanted = task.model(task.test[0]).numpy()
    for form in ("static", "dynamic", "float32"):
        forms = {layer: "float32" if layer.kind == "add" and form != "static" else form for layer in net.layers}
        (found,) = session_of(net.graph(forms)).run(None, {"input": task.test[0].numpy()})
        assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_the_corrected_bias_keeps_the_mean():
    _, net = known("mlp")
    layer = net.layers[0]
    x = np.concatenate([call["input"] for call in net.calls]).astype(np.float64)
    rounded = x @ net.weights[layer].values() + net.biases[layer]
    np.testing.assert_allclose(rounded.mean(0), (x @ layer.values + layer.bias).mean(0), atol=1e-5)


@pytest.mark.parametrize("padding", [0, (2, 1)])
def test_a_grouped_strided_convolution_is_computed_and_corrected_as_torch_does(padding, tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, stride=(2, 1), padding=padding, dilation=(1, 2), groups=2)
    task = make_task(conv, (torch.randn(64, 6, 11, 9) + torch.arange(6.0).view(6, 1, 1),))
    net = net_of(task, tmp_path)
    (layer,) = net.layers
    x = task.test[0]
    with torch.no_grad():
        wanted = conv(x) - conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(int8_calibrate.outputs_of(layer, x), wanted, rtol=1e-5, atol=1e-5)
    # of inputs alike at all places the mean outputs are kept exactly, but where padding is read
    means = torch.arange(1.0, 7).view(1, 6, 1, 1).expand(4, 6, 11, 9).contiguous()
    flat = int8_calibrate.Seen([], means.numpy(), {1: 4 * 99 * np.arange(1.0, 7)}, {1: 4 * 99})
    weight = int8_weights.rounded(layer.values + 0.3 * np.sign(layer.values), 0, alone=False)
    bias = int8_calibrate.corrected_bias(layer, weight, flat)
    with torch.no_grad():
        exact = conv(means)
        conv.weight.copy_(torch.from_numpy(weight.values()))
        conv.bias.copy_(torch.from_numpy(bias))
        found = conv(means)
    inner = (..., 3, 3)
    torch.testing.assert_close(found[inner], exact[inner], rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().max() > 0.1 or padding == 0  # padding is not those means


# ---------------------------------------------------------------------- the choice


def fake(seconds):
    """A timer of plans whose call takes the sum of its groups' seconds by form."""
    return lambda plans: [1.0 + sum(seconds[k][form] for k, form in enumerate(plan)) for plan in plans]


STARTS = [{"": "static"}, {"": "dynamic"}, {"": "weights"}]


def test_layers_take_the_fastest_form_and_the_smallest_of_equals():
    groups = [Group(name, {"static": 10, "weights": 12, "dynamic": 10}) for name in "abc"]
    groups.append(Group("d", {"static": 10, "weights": 4}))
    seconds = [
        {"static": 0.5, "weights": 0.1, "dynamic": 0.4},  # slower in 8 bits
        {"static": 0.1, "weights": 0.5, "dynamic": 0.3},
        {"static": 0.3, "weights": 0.5, "dynamic": 0.1},
        {"static": 0.1, "weights": 0.101},  # equal: the smaller
    ]
    found = chosen(groups, STARTS, fake(seconds), beside=lambda plan: 10_000)
    assert [choice.form for choice in found] == ["weights", "static", "dynamic", "weights"]
    assert [choice.because for choice in found] == ["fastest"] * 3 + ["smallest, or most exact, of the equally fast"]
    assert set(found[0].seconds) == {"static", "weights", "dynamic"}


@pytest.mark.parametrize(("beside", "form"), [(0, "weights"), (100_000, "float32")])
def test_bytes_count_as_a_share_of_the_file(beside, form):
    groups = [Group("table", {"float32": 400, "weights": 100})]
    found = chosen(
        groups, STARTS, lambda plans: [1.0 if p == ("float32",) else 1.2 for p in plans], beside=lambda plan: beside
    )
    assert found[0].form == form
    assert found[0].because == ("fastest" if beside else "smaller by more than it is slower")


def test_neighbours_are_told_from_the_whole_call():
    """Two layers are fast in 8 bits only together: one alone has to change to and fro."""
    groups = [Group(name, {"static": 1, "weights": 1}) for name in "ab"]
    cost = {("static", "static"): 1.0, ("weights", "weights"): 2.0}
    found = chosen(groups, STARTS, lambda plans: [cost.get(plan, 3.0) for plan in plans], beside=lambda plan: 0)
    assert [choice.form for choice in found] == ["static", "static"]


@pytest.mark.parametrize(("slow", "form"), [("static", "weights"), ("weights", "static")])
def test_a_measured_file_follows_the_timer(tmp_path, monkeypatch, slow, form):
    task = task_of("residual")
    artifact = compressed(task, LayerPlan(), tmp_path)

    def time(_, plans):
        return [1.0 + sum(f == slow for f in plan) for plan in plans]

    monkeypatch.setattr(int8.Timer, "__call__", time)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", 0.2)  # of 96 noisy examples
    manifest = export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    forms = {name: found["form"] for name, found in manifest["layers"].items() if name.endswith("weight")}
    assert forms["stem.weight"] == forms["body.weight"] == form
    kinds = operations(onnx.load(tmp_path / "out" / manifest["file"]), tmp_path)
    assert kinds.count("QLinearConv") == (3 if form == "static" else 0)


# ---------------------------------------------------------------------- files


def test_the_manifest_tells_the_truth(tmp_path):
    task = task_of("words")
    artifact = compressed(task, LayerPlan(), tmp_path)
    out = tmp_path / "out"
    manifest = export(artifact, task, "onnx-int8", out, FACTS)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    file = out / manifest["file"]
    assert file.stat().st_size == manifest["size_bytes"]
    told = manifest["verification"]
    session = session_of(file)
    outputs = torch.from_numpy(session.run(None, {"input": task.test[0].numpy()})[0])
    assert told["metric_exported"] == task.metric(outputs, task.test[1])
    assert told["metric_difference"] == told["metric_exported"] - told["metric_artifact"]
    assert told["max_abs_difference"] > 0
    assert {"rows.weight", "up.weight", "down.weight", "head.weight"} <= set(manifest["layers"])
    for size in (1, 3, 50):
        assert session.run(None, {"input": task.test[0][:size].numpy()})[0].shape == (size, 5)
    assert str(tmp_path).encode() not in file.read_bytes()


def test_a_sparse_artifact_of_few_bits_keeps_its_levels_and_stays_small(tmp_path, monkeypatch):
    torch.manual_seed(0)
    task = make_task(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), (torch.randn(128, 64),))
    artifact = compressed(task, LayerPlan(bits=3, threshold=1.0, quantizer="uniform"), tmp_path)
    monkeypatch.setattr(int8.Timer, "__call__", lambda _, plans: [sum(f != "static" for f in p) for p in plans])
    monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.5)
    monkeypatch.setattr(int8, "quantized_metric_holds", lambda *_: True)  # one example of so few would be too much
    manifest = export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    layers = manifest["layers"]
    assert [found["form"] for found in layers.values()] == ["static"] * 2
    assert all(found["keeps_its_levels"] for found in layers.values())
    weights = sum(p.numel() for p in task.model.parameters() if p.dim() > 1)
    assert manifest["size_bytes"] < 0.5 * weights + 4000


@pytest.mark.parametrize(("size", "seconds", "worth"), [
    (0.25, 0.6, True), (0.25, 1.02, True), (1.3, 0.7, True), (1.3, 0.8, False), (1.001, 0.99, False), (1.0, 1.0, False),
    (0.9, 1.2, False), (1.0, 0.97, True),
])  # fmt: skip
def test_a_file_pays_by_bytes_or_by_time(size, seconds, worth):
    assert pays(size, seconds) is worth


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_that_saves_neither_is_that_of_onnx(kept, tmp_path, monkeypatch):
    """Of few bits a float32 file is smaller: 8 bits must win the time back."""
    torch.manual_seed(0)
    task = make_task(mlp(), (torch.randn(96, 40),))
    artifact = compressed(task, LayerPlan(bits=2, threshold=1.0), tmp_path)
    monkeypatch.setattr(int8.Timer, "__call__", lambda _, plans: [1.0 + sum(f != "static" for f in p) for p in plans])
    monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.2 if kept else 0.99)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", 0.2)  # of 96 noisy examples
    export(artifact, task, "onnx", tmp_path / "plain", FACTS)
    manifest = export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    plain, file = tmp_path / "plain" / "model.onnx", tmp_path / "out" / "model.int8.onnx"
    assert (file.read_bytes() == plain.read_bytes()) is not kept
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model.int8.onnx"]
    forms = {(found["form"], found["because"]) for found in manifest["layers"].values()}
    because = "fastest" if kept else "8 bits save neither time nor bytes in all"
    assert forms == {("static" if kept else "float32", because)}
    assert manifest["validation"]["metric"] == manifest["validation"]["metric_float32"] or kept
    assert "weight_forms" in manifest
    assert "same_graph_float32_bytes" not in manifest


def test_layers_that_harm_are_left_in_float32(tmp_path):
    """The metric is so strict that only the very weights will do."""
    torch.manual_seed(0)
    inputs = torch.randn(80, 40)
    model = mlp().eval()
    with torch.no_grad():
        targets = model(inputs)
    task = int8_task(model, (inputs, targets), lambda y, t: 1e6 * float((y - t).square().mean()))
    artifact = compressed(task, LayerPlan(), tmp_path)
    manifest = export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    assert {found["form"] for found in manifest["layers"].values()} == {"float32"}
    assert "fell too far" in next(iter(manifest["layers"].values()))["because"]
    assert manifest["verification"]["metric_exported"] < 0.01


def int8_task(model, data, metric):
    from autocompress.tasks.task import Task

    return Task(model, data, data, data, F.mse_loss, metric, "minimize")


def test_a_file_that_does_not_hold_leaves_nothing(tmp_path, monkeypatch):
    task = task_of("mlp")
    artifact = compressed(task, LayerPlan(), tmp_path)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", -2.0)
    with pytest.raises(ExportError, match="in 8 bits the metric"):
        export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- written again


def written(task, artifact, file, choosing):
    from autocompress.compress.artifact import load
    from autocompress.deploy.files import write_file

    recorder = Recorder(load(artifact, model=task.model), file.parent)
    recorder.run("one", recorder.named(task.test[0][:2]))
    return write_file("onnx-int8", artifact, recorder, file, task=task, choosing=choosing)


def unlike(monkeypatch):
    """A clock that says something else at each write."""
    drawn = np.random.default_rng(0)
    monkeypatch.setattr(int8.Timer, "_times", lambda _, sessions: list(1 + drawn.random(len(sessions))))


@pytest.mark.parametrize("pays_off", [True, False])
def test_what_was_decided_gives_the_same_file_whatever_the_clock_says(tmp_path, monkeypatch, pays_off):
    task = task_of("mlp")
    artifact = compressed(task, LayerPlan(bits=4), tmp_path)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", 0.3)  # of 96 noisy examples
    monkeypatch.setattr(int8, "pays", lambda size, seconds: pays_off)
    unlike(monkeypatch)
    first = written(task, artifact, tmp_path / "a.onnx", Choosing())
    decided = json.loads(json.dumps(decided_in(first)))
    assert decided["pays"] is pays_off
    monkeypatch.setattr(int8, "pays", lambda size, seconds: not pays_off)
    monkeypatch.setattr(int8, "chosen", None)  # the clock is not asked
    again = written(task, artifact, tmp_path / "b.onnx", Choosing(decided=decided))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (first["decided"]["by"], again["decided"]["by"]) == ("clock", "record")
    assert decided_in(again) == decided
    assert again["validation"] == first["validation"]
    assert {layer["because"] for layer in again["layers"].values()} == {"chosen when the trial was measured"}


@pytest.mark.parametrize("change", ["batch", "layer", "form", "metric"])
def test_what_was_decided_for_something_else_is_decided_anew(tmp_path, monkeypatch, change):
    task = task_of("mlp")
    artifact = compressed(task, LayerPlan(), tmp_path)
    monkeypatch.setattr(int8.Timer, "_times", lambda _, sessions: [1.0] * len(sessions))
    decided = decided_in(written(task, artifact, tmp_path / "a.onnx", Choosing()))
    name = next(iter(decided["forms"]))
    if change == "layer":
        decided["forms"]["other"] = decided["forms"].pop(name)
    elif change == "form":
        decided["forms"][name] = "sideways"
    elif change == "metric":
        monkeypatch.setattr(int8, "quantized_metric_holds", lambda *_: bool(asked.append(1)) or len(asked) > 1)
    asked = []
    given = Choosing(32 if change == "batch" else 1, decided)
    assert written(task, artifact, tmp_path / "b.onnx", given)["decided"]["by"] == "clock"


def test_the_clock_is_asked_once_about_nets_of_one_structure(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(int8.Timer, "_times", lambda _, sessions: asked.append(1) or [1.0] * len(sessions))
    monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.5)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", 0.3)
    task, other = task_of("mlp"), task_of("pair")
    answers = {}

    def asks(task, layer, batch=1):
        asked.clear()
        written(task, compressed(task, layer, tmp_path), tmp_path / "a.onnx", Choosing(batch, answers=answers))
        return len(asked)

    assert asks(task, LayerPlan()) > 2
    with torch.no_grad():
        task.model[0].weight += 0.1 * torch.randn(48, 40)
    assert asks(task, LayerPlan()) == 0  # other values
    assert asks(task, LayerPlan(), batch=8) > 2
    assert asks(other, LayerPlan()) > 2


@pytest.mark.parametrize("batch", [1, 5, 150])
def test_forms_are_timed_at_the_batch(batch):
    _, net = known("residual")
    _, members = int8.groups_of(net)
    example = int8.Timer(net, members, Choosing(batch)).example["input"]
    assert example.shape == (batch, 3, 9, 9)
    held = np.concatenate([call["input"] for call in net.calls])
    assert np.array_equal(example[:90], held[:90][:batch])
    if batch > len(held):
        assert np.array_equal(example[len(held) :], held[: batch - len(held)])


def test_layers_that_take_outputs_far_from_float32_go_back_though_the_metric_holds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    task = make_task(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), (torch.randn(128, 64),))
    artifact = compressed(task, LayerPlan(), tmp_path)
    monkeypatch.setattr(int8.Timer, "__call__", lambda _, plans: [sum(f != "static" for f in p) for p in plans])
    monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.5)
    monkeypatch.setattr(int8, "quantized_metric_holds", lambda *_: True)
    near = export(artifact, task, "onnx-int8", tmp_path / "near", FACTS)
    assert {found["form"] for found in near["layers"].values()} == {"static"}
    assert 0 < near["validation"]["distance"] < 0.05
    monkeypatch.setattr(int8, "FAR", near["validation"]["distance"] * 0.9)
    nearer = export(artifact, task, "onnx-int8", tmp_path / "nearer", FACTS)
    assert "the outputs were too far from float32's" in {found["because"] for found in nearer["layers"].values()}
    assert nearer["validation"]["distance"] <= int8.FAR


def test_a_distance_is_relative_to_the_spread_of_what_is_wanted():
    wanted = np.array([100.0, 101.0, 99.0, 100.0])
    assert int8.distance([wanted + 0.5], [wanted]) == pytest.approx(0.5 / np.sqrt(0.5))
    assert int8.distance([wanted, wanted + 1], [wanted, wanted]) == pytest.approx(1 / np.sqrt(0.5))
    assert int8.distance([np.full(3, 2.0)], [np.full(3, 2.0)]) == 0
    assert int8.distance([], []) == 0


def test_conversions_are_counted_where_forms_change():
    def count(name, form, sums):
        net = known(name)[1]
        forms = {x: sums if x.kind == "add" else form for x in net.layers}
        return int8.conversions(net.model, forms)

    assert count("residual", "weights", "float32") == 0
    assert count("residual", "weights", "static") == 2 + 1  # to 8 bits and back
    floating = count("residual", "static", "float32")
    assert count("residual", "static", "static") == floating - 3  # between convolutions a sum saves them
    assert count("words", "dynamic", "static") == count("words", "dynamic", "float32") + 3


def test_a_sum_of_equal_time_has_the_form_that_needs_fewer_conversions(tmp_path, monkeypatch):
    for name, form in (("residual", "static"), ("words", "float32")):
        task, net = known(name)
        slow = "weights" if name == "residual" else "static"
        monkeypatch.setattr(
            int8.Timer,
            "__call__",
            lambda self, plans, slow=slow: [
                1 + sum(f == slow for f, part in zip(p, self.members, strict=True) if part[0].kind != "add")
                for p in plans
            ],
        )
        monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.5)
        monkeypatch.setattr(int8, "quantized_metric_holds", lambda *_: True)
        monkeypatch.setattr(int8, "FAR", 9.0)
        validation = SimpleNamespace(metric=lambda _: 1.0, task=task)
        decided = int8.measured(net, Choosing(), validation, task.model, tmp_path)
        assert [decided.forms[x] for x in net.layers if x.kind == "add"] == [form]
