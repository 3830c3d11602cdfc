"""Which units of a model's layers can go, with which others, and which of them do: a plan's `width`.

A unit is an output of a layer: a row of a linear weight, an output channel of a convolution. One goes whose row is
zero, and with it its biases and the scale and shift of its batch normalisation: it is then zero for every input, which
padding does not change, and an export leaves it out (`dead_units`). Outputs that are added to each other, or that a
depthwise convolution takes on, are one *group*: unit i of all its layers goes or none does.

Saliency of a unit: the energy of its outputs w C w^T, C the second moments of the layer's inputs on the calibration
examples (the identity for "magnitude", and where inputs cannot be seen), times the square of the scale that a batch
normalisation behind gives it, as a share of the layer's; summed over the group. It is always that of the uncompressed
model, so that a plan of less width keeps a part of what one of more width keeps, whichever comes first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.compress import dead_units
from autocompress.compress.artifact import unique_state
from autocompress.compress.calibrate import Statistics, in_parts
from autocompress.compress.dead_units import Analysis, Layer, Space
from autocompress.compress.prune import without_least
from autocompress.compress.runtime import as_call
from autocompress.compress.structure import map_tensors
from autocompress.compress.tracing import exported
from autocompress.errors import ExportError, PlanError
from autocompress.plan import LayerSpec, Plan


@dataclass(frozen=True)
class Place:
    """Where a tensor has units: along axis 0 or 1, each of `repeat` indices in a row."""

    key: str
    axis: int
    repeat: int = 1


@dataclass(frozen=True)
class Group:
    """Units that go together: `size` of each of the layers, by name in the model's order.

    `beside` are the state keys of what is zero along with a row: biases, scales and shifts; `norms` for a layer those
    of scale and variance, and epsilon, of the normalisation right behind it. `why` says why no unit can go.
    `places` are all that the units stand in: in another order there, the model computes the same; empty where these
    are not all known.
    """

    size: int
    layers: tuple[str, ...]
    beside: frozenset[str]
    norms: Mapping[str, tuple[str | None, str, float]]
    why: str = ""
    places: frozenset[Place] = frozenset()


@dataclass(frozen=True)
class Wiring:
    """The groups of a model, and by layer the place of that which its outputs are, and what it reads.

    That is units of groups side by side, several behind a concatenation: place and how many, the place None where they
    are no group's. `problem` says why a model has none.
    """

    groups: tuple[Group, ...]
    outputs: Mapping[str, int]
    inputs: Mapping[str, tuple[tuple[int | None, int], ...]]
    problem: str = ""


@dataclass(frozen=True)
class Kept:
    """What stays under a plan: by layer name its rows, by state key what stands beside them; bool (out,)."""

    rows: Mapping[str, Tensor]
    beside: Mapping[str, Tensor]

    def differing(self, other: Kept) -> frozenset[str]:
        """The layers of which other rows stay; one that is not named keeps all."""
        both = self.rows.keys() & other.rows.keys()
        same = {name for name in both if torch.equal(self.rows[name], other.rows[name])}
        return frozenset((self.rows.keys() | other.rows.keys()) - same)


class Units:
    """The units of a model: its graph is looked at when a plan first narrows a layer.

    `example()` gives inputs of one example, `statistics()` those of layers' inputs, for a saliency that asks for them.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[LayerSpec],
        example: Callable[[], Any],
        statistics: Callable[[], Mapping[str, Statistics]],
    ) -> None:
        self._model, self._specs, self._example, self._statistics = model, tuple(specs), example, statistics
        self._by_name = {spec.name: spec for spec in specs}

    @cached_property
    def wiring(self) -> Wiring:
        """The groups; none, with the problem, of a model that torch.export refuses."""
        with torch.random.fork_rng(devices=[]):
            try:
                return wiring_of(self._model, self._specs, self._example())
            except ExportError as error:
                return Wiring((), {}, {}, str(error))

    def why(self, spec: LayerSpec) -> str:
        """Why no unit of a layer can go, "" where some can."""
        if self.wiring.problem:
            return self.wiring.problem
        place = self.wiring.outputs.get(spec.name)
        if place is not None:
            return self.wiring.groups[place].why
        return "what becomes of its outputs is not understood" if spec.seen else spec.whole_because

    def check(self, plan: Plan) -> None:
        """Raise PlanError where a layer is to lose units that must stay, or that others of its group keep."""
        for spec in self._specs:
            layer = plan.layers[spec.name]
            if spec.units(layer) == spec.shape[0]:
                continue
            where = f"layer {spec.label!r}: width is {layer.width:g}"
            if why := self.why(spec):
                raise PlanError(f"{where}, allowed: 1 ({why})")
            for name in self.wiring.groups[self.wiring.outputs[spec.name]].layers:
                other = self._by_name[name]
                if other.units(plan.layers[name]) != spec.units(layer):
                    allowed = f"{plan.layers[name].width:g}, that of layer {other.label!r}"
                    raise PlanError(f"{where}, allowed: {allowed}, whose outputs share its units")

    def kept(self, plan: Plan) -> Kept:
        """What stays of the groups that lose units. Raises PlanError as `check` does."""
        if not narrows(plan, self._specs):
            return Kept({}, {})
        self.check(plan)
        rows: dict[str, Tensor] = {}
        beside: dict[str, Tensor] = {}
        for group in self.wiring.groups:
            count = min((self._by_name[name].units(plan.layers[name]) for name in group.layers), default=group.size)
            if group.why or count == group.size:
                continue
            stays = without_least(self._saliency(group, plan), group.size - count)
            rows |= dict.fromkeys(group.layers, stays)
            beside |= dict.fromkeys(group.beside, stays)
        return Kept(rows, beside)

    def read(self, plan: Plan) -> dict[str, int]:
        """Of the layers that read narrowed ones, by name: how many of their inputs stay."""
        if not narrows(plan, self._specs):
            return {}
        found: dict[str, int] = {}
        for name, parts in self.wiring.inputs.items():
            spec = self._by_name[name]
            if spec.groups == 1:
                stay = sum(size * self._share(place, plan) for place, size in parts)
                found[name] = round(spec.shape[1] * stay / sum(size for _, size in parts))
        return found

    def _share(self, place: int | None, plan: Plan) -> Fraction:
        """The part of a group's units that stays."""
        if place is None or (group := self.wiring.groups[place]).why:
            return Fraction(1)
        first = self._by_name[group.layers[0]]
        return Fraction(first.units(plan.layers[first.name]), group.size)

    def _saliency(self, group: Group, plan: Plan) -> Tensor:
        """Of each unit, (size,), float64."""
        total = torch.zeros(group.size, dtype=torch.float64)
        for name in group.layers:
            weight = self._model.get_parameter(self._by_name[name].key).detach()
            seen = None if plan.layers[name].saliency == "magnitude" else self._statistics().get(name)
            energy = energies(weight, seen).cpu()
            if name in group.norms:
                energy *= self._scale(*group.norms[name]).square()
            total += energy / energy.sum().clamp(min=1e-300)
        return total

    def _scale(self, scale: str | None, variance: str, epsilon: float) -> Tensor:
        state = unique_state(self._model)
        found = (state[variance].detach().double() + epsilon).rsqrt()
        return (found if scale is None else found * state[scale].detach().double()).cpu()


