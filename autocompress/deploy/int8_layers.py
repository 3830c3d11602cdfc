"""The layers of a float32 ONNX graph that can compute with 8 bits, and the ranges that the artifact itself has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.compress.ranges import Grid

Array = NDArray[Any]

CARRIERS = frozenset(("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"))
"""Operations that move values and make none: their outputs have the ranges of their inputs."""
RECURRENT = ("LSTM", "GRU", "RNN")
"""Operations that read a weight for their inputs and one for their own last outputs."""
UNRANGED = frozenset(("table", "constant", "recurrent"))
"""Kinds of layers whose inputs need no range."""
SMALLEST = 4096
"""Of constants that no layer reads and that are rounded, elements."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Nodes of the graph that one 8-bit operation replaces.

    `kind`: "conv", "gemm", "matmul" (any rank), "table" (a lookup of rows), "add" (no weight, two sources),
    "recurrent" (LSTM, GRU or RNN), or "constant" (what other nodes read: it can be rounded, nothing more).
    `nodes`: the operation, then what follows it alone: bias, normalisation, ReLU. `values`: its weight with the
    normalisation in it, a convolution's (outputs, inputs, ...), another's (inputs, outputs); a table's (rows, width); a
    recurrent one's (directions, gates' outputs, inputs). `turned`: the graph has it as (outputs, inputs).
    `hidden`: of a recurrent layer the weight that meets its own last outputs, as a layer of its own without nodes.
    """

    kind: str
    name: str
    nodes: tuple[Any, ...]
    sources: tuple[str, ...]
    result: str
    values: Array = field(default_factory=lambda: np.empty(0, np.float32))
    bias: Array | None = None
    activation: Any = None
    turned: bool = False
    hidden: Layer | None = None

    @property
    def axis(self) -> int | tuple[int, ...]:
        """The axis of the outputs in `values`, or axes."""
        axes: dict[str, int | tuple[int, ...]] = {
            "conv": 0, "constant": self.values.ndim - 1, "recurrent": (0, 1)
        }  # fmt: skip
        return axes.get(self.kind, 1)

    @property
    def weights(self) -> tuple[Layer, ...]:
        """The layer, and the one of its hidden weight: each has one."""
        return (self,) if self.hidden is None else (self, self.hidden)

    @property
    def channels(self) -> int:
        """The axis of the channels in the source."""
        return 1 if self.kind == "conv" else -1

    @property
    def dynamic(self) -> bool:
        """Of a recurrent layer, whether onnxruntime has it in 8 bits: an LSTM whose time is the first axis."""
        return self.nodes[0].op_type == "LSTM" and not self.attributes.get("layout")

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Those of the operation."""
        return {a.name: helper.get_attribute_value(a) for node in self.nodes[:1] for a in node.attribute}


class Graph:
    """A graph's constants, and who makes and reads each tensor."""

    def __init__(self, graph: Any) -> None:
        self.proto = graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def next(self, name: str, *kinds: str) -> Any:
        """The one reader of a tensor, if it is of these kinds; else None."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs and readers[0].op_type in kinds else None

    def constant(self, node: Any, place: int) -> Array | None:
        """A node's input where it is a constant."""
        return self.constants.get(node.input[place]) if place < len(node.input) else None


def layers_of(model: Any) -> list[Layer]:
    """The layers in the graph's order, then constants, to which a weight that is read in several ways belongs.

    What a recurrent operation adds (biases of two axes) is none.
    """
    graph = Graph(model.graph)
    found = [layer for node in graph.proto.node if (layer := _layer(graph, node)) is not None]
    sharing: dict[str, list[Layer]] = {}
    for part in (part for layer in found for part in layer.weights):
        sharing.setdefault(part.name, []).append(part)
    alike = {name for name, same in sharing.items() if _alike(same) and len(same) == _reads(graph, name)}
    good = [layer for layer in found if layer.kind == "add" or {part.name for part in layer.weights} <= alike]
    taken = {part.name for layer in good for part in layer.weights}
    taken |= {name for node in graph.proto.node if node.op_type in RECURRENT for name in node.input[3:]}
    return good + [
        Layer("constant", name, (), (), name, array)
        for name, array in graph.constants.items()
        if _is_weight(array) and array.size >= SMALLEST and name not in taken
    ]


