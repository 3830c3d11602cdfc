"""Units of a graph that can go without changing what it computes: which, and what becomes of their readers.

A unit is an index along one axis of a tensor, a neuron or a channel. One that nobody reads can go; so can one that
has the same value for every input, once that value stands in its readers' biases. Tensors that share their units, the
two sides of a sum or a layer's input and a normalisation's, lose them together; a concatenation along the axis of the
units loses what its parts lose.

The graph is one of `torch.export`. Constants go forward through it, reads go backward. What is not understood keeps
all its units: an operator with no rule here reads everything and gives nothing that could go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# fmt: off
POINTWISE = frozenset((
    "abs", "add", "alias", "celu", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "detach", "div", "dropout",
    "elu", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish", "mul", "neg",
    "relu", "relu6", "round", "rsub", "selu", "sigmoid", "silu", "softplus", "sqrt", "square", "sub", "tanh",
    "threshold", "to",
))
# fmt: on
"""Operators that make each output element of the input elements at its place, and NaN where one of them is."""
SPATIAL = frozenset(("max_pool1d", "max_pool2d", "max_pool3d"))
"""Operators of each channel by itself that leave one constant over all places as it is."""
AVERAGES = frozenset(("avg_pool1d", "avg_pool2d", "avg_pool3d"))
"""The same, where no padding counts as zeros."""
ADAPTIVE = frozenset(f"adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3))
CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
JOINS = frozenset(("cat", "concat", "concatenate"))
RESHAPES = frozenset(("flatten", "view", "reshape", "squeeze", "unsqueeze"))


class Space:
    """Units that stand and fall together; `root()` represents all spaces that were joined."""

    def __init__(self, size: int, *, fixed: bool = False) -> None:
        self.size, self.fixed = size, fixed
        self.keep = torch.zeros(size, dtype=torch.bool)
        self._parent: Space | None = None

    def root(self) -> Space:
        """The space that speaks for this one."""
        found = self
        while found._parent is not None:  # a stream of a thousand sums is a chain of as many
            found = found._parent
        return found

    def join(self, other: Space) -> None:
        """Make the two one."""
        a, b = self.root(), other.root()
        if a is not b:
            a.fixed |= b.fixed
            b._parent = a

    def fix(self) -> None:
        """All units stay."""
        self.root().fixed = True


@dataclass
class Value:
    """What is known of a tensor: the axis of its units, each of `repeat` indices in a row.

    `constant` (size * repeat,): the value for every input, NaN where there is none such. `read`: whether any reader
    needs to be given it.
    """

    space: Space
    axis: int
    repeat: int = 1
    constant: Tensor = field(default_factory=lambda: torch.empty(0))
    read: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        count = self.space.size * self.repeat
        if not len(self.constant):
            self.constant = torch.full((count,), math.nan, dtype=torch.float64)
        self.read = torch.zeros(count, dtype=torch.bool)

    def kept(self) -> Tensor:
        """The indices that stay, along `axis`."""
        keep = self.space.root().keep.repeat_interleave(self.repeat)
        return keep.nonzero().flatten()


@dataclass(frozen=True)
class Part:
    """Where the units of a tensor stand in those of a concatenation: `repeat` of these for each, from `start` on."""

    whole: Space
    start: int
    units: Space
    repeat: int

    def read(self, whole: Tensor) -> Tensor:
        """The part's own indices, out of one flag for each of the concatenation."""
        return whole[self.start : self.start + self.units.size * self.repeat]

    def agree(self) -> bool:
        """Keep on both sides what stays on one; whether that changed anything."""
        units, place = self.units.root().keep, self.read(self.whole.root().keep).view(-1, self.repeat)
        before = int(units.sum() + place.sum())
        units |= place.any(1)
        place |= units[:, None]
        return int(units.sum() + place.sum()) > before


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution: what it reads, and how its weight's axes follow its tensors' units."""

    node: fx.Node
    inputs: Value
    outputs: Value
    weight: Tensor
    bias: Tensor | None
    depthwise: bool
    padded: bool

    @property
    def uneven(self) -> Tensor:
        """Inputs that a bias cannot stand for: those without a constant, or with one beside padding of zeros."""
        constant = self.inputs.constant
        return constant.isnan() | ((constant != 0) & self.padded)

    def taps(self) -> Tensor:
        """The weight summed over the kernel, (outputs, inputs), in float64."""
        return self.weight.double().flatten(2).sum(2) if self.weight.dim() > 2 else self.weight.double()

    def reads(self) -> Tensor:
        """(outputs, inputs): whether any weight between the two is not zero."""
        used = self.weight != 0
        return used.flatten(2).any(2) if used.dim() > 2 else used

    def constants(self) -> Tensor:
        """The outputs that are the same for every input, (outputs,), else NaN."""
        bias = torch.zeros(len(self.weight), dtype=torch.float64) if self.bias is None else self.bias.double()
        known = self.inputs.constant.nan_to_num()
        if self.depthwise:
            value, varies = bias + self.taps()[:, 0] * known, self.reads()[:, 0] & self.uneven
        else:
            value, varies = bias + self.taps() @ known, self.reads()[:, self.uneven].any(1)
        return torch.where(varies, math.nan, value)

    def needs(self) -> Tensor:
        """The inputs that the outputs which are read do not do without, (inputs,)."""
        used = self.reads()
        if self.depthwise:
            return used[:, 0] & self.uneven & self.outputs.read
        return used[self.outputs.read].any(0) & self.uneven


@dataclass
class Analysis:
    """The values of a graph's nodes, its layers and its concatenations, in the graph's order."""

    values: dict[fx.Node, Value]
    layers: dict[fx.Node, Layer]
    tensors: dict[fx.Node, Tensor]
    parts: dict[fx.Node, list[Part]] = field(default_factory=dict)

    def spaces(self) -> Iterator[Space]:
        """Each independent space once."""
        every = [value.space for value in (*self.values.values(), *(layer.inputs for layer in self.layers.values()))]
        every += [part.units for parts in self.parts.values() for part in parts]
        yield from {id(root): root for root in (space.root() for space in every)}.values()

    def own(self) -> list[Space]:
        """The independent spaces but for those whose units are all of others, side by side."""
        made = {id(layer.outputs.space.root()) for layer in self.layers.values()}
        joint = {id(part.whole.root()) for parts in self.parts.values() for part in parts} - made
        return [space for space in self.spaces() if id(space) not in joint]


def operator(node: fx.Node) -> str:
    """The plain name of a node's operator, "" where it is none of ATen; in-place ones only where that is no matter."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    if node.target.namespace != "aten":
        return ""
    name = str(node.target._schema.name).removeprefix("aten::")
    if name.endswith("_"):
        source = node.args[0]
        return name.rstrip("_") if isinstance(source, fx.Node) and len(source.users) == 1 else ""
    return name


