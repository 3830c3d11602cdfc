"""Whole numbers as LEB128: seven bits a byte, the lowest first, the high bit set where more follow."""

from __future__ import annotations

from autocompress.errors import ArtifactError

_MOST_BYTES = 7
"""Numbers are below 2 ** 49."""


def write(*numbers: int) -> bytes:
    """The numbers, 0 or more each, one after the other."""
    out = bytearray()
    for number in numbers:
        rest = number
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def read(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """The number that begins at a position, and the position after it. Raises ArtifactError where it has no end."""
    value = 0
    for k, byte in enumerate(data[position : position + _MOST_BYTES]):
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, position + k + 1
    raise ArtifactError("stream is damaged: a number has no end")
