"""Multiply-accumulates, counted in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx

from autocompress.errors import ExportError

_PLACES = {
    "Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "Gemm": (0, 1), "MatMul": (0, 1),
    "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3),
}  # fmt: skip
"""By operator the places of its factors among its inputs."""
_OTHERS = {"ConvTranspose", "DeformConv", "Einsum", "LSTM", "GRU", "RNN", "Attention", "LinearAttention"}
"""Operators that multiply as well and are not counted."""

Shapes = Mapping[str, tuple[int, ...]]


def macs(model: onnx.ModelProto, lengths: Mapping[str, int] | None = None) -> int:
    """The multiply-accumulates of one example in the graph's convolutions and matrix products.

    The first axis of each input counts one example; `lengths` are those of other free dimensions, by name. Raises
    ExportError where a shape cannot be inferred, or for an operator that multiplies in a way that has no rule here.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*model.graph.input, *model.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0:
                dim.dim_value = 1
            elif dim.dim_param in (lengths or {}):
                dim.dim_value = (lengths or {})[dim.dim_param]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return sum(_macs_of(node, shapes) for node in graph.node)


def _macs_of(node: Any, shapes: Shapes) -> int:
    if node.domain not in ("", "ai.onnx") or node.op_type in _OTHERS:
        raise ExportError(f"the multiply-accumulates of a {node.op_type} are not known")
    if node.op_type not in _PLACES:
        return 0
    names = (*(node.input[place] for place in _PLACES[node.op_type]), node.output[0])
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ExportError(f"the shape of {unknown[0]!r}, at a {node.op_type}, cannot be inferred")
    left, right, result = (shapes[name] for name in names)
    if "Conv" in node.op_type:
        return math.prod(result) * math.prod(right[1:])
    flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(result) * (left[0] if flipped else left[-1])
