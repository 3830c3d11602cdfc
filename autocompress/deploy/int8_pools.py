"""Means over the plane of an image as the pooling that onnxruntime fuses in 8 bits, with the layout it is in.

A ReduceMean between layers of 8 bits costs a transposition and two conversions.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx
from onnx import helper, numpy_helper

_RANK = 4
_PLANE = {2, 3}


def pooled(model: Any) -> Any:
    """A new model in which each ReduceMean over height and width of (N, C, H, W) is a GlobalAveragePool."""
    made = copy.deepcopy(model)
    told = onnx.shape_inference.infer_shapes(model).graph
    every = (*told.value_info, *told.input)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in every}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    del made.graph.node[:]
    for node in model.graph.node:
        plane = node.op_type == "ReduceMean" and ranks.get(node.input[0]) == _RANK and _axes(node, held) == _PLANE
        made.graph.node.append(
            helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name)
            if plane and _attribute(node, "keepdims", 1)
            else node
        )
    return made


def _axes(node: Any, held: Any) -> set[int]:
    """Of a mean over four axes, not negative; none where they are not constant."""
    if len(node.input) > 1 and node.input[1] in held:
        given = numpy_helper.to_array(held[node.input[1]]).tolist()
    else:
        given = _attribute(node, "axes", [])
    return {axis % _RANK for axis in given}


def _attribute(node: Any, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
