"""Which layers compute with 8 bits: those of which a whole call is faster, measured here and now.

Layers that are alike, of the same operation and shapes, form a group and get one form. From the fastest of a few
uniform plans on, each group in turn tries the other forms; what is not clearly faster gives way to what is smaller,
then to what is more exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLEARLY = 0.02
"""A share of the time of a call that decides; less is noise."""

Plan = tuple[str, ...]
"""The form of each group."""
Timer = Callable[[Sequence[Plan]], Sequence[float]]
"""Seconds of a call under each of some plans, measured in turns."""


@dataclass(frozen=True)
class Choosing:
    """How a write comes to its forms: by calls of `batch` examples, unless `decided` says what an earlier one decided.

    `answers` are what the clock said so far, by question: a write adds to them, and asks nothing twice.
    """

    batch: int = 1
    decided: Mapping[str, Any] | None = None
    answers: dict[Any, list[float]] = field(default_factory=dict, repr=False, compare=False)


def decided_in(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a write decided by the clock and the metric, from what it says of its file: plain JSON. None without."""
    if (found := details.get("decided")) is None:
        return None
    forms = {name: layer["form"] for name, layer in details["layers"].items()}
    return {**{key: found[key] for key in ("batch", "packed", "pays")}, "forms": forms}


@dataclass(frozen=True)
class Group:
    """Layers that are alike: by form that they can have the bytes it takes in a file, the more exact first."""

    name: str
    options: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """A group's form, and by form the seconds of a whole call with it, all others as they were when it was tried."""

    form: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    because: str = ""


def chosen(groups: Sequence[Group], starts: Sequence[Mapping[str, str]], time: Timer) -> list[Choice]:
    """The choice of each group.

    `starts`: uniform plans, each a preferred form by form: a group without the preferred one takes what it has.
    """
    plans = list(dict.fromkeys(tuple(_preferred(group, start) for group in groups) for start in starts))
    plan = plans[_fastest(plans, time(plans), [_bytes(groups, p) for p in plans])] if len(plans) > 1 else plans[0]
    choices: list[Choice] = []
    for at, group in enumerate(groups):
        forms = list(group.options)
        if len(forms) == 1:
            choices.append(Choice(forms[0], {}, "it has no other form"))
            continue
        tried = [(*plan[:at], form, *plan[at + 1 :]) for form in forms]
        seconds = time(tried)
        best = _fastest(forms, seconds, list(group.options.values()))
        plan = tried[best]
        choices.append(Choice(forms[best], dict(zip(forms, seconds, strict=True)), _reason(best, seconds)))
    return choices


def pays(size: float, seconds: float) -> bool:
    """Whether a file is worth having that takes these parts of another's bytes and of its time.

    It is smaller or clearly faster, and not longer by more than it is faster, nor slower by more than it is smaller.
    """
    return (size < 1 or seconds < 1 - CLEARLY) and size * seconds < 1


def _preferred(group: Group, start: Mapping[str, str]) -> str:
    form = start.get(group.name, start[""])
    return form if form in group.options else next(iter(group.options))


def _bytes(groups: Sequence[Group], plan: Plan) -> int:
    return sum(group.options[form] for group, form in zip(groups, plan, strict=True))


def _fastest(items: Sequence[object], seconds: Sequence[float], sizes: Sequence[int]) -> int:
    """The index of the smallest of those that are not clearly slower than the fastest."""
    near = [k for k in range(len(items)) if seconds[k] <= min(seconds) * (1 + CLEARLY)]
    return min(near, key=lambda k: sizes[k])


def _reason(best: int, seconds: Sequence[float]) -> str:
    others = [second for k, second in enumerate(seconds) if k != best]
    if seconds[best] * (1 + CLEARLY) < min(others):
        return "fastest"
    return "smallest, or most exact, of the equally fast"
