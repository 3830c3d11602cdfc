"""Which finished trial a new one goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autocompress.plan import LayerPlan, LayerSpec, Plan


def ancestor(plan: Plan, members: Mapping[int, Plan], specs: Sequence[LayerSpec]) -> int | None:
    """Of the members the nearest that is nowhere more compressed than the plan; None where there is none.

    Distances are summed over layers, weighted by their weights: of ranks in octaves, of bit-widths in
    octaves, of thresholds; and of the rate in octaves. Equal distances: the later trial, trained longer.
    """
    total = sum(spec.parameters for spec in specs) or 1
    distances = {}
    for number, member in members.items():
        steps = [(spec, *_step(member.layers[spec.name], plan.layers[spec.name], spec)) for spec in specs]
        milder = all(least >= 0 for _, least, _ in steps) and member.recipe.rate <= plan.recipe.rate
        if milder:
            far = sum(spec.parameters / total * length for spec, _, length in steps)
            distances[number] = far + math.log2((plan.recipe.rate + 1e-9) / (member.recipe.rate + 1e-9))
    return min(distances, key=lambda n: (distances[n], -n), default=None)


def _step(old: LayerPlan, new: LayerPlan, spec: LayerSpec) -> tuple[float, float]:
    """How much further a layer's plan goes: the least of its three steps (negative for one back), and their sum."""
    ranks = (p.rank if p.rank is not None else spec.full_rank(p.scheme) + 1 for p in (old, new))
    before, after = ranks
    steps = (math.log2(before / after), math.log2(old.bits / new.bits), new.threshold - old.threshold)
    return min(steps), sum(map(abs, steps))
