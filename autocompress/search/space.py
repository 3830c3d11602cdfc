"""A search space: YAML rules + the model's layers -> named knobs -> parameters -> a `Plan`.

A `Space` holds, for each layer, a setting per option: a fixed value, or a `Knob` whose value a
sampler chooses. Ranks and bit-widths are ints and thresholds floats, so that every Optuna
sampler can use them. docs/search-spaces.md describes the files for users.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from autocompress.errors import SpaceError
from autocompress.plan import BIT_WIDTHS, FLOAT_BITS, QUANTIZERS, SCHEMES, LayerPlan, LayerSpec, Plan, Recipe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

VERSION = 1
MAX_FILE_BYTES = 1_000_000
KINDS = ("linear", "conv", "conv1d", "conv2d", "conv3d")
POSITIONS = ("first", "middle", "last")
SIZES = ("small", "large")
FULL = "full"
WIDEST_CODE = 8
"""The widest bit-width that a range may reach; 16 and 32 are formats, not points of a scale."""


# What a space is: knobs, settings, and the plan that follows from parameters


@dataclass(frozen=True)
class Knob:
    """One parameter of the search: a number from `low` to `high`, both ends included."""

    name: str
    low: float
    high: float
    kind: Literal["int", "float"]
    log: bool = False

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


Setting = Knob | float
"""A fixed number, or the knob that gives it."""


@dataclass(frozen=True)
class LayerSettings:
    """How one layer may be compressed: each number fixed, or a knob.

    `rank` None is the whole layer. In a group the knobs are shared by its members, and the rank
    knob counts per cent of each member's full rank.
    """

    spec: LayerSpec
    rank: Knob | int | None
    bits: Setting
    threshold: Setting
    scheme: str
    quantizer: str
    group: str | None = None

    @property
    def owner(self) -> str:
        """What the names of the layer's knobs begin with: its group, else its own label."""
        return self.group or self.spec.label

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return tuple(s for s in (self.rank, self.bits, self.threshold) if isinstance(s, Knob))

    def rank_of(self, value: float) -> int | None:
        """The rank that a value of the rank knob means; None where two factors would be larger than the layer."""
        rank = int(value) if self.group is None else _fraction_of_rank(value / 100, self.spec, self.scheme)
        return rank if rank <= self.spec.max_rank(self.scheme) else None

    def plan(self, params: Mapping[str, float]) -> LayerPlan:
        rank = self.rank_of(params[self.rank.name]) if isinstance(self.rank, Knob) else self.rank
        bits, threshold = int(_value(self.bits, params)), float(_value(self.threshold, params))
        return LayerPlan(rank, bits, threshold, self.scheme, self.quantizer)


