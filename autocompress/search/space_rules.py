"""What a search space's text means: rules, checked, then settled for each layer of a model.

docs/search-spaces.md describes the rules for users.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from autocompress.errors import SpaceError
from autocompress.plan import (
    ACTIVATION_BITS,
    BIT_WIDTHS,
    FLOAT_BITS,
    GRANULARITIES,
    MOST_THRESHOLD,
    PRECISIONS,
    QUANTIZERS,
    ROUNDINGS,
    SALIENCIES,
    SCHEMES,
    SEEN,
    SVDS,
    UNSEEN,
    LayerSpec,
)
from autocompress.search.space import (
    Knob,
    LayerSettings,
    Setting,
    Space,
    fraction_of_rank,
    listed,
    positions,
    rank_within,
    shares,
    size_class,
)

VERSION = 1
KINDS = ("conv", *SEEN, *UNSEEN)
"""conv: any convolution but the transposed ones."""
POSITIONS = ("first", "middle", "last")
SIZES = ("small", "large")
FULL = "full"
Errors = Callable[[LayerSpec, str, str], Sequence[tuple[int, float]]]
"""Ranks of a layer, rising, and their errors, by scheme and svd."""
WIDEST_CODE = 8
"""The widest bit-width that a range may reach; 16 and 32 are formats, not points of a scale."""


@dataclass(frozen=True)
class At:
    """A place in a file, for messages."""

    file: str
    key: str = ""

    def __truediv__(self, key: str | int) -> At:
        if isinstance(key, int):
            return At(self.file, f"{self.key}[{key}]")
        return At(self.file, f"{self.key}.{key}" if self.key else key)

    def error(self, value: object, allowed: str) -> SpaceError:
        return SpaceError(f"{self.file}: {self.key} is {shown(value)}, allowed: {allowed}")


@dataclass(frozen=True)
class _Range:
    """Both ends of an option as written; equal for a single value."""

    low: Any
    high: Any
    log: bool = False
    tolerance: bool = False

    def shown(self) -> str:
        ends = f"{self.low}" if self.low == self.high else f"[{self.low}, {self.high}]"
        ends = f"tolerance {ends}" if self.tolerance else ends
        return f"{ends} (log)" if self.log else ends


@dataclass(frozen=True)
class _Rule:
    at: At
    match: tuple[str, ...]
    filters: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]

    def literal(self, spec: LayerSpec) -> bool:
        """Whether the rule calls the layer by its very name."""
        return any(name in self.match for name in _names(spec))


_Settled = Mapping[str, tuple[Any, _Rule | None]]
_End = Callable[[At, Any], Any]


def _number(at: At, value: Any, *, low: float = 0.0, high: float = math.inf, above: bool = False) -> float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (right and math.isfinite(value) and low <= value <= high and not (above and value == low)):
        allowed = f"a number {'above' if above else 'from'} {low:g}"
        raise at.error(value, allowed + (" up" if math.isinf(high) else f" to {high:g}"))
    return float(value)


def _bit_width(at: At, value: Any) -> int:
    if type(value) is not int or value not in BIT_WIDTHS:
        raise at.error(value, f"1 to 8, {BIT_WIDTHS[-2]}, {BIT_WIDTHS[-1]}, or a range [low, high] within 1 to 8")
    return value


def _rank_end(at: At, value: Any) -> int | float | str:
    if type(value) is int and value >= 1:
        return value
    if value == FULL or (isinstance(value, float) and 0 < value <= 1):
        return FULL if value in (FULL, 1.0) else float(value)
    raise at.error(value, f"a fraction above 0 up to 1.0, a whole number from 1 up, {FULL}, or [low, high] of these")


def _range(at: At, value: Any, end: _End) -> _Range:
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


def _ranks(at: At, value: Any) -> _Range:
    """A range of ranks, or {tolerance, log}: the errors within which the smallest rank is taken."""
    if not (isinstance(value, Mapping) and "tolerance" in value):
        return _range(at, value, _rank_end)
    _check_keys(at, value, ("tolerance", "log"))
    ends = _range(at / "tolerance", value["tolerance"], partial(_number, high=1.0, above=True))
    log = value.get("log", ends.log)
    if not isinstance(log, bool):
        raise (at / "log").error(log, "true or false")
    return replace(ends, log=log, tolerance=True)


def _order(end: Any) -> float:
    return math.inf if end == FULL else float(end)


def _bits(at: At, value: Any) -> _Range:
    ends = _range(at, value, _bit_width)
    if ends.low != ends.high and ends.high > WIDEST_CODE:
        raise at.error(value, f"a range within 1 to {WIDEST_CODE}, or one value of {', '.join(map(str, BIT_WIDTHS))}")
    return ends


def _activation_width(at: At, value: Any) -> int:
    if type(value) is not int or value not in ACTIVATION_BITS:
        raise at.error(value, f"{', '.join(map(str, ACTIVATION_BITS))}, or a range [low, high] of these")
    return value


def _choice(at: At, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise at.error(value, f"{', '.join(allowed)}{meant(value, allowed)}")
    return value


def _choices(at: At, value: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        return (_choice(at, value, allowed),)
    if not value:
        raise at.error([], f"one or more of {', '.join(allowed)}")
    return tuple(_choice(at / index, item, allowed) for index, item in enumerate(value))


def _group(at: At, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise at.error(value, "a name, or null for no group")
    return value


def _granularity(at: At, value: Any) -> str | int:
    if value in GRANULARITIES or (type(value) is int and value >= 1):
        return value  # type: ignore[no-any-return]
    raise at.error(value, f"{', '.join(GRANULARITIES)}, or a whole number from 1 up{meant(value, GRANULARITIES)}")


_OPTIONS: dict[str, Callable[[At, Any], Any]] = {
    "rank": _ranks,
    "bits": _bits,
    "threshold": partial(_range, end=partial(_number, high=MOST_THRESHOLD)),
    "group": _group,
    "quantizer": partial(_choice, allowed=QUANTIZERS),
    "scheme": partial(_choice, allowed=SCHEMES),
    "svd": partial(_choice, allowed=SVDS),
    "saliency": partial(_choice, allowed=SALIENCIES),
    "rounding": partial(_choice, allowed=ROUNDINGS),
    "granularity": _granularity,
    "activation_bits": partial(_range, end=_activation_width),
    "width": partial(_range, end=partial(_number, high=1.0, above=True)),
}
_UNTOUCHED: dict[str, Any] = {
    "rank": _Range(FULL, FULL),
    "bits": _Range(FLOAT_BITS, FLOAT_BITS),
    "threshold": _Range(0.0, 0.0),
    "group": None,
    "quantizer": QUANTIZERS[0],
    "scheme": SCHEMES[0],
    "svd": SVDS[0],
    "saliency": SALIENCIES[0],
    "rounding": ROUNDINGS[0],
    "granularity": GRANULARITIES[0],
    "activation_bits": _Range(FLOAT_BITS, FLOAT_BITS),
    "width": _Range(1.0, 1.0),
}
_FILTERS = {"kind": KINDS, "position": POSITIONS, "size": SIZES}
_RECIPE: dict[str, _End] = {
    "epochs": _number,
    "learning_rate": partial(_number, above=True),
    "distillation": partial(_number, high=1.0),
    "rate": _number,
    "infomax": _number,
}
_RECIPE_DEFAULTS = {
    "learning_rate": _Range(3e-4, 3e-3, log=True),
    "distillation": _Range(0.5, 0.5),
    "rate": _Range(0.0, 0.0),
    "infomax": _Range(0.0, 0.0),
}


def _whole(at: At, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise at.error(value, "a whole number from 1 up")
    return value


_RECIPE_FIXED: dict[str, _End] = {"precision": partial(_choice, allowed=PRECISIONS), "accumulation": _whole}
"""Keys of a recipe that take one value: searching them would say little."""
TOP_KEYS = ("version", "description", "layers", "recipe")


def build(
    name: str, at: At, read: Mapping[str, Any], specs: Sequence[LayerSpec], errors: Errors | None = None
) -> Space:
    _check_keys(at, read, TOP_KEYS)
    if type(read.get("version")) is not int or read["version"] != VERSION:
        text = shown(read["version"]) if "version" in read else "missing"
        raise SpaceError(f"{at.file}: version is {text}, allowed: {VERSION}")
    if not isinstance(read.get("description", ""), str):
        raise (at / "description").error(read["description"], "one line of text")
    entries = read.get("layers")
    if not isinstance(entries, (list, tuple)) or not entries:
        raise (at / "layers").error(entries, "a list of one or more rules")
    rules = [_rule(at / "layers" / index, entry, specs) for index, entry in enumerate(entries)]
    layers = _settings(at, specs, _settle(rules, specs), errors)
    return Space(name, json.loads(json.dumps(dict(read))), layers, _recipe(at / "recipe", read.get("recipe", {})))


def _rule(at: At, entry: Any, specs: Sequence[LayerSpec]) -> _Rule:
    if not isinstance(entry, Mapping):
        raise at.error(entry, f"a mapping with the keys {', '.join(('match', *_FILTERS, *_OPTIONS))}")
    _check_keys(at, entry, ("match", *_FILTERS, *_OPTIONS))
    options = {key: check(at / key, entry[key]) for key, check in _OPTIONS.items() if key in entry}
    if not options:
        raise SpaceError(f"{at.file}: {at.key} sets nothing, allowed: one or more of {', '.join(_OPTIONS)}")
    filters = {key: _choices(at / key, entry[key], allowed) for key, allowed in _FILTERS.items() if key in entry}
    return _Rule(at, _patterns(at / "match", entry.get("match", "*"), specs), filters, options)


def _patterns(at: At, value: Any, specs: Sequence[LayerSpec]) -> tuple[str, ...]:
    patterns = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for index, pattern in enumerate(patterns):
        here = at / index if isinstance(value, (list, tuple)) else at
        if not isinstance(pattern, str) or not pattern:
            raise here.error(pattern, "a pattern for layer names such as conv*, or a list of patterns")
        if not any(_matches(pattern, spec) for spec in specs):
            labels = [spec.label for spec in specs]
            allowed = f"a pattern that matches one of the layers {listed(labels)}{meant(pattern, labels)}"
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
    portions, places = shares(specs), positions(specs)
    settled: list[_Settled] = []
    for index, spec in enumerate(specs):
        tags = {
            "kind": {spec.kind, "conv" if spec.kind.startswith("conv") else spec.kind},
            "position": places[index],
            "size": {size_class(portions, index)},
        }
        chosen: dict[str, tuple[Any, _Rule | None]] = {key: (value, None) for key, value in _UNTOUCHED.items()}
        for rule in rules:
            passes = all(tags[key] & set(wanted) for key, wanted in rule.filters.items())
            if passes and any(_matches(pattern, spec) for pattern in rule.match):
                chosen |= {key: (value, rule) for key, value in rule.options.items()}
        settled.append(chosen)
    return settled


def _settings(
    at: At, specs: Sequence[LayerSpec], settled: Sequence[_Settled], errors: Errors | None
) -> tuple[LayerSettings, ...]:
    labels = {spec.label for spec in specs}
    leaders: dict[str, tuple[LayerSpec, _Settled]] = {}
    layers = []
    for spec, mine in zip(specs, settled, strict=True):
        group, rule = mine["group"]
        if group is not None and rule is not None:
            if group in labels:
                raise (rule.at / "group").error(group, "a name that no layer has")
            _check_alike(at, group, leaders.setdefault(group, (spec, mine)), (spec, mine))
        layers.append(_layer_settings(spec, mine, errors))
    return tuple(_without_idle_rank(layer, layers) for layer in layers)


def _check_alike(at: At, group: str, one: tuple[LayerSpec, _Settled], other: tuple[LayerSpec, _Settled]) -> None:
    for option in ("rank", "bits", "threshold", "activation_bits", "width"):
        first, second = one[1][option][0], other[1][option][0]
        if first != second:
            raise SpaceError(
                f"{at.file}: group {group!r} has layers with different {option}: {one[0].label!r} {first.shown()}, "
                f"{other[0].label!r} {second.shown()}, allowed: one range for all its members"
            )


def _layer_settings(spec: LayerSpec, mine: _Settled, errors: Errors | None) -> LayerSettings:
    group = mine["group"][0]
    owner = group or spec.label
    scheme = _scheme(spec, mine)
    bits, threshold = mine["bits"][0], mine["threshold"][0]
    by_rank = _errors(spec, scheme, mine, errors)
    return LayerSettings(
        spec=spec,
        rank=_rank(spec, scheme, mine, group, by_rank),
        bits=_setting(f"{owner}.bits", bits, "int"),
        threshold=_setting(f"{owner}.threshold", threshold, "float"),
        scheme=scheme,
        quantizer=mine["quantizer"][0],
        group=group,
        svd=mine["svd"][0],
        errors=by_rank,
        saliency=mine["saliency"][0],
        rounding=mine["rounding"][0],
        granularity=_granular(mine),
        activation_bits=_one_of(f"{owner}.activation_bits", mine["activation_bits"][0]),
        width=_setting(f"{owner}.width", mine["width"][0], "float"),
    )


def _granular(mine: _Settled) -> str | int:
    """What has a scale of its own; an error where a table of values has none."""
    value, rule = mine["granularity"]
    if value != "tensor" and mine["quantizer"][0] == "codebook" and rule is not None:
        raise (rule.at / "granularity").error(value, "tensor where quantizer is codebook")
    return value  # type: ignore[no-any-return]


def _one_of(name: str, ends: _Range) -> Setting:
    """The only width of a range, or the knob that chooses."""
    widths = tuple(width for width in ACTIVATION_BITS if ends.low <= width <= ends.high)
    return widths[0] if len(widths) == 1 else Knob(name, 0, len(widths) - 1, "int", choices=widths)


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


def _errors(spec: LayerSpec, scheme: str, mine: _Settled, errors: Errors | None) -> tuple[tuple[int, float], ...]:
    """Ranks and their errors, where the rank goes by a tolerance and the layer has any."""
    ends, rule = mine["rank"]
    if rule is None or not ends.tolerance or not spec.max_rank(scheme):
        return ()
    if errors is None:
        raise (rule.at / "rank").error(f"tolerance {ends.low}", "ranks or fractions, where there is no task to measure")
    return tuple(errors(spec, scheme, mine["svd"][0]))


def _rank(
    spec: LayerSpec, scheme: str, mine: _Settled, group: str | None, errors: Sequence[tuple[int, float]]
) -> Knob | int | None:
    ends, rule = mine["rank"]
    highest, full = spec.max_rank(scheme), spec.full_rank(scheme)
    if rule is None or ends.low == FULL:
        return None
    here = rule.at / "rank"
    if ends.tolerance:
        if highest == 0 and rule.literal(spec):
            raise here.error("a tolerance", f"{FULL} for layer {spec.label!r} ({spec.whole_because or 'too thin'})")
        if highest == 0 or ends.low == ends.high:
            return rank_within(ends.low, errors)
        return Knob(f"{group or spec.label}.rank", ends.low, ends.high, "float", ends.log)
    text = ends.low if ends.low == ends.high else [ends.low, ends.high]
    if group is not None and int in (type(ends.low), type(ends.high)):
        raise here.error(text, f"fractions in group {group!r}, so that they fit each member")
    if highest == 0:
        if rule.literal(spec):
            why = spec.whole_because or "two factors would be larger"
            raise here.error(text, f"{FULL} for layer {spec.label!r} ({why})")
        return None
    for end in (ends.low, ends.high):
        if type(end) is int and end > full:
            raise here.error(text, f"up to {full} for layer {spec.label!r}, its full rank; a fraction; or {FULL}")

    def in_knob_units(end: Any) -> int:
        if type(end) is int:
            return end
        fraction = 1.0 if end == FULL else float(end)
        return fraction_of_rank(fraction, spec, scheme) if group is None else max(1, round(100 * fraction))

    if ends.low != ends.high:
        low, high = in_knob_units(ends.low), in_knob_units(ends.high)
        if low < high:
            return Knob(f"{group or spec.label}.rank", low, high, "int", ends.log)
    fixed = ends.low if type(ends.low) is int else fraction_of_rank(ends.low, spec, scheme)
    return fixed if fixed <= highest else None


def _without_idle_rank(layer: LayerSettings, layers: Iterable[LayerSettings]) -> LayerSettings:
    """The layer without its rank knob where even the knob's low end leaves all who share it whole."""
    if not isinstance(layer.rank, Knob):
        return layer
    low = layer.rank.low if layer.rank.kind == "int" else layer.rank.high
    if any(other.rank_of(low) for other in layers if other.rank == layer.rank):
        return layer
    return replace(layer, rank=None)


def _recipe(at: At, read: Any) -> dict[str, Setting | str | None]:
    known = (*_RECIPE, *_RECIPE_FIXED)
    if not isinstance(read, Mapping):
        raise at.error(read, f"a mapping with the keys {', '.join(known)}")
    _check_keys(at, read, known)
    ends = {key: _range(at / key, read[key], check) for key, check in _RECIPE.items() if key in read}
    ends = _RECIPE_DEFAULTS | ends
    settings = {key: _setting(f"recipe.{key}", ends[key], "float") if key in ends else None for key in _RECIPE}
    return settings | {key: check(at / key, read[key]) for key, check in _RECIPE_FIXED.items() if key in read}


def _check_keys(at: At, read: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in read:
        if key not in known:
            where = f"{at.key}: " if at.key else ""
            allowed = f"{', '.join(known)}{meant(key, known)}"
            raise SpaceError(f"{at.file}: {where}unknown key {shown(key)}, allowed: {allowed}")


def meant(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object) -> str:
    """The value on one line, cut to a readable length."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
