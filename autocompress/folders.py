"""Where records live: one folder that holds the studies, their artifacts, and the MLflow store.

ROOT/studies/NAME/study.db          the Optuna study
ROOT/studies/NAME/study.lock        held by the process that searches
ROOT/studies/NAME/artifacts/...     files of the front's members and of trial 0
ROOT/studies/NAME/states/...        states of the front's members, where trials go on from each other
ROOT/mlflow.db, ROOT/mlflow-artifacts/
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autocompress.errors import RecordError, StudyBusy, StudyError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Records:
    """A records folder; nothing is made until it is needed."""

    root: Path

    @classmethod
    def find(cls, folder: str | Path | None = None) -> Records:
        """The folder given, else AUTOCOMPRESS_DIR, else ./autocompress_runs."""
        chosen = folder or os.environ.get("AUTOCOMPRESS_DIR") or "autocompress_runs"
        return cls(Path(chosen).expanduser().absolute())

    @property
    def option(self) -> str:
        """What a command needs to find this folder: " --dir FOLDER", or "" where it looks there by itself."""
        return "" if Records.find().root == self.root else f" --dir {shlex.quote(str(self.root))}"

    def folder(self, study: str) -> Path:
        """A study's folder. Raises UsageError for a name that cannot be one."""
        if not _NAME.fullmatch(study):
            raise UsageError(
                f"study name is {study!r}, allowed: 1 to 100 letters, digits, '.', '_' and '-', "
                "the first a letter or digit"
            )
        return self.root / "studies" / study

    def file(self, study: str) -> Path:
        """The study's database."""
        return self.folder(study) / "study.db"

    def artifact(self, study: str, name: str) -> Path:
        """An artifact's path."""
        return self.folder(study) / "artifacts" / name

    def state(self, study: str, number: int) -> Path:
        """The file of the state that a trial left behind."""
        return self.folder(study) / "states" / f"trial-{number:04d}.safetensors"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow's files go for a local store."""
        return self.root / "mlflow-artifacts"

    def names(self) -> list[str]:
        """The studies here, the latest begun or resumed first."""
        files = list((self.root / "studies").glob("*/study.db"))
        return [f.parent.name for f in sorted(files, key=_last_used, reverse=True)]

    def latest(self) -> str:
        """The study begun or resumed last. Raises StudyError where there is none."""
        names = self.names()
        if not names:
            raise StudyError(f"no study in {str(self.root)!r}: start one with autocompress search TASK, or give --dir")
        return names[0]

    def existing(self, study: str | None) -> str:
        """The study of that name, the latest for None. Raises StudyError where it does not exist."""
        if study is None:
            return self.latest()
        if not self.file(study).is_file():
            known = self.names()
            there = f"there are: {', '.join(known[:10])}" if known else "there is none"
            raise StudyError(f"study {study!r} does not exist in {str(self.root)!r}; {there}")
        return study

    def new_name(self, task: str) -> str:
        """A free name made from the task's: digits-1, digits-2, ..."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-._")[:80] or "study"
        taken = {path.name for path in (self.root / "studies").glob("*")}
        return next(name for n in range(1, len(taken) + 2) if (name := f"{stem}-{n}") not in taken)

    def mark_used(self, study: str) -> None:
        """Make the study the latest."""
        with contextlib.suppress(OSError):
            (self.folder(study) / "last-used").touch()

    @contextlib.contextmanager
    def lock(self, study: str) -> Iterator[None]:
        """Hold the study for writing. Raises StudyBusy where another process does, UsageError for a folder
        that cannot be written."""
        import filelock

        folder = self.folder(study)
        lock = filelock.FileLock(folder / "study.lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StudyBusy(f"study {study!r} is in use by another process; wait for it or stop it first") from None
        except OSError as error:
            raise UsageError(f"records folder {str(self.root)!r} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, its folder too. Raises RecordError that names it where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside names the file that was to be written: a full disk itself names none."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"file {str(path)!r} cannot be written: {error.strerror or error}") from error


def _last_used(file: Path) -> tuple[float, str]:
    mark = file.parent / "last-used"
    return (mark if mark.exists() else file).stat().st_mtime, file.parent.name
