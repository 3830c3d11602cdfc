"""The driver's side of a search: what happens when a trial starts, reaches a rung, ends.

The order on disk makes every moment safe to be killed at: the artifact is written first, then the
study's row; artifacts that leave the front are removed last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from autocompress.engine import Job
from autocompress.errors import RecordError
from autocompress.folders import Records, write_file
from autocompress.plan import Measurement
from autocompress.record import StudyRecord, TrialRecord
from autocompress.search.moasha import Decision, Rungs
from autocompress.search.study import StudyStore, artifact_name


class Listener(Protocol):
    """Who watches a search (the terminal)."""

    def doing(self, what: str) -> None: ...

    def started(self, job: Job) -> None: ...

    def measured(self, number: int, measurement: Measurement) -> None: ...

    def ended(self, trial: TrialRecord, record: StudyRecord) -> None: ...


class Silent:
    """A listener that does nothing."""

    def doing(self, what: str) -> None:
        """What is done before the first trial, and after the last."""

    def started(self, job: Job) -> None:
        """A trial was handed to a worker."""

    def measured(self, number: int, measurement: Measurement) -> None:
        """A trial reached a rung."""

    def ended(self, trial: TrialRecord, record: StudyRecord) -> None:
        """A trial is over."""


@dataclass
class _Running:
    """A trial under way: its measurements, and the file of the best of them."""

    began: float
    origin: str
    measurements: list[Measurement] = field(default_factory=list)
    artifact: bytes = b""
    state: bytes | None = None
    best: Measurement | None = None
    stopped: bool = False


class Session:
    """The `engine.Ledger` of a study: proposes, keeps artifacts, tells study, tracker and listener."""

    def __init__(
        self,
        store: StudyStore,
        records: Records,
        listener: Listener,
        deadline: float | None = None,
        tracker: Any = None,
    ) -> None:
        self.store, self.records, self.listener, self.deadline, self.tracker = (
            store,
            records,
            listener,
            deadline,
            tracker,
        )
        self.homes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._rungs = Rungs()
        record = store.record()
        for trial in record.trials:
            for m in trial.measurements[:-1] if trial.state == "complete" else trial.measurements:
                if m.rung:
                    self._rungs.report(trial.number, m.rung, record.objectives(m))
        self._running: dict[int, _Running] = {}
        self._record: StudyRecord | None = None

    @property
    def record(self) -> StudyRecord:
        """The study as it is now."""
        if self._record is None:
            self._record = self.store.record()
        return self._record

    def next(self) -> Job | None:
        """The next trial; None when all are there, or the time is over (there is always time for the first).

        A trial whose parent's state is lost fails here, and the one after it is the next.
        """
        self.note_homes()
        while not (self.late and self.record.trials):
            proposal = self.store.propose(self._states(), self._expected())
            if proposal is None:
                return None
            self._record = None
            self._running[proposal.number] = _Running(time.monotonic(), proposal.origin)
            job = Job(proposal.number, proposal.plan, proposal.seed, proposal.parent)
            self.listener.started(job)
            try:
                return job if job.parent is None else replace(job, start=self._state_of(job.parent))
            except RecordError as error:
                self.ended(job.number, str(error))
        return None

    def measured(
        self, number: int, measurement: Measurement, artifact: bytes, last: bool, state: bytes | None = None
    ) -> Decision:
        """Keep a rung's numbers, and its file if it is the trial's best so far; decide whether to go on."""
        trial = self._running[number]
        trial.measurements.append(measurement)
        trial.state = state
        best = self.store.best(number, trial.measurements)
        if best is measurement:
            trial.best, trial.artifact = measurement, artifact
        self.listener.measured(number, measurement)
        if last:
            return Decision.CONTINUE
        values = self.record.objectives(measurement)
        decision = self._rungs.report(number, measurement.rung, values) if measurement.rung else Decision.CONTINUE
        if trial.origin != "sampler":
            decision = Decision.CONTINUE
        if self.late:
            decision = Decision.STOP
        trial.stopped = decision is Decision.STOP
        return decision

    def ended(self, number: int, error: str | None) -> None:
        """Write what the trial gave: file, study, tracker; drop files that are no longer needed."""
        trial = self._running.pop(number)
        seconds = time.monotonic() - trial.began
        if error is None and not trial.measurements:
            error = "the worker gave no result"
        state = "failed" if error else "stopped" if trial.stopped else "complete"
        digest = None
        if state != "failed" and self._joins_front(number, trial):
            path = self.records.artifact(self.store.settings.study, artifact_name(number))
            write_file(path, trial.artifact)
            if trial.state is not None and number:  # trial 0 left the model as it was
                write_file(self.records.state(self.store.settings.study, number), trial.state)
            digest = hashlib.sha256(trial.artifact).hexdigest()
        self.store.finish(number, trial.measurements, state=state, sha256=digest, error=error, seconds=seconds)
        self._record = None
        self.drop_artifacts()
        done = next(t for t in self.record.trials if t.number == number)
        self.tracker.log(self.record, done)
        self.listener.ended(done, self.record)

    def drop_artifacts(self) -> None:
        """Remove the files of trials that are neither on the front nor the baseline, and states that nobody needs."""
        study = self.store.settings.study
        kept = {t.number for t in self.record.trials if t.artifact is not None} | self._running.keys()
        _drop(self.records.artifact(study, "x").parent, {artifact_name(number) for number in kept})
        parents = {t.parent for t in self.record.trials if t.parent is not None and t.state == "running"}
        _drop(self.records.state(study, 0).parent, {self.records.state(study, n).name for n in kept | parents})

    def _expected(self) -> int | None:
        """How many trials there will be at the end of the time budget, if they take as long as the last ones did."""
        ended = [t for t in self.record.trials if t.number and t.state == "complete"]
        took = [t.measurements[-1].seconds for t in ended[-2 * self.store.workers :]]  # without a worker's start
        if self.deadline is None or not took:
            return None
        left = max(0.0, self.deadline - time.monotonic())
        return len(self.record.trials) + max(1, int(left * self.store.workers / max(mean(took), 1e-3)))

    def _states(self) -> frozenset[int]:
        """The trials whose states are kept."""
        folder = self.records.state(self.store.settings.study, 0).parent
        numbers = (path.stem.removeprefix("trial-") for path in folder.glob("trial-*.safetensors"))
        return frozenset(int(number) for number in numbers if number.isdecimal())  # what else lies there is not ours

    def _state_of(self, number: int) -> bytes:
        path = self.records.state(self.store.settings.study, number)
        try:
            return path.read_bytes()
        except OSError as error:
            raise RecordError(f"the state of trial {number} cannot be read from {str(path)!r}: {error}") from error

    def note_homes(self) -> None:
        """Store where MLflow shows the study, once its writer thread has said so."""
        with contextlib.suppress(queue.Empty):
            while True:
                home = self.homes.get_nowait()
                self.store.note_tracking(home.tracking_uri, home.experiment_id, home.run_id)
                self._record = None

    def _joins_front(self, number: int, trial: _Running) -> bool:
        """Whether the record will count the trial to the front: of equal ones it takes the first by number."""
        assert trial.best is not None
        mine = self.record.objectives(trial.best)
        rivals = [(self.record.objectives(t.best), t.number) for t in self.record.front if t.best]
        beaten = any(
            all(a <= b for a, b in zip(theirs, mine, strict=True)) and (theirs != mine or n < number)
            for theirs, n in rivals
        )
        return number == 0 or not beaten

    @property
    def late(self) -> bool:
        """Whether the time budget is spent."""
        return self.deadline is not None and time.monotonic() > self.deadline


def _drop(folder: Path, kept: Collection[str]) -> None:
    """Remove the trials' files of a folder that are not kept, and half-written ones of a process that was killed."""
    found: list[str] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        found = [entry.name for entry in entries]
    for name in found:
        if (name.startswith("trial-") and name not in kept) or name.startswith(".trial-"):
            (folder / name).unlink(missing_ok=True)


def untested(record: StudyRecord) -> tuple[TrialRecord, ...]:
    """The baseline and the front's members that have no test metric yet, by number."""
    wanted = {t.number: t for t in (*record.front, *([record.baseline] if record.baseline else []))}
    return tuple(t for _, t in sorted(wanted.items()) if t.metric_test is None)
