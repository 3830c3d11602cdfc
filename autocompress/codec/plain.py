"""Tensors carried exactly: planes of equal significance, and the upper halves of floats through the max coder.

The first byte tells how the planes follow: bit 7, the upper half of each float (sign, exponent,
first bits of the fraction) comes first, as levels of the max coder behind their length; bit 6, the
planes are deflated (RFC 1951); bits 0 to 5, how many planes there are. Planes hold one byte of
each element, the most significant first; those left out are zero: in front, of small integers, or
at the end, of floats.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import leb128, mixing
from autocompress.codec.tensors import numpy_type
from autocompress.errors import ArtifactError

_MIXED, _DEFLATED, _COUNT = 128, 64, 63
_HALVED = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Dtypes whose upper 16 bits the max coder takes, and their bytes."""


def encode(array: NDArray[Any], dtype: str, mixed: bool = False) -> bytes:
    """The bytes that `decode` turns back into the array's elements. `mixed`: floats may use the max coder."""
    little = np.ascontiguousarray(array, numpy_type(dtype))
    planes = np.frombuffer(little.tobytes(), np.uint8).reshape(-1, little.dtype.itemsize).T[::-1]
    ways = [_planes(planes, little.dtype.kind in "fc" or dtype == "bfloat16")]
    if mixed and dtype in _HALVED and array.size:
        high = (planes[0].astype(np.int64) << 8) + planes[1]
        coded = mixing.encode(_levels(high)[None])
        rest = _planes(planes[2:], floats=True)
        ways.append(bytes([rest[0] | _MIXED]) + leb128.write(len(coded)) + coded + rest[1:])
    return min(ways, key=len)


def is_mixed(data: bytes) -> bool:
    """Whether bytes of `encode` use the max coder."""
    return bool(data[:1]) and bool(data[0] & _MIXED)


def decode(data: bytes, dtype: str, count: int) -> NDArray[Any]:
    """That many elements. Raises ArtifactError for bytes that cannot be so many."""
    kind = numpy_type(dtype)
    if not data:
        raise ArtifactError("artifact is damaged: a plain stream is empty")
    way, position, upper = data[0], 1, []
    if way & _MIXED:
        if dtype not in _HALVED:
            raise ArtifactError(f"artifact is damaged: halves of {dtype}")
        length, position = leb128.read(data, position)
        high = _halves(mixing.decode(data[position : position + length], (1, count))[0])
        upper, position = [high >> 8, high & 255], position + length
    width = kind.itemsize - len(upper)
    lower = _lower(data[position:], way, width, count)
    values = np.zeros(count, kind)
    planes = values.view(np.uint8).reshape(count, kind.itemsize).T[::-1]
    for plane, half in zip(planes, upper, strict=False):
        plane[:] = half
    floats = dtype.startswith(("float", "complex", "bfloat"))
    first = len(upper) + (0 if floats else width - len(lower))
    planes[first : first + len(lower)] = lower
    if dtype == "bool" and lower.size and lower.max() > 1:
        raise ArtifactError("artifact is damaged: a bool is neither 0 nor 1")
    return values.astype(kind.newbyteorder("="), copy=False)


def inflate(data: bytes, limit: int, dictionary: bytes = b"", *, framed: bool = False) -> bytes:
    """Inflated bytes, never more than `limit`; `framed`: with zlib's frame (RFC 1950) around them.

    Raises ArtifactError where they do not end at `data`'s end.
    """
    machine = zlib.decompressobj(15 if framed else -15, zdict=dictionary)
    try:
        result = machine.decompress(data, limit + 1)
    except zlib.error as error:
        raise ArtifactError(f"artifact is damaged: {error}") from error
    if len(result) > limit or not machine.eof or machine.unused_data:
        raise ArtifactError("artifact is damaged: a deflated part has the wrong length")
    return result


def deflate(data: bytes, level: int, dictionary: bytes = b"") -> bytes:
    """The inverse of `inflate`."""
    machine = zlib.compressobj(level, zlib.DEFLATED, -15, zdict=dictionary)
    return machine.compress(data) + machine.flush()


def _planes(planes: NDArray[np.uint8], floats: bool) -> bytes:
    """The flag byte and the planes that are not zero throughout."""
    some = np.flatnonzero(planes.any(axis=1))
    if not some.size:
        return b"\0"
    kept = planes[: some[-1] + 1] if floats else planes[some[0] :]
    plain = kept.tobytes()
    deflated = deflate(plain, 6)
    if len(deflated) < len(plain):
        return bytes([len(kept) | _DEFLATED]) + deflated
    return bytes([len(kept)]) + plain


def _lower(data: bytes, way: int, width: int, count: int) -> NDArray[np.uint8]:
    """The planes that are there, at most `width` of them, the most significant first."""
    kept = way & _COUNT
    if kept > width:
        raise ArtifactError(f"artifact is damaged: {kept} planes, allowed: {width}")
    plain = inflate(data, kept * count) if way & _DEFLATED else data
    if len(plain) != kept * count:
        raise ArtifactError(f"artifact is damaged: {len(plain)} bytes for {kept} planes of {count}")
    return np.frombuffer(plain, np.uint8).reshape(kept, count)


def _levels(high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Upper halves as levels: the magnitude's 15 bits and 1, negative where the sign is set; never 0."""
    magnitude = (high & 0x7FFF) + 1
    return np.where(high >> 15, -magnitude, magnitude)


def _halves(levels: NDArray[np.int32]) -> NDArray[np.int64]:
    magnitude = np.abs(levels.astype(np.int64)) - 1
    if magnitude.size and not 0 <= int(magnitude.min()) <= int(magnitude.max()) <= 0x7FFF:
        raise ArtifactError("artifact is damaged: its floats have halves of more than 16 bits")
    halves: NDArray[np.int64] = magnitude | (levels < 0) << 15
    return halves
