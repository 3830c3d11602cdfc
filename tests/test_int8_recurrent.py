"""LSTM, GRU and RNN in 8-bit ONNX files: each form beside the float32 graph in onnxruntime."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_deploy import FACTS, compressed, make_task
from torch import nn

from autocompress.deploy import int8, verify
from autocompress.deploy import onnx as deploy_onnx
from autocompress.deploy.export import export
from autocompress.deploy.int8_graph import int8_graph
from autocompress.deploy.int8_layers import layers_of
from autocompress.deploy.int8_recurrent import joined
from autocompress.deploy.int8_weights import float_form, rounded
from autocompress.deploy.sessions import session_of
from autocompress.plan import LayerPlan


class Reader(nn.Module):
    """All outputs of a recurrent layer and its last states, of sequences of 7."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(12, 20, **options)
        self.head = nn.Linear(40 if options.get("bidirectional") else 20, 5)

    def forward(self, x):
        y, last = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        y = y if self.rnn.batch_first else y.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([self.head(y).flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


class Siamese(nn.Module):
    """One LSTM for two inputs."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(12, 20, batch_first=True)

    def forward(self, x):
        return torch.cat([self.rnn(x)[0][:, -1], self.rnn(x.flip(1) * 0.5)[0][:, -1]], 1)


class Tied(nn.Module):
    """The hidden weight of a GRU is also that of a product."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(12, 20, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0] @ self.rnn.weight_hh_l0.T


NETS = {
    "lstm": lambda: Reader("LSTM", batch_first=True),
    "deep": lambda: Reader("LSTM", batch_first=True, bidirectional=True, num_layers=2),
    "time first": lambda: Reader("LSTM", bidirectional=True, bias=False),
    "gru": lambda: Reader("GRU", batch_first=True, bidirectional=True, num_layers=2),
    "rnn": lambda: Reader("RNN", batch_first=True),
    "siamese": Siamese,
    "tied": Tied,
}


def task_of(name):
    torch.manual_seed(1)
    model = NETS[name]()
    return make_task(model, (torch.randn(40, 7, 12),))


@cache
def known(name):
    """The task, the model as torch's exporter gives it, and the net of which the recurrent layers are known."""
    task = task_of(name)
    model, exact = exported(task)
    made, forms = joined(model, exact)
    layers = [layer for layer in layers_of(made) if layer.kind == "recurrent"]
    return task, model, int8.Net(made, forms, layers, {}, {}, [])


def exported(task):
    return deploy_onnx.graph_of(task.model, {"input": task.test[0][:2]}, False, ["output"], whole=True)


def operations(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("name", "form", "kinds"),
    [
        ("lstm", "dynamic", {"DynamicQuantizeLSTM": 1, "LSTM": 0}),
        ("deep", "dynamic", {"DynamicQuantizeLSTM": 2, "LSTM": 0}),
        ("time first", "dynamic", {"DynamicQuantizeLSTM": 1, "LSTM": 0}),
        ("siamese", "dynamic", {"DynamicQuantizeLSTM": 2, "LSTM": 0}),
        ("lstm", "weights", {"LSTM": 1}),
        ("deep", "weights", {"LSTM": 2}),
        ("siamese", "weights", {"LSTM": 2}),
        ("gru", "weights", {"GRU": 2}),
    ],
)
def test_each_form_gives_nearly_what_float32_gives_in_a_quarter_of_the_bytes(name, form, kinds):
    task, plain, net = known(name)
    made = deploy_onnx.inserted(*net.final(dict.fromkeys(net.layers, form), small=True))
    onnx.checker.check_model(made, full_check=True)
    found_kinds = operations(made)
    assert {kind: found_kinds.count(kind) for kind in kinds} == kinds
    assert "Slice" not in {node.op_type for node in made.graph.node if "rnn." in "".join(node.input)}
    weights = sum(p.numel() for key, p in task.model.named_parameters() if "rnn.weight" in key)
    assert plain.ByteSize() - made.ByteSize() > 2.3 * weights
    one, other = session_of(plain), session_of(made)
    for count in (1, 3):
        feed = {"input": task.test[0][:count].numpy()}
        (wanted,), (found,) = one.run(None, feed), other.run(None, feed)
        assert found.shape == wanted.shape
        assert 0 < np.abs(found - wanted).max() < 0.04 * np.abs(wanted).max()


def test_all_directions_and_gates_keep_their_places():
    """Weights on a grid of 15 levels, each row of its own step, are exact: only inputs are rounded."""
    task = task_of("deep")
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in (p for key, p in task.model.named_parameters() if "rnn.weight" in key):
            steps = rng.uniform(0.01, 0.1, (len(weight), 1))
            levels = rng.integers(-7, 8, weight.shape)
            levels[:, 0] = 7
            weight.copy_(torch.from_numpy(levels * steps))
    made, _ = joined(exported(task)[0], {})
    layers = [layer for layer in layers_of(made) if layer.kind == "recurrent"]
    weights = {part: rounded(part.values, part.axis, alone=False) for layer in layers for part in layer.weights}
    assert all(weight.exact for weight in weights.values())
    for part, weight in weights.items():
        np.testing.assert_allclose(weight.values(), part.values, rtol=1e-5)
    feed = {"input": task.test[0].numpy()}
    (found,) = session_of(int8_graph(made, dict.fromkeys(layers, "dynamic"), {}, weights, {})).run(None, feed)
    with torch.no_grad():
        wanted = task.model(task.test[0]).numpy()
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max() + 0.01


@pytest.mark.parametrize("name", ["lstm", "deep", "gru", "siamese"])
def test_joined_weights_change_nothing(name):
    task, model, _ = known(name)
    before = model.SerializeToString()
    made, forms = joined(model, {})
    assert model.SerializeToString() == before
    assert forms == {}
    assert len(made.graph.node) < len(model.graph.node)
    shapes = {t.name: tuple(t.dims) for t in made.graph.initializer if len(t.dims) == 3}
    directions = 2 if name in ("deep", "gru") else 1
    assert shapes["rnn.weight_hh_l0"] == (directions, 60 if name == "gru" else 80, 20)
    assert len(shapes) == (2 if directions == 1 else 4)
    feed = {"input": task.test[0].numpy()}
    (found,), (wanted,) = (session_of(m).run(None, feed) for m in (made, model))
    np.testing.assert_array_equal(found, wanted)


def test_a_weight_that_something_else_reads_stays_where_it_is():
    _, model, net = known("tied")
    assert net.model is model
    assert not net.layers


def test_unrolled_steps_of_an_rnn_share_one_weight():
    """torch's exporter makes products of nn.RNN."""
    task, plain, _ = known("rnn")
    layers = [layer for layer in layers_of(plain) if layer.kind == "matmul"]
    weights = {layer: rounded(layer.values, layer.axis, alone=False) for layer in layers}
    biases = {layer: layer.bias for layer in layers}
    made = int8_graph(plain, dict.fromkeys(layers, "dynamic"), {}, weights, biases)
    hidden = [t for t in made.graph.initializer if list(t.dims) == [20, 20]]
    assert [tensor.data_type for tensor in hidden] == [TensorProto.INT8]
    feed = {"input": task.test[0][:3].numpy()}
    (found,), (wanted,) = (session_of(m).run(None, feed) for m in (made, plain))
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_an_operation_with_weights_of_its_own_is_a_layer(kind):
    """As other exporters write it, two directions, only the last states wanted."""
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(2, gates * 16, 8)).astype(np.float32) / 3,
        "r": rng.normal(size=(2, gates * 16, 16)).astype(np.float32) / 4,
    }
    node = helper.make_node(kind, ["x", "w", "r"], ["", "h"], hidden_size=16, direction="bidirectional")
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", "n", 8])],
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, "n", 16])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (layer,) = layers_of(joined(model, {})[0])
    assert (layer.kind, layer.dynamic, layer.result) == ("recurrent", kind == "LSTM", "h")
    weights = {part: rounded(part.values, part.axis, alone=False) for part in layer.weights}
    plain = {name: deploy_onnx.Form("plain", (), {name: array}) for name, array in arrays.items()}
    made = {"weights": deploy_onnx.inserted(
        model, {part.name: float_form(part.name, weights[part], plain[part.name]) for part in weights}
    )}  # fmt: skip
    if layer.dynamic:
        made["dynamic"] = int8_graph(model, {layer: "dynamic"}, {}, weights, {})
    for count in (1, 3):
        feed = {"x": rng.normal(size=(6, count, 8)).astype(np.float32)}
        (wanted,) = session_of(model).run(None, feed)
        for one in made.values():
            (found,) = session_of(one).run(None, feed)
            assert 0 < np.abs(found - wanted).max() < 0.03


