"""Which finished trial a new one goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autocompress.plan import LayerPlan, LayerSpec, Plan


def ancestor(plan: Plan, members: Mapping[int, Plan], specs: Sequence[LayerSpec]) -> int | None:
    """Of the members the nearest whose ranks and widths are nowhere lower and whose rate is no higher; None if none is.

    Bit-widths and thresholds may go either way: a state holds the floats behind the codes, pruned ones too.
    Distances are summed over layers, weighted by their weights: of ranks, widths and bit-widths in octaves, of
    thresholds; and of the rate in octaves. Equal distances: the later trial, trained longer.
    """
    total = sum(spec.parameters for spec in specs) or 1
    distances = {}
    for number, member in members.items():
        steps = [(spec, *_step(member.layers[spec.name], plan.layers[spec.name], spec)) for spec in specs]
        if all(fall >= 0 for _, fall, _ in steps) and member.recipe.rate <= plan.recipe.rate:
            far = sum(spec.parameters / total * length for spec, _, length in steps)
            distances[number] = far + math.log2((plan.recipe.rate + 1e-3) / (member.recipe.rate + 1e-3))
    return min(distances, key=lambda n: (distances[n], -n), default=None)


def _step(old: LayerPlan, new: LayerPlan, spec: LayerSpec) -> tuple[float, float]:
    """By how many octaves a layer's rank or width falls, whichever does less, and how far apart its plans are."""
    before, after = (p.rank if p.rank is not None else spec.full_rank(p.scheme) + 1 for p in (old, new))
    rank, width = math.log2(before / after), math.log2(old.width / new.width)
    far = abs(rank) + abs(width) + abs(math.log2(old.bits / new.bits)) + abs(new.threshold - old.threshold)
    return min(rank, width), far