def _alike(layers: Sequence[Layer]) -> bool:
    """Whether layers read a weight in one way: as it is or turned, and with one normalisation in it."""
    first = layers[0]
    return all(
        (layer.kind, layer.turned) == (first.kind, first.turned) and np.array_equal(layer.values, first.values)
        for layer in layers[1:]
    )


def _reads(graph: Graph, name: str) -> int:
    """How many nodes read a weight, also through a transposition."""
    return sum(
        _reads(graph, node.output[0]) if node.op_type == "Transpose" else 1 for node in graph.readers.get(name, [])
    )


def _layer(graph: Graph, node: Any) -> Layer | None:
    rules = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "Gather": _table, "Add": _add}
    rules |= dict.fromkeys(RECURRENT, _recurrent)
    return rules[node.op_type](graph, node) if node.op_type in rules and not node.domain else None


def _is_weight(values: Array | None) -> bool:
    return values is not None and values.dtype == np.float32 and values.ndim > 1


def _conv(graph: Graph, node: Any) -> Layer | None:
    weight = graph.constant(node, 1)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    bias = graph.constant(node, 2) if has_bias else None
    if weight is None or not _is_weight(weight) or (has_bias and bias is None):
        return None
    return _ended(graph, "conv", node.input[1], (node,), weight=weight, bias=bias)


def _gemm(graph: Graph, node: Any) -> Layer | None:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    weight, bias = graph.constant(node, 1), graph.constant(node, 2)
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA")
    if weight is None or not _is_weight(weight) or not plain:
        return None
    weight = weight.T if given.get("transB") else weight
    if len(node.input) > 2 and (bias is None or bias.shape != (weight.shape[1],)):
        return None
    turned = bool(given.get("transB"))
    return _ended(graph, "gemm", node.input[1], (node,), weight=weight, bias=bias, turned=turned)


def _matmul(graph: Graph, node: Any) -> Layer | None:
    name, turned = node.input[1], graph.maker.get(node.input[1])
    weight = graph.constants.get(name)
    if turned is not None and turned.op_type == "Transpose":
        name = turned.input[0]
        weight = graph.constants.get(name)
        weight = weight.T if weight is not None and weight.ndim == 2 else None
    if weight is None or weight.ndim != 2 or not _is_weight(weight) or node.input[0] in graph.constants:
        return None
    nodes: tuple[Any, ...] = (node,)
    bias = None
    add = graph.next(node.output[0], "Add")
    if add is not None:
        bias = next((b for b in (graph.constants.get(n) for n in add.input) if b is not None), None)
        if bias is not None and bias.shape == (weight.shape[1],):
            nodes = (node, add)
        else:
            bias = None
    return _ended(graph, "matmul", name, nodes, weight=weight, bias=bias, turned=name != node.input[1])


def _table(graph: Graph, node: Any) -> Layer | None:
    weight = graph.constant(node, 0)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if weight is None or weight.ndim != 2 or not _is_weight(weight) or axis != 0 or node.input[1] in graph.constants:
        return None
    return Layer("table", node.input[0], (node,), (node.input[1],), node.output[0], weight)


def _add(graph: Graph, node: Any) -> Layer | None:
    if any(name in graph.constants for name in node.input):
        return None
    relu = graph.next(node.output[0], "Relu")
    nodes = (node,) if relu is None else (node, relu)
    return Layer("add", node.output[0], nodes, tuple(node.input), nodes[-1].output[0], activation=relu)


def _recurrent(graph: Graph, node: Any) -> Layer | None:
    weight, again = graph.constant(node, 1), graph.constant(node, 2)
    if weight is None or again is None or not (_is_weight(weight) and _is_weight(again)):
        return None
    hidden = Layer("recurrent", node.input[2], (), (), node.input[2], again)
    return Layer("recurrent", node.input[1], (node,), (node.input[0],), first_output(node), weight, hidden=hidden)


def first_output(node: Any) -> str:
    """The name of the first output that is wanted at all."""
    return str(next(name for name in node.output if name))


