"""What a trial costs beside its own work: our engine with everything recorded, Optuna alone, Ray Tune alone.

    python scripts/bench_overhead.py [--trials 150] [--workers 2] [--repeats 3] [--knobs 12 36] [--json FILE]

Ours is the real path (StudyStore on SQLite, Session, engine.run on Ray, MlflowTracker on SQLite) with a trial that
does nothing. Times are those of the steady state: from the first finished trial to the last, the tracker being
connected before; "recorded" waits until MLflow holds every trial, the description and the front's figures too. CPU is
that of the driver process (MLflow is written by a process of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress import engine, report
from autocompress.folders import Records
from autocompress.plan import Measurement, Plan
from autocompress.record import StudyRecord, TrialRecord
from autocompress.search.samplers import make_sampler
from autocompress.search.space import Space, ladder
from autocompress.search.space_file import load_space
from autocompress.search.study import Settings, StudyStore
from autocompress.session import Session, Silent
from autocompress.tasks.task import Task
from autocompress.tracking import MlflowTracker, NullTracker, Target, default_uri
from autocompress.trial import Budget, Outcome, Workbench

KNOBS_A_LAYER = 3
SPACE = {
    "version": 1,
    "layers": [{"match": "*", "rank": [1, 7], "bits": [2, 8], "threshold": [0.0, 2.0]}],
    "recipe": {"epochs": 1.0, "learning_rate": 1e-3, "distillation": 0.0},
}


@dataclass(frozen=True)
class Cost:
    """Milliseconds a trial: wall time, wall time until all is recorded, CPU time of this process; load average."""

    what: str
    knobs: int
    wall_ms: float
    recorded_ms: float
    cpu_ms: float
    load: float


@dataclass
class Clock:
    """Wall and CPU time of each finished trial."""

    wall: list[float]
    cpu: list[float]

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def cost(self, what: str, knobs: int, recorded: float | None = None) -> Cost:
        """Per trial, from the first tick to the last; `recorded`: seconds from the last tick until all was written."""
        gaps = len(self.wall) - 1
        wall, cpu = self.wall[-1] - self.wall[0], self.cpu[-1] - self.cpu[0]
        whole = wall + (recorded or 0.0)
        return Cost(what, knobs, 1e3 * wall / gaps, 1e3 * whole / gaps, 1e3 * cpu / gaps, os.getloadavg()[0])


class Stopwatch(Silent):
    """A listener that notes when trials end."""

    def __init__(self) -> None:
        self.clock = Clock([], [])

    def ended(self, trial: TrialRecord, record: StudyRecord) -> None:
        self.clock.tick()


def toy_task(layers: int) -> Task:
    """A stack of 16 x 16 layers; its data is one batch of noise."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    splits = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(3)]
    return Task(
        model, *splits, loss=nn.functional.mse_loss, metric=_fidelity, name="toy", example_inputs=(splits[0][0],)
    )