def analysed(graph: fx.Graph, tensors: dict[fx.Node, Tensor]) -> Analysis:
    """Which units of the graph's tensors stay (`Space.keep`); `tensors` are those of its `get_attr` nodes."""
    found = Analysis({}, {}, tensors)
    for node in graph.nodes:
        _forward(found, node)
    for node in reversed(graph.nodes):
        _backward(found, node)
    for value in found.values.values():
        root = value.space.root()
        root.keep |= value.read.view(-1, value.repeat).any(1)
    for space in found.spaces():
        if space.fixed or not space.keep.any():
            space.keep[:] = space.fixed
            space.keep[0] = True
    parts = [part for parts in found.parts.values() for part in parts]
    while any(part.agree() for part in parts):
        pass  # what one concatenation keeps another may hand on
    return found


def _forward(found: Analysis, node: fx.Node) -> None:
    """Find a node's value."""
    name = operator(node)
    rule: Callable[[Analysis, fx.Node], Value | None] | None = None
    if name == "linear" or name in CONVOLUTIONS:
        rule = _layer
    elif name == "batch_norm":
        rule = _normalised
    elif name in POINTWISE:
        rule = _pointwise
    elif name in SPATIAL or name in AVERAGES or name in ADAPTIVE:
        rule = _pooled
    elif name == "mean":
        rule = _mean
    elif name in RESHAPES:
        rule = _reshaped
    elif name in JOINS:
        rule = _concatenated
    value = rule(found, node) if rule is not None else None
    if value is not None:
        found.values[node] = value
        return
    for source in node.all_input_nodes:
        if source in found.values and not _asks_little(found, node):
            found.values[source].space.fix()