@dataclass(frozen=True)
class Space:
    """What may be searched for one model.

    `source` is the mapping as read (plain JSON types), for the record; `recipe` holds a setting
    for each field of `Recipe`, None for epochs that the file leaves to the search.
    """

    name: str
    source: Mapping[str, Any]
    layers: tuple[LayerSettings, ...]
    recipe: Mapping[str, Setting | None]

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
        recipe = {name: default_epochs if s is None else _value(s, params) for name, s in self.recipe.items()}
        return Plan({layer.spec.name: layer.plan(params) for layer in self.layers}, Recipe(**recipe))

    def params_for(self, plan: Plan) -> dict[str, float]:
        """The parameters whose plan is nearest to the one given: exact for the space's own plans."""
        wanted = {layer.spec.name: plan.layers[layer.spec.name] for layer in self.layers}
        params: dict[str, float] = {}
        for layer in self.layers:
            mine = wanted[layer.spec.name]
            for knob, value in ((layer.bits, mine.bits), (layer.threshold, mine.threshold)):
                if isinstance(knob, Knob):
                    params.setdefault(knob.name, knob.clip(value))
            if isinstance(layer.rank, Knob) and layer.rank.name not in params:
                params[layer.rank.name] = self._rank_value(layer.rank, wanted)
        for name, setting in self.recipe.items():
            if isinstance(setting, Knob):
                params[setting.name] = setting.clip(getattr(plan.recipe, name))
        return params

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
        layers = [asdict(layer) | {"spec": layer.spec.label} for layer in self.layers]
        recipe = {name: asdict(s) if isinstance(s, Knob) else s for name, s in self.recipe.items()}
        text = json.dumps([layers, recipe], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _named(self, params: Mapping[str, float]) -> tuple[Knob, ...]:
        names = {knob.name for knob in self.knobs}
        if missing := sorted(names - params.keys()):
            raise SpaceError(f"parameters lack {missing[0]!r}, which the space {self.name!r} searches")
        if unknown := sorted(params.keys() - names):
            raise SpaceError(f"parameter {unknown[0]!r} is not one of the space {self.name!r}: {_listed(names)}")
        return self.knobs

    def sharing(self, knob: Knob) -> tuple[LayerSettings, ...]:
        """The layers whose rank the knob sets; none for another kind of knob."""
        return tuple(layer for layer in self.layers if layer.rank == knob)

    def wholest(self, knob: Knob) -> int:
        """The lowest value of a rank knob that leaves all its layers whole; its high end if none does."""
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
        if sharing[0].group is None:
            rank = wanted[sharing[0].spec.name].rank
            return knob.high if rank is None else knob.clip(rank)

        def distance(value: int) -> float:
            pairs = [(la.rank_of(value), wanted[la.spec.name].rank, la.spec.full_rank(la.scheme)) for la in sharing]
            return sum(abs((got or full) - (want or full)) / full for got, want, full in pairs)

        return min(range(int(knob.high), int(knob.low) - 1, -1), key=distance)


def ladder(space: Space, specs: Sequence[LayerSpec], steps: int) -> list[dict[str, float]]:
    """Parameters of at most `steps` different plans, from mild to strong; the middle one for `steps` 1.

    At strength s, from 0 to 1, a layer's bits are at 1 - s of their range and its threshold at s;
    it stays whole (as whole as the space lets it) unless rank is its only knob, which then falls
    with s. Small layers go at half that strength, and the first and last layer at three quarters
    unless they hold more than an even share of the weights. Recipe knobs stay in the middle.
    """
    strengths = [0.5] if steps == 1 else [step / (steps - 1) for step in range(steps)]
    owners = {layer.spec.name: layer.owner for layer in space.layers}
    shares, firmness = _shares(specs), dict.fromkeys(owners.values(), 0.0)
    for index, spec in enumerate(specs):
        at_end = _position(index, len(specs)) != {"middle"} and shares[index] * len(specs) < 1
        factor = 0.5 if _size(shares, index) == "small" else 0.75 if at_end else 1.0
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
        if isinstance(layer.rank, Knob):
            knob, top = layer.rank, space.wholest(layer.rank)
            alone = len(layer.knobs) == 1
            params[knob.name] = knob.clip(top - push * (top - knob.low)) if alone else knob.high
    return params


def _value(setting: Setting, params: Mapping[str, float]) -> float:
    return params[setting.name] if isinstance(setting, Knob) else setting


def _fraction_of_rank(fraction: float, spec: LayerSpec, scheme: str) -> int:
    return max(1, round(fraction * spec.full_rank(scheme)))


# Where spaces come from: built-in files, a user's file, a mapping


def space_folder() -> Path:
    """The folder of the built-in spaces: inside the installed package, else the checkout's."""
    inside = Path(__file__).parents[1] / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "search_spaces"


def available() -> dict[str, str]:
    """The built-in spaces: name -> one line of description."""
    return {path.stem: _read_file(path).get("description", "") for path in sorted(space_folder().glob("*.yaml"))}


def load_space(source: str | Path | Mapping[str, Any] | None, specs: Sequence[LayerSpec]) -> Space:
    """The search space for a model's layers.

    `source` is a YAML file, the name of a built-in space, a mapping of the same form, or None for
    the built-in `default`, whose rules go by each layer's kind and size and so fit any model.
    Raises SpaceError, in one line naming file, key, value and what is allowed.
    """
    if isinstance(source, Mapping):
        name, file, read = "custom", "search space", source
    else:
        path = _find(source if source is not None else "default")
        name, file, read = path.stem, str(path), _read_file(path)
        if path.parent == space_folder():
            file = f"built-in space {name!r}"
    if not specs:
        raise SpaceError(f"{file}: the model has no layer to compress")
    return _build(name, _At(file), read, specs)


def _find(source: str | Path) -> Path:
    built_in = {path.stem: path for path in space_folder().glob("*.yaml")}
    if isinstance(source, str) and source in built_in:
        return built_in[source]
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        raise SpaceError(f"search space {str(source)!r}: there is no such file")
    allowed = f"a YAML file, or one of {', '.join(sorted(built_in))}"
    raise SpaceError(f"search space is {source!r}, allowed: {allowed}{_meant(source, built_in)}")


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise SpaceError(f"{path}: holds more than {MAX_FILE_BYTES:,} bytes, allowed: up to that many")
    try:
        read = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpaceError(f"{path}: {where}{' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpaceError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise SpaceError(f"{path}: is nested too deeply") from None
    if not isinstance(read, Mapping):
        raise SpaceError(f"{path}: is {_shown(read)}, allowed: a mapping with the keys {', '.join(_TOP_KEYS)}")
    return read


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses what PyYAML takes silently: keys given twice, and aliases.

    Plain scalars are read as in YAML 1.2: 3e-4 is a number, `on` a text. What stands under
    `match` and `group` is always a text, since layers may be called 0 or 1.10.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below; PyYAML's own name)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            peek: Any = self.peek_event
            event = peek()
            problem = (
                f'alias *{event.anchor} is not allowed; a pattern that begins with * needs quotes: "*{event.anchor}"'
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in ("match", "group"):
                _as_text(value)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} is given twice, allowed: once"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _as_text(node: Any) -> None:
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if isinstance(item, yaml.ScalarNode) and item.tag != _TAG + "null":
            item.tag = _TAG + "str"


_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": _FLOAT,
}.items():
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor(_TAG + "int", lambda _, node: int(node.value))


# What the text means: rules, checked, then settled for each layer


@dataclass(frozen=True)
class _At:
    """A place in a file, for messages."""

    file: str
    key: str = ""

    def __truediv__(self, key: str | int) -> _At:
        if isinstance(key, int):
            return _At(self.file, f"{self.key}[{key}]")
        return _At(self.file, f"{self.key}.{key}" if self.key else key)

    def error(self, value: object, allowed: str) -> SpaceError:
        return SpaceError(f"{self.file}: {self.key} is {_shown(value)}, allowed: {allowed}")


@dataclass(frozen=True)
class _Range:
    """Both ends of an option as written; equal for a single value."""

    low: Any
    high: Any
    log: bool = False

    def shown(self) -> str:
        ends = f"{self.low}" if self.low == self.high else f"[{self.low}, {self.high}]"
        return f"{ends} (log)" if self.log else ends


@dataclass(frozen=True)
class _Rule:
    at: _At
    match: tuple[str, ...]
    filters: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]

    def literal(self, spec: LayerSpec) -> bool:
        """Whether the rule calls the layer by its very name."""
        return any(name in self.match for name in _names(spec))