def narrows(plan: Plan, specs: Iterable[LayerSpec]) -> bool:
    """Whether a layer loses units under a plan."""
    return any(spec.units(plan.layers[spec.name]) < spec.shape[0] for spec in specs)


def energies(weight: Tensor, inputs: Statistics | None) -> Tensor:
    """w C w^T of each row w of a weight, (out,) float64; C the identity where inputs are not known."""
    matrix = weight.double().flatten(1)
    if inputs is None:
        return matrix.square().sum(1)
    groups = len(inputs.mean)
    parted = in_parts(matrix.reshape(groups, -1, matrix.shape[1]), inputs.parts)
    every = (torch.bmm(parted, inputs.gram.to(parted)) * parted).sum(2)  # (groups * parts, out / groups)
    return every.reshape(groups, inputs.parts, -1).sum(1).flatten()


def wiring_of(model: nn.Module, specs: Sequence[LayerSpec], example: Any) -> Wiring:
    """A model's groups of units; `example` are inputs of one. Raises ExportError where torch.export refuses it."""
    module = copy.deepcopy(model).cpu().eval()
    args, kwargs = as_call(map_tensors(example, lambda at: (torch.cat([at, at]) if at.dim() else at).cpu()))
    inputs = kwargs or {str(place): value for place, value in enumerate(args)}
    traced = exported(module, inputs, bool(kwargs)).module()
    assert isinstance(traced, fx.GraphModule)
    held = {node: attrgetter(str(node.target))(traced) for node in traced.graph.nodes if node.op == "get_attr"}
    tensors = {node: value.detach() for node, value in held.items() if isinstance(value, Tensor)}
    found = dead_units.analysed(traced.graph, tensors)
    keys = _first_keys(module)
    graph = _Graph(found, keys, {keys[spec.key]: spec.name for spec in specs})
    probe = dead_units.analysed(traced.graph, graph.without_first(tensors))
    goes = {node: not bool(layer.outputs.space.root().keep[0]) for node, layer in probe.layers.items()}
    groups: list[Group] = []
    places: dict[Space, int] = {}
    for space, layers in graph.by_space().items():
        places[space] = len(groups)
        groups.append(graph.group(layers, all(goes[layer.node] for layer in layers), [spec.name for spec in specs]))
    outputs = {name: place for place, group in enumerate(groups) for name in group.layers}
    joined = {parts[0].whole.root(): parts for parts in found.parts.values() if parts}

    def side_by_side(space: Space) -> list[tuple[int | None, int]]:
        root = space.root()
        if root in places or root not in joined:
            return [(places.get(root), root.size)]
        return [(p, size * part.repeat) for part in joined[root] for p, size in side_by_side(part.units)]

    read = {graph.name(layer): tuple(side_by_side(layer.inputs.space)) for layer in found.layers.values()}
    return Wiring(tuple(groups), outputs, {name: parts for name, parts in read.items() if name})


