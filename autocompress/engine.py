"""Trials in parallel: the only importer of Ray.

Ray Tune runs `_TrialActor`s, reused from trial to trial; our searcher hands out the study's
proposals, our scheduler its decisions, and every result goes to the `Ledger` in the driver, which
alone writes. Ray's own state is disposable: it lives in a temporary folder and is never read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from autocompress.errors import AutocompressError, UsageError
from autocompress.plan import Measurement, Plan
from autocompress.search.moasha import Decision
from autocompress.tasks.task import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One trial for a worker; `start` is the file of the state that it goes on from, `parent` whose that is."""

    number: int
    plan: Plan
    seed: int
    parent: int | None = None
    start: bytes | None = field(default=None, repr=False)


class Ledger(Protocol):
    """Who hands out the trials and keeps what they give; called in the driver's main thread only."""

    def next(self) -> Job | None:
        """The next trial, None when there is none."""

    def measured(
        self, number: int, measurement: Measurement, artifact: bytes, last: bool, state: bytes | None = None
    ) -> Decision:
        """A trial reached a rung; at its last one, where states are kept, with the file of its state."""

    def ended(self, number: int, error: str | None) -> None:
        """A trial is over; `error` says why it failed."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run: `workers` at a time with `threads` each; `address` of a running Ray cluster, or None."""

    workers: int
    threads: int
    address: str | None = None


def plan_cluster(workers: int | None, address: str | None = None) -> Cluster:
    """Workers x threads = cores of this machine. Raises UsageError for a number of workers below 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        workers = min(cores, 8)
    if workers < 1:
        raise UsageError(f"workers is {workers}, allowed: 1 or more")
    return Cluster(workers, max(1, cores // workers), address)


def run(
    task: Task,
    ledger: Ledger,
    cluster: Cluster,
    trials: int,
    rungs: Sequence[float],
    *,
    trial: Callable[..., Iterator[Any]] | None = None,
    states: bool = False,
) -> None:
    """Run up to `trials` trials to their end. Raises KeyboardInterrupt when the user stops it.

    Trials that are running at that moment end where they are and are not told to the ledger.
    `trial` runs one: it is called as `autocompress.trial.run_trial` is, which it is by default. With `states`,
    the state of each finished trial goes to the ledger.
    """
    with _scratch() as folder, _quiet_ray(cluster) as ray:
        from ray import tune

        trainable = _trainable()
        relay = _Relay(ledger)
        searcher, scheduler, callback = _adapters(relay)
        payload = ray.put(_dump(task, trial))
        resources = {"cpu": 1, "gpu": _gpu_share(ray, cluster)}
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(
                    trainable,
                    payload=payload,
                    threads=cluster.threads,
                    rungs=tuple(rungs),
                    states=states,
                    scratch=folder,
                ),
                resources,
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=trials,
                max_concurrent_trials=cluster.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="search",
                verbose=0,
                callbacks=[callback],
                log_to_file=False,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with _clean_stop() as interrupted:
            relay.stopping = interrupted
            tuner.fit()
        if relay.problem is not None:
            raise relay.problem
        if interrupted():
            raise KeyboardInterrupt


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder that is gone at the end, with what workers that were stopped have left in it."""
    folder = tempfile.mkdtemp(prefix="autocompress-ray-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _clean_stop() -> Iterator[Callable[[], bool]]:
    """Let the first SIGINT or SIGTERM end the run between two results, the second one at once.

    Gives a function that says whether one came. Tune listens to SIGUSR1 for the same purpose.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGUSR1)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    user = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune listens
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in {**before, signal.SIGUSR1: user}.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_ray(cluster: Cluster) -> Iterator[Any]:
    """Ray, started and stopped here unless it was running already; without files, dashboard or chatter."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "TUNE_WARN_THRESHOLD_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cluster.workers)
    import ray

    for name in ("ray", "ray.tune", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ours = not ray.is_initialized()
    if ours:
        try:
            if cluster.address:
                ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            else:
                with _new_sessions(), _threads(cluster.threads):
                    ray.init(
                        address="local",
                        num_cpus=cluster.workers,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level="ERROR",
                    )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = cluster.address or "this machine"
            raise AutocompressError(f"Ray could not be started on {where}: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _new_sessions() -> Iterator[None]:
    """Processes started in here get sessions of their own.

    Ray's daemons then outlive a signal to our process group (Ctrl-C, `timeout`, a service manager)
    until the driver has stopped cleanly; they still die with the driver, by its death signal.
    """
    original = subprocess.Popen.__init__

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "start_new_session": True})

    subprocess.Popen.__init__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        subprocess.Popen.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes started in here, and workers that these start, have so many threads.

    A runtime environment of Ray's does it too, but its workers are not among those that Ray starts in advance.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _gpu_share(ray: Any, cluster: Cluster) -> float:
    gpus = float(ray.cluster_resources().get("GPU", 0))
    return min(1.0, gpus / cluster.workers)


