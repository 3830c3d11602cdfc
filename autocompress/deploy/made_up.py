"""Inputs for a file of which nothing but its graph is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ExportError, UsageError

MOST_VALUES = 2**28
"""Of one input: a gigabyte of float32."""
_KINDS = {
    f"tensor({name})": np.dtype(kind)
    for name, kind in {"float": "f4", "float16": "f2", "double": "f8", "bool": "?"}.items()
} | {f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def made_up(inputs: Sequence[Any], batch: int, lengths: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Arrays for a session's `inputs` (name, type and shape of each), always the same.

    Floats lie evenly between 0 and 1; whole numbers are 0 or 1, which index any table of two rows. A free first axis
    has the length `batch`, and so has every other of its name; `lengths` has those of other free axes, by their names
    ("INPUT.AXIS" for one without). Raises UsageError for a free axis without a length, for a length of the batch, for
    another batch size than the file's own, and for more than `MOST_VALUES`, ExportError for an input that is not a
    tensor of numbers.
    """
    fixed = fixed_batch(inputs)
    if fixed not in (None, batch):
        raise UsageError(f"batch is {batch}, allowed: {fixed}, which the file fixes")
    leading = {size for value in inputs if value.shape and isinstance(size := _axis(value, 0), str)}
    if leading and leading <= lengths.keys():
        name = min(leading)
        raise UsageError(f"dim is {name}={lengths[name]}, but that axis is the batch: --batch says how long it is")
    known = {**dict.fromkeys(leading, batch), **lengths}
    drawn = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for value in inputs:
        if value.type not in _KINDS:
            raise ExportError(f"input {value.name!r} is a {value.type}: no such input can be made up")
        shape = [_length(value, axis, known) for axis in range(len(value.shape))]
        if math.prod(shape) > MOST_VALUES:
            raise UsageError(f"input {value.name!r} has the shape {shape}, allowed: up to {MOST_VALUES} values")
        kind = _KINDS[value.type]
        found[value.name] = (drawn.random(shape) if kind.kind == "f" else drawn.integers(0, 2, shape)).astype(kind)
    return found


def fixed_batch(inputs: Sequence[Any]) -> int | None:
    """The one batch size that the file takes, None where it takes any."""
    first = [value.shape[0] for value in inputs if value.shape]
    return first[0] if first and all(isinstance(size, int) for size in first) else None


def check_lengths(inputs: Sequence[Any], lengths: Mapping[str, int]) -> None:
    """Raise UsageError for a length of an axis that no input has, or that is fixed."""
    sizes = (_axis(value, axis) for value in inputs for axis in range(len(value.shape)))
    free = {size for size in sizes if isinstance(size, str)}
    for name, length in lengths.items():
        if name not in free:
            told = f"the free axes {', '.join(sorted(free))}" if free else "none, all axes are fixed"
            raise UsageError(f"dim is {name}={length}, allowed: {told}")


def _length(value: Any, axis: int, known: Mapping[str, int]) -> int:
    size = _axis(value, axis)
    if isinstance(size, str) and size not in known:
        raise UsageError(f"input {value.name!r} has a free axis {size!r}: say how long it is with --dim {size}=N")
    return known[size] if isinstance(size, str) else size


def _axis(value: Any, axis: int) -> int | str:
    """The length of an input's axis, or the name of a free one: "INPUT.AXIS" where it has none."""
    size: int | str | None = value.shape[axis]
    return f"{value.name}.{axis}" if size is None else size
