"""A stream of symbols in the format of Deep Compression, to compare with: Huffman codes of gaps and of values.

Han et al., "Deep Compression" (arXiv 1510.00149), sections 2 and 4: the weights that are kept follow
in row order, each told by how far it is from the one before and by its place in the codebook. The
distance has a fixed number of bits; where it is too large, zeros are put between ("padding zeros").
Distances and places are Huffman coded, each with a code of its own. Symbols here are the places; the
commonest one plays the zero.

Layout: the rest symbol, the index bits, the number of entries (see `leb128`); for the gaps, then for
the values: the lowest symbol, the number of symbols from it on, and, where these are several, one byte
of the bits b of a length and the lengths, b bits each (0 for a symbol that does not occur); the
gaps' codes and the values' codes, one bit after the other, highest first. Codes are canonical. A gap
is the distance less one, as in the authors' own decoder. At 0 index bits every weight has an entry.
A code of one symbol has no bits.
"""

# ruff: noqa: PLR0917  (kernels take plain numbers and arrays)
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import leb128
from autocompress.codec.jit import Bytes, Int, Int32s, Int64s, kernel
from autocompress.errors import ArtifactError

MOST_INDEX_BITS = 16
_TRIED_BITS = range(13)
"""Index bits that are tried where none are given."""
_LONGEST = 60
"""Bits of a code: a symbol that is told with n bits has a Fibonacci number of others beside it, so 2^30 need 43."""


@dataclass(frozen=True)
class Code:
    """A canonical code: the symbols that occur, in rising order, and the bits of each."""

    symbols: NDArray[np.int64]
    lengths: NDArray[np.int64]


def encode(symbols: NDArray[np.integer[Any]], index_bits: int | None = None) -> bytes:
    """The bytes that `decode` turns back into `symbols`, values 0 to 65535, any shape.

    `index_bits` is the width of a distance, 0 to 16 (the paper: 8 in convolutions, 5 in linear
    layers); where it is not given, the one that needs the fewest bytes.
    """
    flat = np.asarray(symbols).ravel().astype(np.int64)
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << 16:
        raise ValueError(f"symbols are {flat.min()} to {flat.max()}, allowed: 0 to 65535")
    if index_bits is not None and not 0 <= index_bits <= MOST_INDEX_BITS:
        raise ValueError(f"index bits are {index_bits}, allowed: 0 to {MOST_INDEX_BITS}")
    rest = int(np.bincount(flat).argmax()) if flat.size else 0
    at = np.flatnonzero(flat != rest)
    zeros, values = np.diff(at, prepend=-1) - 1, flat[at]
    if index_bits is None:
        found, counts = np.unique(zeros, return_counts=True)
        others = np.bincount(values)
        index_bits = min(_TRIED_BITS, key=lambda bits: _size(found, counts, others, rest, bits))
    padding = zeros >> index_bits
    entries = np.cumsum(padding + 1) - 1
    total = len(at) + int(padding.sum())
    gaps = np.full(total, (1 << index_bits) - 1)
    gaps[entries] = zeros & ((1 << index_bits) - 1)
    places = np.full(total, rest)
    places[entries] = values
    gap_code, value_code = (optimal_code(np.bincount(told)) for told in (gaps, places))
    head = leb128.write(rest, index_bits, total) + _write_code(gap_code) + _write_code(value_code)
    return head + _write_symbols([(gap_code, gaps), (value_code, places)])


