"""A search space of one model: named knobs -> parameters -> a `Plan`.

A `Space` holds, for each layer, a setting per option: a fixed value, or a `Knob` whose value a
sampler chooses. Ranks and bit-widths are ints and thresholds floats, so that every Optuna
sampler can use them. `space_file` reads spaces, `space_rules` settles them for a model's layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from autocompress.errors import SpaceError
from autocompress.plan import FLOAT_BITS, LOOKED_UP, LayerPlan, LayerSpec, Plan, Recipe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Knob:
    """One parameter of the search: a number from `low` to `high`, both ends included.

    With `choices`, rising, the number is a place among them, 0 the first; a sampler sees a whole number like any other.
    """

    name: str
    low: float
    high: float
    kind: Literal["int", "float"]
    log: bool = False
    choices: tuple[int, ...] = ()

    def value_of(self, number: float) -> float:
        """What a number of the knob means: a choice, or itself."""
        return self.choices[int(number)] if self.choices else number

    def number_for(self, value: float) -> float:
        """The number that means a value, or what is nearest to it."""
        if not self.choices:
            return self.clip(value)
        return min(range(len(self.choices)), key=lambda place: abs(self.choices[place] - value))

    def at(self, share: float) -> float:
        """The value at 0 (low) to 1 (high) along the knob's own scale."""
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return self.clip(value)

    def clip(self, value: float) -> float:
        """The nearest value in range; a whole number for an int knob. Raises SpaceError for NaN."""
        if math.isnan(value):
            raise SpaceError(f"parameter {self.name!r} is nan, allowed: {self.low:g} to {self.high:g}")
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.kind == "int" else float(inside)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


_ADDED = (("rate", 0.0), ("infomax", 0.0))
"""Settings that recipes once lacked: fingerprints leave them out at these values, so that old studies go on."""
Setting = Knob | float
"""A fixed number, or the knob that gives it."""


@dataclass(frozen=True)
class LayerSettings:
    """How one layer may be compressed: each number fixed, or a knob.

    `rank` None is the whole layer. In a group the knobs are shared by its members, and the rank
    knob counts per cent of each member's full rank. A rank knob of floats is a tolerance: it means the smallest rank
    of `errors`, pairs of a rank and its error, ranks rising, that is within it.
    """

    spec: LayerSpec
    rank: Knob | int | None
    bits: Setting
    threshold: Setting
    scheme: str
    quantizer: str
    group: str | None = None
    svd: str = "plain"
    errors: tuple[tuple[int, float], ...] = ()
    saliency: str = "magnitude"
    rounding: str = "nearest"
    granularity: str | int = "tensor"
    activation_bits: Setting = FLOAT_BITS
    width: Setting = 1.0

    @property
    def owner(self) -> str:
        """What the names of the layer's knobs begin with: its group, else its own label."""
        return self.group or self.spec.label

    @property
    def knobs(self) -> tuple[Knob, ...]:
        settings = (self.rank, self.width, self.bits, self.threshold, self.activation_bits)
        return tuple(s for s in settings if isinstance(s, Knob))

    def rank_of(self, value: float) -> int | None:
        """The rank that a value of the rank knob means; None where two factors would be larger than the layer."""
        if isinstance(self.rank, Knob) and self.rank.kind == "float":
            return rank_within(value, self.errors)
        rank = int(value) if self.group is None else fraction_of_rank(value / 100, self.spec, self.scheme)
        return rank if rank <= self.spec.max_rank(self.scheme) else None

    def plan(self, params: Mapping[str, float]) -> LayerPlan:
        rank = self.rank_of(params[self.rank.name]) if isinstance(self.rank, Knob) else self.rank
        bits, threshold = int(_value(self.bits, params)), float(_value(self.threshold, params))
        way: dict[str, Any] = {"saliency": self.saliency, "rounding": self.rounding, "granularity": self.granularity}
        way["activation_bits"] = int(_value(self.activation_bits, params))
        way["width"] = float(_value(self.width, params))
        return LayerPlan(rank, bits, threshold, self.scheme, self.quantizer, svd=self.svd, **way)


