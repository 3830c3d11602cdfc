"""An Optuna study in a SQLite file: opening it, its errors in one line, and trials written in one transaction.

Optuna itself looks up and writes parameter by parameter, which costs several times as much as all else that is done
for a trial. The rows written here are the same: whatever reads an Optuna study reads them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.errors import RecordError, StudyError, UsageError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from sqlalchemy import Engine

STUDY_NAME = "study"


def connect(file: Path, direction: str | None = None, *, timed: bool = False) -> tuple[optuna.Study, Engine]:
    """The Optuna study in the file, made when a direction is given, and the engine that reaches it.

    WAL mode: a commit costs no fsync. The file is opened by its path, not by a URL, which some characters would break.
    """
    import optuna

    def open_file() -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(file, timeout=30, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.OperationalError:  # a folder that is read-only, or full: what is there can still be shown
            if direction is not None:
                raise
            return _read_only(file)
        return connection

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": open_file})
    if direction is None:
        return optuna.load_study(study_name=STUDY_NAME, storage=storage), storage.engine
    study = optuna.create_study(study_name=STUDY_NAME, storage=storage, directions=directions(direction, timed))
    return study, storage.engine


def _read_only(file: Path) -> sqlite3.Connection:
    """A connection that writes nothing, not even a lock. The first kind also sees what is in the WAL only."""
    address = file.absolute().as_uri()
    for options in ("mode=ro", "mode=ro&immutable=1"):
        with contextlib.suppress(sqlite3.OperationalError), contextlib.ExitStack() as stack:
            connection = sqlite3.connect(f"{address}?{options}", uri=True, check_same_thread=False)
            stack.callback(connection.close)
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            stack.pop_all()
            return connection
    raise sqlite3.OperationalError("unable to open database file")


def directions(direction: str, timed: bool = False) -> list[optuna.study.StudyDirection]:
    """Those of the objectives: bytes, a metric that is to "minimize" or "maximize", and if `timed` latency."""
    from optuna.study import StudyDirection

    least = StudyDirection.MINIMIZE
    return [least, StudyDirection[direction.upper()], *([least] if timed else [])]


def holds_study(file: Path) -> bool:
    """Whether the SQLite file holds an Optuna study; nothing is written to a file that is something else."""
    with contextlib.closing(_read_only(file)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {("studies",), ("trials",), ("version_info",)} <= set(tables)


def _refused(file: Path) -> str:
    """What of a file and its folder this user may not do, as " (...)"; "" where it may do all."""
    if not os.access(file, os.R_OK):
        return " (the file may not be read by this user)"
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return f" (folder {str(file.parent)!r} may not be written by this user)"
    return "" if os.access(file, os.W_OK) else " (the file may not be written by this user)"


@contextlib.contextmanager
def disk_errors(file: Path) -> Iterator[None]:
    """One clear line for a folder that cannot be written and a file that is no study."""
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, RuntimeError, KeyError) as error:
        cause = error.__cause__ or error
        text = str(getattr(cause, "orig", cause)).splitlines()[0]
        if "disk is full" in text or "disk I/O" in text:  # no mistake of the user's
            raise RecordError(f"study file {str(file)!r} cannot be written: {text}") from error
        raise StudyError(f"study file {str(file)!r} cannot be used: {text}{_refused(file)}") from error
    except OSError as error:
        raise UsageError(f"folder {str(file.parent)!r} cannot be used: {error.strerror or error}") from error


def insert_running(
    engine: Engine,
    study_id: int,
    number: int,
    *,
    params: Mapping[str, float],
    distributions: Mapping[str, BaseDistribution],
    user_attrs: Mapping[str, Any],
    system_attrs: Mapping[str, Any],
) -> int:
    """Write a trial that begins to run; its id in the storage. `number` must be the study's next."""
    from optuna.storages._rdb import models
    from optuna.trial import TrialState
    from sqlalchemy import insert

    trial = {"number": number, "study_id": study_id, "state": TrialState.RUNNING, "datetime_start": _now()}
    with engine.begin() as connection:
        key: Any = connection.execute(insert(models.TrialModel.__table__), trial).inserted_primary_key
        trial_id = int(key[0])
        for table, entries in (
            (models.TrialParamModel.__table__, _params(trial_id, params, distributions)),
            (models.TrialUserAttributeModel.__table__, _attributes(trial_id, user_attrs)),
            (models.TrialSystemAttributeModel.__table__, _attributes(trial_id, system_attrs)),
        ):
            if entries:
                connection.execute(insert(table), entries)
    return trial_id


def write_end(
    engine: Engine,
    trial_id: int,
    values: Sequence[float] | None,
    user_attrs: Mapping[str, Any],
    constraints: Mapping[str, float],
) -> None:
    """Write how a running trial ended: its finite values, None for a failed one, and attributes that it has not yet.

    `constraints`: by name how far it is beyond a limit, as Optuna's `Trial.set_constraint` keeps it.
    """
    from optuna.storages._rdb import models
    from optuna.trial import TrialState
    from sqlalchemy import insert, update

    finite = models.TrialValueModel.TrialValueType.FINITE
    rows = [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": finite}
        for objective, value in enumerate(values or ())
    ]
    table = models.TrialModel.__table__
    end = {"state": TrialState.FAIL if values is None else TrialState.COMPLETE, "datetime_complete": _now()}
    with engine.begin() as connection:
        connection.execute(insert(models.TrialUserAttributeModel.__table__), _attributes(trial_id, user_attrs))
        if constraints:
            kept = _attributes(trial_id, {f"constraints:{name}": value for name, value in constraints.items()})
            connection.execute(insert(models.TrialSystemAttributeModel.__table__), kept)
        if rows:
            connection.execute(insert(models.TrialValueModel.__table__), rows)
        connection.execute(update(table).where(table.c.trial_id == trial_id).values(end))


def _params(
    trial_id: int, params: Mapping[str, float], distributions: Mapping[str, BaseDistribution]
) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": distributions[name].to_internal_repr(value),
            "distribution_json": _distribution_json(distributions[name]),
        }
        for name, value in params.items()
    ]


@cache
def _distribution_json(distribution: BaseDistribution) -> str:
    from optuna.distributions import distribution_to_json

    return distribution_to_json(distribution)


def _attributes(trial_id: int, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]


def _now() -> dt.datetime:
    """The time as Optuna's tables hold it: UTC, without a zone."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)