def _asks_little(found: Analysis, node: fx.Node) -> bool:
    """Whether a node looks at the type of a tensor, or at the length of an axis that stays."""
    name = operator(node)
    if name == "sym_size":
        return len(node.args) > 1 and found.values[node.args[0]].axis != node.args[1]  # type: ignore[index]
    return name == "_assert_tensor_metadata"


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _layer(found: Analysis, node: fx.Node) -> Value | None:
    source, at = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = found.tensors.get(at)  # type: ignore[arg-type]
    shape = _shape(node)
    if weight is None or not isinstance(source, fx.Node) or (bias is not None and bias not in found.tensors):
        return None
    linear = operator(node) == "linear"
    if not linear and len(shape) != weight.dim():
        return None  # no batch axis
    axis = len(shape) - 1 if linear else 1
    groups = 1 if linear or len(node.args) < 7 else int(node.args[6])  # type: ignore[arg-type]
    depthwise = groups > 1 and groups == len(weight) == _shape(source)[1]
    if groups > 1 and not depthwise:
        return None
    inputs = found.values.get(source)
    if inputs is None or inputs.axis != axis or (depthwise and inputs.repeat > 1):
        if inputs is not None:
            inputs.space.fix()
        inputs = Value(Space(len(weight) if depthwise else weight.shape[1], fixed=True), axis)
    outputs = Value(inputs.space if depthwise else Space(len(weight)), axis)
    padding = node.args[4] if len(node.args) > 4 else 0
    padded = not linear and ((isinstance(padding, str) and padding != "valid") or _any(padding))
    layer = Layer(node, inputs, outputs, weight, found.tensors.get(bias), depthwise, padded)  # type: ignore[arg-type]
    outputs.constant = layer.constants()
    _tie(found, layer)
    found.layers[node] = layer
    return outputs


def _tie(found: Analysis, layer: Layer) -> None:
    """A weight that two layers share has the units of both; one that others than layers read stays whole."""
    at = layer.weight.data_ptr()
    readers = {reader for node, tensor in found.tensors.items() if tensor.data_ptr() == at for reader in node.users}
    others = [other for other in found.layers.values() if other.weight.data_ptr() == at]
    whole = any(operator(reader) != operator(layer.node) or reader.args[0] in found.tensors for reader in readers)
    for other in others:
        whole |= other.inputs.repeat != layer.inputs.repeat or other.depthwise != layer.depthwise
        other.inputs.space.join(layer.inputs.space)
        other.outputs.space.join(layer.outputs.space)
    if whole:
        layer.inputs.space.fix()
        layer.outputs.space.fix()


def _any(padding: Any) -> bool:
    return bool(padding) if isinstance(padding, int) else not isinstance(padding, str) and any(padding)


def _normalised(found: Analysis, node: fx.Node) -> Value | None:
    source = found.values.get(node.args[0])  # type: ignore[arg-type]
    scale, shift, mean, variance = (found.tensors.get(arg) for arg in node.args[1:5])  # type: ignore[arg-type]
    if source is None or source.axis != 1 or source.repeat != 1 or mean is None or variance is None or node.args[5]:
        return None
    value = (source.constant - mean.double()) / (variance.double() + float(node.args[7])).sqrt()  # type: ignore[arg-type]
    value = value if scale is None else value * scale.double()
    return Value(source.space, 1, 1, value if shift is None else value + shift.double())


