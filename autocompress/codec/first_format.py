"""Reads the streams of the first format, "ACZ1"; nothing writes them any more.

Kinds: "raw" (the tensor's bytes, planes of equal significance together, the least first, deflated
where the first byte is 1), "sparse" (mask stream and the values under it), "coded" (table, then a
symbol stream) and "grid" (the same with an evenly spaced table given as scale and lowest level).

A symbol stream holds one matrix (first axis x the rest). The commonest symbol, the rest, is told
apart by a mask, each bit under the density classes of its row and its column; the symbols under the
mask follow. Layout, little-endian: u16 rest symbol, u16 alphabet size, u8 number of classes C, then
row classes and column classes (absent when C = 1), the C*C mask probabilities (u8 each), the
histogram (u8 a symbol), and the words of constriction's range coder. Probabilities are companded:
a byte q stands for (q / 255)^2, exactly 0 and 1 at its ends.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import plain
from autocompress.codec.rans import matrix_shape
from autocompress.codec.tensors import Coded, Raw, grid_table, numpy_type
from autocompress.errors import ArtifactError

Symbols = NDArray[np.uint16]
_HEAD = struct.Struct("<HHB")
_CLASS_COUNTS = (1, 2, 4, 8, 16)


def decode_tensor(kind: str, dtype: str, shape: tuple[int, ...], stream: bytes) -> Raw | Coded:
    """The tensor of a stream. Raises ArtifactError, and ValueError or struct.error for some that are damaged."""
    count = math.prod(shape)
    if kind == "raw":
        return Raw(_unpack_bytes(stream, dtype, count).reshape(shape), dtype)
    if kind == "sparse":
        (length,) = struct.unpack_from("<I", stream)
        mask = decode(stream[4 : 4 + length], shape).astype(bool)
        array = np.zeros(shape, numpy_type(dtype))
        array[mask] = _unpack_bytes(stream[4 + length :], dtype, int(mask.sum()))
        return Raw(array, dtype)
    grid = None
    if kind == "grid":
        scale, lowest, highest = struct.unpack_from("<fiH", stream)
        table, grid, position = grid_table(scale, lowest, highest + 1), (scale, lowest), 10
    else:
        (highest,) = struct.unpack_from("<H", stream)
        position = 2 + 4 * (highest + 1)
        table = np.frombuffer(stream, "<f4", highest + 1, 2).astype(np.float32)
    return Coded(decode(stream[position:], shape), table, dtype, grid)


def decode(data: bytes, shape: tuple[int, ...]) -> Symbols:
    """The symbols of a stream, uint16, in the shape given. Raises ArtifactError for a stream that cannot be one."""
    rows, columns = matrix_shape(shape)
    if not rows * columns:
        return np.zeros(shape, np.uint16)
    try:
        rest, highest, count = _HEAD.unpack_from(data)
        position = _HEAD.size
        classes, position = _read_classes(data, position, count, rows, columns)
        probabilities, position = _read_bytes(data, position, classes.count**2)
        weights, position = _read_bytes(data, position, highest + 1)
        if (len(data) - position) % 4:
            raise ArtifactError("stream is damaged: its coded part is not a whole number of words")
        least = sum(-r.size * c.size * math.log2(max(p, 1 - p)) for r, c, p in _groups(classes, probabilities))
        _check_room(least, len(data) - position, rows * columns)
        coder = _new_decoder(np.frombuffer(data, "<u4", offset=position).astype(np.uint32))
        mask = np.zeros((rows, columns), dtype=np.bool_)
        for r, c, probability in _groups(classes, probabilities):
            if probability == 1:
                mask[np.ix_(r, c)] = True
            elif probability > 0:
                bits = coder.decode(_bernoulli(probability), r.size * c.size)
                mask[np.ix_(r, c)] = bits.reshape(r.size, c.size)
        present = np.flatnonzero(weights)
        total = int(mask.sum())
        if total and not present.size:
            raise ArtifactError("stream is damaged: no symbol is left for its mask")
        if total:
            squares = weights.astype(np.float64) ** 2
            _check_room(total * math.log2(squares.sum() / squares.max()), len(data) - position, total)
        result = np.full((rows, columns), rest, dtype=np.uint16)
        if present.size > 1 and total:
            result[mask] = present[coder.decode(_categorical(weights), total)]
        elif total:
            result[mask] = present[0]
        if rest > highest:
            raise ArtifactError(f"stream is damaged: symbol {rest} of an alphabet of {highest + 1}")
        return result.reshape(shape)
    except (struct.error, ValueError, AssertionError, IndexError, OverflowError) as error:
        raise ArtifactError(f"stream is damaged: {error}") from error


def _check_room(bits: float, length: int, count: int) -> None:
    """Raises ArtifactError where so few bytes cannot hold so many bits: else they could ask for hours of decoding."""
    if 0.9 * bits / 8 > length + 8:
        raise ArtifactError(f"stream is damaged: {length} bytes cannot hold {count} symbols")


@dataclass(frozen=True)
class _Classes:
    """Density classes 0 .. count - 1 of each row and each column."""

    count: int
    rows: NDArray[np.uint8]
    columns: NDArray[np.uint8]


def _read_classes(data: bytes, position: int, count: int, rows: int, columns: int) -> tuple[_Classes, int]:
    if count not in _CLASS_COUNTS:
        raise ArtifactError(f"stream is damaged: {count} density classes, allowed: {_CLASS_COUNTS}")
    if count == 1:
        return _Classes(1, np.zeros(rows, np.uint8), np.zeros(columns, np.uint8)), position
    bits = (count - 1).bit_length()
    raw, position = _read_bytes(data, position, -(-(rows + columns) * bits // 8))
    flat = np.unpackbits(raw, count=(rows + columns) * bits).reshape(-1, bits)
    every = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1).astype(np.uint8)
    return _Classes(count, every[:rows], every[rows:]), position


def _read_bytes(data: bytes, position: int, length: int) -> tuple[NDArray[np.uint8], int]:
    if position + length > len(data):
        raise ArtifactError(
            f"stream is damaged: {length} bytes expected at {position}, {len(data) - position} are left"
        )
    return np.frombuffer(data, np.uint8, length, position), position + length


def _groups(
    classes: _Classes, probabilities: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], float]]:
    """For each context, its rows and columns (its elements follow in row order), and the probability of a one."""
    rows = [np.flatnonzero(classes.rows == k) for k in range(classes.count)]
    columns = [np.flatnonzero(classes.columns == k) for k in range(classes.count)]
    for index, (r, c) in enumerate(product(rows, columns)):
        if r.size and c.size:
            yield r, c, (int(probabilities[index]) / 255.0) ** 2


def _new_decoder(words: NDArray[np.uint32]) -> Any:
    import constriction

    return constriction.stream.queue.RangeDecoder(words)


def _bernoulli(p: float) -> Any:
    import constriction

    return constriction.stream.model.Bernoulli(p, perfect=False)


def _categorical(weights: NDArray[np.uint8]) -> Any:
    import constriction

    squares = weights[weights > 0].astype(np.float64) ** 2
    return constriction.stream.model.Categorical(squares / squares.sum(), perfect=False)


def _unpack_bytes(data: bytes, dtype: str, count: int) -> NDArray[Any]:
    kind = numpy_type(dtype)
    size = count * kind.itemsize
    if data[:1] not in (b"\0", b"\1"):
        raise ArtifactError(f"artifact is damaged: a raw stream starts with {data[:1]!r}")
    planes = plain.inflate(data[1:], size, framed=True) if data[:1] == b"\1" else data[1:]
    if len(planes) != size:
        raise ArtifactError(f"artifact is damaged: {len(planes)} bytes for {count} elements of {dtype}")
    flat = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, count).T
    return np.frombuffer(np.ascontiguousarray(flat).tobytes(), kind).astype(kind.newbyteorder("="))
