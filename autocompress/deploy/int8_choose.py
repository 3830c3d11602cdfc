"""Which layers compute with 8 bits: those of which a whole call is faster, measured here and now.

Layers that are alike, of the same operation and shapes, form a group and get one form. From the fastest of a few
uniform plans on, each group in turn tries the other forms; what is not clearly faster gives way to what is smaller,
then to what is more exact, and what adds more bytes to the file than it saves of the time is not taken: a table of
half the file's bytes is not in float32 for a fiftieth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLEARLY = 0.02
"""A share of the time of a call, or of time times bytes, that decides; less is noise."""

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


def chosen(
    groups: Sequence[Group], starts: Sequence[Mapping[str, str]], time: Timer, *, beside: Callable[[Plan], int]
) -> list[Choice]:
    """The choice of each group: of the least product of time and bytes, so that no form adds more than it saves.

    `starts`: uniform plans, each a preferred form by form: a group without the preferred one takes what it has.
    `beside(plan)` are the bytes of a file that are no group's.
    """
    plans = list(dict.fromkeys(tuple(_preferred(group, start) for group in groups) for start in starts))
    sizes = [_bytes(groups, p) + beside(p) for p in plans]
    plan = plans[_best(time(plans), sizes)] if len(plans) > 1 else plans[0]
    choices: list[Choice] = []
    for at, group in enumerate(groups):
        forms = list(group.options)
        if len(forms) == 1:
            choices.append(Choice(forms[0], {}, "it has no other form"))
            continue
        tried = [(*plan[:at], form, *plan[at + 1 :]) for form in forms]
        seconds = time(tried)
        best = _best(seconds, [_bytes(groups, p) + beside(p) for p in tried])
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


def _best(seconds: Sequence[float], sizes: Sequence[int]) -> int:
    """The index of the smallest of those whose time and bytes are not clearly more than the least, taken together."""
    costs = [second * size for second, size in zip(seconds, sizes, strict=True)]
    near = [k for k, cost in enumerate(costs) if cost <= min(costs) * (1 + CLEARLY)]
    return min(near, key=lambda k: sizes[k])


def _reason(best: int, seconds: Sequence[float]) -> str:
    others = [second for k, second in enumerate(seconds) if k != best]
    if seconds[best] * (1 + CLEARLY) < min(others):
        return "fastest"
    if seconds[best] > min(others) * (1 + CLEARLY):
        return "smaller by more than it is slower"
    return "smallest, or most exact, of the equally fast"