def _ended(
    graph: Graph,
    kind: str,
    name: str,
    nodes: tuple[Any, ...],
    *,
    weight: Array,
    bias: Array | None,
    turned: bool = False,
) -> Layer | None:
    """The layer with the normalisation and the ReLU that follow it."""
    axis = 0 if kind == "conv" else 1
    norm: Any = graph.next(nodes[-1].output[0], "BatchNormalization") if kind != "matmul" else None
    parts = [] if norm is None else [graph.constant(norm, place) for place in range(1, 5)]
    if parts and all(part is not None for part in parts):
        scale, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
        factor = scale / np.sqrt(variance + next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5))
        shape = [1] * weight.ndim
        shape[axis] = -1
        weight = (weight * factor.reshape(shape)).astype(np.float32)
        bias = ((0.0 if bias is None else bias.astype(np.float64)) - mean) * factor + shift
        bias, nodes = bias.astype(np.float32), (*nodes, norm)
    activation = graph.next(nodes[-1].output[0], "Relu", "Clip")
    if activation is not None and activation.op_type == "Clip" and _least(graph, activation) != 0:
        activation = None
    nodes = nodes if activation is None else (*nodes, activation)
    return Layer(kind, name, nodes, (nodes[0].input[0],), nodes[-1].output[0], weight, bias, activation, turned)


def _least(graph: Graph, clip: Any) -> float | None:
    low = graph.constant(clip, 1)
    return None if low is None else float(low)


def own_ranges(model: Any) -> dict[str, Grid]:
    """By tensor the range that the artifact gives its values (`compress.ranges`), at most 8 bits.

    That of 8 bits is also one of the tensor that goes into it where all readers see it through this range, and of
    those before that only move the same values: quantizing these does what its nodes do.
    """
    graph = Graph(model.graph)
    found = range_nodes(graph)
    fixed = {given: grid for given, (_, grid) in found.items()}
    for source, grid in found.values():
        first_nodes = {id(_first(graph, given)) for given, pair in found.items() if pair == (source, grid)}
        alone = all(id(reader) in first_nodes for reader in graph.readers[source])
        name, left = source, grid.bits == 8 and alone
        while left and name not in graph.outputs and name not in found:
            fixed[name] = grid
            mover = graph.maker.get(name)
            if mover is None or mover.op_type not in CARRIERS or len(mover.output) != 1:
                break
            name = mover.input[0]
            left = len(graph.readers[name]) == 1
    return fixed


def range_nodes(graph: Graph) -> dict[str, tuple[str, Grid]]:
    """By tensor that the artifact's own range gives: what goes into the range, and the range."""
    found = ((node.output[0], _fake_quantized(graph, node)) for node in graph.proto.node)
    return {given: spotted for given, spotted in found if spotted is not None}


def _first(graph: Graph, given: str) -> Any:
    """The first of the four nodes that end in `given`."""
    node = graph.maker[given]
    for _ in range(3):
        node = graph.maker[node.input[0]]
    return node


def _fake_quantized(graph: Graph, node: Any) -> tuple[str, Grid] | None:
    """What goes into Mul(1 / s), Round, Clip, Mul(s), of which `node` is the last, and the range."""
    chain = [node]
    for _ in range(3):
        chain.insert(0, graph.maker.get(chain[0].input[0]) if chain[0] is not None and chain[0].input else None)
    if [None if part is None else part.op_type for part in chain] != ["Mul", "Round", "Clip", "Mul"]:
        return None
    scale, inverse = graph.constant(node, 1), graph.constant(chain[0], 1)
    low, high = graph.constant(chain[2], 1), graph.constant(chain[2], 2)
    if scale is None or inverse is None or low is None or high is None or scale.size != 1 or inverse.size != 1:
        return None
    bits = math.log2(float(high) - float(low) + 1)
    if abs(float(scale) * float(inverse) - 1) > 1e-5 or bits not in range(1, 9) or float(low) > 0:
        return None
    return chain[0].input[0], Grid(int(bits), float(scale), int(-float(low)))


def without_dead_ends(graph: Any) -> None:
    """Takes out nodes that nobody reads, and then constants."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        dead = [node for node in graph.node if not read & set(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)


def names_of(layers: Sequence[Layer]) -> list[str]:
    """The layers' names, with a number where one weight serves several."""
    seen: dict[str, int] = {}
    names = []
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        names.append(layer.name if seen[layer.name] == 1 else f"{layer.name}#{seen[layer.name]}")
    return names


Forms = Mapping[Layer, str]
"""How each layer computes: "float32" (its very weight), "weights" (rounded, in float32), "static" or "dynamic"."""
