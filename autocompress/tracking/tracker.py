"""The tracker of a running study: one thread that keeps MLflow up to the record."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from autocompress.errors import TrackingError
from autocompress.record import StudyRecord, TrialRecord, without_password
from autocompress.tracking.mirror import Mirror
from autocompress.tracking.runs import SETTLED
from autocompress.tracking.store import Home, connect, is_http, one_line

Status = Literal["FINISHED", "KILLED", "FAILED"]
WriteFront = Callable[[StudyRecord, Path], Sequence[Path]]
Describe = Callable[[StudyRecord], str]

FRONT_EVERY_S = 60.0
"""How often the front's figures are written while the study runs."""
GATHER_S = 1.0
"""How long trials are gathered between two writes: flags and hypervolumes then cost less."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
PATIENCE_S, LOCAL_PATIENCE_S = 10.0, 60.0
"""How long `finish` waits for an answer of a server, and of a database, which may be migrating."""
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

    The thread always works on the newest record and writes what the store lacks, so a store
    that was away is caught up with as soon as it answers again. `artifact_root` is where the
    artifacts of a database store go (None: the server's own default). `write_front` writes the
    front's files into a folder at the end, `write_live` those that are written while the study
    runs (None: none). `on_home` is called from the thread once the parent run is known.
    """

    def __init__(
        self,
        uri: str,
        *,
        artifact_root: Path | None,
        write_front: WriteFront,
        describe: Describe,
        on_home: Callable[[Home], None] | None = None,
        write_live: WriteFront | None = None,
    ):
        self._uri, self._artifact_root = uri, artifact_root
        self._write_front, self._write_live, self._describe, self._on_home = write_front, write_live, describe, on_home
        self._wake = threading.Condition()
        self._newest: StudyRecord | None = None
        self._ending: Status | None = None
        self._ended: dict[int, float] = {}
        self._home: Home | None = None
        self._problem: str | None = None
        self._thread: threading.Thread | None = None
        self._answered = time.monotonic()
        self._given_up = threading.Event()
        self._written: StudyRecord | None = None
        self._front_written = time.monotonic()

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
        while self._thread.is_alive():
            self._thread.join(0.1)
            if time.monotonic() - max(began, self._answered) > patience:
                self._given_up.set()
                self._problem = self._say(f"no answer in {patience:g} s")
                return

    def _post(self, record: StudyRecord, status: Status | None = None) -> None:
        with self._wake:
            self._newest, self._ending = record, status or self._ending
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="autocompress-mlflow", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _follow(self) -> None:
        mirror: Mirror | None = None
        delay, failures = FIRST_RETRY_S, 0
        while not self._given_up.is_set():
            with self._wake:
                self._wake.wait_for(lambda: self._newest is not self._written or self._ending is not None)
                record, status = self._newest, self._ending
            assert record is not None
            try:
                mirror = mirror or self._open(record)
                self._write(mirror, record, status)
                self._problem = self._say(mirror.artifact_problem) if mirror.artifact_problem else None
                self._written, delay, failures = record, FIRST_RETRY_S, 0
                if status is not None:
                    return
                self._pause(GATHER_S)
            except Exception as error:
                if self._given_up.is_set():
                    return
                self._problem = self._say(one_line(error))
                mirror, failures = None, failures + 1 if status is not None else 0
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

    def _open(self, record: StudyRecord) -> Mirror:
        with self._own_work():
            client = connect(self._uri)
        mirror = Mirror(client, self._uri, record, self._artifact_root, self._alive)
        if self._home != mirror.home:
            self._home = mirror.home
            if self._on_home is not None:
                self._on_home(mirror.home)
        return mirror

    def _write(self, mirror: Mirror, record: StudyRecord, status: Status | None) -> None:
        mirror.update(record, self._ended, final=status is not None)
        if status is not None:
            self._write_end(mirror, record, status)
        elif self._write_live and time.monotonic() - self._front_written > FRONT_EVERY_S:
            self._write_files(mirror, record, self._write_live)
            self._front_written = time.monotonic()

    def _write_end(self, mirror: Mirror, record: StudyRecord, status: Status) -> None:
        try:
            mirror.describe(record, self._describe(record))
            self._write_files(mirror, record, self._write_front)
        finally:
            mirror.end(status)

    def _write_files(self, mirror: Mirror, record: StudyRecord, write: WriteFront) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with self._own_work():
                files = write(record, Path(folder))
            mirror.write_artifacts(files, "front")

    def _alive(self) -> None:
        if self._given_up.is_set():
            raise TrackingError("given up")
        self._answered = time.monotonic()

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """Work that takes its time without the store being at fault."""
        self._answered = math.inf
        try:
            yield
        finally:
            self._answered = time.monotonic()

    def _say(self, what: str) -> str:
        return f"MLflow at {without_password(self._uri)}: {what}"


def sync(
    record: StudyRecord, uri: str, *, artifact_root: Path | None, write_front: WriteFront, describe: Describe
) -> Home:
    """Bring a MLflow store up to the record: create what is missing, correct what differs.

    Raises TrackingError where the store cannot be reached or refuses something.
    """
    tracker = MlflowTracker(uri, artifact_root=artifact_root, write_front=write_front, describe=describe)
    settled = sum(trial.state in SETTLED for trial in record.trials)
    tracker.finish(record, "FINISHED" if settled >= record.asked else "KILLED")
    if tracker.problem is not None or tracker.home is None:
        advice = "" if is_http(uri) else "; if the store's file is damaged, move it away and sync again"
        raise TrackingError((tracker.problem or f"MLflow at {without_password(uri)}: no answer") + advice)
    return tracker.home


def default_uri(records: Path) -> str:
    """The SQLite store beside the records."""
    return f"sqlite:///{records.absolute()}/mlflow.db"