def _first_keys(module: nn.Module) -> dict[str, str]:
    """For every name of every tensor of a module the first name of that tensor."""
    first = {id(tensor): key for key, tensor in unique_state(module).items()}
    return {key: first[id(tensor)] for key, tensor in module.state_dict(keep_vars=True).items()}


@dataclass(frozen=True)
class _Graph:
    """An analysis, beside it `keys`, the first name of the tensor of any name, and `names` of layers by weight."""

    found: Analysis
    keys: Mapping[str, str]
    names: Mapping[str, str]

    def key(self, node: Any) -> str | None:
        """The state key of what a node reads, None for anything else."""
        return self.keys.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def name(self, layer: Layer) -> str | None:
        """The name of a layer, None for a weight that plans do not know."""
        return self.names.get(self.key(layer.node.args[1]) or "")

    def by_space(self) -> dict[Space, list[Layer]]:
        """The layers whose outputs are of the same units."""
        made: dict[Space, list[Layer]] = {}
        for layer in self.found.layers.values():
            made.setdefault(layer.outputs.space.root(), []).append(layer)
        return made

    def norms(self, space: Space) -> list[fx.Node]:
        """The batch normalisations of a space."""
        values = self.found.values.items()
        return [n for n, value in values if dead_units.operator(n) == "batch_norm" and value.space.root() is space]

    def beside(self, layers: Sequence[Layer]) -> set[fx.Node]:
        """The nodes of biases, scales and shifts that are zero where a unit goes."""
        found = {arg for layer in layers for arg in layer.node.all_input_nodes[2:] if arg.op == "get_attr"}
        norms = self.norms(layers[0].outputs.space.root())
        return found | {arg for n in norms for arg in n.args[1:3] if isinstance(arg, fx.Node)}

    def without_first(self, tensors: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """The tensors with the first unit of each group zero, of groups that have others: what is shared stays so."""
        gone: dict[int, Tensor] = {}
        for space, layers in self.by_space().items():
            if space.fixed or space.size == 1:
                continue
            nodes = self.beside(layers) | {layer.node.args[1] for layer in layers}
            for tensor in (tensors[node] for node in nodes):  # type: ignore[index]
                if tensor.data_ptr() not in gone:
                    gone[tensor.data_ptr()] = tensor.clone()
                    gone[tensor.data_ptr()][0] = 0
        return {node: gone.get(tensor.data_ptr(), tensor) for node, tensor in tensors.items()}

    def group(self, layers: Sequence[Layer], goes: bool, order: Sequence[str]) -> Group:
        """The group of those layers; `goes`: whether a unit that is zero can be left out."""
        space = layers[0].outputs.space.root()
        names = [self.name(layer) for layer in layers]
        beside = {self.key(node) for node in self.beside(layers)}
        scaled = {}
        for node in self.norms(space):
            layer = self.found.layers.get(node.args[0])  # type: ignore[arg-type]
            variance = self.key(node.args[4])
            if layer is not None and (name := self.name(layer)) is not None and variance is not None:
                scaled[name] = (self.key(node.args[1]), variance, float(node.args[7]))  # type: ignore[arg-type]
        known = [name for name in order if name in names]
        why = ""
        if space.size == 1:
            why = "a single unit"
        elif space.fixed or not goes:
            why = "its units are the model's outputs, or read by what has no rule for them"
        elif None in names or None in beside:
            why = "its units are also those of a weight that is no layer's"
        elif self._joins(space):
            why = "its outputs are added to a concatenation"
        elif self._shares(layers, self.beside(layers)):
            why = "a bias or a normalisation is used in several places"
        places = frozenset() if why else self._places(layers)
        return Group(space.size, tuple(known), frozenset(key for key in beside if key), scaled, why, places)

    def _places(self, layers: Sequence[Layer]) -> frozenset[Place]:
        """Where the units of a group stand; none where a tensor is no layer's, or a concatenation reads them.

        Nor where others read the mean and variance of a normalisation: that of two groups without scale and shift.
        """
        space = layers[0].outputs.space.root()
        if any(part.units.root() is space for parts in self.found.parts.values() for part in parts):
            return frozenset()
        read = [at for at in self.found.layers.values() if at.inputs.space.root() is space and not at.depthwise]
        rows = [*(at.node.args[1] for at in layers), *self.beside(layers)]
        statistics = {arg for node in self.norms(space) for arg in node.args[3:5] if isinstance(arg, fx.Node)}
        rows += statistics
        if self._shares(layers, statistics):
            return frozenset()
        if any(self.name(layer) is None for layer in read) or any(self.key(node) is None for node in rows):
            return frozenset()
        columns = {Place(self.key(at.node.args[1]) or "", 1, at.inputs.repeat) for at in read}
        return frozenset({Place(self.key(node) or "", 0) for node in rows} | columns)

    def _joins(self, space: Space) -> bool:
        """Whether a space is also that of a concatenation, whose parts have units of their own."""
        return any(part.whole.root() is space for parts in self.found.parts.values() for part in parts)

    def _shares(self, layers: Sequence[Layer], beside: Iterable[fx.Node]) -> bool:
        """Whether what stands beside the rows, those nodes, is read by anything that is none of the group's."""
        space = layers[0].outputs.space.root()
        readers = {layer.node for layer in layers} | set(self.norms(space))
        keys = {self.key(node) for node in beside}
        return any(user not in readers for node in self.found.tensors if self.key(node) in keys for user in node.users)
