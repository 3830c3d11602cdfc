"""Multi-objective asynchronous successive halving.

Schmucker et al. 2021, arXiv 2106.12639: at each rung a trial is ranked by non-dominated sorting
among all that reached it; the best 1 / eta go on. Of equal rank all or none do, so that the members
of the rung's front, each of which may be on the final front, always go on.
"""

from __future__ import annotations

import math
from enum import Enum

from autocompress import pareto


class Decision(Enum):
    """What a trial does after a rung."""

    CONTINUE = "continue"
    STOP = "stop"


class Rungs:
    """The values that trials reported at each rung, and who goes on.

    `eta` is the reduction factor; a rung stops nobody before `grace` trials have reached it.
    """

    def __init__(self, eta: float = 3.0, grace: int = 6) -> None:
        self.eta, self.grace = eta, grace
        self._rungs: dict[int, dict[int, tuple[float, ...]]] = {}

    def report(self, trial: int, rung: int, values: tuple[float, ...]) -> Decision:
        """Note the values (all minimised) that a trial has at a rung, and decide."""
        reached = self._rungs.setdefault(rung, {})
        reached[trial] = values
        if len(reached) < self.grace:
            return Decision.CONTINUE
        numbers = list(reached)
        ranks = pareto.nondominated_rank([reached[n] for n in numbers])
        mine = int(ranks[numbers.index(trial)])
        better = int((ranks < mine).sum())
        return Decision.CONTINUE if better < math.ceil(len(numbers) / self.eta) else Decision.STOP
