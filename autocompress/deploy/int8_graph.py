"""A float32 ONNX graph with some of its layers in 8 bits, laid out so that onnxruntime fuses each to one operation.

static    x -> QuantizeLinear -> DequantizeLinear -> Conv, Gemm or MatMul of dequantized weights -> ReLU -> the same
          again: every 8-bit tensor is wrapped in such a pair, and onnxruntime joins what stands between two of them.
dynamic   x -> DynamicQuantizeLinear -> MatMulInteger -> times the scales -> plus the bias
          an LSTM as onnxruntime's DynamicQuantizeLSTM
A lookup of rows takes them from an INT8 table and multiplies them with the scales of its columns.

Weights of products are stored as (inputs, outputs), never transposed, since otherwise nothing is fused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.compress.ranges import Grid
from autocompress.deploy.int8_layers import (
    CARRIERS,
    Forms,
    Graph,
    Layer,
    first_output,
    own_ranges,
    range_nodes,
    without_dead_ends,
)
from autocompress.deploy.int8_weights import Rounded

Array = NDArray[Any]

_MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operations, which every build of it has."""
_ALIGNED = 4
"""Onnxruntime convolves inputs of a multiple of so many channels without copying them place by place first."""


def int8_graph(
    model: Any,
    forms: Forms,
    ranges: Mapping[str, Grid],
    weights: Mapping[Layer, Rounded],
    biases: Mapping[Layer, Array | None],
) -> Any:
    """A new model in which the layers compute as `forms` says; "float32" and "weights" leave their nodes as they are.

    `ranges` has those of the sources and results of layers, `weights` and `biases` what 8-bit layers take.
    """
    made = copy.deepcopy(model)
    build = _Build(model, forms, ranges, weights, biases)
    nodes = [new for node in model.graph.node for new in build.instead_of(node)]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in build.constants.items())
    without_dead_ends(made.graph)
    if any(node.domain == _MICROSOFT for node in nodes):
        made.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    return made


class _Tensors:
    """Which tensors are kept in 8 bits, and what stands for those that the artifact's own ranges of 8 bits give.

    `made`: by tensor that its maker keeps in 8 bits its range. `own`: by tensor that a range gives what goes into it,
    and the range. `same`: by such a tensor another of the same values: what goes into the range, where that is kept in
    8 bits with it, else what the first such range gives.
    """

    def __init__(self, model: Any, forms: Forms, ranges: Mapping[str, Grid]) -> None:
        graph, fixed = Graph(model.graph), own_ranges(model)
        nodes = model.graph.node
        self.own = {given: pair for given, pair in range_nodes(graph).items() if pair[1].bits == 8}
        static = [layer for layer, form in forms.items() if form == "static" and layer.kind != "table"]
        wanted = {source for layer in static for source in layer.sources}
        for node in reversed(nodes):
            if node.op_type in CARRIERS and set(node.output) & wanted:
                wanted.add(node.input[0])
            source, grid = self.own.get(node.output[0], ("", None))
            if node.output[0] in wanted and grid is not None and fixed.get(source) == grid:
                wanted.add(source)
        self.made = {
            layer.result: ranges[layer.result]
            for layer in static
            if layer.kind in ("conv", "add") or (layer.result in wanted and layer.result not in graph.outputs)
        }
        self.same: dict[str, str] = {}
        first: dict[tuple[str, Grid], str] = {}
        for node in nodes:
            given = node.output[0]
            if node.op_type in CARRIERS and given in wanted and len(node.output) == 1:
                source = self.of(node.input[0])
                if source in self.made:
                    self.made[given] = self.made[source]
            elif given in self.own:
                source, grid = self.of(self.own[given][0]), self.own[given][1]
                kept = self.made.get(source) == grid
                self.same[given] = source if kept else first.setdefault((source, grid), given)

    def of(self, name: str) -> str:
        """The tensor to read for that one."""
        return self.same.get(name, name)