def _dump(task: Task, trial: Callable[..., Iterator[Any]] | None) -> bytes:
    """The task as bytes, its own modules by value; pickled here and read back only by our own workers."""
    from ray import cloudpickle

    with contextlib.ExitStack() as stack:
        for module in _user_modules():
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            return bytes(cloudpickle.dumps((_portable(task), trial)))
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise UsageError(f"task {task.name!r} cannot be sent to a worker process: {error}") from error


def _portable(task: Task) -> Task:
    """The task with loaders that hold no running worker processes (persistent_workers=True)."""

    def rested(data: Any) -> Any:
        if getattr(data, "_iterator", None) is None:
            return data
        loader = copy.copy(data)
        loader._iterator = None
        return loader

    return replace(task, train=rested(task.train), val=rested(task.val), test=rested(task.test))


def _user_modules() -> list[ModuleType]:
    """Modules that a worker may not find: those that lie outside the installed packages."""
    loaded = [module for name, module in list(sys.modules.items()) if name != "__main__" and module is not None]
    return [module for module in loaded if _is_user_file(getattr(module, "__file__", None))]


def _is_user_file(file: str | None) -> bool:
    if not file:
        return False
    path = Path(file).resolve()
    ours = Path(__file__).resolve().parent
    return not path.is_relative_to(ours) and "site-packages" not in path.parts and not _is_stdlib(path)


