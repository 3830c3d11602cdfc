"""Where a study is found in MLflow, and how the store is reached."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autocompress.record import without_password
from autocompress.tracking import runs, view

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set before MLflow is imported, each only where the user has not set it."""


@dataclass(frozen=True)
class Home:
    """Where a study is found: the store, the experiment, the parent run and the link to its view.

    `url` is absolute for an http(s) store, else the path that follows the address of a server.
    """

    tracking_uri: str
    experiment_id: str
    run_id: str
    url: str


def is_http(uri: str) -> bool:
    """Whether the URI is that of a running server."""
    return urlsplit(uri).scheme in ("http", "https")


def quieten() -> None:
    """What MLflow is told before it is imported: no telemetry, short waits, warnings alone."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(uri: str) -> Any:
    """A MlflowClient of the store. Imports MLflow (seconds); no server is asked yet.

    Creating a new SQLite file takes seconds more.
    """
    quieten()
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///") and "?" not in uri and not uri.endswith(":memory:"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
    return MlflowClient(tracking_uri=uri)


def _create(path: Path) -> None:
    """A new store of MLflow's in a SQLite file, there whole or not at all: schemas that a full disk or a kill left half
    made cannot be mended.

    It is in WAL mode, so that an open UI and the writer do not wait for each other.
    """
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder, path.name)  # of a path of its own: MLflow keeps engines by path
        _into_file(draft)
        SqlAlchemyStore(f"sqlite:///{draft}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        _into_file(draft)
        try:
            os.link(draft, path)
        except FileExistsError:  # another process was faster
            return
        except OSError:  # no hard links here
            draft.rename(path)


def _into_file(path: Path) -> None:
    """Put a SQLite file into WAL mode, with what is in its WAL moved into the file itself."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def one_line(error: BaseException) -> str:
    """What went wrong, as one short line without the password of any URL in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return runs.cut(re.sub(r"://[^/@\s]+@", "://", text), 300)


def home_url(uri: str, experiment_id: str) -> str:
    """The link to an experiment's view, as `Home.url` holds it."""
    path = view.view_path(experiment_id)
    return without_password(uri).rstrip("/") + path if is_http(uri) else path