class _Build:
    """Nodes in the place of nodes, and the constants that they need."""

    def __init__(
        self,
        model: Any,
        forms: Forms,
        ranges: Mapping[str, Grid],
        weights: Mapping[Layer, Rounded],
        biases: Mapping[Layer, Array | None],
    ) -> None:
        self.weights, self.biases, self.ranges = weights, biases, ranges
        self.first: dict[str, Layer] = {}
        self.covered: set[str] = set()
        for layer, form in forms.items():
            if form in ("static", "dynamic"):
                self.first[first_output(layer.nodes[0])] = layer
                self.covered |= {name for node in layer.nodes for name in node.output}
        self.forms = forms
        self.tensors = _Tensors(model, forms, ranges)
        self.made = self.tensors.made
        self.constants: dict[str, Array] = {}
        self.done: set[str] = set()
        self.nodes: list[Any] = []

    def instead_of(self, node: Any) -> list[Any]:
        """What stands in the place of a node of the float32 graph."""
        self.nodes = []
        layer = self.first.get(first_output(node))
        if layer is not None:
            rules = {"table": self._table, "add": self._add, "recurrent": self._lstm}
            rule = rules.get(layer.kind, self._product)
            rule(layer)
        elif not set(node.output) <= self.covered:
            new = copy.deepcopy(node)
            new.input[:] = [self.tensors.of(name) for name in node.input]
            if node.output[0] in self.made:
                new.output[0] = f"{node.output[0]}:f"
            self.nodes.append(new)
            self._close(node.output[0])
        return self.nodes

    def _emit(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, array: Array) -> str:
        """The name, under which there is no other array."""
        if not np.array_equal(self.constants.setdefault(name, array), array):
            raise ValueError(f"two constants would have the name {name}")
        return name

    def _ending(self, name: str) -> str:
        """The name that the float32 tensor gets before it becomes one of 8 bits."""
        return f"{name}:f" if name in self.made else name

    def _close(self, name: str) -> None:
        """Put the pair after a tensor that is kept in 8 bits."""
        if name in self.made:
            self._pair(f"{name}:f", name, self.made[name])

    def _pair(self, source: str, result: str, grid: Grid) -> None:
        scale = self._constant(f":scale_{grid.scale!r}", np.array(grid.scale, np.float32))
        zero = self._constant(f":zero_{grid.zero_point}", np.array(grid.zero_point, np.uint8))
        self._emit("QuantizeLinear", [source, scale, zero], f"{result}:q")
        self._emit("DequantizeLinear", [f"{result}:q", scale, zero], result)

    def _read(self, name: str) -> tuple[str, Grid]:
        """The 8-bit view of a tensor, and its range; quantizing does what the artifact's own range of 8 bits does."""
        name = self.tensors.of(name)
        if name in self.made:
            return name, self.made[name]
        source, grid = self.tensors.own.get(name) or (name, self.ranges[name])
        if name not in self.done:
            self.done.add(name)
            self._pair(self.tensors.of(source), f"{name}:8", grid)
        return f"{name}:8", grid

    def _product(self, layer: Layer) -> None:
        end = self._ending(layer.result)
        before = end if layer.activation is None else f"{end}:a"
        if self.forms[layer] == "dynamic":
            self._dynamic(layer, before)
        else:
            self._static(layer, before)
        if layer.activation is not None:
            activation = copy.deepcopy(layer.activation)
            activation.input[0], activation.output[0] = before, end
            self.nodes.append(activation)
        self._close(layer.result)

    def _static(self, layer: Layer, end: str) -> None:
        weight, bias = self.weights[layer], self.biases[layer]
        source, grid = self._read(layer.sources[0])
        name, label = layer.nodes[0].output[0], layer.name
        if bias is not None and layer.kind != "matmul":
            fitting = weight.holding(bias, grid.scale)
            if fitting is not weight:
                weight, label = fitting, f"{name}:own"
        levels = self._constant(f"{label}:w", weight.levels)
        scales = self._constant(f"{label}:s", weight.scales)
        given = [levels, scales]
        if layer.kind == "gemm":  # which is fused only where its zero points are there
            given.append(self._constant(f":zeros_{len(weight.scales)}", np.zeros(len(weight.scales), np.int8)))
        missing = self._missing(layer)
        if missing:
            source, given[0] = self._padded(source, grid, missing, levels, weight.levels.ndim)
        inputs = [source, self._emit("DequantizeLinear", given, f"{name}:w", axis=layer.axis)]
        if layer.kind == "matmul":
            self._biased(layer, "MatMul", inputs, end)
            return
        if bias is not None:
            steps = (weight.scales * np.float32(grid.scale)).astype(np.float32)
            whole = np.rint(bias / steps.astype(np.float64)).astype(np.int32)
            ints, steps_name = self._constant(f"{name}:b", whole), self._constant(f"{name}:t", steps)
            inputs.append(self._emit("DequantizeLinear", [ints, steps_name], f"{name}:d", axis=0))
        attributes = layer.attributes if layer.kind == "conv" else {}
        self._emit("Conv" if layer.kind == "conv" else "Gemm", inputs, end, **attributes)

    def _missing(self, layer: Layer) -> int:
        """Channels to be added to a convolution's input, where it comes from outside: what has them is faster."""
        if (
            layer.kind != "conv"
            or layer.attributes.get("group", 1) != 1
            or self.tensors.of(layer.sources[0]) in self.made
        ):
            return 0
        channels = layer.values.shape[1]
        missing = -channels % _ALIGNED
        return missing if missing * 3 <= channels else 0

    def _padded(self, source: str, grid: Grid, missing: int, levels: str, rank: int) -> tuple[str, str]:
        """An 8-bit tensor and the levels that meet it, with so many more channels of zeros."""
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + 1] = missing
        name = self._constant(f":pads_{rank}_{missing}", pads)
        scale = self._constant(f":scale_{grid.scale!r}", np.array(grid.scale, np.float32))
        zero = self._constant(f":zero_{grid.zero_point}", np.array(grid.zero_point, np.uint8))
        if f"{source}:wide" not in self.done:
            self.done.add(f"{source}:wide")
            self._emit("Pad", [f"{source}:q", name, zero], f"{source}:wide:q")
            self._emit("DequantizeLinear", [f"{source}:wide:q", scale, zero], f"{source}:wide")
        if f"{levels}:wide" not in self.done:
            self.done.add(f"{levels}:wide")
            self._emit("Pad", [levels, name], f"{levels}:wide")
        return f"{source}:wide", f"{levels}:wide"

    def _biased(self, layer: Layer, kind: str, inputs: Sequence[str], end: str, **attributes: Any) -> None:
        """An operation and the bias."""
        bias = self.biases[layer]
        if bias is None:
            self._emit(kind, inputs, end, **attributes)
            return
        self._emit(kind, inputs, f"{end}:p", **attributes)
        self._emit("Add", [f"{end}:p", self._constant(f"{layer.result}:b", bias)], end)

    def _dynamic(self, layer: Layer, end: str) -> None:
        weight, source = self.weights[layer], self.tensors.of(layer.sources[0])
        q, s, z = f"{source}:dq", f"{source}:ds", f"{source}:dz"
        if q not in self.done:
            self.done.add(q)
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [source], [q, s, z]))
        levels = self._constant(f"{layer.name}:w", weight.levels)
        scales = self._constant(f"{layer.name}:s", weight.scales)
        name = layer.nodes[0].output[0]
        self._emit("MatMulInteger", [q, levels, z], f"{name}:i")
        self._emit("Cast", [f"{name}:i"], f"{name}:c", to=onnx.TensorProto.FLOAT)
        self._emit("Mul", [s, scales], f"{name}:m")
        self._biased(layer, "Mul", [f"{name}:c", f"{name}:m"], end)

    def _lstm(self, layer: Layer) -> None:
        """W and R go as (directions, inputs, gates' outputs), with a scale and a zero point per output.

        Of zero points per direction onnxruntime would read beyond the end.
        """
        (node,) = layer.nodes
        given = {name: value for name, value in layer.attributes.items() if name != "layout"}
        inputs = [self.tensors.of(name) for name in node.input]
        inputs += [""] * (8 - len(inputs))
        for place, part in enumerate(layer.weights, 1):
            weight = self.weights[part]
            turned = np.ascontiguousarray(np.swapaxes(weight.levels, 1, 2))
            scales = weight.scales.reshape(weight.levels.shape[:2])
            inputs[place] = self._constant(f"{part.name}:w", turned)
            inputs += [
                self._constant(f"{part.name}:s", scales),
                self._constant(f":zeros_{scales.shape}", np.zeros(scales.shape, np.int8)),
            ]
        self.nodes.append(
            helper.make_node("DynamicQuantizeLSTM", inputs, list(node.output), domain=_MICROSOFT, **given)
        )

    def _table(self, layer: Layer) -> None:
        weight = self.weights[layer]
        levels = self._constant(f"{layer.name}:w", weight.levels)
        scales = self._constant(f"{layer.name}:s", weight.scales)
        self._emit("Gather", [levels, layer.sources[0]], f"{layer.result}:i")
        self._emit("Cast", [f"{layer.result}:i"], f"{layer.result}:c", to=onnx.TensorProto.FLOAT)
        self._emit("Mul", [f"{layer.result}:c", scales], layer.result)

    def _add(self, layer: Layer) -> None:
        end = self._ending(layer.result)
        inputs = [self._read(source)[0] for source in layer.sources]
        if layer.activation is None:
            self._emit("Add", inputs, end)
        else:
            self._emit("Add", inputs, f"{end}:a")
            self._emit("Relu", [f"{end}:a"], end)
        self._close(layer.result)
