"""A writer in a process of its own: MLflow's work then never holds the driver's interpreter lock.

The driver asks, the child answers, over a socket pair of their own: pickles, which only these two
processes see. The child ends with its driver, whatever way that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from autocompress.errors import TrackingError
from autocompress.record import StudyRecord, TrialRecord
from autocompress.tracking.store import Home, one_line
from autocompress.tracking.writer import LocalWriter, Progress, Status, Target

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autocompress.tracking.process import serve_driver; serve_driver(*map(int, sys.argv[2:]))"
)
_DIES_WITHIN_S = 2.0
_NICENESS = 10
"""Once it has connected the child yields to trials: a tenth of a busy core is enough for five trials a second."""


class ProcessWriter:
    """A `Writer` whose work is done by a child process, begun at `open`.

    Everything in `target` must be picklable by name: functions of a module, not lambdas. Only
    trials that are new or changed since the last call travel. A child that was killed is an
    error like any other: the next `open` begins another.
    """

    def __init__(self, target: Target):
        self._target = target
        self._child: _Child | None = None
        self._answered = False
        self._known: dict[int, TrialRecord] = {}

    @property
    def pid(self) -> int | None:
        """The child's process id, None where there is none."""
        return None if self._child is None else self._child.process.pid

    def open(self, record: StudyRecord, progress: Progress) -> Home:
        progress(True)
        if self._child is None or not self._answered:
            self.close()
            self._child = _Child()
            self._child.send(self._target)
        self._known = {}
        home: Home = self._ask(("open", *self._news(record)), progress)
        return home

    def write(
        self, record: StudyRecord, ended: Mapping[int, float], status: Status | None, progress: Progress
    ) -> str | None:
        refused: str | None = self._ask(("write", *self._news(record), ended, status), progress)
        return refused

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _news(self, record: StudyRecord) -> tuple[StudyRecord, list[TrialRecord]]:
        """The record without its trials, and those that the child does not know."""
        changed = [trial for trial in record.trials if self._known.get(trial.number) is not trial]
        self._known |= {trial.number: trial for trial in changed}
        return replace(record, trials=()), changed

    def _ask(self, request: object, progress: Progress) -> Any:
        child, self._answered = self._child, False
        if child is None:
            raise TrackingError("closed")
        child.send(request)
        while True:
            kind, value = child.receive()
            if kind == "progress":
                progress(value)
                continue
            self._answered = True
            if kind == "error":
                raise TrackingError(value)
            return value


class _Child:
    """The process, our end of the socket pair, and what it says on stdout and stderr."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._ours, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(_search_path()), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the driver's alone
            )

    def send(self, message: object) -> None:
        try:
            self._ours.send(message)
        except OSError:
            raise self._lost("took no request") from None

    def receive(self) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = self._ours.recv()
            return answer
        except Exception:  # whatever unpickling makes of a broken answer
            raise self._lost("gave no answer") from None

    def end(self) -> None:
        """Kill it: whatever it was asked is either answered or given up. A thread that waits for it is freed first."""
        self.process.kill()
        self.process.wait()
        self._ours.close()
        self._output.close()

    def _lost(self, what: str) -> TrackingError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_DIES_WITHIN_S)
        if self.process.returncode is not None:
            what = f"ended with {self.process.returncode}"
        with contextlib.suppress(OSError, ValueError):  # closed by another thread
            self._output.seek(0)
            lines = self._output.read().decode(errors="replace").strip().splitlines()
            what += f": {lines[-1]}" if lines else ""
        return TrackingError(f"its writer, process {self.process.pid}, {what}")


def _search_path() -> list[str]:
    """The driver's `sys.path` in the order that suits the child: the standard library, this very package,
    installed packages, the rest. The child imports afresh what the driver may have imported long before
    another folder was put in front."""
    known = [entry for entry in sys.path if isinstance(entry, str)]
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    library |= {str(Path(folder, "lib-dynload")) for folder in library}
    ours = str(Path(__file__).parents[2])

    def rank(entry: str) -> int:
        if entry in library:
            return 0
        if entry == ours:
            return 1
        return 2 if Path(entry).name in ("site-packages", "dist-packages") else 3

    return sorted({*known, ours}, key=lambda entry: (rank(entry), known.index(entry) if entry in known else -1))


def serve_driver(fd: int, driver: int) -> None:
    """The child's side: does what the driver asks, over that file descriptor, for as long as the driver lives."""
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()
    connection = Connection(fd)

    def answer(kind: str, value: object) -> None:
        try:
            connection.send((kind, value))
        except OSError:
            os._exit(0)  # the driver is gone

    with contextlib.suppress(EOFError, OSError):
        target: Target = connection.recv()
        _serve(target, connection, answer)
    os._exit(0)


def _serve(target: Target, connection: Connection, answer: Any) -> None:
    writer, trials, opened = LocalWriter(target), dict[int, TrialRecord](), False

    def progress(busy: bool) -> None:
        answer("progress", busy)

    while True:
        what, record, changed, *rest = connection.recv()
        if what == "open":
            writer, trials = LocalWriter(target), {}
        trials |= {trial.number: trial for trial in changed}
        record = replace(record, trials=tuple(trials[number] for number in sorted(trials)))
        try:
            answer("result", getattr(writer, what)(record, *rest, progress))
        except Exception as error:
            answer("error", one_line(error))
        if not opened and hasattr(os, "nice"):
            os.nice(_NICENESS)
        opened = True


def _end_with(driver: int) -> None:
    """End this process when it is no longer the driver's child: forks of the driver may hold the socket open."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os._exit(0)
