"""Search by continuation: the price of a bit rises trial by trial, each trial going on from the state before.

A whole front then takes the time of one long finetuning. There are as many chains as workers, each with
settings of its own; one that falls behind the front is dropped for a branch off the front. What comes next
follows from the trials so far alone, so that a search can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from autocompress.errors import SpaceError
from autocompress.search.space import Knob, Space

CONTINUATION = "continuation"
RATE = "recipe.rate"
_SCORE, _LOSS = 0.1, 0.5
"""How much worse, relatively, a metric may be for a chain to go on from there: a score's, a loss's."""
STEPS = 12
"""Trials of a chain from the lowest price to the highest, at most."""
FEWEST = 3


@dataclass(frozen=True)
class Seen:
    """A trial so far: its parameters and parent, whether it runs, is worth going on from, and has a state to do so.

    `position` is the logarithm of its size. One that failed counts too, as neither: what failed is not tried again.
    `lossless`: its metric is as good as the uncompressed model's (`worst_lossless`).
    """

    number: int
    parent: int | None
    params: Mapping[str, float]
    running: bool
    useful: bool
    open: bool
    position: float
    lossless: bool = False


@dataclass(frozen=True)
class Step:
    """The next trial: its parameters, and the trial to go on from."""

    params: dict[str, float]
    parent: int | None


def worst_useful(baseline: float, compressed: Iterable[float]) -> float:
    """The worst metric that is worth going on from; all metrics are to be minimised (signed), the compressed models'
    those measured so far.

    A score (accuracy, correlation; below zero where it is minimised) may lose a tenth of the baseline's. A loss (an
    error, a negative likelihood: zero is perfect) may be half as much again as the baseline's, or as the best one that
    a compressed model has, where none is as good: next to zero the baseline's says nothing of what is bad.
    """
    if baseline < 0:
        return baseline * (1 - _SCORE)
    return max(baseline, min(compressed, default=baseline)) * (1 + _LOSS)


def worst_lossless(baseline: float, useful: float) -> float:
    """The worst metric that counts as no loss, given the worst one that is useful: a hundredth of the way there."""
    return baseline + (useful - baseline) / 100


def is_continuable(space: Space) -> bool:
    """Whether the space searches the rate on a logarithmic scale."""
    found = space.recipe.get("rate")
    return isinstance(found, Knob) and found.log


def check_continuable(space: Space) -> None:
    """Raise SpaceError unless the space searches the rate on a logarithmic scale."""
    _rate_of(space)


def following(
    seen: Sequence[Seen],
    space: Space,
    chains: int,
    seed: int,
    number: int,
    *,
    steps: int = STEPS,
    expected: int | None = None,
) -> Step:
    """What trial `number` is to be, with that many steps from the lowest price to the highest.

    Steps are wider where no more than `expected` trials in all will have begun and chains would not rise to their end.

    New chains first, then the next price for the end of a chain that is on the front, else a branch off the front's
    member with the widest gap above it, a gap counting the less the more trials went on from there: a branch pays no
    more than its parent, so its file lies in that gap. Where there is none to go on from yet, a beginning somewhere
    between the lowest and the highest price.
    """
    rate = _rate_of(space)
    random = Random(f"{seed} {number} continuation")
    roots = [t for t in seen if t.parent is None]
    if len(roots) < chains:
        return Step(_beginning(space, rate, len(roots), random), None)
    children = {t.number: 0 for t in seen}
    for trial in seen:
        if trial.parent in children:
            children[trial.parent] += 1
    members = sorted((t for t in seen if t.useful and t.open and not t.running), key=lambda t: t.position)
    ends = [t for t in members if not children[t.number] and t.params[RATE] < rate.high * (1 - 1e-9)]
    if ends:
        end = max(ends, key=lambda t: t.number)
        ratio = _ratio(rate, steps) ** (2 if end.lossless else 1)
        if expected is not None:
            ratio = max(ratio, (rate.high / end.params[RATE]) ** (1 / max(1, math.ceil((expected - number) / chains))))
        return Step({**end.params, RATE: rate.clip(end.params[RATE] * ratio)}, end.number)
    if not members:
        first = _beginning(space, rate, len(roots), random)
        return Step({**first, RATE: rate.at(_spread(len(roots) - chains + 1))}, None)
    gaps = _gaps([t.position for t in members])
    best = max(range(len(members)), key=lambda i: gaps[i] / (1 + children[members[i].number]))
    return Step(_varied(space, rate, members[best], random, steps), members[best].number)


def steps_within(trials: int, chains: int) -> int:
    """Steps of a chain, such that so many trials lead all chains to the highest price; `FEWEST` to `STEPS`."""
    return max(FEWEST, min(STEPS, trials // chains))


def chains_within(trials: int, workers: int, *, timed: bool = False) -> int:
    """Chains for so many trials: one a worker, but none of fewer than `FEWEST` trials.

    Two at least where time counts (`timed`): the first chain makes no layer narrower.
    """
    return max(1, min(max(workers, 2 if timed else 1), trials // FEWEST))


def _spread(index: int) -> float:
    """The van der Corput sequence in base 2, 1/2, 1/4, 3/4, 1/8 ... from index 1 on: evenly spread, however long."""
    return float(sum((index >> bit & 1) / 2.0 ** (bit + 1) for bit in range(index.bit_length())))


def _beginning(space: Space, rate: Knob, chain: int, random: Random) -> dict[str, float]:
    """Parameters of a new chain, the rate at its low end.

    The first has the layers as mild as the space lets them and the recipe's knobs in the middle; others are up to
    half as strong as it allows, and have the recipe's knobs anywhere.
    """
    strength = 0.0 if chain == 0 else random.random() / 2
    params = {k.name: k.at(0.5 if chain == 0 else random.random()) for k in space.knobs}
    for layer in space.layers:
        tolerance = isinstance(layer.rank, Knob) and layer.rank.kind == "float"
        rank, width = (layer.rank, float(not tolerance)), (layer.width, 1.0)
        for setting, mild in (rank, width, (layer.bits, 1.0), (layer.threshold, 0.0)):
            if isinstance(setting, Knob):
                params[setting.name] = setting.at(abs(mild - strength))
    return {**params, RATE: rate.low}


def _varied(space: Space, rate: Knob, parent: Seen, random: Random, steps: int) -> dict[str, float]:
    """A branch: the parent's layers, its price or up to a step less, the rest of the recipe a little changed."""
    params = dict(parent.params)
    for knob in space.knobs:
        if knob.name.startswith("recipe.") and knob.name != RATE:
            params[knob.name] = _near(knob, params[knob.name], random)
    return {**params, RATE: rate.clip(params[RATE] * _ratio(rate, steps) ** -random.random())}


def _near(knob: Knob, value: float, random: Random) -> float:
    """A value about a fifth of the knob's range away."""
    if knob.log:
        spread = 0.2 * math.log(knob.high / knob.low)
        return knob.clip(math.exp(random.gauss(math.log(value), spread)))
    return knob.clip(random.gauss(value, 0.2 * (knob.high - knob.low)))


def _gaps(positions: Sequence[float]) -> list[float]:
    """How far above each point the next one lies; of the highest nothing."""
    return [after - point for point, after in zip(positions, [*positions[1:], positions[-1]], strict=True)]


def _ratio(rate: Knob, steps: int) -> float:
    return float((rate.high / rate.low) ** (1 / (steps - 1)))


def _rate_of(space: Space) -> Knob:
    found = space.recipe.get("rate")
    if not isinstance(found, Knob) or not found.log:
        shown = f"{found.low:g} to {found.high:g}" if isinstance(found, Knob) else f"{found or 0.0:g}"
        raise SpaceError(
            f"search space {space.name!r}: recipe.rate is {shown}, allowed with sampler {CONTINUATION!r}: "
            "a range with log: true, such as {low: 0.3, high: 10, log: true}"
        )
    return found
