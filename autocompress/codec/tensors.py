"""What a file carries: tensors as they are, and tensors of few values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = ("float64", "float32", "float16", "complex64", "complex128", "bool")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
DTYPES = {**{name: name for name in (*_NAMES, *_INTEGERS)}, "bfloat16": "uint16"}
"""Torch's name of each dtype that a file may hold, and NumPy's; the order is part of the format."""


@dataclass(frozen=True)
class Raw:
    """A tensor carried exactly. bfloat16 has no numpy type: `array` then holds its bits as uint16."""

    array: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.array.shape)


@dataclass(frozen=True)
class Coded:
    """A tensor of few values: `symbols` (uint16, the tensor's shape) into `table` (float32, one axis).

    `grid`, where given, is (scale, lowest level): table[i] = scale * (lowest + i) in float32.
    """

    symbols: NDArray[np.uint16]
    table: NDArray[np.float32]
    dtype: str = "float32"
    grid: tuple[float, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.symbols.shape)

    def values(self) -> NDArray[np.float32]:
        """The tensor in float32."""
        result: NDArray[np.float32] = self.table[self.symbols]
        return result


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, in file order, and the header's other entries."""

    tensors: Mapping[str, Raw | Coded]
    header: Mapping[str, Any] = field(default_factory=dict)


def grid_table(scale: float, lowest: int, size: int) -> NDArray[np.float32]:
    """The table of an evenly spaced grid: float32(scale) * (lowest + i), i < size."""
    levels = np.arange(lowest, lowest + size, dtype=np.float32)
    with np.errstate(all="ignore"):  # a scale may be whatever a file says
        table: NDArray[np.float32] = np.float32(scale) * levels
    return table


def numpy_type(dtype: str) -> np.dtype[Any]:
    """NumPy's little-endian type of a dtype of `DTYPES`."""
    return np.dtype(DTYPES[dtype]).newbyteorder("<")