def _pointwise(found: Analysis, node: fx.Node) -> Value | None:
    """The operator itself tells what becomes of constants: NaN stays NaN."""
    parts = [arg for arg in node.args if isinstance(arg, fx.Node)]
    sources = [found.values.get(part) for part in parts]
    known = [source for source in sources if source is not None]
    rank = len(_shape(node))
    if not known or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    if not node.meta["val"].is_floating_point():  # whole numbers have no NaN for what is not known
        return None
    first = known[0]
    for part, source in zip(parts, sources, strict=True):
        if source is None and not _is_scalar(found, part):
            return None
        if source is not None and (
            len(_shape(part)) != rank or (source.axis, source.repeat) != (first.axis, first.repeat)
            or source.space.size != first.space.size
        ):  # fmt: skip
            return None
    values = [
        arg if not isinstance(arg, fx.Node) else found.values[arg].constant if arg in found.values
        else found.tensors[arg].double().reshape(())
        for arg in node.args
    ]  # fmt: skip
    try:
        constant = node.target(*values, **node.kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return None
    for source in known[1:]:
        first.space.join(source.space)
        if operator(node) == "mul":  # zero times what is not known
            constant = torch.where((first.constant == 0) | (source.constant == 0), 0.0, constant)
    return Value(first.space, first.axis, first.repeat, constant.double())


def _is_scalar(found: Analysis, node: fx.Node) -> bool:
    tensor = found.tensors.get(node)
    return tensor is not None and tensor.numel() == 1


def _pooled(found: Analysis, node: fx.Node) -> Value | None:
    source = found.values.get(node.args[0])  # type: ignore[arg-type]
    name = operator(node)
    if source is None or source.axis != 1 or len(_shape(node)) != int(name[-2]) + 2:
        return None
    constant = source.constant
    if name in AVERAGES and len(node.args) > 6 and node.args[6] is not None:  # a divisor of its own
        return None
    padding = node.args[3] if name in AVERAGES and len(node.args) > 3 else 0
    if _any(padding):
        constant = torch.where(constant == 0, constant, math.nan)
    return Value(source.space, 1, source.repeat, constant)


def _mean(found: Analysis, node: fx.Node) -> Value | None:
    source = found.values.get(node.args[0])  # type: ignore[arg-type]
    rank = len(_shape(node.args[0]))  # type: ignore[arg-type]
    axes = node.args[1] if len(node.args) > 1 else None
    if source is None or not isinstance(axes, list | tuple) or not axes:
        return None
    gone = {int(axis) % rank for axis in axes}
    if source.axis in gone or 0 in gone:
        return None
    held = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    axis = source.axis if held else source.axis - sum(axis < source.axis for axis in gone)
    return Value(source.space, axis, source.repeat, source.constant)


def _concatenated(found: Analysis, node: fx.Node) -> Value | None:
    """Units side by side; a tensor of which nothing is known keeps all of its own."""
    sources: Any = node.args[0]
    axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(_shape(node))  # type: ignore[arg-type]
    lengths = [_shape(source)[axis] for source in sources]
    if axis == 0 or not all(isinstance(length, int) for length in lengths):
        return None
    known = [found.values.get(source) for source in sources]
    if not any(value is not None and value.axis == axis for value in known):
        return None
    whole, start, constants = Space(sum(lengths)), 0, []
    parts = found.parts.setdefault(node, [])
    for value, length in zip(known, lengths, strict=True):
        given = value
        if given is None or given.axis != axis:
            if given is not None:
                given.space.fix()
            given = Value(Space(length, fixed=True), axis)
        parts.append(Part(whole, start, given.space, given.repeat))
        constants.append(given.constant)
        start += length
    return Value(whole, axis, 1, torch.cat(constants))


def _reshaped(found: Analysis, node: fx.Node) -> Value | None:
    """(b, c, ...) to (b, c * ...), and what only adds or takes axes of one."""
    source = found.values.get(node.args[0])  # type: ignore[arg-type]
    if source is None:
        return None
    before, after = _shape(node.args[0]), _shape(node)  # type: ignore[arg-type]
    count = source.space.size * source.repeat
    ahead, behind = list(before[: source.axis]), list(before[source.axis + 1 :])
    if not all(isinstance(size, int) for size in behind):
        return None
    merged = count * math.prod(behind)
    places = [k for k, size in enumerate(after) if isinstance(size, int) and size in {count, merged}]
    axis = next((k for k in places if _same(after[:k], ahead)), None)
    if axis is None:
        return None
    if after[axis] == merged and all(size == 1 for size in after[axis + 1 :]):
        times = math.prod(behind)
        return Value(source.space, axis, source.repeat * times, source.constant.repeat_interleave(times))
    if after[axis] == count and _same(after[axis + 1 :], behind):
        return Value(source.space, axis, source.repeat, source.constant)
    return None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are alike but for axes of one."""
    return [str(x) for x in a if x != 1] == [str(x) for x in b if x != 1]


def _backward(found: Analysis, node: fx.Node) -> None:
    """Hand what is read of a node on to its inputs."""
    value = found.values.get(node)
    layer = found.layers.get(node)
    if layer is not None:
        layer.inputs.read |= layer.needs()
        given = found.values.get(layer.node.args[0])  # type: ignore[arg-type]
        if given is not None and given is not layer.inputs:  # read along another axis
            given.read[:] = True
        return
    if value is not None and node in found.parts:
        for source, part in zip(node.args[0], found.parts[node], strict=True):  # type: ignore[arg-type]
            given = found.values.get(source)
            if given is not None and given.space is part.units:
                given.read |= part.read(value.read)
            elif given is not None:
                given.read[:] = True
        return
    for source in node.all_input_nodes:
        given = found.values.get(source)
        if given is None or (value is None and _asks_little(found, node)):
            continue
        if value is None:
            given.read[:] = True
        else:
            times = len(value.read) // len(given.read)
            given.read |= value.read.view(-1, times).any(1)