def _is_stdlib(path: Path) -> bool:
    return any(path.is_relative_to(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib"))


def _trainable() -> type:
    """Ray Tune's side of a trial, made here so that Ray is only imported when a search starts."""
    import ray
    from ray import tune

    from autocompress.compress import lineage

    class TrialActor(tune.Trainable):  # type: ignore[misc]
        """Runs one trial after the other; a step is a rung."""

        def setup(
            self,
            config: dict[str, Any],
            payload: bytes = b"",
            threads: int = 1,
            rungs: tuple[float, ...] = (0.0, 1.0),
            states: bool = False,
            *,
            scratch: str = "",
        ) -> None:
            import torch

            from autocompress.trial import Budget, Workbench, run_trial

            if scratch and Path(scratch).is_dir():  # a worker on the driver's machine
                tempfile.tempdir = scratch
            torch.set_num_threads(threads)
            self.budget, self.states = Budget(rungs), states
            self.problem: str | None = None
            try:
                task, trial = pickle.loads(payload)
                self.bench, self.run_trial = Workbench(task), trial or run_trial
            except Exception as error:  # told by each trial, since Tune would only say that the worker died
                self.problem = f"the task could not be set up in a worker: {_one_line(error)}"
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.job = new_config
            self.outcomes: Iterator[Any] | None = None
            return True

        def step(self) -> dict[str, Any]:
            number = self.job["number"]
            if self.problem is not None:
                return {"number": number, "error": self.problem, "done": True}
            try:
                if self.outcomes is None:
                    plan, start = Plan.from_json(self.job["plan"]), self.job["start"]
                    source = f"the state of trial {self.job['parent']}"
                    state = None if start is None else lineage.unpack(ray.get(start.reference), source)
                    self.outcomes = self.run_trial(self.bench, plan, self.budget, self.job["seed"], state)
                    self.left = len(self.budget.rungs) if plan.recipe.epochs > 0 else 1
                outcome = next(self.outcomes)
                self.left -= 1
                state_file = lineage.pack(outcome.state()) if self.states and self.left == 0 else None
            except Exception as error:  # a user's code may raise anything: the trial fails, not the search
                return {"number": number, "error": _one_line(error), "done": True}
            return {
                "number": number,
                "measurement": json.dumps(outcome.measurement.to_json()),  # Tune would flatten it
                "artifact": outcome.artifact,
                "state": state_file,
                "last": self.left == 0,
                "done": self.left == 0,
            }

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            return None

        def load_checkpoint(self, checkpoint: Any) -> None:
            return None

    return TrialActor


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AutocompressError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class _Shared:
    """A reference into Ray's object store, in a form that Tune hands on as it is."""

    reference: Any


class _Relay:
    """Between Tune and the ledger: each result and each end is passed on once.

    An exception in the ledger (a full disk, say) is kept in `problem` and ends the search.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.problem: BaseException | None = None
        self.stopping: Callable[[], bool] = lambda: False
        self._numbers: dict[str, int] = {}
        self._rungs: set[tuple[int, int]] = set()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Tune pickles its settings for a restore that we never do: nothing of the driver goes in."""
        return object, ()

    def next(self, trial_id: str) -> Job | None:
        job = None if self.problem or self.stopping() else self._guard(self.ledger.next)
        if job is not None:
            self._numbers[trial_id] = job.number
        return job

    def result(self, flat: Mapping[str, Any]) -> Decision:
        """A result as Tune flattens it."""
        if self.problem:
            return Decision.STOP
        number, told = flat["number"], flat.get("measurement")
        if told is None:
            return Decision.CONTINUE
        measurement = Measurement.from_json(json.loads(told))
        if (number, measurement.rung) in self._rungs:
            return Decision.CONTINUE
        self._rungs.add((number, measurement.rung))
        artifact, last, state = flat["artifact"], bool(flat["last"]), flat.get("state")
        decision = self._guard(lambda: self.ledger.measured(number, measurement, artifact, last, state))
        return decision or Decision.STOP

    def ended(self, trial_id: str, error: str | None) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is not None and not self.problem:
            self._guard(lambda: self.ledger.ended(number, error))

    def _guard(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:  # Tune would log it and go on
            self.problem = error
            return None


def _adapters(relay: _Relay) -> tuple[Any, Any, Any]:
    """Tune's searcher, scheduler and callback around the relay."""
    import ray
    from ray.tune import Callback
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.utils.util import flatten_dict

    class ProposalSearcher(Searcher):  # type: ignore[misc]
        """Hands out the ledger's jobs."""

        def __init__(self) -> None:
            super().__init__(metric=None, mode=None)

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:
            job = relay.next(trial_id)
            if job is None:
                return Searcher.FINISHED
            start = None if job.start is None else _Shared(ray.put(job.start))
            told = {"number": job.number, "seed": job.seed, "parent": job.parent}
            return {**told, "plan": job.plan.to_json(), "start": start}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            return None

        def save(self, checkpoint_path: str) -> None:
            return None

        def restore(self, checkpoint_path: str) -> None:
            return None

    class RungScheduler(FIFOScheduler):  # type: ignore[misc]
        """Does at each rung what the ledger decides."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            stop = relay.result(result) is Decision.STOP
            return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    class Closing(Callback):  # type: ignore[misc]
        """Passes on last results, which no scheduler sees, and ends; lets go of artifacts that Tune would keep."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            relay.result(flatten_dict(result))
            result.pop("artifact", None)
            result.pop("state", None)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            relay.ended(trial.trial_id, (trial.last_result or {}).get("error"))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            relay.ended(trial.trial_id, "the worker process died (killed, or out of memory)")

    return ProposalSearcher(), RungScheduler(), Closing()
