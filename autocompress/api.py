"""The Python API: `search`, `resume`, `open_study` and `sync`."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autocompress
from autocompress import report
from autocompress.errors import StudyBusy, StudyError, UsageError
from autocompress.folders import Records
from autocompress.limits import parse_latency, parse_time
from autocompress.origins import load_origin, origin_of
from autocompress.results import Study, records_of
from autocompress.search.study import Settings, StudyStore
from autocompress.tasks.task import Task
from autocompress.timing import BATCHES, Timing, timed_format

if TYPE_CHECKING:
    from autocompress.deploy.target import Target
    from autocompress.engine import Cluster
    from autocompress.preflight import Preflight
    from autocompress.search.space import Space
    from autocompress.session import Listener, Session
    from autocompress.trial import Workbench

_log = logging.getLogger("autocompress")
DEFAULT_TRIALS = 40
"""Of a study; with the sampler "continuation" a time budget may hold more, or fewer longer ones."""
RUNGS = (0.0, 0.25, 1.0)
"""Shares of the finetuning at which a trial is measured; it may be stopped at the one in the middle."""
_PACKAGES = ("torch", "optuna", "ray", "mlflow", "numpy", "llvmlite")


def search(
    task: Task | str,
    *,
    trials: int | None = None,
    workers: int | None = None,
    name: str | None = None,
    dir: str | Path | None = None,
    seed: int = 0,
    space: str | Path | dict[str, Any] | None = None,
    sampler: str = "tpe",
    time_budget: str | float | None = None,
    finetune_epochs: float | None = None,
    effort: str = "auto",
    target: str = "archive",
    latency: int | None = None,
    max_latency: str | float | None = None,
    inherit: bool = False,
    tracking_uri: str | None = None,
    data_dir: str | Path | None = None,
    address: str | None = None,
    command: str | None = None,
    listener: Listener | None = None,
    on_preflight: Callable[[str, Preflight], None] | None = None,
) -> Study:
    """Search plans for a task and give back the study with its Pareto front.

    `trials` (40) counts all trials of the study. A study of that `name` is continued if task, data,
    space and seed are the same (StudyError otherwise). `time_budget` ("10m" or seconds) ends the
    search early; what is finished is kept. `target` says whose bytes are to be few: "archive" (the artifact), or a
    deployment, "onnx", "onnx-int8", "executorch" or "executorch-int8", measured at each rung as its export would be
    written; its float32 export is then what ratios go by. `latency` makes the time of a call of so many examples in
    onnxruntime a third objective, beside the float32 model's; `max_latency` ("0.7x" of it, or a time such as "2ms")
    too, and plans beyond it are not feasible. `effort` is the coder of the artifacts: "auto" (the
    shortest of ours), "fast", "max", or "huffman" (Deep Compression's). With `inherit` a trial goes on
    from the state of the nearest milder plan of the front; the sampler "continuation" does so always
    (its default space is "continuation"), with about 2,000 steps of finetuning a trial when
    `finetune_epochs` does not say, or with as many, and as many `trials`, as fill the `time_budget`. The task's
    model is never changed.
    Raises TaskError, SpaceError, StudyError, UsageError for mistakes, KeyboardInterrupt
    when it is stopped.
    """
    from autocompress import engine
    from autocompress.deploy.target import check_target
    from autocompress.search.samplers import check_sampler
    from autocompress.search.space_file import read_space
    from autocompress.session import Silent

    listener = listener or Silent()
    check_numbers(DEFAULT_TRIALS if trials is None else trials, seed, finetune_epochs)
    check_effort(effort)
    timing = _timing(latency, max_latency)
    check_target(target, sampler, effort, timing)
    engine.plan_cluster(workers, address)
    check_sampler(sampler)
    budget = None if time_budget is None else parse_time(time_budget)
    read_space(space)  # a task may take long to load: what can be told without it comes first
    if name is not None:
        Records.find(dir).folder(name)
    origin = None
    if isinstance(task, str):
        origin = origin_of(task, data_dir)
        listener.doing(f"loading task {task}")
        task = load_origin(origin)
    return _search(
        task,
        records=Records.find(dir),
        origin=origin,
        trials=trials,
        workers=workers,
        name=name,
        seed=seed,
        space=space,
        sampler=sampler,
        budget=budget,
        epochs=finetune_epochs,
        effort=effort,
        target=target,
        timing=timing,
        inherit=inherit,
        tracking_uri=tracking_uri,
        address=address,
        command=command or f"autocompress.search({task.name!r})",
        listener=listener,
        on_preflight=on_preflight,
    )


def resume(
    study: str | None = None,
    *,
    trials: int | None = None,
    workers: int | None = None,
    dir: str | Path | None = None,
    time_budget: str | float | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    task: Task | None = None,
    listener: Listener | None = None,
    on_preflight: Callable[[str, Preflight], None] | None = None,
) -> Study:
    """Go on with a study after any stop, to the number of trials asked for then, or now.

    A study begun from Python with a `Task` object needs that task again.
    """
    from autocompress.session import Silent

    listener = listener or Silent()
    records = Records.find(dir)
    name = records.existing(study)
    store = StudyStore.open(records.file(name))
    settings = store.settings
    if task is None:
        if settings.origin is None:
            raise StudyError(
                f"study {name!r} was begun from Python with a Task object: go on with "
                f"autocompress.resume({name!r}, task=...)"
            )
        listener.doing(f"loading task {settings.task}")
        task = load_origin(settings.origin)
    if trials is not None:
        check_numbers(trials, 0, None)
    return _search(
        task,
        records=records,
        origin=settings.origin,
        trials=store.asked if trials is None else trials,
        workers=store.workers if workers is None else workers,
        name=name,
        seed=settings.seed,
        space=dict(settings.space),
        sampler=settings.sampler,
        budget=None if time_budget is None else parse_time(time_budget),
        epochs=settings.epochs,
        effort=settings.effort,
        target=settings.target,
        timing=settings.timing,
        inherit=settings.inherit,
        tracking_uri=tracking_uri,
        address=address,
        command=settings.command,
        listener=listener,
        on_preflight=on_preflight,
    )


def open_study(name: str | None = None, dir: str | Path | None = None, task: Task | None = None) -> Study:
    """A study on disk, the latest when no name is given. Raises StudyError where there is none."""
    records = Records.find(dir)
    store = StudyStore.open(records.file(records.existing(name)))
    return Study(records_of(records, store), records, task, store.settings.origin)


def _search(
    task: Task,
    *,
    records: Records,
    origin: Mapping[str, str] | None,
    trials: int | None,
    workers: int | None,
    name: str | None,
    seed: int,
    space: Any,
    sampler: str,
    budget: float | None,
    epochs: float | None,
    effort: str,
    target: str,
    timing: Timing | None,
    inherit: bool,
    tracking_uri: str | None,
    address: str | None,
    command: str,
    listener: Listener,
    on_preflight: Callable[[str, Preflight], None] | None,
) -> Study:
    from autocompress import engine, preflight
    from autocompress.deploy.target import Target
    from autocompress.search.continuation import (
        CONTINUATION,
        chains_within,
        is_continuable,
        steps_within,
    )
    from autocompress.search.samplers import check_sampler
    from autocompress.search.space import ladder
    from autocompress.session import Session
    from autocompress.tasks.batches import metric_name
    from autocompress.tasks.checking import check_task
    from autocompress.tasks.fingerprint import fingerprint
    from autocompress.trial import Workbench, run_trial

    cluster = engine.plan_cluster(workers, address)
    check_sampler(sampler)
    if name is not None:
        records.folder(name)
    check_task(task)
    bench = Workbench(task)
    along = sampler == CONTINUATION
    found = _space(space, bench, target, along=along, timed=timing is not None)
    priced = is_continuable(found)
    if epochs is None and along and name is not None and records.file(name).exists():
        before = StudyStore.open(records.file(name))
        epochs, trials = before.settings.epochs, before.asked if trials is None else trials
    aim = _aim(None if name is None else records.file(name), target, timing, bench, trials, listener=listener)
    trials, epochs = _scope(bench, found, cluster, aim, trials=trials, epochs=epochs, budget=budget, along=along)
    sweep = preflight.sweep_trials(trials, cluster.workers) if priced and not along else 0
    chains = chains_within(sweep or trials - 1, cluster.workers, timed=timing is not None)
    settings = Settings(
        study=name or records.new_name(task.name),
        task=task.name,
        metric=metric_name(task),
        direction=task.direction,
        seed=seed,
        sampler=sampler,
        baseline_bytes=aim.baseline_bytes or bench.baseline_bytes(),
        layers=bench.layers,
        space=found.source,
        fingerprint={**fingerprint(task), "space": found.fingerprint()},
        epochs=epochs,
        rungs=RUNGS[-1:] if along else RUNGS,
        steps=0 if along or priced else preflight.uniform_steps(trials),
        command=command,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        versions=versions(),
        origin=origin,
        effort=effort,
        target=target,
        timing=aim.timing,
        inherit=inherit or priced,
        sweep=sweep,
        chain=steps_within(sweep or trials - 1, chains),
        chains=chains,
    )
    with _claimed(records, settings, chosen=name is not None) as claimed:
        store = _store(records, claimed)
        settings = store.settings
        steps = ladder(found, bench.layers, settings.steps) if settings.steps else []
        store.begin(found, steps, trials, cluster.workers)
        records.mark_used(settings.study)
        left = max(0, trials - sum(t.state != "running" for t in store.record().trials))
        if on_preflight is not None:
            listener.doing("measuring a few steps of finetuning")
            expected = preflight.preflight(
                bench,
                found,
                trials=left,
                workers=cluster.workers,
                threads=cluster.threads,
                epochs=settings.epochs,
                rungs=len(settings.rungs),
                startup=left > 0,
                unstopped=max(settings.sweep, settings.steps),
                file_seconds=aim.seconds,
            )
            on_preflight(settings.study, expected)
        deadline = None if budget is None else time.monotonic() + budget
        session = Session(store, records, listener, deadline)
        session.tracker = _tracker(records, tracking_uri or store.record().tracking_uri, session.homes.put)
        with _tracked(session):
            aim = Target(target, settings.timing, settings.baseline_bytes, answers=aim.answers)
            if left:
                trial = partial(run_trial, effort=settings.effort, deployed=aim)
                listener.doing("starting Ray")
                engine.run(task, session, cluster, left, settings.rungs, trial=trial, states=settings.inherit)
            listener.doing("measuring the front on test data")
            _measure_front(store, records, task, bench, aim)
            _say_if_short(session, trials)
        return Study(records_of(records, store), records, task, settings.origin)


def _space(space: Any, bench: Workbench, target: str, *, along: bool, timed: bool) -> Space:
    """The search space, read and checked; where none is named that which suits a continuation, the target, or time."""
    from autocompress import preflight
    from autocompress.deploy.target import FAST_SPACE, RANKS_ONLY, RANKS_SPACE, check_holds
    from autocompress.search.continuation import CONTINUATION, check_continuable
    from autocompress.search.space_file import load_space

    if space is None:
        space = CONTINUATION if along else RANKS_SPACE if target in RANKS_ONLY else FAST_SPACE if timed else None
    found = load_space(space, bench.layers, bench.rank_errors)
    if along:
        check_continuable(found)
    found, unseen = preflight.where_seen(found, bench)
    if unseen:
        names = ", ".join(map(repr, unseen))
        why = "no example reaches them, their parent computes by itself, or layers of their kind are not looked at"
        _log.warning("inputs of %s keep 32 bits: %s", names, why)
    found, whole = preflight.where_cut(found, bench)
    if whole:
        _log.info("%s", preflight.kept_whole(whole))
    preflight.check_space(found, bench)
    check_holds(target, found)
    return found


def _aim(
    file: Path | None,
    target: str,
    timing: Timing | None,
    bench: Workbench,
    trials: int | None,
    *,
    listener: Listener,
) -> Target:
    """The target, with no more measured than the trials that are left need: one of a study with results is verified.

    The float32 export is made and run where sizes or times are those of exports.
    """
    from autocompress.deploy.target import Target, prepared

    there = StudyStore.open(file).record() if file is not None and file.exists() else None
    ended = 0 if there is None else sum(trial.state != "running" for trial in there.trials)
    if there is not None and ended >= (DEFAULT_TRIALS if trials is None else trials):
        return Target(target, timing)
    if target != "archive" or timing is not None:
        listener.doing(f"exporting the float32 model and running it{' to time it' if timing else ''}")
    return prepared(target, timing, bench, begun=there is not None and there.baseline is not None)


def _scope(
    bench: Workbench,
    space: Space,
    cluster: Cluster,
    aim: Target,
    *,
    trials: int | None,
    epochs: float | None,
    budget: float | None,
    along: bool,
) -> tuple[int, float]:
    """Trials, and epochs of each, where they were not asked for; those of a continuation fill the budget."""
    from autocompress import preflight

    wanted = DEFAULT_TRIALS if trials is None else trials
    if epochs is not None:
        return wanted, epochs
    found: tuple[int, float] | None = None
    if along and budget is not None:
        found = preflight.filling(
            bench,
            space,
            seconds=budget,
            trials=wanted,
            workers=cluster.workers,
            threads=cluster.threads,
            free=trials is None,
            file_seconds=aim.seconds,
        )
    return found or (wanted, bench.default_epochs * (preflight.PATIENCE if along else 1))


@contextlib.contextmanager
def _claimed(records: Records, settings: Settings, chosen: bool) -> Iterator[Settings]:
    """Hold the study's lock. A name that was not the user's choice is changed while another search takes it."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(records.lock(settings.study))
            except StudyBusy:
                if chosen:
                    raise
            else:
                if chosen or not records.file(settings.study).exists():
                    yield settings
                    return
        settings = replace(settings, study=records.new_name(settings.task))


def _say_if_short(session: Session, trials: int) -> None:
    record = session.record
    there = sum(trial.state != "running" for trial in record.trials)
    if there < trials and session.late:
        how = f"autocompress resume {record.study}{session.records.option}"
        _log.warning("the time budget is spent: %d of %d trials are done; go on with: %s", there, trials, how)
    elif there < trials:
        _log.warning("the search space holds no other plan: %d trials instead of %d", there, trials)


def _store(records: Records, settings: Settings) -> StudyStore:
    """The study of that name, which must be of the same task, data, space, seed and finetuning, or a new one."""
    file = records.file(settings.study)
    if not file.exists():
        return StudyStore.create(file, settings)
    store = StudyStore.open(file)
    _same_study(store.settings, settings)
    return store


@contextlib.contextmanager
def _tracked(session: Session) -> Iterator[None]:
    """MLflow follows the session in here; what was still to be written is written at the end, however it comes."""
    session.tracker.start(session.record)
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    finally:
        study = session.store.settings.study
        try:
            session.note_homes()
            session.drop_artifacts()
        finally:
            session.tracker.finish(records_of(session.records, session.store), status)
        session.note_homes()
        if session.tracker.problem:
            again = f"autocompress sync {study}{session.records.option}"
            _log.warning("%s; when it is back, run: %s", session.tracker.problem, again)


def _measure_front(store: StudyStore, records: Records, task: Task, bench: Workbench, aim: Target) -> None:
    """Measure the front's members and the baseline on the test split, once each, and their latencies where these count.

    Members of a front of another target than the archive are run in that target's runtime. Where one is new, the
    latencies of all whose files are there are measured, in turns. Latencies are kept first: what has a test metric is
    not measured again.
    """
    from autocompress.compress.artifact import load
    from autocompress.session import untested
    from autocompress.tasks.batches import evaluate

    record = records_of(records, store)
    left = untested(record)
    if not left:
        return
    for trial in left:
        if trial.artifact is None:
            raise StudyError(f"the artifact of trial {trial.number} is missing from {str(records.root)!r}")
    new = {trial.number for trial in left}
    members = {trial.number: trial for trial in (*left, *(record.front if aim.timing is not None else ()))}
    artifacts = {n: records.root / trial.artifact for n, trial in sorted(members.items()) if trial.artifact}
    decided = {number: record.decided(number, aim.format) for number in artifacts}
    files = {number: path for number, path in artifacts.items() if number}
    metrics, latencies = aim.tested(task, files, decided=decided, untested=new)
    for number in new - metrics.keys():
        metrics[number] = evaluate(task, load(artifacts[number], model=task.model).to(bench.device), "test")
    if latencies:
        store.note_latencies(latencies)
    store.note_tests(dict(sorted(metrics.items())))  # last: what has none yet is measured by the next resume


def _timing(latency: int | None, max_latency: str | float | None) -> Timing | None:
    """What is timed; None where latency is no objective. Raises UsageError for a limit that is none."""
    if latency is None and max_latency is None:
        return None
    limit = None
    if max_latency is not None:
        _, relative = parse_latency(max_latency)
        limit = f"{max_latency:g}x" if relative and not isinstance(max_latency, str) else str(max_latency)
    return Timing(batch=1 if latency is None else latency, limit=limit)


def bench(
    study: str | None = None,
    *,
    task: Task | None = None,
    dir: str | Path | None = None,
    target: str | None = None,
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
) -> Study:
    """The study with the latencies of its front's members, measured now in onnxruntime and kept in the record.

    Each member is exported to the `target` ("onnx" or "onnx-int8"; None: the study's own, else "onnx"), the float32
    model to ONNX, and they are called in turns (`deploy.latency`). `task` as in `open_study`. Raises StudyError,
    ExportError, and UsageError for other targets, and for batch sizes and threads beyond `deploy.latency.MOST`.
    """
    from autocompress.deploy import latency

    records = Records.find(dir)
    name = records.existing(study)
    opened = open_study(name, task=task, dir=dir)
    points = {point.trial: point for point in opened.front}
    if not points:
        raise StudyError(f"study {name!r} has no finished trial yet")
    for point in points.values():
        point.check_file()
    artifacts = {number: point.artifact for number, point in points.items()}
    if target is None:
        target = timed_format(opened.record.target)
    with records.lock(name):
        pass  # what cannot be kept is not measured
    record, which = opened.record, target
    found = latency.measure(
        opened.required_task(),
        artifacts,
        target=target,
        batches=batches,
        threads=threads,
        batch=record.batch,
        decided={number: record.decided(number, which) for number in artifacts},
    )
    with records.lock(name):
        store = StudyStore.open(records.file(name))
        store.note_latencies(found)
        return Study(records_of(records, store), records, opened.task, store.settings.origin)


def sync(study: str | None = None, *, dir: str | Path | None = None, tracking_uri: str | None = None) -> Any:
    """Write the study to MLflow as it is on disk; where it is shown then (`tracking.Home`)."""
    from autocompress import tracking

    records = Records.find(dir)
    name = records.existing(study)
    with records.lock(name):
        store = StudyStore.open(records.file(name))
        uri = tracking_uri or store.record().tracking_uri or tracking.default_uri(records.root)
        home = tracking.sync(records_of(records, store), _target(records, uri))
        store.note_tracking(home.tracking_uri, home.experiment_id, home.run_id)
    return home


def _tracker(records: Records, uri: str | None, on_home: Callable[[Any], None]) -> Any:
    from autocompress import tracking

    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(records.root)
    return tracking.MlflowTracker(_target(records, chosen), on_home=on_home)


def _target(records: Records, uri: str) -> Any:
    from autocompress.tracking import Target

    return Target(
        uri,
        artifact_root=records.mlflow_artifacts,
        write_front=report.write_front,
        write_live=partial(report.write_front, html=False),
        describe=report.describe,
    )


def _same_study(old: Settings, new: Settings) -> None:
    """Raise StudyError unless a study that exists is of this task, data, metric, space, seed and finetuning.

    What the default of something else depends on comes first: another space may follow from a latency.
    """
    _same_fingerprints(old, new, new.fingerprint.keys() - {"space"})
    _same_values(old, ("seed", old.seed, new.seed), ("sampler", old.sampler, new.sampler))
    _same_values(
        old, ("target", old.target, new.target), ("latency", str(old.timing or "none"), str(new.timing or "none"))
    )
    if [spec.name for spec in old.layers] != [spec.name for spec in new.layers]:
        raise StudyError(
            f"study {old.study!r} has {len(old.layers)} layers, the model now {len(new.layers)}: another version of "
            "autocompress may find other ones: give another --study name"
        )
    _same_fingerprints(old, new, {"space"} & new.fingerprint.keys())
    _same_values(old, ("finetune-epochs", old.epochs, new.epochs), ("effort", old.effort, new.effort))
    _same_values(old, ("inherit", old.inherit, new.inherit))


def _same_fingerprints(old: Settings, new: Settings, names: Collection[str]) -> None:
    for what, value in new.fingerprint.items():
        if what in names and old.fingerprint.get(what) != value:
            raise StudyError(
                f"study {old.study!r} exists with another {what} (fingerprint {old.fingerprint.get(what)}, "
                f"now {value}): give another --study name, or the same {what} as before"
            )


def _same_values(old: Settings, *pairs: tuple[str, object, object]) -> None:
    for what, before, now in pairs:
        if before != now:
            raise StudyError(f"study {old.study!r} exists with {what} {before}, not {now}: give another --study name")


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the packages that decide results."""
    from importlib.metadata import version

    found = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "autocompress": autocompress.__version__, **found}


def check_effort(effort: str) -> None:
    from autocompress.codec.container import EFFORTS

    if effort not in EFFORTS:
        raise UsageError(f"effort is {effort!r}, allowed: {', '.join(EFFORTS)}")


def check_numbers(trials: int, seed: int, epochs: float | None) -> None:
    if not (isinstance(trials, int) and 1 <= trials <= 1_000_000):
        raise UsageError(f"trials is {trials!r}, allowed: 1 to 1000000")
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise UsageError(f"seed is {seed!r}, allowed: 0 to {2**31 - 1}")
    if epochs is not None and not 0 <= epochs < 1e6:
        raise UsageError(f"finetune-epochs is {epochs!r}, allowed: 0 to 1000000")
