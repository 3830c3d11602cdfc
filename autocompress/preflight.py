"""What a search will do, before it does it: coverage, knobs, trials, time and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from autocompress.compress.finetune import check_precision, finetune
from autocompress.errors import PlanError, SpaceError
from autocompress.plan import FLOAT_BITS, LayerSpec, check
from autocompress.search.continuation import STEPS
from autocompress.search.space import LayerSettings, Space, ladder, listed, mildest
from autocompress.tasks.batches import evaluate
from autocompress.trial import Workbench

STARTUP_SECONDS = 18.0
"""Ray's start, and torch imported once in each worker."""
WORKER_BYTES = 220e6
"""What a worker process holds beside what this process holds too."""
RAY_BYTES = 450e6
_CONTENTION = 1.25
"""How much longer a step takes when all cores are busy: caches and memory are shared, and the driver works too."""
_WARM, _TIMED = 2, 6
PATIENCE = 4
"""How much more finetuning than others a trial of a continuation gets: each is a step on one long way."""
MOST_STEPS = 5000
"""Of a trial, or an epoch where that is more, to fill a time budget: beyond it more trials buy more."""
LEAST_STEPS = 1000
"""Of a trial, to fill a time budget, as long as there are trials for a whole chain: below it fewer trials buy more."""
_FILLED = 0.9
"""Of a time budget that trials are to fill."""


@dataclass(frozen=True)
class CoverageRow:
    """One tensor of the model, or one layer: compressed, or kept and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    elements: int
    macs: int
    note: str


@dataclass(frozen=True)
class Preflight:
    """What was found and what to expect: seconds for the whole search, bytes of memory at its peak.

    `seconds` is None where the steps that an estimate needs failed; `problem` then says why. The
    search may still go on: another plan need not fail.
    """

    coverage: tuple[CoverageRow, ...]
    compressed: int
    kept: int
    baseline_bytes: int
    knobs: int
    plans: float
    trials: int
    workers: int
    threads: int
    epochs: float
    seconds: float | None
    memory_bytes: float
    problem: str = ""

    @property
    def share(self) -> float:
        """The share of the model's elements that a plan reaches."""
        return self.compressed / max(1, self.compressed + self.kept)

    def to_json(self) -> dict[str, Any]:
        plans = None if math.isinf(self.plans) else self.plans
        return {**asdict(self), "plans": plans, "share": self.share}


def coverage(bench: Workbench) -> tuple[CoverageRow, ...]:
    """Every parameter and buffer of the model, once."""
    rows = [CoverageRow(s.label, s.kind, s.shape, s.parameters, s.macs, _layer_note(s)) for s in bench.layers]
    rows += [CoverageRow(k.name, "kept", (), k.elements, 0, k.reason) for k in bench.inventory.kept]
    return tuple(rows)


def preflight(
    bench: Workbench,
    space: Space,
    *,
    trials: int,
    workers: int,
    threads: int,
    epochs: float,
    rungs: int,
    startup: bool,
    unstopped: int = 0,
    file_seconds: float = 0.0,
) -> Preflight:
    """Measure a few steps of a middling plan on one worker's threads, and extend that to the search.

    `startup` is false when the search is not about to start Ray (there is nothing to wait for). The first `unstopped`
    trials after the baseline are never stopped early, nor are any of a search with one rung. `file_seconds`: of the
    target's file, at each rung.
    """
    rows = coverage(bench)
    kept = sum(r.elements for r in rows if r.kind == "kept")
    total = sum(r.elements for r in rows)
    problem = ""
    try:
        step, fixed = _costs(bench, space, threads, epochs)
    except Exception as error:  # whatever a user's loss, metric or data raises: a trial will say it again
        step, fixed, problem = math.nan, math.nan, f"{type(error).__name__}: {' '.join(str(error).split())}"
    fixed += file_seconds
    recipe_epochs = space.middle(epochs).recipe.epochs
    full = recipe_epochs * bench.steps_per_epoch * step + rungs * fixed
    early = max(0, trials - unstopped - 1) if rungs > 1 else 0
    work = full * (trials - 0.35 * early) * (_CONTENTION if workers > 1 else 1.0)
    seconds = (STARTUP_SECONDS if startup else 0.0) + work / min(workers, max(1, trials)) + fixed * 8
    return Preflight(
        coverage=rows,
        compressed=total - kept,
        kept=kept,
        baseline_bytes=bench.baseline_bytes(),
        knobs=len(space.knobs),
        plans=space.size(),
        trials=trials,
        workers=workers,
        threads=threads,
        epochs=recipe_epochs,
        seconds=None if problem else seconds,
        memory_bytes=_memory(workers),
        problem=problem,
    )