def _fidelity(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return 1.0 / (1.0 + float((outputs - targets).square().mean()))


def objectives(params: Sequence[tuple[float, float, float]]) -> tuple[int, float]:
    """A made-up size and metric that pull against each other: (rank, bits, threshold) of each layer."""
    kept = [rank / 7 * bits / 8 * (1 - threshold / 2.5) for rank, bits, threshold in params]
    size = 200 + round(1000 * sum(kept))
    metric = statistics.fmean(1 - 2 ** (-4 * k) for k in kept)
    return size, metric


def no_work(bench: Workbench, plan: Plan, budget: Budget, seed: int) -> Iterator[Outcome]:
    """As `run_trial`, with numbers that are made up."""
    layers = [(layer.rank or 7, layer.bits, layer.threshold) for layer in plan.layers.values()]
    size, metric = objectives(layers)
    for rung in range(len(budget.rungs) if plan.recipe.epochs > 0 else 1):
        yield Outcome(Measurement(rung, float(rung), size, metric, 1, 0.0), bytes(size), dict)


def ours(knobs: int, sampler: str, trials: int, workers: int, rungs: int) -> Cost:
    """A search as it is, with trials that do nothing."""
    with tempfile.TemporaryDirectory() as folder:
        task, session = _session(Path(folder), knobs, sampler, trials=trials, workers=workers, rungs=rungs)
        tracker = session.tracker = MlflowTracker(
            Target(
                default_uri(session.records.root), session.records.mlflow_artifacts, report.write_front, report.describe
            )
        )
        tracker.start(session.record)
        while tracker.home is None and tracker.problem is None:
            time.sleep(0.05)
        shares = session.store.settings.rungs
        engine.run(task, session, engine.plan_cluster(workers), trials, shares, trial=no_work)
        began = time.perf_counter()
        tracker.finish(session.record, "FINISHED")
        recorded = time.perf_counter() - began
        if tracker.problem is not None:
            raise SystemExit(tracker.problem)
        record = session.store.record()
        assert record.count("complete") + record.count("stopped") == trials
    named = f"autocompress, {sampler}" + (f", {rungs} rungs" if rungs > 1 else "")
    return _clock(session).cost(named, knobs, recorded)


def study_alone(knobs: int, sampler: str, trials: int) -> Cost:
    """The sampler, the study on disk and the artifacts of a search, without Ray and MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        task, session = _session(Path(folder), knobs, sampler, trials=trials)
        bench, budget = Workbench(task), Budget(session.store.settings.rungs)
        while (job := session.next()) is not None:
            for outcome in no_work(bench, job.plan, budget, job.seed):
                session.measured(job.number, outcome.measurement, outcome.artifact, True)
            session.ended(job.number, None)
    return _clock(session).cost(f"autocompress, {sampler}, study alone", knobs)


def _session(
    folder: Path, knobs: int, sampler: str, *, trials: int, workers: int = 1, rungs: int = 1
) -> tuple[Task, Session]:
    task = toy_task(knobs // KNOBS_A_LAYER)
    bench = Workbench(task)
    space = load_space(SPACE, bench.layers)
    assert len(space.knobs) == knobs
    records = Records(folder)
    shares = tuple((step + 1) / rungs for step in range(rungs))
    store = StudyStore.create(records.file("toy"), _settings(task, bench, space, sampler, shares))
    store.begin(space, ladder(space, bench.layers, 10), trials, workers)
    return task, Session(store, records, Stopwatch(), tracker=NullTracker())


def _clock(session: Session) -> Clock:
    assert isinstance(session.listener, Stopwatch)
    return session.listener.clock


def _settings(task: Task, bench: Workbench, space: Space, sampler: str, rungs: tuple[float, ...]) -> Settings:
    return Settings(
        study="toy",
        task=task.name,
        metric="fidelity",
        direction="maximize",
        seed=0,
        sampler=sampler,
        baseline_bytes=bench.baseline_bytes(),
        layers=bench.layers,
        space=space.source,
        fingerprint={},
        epochs=1.0,
        rungs=rungs,
        steps=10,
    )


def plain_optuna(knobs: int, sampler: str | None, trials: int, disk: bool) -> Cost:
    """`study.optimize`; `sampler` None is Optuna's own default."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    clock = Clock([], [])

    def objective(trial: Any) -> tuple[float, float]:
        params = [
            (
                trial.suggest_int(f"{layer}.rank", 1, 7),
                trial.suggest_int(f"{layer}.bits", 2, 8),
                trial.suggest_float(f"{layer}.threshold", 0.0, 2.0),
            )
            for layer in range(knobs // KNOBS_A_LAYER)
        ]
        return objectives(params)

    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(
            directions=["minimize", "maximize"],
            storage=f"sqlite:///{folder}/study.db" if disk else None,
            sampler=None if sampler is None else make_sampler(sampler, 0, 11),
        )
        study.optimize(objective, n_trials=trials, callbacks=[lambda *_: clock.tick()])
    where = "SQLite" if disk else "memory"
    return clock.cost(f"study.optimize, {where}, {sampler or 'default sampler'}", knobs)


def bare_tune(knobs: int, trials: int, workers: int) -> Cost:
    """Ray Tune's own random search with reused actors; nothing recorded."""
    cluster = engine.plan_cluster(workers)
    with engine._quiet_ray(cluster):
        from ray import tune

        class Nothing(tune.Trainable):  # type: ignore[misc]
            def setup(self, config: dict[str, Any]) -> None:
                self.reset_config(config)

            def reset_config(self, new_config: dict[str, Any]) -> bool:
                self.params = new_config
                return True

            def step(self) -> dict[str, Any]:
                return {"size": sum(self.params.values()), "done": True}

            def save_checkpoint(self, checkpoint_dir: str) -> None:
                return None

            def load_checkpoint(self, checkpoint: Any) -> None:
                return None

        clock = Clock([], [])

        class Ticks(tune.Callback):  # type: ignore[misc]
            def on_trial_complete(self, *_: Any, **__: Any) -> None:
                clock.tick()

            def __reduce__(self) -> tuple[type, tuple[()]]:
                return object, ()

        with tempfile.TemporaryDirectory() as folder:
            tune.Tuner(
                tune.with_resources(Nothing, {"cpu": 1}),
                param_space={f"x{n}": tune.uniform(0, 1) for n in range(knobs)},
                tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=workers, reuse_actors=True),
                run_config=tune.RunConfig(
                    storage_path=folder, name="bare", verbose=0, callbacks=[Ticks()], log_to_file=False
                ),
            ).fit()
    return clock.cost("Ray Tune, reused actors", knobs)


def median(costs: Sequence[Cost]) -> Cost:
    """Each number's median over the repeats."""
    middle = {
        key: statistics.median(getattr(cost, key) for cost in costs)
        for key in ("wall_ms", "recorded_ms", "cpu_ms", "load")
    }
    return Cost(costs[0].what, costs[0].knobs, **middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--knobs", type=int, nargs="+", default=[12, 36])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    trials, workers = options.trials, options.workers
    rows: list[Cost] = []
    for knobs in options.knobs:
        runs: list[Callable[[], Cost]] = [
            lambda k=knobs, s=sampler: ours(k, s, trials, workers, 1) for sampler in options.samplers
        ]
        if not options.only_ours:
            runs += [
                lambda k=knobs: ours(k, options.samplers[0], trials, workers, 3),
                lambda k=knobs: study_alone(k, options.samplers[0], trials),
                lambda k=knobs: plain_optuna(k, options.samplers[0], trials, disk=False),
                lambda k=knobs: plain_optuna(k, None, trials, disk=True),
                lambda k=knobs: bare_tune(k, trials, workers),
            ]
        repeats = [[_noted(run()) for run in runs] for _ in range(options.repeats)]
        rows += [median(costs) for costs in zip(*repeats, strict=True)]
    show(rows, options)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


def _noted(cost: Cost) -> Cost:
    print(cost, file=sys.stderr)
    return cost


def show(rows: Sequence[Cost], options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    print(
        f"{options.trials} trials, {options.workers} workers, {cores} cores; medians of {options.repeats}; ms a trial"
    )
    print(f"{'':<42}{'knobs':>6}{'wall':>8}{'recorded':>10}{'CPU':>8}{'of ours':>9}{'load':>7}")
    first: dict[int, float] = {}
    for row in rows:
        share = row.wall_ms / first.setdefault(row.knobs, row.wall_ms)
        print(
            f"{row.what:<42}{row.knobs:>6}{row.wall_ms:>8.1f}{row.recorded_ms:>10.1f}{row.cpu_ms:>8.1f}"
            f"{share:>9.2f}{row.load:>7.1f}"
        )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
