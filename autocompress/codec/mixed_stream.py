"""A stream of symbols of any shape through the max coder (`mixing`).

Layout: two numbers (see `leb128`): the rest symbol, which becomes level zero; the way, the sum of 1
for the transposed matrix, 2 for a lag, 4 for the second pace, 8 for a feeder; lag and feeder follow
as numbers. Then the coder's bytes. A symbol is the rest symbol plus its level; the columns of one
kernel (all axes after the second) form a group. The feeder is how many tensors before this one the
layer stands whose outputs this one reads: columns that read a dead unit are likely to be empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
_TURNED, _LAGGED, _PACED, _FED = 1, 2, 4, 8


@dataclass(frozen=True)
class Feeder:
    """The layer so many tensors before whose outputs a layer reads, and which of its units are dead."""

    distance: int
    dead: NDArray[np.bool_]


def encode(symbols: NDArray[np.integer[Any]], searched: bool | None = None, feeder: Feeder | None = None) -> bytes:
    """The bytes that `decode` turns back into `symbols`, values 0 to 65535.

    `searched`: whether a matrix is tried in several ways; None leaves it to `is_searched`. `feeder`
    is used where that is shorter; the product of the axes after the first must be a multiple of its units.
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
    feeders = (None, feeder) if searched and feeder is not None else (None,)
    tries = ((*way, pace, fed) for way in ways for pace in paces for fed in feeders)
    return min((_coded(levels, rest, tried, max(1, group)) for tried in tries), key=len)


def is_searched(size: int, others: int) -> bool:
    """Whether a matrix with so many symbols other than the rest is tried in several ways."""
    return size <= _TRIES and 2 * others <= size


def feeder_of(data: bytes) -> int:
    """How many tensors before a stream's its feeder is, 0 where it has none. Raises ArtifactError."""
    _, position = leb128.read(data, 0)
    way, position = leb128.read(data, position)
    if not way & _FED:
        return 0
    if way & _LAGGED:
        _, position = leb128.read(data, position)
    distance, _ = leb128.read(data, position)
    if not distance:
        raise ArtifactError("stream is damaged: it feeds itself")
    return distance


def decode(data: bytes, shape: tuple[int, ...], dead: NDArray[np.bool_] | None = None) -> NDArray[np.uint16]:
    """The symbols of `encode`, uint16; `dead` are the feeder's, if there is one.

    Raises ArtifactError for a stream that cannot be one.
    """
    rest, position = leb128.read(data, 0)
    way, position = leb128.read(data, position)
    if way > _TURNED + _LAGGED + _PACED + _FED:
        raise ArtifactError(f"stream is damaged: its way is {way}")
    turned, pace = way & _TURNED, int(way & _PACED > 0)
    lag, position = leb128.read(data, position) if way & _LAGGED else (0, position)
    if way & _FED:
        _, position = leb128.read(data, position)
        if dead is None:
            raise ArtifactError("stream is damaged: it has a feeder, and none is given")
    if turned and len(shape) != 2:
        raise ArtifactError(f"stream is damaged: a transposed matrix of {len(shape)} axes")
    rows, columns = matrix_shape(shape)
    empty = _empty(dead, rows, columns) if way & _FED and dead is not None else None
    try:
        if turned:
            flipped = None if empty is None else empty[::-1]
            levels = mixing.decode(data[position:], (columns, rows), lag, 1, pace, dead=flipped).T
        else:
            group = max(1, math.prod(shape[2:]))
            levels = mixing.decode(data[position:], (rows, columns), lag, group, pace, dead=empty)
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


def _coded(levels: NDArray[np.int32], rest: int, way: tuple[int, int, int, Feeder | None], group: int) -> bytes:
    """The stream of levels transposed or not, with a lag, a pace and a feeder."""
    turned, lag, pace, feeder = way
    told = turned * _TURNED + (lag > 0) * _LAGGED + pace * _PACED + (feeder is not None) * _FED
    more = [lag] * (lag > 0) + [feeder.distance for feeder in (feeder,) if feeder is not None]
    dead = None if feeder is None else _empty(feeder.dead, *levels.shape)
    if turned:
        coded = mixing.encode(levels.T, 0, 1, pace, dead=None if dead is None else dead[::-1])
    else:
        coded = mixing.encode(levels, lag, group, pace, dead=dead)
    return leb128.write(rest, told, *more) + coded


def _empty(dead: NDArray[np.bool_], rows: int, columns: int) -> mixing.Dead:
    """Rows and columns that are likely to be empty: a unit feeds as many columns as the next, in order."""
    if not dead.size or columns % dead.size:
        raise ArtifactError(f"stream is damaged: {dead.size} units feed {columns} columns")
    return np.zeros(rows, np.bool_), np.repeat(dead, columns // dead.size)


def _lags(levels: NDArray[np.int32], shape: tuple[int, ...], searched: bool) -> list[int]:
    """Lags worth trying: a kernel's row length, or the one at which the columns' densities repeat best."""
    if len(shape) > 2:
        return [shape[-1] if 2 <= shape[-1] < math.prod(shape[2:]) else 0]
    if not searched or levels.shape[1] < 16:
        return [0]
    lag = repeat_of(np.count_nonzero(levels, axis=0))
    return [0, lag] if lag else [0]


def repeat_of(density: NDArray[Any]) -> int:
    """The lag, 3 or more, at which the columns' densities (n,) repeat best, as rows of an image do; 0 for none."""
    density = density - density.mean()
    longest = min(_LONGEST_LAG, len(density) // 3)
    power = float(density @ density)
    if not power or longest < 3:
        return 0
    likeness = [float(density[lag:] @ density[:-lag]) / power for lag in range(2, longest + 1)]
    best = int(np.argmax(likeness[1:])) + 1  # neighbours are seen anyway
    return best + 2 if likeness[best] > 0.1 else 0
