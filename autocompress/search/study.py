"""The study on disk: an Optuna study that holds every trial, and the proposals that follow from it.

The sampler works on a copy of the study in memory; the study on disk (SQLite in WAL mode) gets a
row when a trial starts and its result when it ends, each in one transaction. Trials that were
running when a process died are proposed again under their number, so that nothing is lost and
nothing is done twice.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autocompress.errors import StudyError
from autocompress.plan import LayerSpec, Measurement, Plan, uncompressed
from autocompress.record import Latency, StudyRecord, TrialRecord
from autocompress.search.continuation import CONTINUATION, STEPS, Seen, following, worst_lossless, worst_useful
from autocompress.search.disk import connect, directions, disk_errors, holds_study, insert_running, write_end
from autocompress.search.lineage import ancestor
from autocompress.search.samplers import make_sampler
from autocompress.search.space import Space
from autocompress.timing import Timing

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import Engine

_SETTINGS, _TESTS, _TRACKING = "autocompress", "autocompress.tests", "autocompress.tracking"
_LATENCIES = "autocompress.latencies"
_FAILURES = 2
"""Trials that failed where they went on from a state, none having finished, after which no other one tries it."""
_ASKED, _DRAWN = 5, 300
"""How often the sampler is asked for a plan that is new, and how many are drawn at random then."""
_SMALL = 20_000
"""A space of up to so many plans is searched to its last one."""


@dataclass(frozen=True)
class Settings:
    """What holds for a whole study; plain JSON types apart from the layers.

    `epochs`: finetuning of a recipe that names none. `steps`: uniform plans after trial 0.
    `effort`: the coder of the artifacts, one of `codec.container.EFFORTS`. `target`: the format whose files' bytes are
    the sizes of trials, one of `deploy.target.TARGETS`. `inherit`: whether trials go on
    from the states of finished ones. `sweep`: trials by continuation after trial 0, before the sampler's.
    `chains` of a continuation (0: one a worker), and by `chain` the steps of each from the lowest price to the highest.
    `timing`: what is timed, where latency is the third objective.
    `origin`: where the task came from, so that `resume` can load it again (None for a Task object).
    """

    study: str
    task: str
    metric: str
    direction: str
    seed: int
    sampler: str
    baseline_bytes: int
    layers: tuple[LayerSpec, ...]
    space: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    epochs: float
    rungs: tuple[float, ...]
    steps: int
    command: str = ""
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] | None = None
    effort: str = "auto"
    inherit: bool = False
    sweep: int = 0
    chain: int = STEPS
    chains: int = 0
    target: str = "archive"
    timing: Timing | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Settings:
        layers = tuple(LayerSpec.from_json(layer) for layer in value["layers"])
        timing = Timing.from_json(value.get("timing"))
        return cls(**{**value, "layers": layers, "rungs": tuple(value["rungs"]), "timing": timing})


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its number, plan, seed, what proposed it, and the trial whose state it goes on from."""

    number: int
    plan: Plan
    seed: int
    origin: str
    parent: int | None = None


class _Found(NamedTuple):
    """A plan that was not tried yet, the parameters it follows from, and the sampler's open trial, if it was asked."""

    plan: Plan
    params: dict[str, float]
    origin: str
    asked: optuna.Trial | None = None
    parent: int | None = None


