"""A `Task` from what a user names: a built-in task, "module:function", or "path/file.py:function".

What a user's code does wrong is told in one line of TaskError, with the place in their own file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from autocompress.errors import AutocompressError, TaskError
from autocompress.tasks.builtin import BUILTIN
from autocompress.tasks.checking import check_fields, check_task
from autocompress.tasks.task import Task
from autocompress.tasks.wording import describe, one_line

__all__ = ["check_task", "load_task"]

_DEFAULT_NAME = "task"


def load_task(spec: str, *, data_dir: str | Path | None = None, progress: Callable[[str], None] | None = None) -> Task:
    """The task that `spec` names, its fields checked for their types.

    A file or module may leave the function out if it has one named `task`, or exactly one that
    is annotated to return a Task. The function is called with `data_dir` if it takes such a
    parameter, else without arguments. A task without a name of its own is named after the
    function, or after the file where that is just "task". `progress` hears of training and the
    like. Raises TaskError for every mistake, DataMissing where a built-in task lacks its data.
    """
    if spec in BUILTIN:
        return BUILTIN[spec].load(data_dir, progress)
    where, function_name = _split(spec)
    if where.endswith(".py"):
        path = Path(where).expanduser()
        if not path.is_file():
            raise TaskError(f"task file {where!r} does not exist (looked in {Path.cwd()})")
        path = path.resolve()
        with _on_path(path.parent):
            return _task_of(_load_file(path), function_name, where, path.stem, data_dir)
    if ":" in spec:
        with _on_path(Path.cwd()):
            return _task_of(_load_module(where), function_name, where, where.rpartition(".")[2], data_dir)
    close = difflib.get_close_matches(spec, BUILTIN, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise TaskError(f"task is {spec!r}, allowed: {', '.join(BUILTIN)}, module:function or path/file.py:function{meant}")


def _split(spec: str) -> tuple[str, str]:
    """("file.py", "make") from "file.py:make"; the second is empty where it was left out."""
    if spec.endswith(".py"):  # before the colon is looked for: it may be that of a Windows drive
        return spec, ""
    where, colon, function_name = spec.rpartition(":")
    return (where, function_name) if colon else (spec, "")


def _load_file(path: Path) -> ModuleType:
    """The file run as a fresh module, which stays in `sys.modules` so that its classes can be found there."""
    name = _free_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the path ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        with _told(str(path), path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _free_name(path: Path) -> str:
    """autocompress_user_task_STEM, with a number where another file of that stem is loaded."""
    base = name = "autocompress_user_task_" + re.sub(r"\W", "_", path.stem)
    number = 1
    while name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        number += 1
        name = f"{base}_{number}"
    return name


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise TaskError(f"task module is {name!r}, allowed: a dotted module name, or a path that ends in .py")
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise TaskError(f"task module {name!r} cannot be imported: {one_line(error)}") from error
    except Exception:  # its package raises: told below with the place
        found = None
    else:
        if found is None:
            raise TaskError(f"task module {name!r} does not exist (looked in {Path.cwd()} and the installed packages)")
    origin = Path(found.origin) if found and found.origin and found.has_location else None
    with _told(f"module {name}", origin):
        return importlib.import_module(name)


def _task_of(module: ModuleType, function_name: str, where: str, stem: str, data_dir: str | Path | None) -> Task:
    function = _function(module, function_name, where)
    name = function_name or getattr(function, "__name__", _DEFAULT_NAME)
    arguments = _arguments(function, f"{where}:{name}", data_dir)
    with _told(f"{where}:{name}", Path(module.__file__) if module.__file__ else None):
        task = function(**arguments)
    if not isinstance(task, Task):
        raise TaskError(f"{where}:{name} returned {_shown(task)}, allowed: an autocompress.Task")
    if task.name == _DEFAULT_NAME:
        task = replace(task, name=name if name != _DEFAULT_NAME else stem)
    check_fields(task)
    return task


def _function(module: ModuleType, name: str, where: str) -> Callable[..., Any]:
    functions = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    there = f"functions there: {', '.join(functions) or 'none'}"
    if name:
        found = getattr(module, name, None)
        if found is None:
            raise TaskError(f"{where} has no function {name!r}; {there}")
        if not callable(found):
            raise TaskError(f"{where}:{name} is {_shown(found)}, allowed: a function that returns a Task; {there}")
        return found  # type: ignore[no-any-return]
    if _DEFAULT_NAME in functions:
        return functions[_DEFAULT_NAME]
    annotated = [value for value in functions.values() if _returns_task(value)]
    if len(annotated) == 1:
        return annotated[0]
    problem = (
        "several functions return a Task" if annotated else "no function is named task or annotated to return a Task"
    )
    raise TaskError(f"{where}: {problem}; name one as {where}:FUNCTION; {there}")


def _returns_task(function: Callable[..., Any]) -> bool:
    annotation = function.__annotations__.get("return")
    if isinstance(annotation, str):
        return annotation.strip("'\" ").rpartition(".")[2] == "Task"
    return annotation is Task


def _arguments(function: Callable[..., Any], label: str, data_dir: str | Path | None) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    given: dict[str, Any] = {}
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "data_dir" and parameter.kind is not parameter.POSITIONAL_ONLY:
            if data_dir is not None or not optional:
                given[name] = data_dir
        elif not optional:
            raise TaskError(f"{label} needs an argument {name!r}, allowed: none but data_dir")
    return given


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """`folder` first on `sys.path` for the while."""
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def _told(what: str, path: Path | None) -> Iterator[None]:
    """Turns what a user's code raises into a TaskError with the place in their own file.

    Errors of this package, and an interruption, pass as they are.
    """
    try:
        yield
    except AutocompressError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{what} failed{_place(error, path)}: {one_line(error)}") from error


def _place(error: BaseException, path: Path | None) -> str:
    """ " at FILE line N": the innermost frame in the folder of the user's file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename} line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if path is not None and _is_in(f.filename, path.parent)]
    return f" at {own[-1].filename} line {own[-1].lineno}" if own else ""


def _is_in(filename: str, folder: Path) -> bool:
    try:
        below = Path(filename).resolve().relative_to(folder.resolve())
    except (OSError, ValueError):
        return False
    return not {"site-packages", "dist-packages"} & set(below.parts)


def _shown(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, int | float) else describe(value)
