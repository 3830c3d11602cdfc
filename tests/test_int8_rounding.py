"""Levels for the least output error, the moments behind them, and the ranges and layout beside them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper, shape_inference
from torch import nn

from autocompress.deploy.int8_calibrate import Seen, chosen_range, ranges_of, seen
from autocompress.deploy.int8_graph import int8_graph
from autocompress.deploy.int8_layers import layers_of
from autocompress.deploy.int8_rounding import met, moments, refined, swept
from autocompress.deploy.int8_weights import rounded, safe
from autocompress.deploy.sessions import session_of


def model_of(nodes, constants, shape):
    """A graph from x to y."""
    ends = [helper.make_tensor_value_info("x", 1, shape), helper.make_tensor_value_info("y", 1, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def conv_model(weight, shape, **attributes):
    return model_of([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": weight}, shape)


def correlated(rng, shape):
    """Smooth inputs: neighbours are alike, as in images and behind layers of few directions."""
    x = torch.from_numpy(rng.normal(size=shape)).float()
    return (F.avg_pool2d(x, 3, 1, 1) + x.mean(1, keepdim=True) + 0.5).numpy()


CONVS = [
    ({"pads": [1, 1, 1, 1]}, (8, 6, 3, 3)),
    ({"pads": [0, 1, 2, 0], "strides": [2, 1]}, (8, 6, 3, 2)),
    ({"dilations": [2, 1], "group": 3}, (9, 2, 2, 3)),
    ({"group": 6, "pads": [1, 1, 1, 1]}, (6, 1, 3, 3)),
]


@pytest.mark.parametrize(("attributes", "shape"), CONVS)
def test_what_rows_meet_times_the_weight_is_the_convolution(attributes, shape):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=shape).astype(np.float32), rng.normal(size=(2, 6, 7, 8)).astype(np.float32)
    model = conv_model(weight, ["n", 6, 7, 8], **attributes)
    (layer,) = layers_of(model)
    (wanted,) = session_of(model).run(None, {"x": x})
    groups = attributes.get("group", 1)
    rows = met(layer, torch.from_numpy(x))
    products = rows @ torch.from_numpy(weight).reshape(groups, -1, rows.shape[2]).mT
    found = products.permute(1, 0, 2).reshape(2, *wanted.shape[2:], -1).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_refined_levels_err_less_on_other_inputs_and_stay_safe(kind):
    rng = np.random.default_rng(1)
    if kind == "conv":
        weight = rng.normal(size=(12, 8, 3, 3)).astype(np.float32)
        model = conv_model(weight, ["n", 8, 9, 9], pads=[1, 1, 1, 1])
        batches = [correlated(rng, (16, 8, 9, 9)) for _ in range(3)]
    else:
        weight, mix = rng.normal(size=(48, 20)).astype(np.float32), rng.normal(size=(6, 48))
        model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, ["n", 48])
        batches = [
            (rng.normal(size=(64, 6)) @ mix + 0.1 * rng.normal(size=(64, 48))).astype(np.float32) for _ in range(3)
        ]
    (layer,) = layers_of(model)
    nearest = rounded(layer.values, layer.axis, alone=False)
    found = refined(model, {layer: nearest}, [{"x": batch} for batch in batches[:2]])[layer]

    def error(values):
        made = type(model).FromString(model.SerializeToString())
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
        outputs = [session_of(m).run(None, {"x": batches[2]})[0] for m in (made, model)]
        return np.square(outputs[0] - outputs[1]).mean()

    assert error(found.values()) < 0.6 * error(nearest.values())
    assert safe(found.levels if kind == "conv" else found.levels.T).all()
    assert np.abs(found.levels.astype(int)).max() <= 127
    assert found.levels.dtype == np.int8
    assert found.scales.dtype == np.float32


def test_levels_that_the_artifact_has_stay():
    weight = (np.random.default_rng(2).integers(-7, 8, (16, 5)) * 0.25).astype(np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, ["n", 16])
    (layer,) = layers_of(model)
    own = rounded(layer.values, layer.axis, alone=False)
    assert own.exact
    assert refined(model, {layer: own}, [{"x": np.ones((4, 16), np.float32)}])[layer] is own


def test_few_examples_tell_little_of_many_columns():
    """Of 16 examples of 64 columns, errors in all other directions would be free, and nearly three times as large."""
    rng = np.random.default_rng(3)
    weight, x = rng.normal(size=(64, 30)).astype(np.float32), rng.normal(size=(16, 64)).astype(np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, ["n", 64])
    (layer,) = layers_of(model)
    nearest = rounded(layer.values, layer.axis, alone=False)
    found = swept(layer, nearest, moments(model, [layer], [{"x": x}])[layer])
    lost = [np.square(weight - part.values()).mean() for part in (found, nearest)]
    assert lost[0] < 1.3 * lost[1]


def test_a_range_is_cut_below_where_relu_clips_the_sum():
    """What a sum makes negative whatever it is needs no levels."""
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(size=(64, 4, 8, 8)), rng.normal(size=(64, 4, 8, 8)) - 30]).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"]),
        helper.make_node("Abs", ["x"], ["b0"]),
        helper.make_node("Min", ["b0", "one"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    model = model_of(nodes, {"one": np.ones((), np.float32)}, ["n", 4, 8, 8])
    (layer,) = layers_of(model)
    found = seen(model, {"a": set(), "b": set(), "y": set()}, [{"x": x[::2]}, {"x": x[1::2]}])
    grid = ranges_of(found, [layer], {})["a"]
    assert -grid.zero_point * grid.scale > -12
    assert (255 - grid.zero_point) * grid.scale == pytest.approx(float(x.max()), rel=0.2)


def test_a_range_is_chosen_on_many_examples_where_they_are_small():
    """Of features of an example each a few values: a rare large one is not in the first sixteen."""
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 1, (256, 8)).astype(np.float32)
    x[200, 3] = 6
    weight = rng.normal(size=(8, 3)).astype(np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, ["n", 8])
    (layer,) = layers_of(model)
    found = seen(model, {"x": {-1}}, [{"x": part} for part in np.split(x, 8)])["x"]
    assert np.array_equal(found.first, x)
    grid = ranges_of({"x": found}, [layer], {})["x"]
    whole = torch.from_numpy(x)

    def error(tried):
        return float(((tried(whole) - whole) @ torch.from_numpy(weight)).square().mean())

    few = chosen_range(Seen(found.values, x[:16], {}, {}), [lambda part: part @ torch.from_numpy(weight)])
    assert error(grid) < 0.5 * error(few)


@pytest.mark.parametrize(("channels", "wide"), [(3, True), (7, True), (1, False), (4, False), (5, False)])
def test_a_first_convolution_reads_a_multiple_of_four_channels(channels, wide):
    """The outputs are those of the convolution as it is, also at the border, where zeros come in."""
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(16, channels, 3, 3)).astype(np.float32)
    x = (rng.uniform(0, 1, (2, channels, 6, 6)) - 0.3).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "b": np.ones(16, np.float32)}, ["n", channels, 6, 6])
    (layer,) = layers_of(model)
    tensors = seen(model, {"x": {1}, "r": set()}, [{"x": x}])
    given = rounded(layer.values, layer.axis, alone=False)
    made = int8_graph(model, {layer: "static"}, ranges_of(tensors, [layer], {}), {layer: given}, {layer: layer.bias})
    assert ("Pad" in [node.op_type for node in made.graph.node]) is wide
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in shape_inference.infer_shapes(made).graph.value_info
    }
    (conv,) = (node for node in made.graph.node if node.op_type == "Conv")
    read = -(-channels // 4) * 4 if wide else channels
    assert [shapes[name][1].dim_value for name in conv.input[:2]] == [read, read]
    (found,), (wanted,) = (session_of(m).run(None, {"x": x}) for m in (made, model))
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
    exact = nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(given.values()), torch.ones(16), padding=1)
    np.testing.assert_allclose(found, exact.relu().mean((2, 3), keepdim=True).numpy(), atol=0.01 * wanted.max())