class StudyStore:
    """One study on disk. Make one with `create` or `open`; `propose` needs `begin` first."""

    def __init__(self, file: Path, study: optuna.Study, engine: Engine) -> None:
        self.file, self._disk, self._engine = file, study, engine
        attributes = study.user_attrs
        self.settings = Settings.from_json(attributes[_SETTINGS])
        self.asked = int(attributes.get("asked", 0))
        self.workers = int(attributes.get("workers", 1))
        self._tests: dict[str, float] = dict(attributes.get(_TESTS, {}))
        self._latencies: dict[str, list[dict[str, Any]]] = dict(attributes.get(_LATENCIES, {}))
        self._tracking: dict[str, Any] = dict(attributes.get(_TRACKING, {}))
        self._trials: dict[int, TrialRecord] = {}
        self._ids: dict[int, int] = {}
        self._params: dict[int, Mapping[str, float]] = {}
        self._read()

    @classmethod
    def create(cls, file: Path, settings: Settings) -> StudyStore:
        """A new study. Raises StudyError where the file exists or cannot be written."""
        if file.exists():
            raise StudyError(f"study {settings.study!r} exists already in {file.parent}")
        draft = file.with_name(f".{file.name}.{os.getpid()}")  # so that a study is there whole or not at all
        with disk_errors(file):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                study, engine = connect(draft, settings.direction, timed=settings.timing is not None)
                study.set_user_attr(_SETTINGS, settings.to_json())
                engine.dispose()
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)
            return cls(file, *connect(file))

    @classmethod
    def open(cls, file: Path) -> StudyStore:
        """A study that exists. Raises StudyError where it does not, or is no study of ours."""
        if not file.is_file():
            raise StudyError(f"no study in {str(file.parent)!r}")
        with disk_errors(file):
            study, engine = connect(file) if holds_study(file) else (None, None)
            if study is None or engine is None or _SETTINGS not in study.user_attrs:
                raise StudyError(f"{str(file)!r} is not a study of autocompress")
            return cls(file, study, engine)

    def begin(self, space: Space, ladder: Sequence[Mapping[str, float]], asked: int, workers: int) -> None:
        """Get ready to propose, up to `asked` trials in all: uniform plans first, then the sampler's."""
        import optuna

        self.asked, self.workers, self._space = asked, workers, space
        with disk_errors(self.file):
            self._disk.set_user_attr("asked", asked)
            self._disk.set_user_attr("workers", workers)
        self._ladder = list(ladder)
        self._waiting = [t for t in self._trials.values() if t.state == "running"]
        self._seen = {t.plan.key() for t in self._trials.values()}
        self._distributions = space.distributions()
        s, timed = self.settings, self.settings.timing is not None
        sampler = make_sampler(s.sampler, s.seed + len(self._trials), len(ladder) + 1)
        self._memory = optuna.create_study(directions=directions(s.direction, timed), sampler=sampler)
        done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
        for trial in self._disk.get_trials(deepcopy=False, states=done):
            if trial.distributions == self._distributions:
                self._memory.add_trial(trial)
        self._open: dict[int, optuna.Trial] = {}

    def propose(self, states: Collection[int] = (), expected: int | None = None) -> Proposal | None:
        """The next trial, noted on disk as running; None when `asked` are there or no new plan is left.

        `states`: the trials whose state is at hand, so that others can go on from them. `expected`: how many trials
        there will be in all, where time may end before `asked` are there.
        """
        if self._waiting:
            trial = self._waiting.pop(0)
            return Proposal(trial.number, trial.plan, trial.seed, trial.origin, trial.parent)
        number = len(self._trials)
        if number >= self.asked:
            return None
        if number == 0:
            found: _Found | None = self._baseline()
        elif self.settings.sampler == CONTINUATION or number <= self.settings.sweep:
            found = self._continued(states, expected)
        else:
            found = self._uniform() or self._sampled(states)
        if found is None:
            return None
        proposal = Proposal(number, found.plan, trial_seed(self.settings.seed, number), found.origin, found.parent)
        self._store(proposal, found)
        return proposal

    def finish(
        self,
        number: int,
        measurements: Sequence[Measurement],
        *,
        state: str,
        sha256: str | None = None,
        error: str | None = None,
        seconds: float = 0.0,
    ) -> TrialRecord:
        """Note how a trial ended ("complete", "stopped" or "failed"). The best rung by validation counts."""
        import optuna

        best = self.best(number, measurements)
        if best is None and state != "failed":
            raise ValueError(f"trial {number} ended as {state} without a measurement")
        failed = state == "failed"
        result = {
            "state": state,
            "measurements": [(m if m is best else replace(m, decided=None)).to_json() for m in measurements],
            "best": None if best is None or failed else best.rung,
            "sha256": sha256,
            "error": error,
            "seconds": seconds,
        }
        values = None if failed or best is None else self._values(best)
        constraints = {} if values is None else self._constraints(values)
        status = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        with disk_errors(self.file):
            write_end(self._engine, self._ids[number], values, {"result": result}, constraints)
        if number in self._open:
            trial = self._open.pop(number)
            for name, value in constraints.items():
                trial.set_constraint(name, value)
            self._memory.tell(trial, values, state=status)
        elif values is not None:
            self._remember(number, values, constraints)
        self._trials[number] = _with_result(self._trials[number], result)
        return self._trials[number]

    def note_tests(self, metrics: Mapping[int, float]) -> None:
        """Add the test metrics of trials, by number."""
        self._tests |= {str(n): value for n, value in metrics.items()}
        with disk_errors(self.file):
            self._disk.set_user_attr(_TESTS, self._tests)

    def note_latencies(self, found: Mapping[int, Sequence[Latency]]) -> None:
        """Add latencies of trials, by number; those of the same key replace earlier ones."""
        for number, latencies in found.items():
            before = (Latency(**value) for value in self._latencies.get(str(number), []))
            merged = {latency.key: latency for latency in (*before, *latencies)}
            self._latencies[str(number)] = [merged[key].to_json() for key in sorted(merged)]
        with disk_errors(self.file):
            self._disk.set_user_attr(_LATENCIES, self._latencies)

    def note_tracking(self, uri: str | None, experiment_id: str | None = None, run_id: str | None = None) -> None:
        """Note where the study is shown in MLflow."""
        self._tracking = {"uri": uri, "experiment_id": experiment_id, "run_id": run_id}
        with disk_errors(self.file):
            self._disk.set_user_attr(_TRACKING, self._tracking)

    def record(self) -> StudyRecord:
        """The study as it is now. `artifact` of the front's members and trial 0 is relative to the records folder."""
        s = self.settings
        trials = dict(sorted(self._trials.items()))
        for tested, metric in self._tests.items():
            trials[int(tested)] = replace(trials[int(tested)], metric_test=metric)
        for timed, found in self._latencies.items():
            latencies = tuple(Latency(**value) for value in found)
            trials[int(timed)] = replace(trials[int(timed)], latencies=latencies)
        record = StudyRecord(
            study=s.study,
            task=s.task,
            metric=s.metric,
            direction=s.direction,
            seed=s.seed,
            baseline_bytes=s.baseline_bytes,
            layers=s.layers,
            trials=tuple(trials.values()),
            asked=self.asked,
            command=s.command,
            created=s.created,
            space=s.space,
            versions=s.versions,
            fingerprint=s.fingerprint,
            tracking_uri=self._tracking.get("uri"),
            experiment_id=self._tracking.get("experiment_id"),
            run_id=self._tracking.get("run_id"),
            sampler=s.sampler,
            workers=self.workers,
            target=s.target,
            timing=s.timing,
        )
        for number in {*(t.number for t in record.front), *([0] if record.baseline else [])}:
            trials[number] = replace(trials[number], artifact=artifact_path(s.study, number))
        return replace(record, trials=tuple(trials.values()))

    def best(self, number: int, measurements: Sequence[Measurement]) -> Measurement | None:
        """The measurement that counts: the best by validation; the last one under a rate, which shrinks files."""
        if self._trials[number].plan.recipe.rate > 0:
            return measurements[-1] if measurements else None
        sign = 1.0 if self.settings.direction == "minimize" else -1.0
        return min(measurements, key=lambda m: (sign * m.metric_val, m.size_bytes), default=None)

    def _baseline(self) -> _Found:
        """Trial 0. Its parameters are the mildest that the space holds, so that samplers can use it."""
        middle = {knob.name: knob.at(0.5) for knob in self._space.knobs}
        mildest = dict(self._ladder[0]) if self._ladder else middle
        return _Found(uncompressed(self.settings.layers), mildest, "baseline")

    def _uniform(self) -> _Found | None:
        while self._ladder:
            params = dict(self._ladder.pop(0))
            plan = self._space.plan(params, self.settings.epochs)
            if plan.key() not in self._seen:
                return _Found(plan, params, "ladder")
        return None

    def _continued(self, states: Collection[int], expected: int | None) -> _Found:
        """The next trial of a search by continuation; a plan may come again, from another state."""
        record = self.record()
        metrics = {t.number: record.objectives(t.best)[1] for t in record.measured if t.best}
        limit = worst_useful(metrics[0], [metrics[n] for n in metrics if n]) if record.baseline else math.inf
        lossless = worst_lossless(metrics[0], limit) if record.baseline else -math.inf
        front = {trial.number for trial in record.front}
        failed = Counter(t.parent for t in record.trials if t.state == "failed")
        went_on = {t.parent for t in record.trials if t.state in ("complete", "stopped")}
        seen = [
            Seen(
                number=t.number,
                parent=t.parent,
                params=self._params[t.number],
                running=t.state == "running",
                useful=t.number in front and metrics[t.number] <= limit,
                open=t.number in states and (failed[t.number] < _FAILURES or t.number in went_on),
                position=math.log(t.best.size_bytes) if t.best else 0.0,
                lossless=t.number in metrics and metrics[t.number] <= lossless,
            )
            for t in record.trials
            if t.number
        ]
        s, number = self.settings, len(record.trials)
        if expected is not None and expected >= (self.asked if s.sampler == CONTINUATION else s.sweep + 1):
            expected = None  # there is time for all
        chains = s.chains or self.workers
        step = following(seen, self._space, chains, s.seed, number, steps=s.chain, expected=expected)
        return _Found(self._space.plan(step.params, self.settings.epochs), step.params, CONTINUATION, None, step.parent)

    def _sampled(self, states: Collection[int]) -> _Found | None:
        """A plan that was not tried yet, by the sampler; at random when the sampler only repeats itself."""
        import optuna

        for _ in range(_ASKED):
            trial = self._memory.ask(self._distributions)
            plan = self._space.plan(trial.params, self.settings.epochs)
            if plan.key() not in self._seen:
                return _Found(plan, dict(trial.params), "sampler", trial, self._ancestor(plan, states))
            self._memory.tell(trial, state=optuna.trial.TrialState.FAIL)
        for params in self._at_random():
            plan = self._space.plan(params, self.settings.epochs)
            if plan.key() not in self._seen:
                return _Found(plan, params, "sampler", None, self._ancestor(plan, states))
        return None

    def _ancestor(self, plan: Plan, states: Collection[int]) -> int | None:
        """The trial to go on from, where the study hands states on: a milder one of the front."""
        if not self.settings.inherit:
            return None
        members = {t.number: t.plan for t in self.record().front if t.number in states}
        return ancestor(plan, members, self.settings.layers)

    def _at_random(self) -> Iterator[dict[str, float]]:
        """Parameters in random order: all that a small space of whole numbers holds, else a few hundred."""
        random = Random(f"{self.settings.seed} {len(self._trials)}")
        knobs = self._space.knobs
        ranges = [range(int(knob.low), int(knob.high) + 1) for knob in knobs]
        total = math.prod(map(len, ranges))
        if total > _SMALL or any(knob.kind != "int" for knob in knobs):
            for _ in range(_DRAWN):
                yield {knob.name: knob.at(random.random()) for knob in knobs}
            return
        for index in random.sample(range(total), total):
            params: dict[str, float] = {}
            rest = index
            for knob, values in zip(knobs, ranges, strict=True):
                rest, place = divmod(rest, len(values))
                params[knob.name] = values[place]
            yield params

    def _store(self, proposal: Proposal, found: _Found) -> None:
        number, asked = proposal.number, found.asked
        with disk_errors(self.file):
            self._ids[number] = insert_running(
                self._engine,
                self._disk._study_id,
                number,
                params=found.params,
                distributions=self._distributions,
                user_attrs={
                    "plan": found.plan.to_json(),
                    "seed": proposal.seed,
                    "origin": found.origin,
                    "parent": found.parent,
                },
                system_attrs={}
                if asked is None
                else self._memory.get_trials(deepcopy=False)[asked.number].system_attrs,
            )
        if asked is not None:
            self._open[number] = asked
        self._params[number] = found.params
        self._seen.add(found.plan.key())
        self._trials[number] = TrialRecord(
            number, "running", found.plan, proposal.seed, origin=found.origin, parent=found.parent
        )

    def _values(self, best: Measurement) -> list[float]:
        """The objectives as Optuna knows them."""
        two = [float(best.size_bytes), best.metric_val]
        if self.settings.timing is None:
            return two
        assert best.latency is not None
        return [*two, best.latency]

    def _constraints(self, values: Sequence[float]) -> dict[str, float]:
        """By name what must not be above 0: how much slower a call is than the limit."""
        timing = self.settings.timing
        return {} if timing is None or timing.most is None else {"latency": values[2] - timing.most}

    def _remember(self, number: int, values: list[float], constraints: Mapping[str, float]) -> None:
        """Tell the sampler of a trial that it did not propose itself."""
        import optuna

        frozen = self._disk._storage.get_trial(self._ids[number])
        if frozen.distributions == self._distributions:
            self._memory.add_trial(
                optuna.trial.create_trial(
                    values=values,
                    params=frozen.params,
                    distributions=frozen.distributions,
                    constraints=dict(constraints),
                )
            )

    def _read(self) -> None:
        for trial in self._disk.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            if "plan" not in attributes:
                continue
            plan = Plan.from_json(attributes["plan"])
            record = TrialRecord(
                trial.number,
                "running",
                plan,
                attributes["seed"],
                origin=attributes["origin"],
                parent=attributes["parent"],
            )
            ended = trial.state.is_finished() and "result" in attributes
            self._trials[trial.number] = _with_result(record, attributes["result"]) if ended else record
            self._ids[trial.number] = trial._trial_id
            self._params[trial.number] = trial.params


def trial_seed(seed: int, number: int) -> int:
    """The seed of a trial, 0 to 2**31 - 1: different numbers and studies share none but by chance."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) >> 1


def artifact_name(number: int) -> str:
    """The file name of a trial's artifact."""
    return f"trial-{number:04d}.acz"


def artifact_path(study: str, number: int) -> str:
    """Where a trial's artifact is, relative to the records folder."""
    return f"studies/{study}/artifacts/{artifact_name(number)}"


def _with_result(trial: TrialRecord, result: Mapping[str, Any]) -> TrialRecord:
    measurements = tuple(Measurement.from_json(m) for m in result["measurements"])
    return replace(
        trial,
        state=result["state"],
        measurements=measurements,
        best=next((m for m in measurements if m.rung == result["best"]), None),
        sha256=result["sha256"],
        error=result["error"],
        seconds=result["seconds"],
    )
