"""Plan -> compressed model: low rank, then prune, then quantize. The only place where the order exists.

A `Compressed` holds a copy of the model with factorised layers in place, and for each weight of
a layer (or factor) a `Code`: the float weights that stay and how they become values. Training
substitutes each weight by its code's values (`torch.func.functional_call`), so that any module,
shared weights included, sees compressed weights without knowing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.codec.tensors import Coded, Raw
from autocompress.compress import calibrate, lowrank, priced, prune, quantize, ranges, solve
from autocompress.compress.artifact import SCALE, raw_tensor, unique_state
from autocompress.compress.calibrate import is_layer
from autocompress.compress.codes import Code, in_short, unit_of
from autocompress.compress.factors import Factoriser
from autocompress.compress.layers import NORMS
from autocompress.compress.lineage import State
from autocompress.compress.prepare import prepare
from autocompress.compress.ranges import Range
from autocompress.compress.rate import BIAS_BITS, RatedCode
from autocompress.compress.runtime import as_call
from autocompress.compress.units import Kept, Units
from autocompress.errors import PlanError, TrialFailed
from autocompress.plan import FLOAT_BITS, LOOKED_UP, SHORT_BITS, LayerPlan, LayerSpec, Plan, bias_beside, uncompressed

_NORM_STATE = ("weight", "bias", "running_mean", "running_var")
_FAR = 16.0
"""Deviations from zero of a running mean beyond which bfloat16 moves it by more than a sixteenth of one."""
GridSource = Callable[[LayerSpec, int], ranges.Grid]
SvdSource = Callable[[LayerSpec, str], lowrank.Svd]


class Compressed:
    """A model under a plan, ready for finetuning and encoding.

    `module` is a copy with factorised layers; `codes` maps its state keys to their codes (one for
    all the names of a shared weight); `paid` is the rate that the weights were trained under before;
    `ranges` holds, by layer name, the range that its inputs pass through; `beside`, by state key, 1 for the units that
    stay and 0 for the others, whose biases, scales and shifts are zero.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        codes: Mapping[str, Code | RatedCode],
        aliases: Mapping[str, str],
        paid: float = 0.0,
        *,
        ranges: Mapping[str, Range] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module, self.plan, self.codes, self.aliases, self.paid = module, plan, codes, aliases, paid
        self.ranges, self.beside = dict(ranges or {}), dict(beside or {})
        self.shortened = shortened(module, plan) - codes.keys()
        self.fast_layout = False

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def grids(self) -> dict[str, ranges.Grid]:
        """The ranges of layers' inputs as a file carries them, by layer name."""
        return {name: found.grid() for name, found in self.ranges.items()}

    def substitutes(self) -> dict[str, Tensor]:
        """By state key what the model computes with: the weights of all codes, shared ones under each of their names,
        and parameters that are shortened or zero in places."""
        values = {key: code.values() for key, code in self.codes.items()}
        if self.fast_layout:
            values = {key: in_fast_layout(value) for key, value in values.items()}
        values |= {alias: values[key] for alias, key in self.aliases.items()}
        for key, parameter in self.module.named_parameters():
            if key in self.shortened:
                values[key] = in_short(parameter)
            if key in self.beside:
                values[key] = values.get(key, parameter) * self.beside[key]
        return values

    def lay_out(self, fast: bool) -> None:
        """Have weights, parameters and buffers of four axes in the layout that trains fast, or as they come."""
        self.fast_layout = fast
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = in_fast_layout(tensor.data) if fast else tensor.data.contiguous()

    def broken(self) -> str | None:
        """The first of what training moves that has a value that is not finite, None where there is none."""
        for key, code in self.codes.items():
            if not all(bool(tensor.isfinite().all()) for group in code.trained() for tensor in group):
                return key
        coded = {*self.codes, *self.aliases}
        moved: dict[str, Tensor] = {}
        moved |= {key: p for key, p in self.module.named_parameters() if key not in coded and p.requires_grad}
        moved |= {key: b for key, b in self.module.named_buffers() if key.endswith(("running_mean", "running_var"))}
        for key, tensor in moved.items():
            if not bool(tensor.isfinite().all()):
                return key
        return next((name for name, found in self.ranges.items() if not bool(found.state().isfinite().all())), None)

    def others(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained as they are: all but the coded and the frozen ones."""
        coded = {*self.codes, *self.aliases}
        for key, parameter in self.module.named_parameters():
            if key not in coded and parameter.requires_grad:
                yield parameter

    def encode(self) -> dict[str, Coded | Raw]:
        """Every tensor of the model's state by key, shared ones once."""
        result: dict[str, Coded | Raw] = {}
        for key, tensor in unique_state(self.module).items():
            if key in self.codes:
                code = self.codes[key]
                result[key] = code.encode()
                if isinstance(code, Code) and (scale := code.scale()) is not None:
                    result[f"{key}{SCALE}"] = scale
            else:
                result[key] = raw_tensor(tensor.bfloat16() if key in self.shortened else tensor)
        return result

    def state(self) -> State:
        """What a later trial can go on from."""
        tensors = {key: tensor.detach().clone() for key, tensor in unique_state(self.module).items()}
        for key, code in self.codes.items():
            tensors[key] = code.full()
            tensors[f"{key}#unit"] = torch.tensor(code.unit, dtype=torch.float64)
            if code.table is not None:
                tensors[f"{key}#table"] = code.table.detach().clone()
            if code.step is not None:
                tensors[f"{key}#step"] = code.step.detach().clone()
            if isinstance(code, Code) and code.low is not None:
                tensors[f"{key}#low"] = code.low.clone()
            if isinstance(code, Code) and code.chosen:
                tensors[f"{key}#mask"] = code.mask()
        tensors |= {f"{name}#act": found.state() for name, found in self.ranges.items()}
        return State(self.plan, tensors)


def compress(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    plan: Plan,
    svds: SvdSource,
    start: State | None = None,
    *,
    factoriser: Factoriser | None = None,
    calibration: Callable[[], Any] | None = None,
    grids: GridSource | None = None,
    units: Units | None = None,
) -> Compressed:
    """A compressed copy of the model; the model itself is not touched.

    `svds(spec, scheme)` gives the SVD of the layer's original weight, `factoriser` all that a plan's `svd` and
    `scheme` may ask for besides (without one, every svd is plain); the result's plan has schemes settled.
    With `start`, weights go on from that state instead: factors of the same rank, scheme and svd as they are, others
    made anew; tables and steps as they are where the layer's plan is the same, else fitted anew.
    `grids(spec, bits)` gives the first range of a layer's inputs; only plans with few activation bits need it.
    `units` says which units go; only plans of less width need it. Units that a state lacks and the plan keeps come back
    as the model has them.
    `calibration()` gives a batch of inputs, with which layers are looked at whose saliency or rounding asks for it
    (`prepare`); from a state of another plan they are solved anew. Raises TrialFailed for weights that are not
    finite, and where there is no calibration; PlanError for units that cannot go.
    """
    module = copy.deepcopy(model)
    _with_dense_gradients(module)
    made = Factoriser(model, svds) if factoriser is None else factoriser
    plan = replace(plan, layers={spec.name: made.settled(spec, plan.layers[spec.name]) for spec in specs})
    kept = _kept(plan, specs, units)
    moved: frozenset[str] = frozenset()
    if start is not None:
        before = _kept(start.plan, specs, units)
        _take_over(module, specs, start)
        _bring_back(module, model, before, kept, {spec.name: spec.key for spec in specs})
        moved = before.differing(kept)
    module, keys = _in_place(module, specs, plan, made, start, kept=kept, moved=moved)
    beside = _without(module, plan, kept)
    for key in keys:
        if not torch.isfinite(module.get_parameter(key)).all():
            raise TrialFailed(f"weight {key!r} holds values that are not finite")
    codes = _codes(module, keys, plan, start, kept=kept, moved=moved, calibration=calibration)
    found = _ranges(module, specs, plan, start, grids)
    paid = 0.0 if start is None else start.plan.recipe.rate
    return Compressed(module, plan, codes, _aliases(module, codes), paid, ranges=found, beside=beside)


def _with_dense_gradients(module: nn.Module) -> None:
    """Codes are dense, and so are the gradients that pass through them to a table."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False


def _in_place(
    module: nn.Module,
    specs: Sequence[LayerSpec],
    plan: Plan,
    factoriser: Factoriser,
    start: State | None,
    *,
    kept: Kept,
    moved: Collection[str],
) -> tuple[nn.Module, dict[str, LayerSpec]]:
    """The module with factors where the plan has ranks, and the layer of each weight or factor by state key."""
    keys: dict[str, LayerSpec] = {}
    for spec in specs:
        layer = plan.layers[spec.name]
        prefix = f"{spec.name}." if spec.name else ""
        if layer.rank is None:
            keys[spec.key] = spec
            continue
        begun = start
        if start is not None and spec.name in moved:  # its factors are of other rows: they are made anew
            begun = replace(start, plan=uncompressed(specs))
        module = _factorise(module, spec, layer, factoriser, begun, rows=kept.rows.get(spec.name))
        keys |= {f"{prefix}{i}.weight": spec for i in range(lowrank.parts_of(layer.scheme))}
    first = {id(tensor): key for key, tensor in unique_state(module).items()}
    return module, {first[id(module.get_parameter(key))]: spec for key, spec in keys.items()}


def _codes(
    module: nn.Module,
    keys: Mapping[str, LayerSpec],
    plan: Plan,
    start: State | None,
    *,
    kept: Kept,
    moved: Collection[str],
    calibration: Callable[[], Any] | None,
) -> dict[str, Code | RatedCode]:
    """By state key the codes of all weights that the plan compresses, and under a rate of the biases beside them."""
    learned: dict[str, Mapping[str, Tensor]] = {
        key: {} if start is None else _learned(start, plan, spec.name, moved) for key, spec in keys.items()
    }
    units = {key: kept.rows[spec.name] for key, spec in _last(keys) if spec.name in kept.rows}
    padding = _padding(module)
    rows = units | {key: stays & units[key].to(stays) if key in units else stays for key, stays in padding.items()}
    tables = frozenset(key for key, spec in keys.items() if spec.kind in LOOKED_UP)
    plans = {key: plan.layers[spec.name] for key, spec in keys.items()}
    plans = {key: layer for key, layer in plans.items() if layer != LayerPlan()}
    by_key = replace(plan, layers=plans)
    looked_at = {
        key: layer
        for key, layer in plans.items()
        if keys[key].seen
        and (layer.rounding == "hessian" if is_rated(plan, layer) else solve.is_calibrated(layer))
        and (start is None or learned[key] is not start.tensors)
    }
    codes: dict[str, Code | RatedCode] = {}
    for key, layer in plans.items():
        if is_rated(plan, layer) and bias_beside(key) not in keys:
            codes |= _rated_bias(module, key, learned[key], units.get(key))
        if key not in looked_at:
            codes[key] = _code(module, by_key, key, learned[key], rows=rows, tables=tables)
    if looked_at:
        codes |= _calibrated(
            module, replace(plan, layers=looked_at), codes, learned, calibration, rows=rows, tables=tables
        )
        codes = {key: codes[key] for key in unique_state(module) if key in codes}
    return codes


def _aliases(module: nn.Module, codes: Collection[str]) -> dict[str, str]:
    """The other state keys of coded tensors, each place in a module once.

    A module that has several names is one place: substituted twice, it would be put back as it was in between.
    """
    first = {id(tensor): key for key, tensor in unique_state(module).items()}
    found: dict[str, str] = {}
    places: set[tuple[int, str]] = set()
    for key, tensor in module.state_dict(keep_vars=True).items():
        owner, _, name = key.rpartition(".")
        place = id(module.get_submodule(owner)), name
        if place not in places and (own := first.get(id(tensor), key)) != key and own in codes:
            found[key] = own
        places.add(place)
    return found


def _kept(plan: Plan, specs: Sequence[LayerSpec], units: Units | None) -> Kept:
    """The units that stay under a plan."""
    if units is not None:
        return units.kept(plan)
    for spec in specs:
        if spec.units(plan.layers[spec.name]) < spec.shape[0]:
            width = plan.layers[spec.name].width
            raise PlanError(f"layer {spec.label!r}: width is {width:g}, allowed: 1 (nothing tells which units can go)")
    return Kept({}, {})


def _bring_back(module: nn.Module, model: nn.Module, before: Kept, now: Kept, keys: Mapping[str, str]) -> None:
    """Give units that stay now and did not before what the model has for them; `keys` are weights' by layer name."""
    mine, theirs = module.state_dict(), model.state_dict()
    gone = {keys[name]: (rows, now.rows.get(name)) for name, rows in before.rows.items()}
    for key, rows in before.beside.items():
        owner = key.rpartition(".")[0]
        statistics = [f"{owner}.{name}".lstrip(".") for name in ("running_mean", "running_var")]
        gone |= {k: (rows, now.beside.get(key)) for k in (key, *statistics) if k in mine}
    for key, (old, new) in gone.items():
        back = ~old if new is None else new & ~old
        mine[key][back] = theirs[key][back]


def _last(keys: Mapping[str, LayerSpec]) -> list[tuple[str, LayerSpec]]:
    """Of the keys of each layer the last: that of the weight, or of the factor, whose rows are the layer's outputs."""
    return list({spec.name: (key, spec) for key, spec in keys.items()}.values())


def _without(module: nn.Module, plan: Plan, kept: Kept) -> dict[str, Tensor]:
    """Zero what stands beside the rows that go; by state key what holds it there, 1 for units that stay."""
    renamed = {
        f"{name}.bias".lstrip("."): f"{name}.{lowrank.parts_of(layer.scheme) - 1}.bias".lstrip(".")
        for name, layer in plan.layers.items()
        if layer.rank is not None
    }
    held: dict[str, Tensor] = {}
    for key, stays in kept.beside.items():
        name = renamed.get(key, key)
        parameter = module.get_parameter(name)
        held[name] = stays.to(parameter)
        parameter.data *= held[name]
    return held


def _ranges(
    module: nn.Module, specs: Sequence[LayerSpec], plan: Plan, start: State | None, grids: GridSource | None
) -> dict[str, Range]:
    """The ranges of the layers whose inputs get few bits, attached to the module's layers."""
    found: dict[str, Range] = {}
    for spec in specs:
        bits = plan.layers[spec.name].activation_bits
        if bits == FLOAT_BITS:
            continue
        if grids is None:
            raise PlanError(f"layer {spec.label!r}: activation_bits is {bits}, allowed: 32 (no inputs to calibrate on)")
        grid = grids(spec, bits)
        device = next((parameter.device for parameter in module.get_submodule(spec.name).parameters()), None)
        made = Range(grid, device)
        if start is not None and start.plan.layers[spec.name].activation_bits == bits:
            made.with_state(start.tensors[f"{spec.name}#act"])
        others = [path for path in spec.shared_with if is_layer(module.get_submodule(path))]
        ranges.attach(module, spec.name, made, others)
        found[spec.name] = made
    return found


def _calibrated(
    module: nn.Module,
    plan: Plan,
    others: Mapping[str, Code | RatedCode],
    learned: Mapping[str, Mapping[str, Tensor]],
    calibration: Callable[[], Any] | None,
    *,
    rows: Mapping[str, Tensor],
    tables: Collection[str],
) -> dict[str, Code | RatedCode]:
    """The codes of weights whose plans ask for the layers' inputs; the plan's layers are those, by state key."""
    if calibration is None:
        name = next(iter(plan.layers)).rpartition(".")[0]
        raise TrialFailed(f"layer {name!r} needs calibration data, and none is given")
    inputs = calibration()
    codes: dict[str, Code | RatedCode] = {}
    rated = {key for key, layer in plan.layers.items() if is_rated(plan, layer)}
    elements = sum(module.get_parameter(key).numel() for key in rated)
    elements += sum(code.weights.numel() for code in others.values() if isinstance(code, RatedCode))
    labels = {key: key.removesuffix(".weight") for key in plan.layers}
    bit = priced.EXCHANGE * plan.recipe.rate * len(rated) / max(1, elements)

    def solved(key: str, weight: Tensor, moments: calibrate.Moments, groups: int) -> solve.Prepared:
        found = moments.statistics()
        if not (found.gram.isfinite().all() and found.mean.isfinite().all()):
            raise TrialFailed(f"layer {labels[key]!r}: its calibration inputs are not finite")
        unit, drift, own = unit_of(weight, learned[key], key), moments.drift, weight
        if (stays := rows.get(key)) is not None:
            own, found, drift, groups = solve.of_rows(weight, found, drift, groups, stays)
        given = own, plan.layers[key], unit, found
        if key in rated:
            prepared = priced.solve(*given, bit=bit, drift=drift, groups=groups)
        else:
            prepared = solve.solve(*given, drift=drift, groups=groups)
        return prepared if stays is None else solve.among_rows(prepared, weight, stays)

    def values(key: str, prepared: solve.Prepared) -> Tensor:
        codes[key] = _code(module, plan, key, learned[key], prepared, rows=rows, tables=tables)
        return codes[key].values().detach()

    plain = {key: code.values().detach() for key, code in others.items()}
    prepare(module, plain, labels, solved, values, lambda model: call_with(model, {}, inputs))
    for key in plan.layers:
        if key not in codes:
            codes[key] = _code(module, plan, key, {}, rows=rows, tables=tables)
    return codes


def _code(
    module: nn.Module,
    plan: Plan,
    key: str,
    learned: Mapping[str, Tensor],
    prepared: solve.Prepared | None = None,
    *,
    rows: Mapping[str, Tensor],
    tables: Collection[str],
) -> Code | RatedCode:
    """A weight's code: from what was prepared, else from what was learned, else from itself. The plan is by key.

    `rows`: those that stay, of weights that lose some; `tables`: the keys of what is looked up.
    """
    weight, layer = module.get_parameter(key), plan.layers[key]
    stays = rows[key].to(weight.device) if key in rows else None
    if is_rated(plan, layer):
        begun, step = _rated(weight, layer, learned, key, prepared, rows=stays)
        return RatedCode(begun, layer.bits, step, unit_of(weight, learned, key), stays, looked_up=key in tables)
    return Code(weight, layer, learned, key, prepared, rows=stays)


def is_rated(plan: Plan, layer: LayerPlan) -> bool:
    """Whether a layer's bits are priced: it must have levels, with a zero among them."""
    return plan.recipe.rate > 0 and 2 <= layer.bits <= 8


def _rated(
    weight: Tensor,
    layer: LayerPlan,
    learned: Mapping[str, Tensor],
    key: str,
    prepared: solve.Prepared | None,
    *,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor | float]:
    """Where a weight under a rate begins: the float weights, and the grid's step, least squares unless it is known.

    What lies below the threshold starts at zero.
    """
    if prepared is not None and prepared.step is not None:
        return prepared.weight, prepared.step
    step = learned.get(f"{key}#step")
    if step is not None:
        return weight, step
    kept = weight * prune.kept_mask(weight, layer.threshold, unit_of(weight, learned, key), rows)
    return kept, quantize.grid_step(kept[kept != 0], layer.bits)


def _padding(module: nn.Module) -> dict[str, Tensor]:
    """By state key the rows of tables that are no padding of zeros: no gradient would mend what a code made of it."""
    first = {id(tensor): key for key, tensor in unique_state(module).items()}
    found: dict[str, Tensor] = {}
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None:
            stays = part.weight.new_ones(len(part.weight), dtype=torch.bool)
            stays[part.padding_idx] = bool(part.weight[part.padding_idx].any())
            if not stays.all():
                found[first[id(part.weight)]] = stays
    return found


def _rated_bias(
    module: nn.Module, key: str, learned: Mapping[str, Tensor], rows: Tensor | None
) -> dict[str, RatedCode]:
    """The code of the bias beside a weight, if one is trained.

    The first step is a quarter of the biases' root mean square, or what it takes to reach the largest.
    """
    name = bias_beside(key)
    bias = dict(module.named_parameters()).get(name or "")
    if name is None or bias is None or bias.dtype != torch.float32 or not bias.requires_grad:
        return {}
    if not torch.isfinite(bias).all():
        raise TrialFailed(f"bias {name!r} holds values that are not finite")
    spread = float(bias.detach().double().square().mean().sqrt())
    reach = quantize.levels(BIAS_BITS)[1]
    step = learned.get(f"{name}#step", max(max(spread, 1e-3) / 4, float(bias.detach().abs().max()) / reach))
    return {name: RatedCode(bias, BIAS_BITS, step, spread, None if rows is None else rows.to(bias.device))}


def shortened(module: nn.Module, plan: Plan) -> frozenset[str]:
    """The keys of float32 tensors of a module, factorised as the plan says, that are carried in bfloat16.

    The bias of a layer of 16 bits or fewer; and where all layers have so few, what normalisation
    layers hold. Their 24 bits would outweigh the codes of a small layer.
    """
    short = [name for name, layer in plan.layers.items() if layer.bits <= SHORT_BITS]
    owners = {
        name if (layer := plan.layers[name]).rank is None else f"{name}.{lowrank.parts_of(layer.scheme) - 1}": ("bias",)
        for name in short
    }
    if len(short) == len(plan.layers):
        owners |= {name: _short_state(part) for name, part in module.named_modules() if isinstance(part, NORMS)}
    state = unique_state(module)
    wanted: set[str | None] = {f"{name}.{what}".lstrip(".") for name, whats in owners.items() for what in whats}
    wanted |= {bias_beside(name) for name in short if name in state}  # weights that are layers by themselves
    wanted -= plan.layers.keys()
    return frozenset(key for key in wanted if key in state and state[key].dtype == torch.float32)


def _short_state(norm: nn.Module) -> tuple[str, ...]:
    """What of a normalisation bears bfloat16: not means that are far from zero beside their deviations."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or variance is None:
        return _NORM_STATE
    far = mean.abs() > _FAR * (variance + norm.eps).sqrt()
    return tuple(name for name in _NORM_STATE if name != "running_mean" or not far.any())


def _learned(start: State, plan: Plan, name: str, moved: Collection[str]) -> Mapping[str, Tensor]:
    """What of a state's "#" entries fits a layer under the plan that goes on from it; `moved` lose or get units."""
    old, new = start.plan.layers[name], plan.layers[name]
    if (
        name not in moved
        and replace(old, activation_bits=new.activation_bits) == new
        and is_rated(start.plan, old) == is_rated(plan, new)
    ):
        return start.tensors
    whole = old.rank is None and new.rank is None
    if whole or old.factorisation == new.factorisation:
        return {key: tensor for key, tensor in start.tensors.items() if key.endswith("#unit")}
    return {}


def _take_over(module: nn.Module, specs: Sequence[LayerSpec], start: State) -> None:
    """Copy a state's tensors into a module that is not factorised yet."""
    factorised = [s for s in specs if start.plan.layers[s.name].rank is not None]
    last = {s.name: lowrank.parts_of(start.plan.layers[s.name].scheme) - 1 for s in factorised}
    bias_of = {f"{name}.bias".lstrip("."): f"{name}.{index}.bias".lstrip(".") for name, index in last.items()}
    whole = {f"{s.name}.weight".lstrip("."): _product(s, start) for s in factorised}
    with torch.no_grad():
        for key, tensor in unique_state(module).items():
            source = whole.get(key, start.tensors.get(bias_of.get(key, key)))
            if source is None or source.shape != tensor.shape:
                raise TrialFailed(f"the state to start from has no {key!r} of shape {list(tensor.shape)}")
            tensor.copy_(source)


def _held(spec: LayerSpec, start: State) -> list[Tensor]:
    """A state's factors of a layer."""
    count = lowrank.parts_of(start.plan.layers[spec.name].scheme)
    return [start.tensors[f"{spec.name}.{i}.weight".lstrip(".")] for i in range(count)]


def _product(spec: LayerSpec, start: State) -> Tensor:
    """The whole weight that a state's factors stand for."""
    return lowrank.multiplied(_held(spec, start), spec.shape, start.plan.layers[spec.name].scheme)


def _factorise(
    module: nn.Module,
    spec: LayerSpec,
    plan: LayerPlan,
    factoriser: Factoriser,
    start: State | None,
    *,
    rows: Tensor | None,
) -> nn.Module:
    """The module with factors in the layer's place, weights set, and the mean of its outputs mended where it can be.

    Only the rows that stay are approximated (`rows`, bool (out,)).
    """
    target = module.get_submodule(spec.name)
    weight: Tensor = target.weight  # type: ignore[assignment]
    places = lowrank.factorised(target, plan)
    shift: Tensor | None = None
    if start is not None and start.plan.layers[spec.name].factorisation == plan.factorisation:
        weights: Sequence[Tensor] = _held(spec, start)
    else:
        own = weight.detach() if rows is None else weight.detach() * prune.kept_mask(weight, 0.0, 1.0, rows)
        made = factoriser.factors(spec, plan, None if start is None and rows is None else own)
        weights, shift = made.weights, made.shift
    with torch.no_grad():
        for place, factor in zip(places, weights, strict=True):
            place.weight.copy_(factor)  # type: ignore[operator]
        bias: Tensor | None = target.bias  # type: ignore[assignment]
        if shift is not None and bias is not None:
            bias += shift.to(bias)
        elif shift is not None and (norm := factoriser.activation(spec).norm) is not None:
            mean: Tensor = module.get_submodule(norm).running_mean  # type: ignore[assignment]
            mean -= shift.to(mean)
    return lowrank.replace(module, spec.name, places)


def in_fast_layout(tensor: Tensor) -> Tensor:
    """Images and their kernels with channels last in memory, on which CPU convolutions train about 1.8x faster.

    `.to` and not `.contiguous`, which leaves the strides of a single channel as they are.
    """
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def call_with(module: nn.Module, substitutes: Mapping[str, Tensor], inputs: Any) -> Any:
    """The module's output with some of its tensors substituted, for a tensor, tuple or mapping of inputs."""
    args, kwargs = as_call(inputs)
    with _lists_held(module):
        return torch.func.functional_call(module, dict(substitutes), args, kwargs, tie_weights=False)


@contextmanager
def _lists_held(module: nn.Module) -> Iterator[None]:
    """Recurrent layers keep a list of the weights of their last call: substitutes left there could not be copied.

    Nor do they move substitutes into one piece of memory, as they do with their weights on CUDA: these are results of
    other operations, whose gradients would be lost.
    """
    held = [(part, part._flat_weights) for part in module.modules() if isinstance(part, nn.RNNBase)]
    for part, _ in held:
        part.__dict__["flatten_parameters"] = lambda: None
    try:
        yield
    finally:
        for part, weights in held:
            del part.__dict__["flatten_parameters"]
            part._flat_weights = weights
