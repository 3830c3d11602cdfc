"""autocompress: searches ranks, bit-widths and pruning thresholds of a trained PyTorch model.

    import autocompress as ac
    study = ac.search("digits", trials=20)
    model = study.front.smallest(max_drop=0.01).model()

Importing the package is fast: torch, Ray, Optuna and MLflow are loaded by what uses them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Task": "autocompress.tasks.task",
    "load_task": "autocompress.tasks.loading",
    "load": "autocompress.compress.artifact",
    "search": "autocompress.api",
    "resume": "autocompress.api",
    "open_study": "autocompress.api",
    "Plan": "autocompress.plan",
    "LayerPlan": "autocompress.plan",
    "Recipe": "autocompress.plan",
    "AutocompressError": "autocompress.errors",
    "run_trial": "autocompress.trial",
}
__all__ = [  # noqa: PLE0604
    "__version__",
    *_HOMES,
]

if TYPE_CHECKING:
    from autocompress.api import open_study as open_study
    from autocompress.api import resume as resume
    from autocompress.api import search as search
    from autocompress.compress.artifact import load as load
    from autocompress.errors import AutocompressError as AutocompressError
    from autocompress.plan import LayerPlan as LayerPlan
    from autocompress.plan import Plan as Plan
    from autocompress.plan import Recipe as Recipe
    from autocompress.tasks.loading import load_task as load_task
    from autocompress.tasks.task import Task as Task
    from autocompress.trial import run_trial as run_trial


class _CallablePackage(ModuleType):
    """`autocompress.search` is a package and the function of the public API; Python has one attribute for both."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`autocompress.api.search`."""
        return import_module("autocompress.api").search(*arguments, **options)


import_module("autocompress.search").__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
