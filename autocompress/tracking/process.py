"""A writer in a process of its own: MLflow's work then never holds the driver's interpreter lock.

The driver asks, the child answers, over the child's stdin and stdout: pickles, which only these two
processes see. The child ends when its stdin does, and so never outlives the driver by more than the
statement it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autocompress.errors import TrackingError
from autocompress.record import StudyRecord, TrialRecord
from autocompress.tracking.store import Home, one_line
from autocompress.tracking.writer import LocalWriter, Progress, Status, Target

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from autocompress.tracking.process import serve_driver; serve_driver()"
)
_ENDS_WITHIN_S = 2.0
_NICENESS = 10
"""Once the store is open the child yields to trials: a tenth of a busy core is enough for five trials a second."""


class ProcessWriter:
    """A `Writer` whose work is done by a child process, begun at `open`.

    Everything in `target` must be picklable by name: functions of a module, not lambdas. Only
    trials that are new or changed since the last call travel. A child that was killed is an
    error like any other: the next `open` begins another.
    """

    def __init__(self, target: Target):
        self._target = target
        self._child: _Child | None = None
        self._known: dict[int, TrialRecord] = {}

    @property
    def pid(self) -> int | None:
        """The child's process id, None where there is none."""
        return None if self._child is None else self._child.process.pid

    def open(self, record: StudyRecord, progress: Progress) -> Home:
        self.close()
        progress(True)
        self._child, self._known = _Child(), {}
        self._child.send(self._target)
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
        child = self._child
        if child is None:
            raise TrackingError("closed")
        child.send(request)
        while True:
            kind, value = child.receive()
            if kind == "progress":
                progress(value)
            elif kind == "error":
                raise TrackingError(value)
            else:
                return value


class _Child:
    """The process and its three streams."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C is the driver's alone
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout

    def send(self, message: object) -> None:
        try:
            pickle.dump(message, self._requests)
            self._requests.flush()
        except (OSError, ValueError):
            raise self._lost() from None

    def receive(self) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = pickle.load(self._answers)
            return answer
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            raise self._lost() from None

    def end(self) -> None:
        """Close its stdin, which ends an idle child at once; kill one that is in the middle of something."""
        with contextlib.suppress(OSError, ValueError):
            self._requests.close()
        try:
            self.process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _lost(self) -> TrackingError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_ENDS_WITHIN_S)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return TrackingError(f"its writer, process {self.process.pid}, ended with {self.process.returncode}{last}")


def serve_driver() -> None:
    """The child's side: does what the driver asks until its stdin ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer

    def answer(kind: str, value: object) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        _serve(LocalWriter(pickle.load(requests)), requests, answer)
    os._exit(0)


def _serve(writer: LocalWriter, requests: Any, answer: Any) -> None:
    trials: dict[int, TrialRecord] = {}

    def progress(busy: bool) -> None:
        answer("progress", busy)

    while True:
        what, record, changed, *rest = pickle.load(requests)
        trials |= {trial.number: trial for trial in changed}
        record = replace(record, trials=tuple(trials[number] for number in sorted(trials)))
        try:
            answer("result", getattr(writer, what)(record, *rest, progress))
        except BrokenPipeError:
            raise
        except Exception as error:
            answer("error", one_line(error))
        if what == "open" and hasattr(os, "nice"):
            os.nice(_NICENESS)
