"""Means over an image's plane become poolings, and nothing else does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autocompress.deploy.int8_pools import pooled
from autocompress.deploy.sessions import session_of


def mean_of(shape, axes, keep, *, opset=18):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(
        "y", TensorProto.FLOAT, [None] * (len(shape) if keep else len(shape) - len(axes))
    )
    constants = [numpy_helper.from_array(np.array(axes, np.int64), "axes")]
    inputs, attributes = (["h", "axes"], {}) if opset >= 18 else (["h"], {"axes": axes})
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("ReduceMean", inputs, ["y"], keepdims=keep, **attributes),
    ]
    graph = helper.make_graph(nodes, "g", [value], [out], constants if opset >= 18 else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.mark.parametrize(
    ("shape", "axes", "keep", "opset", "wanted"),
    [
        (("n", 3, 5, 4), [2, 3], 1, 18, True),
        (("n", 3, 5, 4), [-1, -2], 1, 18, True),
        (("n", 3, 5, 4), [2, 3], 1, 13, True),
        (("n", 3, 5, 4), [2, 3], 0, 18, False),
        (("n", 3, 5, 4), [3], 1, 18, False),
        (("n", 3, 5, 4), [1, 2], 1, 18, False),
        (("n", 3, 2, 5, 4), [2, 3], 1, 18, False),
        (("n", 5, 4), [1, 2], 1, 18, False),
    ],
)
def test_a_mean_over_the_plane_is_a_pooling_of_the_same_outputs(shape, axes, keep, opset, wanted):
    model = mean_of(shape, axes, keep, opset=opset)
    before = model.SerializeToString()
    made = pooled(model)
    assert model.SerializeToString() == before
    assert [node.op_type for node in made.graph.node] == ["Relu", "GlobalAveragePool" if wanted else "ReduceMean"]
    onnx.checker.check_model(made)
    x = np.random.default_rng(0).normal(size=(2, *shape[1:])).astype(np.float32)
    found, expected = (session_of(m).run(None, {"x": x})[0] for m in (made, model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
