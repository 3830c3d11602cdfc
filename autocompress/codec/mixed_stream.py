"""A stream of symbols of any shape through the max coder (`mixing`).

Layout: two numbers (see `leb128`): the rest symbol, which becomes level zero; the way, the sum of 1
for the transposed matrix, 2 for a lag, which follows as a number, and 4 for each step of the pace.
Then the coder's bytes. A symbol is the rest symbol plus its level; the columns of one kernel (all
axes after the second) form a group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import leb128, mixing
from autocompress.codec.rans import matrix_shape
from autocompress.errors import ArtifactError

_TRIES = 1 << 20
"""Elements up to which a sparse matrix is tried in both orientations and with a lag, and the shortest stream taken."""
_FEW = 1 << 12
"""Levels other than zero up to which every pace is tried."""
_LONGEST_LAG = 256


def encode(symbols: NDArray[np.integer[Any]], searched: bool | None = None) -> bytes:
    """The bytes that `decode` turns back into `symbols`, values 0 to 65535.

    `searched`: whether a matrix is tried in several ways; None leaves it to `is_searched`.
    """
    rest = int(np.bincount(symbols.ravel()).argmax()) if symbols.size else 0
    group = math.prod(symbols.shape[2:])
    levels = (symbols.astype(np.int32) - rest).reshape(matrix_shape(symbols.shape))
    if searched is None:
        searched = is_searched(symbols.size, int(np.count_nonzero(levels)))
    ways = [(0, lag) for lag in _lags(levels, symbols.shape, searched)]
    if symbols.ndim == 2 and searched:
        ways.append((1, 0))
    few = searched and np.count_nonzero(levels) <= _FEW
    paces = range(len(mixing.PACES) if few else 1)
    return min((_coded(levels, rest, (*way, pace), max(1, group)) for way in ways for pace in paces), key=len)


def is_searched(size: int, others: int) -> bool:
    """Whether a matrix with so many symbols other than the rest is tried in several ways."""
    return size <= _TRIES and 2 * others <= size


def decode(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """The symbols of `encode`, uint16. Raises ArtifactError for a stream that cannot be one."""
    rest, position = leb128.read(data, 0)
    way, position = leb128.read(data, position)
    turned, pace = way & 1, way >> 2
    lag, position = leb128.read(data, position) if way & 2 else (0, position)
    if turned and len(shape) != 2:
        raise ArtifactError(f"stream is damaged: a transposed matrix of {len(shape)} axes")
    rows, columns = matrix_shape(shape)
    try:
        if turned:
            levels = mixing.decode(data[position:], (columns, rows), lag, 1, pace).T
        else:
            levels = mixing.decode(data[position:], (rows, columns), lag, max(1, math.prod(shape[2:])), pace)
    except ValueError as error:
        raise ArtifactError(f"stream is damaged: {error}") from error
    symbols = levels.astype(np.int64) + rest
    if symbols.size and not 0 <= int(symbols.min()) <= int(symbols.max()) < 1 << 16:
        raise ArtifactError(f"stream is damaged: symbols are {symbols.min()} to {symbols.max()}")
    return symbols.astype(np.uint16).reshape(shape)


def mask(symbols: NDArray[np.integer[Any]]) -> NDArray[np.uint16]:
    """0 where a symbol is the commonest one, 1 elsewhere."""
    rest = int(np.bincount(symbols.ravel()).argmax()) if symbols.size else 0
    told: NDArray[np.uint16] = (symbols != rest).astype(np.uint16)
    return told


def _coded(levels: NDArray[np.int32], rest: int, way: tuple[int, int, int], group: int) -> bytes:
    """The stream of levels transposed or not, with a lag and a pace."""
    turned, lag, pace = way
    told = turned | (lag > 0) << 1 | pace << 2
    head = leb128.write(rest, told, lag) if lag else leb128.write(rest, told)
    return head + (mixing.encode(levels.T, 0, 1, pace) if turned else mixing.encode(levels, lag, group, pace))


def _lags(levels: NDArray[np.int32], shape: tuple[int, ...], searched: bool) -> list[int]:
    """Lags worth trying: a kernel's row length, or the one at which the columns' densities repeat best."""
    if len(shape) > 2:
        return [shape[-1] if 2 <= shape[-1] < math.prod(shape[2:]) else 0]
    if not searched or levels.shape[1] < 16:
        return [0]
    density = np.count_nonzero(levels, axis=0).astype(np.float64)
    density -= density.mean()
    longest = min(_LONGEST_LAG, len(density) // 3)
    power = float(density @ density)
    if not power:
        return [0]
    likeness = [float(density[lag:] @ density[:-lag]) / power for lag in range(2, longest + 1)]
    best = int(np.argmax(likeness[1:])) + 1  # neighbours are seen anyway
    return [0, best + 2] if likeness[best] > 0.1 else [0]