def test_a_weight_of_few_values_keeps_its_exact_form():
    task = task_of("gru")
    with torch.no_grad():
        for parameter in task.model.rnn.parameters():
            parameter.copy_(0.25 * (parameter / parameter.std()).round().clamp(-1, 1) + 0.0)
    made, forms = joined(*exported(task))
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        (values,) = (numpy_helper.to_array(t) for t in made.graph.initializer if t.name == name)
        assert forms[name].kind == "dense"
        found = float_form(name, rounded(values, (0, 1), alone=True), forms[name])
        assert found is forms[name]


def test_a_weight_of_one_input_stays_float32():
    """A level and a scale would take more than the value."""
    values = np.random.default_rng(0).normal(size=(1, 80, 1)).astype(np.float32)
    plain = deploy_onnx.Form("plain", (), {"w": values})
    assert float_form("w", rounded(values, (0, 1), alone=True), plain) is plain


@pytest.mark.parametrize("form", ["dynamic", pytest.param("weights", marks=pytest.mark.slow)])
def test_a_file_follows_the_timer(form, tmp_path, monkeypatch):
    task = task_of("lstm")
    artifact = compressed(task, LayerPlan(), tmp_path)
    monkeypatch.setattr(int8.Timer, "__call__", lambda _, plans: [1.0 + sum(f != form for f in p) for p in plans])
    monkeypatch.setattr(int8.Timer, "over", lambda *_: 0.9)
    monkeypatch.setattr(verify, "QUANTIZED_METRIC_TOLERANCE", 0.2)  # of 40 noisy examples
    manifest = export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    assert manifest["layers"]["rnn.weight_ih_l0"]["form"] == form
    kinds = operations(onnx.load(tmp_path / "out" / manifest["file"]))
    assert ("DynamicQuantizeLSTM" in kinds) is (form == "dynamic")
    assert ("LSTM" in kinds) is (form == "weights")


def test_biases_of_a_recurrent_operation_are_not_rounded():
    """Those of both directions and sides are a constant of two axes, here of 4,096 elements."""
    rng = np.random.default_rng(0)
    arrays = {"w": (2, 1024, 3), "r": (2, 1024, 256), "b": (2, 2048)}
    held = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), name) for name, s in arrays.items()]
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=256, direction="bidirectional")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], held))
    assert [(layer.kind, layer.name) for layer in layers_of(model)] == [("recurrent", "w")]
