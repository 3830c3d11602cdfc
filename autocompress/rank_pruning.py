"""Rank pruning after training: in each layer the smallest rank whose error after the activation is within a tolerance.

No finetuning: what comes out can be written as a file, as a plan, or as a search space that goes on from these ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from autocompress.errors import UsageError
from autocompress.plan import SCHEMES, SVDS, LayerPlan, LayerSpec, Plan, Recipe

if TYPE_CHECKING:
    from rich.table import Table

    from autocompress.compress.factors import Factoriser
    from autocompress.trial import Workbench


@dataclass(frozen=True)
class RankRow:
    """One layer: its full rank, and the smallest rank by each criterion, None where it stays whole.

    `follows` names the activation, or says in brackets why the error was taken before one; `weights` are those of
    the whole layer and of its factors at the rank chosen.
    """

    layer: str
    follows: str
    full: int
    ranks: dict[str, int | None]
    weights: tuple[int, int]


@dataclass(frozen=True)
class RankReport:
    """What rank pruning made of a task: rows, plan, the file's bytes, the metric on validation before and after."""

    rows: tuple[RankRow, ...]
    plan: Plan
    metric: tuple[float, float]
    baseline_bytes: int
    artifact: bytes = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [asdict(row) for row in self.rows],
            "plan": self.plan.to_json(),
            "metric_val": list(self.metric),
            "baseline_bytes": self.baseline_bytes,
            "size_bytes": len(self.artifact),
        }


def prune_ranks(
    bench: Workbench, tolerance: float, *, activation: bool = True, scheme: str = "channel", effort: str = "auto"
) -> RankReport:
    """The smallest ranks of a task's layers, measured on calibration inputs that no factor was fitted to.

    `tolerance`, above 0 and below 1, is the squared error over the variance of what comes out of the activation, or
    of the layer where there is none or `activation` is false. Layers are looked at one by one, each with the inputs
    that it gets in the uncompressed model. Raises UsageError for a tolerance or a scheme that is not allowed.
    """
    from autocompress.tasks.batches import evaluate
    from autocompress.trial import run_trial

    if not (isinstance(tolerance, float) and 0 < tolerance < 1):
        raise UsageError(f"tolerance is {tolerance}, allowed: a share above 0 and below 1, such as 1% or 0.01")
    if scheme not in SCHEMES:
        raise UsageError(f"scheme is {scheme!r}, allowed: {', '.join(SCHEMES)}")
    rows, layers = [], {spec.name: LayerPlan() for spec in bench.layers}
    for spec in bench.layers:
        if not (spec.factorable and spec.max_rank()):
            continue
        own = scheme if scheme in spec.schemes else SCHEMES[0]
        ranks = layer_ranks(bench.factoriser, spec, tolerance, activation=activation, scheme=own)
        last = list(ranks)[-1]
        if ranks[last] is not None:
            layers[spec.name] = LayerPlan(rank=ranks[last], scheme=own, svd=last)
        follows = bench.factoriser.activation(spec)
        told = "(not asked for)" if not activation else follows.name or f"({follows.why})"
        settled = bench.factoriser.settled(spec, layers[spec.name])
        weights = (spec.parameters, spec.weights(settled))
        rows.append(RankRow(spec.label, told, spec.full_rank(own), ranks, weights))
    plan = Plan(layers, Recipe(epochs=0.0, distillation=0.0))
    (outcome,) = run_trial(bench, plan, effort=effort)
    before = evaluate(bench.task, bench.model, "val")
    return RankReport(
        tuple(rows), plan, (before, outcome.measurement.metric_val), bench.baseline_bytes(), outcome.artifact
    )


def layer_ranks(
    factoriser: Factoriser, spec: LayerSpec, tolerance: float, *, activation: bool = True, scheme: str = "channel"
) -> dict[str, int | None]:
    """By criterion the smallest rank of a layer whose error is within the tolerance; None where it must stay whole."""
    criteria = SVDS if activation else SVDS[:2]
    return {
        svd: factoriser.smallest_rank(spec, LayerPlan(rank=1, scheme=scheme, svd=svd), tolerance, after=activation)
        for svd in criteria
    }


def space_from(report: RankReport, specs: Sequence[LayerSpec]) -> dict[str, Any]:
    """A search space that holds these ranks and searches all else as the built-in default does."""
    from autocompress.search.space_file import load_space

    source = dict(load_space(None, specs).source)
    rules = []
    for spec in specs:
        layer = report.plan.layers[spec.name]
        fixed: dict[str, Any] = {"rank": "full"}
        if layer.rank is not None:
            fixed = {"rank": layer.rank, "scheme": layer.scheme, "svd": layer.svd}
        rules.append({"match": spec.label, **fixed})
    return source | {"description": "ranks by rank pruning, all else as in default", "layers": source["layers"] + rules}


def rank_table(report: RankReport) -> Table:
    """The rows for a terminal; "-" is a layer that stays whole."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    criteria = list(report.rows[0].ranks) if report.rows else []
    names = {"plain": "plain SVD", "activation": "activation-aware", "relu": "after activation"}
    for column in ("layer", "activation", "full rank", *(names[c] for c in criteria), "weights", "then"):
        table.add_column(column, justify="left" if column in ("layer", "activation") else "right")
    for row in report.rows:
        ranks = ["-" if rank is None else str(rank) for rank in row.ranks.values()]
        table.add_row(row.layer, row.follows, str(row.full), *ranks, *(f"{count:,}" for count in row.weights))
    totals = (f"{sum(counts):,}" for counts in zip(*(row.weights for row in report.rows), strict=True))
    table.add_row("(all)", "", "", *("" for _ in criteria), *totals)
    return table


def parse_tolerance(text: str) -> float:
    """0.01 from "1%" or "0.01". Raises UsageError for what is not above 0 and below 1."""
    raw = text.strip()
    try:
        number = float(raw.removesuffix("%")) / (100 if raw.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise UsageError(f"tolerance is {text!r}, allowed: a share above 0 and below 1, such as 1% or 0.01")
    return number