def decode(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """The symbols of `encode`, uint16. Raises ArtifactError for a stream that cannot be one."""
    size = math.prod(shape)
    rest, gaps, values, _ = _read(data, size)
    at = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(at) and at[-1] >= size:
        raise ArtifactError(f"stream is damaged: an entry at {at[-1]} of {size} symbols")
    result = np.full(size, rest, np.uint16)
    result[at] = values
    return result.reshape(shape)


def gap_bytes(data: bytes, shape: tuple[int, ...]) -> int:
    """How many of a stream's bytes tell where its entries are."""
    return _read(data, math.prod(shape))[3]


def _read(data: bytes, size: int) -> tuple[int, NDArray[np.int32], NDArray[np.int32], int]:
    """The rest symbol, the entries' gaps and values, and the bytes up to the values: their code's are not counted."""
    rest, position = leb128.read(data, 0)
    index_bits, position = leb128.read(data, position)
    total, position = leb128.read(data, position)
    if rest >= 1 << 16 or index_bits > MOST_INDEX_BITS:
        raise ArtifactError(f"stream is damaged: rest symbol {rest}, index of {index_bits} bits")
    if total > size:
        raise ArtifactError(f"stream is damaged: {total} entries for {size} symbols")
    gap_code, position = _read_code(data, position, 1 << index_bits)
    told = position
    value_code, position = _read_code(data, position, 1 << 16)
    body = np.frombuffer(data, np.uint8, offset=position)
    gaps, bit = _read_symbols(gap_code, total, body, 0)
    values, end = _read_symbols(value_code, total, body, bit)
    if -(-end // 8) != body.size:
        raise ArtifactError(f"stream is damaged: {body.size} bytes of codes, {-(-end // 8)} are used")
    return rest, gaps, values, told + bit // 8


def optimal_code(counts: NDArray[np.integer[Any]]) -> Code:
    """Huffman's code for symbols 0, 1, ... that occur so often."""
    symbols = np.flatnonzero(counts)
    order = np.argsort(counts[symbols], kind="stable")
    lengths = np.zeros(symbols.size, np.int64)
    lengths[order] = _depths(counts[symbols][order].tolist())
    return Code(symbols, lengths)


def _depths(weights: list[int]) -> list[int]:
    """Depth of each leaf of Huffman's tree; the weights rise. Leaves and joined nodes each are a queue in order."""
    leaves, nodes = len(weights), list(weights)
    parent = [0] * max(0, 2 * leaves - 1)
    leaf, joined = 0, leaves
    for node in range(leaves, 2 * leaves - 1):
        nodes.append(0)
        for _ in range(2):
            if leaf < leaves and (joined >= node or nodes[leaf] <= nodes[joined]):
                least, leaf = leaf, leaf + 1
            else:
                least, joined = joined, joined + 1
            parent[least] = node
            nodes[node] += nodes[least]
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[:leaves]


def _size(
    zeros: NDArray[np.int64], counts: NDArray[np.int64], values: NDArray[np.int64], rest: int, index_bits: int
) -> int:
    """Bytes that a stream has: `zeros` come `counts` times before an entry, each value as often as `values` says."""
    padding = int((counts * (zeros >> index_bits)).sum())
    gaps = np.zeros(1 << index_bits, np.int64)
    np.add.at(gaps, zeros & ((1 << index_bits) - 1), counts)
    gaps[-1] += padding
    places = np.zeros(max(len(values), rest + 1), np.int64)
    places[: len(values)] = values
    places[rest] += padding
    bits, head = 0, len(leb128.write(int(places.sum())))
    for told in (gaps, places):
        code = optimal_code(told)
        bits += int(told[code.symbols] @ code.lengths)
        head += len(_write_code(code))
    return head + -(-bits // 8)


def _write_code(code: Code) -> bytes:
    if not code.symbols.size:
        return leb128.write(0, 0)
    lowest = int(code.symbols[0])
    span = int(code.symbols[-1]) - lowest + 1
    if span == 1:
        return leb128.write(lowest, 1)
    every = np.zeros(span, np.int64)
    every[code.symbols - lowest] = code.lengths
    width = int(code.lengths.max()).bit_length()
    bits = (every[:, None] >> np.arange(width)) & 1
    return leb128.write(lowest, span) + bytes([width]) + np.packbits(bits.astype(np.uint8)).tobytes()


def _read_code(data: bytes, position: int, alphabet: int) -> tuple[Code, int]:
    """The code that begins at a position, and the position after it."""
    lowest, position = leb128.read(data, position)
    span, position = leb128.read(data, position)
    if lowest + span > alphabet:
        raise ArtifactError(f"stream is damaged: symbols {lowest} to {lowest + span - 1} of {alphabet}")
    if span < 2:
        return Code(np.arange(lowest, lowest + span), np.zeros(span, np.int64)), position
    width = data[position] if position < len(data) else 0
    table = np.frombuffer(data, np.uint8)[position + 1 : position + 1 + -(-span * width // 8)]
    if not 1 <= width <= _LONGEST.bit_length() or table.size != -(-span * width // 8):
        raise ArtifactError(f"stream is damaged: {span} lengths of {width} bits in {table.size} bytes")
    bits = np.unpackbits(table, count=span * width).reshape(span, width).astype(np.int64)
    every = (bits << np.arange(width)).sum(axis=1)
    if int(every.max()) > _LONGEST:
        raise ArtifactError(f"stream is damaged: a code of {every.max()} bits, allowed: {_LONGEST}")
    symbols = np.flatnonzero(every)
    per_length = np.bincount(every[symbols]).tolist()
    if sum(n << (_LONGEST - bits) for bits, n in enumerate(per_length)) != 1 << _LONGEST:
        raise ArtifactError("stream is damaged: its code lengths are those of no complete code")
    return Code(symbols + lowest, every[symbols]), position + 1 + table.size


@kernel
def write_codes(symbols: Int32s, count: Int, codes: Int64s, lengths: Int32s, data: Bytes, position: Int) -> Int:
    """Write each symbol's code, highest bit first, at a bit position; the position after them."""
    for k in range(count):
        code = codes[symbols[k]]
        left = lengths[symbols[k]]
        while left > 0:
            free = 8 - (position & 7)
            take = min(free, left)
            piece = (code >> (left - take)) & ((1 << take) - 1)
            data[position >> 3] |= piece << (free - take)
            position += take
            left -= take
    return position


@kernel
def read_codes(
    symbols: Int32s, count: Int, per_length: Int32s, sorted_symbols: Int32s, longest: Int,
    data: Bytes, size: Int, position: Int,
) -> Int:  # fmt: skip
    """Read symbols whose code is canonical and complete; the position after them, or -1 where the bits end before."""
    for k in range(count):
        code = 0
        first = 0
        place = 0
        bits = 0
        known = 0
        while known == 0 and bits < longest:
            if position >= 8 * size:
                return -1
            code = code << 1 | data[position >> 3] >> (7 - (position & 7)) & 1
            position += 1
            bits += 1
            first = first << 1
            if code - first < per_length[bits]:
                known = 1
            else:
                place += per_length[bits]
                first += per_length[bits]
        symbols[k] = sorted_symbols[place + code - first]
    return position


def _canonical(code: Code) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The places of the code's symbols by rising length, then symbol; how many symbols each length has."""
    return np.argsort(code.lengths, kind="stable"), np.bincount(code.lengths).astype(np.int32)


def _write_symbols(parts: Iterable[tuple[Code, NDArray[np.int64]]]) -> bytes:
    """The codes of several sequences, one bit after the other."""
    told = []
    bits = 0
    for code, symbols in parts:
        lengths = np.zeros(int(code.symbols.max(initial=0)) + 1, np.int32)
        lengths[code.symbols] = code.lengths
        codes = np.zeros(lengths.size, np.int64)
        value, before = 0, 0
        for k in _canonical(code)[0].tolist():
            length = int(code.lengths[k])
            value <<= length - before
            codes[code.symbols[k]] = value
            value, before = value + 1, length
        bits += int(lengths[symbols].sum(dtype=np.int64))
        told.append((symbols.astype(np.int32), symbols.size, codes, lengths))
    data = np.zeros(-(-bits // 8), np.uint8)
    position = 0
    for part in told:
        position = write_codes(*part, data, position)
    return data.tobytes()


def _read_symbols(code: Code, count: int, data: NDArray[np.uint8], position: int) -> tuple[NDArray[np.int32], int]:
    """So many symbols from a bit position on, and the position after them."""
    if count and not code.symbols.size:
        raise ArtifactError(f"stream is damaged: {count} entries and a code of no symbols")
    if code.symbols.size < 2:
        return np.full(count, code.symbols[0] if count else 0, np.int32), position
    order, per_length = _canonical(code)
    least = count * int(code.lengths.min())
    if position + least > 8 * data.size:  # told before memory is taken
        raise ArtifactError(f"stream is damaged: {data.size} bytes cannot hold {count} codes")
    symbols = np.zeros(count, np.int32)
    in_order = code.symbols[order].astype(np.int32)
    end = read_codes(symbols, count, per_length, in_order, per_length.size - 1, data, data.size, position)
    if end < 0:
        raise ArtifactError("stream is damaged: its codes end too early")
    return symbols, end
