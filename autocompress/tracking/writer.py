"""Writes a study into a MLflow store: connects, brings the runs up to the record, adds the front's files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from autocompress.record import StudyRecord
from autocompress.tracking.mirror import Mirror
from autocompress.tracking.store import Home, connect

Status = Literal["FINISHED", "KILLED", "FAILED"]
WriteFront = Callable[[StudyRecord, Path], Sequence[Path]]
Describe = Callable[[StudyRecord], str]
Progress = Callable[[bool], None]
"""Called with False after each answer of the store, with True before work that takes its time without the
store being at fault. What it raises ends the work."""

FRONT_EVERY_S = 60.0
"""How often the front's figures are written while the study runs."""


@dataclass(frozen=True)
class Target:
    """Where to write, and what is written beside the runs.

    `artifact_root` is where the artifacts of a database store go (None: its own default); a server always has its own.
    `write_front` writes the front's files into a folder at the end, `write_live` those that are
    written while the study runs (None: none), `describe` gives the parent run's description.
    """

    uri: str
    artifact_root: Path | None
    write_front: WriteFront
    describe: Describe
    write_live: WriteFront | None = None


class Writer(Protocol):
    """What the tracker writes through. After a method has raised, `open` comes first again."""

    def open(self, record: StudyRecord, progress: Progress) -> Home:
        """Connect; find or create the study's experiment and parent run."""

    def write(
        self, record: StudyRecord, ended: Mapping[int, float], status: Status | None, progress: Progress
    ) -> str | None:
        """Bring the store up to the record; with a status, end the parent run too.

        `ended`: when trials ended, in seconds since the epoch. Returns why artifacts were refused, or None.
        """

    def close(self) -> None:
        """Let go of everything. Callable from any thread, at any time, more than once."""


class LocalWriter:
    """Writes in the calling thread."""

    def __init__(self, target: Target):
        self._target = target
        self._mirror: Mirror | None = None
        self._front_written = time.monotonic()

    def open(self, record: StudyRecord, progress: Progress) -> Home:
        with _own_work(progress):
            client = connect(self._target.uri)
        self._mirror = Mirror(
            client, self._target.uri, record, self._target.artifact_root, alive=lambda: progress(False)
        )
        return self._mirror.home

    def write(
        self, record: StudyRecord, ended: Mapping[int, float], status: Status | None, progress: Progress
    ) -> str | None:
        mirror = self._mirror
        assert mirror is not None, "open comes first"
        mirror.update(record, ended, final=status is not None)
        if status is not None:
            try:
                mirror.describe(record, self._target.describe(record))
                _write_files(mirror, record, self._target.write_front, progress)
            finally:
                mirror.end(status)
        elif self._target.write_live and time.monotonic() - self._front_written > FRONT_EVERY_S:
            _write_files(mirror, record, self._target.write_live, progress)
            self._front_written = time.monotonic()
        return mirror.artifact_problem

    def close(self) -> None:
        self._mirror = None


def _write_files(mirror: Mirror, record: StudyRecord, write: WriteFront, progress: Progress) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with _own_work(progress):
            files = write(record, Path(folder))
        mirror.write_artifacts(files, "front")


@contextmanager
def _own_work(progress: Progress) -> Iterator[None]:
    progress(True)
    try:
        yield
    finally:
        progress(False)
