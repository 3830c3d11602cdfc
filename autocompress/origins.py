"""Where a study's task came from, in a form that works from any folder and in a later process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from autocompress.tasks.task import Task


def origin_of(spec: str, data_dir: str | Path | None) -> dict[str, str]:
    """Where a task comes from, in a form that works from any folder."""
    path, colon, function = spec.rpartition(":")
    file = path if colon and path.endswith(".py") else spec if spec.endswith(".py") else None
    if file is not None:
        spec = f"{Path(file).expanduser().absolute()}{colon and ':' + function if file == path else ''}"
    data = {} if data_dir is None else {"data_dir": str(Path(data_dir).expanduser().absolute())}
    return {"task": spec, "folder": os.getcwd(), **data}


def load_origin(origin: Mapping[str, str]) -> Task:
    """The task of an origin. A module is looked for in the folder that the study was begun in, too."""
    from autocompress.tasks.loading import load_task

    with _folder_on_path(origin["folder"]):
        return load_task(origin["task"], data_dir=origin.get("data_dir"))


@contextlib.contextmanager
def _folder_on_path(folder: str) -> Iterator[None]:
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