@dataclass(frozen=True)
class Space:
    """What may be searched for one model.

    `source` is the mapping as read (plain JSON types), for the record; `recipe` holds a setting
    for fields of `Recipe`, None for epochs that the file leaves to the search; fields not named have their defaults.
    """

    name: str
    source: Mapping[str, Any]
    layers: tuple[LayerSettings, ...]
    recipe: Mapping[str, Setting | str | None]

    @cached_property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs in the order of the layers, then the recipe's; those of a group once."""
        recipe = (s for s in self.recipe.values() if isinstance(s, Knob))
        return tuple(dict.fromkeys([*(knob for layer in self.layers for knob in layer.knobs), *recipe]))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Each knob's Optuna distribution, by name."""
        return {knob.name: knob.distribution() for knob in self.knobs}

    def plan(self, params: Mapping[str, float], default_epochs: float) -> Plan:
        """The plan that the parameters mean. Raises SpaceError where one is missing, unknown or out of range."""
        for knob in self._named(params):
            if knob.clip(params[knob.name]) != params[knob.name]:
                what = "a whole number from" if knob.kind == "int" else ""
                allowed = f"{what} {knob.low:g} to {knob.high:g}".strip()
                raise SpaceError(f"parameter {knob.name!r} is {params[knob.name]}, allowed: {allowed}")
        recipe: dict[str, Any] = {
            name: default_epochs if s is None else s if isinstance(s, str) else _value(s, params)
            for name, s in self.recipe.items()
        }
        return Plan({layer.spec.name: layer.plan(params) for layer in self.layers}, Recipe(**recipe))

    def params_for(self, plan: Plan) -> dict[str, float]:
        """The parameters whose plan is nearest to the one given: exact for the space's own plans."""
        wanted = {layer.spec.name: plan.layers[layer.spec.name] for layer in self.layers}
        params: dict[str, float] = {}
        for layer in self.layers:
            mine = wanted[layer.spec.name]
            for option in ("bits", "threshold", "activation_bits", "width"):
                if isinstance(knob := getattr(layer, option), Knob):
                    params.setdefault(knob.name, knob.number_for(getattr(mine, option)))
            if isinstance(layer.rank, Knob) and layer.rank.name not in params:
                params[layer.rank.name] = self._rank_value(layer.rank, wanted)
        for name, setting in self.recipe.items():
            if isinstance(setting, Knob):
                params[setting.name] = setting.clip(getattr(plan.recipe, name))
        return params

    def middle(self, epochs: float) -> Plan:
        """The plan with every knob in the middle of its range."""
        return self.plan(self.clip({knob.name: knob.at(0.5) for knob in self.knobs}), epochs)

    def clip(self, params: Mapping[str, float]) -> dict[str, float]:
        """The parameters moved to the nearest values in range. Raises SpaceError for missing or unknown names."""
        return {knob.name: knob.clip(params[knob.name]) for knob in self._named(params)}

    def combinations(self) -> int:
        """The number of distinct plans, float knobs left out; all ranks that mean the whole layer count once."""
        return math.prod(self._choices(knob) for knob in self.knobs if knob.kind == "int")

    def size(self) -> float:
        """The number of distinct plans: infinite with any float knob."""
        return math.prod(float(self._choices(k)) if k.kind == "int" else math.inf for k in self.knobs)

    def fingerprint(self) -> str:
        """16 hex digits that change with any knob or fixed value, and with nothing else."""
        layers = [_told(layer) | {"spec": layer.spec.label} for layer in self.layers]
        layers = [{k: v for k, v in la.items() if k != "errors"} for la in layers]
        recipe = {name: _told(s) if isinstance(s, Knob) else s for name, s in self.recipe.items()}
        recipe = {k: v for k, v in recipe.items() if (k, v) not in _ADDED}
        text = json.dumps([layers, recipe], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _named(self, params: Mapping[str, float]) -> tuple[Knob, ...]:
        names = {knob.name for knob in self.knobs}
        if missing := sorted(names - params.keys()):
            raise SpaceError(f"parameters lack {missing[0]!r}, which the space {self.name!r} searches")
        if unknown := sorted(params.keys() - names):
            raise SpaceError(f"parameter {unknown[0]!r} is not one of the space {self.name!r}: {listed(names)}")
        return self.knobs

    def sharing(self, knob: Knob) -> tuple[LayerSettings, ...]:
        """The layers whose rank the knob sets; none for another kind of knob."""
        return tuple(layer for layer in self.layers if layer.rank == knob)

    def wholest(self, knob: Knob) -> float:
        """The value of a rank knob next to the others that leaves all its layers whole; its mild end if none does."""
        if knob.kind == "float":
            return knob.low
        layers, values = self.sharing(knob), range(int(knob.low), int(knob.high))

        def whole(value: int) -> bool:
            return bool(layers) and all(layer.rank_of(value) is None for layer in layers)

        return values.start + bisect_left(values, True, key=whole)

    def _choices(self, knob: Knob) -> int:
        sharing = self.sharing(knob)
        if not sharing or sharing[0].group is None:
            return int(self.wholest(knob) - knob.low) + 1
        values = range(int(knob.low), int(knob.high) + 1)
        return len({tuple(layer.rank_of(value) for layer in sharing) for value in values})

    def _rank_value(self, knob: Knob, wanted: Mapping[str, LayerPlan]) -> float:
        sharing = self.sharing(knob)
        if knob.kind == "int" and sharing[0].group is None:
            rank = wanted[sharing[0].spec.name].rank
            return knob.high if rank is None else knob.clip(rank)

        def distance(value: float) -> float:
            pairs = [(la.rank_of(value), wanted[la.spec.name].rank, la.spec.full_rank(la.scheme)) for la in sharing]
            return sum(abs((got or full) - (want or full)) / full for got, want, full in pairs)

        if knob.kind == "float":
            errors = (knob.clip(error) for layer in sharing for _, error in layer.errors)
            return min(sorted({knob.low, knob.high, *errors}), key=distance)
        return min(range(int(knob.high), int(knob.low) - 1, -1), key=distance)


def ladder(space: Space, specs: Sequence[LayerSpec], steps: int) -> list[dict[str, float]]:
    """Parameters of at most `steps` different plans, from mild to strong; the middle one for `steps` 1.

    At strength s, from 0 to 1, a layer's bits and width are at 1 - s of their ranges and its threshold at s;
    it stays whole (as whole as the space lets it) unless rank is its only knob, which then falls
    with s. Small layers go at half that strength, and the first and last layer at three quarters
    unless they hold more than an even share of the weights. Recipe knobs stay in the middle.
    """
    strengths = [0.5] if steps == 1 else [step / (steps - 1) for step in range(steps)]
    owners = {layer.spec.name: layer.owner for layer in space.layers}
    places = positions(specs)
    portions, firmness = shares(specs), dict.fromkeys(owners.values(), 0.0)
    for index, spec in enumerate(specs):
        at_end = places[index] != {"middle"} and portions[index] * len(specs) < 1
        factor = 0.5 if size_class(portions, index) == "small" else 0.75 if at_end else 1.0
        firmness[owners[spec.name]] = max(firmness[owners[spec.name]], factor)
    rungs: dict[str, dict[str, float]] = {}
    for strength in strengths:
        params = _uniform(space, firmness, strength)
        rungs.setdefault(space.plan(params, default_epochs=1.0).key(), params)
    return list(rungs.values())


def _uniform(space: Space, firmness: Mapping[str, float], strength: float) -> dict[str, float]:
    params = {s.name: s.at(0.5) for s in space.recipe.values() if isinstance(s, Knob)}
    for layer in space.layers:
        push = strength * firmness[layer.owner]
        if isinstance(layer.bits, Knob):
            params[layer.bits.name] = layer.bits.at(1 - push)
        if isinstance(layer.threshold, Knob):
            params[layer.threshold.name] = layer.threshold.at(push)
        if isinstance(layer.activation_bits, Knob):
            params[layer.activation_bits.name] = layer.activation_bits.at(1 - push)
        if isinstance(layer.width, Knob):
            params[layer.width.name] = layer.width.at(1 - push)
        if isinstance(layer.rank, Knob):
            knob, top = layer.rank, space.wholest(layer.rank)
            alone = len(layer.knobs) == 1
            if knob.kind == "float":
                params[knob.name] = knob.at(push) if alone else knob.low
            else:
                params[knob.name] = knob.clip(top - push * (top - knob.low)) if alone else knob.high
    return params


def _value(setting: Setting, params: Mapping[str, float]) -> float:
    return setting.value_of(params[setting.name]) if isinstance(setting, Knob) else setting


_LATER = {
    "svd": "plain",
    "activation_bits": FLOAT_BITS,
    "choices": (),
    "saliency": "magnitude",
    "rounding": "nearest",
    "granularity": "tensor",
    "width": 1.0,
}
"""What came later: a space that leaves it alone has the fingerprint that it had before."""


def _told(value: Knob | LayerSettings) -> dict[str, Any]:
    """The fields as a table, those of knobs inside too, without what came later and says nothing."""
    return asdict(value, dict_factory=lambda items: {k: v for k, v in items if k not in _LATER or _LATER[k] != v})


def mildest(name: str, widths: Sequence[Setting]) -> Setting:
    """The one width for layers that share their units, as far as the mildest goes; a new knob where theirs differ."""
    if len(set(widths)) == 1:
        return widths[0]
    low = max(width.low if isinstance(width, Knob) else width for width in widths)
    high = max(width.high if isinstance(width, Knob) else width for width in widths)
    return high if low == high else Knob(name, low, high, "float")


def rank_within(tolerance: float, errors: Sequence[tuple[int, float]]) -> int | None:
    """The smallest rank whose error is within the tolerance; None, the whole layer, where none is."""
    return next((rank for rank, error in errors if error <= tolerance), None)


def fraction_of_rank(fraction: float, spec: LayerSpec, scheme: str) -> int:
    return max(1, round(fraction * spec.full_rank(scheme)))


def shares(specs: Sequence[LayerSpec]) -> list[float]:
    """Each layer's share of all weights."""
    total = sum(spec.parameters for spec in specs) or 1
    return [spec.parameters / total for spec in specs]


def positions(specs: Sequence[LayerSpec]) -> list[set[str]]:
    """Of each layer: first, last (both if it is the only one) or middle, tables that are looked up not counted."""
    counted = [index for index, spec in enumerate(specs) if spec.kind not in LOOKED_UP] or list(range(len(specs)))
    ends = {"first": counted[0], "last": counted[-1]}
    return [{name for name, at in ends.items() if at == index} or {"middle"} for index in range(len(specs))]


def size_class(portions: Sequence[float], index: int) -> str:
    """small: under 2 % of the weights and under a fifth of an even share; else large."""
    return "small" if portions[index] < min(0.02, 0.2 / len(portions)) else "large"


def listed(names: Iterable[str]) -> str:
    some = list(names)
    more = f" and {len(some) - 10} more" if len(some) > 10 else ""
    return ", ".join(map(repr, some[:10])) + more