_Settled = Mapping[str, tuple[Any, _Rule | None]]
_End = Callable[[_At, Any], Any]


def _number(at: _At, value: Any, *, low: float = 0.0, high: float = math.inf, above: bool = False) -> float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (right and math.isfinite(value) and low <= value <= high and not (above and value == low)):
        allowed = f"a number {'above' if above else 'from'} {low:g}"
        raise at.error(value, allowed + (" up" if math.isinf(high) else f" to {high:g}"))
    return float(value)


def _bit_width(at: _At, value: Any) -> int:
    if type(value) is not int or value not in BIT_WIDTHS:
        raise at.error(value, f"1 to 8, {BIT_WIDTHS[-2]}, {BIT_WIDTHS[-1]}, or a range [low, high] within 1 to 8")
    return value


def _rank_end(at: _At, value: Any) -> int | float | str:
    if type(value) is int and value >= 1:
        return value
    if value == FULL or (isinstance(value, float) and 0 < value <= 1):
        return FULL if value in (FULL, 1.0) else float(value)
    raise at.error(value, f"a fraction above 0 up to 1.0, a whole number from 1 up, {FULL}, or [low, high] of these")


def _range(at: _At, value: Any, end: _End) -> _Range:
    """One value, [low, high], or {low, high, log}, its ends checked by `end` and in order."""
    log = False
    if isinstance(value, Mapping):
        _check_keys(at, value, ("low", "high", "log"))
        if lacking := [key for key in ("low", "high") if key not in value]:
            raise at.error(value, f"low, high and, if wanted, log; {lacking[0]} is missing")
        low, high, log = end(at / "low", value["low"]), end(at / "high", value["high"]), value.get("log", False)
        if not isinstance(log, bool):
            raise (at / "log").error(log, "true or false")
    elif isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise at.error(list(value), "one value, or two: [low, high]")
        low, high = (end(at / index, item) for index, item in enumerate(value))
    else:
        low = high = end(at, value)
    kinds = {type(item) for item in (low, high)} - {str}
    if len(kinds) > 1:
        raise at.error(
            value, f"both ends fractions (as in [0.25, 1.0]) or both whole numbers, or {FULL} as the high end"
        )
    if _order(low) > _order(high):
        raise at.error(value, "the low end first, then the high end")
    if log and _order(low) <= 0:
        raise at.error(value, "a low end above 0 where log is true")
    return _Range(low, high, log)


