"""Exceptions and values in a few words on one line, for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MOST = 300  # characters


def shortened(value: Any) -> str:
    """A value's text on one line of at most 300 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def one_line(error: BaseException) -> str:
    """An exception as "Type: message" on one line."""
    return f"{type(error).__name__}: {shortened(error)}" if str(error) else type(error).__name__


def without_paths(text: str) -> str:
    """A text in which files are named by their last part: no folder of a machine."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[\\/][^\\/\s'\":,;()]+)+[\\/]", "", text)


def describe(value: Any) -> str:
    """A value's kind: dtype and shape of a tensor, the parts of a mapping, tuple or list, else the type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = "tensor" if type(value).__name__ in ("Tensor", "Parameter") else type(value).__name__
        return f"{str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        more = ", ..." if len(value) > 4 else ""
        return f"{type(value).__name__} of ({', '.join(describe(item) for item in value[:4])}{more})"
    return type(value).__name__
