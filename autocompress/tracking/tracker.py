"""The tracker of a running study: one thread that keeps MLflow up to the record."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from autocompress.errors import TrackingError, UsageError
from autocompress.record import StudyRecord, TrialRecord, without_password
from autocompress.tracking.runs import SETTLED
from autocompress.tracking.store import Home, is_http, one_line
from autocompress.tracking.writer import LocalWriter, Status, Target, Writer

GATHER_S = 1.0
"""How long trials are gathered between two writes: flags and hypervolumes then cost less."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
PATIENCE_S, LOCAL_PATIENCE_S = 10.0, 60.0
"""How long `finish` waits for an answer of a server, and of a database, which may be migrating."""
BUSY_PATIENCE_S = 300.0
"""The same while the writer does work that the store is not to blame for: importing MLflow, drawing the front."""
LAST_ATTEMPTS = 3


class Tracker(Protocol):
    """Follows a study. `start` and `log` return at once, `finish` blocks; none raises because a store is away."""

    def start(self, record: StudyRecord) -> None: ...
    def log(self, record: StudyRecord, trial: TrialRecord) -> None: ...
    def finish(self, record: StudyRecord, status: Status) -> None: ...

    @property
    def home(self) -> Home | None: ...
    @property
    def problem(self) -> str | None: ...


class NullTracker:
    """Follows nothing."""

    home: Home | None = None
    problem: str | None = None

    def start(self, record: StudyRecord) -> None: ...
    def log(self, record: StudyRecord, trial: TrialRecord) -> None: ...
    def finish(self, record: StudyRecord, status: Status) -> None: ...


class MlflowTracker:
    """Keeps a MLflow store up to the newest record, in one thread of its own.

    The thread always hands the newest record to its writer, which writes what the store lacks,
    so a store that was away is caught up with as soon as it answers again. The writer is a
    process of its own (on Windows: this thread) unless another one is given. `on_home` is called
    from the thread once the parent run is known.
    """

    def __init__(self, target: Target, *, on_home: Callable[[Home], None] | None = None, writer: Writer | None = None):
        self._uri, self._on_home = target.uri, on_home
        self._writer = writer or _writer_beside(target)
        self._wake = threading.Condition()
        self._newest: StudyRecord | None = None
        self._written: StudyRecord | None = None
        self._ending: Status | None = None
        self._ended: dict[int, float] = {}
        self._home: Home | None = None
        self._problem: str | None = None
        self._thread: threading.Thread | None = None
        self._answered = time.monotonic()
        self._given_up = threading.Event()

    @property
    def home(self) -> Home | None:
        """Where the study is found; None until it is known."""
        return self._home

    @property
    def problem(self) -> str | None:
        """What could not be written, in one line; None while all is well."""
        return self._problem

    def start(self, record: StudyRecord) -> None:
        """Begin to follow the study. Returns at once."""
        self._post(record)

    def log(self, record: StudyRecord, trial: TrialRecord) -> None:
        """Tell that a trial has ended; `record` is the study as of now. Returns at once."""
        self._ended[trial.number] = time.time()
        self._post(record)

    def finish(self, record: StudyRecord, status: Status) -> None:
        """Write what is left and end the parent run.

        Waits as long as the store answers, gives up after `PATIENCE_S` without an answer.
        """
        if self._ending is not None:
            return
        began = time.monotonic()
        self._post(record, status)
        assert self._thread is not None
        patience = PATIENCE_S if is_http(self._uri) else LOCAL_PATIENCE_S
        try:
            while self._thread.is_alive():
                self._thread.join(0.1)
                if time.monotonic() - max(began, self._answered) > patience:
                    self._problem = self._say(f"no answer in {patience:g} s")
                    break
        finally:
            self._given_up.set()
            self._writer.close()

    def _post(self, record: StudyRecord, status: Status | None = None) -> None:
        with self._wake:
            self._newest, self._ending = record, status or self._ending
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="autocompress-mlflow", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _follow(self) -> None:
        try:
            self._keep_up()
        finally:
            self._writer.close()

    def _keep_up(self) -> None:
        opened, delay, failures = False, FIRST_RETRY_S, 0
        while not self._given_up.is_set():
            with self._wake:
                self._wake.wait_for(lambda: self._newest is not self._written or self._ending is not None)
                record, status = self._newest, self._ending
            assert record is not None
            try:
                if not opened:
                    self._tell(self._writer.open(record, self._progress))
                    opened = True
                refused = self._writer.write(record, dict(self._ended), status, self._progress)
                self._problem = self._say(refused) if refused else None
                self._written, delay, failures = record, FIRST_RETRY_S, 0
                if status is not None:
                    return
                self._pause(GATHER_S)
            except Exception as error:
                if self._given_up.is_set():
                    return
                self._problem = self._say(one_line(error))
                opened, failures = False, failures + 1 if status is not None else 0
                if failures >= LAST_ATTEMPTS:
                    return
                if status is None:
                    self._pause(delay)
                else:
                    time.sleep(FIRST_RETRY_S)
                delay = min(2 * delay, LONGEST_RETRY_S)

    def _pause(self, seconds: float) -> None:
        """Wait that long, or until the end has come."""
        with self._wake:
            self._wake.wait_for(lambda: self._ending is not None, timeout=seconds)

    def _tell(self, home: Home) -> None:
        if self._home != home:
            self._home = home
            if self._on_home is not None:
                self._on_home(home)

    def _progress(self, busy: bool) -> None:
        if self._given_up.is_set():
            raise TrackingError("given up")
        self._answered = time.monotonic() + (BUSY_PATIENCE_S if busy else 0.0)

    def _say(self, what: str) -> str:
        return f"MLflow at {without_password(self._uri)}: {what}"


def _writer_beside(target: Target) -> Writer:
    """A process of its own where the system can hand it a socket, else this process."""
    if os.name != "posix":
        return LocalWriter(target)
    from autocompress.tracking.process import ProcessWriter

    return ProcessWriter(target)


def sync(record: StudyRecord, target: Target) -> Home:
    """Bring a MLflow store up to the record: create what is missing, correct what differs.

    Raises TrackingError where the store cannot be reached or refuses something.
    """
    tracker = MlflowTracker(target, writer=LocalWriter(target))
    settled = sum(trial.state in SETTLED for trial in record.trials)
    tracker.finish(record, "FINISHED" if settled >= record.asked else "KILLED")
    if tracker.problem is not None or tracker.home is None:
        uri = target.uri
        advice = "" if is_http(uri) else "; if the store's file is damaged, move it away and sync again"
        raise TrackingError((tracker.problem or f"MLflow at {without_password(uri)}: no answer") + advice)
    return tracker.home


def default_uri(records: Path) -> str:
    """The SQLite store beside the records. Raises UsageError for a folder whose name an address cannot hold."""
    if "?" in str(records):
        raise UsageError(
            f"records folder {str(records)!r} has a '?' in its name, which the address of its MLflow store cannot "
            "hold: give another --dir, or --tracking-uri"
        )
    return f"sqlite:///{records.absolute()}/mlflow.db"