def _order(end: Any) -> float:
    return math.inf if end == FULL else float(end)


def _bits(at: _At, value: Any) -> _Range:
    ends = _range(at, value, _bit_width)
    if ends.low != ends.high and ends.high > WIDEST_CODE:
        raise at.error(value, f"a range within 1 to {WIDEST_CODE}, or one value of {', '.join(map(str, BIT_WIDTHS))}")
    return ends


def _choice(at: _At, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise at.error(value, f"{', '.join(allowed)}{_meant(value, allowed)}")
    return value


def _choices(at: _At, value: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        return (_choice(at, value, allowed),)
    if not value:
        raise at.error([], f"one or more of {', '.join(allowed)}")
    return tuple(_choice(at / index, item, allowed) for index, item in enumerate(value))


def _group(at: _At, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise at.error(value, "a name, or null for no group")
    return value


_OPTIONS: dict[str, Callable[[_At, Any], Any]] = {
    "rank": partial(_range, end=_rank_end),
    "bits": _bits,
    "threshold": partial(_range, end=_number),
    "group": _group,
    "quantizer": partial(_choice, allowed=QUANTIZERS),
    "scheme": partial(_choice, allowed=SCHEMES),
}
_UNTOUCHED: dict[str, Any] = {
    "rank": _Range(FULL, FULL),
    "bits": _Range(FLOAT_BITS, FLOAT_BITS),
    "threshold": _Range(0.0, 0.0),
    "group": None,
    "quantizer": QUANTIZERS[0],
    "scheme": SCHEMES[0],
}
_FILTERS = {"kind": KINDS, "position": POSITIONS, "size": SIZES}
_RECIPE: dict[str, _End] = {
    "epochs": _number,
    "learning_rate": partial(_number, above=True),
    "distillation": partial(_number, high=1.0),
}
_RECIPE_DEFAULTS = {"learning_rate": _Range(3e-4, 3e-3, log=True), "distillation": _Range(0.5, 0.5)}
_TOP_KEYS = ("version", "description", "layers", "recipe")


def _build(name: str, at: _At, read: Mapping[str, Any], specs: Sequence[LayerSpec]) -> Space:
    _check_keys(at, read, _TOP_KEYS)
    if type(read.get("version")) is not int or read["version"] != VERSION:
        shown = _shown(read["version"]) if "version" in read else "missing"
        raise SpaceError(f"{at.file}: version is {shown}, allowed: {VERSION}")
    if not isinstance(read.get("description", ""), str):
        raise (at / "description").error(read["description"], "one line of text")
    entries = read.get("layers")
    if not isinstance(entries, (list, tuple)) or not entries:
        raise (at / "layers").error(entries, "a list of one or more rules")
    rules = [_rule(at / "layers" / index, entry, specs) for index, entry in enumerate(entries)]
    layers = _settings(at, specs, _settle(rules, specs))
    return Space(name, json.loads(json.dumps(dict(read))), layers, _recipe(at / "recipe", read.get("recipe", {})))


def _rule(at: _At, entry: Any, specs: Sequence[LayerSpec]) -> _Rule:
    if not isinstance(entry, Mapping):
        raise at.error(entry, f"a mapping with the keys {', '.join(('match', *_FILTERS, *_OPTIONS))}")
    _check_keys(at, entry, ("match", *_FILTERS, *_OPTIONS))
    options = {key: check(at / key, entry[key]) for key, check in _OPTIONS.items() if key in entry}
    if not options:
        raise SpaceError(f"{at.file}: {at.key} sets nothing, allowed: one or more of {', '.join(_OPTIONS)}")
    filters = {key: _choices(at / key, entry[key], allowed) for key, allowed in _FILTERS.items() if key in entry}
    return _Rule(at, _patterns(at / "match", entry.get("match", "*"), specs), filters, options)


def _patterns(at: _At, value: Any, specs: Sequence[LayerSpec]) -> tuple[str, ...]:
    patterns = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for index, pattern in enumerate(patterns):
        here = at / index if isinstance(value, (list, tuple)) else at
        if not isinstance(pattern, str) or not pattern:
            raise here.error(pattern, "a pattern for layer names such as conv*, or a list of patterns")
        if not any(_matches(pattern, spec) for spec in specs):
            labels = [spec.label for spec in specs]
            allowed = f"a pattern that matches one of the layers {_listed(labels)}{_meant(pattern, labels)}"
            raise here.error(pattern, allowed)
    if not patterns:
        raise at.error([], "one or more patterns")
    return patterns


def _names(spec: LayerSpec) -> tuple[str, ...]:
    return spec.label, *spec.shared_with


def _matches(pattern: str, spec: LayerSpec) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in _names(spec))


def _settle(rules: Sequence[_Rule], specs: Sequence[LayerSpec]) -> list[_Settled]:
    """For each layer, each option's value and the last matching rule that sets it."""
    shares = _shares(specs)
    settled: list[_Settled] = []
    for index, spec in enumerate(specs):
        tags = {
            "kind": {spec.kind, "conv" if spec.kind.startswith("conv") else spec.kind},
            "position": _position(index, len(specs)),
            "size": {_size(shares, index)},
        }
        chosen: dict[str, tuple[Any, _Rule | None]] = {key: (value, None) for key, value in _UNTOUCHED.items()}
        for rule in rules:
            passes = all(tags[key] & set(wanted) for key, wanted in rule.filters.items())
            if passes and any(_matches(pattern, spec) for pattern in rule.match):
                chosen |= {key: (value, rule) for key, value in rule.options.items()}
        settled.append(chosen)
    return settled


def _settings(at: _At, specs: Sequence[LayerSpec], settled: Sequence[_Settled]) -> tuple[LayerSettings, ...]:
    labels = {spec.label for spec in specs}
    leaders: dict[str, tuple[LayerSpec, _Settled]] = {}
    layers = []
    for spec, mine in zip(specs, settled, strict=True):
        group, rule = mine["group"]
        if group is not None and rule is not None:
            if group in labels:
                raise (rule.at / "group").error(group, "a name that no layer has")
            _check_alike(at, group, leaders.setdefault(group, (spec, mine)), (spec, mine))
        layers.append(_layer_settings(spec, mine))
    return tuple(_without_idle_rank(layer, layers) for layer in layers)


def _check_alike(at: _At, group: str, one: tuple[LayerSpec, _Settled], other: tuple[LayerSpec, _Settled]) -> None:
    for option in ("rank", "bits", "threshold"):
        first, second = one[1][option][0], other[1][option][0]
        if first != second:
            raise SpaceError(
                f"{at.file}: group {group!r} has layers with different {option}: {one[0].label!r} {first.shown()}, "
                f"{other[0].label!r} {second.shown()}, allowed: one range for all its members"
            )


def _layer_settings(spec: LayerSpec, mine: _Settled) -> LayerSettings:
    group = mine["group"][0]
    owner = group or spec.label
    scheme = _scheme(spec, mine)
    bits, threshold = mine["bits"][0], mine["threshold"][0]
    return LayerSettings(
        spec=spec,
        rank=_rank(spec, scheme, mine, group),
        bits=_setting(f"{owner}.bits", bits, "int"),
        threshold=_setting(f"{owner}.threshold", threshold, "float"),
        scheme=scheme,
        quantizer=mine["quantizer"][0],
        group=group,
    )


def _setting(name: str, ends: _Range, kind: Literal["int", "float"]) -> Setting:
    value: float = ends.low
    return value if ends.low == ends.high else Knob(name, ends.low, ends.high, kind, ends.log)


def _scheme(spec: LayerSpec, mine: _Settled) -> str:
    """The scheme asked for where the layer has it, else channel; an error where a rule names the layer itself."""
    scheme, rule = mine["scheme"]
    if scheme in spec.schemes:
        return str(scheme)
    if rule is not None and scheme != SCHEMES[0] and rule.literal(spec):
        raise (rule.at / "scheme").error(scheme, f"{SCHEMES[0]} for layer {spec.label!r} ({spec.kind})")
    return SCHEMES[0]


def _rank(spec: LayerSpec, scheme: str, mine: _Settled, group: str | None) -> Knob | int | None:
    ends, rule = mine["rank"]
    highest, full = spec.max_rank(scheme), spec.full_rank(scheme)
    if rule is None or ends.low == FULL:
        return None
    here = rule.at / "rank"
    shown = ends.low if ends.low == ends.high else [ends.low, ends.high]
    if group is not None and int in (type(ends.low), type(ends.high)):
        raise here.error(shown, f"fractions in group {group!r}, so that they fit each member")
    if highest == 0:
        if rule.literal(spec):
            why = spec.whole_because or "two factors would be larger"
            raise here.error(shown, f"{FULL} for layer {spec.label!r} ({why})")
        return None
    for end in (ends.low, ends.high):
        if type(end) is int and end > full:
            raise here.error(shown, f"up to {full} for layer {spec.label!r}, its full rank; a fraction; or {FULL}")

    def in_knob_units(end: Any) -> int:
        if type(end) is int:
            return end
        fraction = 1.0 if end == FULL else float(end)
        return _fraction_of_rank(fraction, spec, scheme) if group is None else max(1, round(100 * fraction))

    if ends.low != ends.high:
        low, high = in_knob_units(ends.low), in_knob_units(ends.high)
        if low < high:
            return Knob(f"{group or spec.label}.rank", low, high, "int", ends.log)
    fixed = ends.low if type(ends.low) is int else _fraction_of_rank(ends.low, spec, scheme)
    return fixed if fixed <= highest else None


def _without_idle_rank(layer: LayerSettings, layers: Iterable[LayerSettings]) -> LayerSettings:
    """The layer without its rank knob where even the knob's low end leaves all who share it whole."""
    if not isinstance(layer.rank, Knob):
        return layer
    low = layer.rank.low
    if any(other.rank_of(low) for other in layers if other.rank == layer.rank):
        return layer
    return replace(layer, rank=None)


def _recipe(at: _At, read: Any) -> dict[str, Setting | None]:
    if not isinstance(read, Mapping):
        raise at.error(read, f"a mapping with the keys {', '.join(_RECIPE)}")
    _check_keys(at, read, tuple(_RECIPE))
    ends = {key: _range(at / key, read[key], check) for key, check in _RECIPE.items() if key in read}
    ends = _RECIPE_DEFAULTS | ends
    return {key: _setting(f"recipe.{key}", ends[key], "float") if key in ends else None for key in _RECIPE}


def _shares(specs: Sequence[LayerSpec]) -> list[float]:
    """Each layer's share of all weights."""
    total = sum(spec.parameters for spec in specs) or 1
    return [spec.parameters / total for spec in specs]


def _position(index: int, count: int) -> set[str]:
    ends = {"first"} if index == 0 else set()
    return (ends | {"last"} if index == count - 1 else ends) or {"middle"}


def _size(shares: Sequence[float], index: int) -> str:
    """small: under 2 % of the weights and under a fifth of an even share; else large."""
    return "small" if shares[index] < min(0.02, 0.2 / len(shares)) else "large"


def _check_keys(at: _At, read: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in read:
        if key not in known:
            where = f"{at.key}: " if at.key else ""
            allowed = f"{', '.join(known)}{_meant(key, known)}"
            raise SpaceError(f"{at.file}: {where}unknown key {_shown(key)}, allowed: {allowed}")


def _meant(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed(names: Iterable[str]) -> str:
    some = list(names)
    more = f" and {len(some) - 10} more" if len(some) > 10 else ""
    return ", ".join(map(repr, some[:10])) + more


def _shown(value: object) -> str:
    """The value on one line, cut to a readable length."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
