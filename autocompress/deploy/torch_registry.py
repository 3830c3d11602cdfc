"""torch.onnx.export's registry of operators, built once a process.

torch builds it anew at every export: it reads and parses the sources of some 500 functions, which takes as long as the
rest of a small net's export. No public option hands one in (torch 2.13), so the class method that builds it is replaced
while an export of ours runs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Iterator
from typing import Any

_LOCK = threading.RLock()
_BUILT: dict[Any, Any] = {}


@contextlib.contextmanager
def kept_registry() -> Iterator[None]:
    """Exports inside get a copy of the registry that the first one built; their own where torch has it elsewhere.

    They run one at a time: torch's exporter keeps its own state in globals.
    """
    home = _home()
    if home is None:
        yield
        return
    with _LOCK:
        original = vars(home)["from_torchlib"]

        def from_torchlib(cls: Any, *args: Any, **kwargs: Any) -> Any:
            key = (cls, args, *sorted(kwargs.items()), "torchvision" in sys.modules)  # which brings operators
            built = _BUILT.get(key) or original.__get__(None, cls)(*args, **kwargs)
            if not isinstance(getattr(built, "functions", None), dict):
                return built
            _BUILT[key] = built
            made = copy.copy(built)
            made.functions = {target: list(found) for target, found in built.functions.items()}
            return made

        home.from_torchlib = classmethod(from_torchlib)
        try:
            yield
        finally:
            home.from_torchlib = original


def _home() -> Any:
    """The class whose class method `from_torchlib` builds the registry, None where there is no such class."""
    try:
        from torch.onnx._internal.exporter import _registration
    except ImportError:
        return None
    home = getattr(_registration, "ONNXRegistry", None)
    return home if isinstance(getattr(home, "__dict__", {}).get("from_torchlib"), classmethod) else None
