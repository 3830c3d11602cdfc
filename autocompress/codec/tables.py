"""The values that symbols stand for, as bytes: a codebook of floats.

A number says how many there are, a byte which way they follow: 0, float32; 1, bfloat16; 2, bfloat16
through the max coder, behind their length: each told as its distance from the one before it (the
first from zero) in the order of all bfloat16 numbers, which is short where a table rises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import leb128, mixing
from autocompress.errors import ArtifactError

MOST = 1 << 16
"""Entries of a table."""
_FLOAT32, _BFLOAT16, _MIXED = 0, 1, 2
_FREE, _PER_BYTE = 512, 16
"""Entries of a table that the max coder may make of nothing, and of each byte.

Else a small file of many tables could ask for hours.
"""


def encode(table: NDArray[np.float32], mixed: bool) -> bytes:
    """The bytes that `decode` turns back into the table, bit by bit."""
    bits = np.ascontiguousarray(table, "<f4").view("<u4")
    head = leb128.write(table.size)
    if (bits & 0xFFFF).any():
        return head + bytes([_FLOAT32]) + bits.tobytes()
    high = (bits >> 16).astype("<u2")
    ways = [bytes([_BFLOAT16]) + high.tobytes()]
    steps = np.diff(_places(high), prepend=0)
    if mixed and table.size and not (high == 0x8000).any() and np.abs(steps).max() <= MOST:
        coded = mixing.encode(steps[None])
        if table.size <= _FREE + _PER_BYTE * len(coded):
            ways.append(bytes([_MIXED]) + leb128.write(len(coded)) + coded)
    return head + min(ways, key=len)


def decode(data: bytes | memoryview, position: int) -> tuple[NDArray[np.float32], int]:
    """The table at a position, and the position after it. Raises ArtifactError for anything damaged."""
    size, position = leb128.read(data, position)
    way = data[position] if position < len(data) else -1
    length, position = {_FLOAT32: 4 * size, _BFLOAT16: 2 * size}.get(way, 0), position + 1
    most = MOST
    if way == _MIXED:
        length, position = leb128.read(data, position)
        most = min(MOST, _FREE + _PER_BYTE * length)
    part = data[position : position + length]
    if size > most or way not in (_FLOAT32, _BFLOAT16, _MIXED) or len(part) != length:
        raise ArtifactError(f"artifact is damaged: a table of {size} values, way {way}, {len(part)} bytes")
    if way == _FLOAT32:
        return np.frombuffer(part, "<f4").astype(np.float32), position + length
    if way == _BFLOAT16:
        high = np.frombuffer(part, "<u2").astype(np.uint32)
    else:
        places = np.cumsum(mixing.decode(bytes(part), (1, size))[0].astype(np.int64))
        if size and np.abs(places).max() > 0x7FFF:
            raise ArtifactError("artifact is damaged: a table's values are no bfloat16")
        high = (np.abs(places) | (places < 0) << 15).astype(np.uint32)
    return (high << 16).view(np.float32), position + length


def _places(high: NDArray[np.uint16]) -> NDArray[np.int64]:
    """The place of each bfloat16 number in their order, 0 for zero."""
    magnitude = (high & 0x7FFF).astype(np.int64)
    return np.where(high >> 15, -magnitude, magnitude)
