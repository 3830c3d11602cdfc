"""A module without its dead units: physically smaller layers, the same outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.compress import dead_units
from autocompress.compress.dead_units import Analysis, Layer
from autocompress.compress.tracing import exported


@dataclass(frozen=True)
class Cut:
    """What was cut: units, and multiply-accumulates of an example, of how many; a weight's shape before and after."""

    units: int
    of_units: int
    macs: int
    of_macs: int
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {
            "dead_units": self.units,
            "units": self.of_units,
            "macs_before": self.of_macs,
            "macs": self.macs,
            "layers": {name: [list(before), list(after)] for name, (before, after) in self.shapes.items()},
        }


def slimmed(module: nn.Module, inputs: Mapping[str, Any], keywords: bool) -> tuple[nn.Module, Cut]:
    """The module without dead units, in eval mode, and what went; the module itself is not touched.

    `inputs` as in `tracing.exported`. Weights that stay are bit-equal; values that were constant stand in biases.
    Raises ExportError for a model that torch.export refuses.
    """
    graph_module = exported(module, inputs, keywords).module()
    assert isinstance(graph_module, fx.GraphModule)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # the checks of shapes that torch.export adds
            graph.erase_node(node)
    held = {node: attrgetter(str(node.target))(graph_module) for node in graph.nodes if node.op == "get_attr"}
    found = dead_units.analysed(
        graph, {node: value.detach() for node, value in held.items() if isinstance(value, Tensor)}
    )
    made: dict[int, fx.Node] = {}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    macs = [0, 0]
    for layer in found.layers.values():
        name = str(layer.node.args[1].target)  # type: ignore[union-attr]
        before, after = _rewritten(graph_module, layer, made)
        shapes[name] = (before, after)
        places = _places(layer)
        macs[0] += places * math.prod(after)
        macs[1] += places * math.prod(before)
    others = sum(_macs_of(node) for node in graph.nodes if node not in found.layers)
    macs = [count + others for count in macs]
    for node in graph.nodes:
        if dead_units.operator(node) == "batch_norm" and node in found.values:
            _select(graph_module, node, range(1, 5), found)
        elif dead_units.operator(node) in {"view", "reshape"} and node in found.values:
            _resize(node, found)
    graph.eliminate_dead_code()
    _named_as_before(graph_module)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    sizes = [(space.size, int(space.keep.sum())) for space in found.own() if not space.fixed]
    gone = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    return graph_module, Cut(sum(a - b for a, b in sizes), sum(a for a, _ in sizes), macs[0], macs[1], gone)


def _places(layer: Layer) -> int:
    """How often a weight is used for one example."""
    return _but_for(layer.outputs.axis, layer.node)


def _macs_of(node: fx.Node) -> int:
    """Of an example in a layer that keeps its units, such as a grouped or transposed convolution; 0 of other nodes."""
    name = dead_units.operator(node)
    transposed = name.startswith("conv_transpose")
    if not (name == "linear" or name in dead_units.CONVOLUTIONS or transposed):
        return 0
    source, weight = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    kernel, places = weight.meta["val"].shape, source if transposed else node
    axis = len(places.meta["val"].shape) - (1 if name == "linear" else len(kernel) - 1)
    return _but_for(axis, places) * math.prod(map(_for_one, kernel))


def _but_for(axis: int, node: fx.Node) -> int:
    """The elements of a node's value for one example, along all axes but one."""
    return math.prod(_for_one(size) for k, size in enumerate(node.meta["val"].shape) if k != axis)


def _for_one(size: int | torch.SymInt) -> int:
    """A length where the batch size, the one symbol there is, is 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _rewritten(
    module: fx.GraphModule, layer: Layer, made: dict[int, fx.Node]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Put the smaller weight and the fuller bias in the place of a layer's; the weight's shape before and after.

    `made` has the smaller weights so far by the address of those that they replace: shared ones stay shared.
    """
    node, weight = layer.node, layer.weight
    outputs, inputs = layer.outputs.kept(), layer.inputs.kept()
    before = tuple(weight.shape)
    if len(outputs) == len(weight) and (layer.depthwise or len(inputs) == weight.shape[1]):
        return before, before
    gone = torch.ones(layer.inputs.space.size * layer.inputs.repeat, dtype=torch.bool)
    gone[inputs] = False
    if not layer.depthwise:
        _add_to_bias(module, layer, layer.taps() @ (layer.inputs.constant.nan_to_num() * gone), outputs)
    elif layer.bias is not None:
        _put(module, node, 2, layer.bias[outputs])
    small = weight[outputs] if layer.depthwise else weight[outputs][:, inputs]
    at = weight.data_ptr()
    if at in made:
        node.update_arg(1, made[at])
    else:
        made[at] = _put(module, node, 1, small)
    if layer.depthwise:
        node.update_arg(6, len(outputs))
    return before, tuple(small.shape)


def _add_to_bias(module: fx.GraphModule, layer: Layer, added: Tensor, outputs: Tensor) -> None:
    """The bias of the outputs that stay, with what the units that go gave to them."""
    old = layer.bias
    if old is None and not added[outputs].any():
        return
    old = torch.zeros(len(added), dtype=layer.weight.dtype) if old is None else old
    full = torch.where(added == 0, old, (old.double() + added).to(old))
    _put(module, layer.node, 2, full[outputs])


def _put(module: fx.GraphModule, node: fx.Node, place: int, tensor: Tensor) -> fx.Node:
    """Let a node read that tensor in that place, as a new parameter."""
    old = node.args[place] if place < len(node.args) else None
    if isinstance(old, fx.Node):
        owner, _, name = str(old.target).rpartition(".")
    else:
        owner, name = str(node.args[1].target).rpartition(".")[0], "bias"  # type: ignore[union-attr]
    home = module.get_submodule(owner)
    name = next(new for new in (f"{name}_{k}" for k in itertools.count()) if not hasattr(home, new))
    home.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        made = module.graph.get_attr(f"{owner}.{name}".lstrip("."))
    made.meta["val"] = tensor
    made.meta["instead_of"] = name.rpartition("_")[0]
    if place < len(node.args):
        node.update_arg(place, made)
    else:
        node.args = (*node.args, made)
    return made


def _named_as_before(module: fx.GraphModule) -> None:
    """Give new parameters the names of those in whose place they stand."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for node in [node for node in module.graph.nodes if "instead_of" in node.meta]:
        owner, _, name = str(node.target).rpartition(".")
        old = node.meta["instead_of"]
        path = f"{owner}.{old}".lstrip(".")
        if path in used:
            continue
        home = module.get_submodule(owner)
        tensor = getattr(home, name)
        delattr(home, name)
        if hasattr(home, old):
            delattr(home, old)
        home.register_parameter(old, tensor)
        used.add(path)
        node.target = path


def _select(module: fx.GraphModule, node: fx.Node, places: range, found: Analysis) -> None:
    """Let a normalisation hold the units that stay."""
    value = found.values[node]
    kept = value.kept()
    if len(kept) == value.space.size:
        return
    for place in places:
        at = node.args[place]
        if isinstance(at, fx.Node):
            _put(module, node, place, found.tensors[at][kept])


def _resize(node: fx.Node, found: Analysis) -> None:
    """Tell a reshape the number of units that stay."""
    value = found.values[node]
    sizes: Any = node.args[1]
    if isinstance(sizes[value.axis], int) and sizes[value.axis] != -1:
        sizes = list(sizes)
        sizes[value.axis] = len(value.kept())
        node.update_arg(1, sizes)