def uniform_steps(trials: int) -> int:
    """How many uniform plans a search of so many trials begins with, after trial 0."""
    return max(1, min(10, trials // 3)) if trials > 1 else 0


def sweep_trials(trials: int, workers: int) -> int:
    """How many trials by continuation a search of so many trials begins with, after trial 0: at most two thirds."""
    return min(2 * (trials - 1) // 3, workers * STEPS) if trials > 1 else 0


def check_space(space: Space, bench: Workbench) -> None:
    """Raise SpaceError where the plan in the middle of the space cannot work: options that do not go together."""
    plan = space.middle(1.0)
    try:
        check(plan, bench.layers)
        check_precision(plan.recipe.precision, bench.device)
    except PlanError as error:
        raise SpaceError(f"the search space holds plans that cannot work: {error}") from error
    if plan.recipe.infomax and not any(spec.seen for spec in bench.layers):
        raise SpaceError(
            f"the search space sets infomax ({plan.recipe.infomax:g}), which needs a linear layer or a convolution, "
            "and the model has none"
        )


def where_seen(space: Space, bench: Workbench) -> tuple[Space, list[str]]:
    """The space with inputs of 32 bits where a layer's inputs cannot be seen, and the labels of those layers."""
    asked = [layer for layer in space.layers if layer.activation_bits != FLOAT_BITS]
    unseen = [layer for layer in asked if not bench.grids.sees(layer.spec)]
    if not unseen:
        return space, []
    whole = [replace(layer, activation_bits=FLOAT_BITS) if layer in unseen else layer for layer in space.layers]
    return replace(space, layers=tuple(whole)), [layer.spec.label for layer in unseen]


def where_cut(space: Space, bench: Workbench) -> tuple[Space, dict[str, str]]:
    """The space with one width for the layers that share their units, and 1 where no unit can go.

    Layers that share units go as far as the mildest of their ranges. Also why, by label, for the layers of which the
    space asked for less than they can give.
    """
    if not any(layer.width != 1.0 for layer in space.layers):
        return space, {}
    layers: dict[str, LayerSettings] = {}
    because: dict[str, str] = {}
    for layer in space.layers:
        why = bench.units.why(layer.spec)
        layers[layer.spec.name] = replace(layer, width=1.0) if why else layer
        if why and layer.width != 1.0:
            because[layer.spec.label] = why
    for group in bench.units.wiring.groups:
        if not group.why:
            shared = mildest(f"{layers[group.layers[0]].spec.label}.width", [layers[n].width for n in group.layers])
            layers |= {name: replace(layers[name], width=shared) for name in group.layers}
    return replace(space, layers=tuple(layers.values())), because


def kept_whole(whole: Mapping[str, str]) -> str:
    """What `where_cut` tells, on one line: labels, and why these layers keep all units."""
    by_why: dict[str, list[str]] = {}
    for label, why in whole.items():
        by_why.setdefault(why, []).append(label)
    return "all units stay of " + "; of ".join(f"{listed(names)}: {why}" for why, names in by_why.items())


def filling(
    bench: Workbench,
    space: Space,
    *,
    seconds: float,
    trials: int,
    workers: int,
    threads: int,
    free: bool,
    file_seconds: float = 0.0,
) -> tuple[int, float] | None:
    """Trials of a continuation, and epochs of finetuning for each, that take about `seconds`.

    So many trials, with 100 to `MOST_STEPS` steps each. If `free`, there are more where these are over too early, and
    fewer where they would have fewer than `LEAST_STEPS` steps: as many as have so many, but a whole chain for each
    worker. None where a step cannot be measured: what is wrong is then told by the preflight.
    """
    try:
        step, fixed = _costs(bench, space, threads, 1.0)
    except Exception:  # whatever a user's loss, metric or data raises
        return None
    fixed += file_seconds
    workers = min(workers, trials)
    slowed = _CONTENTION if workers > 1 else 1.0
    left = (_FILLED * seconds - STARTUP_SECONDS - 8 * fixed) / slowed
    epoch = step * bench.steps_per_epoch
    least, most = 100 / bench.steps_per_epoch, max(1.0, MOST_STEPS / bench.steps_per_epoch)

    def lasting(epochs: float) -> int:
        return workers * int(max(0.0, left) / (epochs * epoch + fixed))

    def within(trials: int) -> float:
        return max(least, min(most, (left / math.ceil(trials / workers) - fixed) / epoch))

    if free:
        whole = max(1 + workers * STEPS, lasting(LEAST_STEPS / bench.steps_per_epoch))
        trials = max(lasting(most), min(trials, whole))
    return trials, within(trials)


def _costs(bench: Workbench, space: Space, threads: int, epochs: float) -> tuple[float, float]:
    """Seconds of finetuning on one batch, and of one measurement (encode, decode, validate)."""
    import torch

    from autocompress.compress import apply

    steps = ladder(space, bench.layers, 3)
    plan = space.plan(steps[len(steps) // 2] if steps else {}, epochs)
    check(plan, bench.layers)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            model = apply.compress(
                bench.model,
                bench.layers,
                plan,
                bench.svd,
                factoriser=bench.factoriser,
                grids=bench.grids,
                units=bench.units,
                calibration=lambda: bench.calibration,
            )
            _, fixed = _timed(lambda: (model.encode(), evaluate(bench.task, bench.model, "val")))
            together = min(plan.recipe.accumulation, bench.steps_per_epoch)
            share = together / bench.steps_per_epoch
            recipe = replace(plan.recipe, epochs=(_WARM + _TIMED) * share)
            feed = bench.feed(0, recipe.distillation > 0, recipe.infomax > 0)
            own = bench.task.finetune or finetune
            rungs = own(model, feed, bench.task.loss, recipe, [_WARM * share, recipe.epochs])
            next(rungs)
            _, seconds = _timed(lambda: next(rungs))
    finally:
        torch.set_num_threads(before)
    return seconds / _TIMED / together, fixed


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def _memory(workers: int) -> float:
    """Resident bytes of the driver, Ray's own processes and the workers."""
    import psutil

    mine = float(psutil.Process().memory_info().rss)
    return mine + RAY_BYTES + workers * (mine + WORKER_BYTES)


def _layer_note(spec: LayerSpec) -> str:
    note = f"rank to {spec.max_rank(spec.schemes[0])}" if spec.factorable and spec.max_rank() else "whole"
    if spec.whole_because:
        note += f" ({spec.whole_because})"
    return note
