"""The fast coder: interleaved range asymmetric numeral systems (rANS) under contexts counted in a first pass.

One stream holds one array of symbols, seen as a matrix (first axis x the rest). Where one symbol,
the *rest* (the zero of a pruned layer), is common, a mask tells it apart from the others: each
mask bit is coded with the probability of its context, the density class of its row and of its
column, and the symbols under the mask follow with their histogram. Else the histogram alone
codes all symbols. The stream is cut in blocks of `BLOCK` elements, which decode independently and
so in as many threads as one likes (kernels release the interpreter lock).

rANS: Duda, "Asymmetric numeral systems", arXiv 1311.2540. Eight interleaved states let a
processor work on eight symbols at once: Giesen, "Interleaved entropy coders", arXiv 1402.3392.
The bytes are described in docs/artifact-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import leb128
from autocompress.codec.rans_kernels import (
    count_cells,
    count_lines,
    count_symbols,
    decode_mask,
    decode_symbols,
    encode_mask,
    encode_symbols,
    pick,
    spread,
)
from autocompress.errors import ArtifactError

Symbols = NDArray[np.uint16]
Data = bytes | memoryview
BLOCK = 1 << 20
"""Elements of a block."""
MAX_ALPHABET = 1 << 16
MASK_BITS = 16
"""Probabilities of mask bits are multiples of 2 ** -16."""
PRECISIONS = (12, 14, 16)
"""Those of symbols are multiples of 2 ** -12, -14 or -16."""
CLASS_COUNTS = (1, 2, 4, 8, 16)
"""Density classes of rows and of columns."""
LEAST = 1 << 16
"""The least state; coding begins with it and decoding ends with it."""


_LANES = 8
_ROW = 4096


def encode(symbols: NDArray[np.integer[Any]]) -> bytes:
    """The bytes that `decode` turns back into `symbols`, values 0 to 65535, any shape."""
    given = np.asarray(symbols)
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < MAX_ALPHABET:
        raise ValueError(f"symbols are {given.min()} to {given.max()}, allowed: 0 to {MAX_ALPHABET - 1}")
    if not given.size:
        return b""
    flat = np.ascontiguousarray(given, dtype=np.uint16).reshape(-1)
    model = _fit(flat, matrix_shape(given.shape))
    parts = [part for start in range(0, flat.size, BLOCK) for part in _encode_block(model, flat, start)]
    return model.head() + leb128.write(*map(len, parts)) + b"".join(part.astype("<u2").tobytes() for part in parts)


def decode(data: bytes, shape: tuple[int, ...]) -> Symbols:
    """The symbols of `encode`, uint16, in the shape given. Raises ArtifactError for a stream that cannot be one."""
    found = blocks(data, shape)  # before memory is taken
    symbols = np.empty(math.prod(shape), np.uint16)
    for block in found:
        symbols[block.start : block.stop] = block.read()
    return symbols.reshape(shape)


@dataclass(frozen=True)
class Block:
    """Elements start .. stop - 1 in row order. `read` decodes them, in any thread; it may raise ArtifactError."""

    start: int
    stop: int
    read: Callable[[], Symbols]


def blocks(data: Data, shape: tuple[int, ...]) -> list[Block]:
    """The parts of a stream, none of them decoded yet. Raises ArtifactError for a stream that cannot be one."""
    size = math.prod(shape)
    if not size:
        if data:
            raise ArtifactError(f"stream is damaged: {len(data)} bytes for no symbol")
        return []
    model, position = _read_model(data, matrix_shape(shape))
    lengths = []
    for _ in range(-(-size // BLOCK) * model.parts):
        length, position = leb128.read(data, position)
        lengths.append(length)
    if 2 * sum(lengths) != len(data) - position:
        raise ArtifactError(f"stream is damaged: {len(data) - position} bytes in its blocks, {2 * sum(lengths)} stated")
    ends = position + 2 * np.cumsum(lengths)
    found = []
    for k, start in enumerate(range(0, size, BLOCK)):
        pieces = range(k * model.parts, (k + 1) * model.parts)
        parts = [data[int(ends[p]) - 2 * lengths[p] : int(ends[p])] for p in pieces]
        stop = min(size, start + BLOCK)
        found.append(Block(start, stop, partial(_decode_block, model, start, stop, parts)))
    return found


def mask_bytes(data: bytes, shape: tuple[int, ...]) -> int:
    """How many of a stream's bytes tell its mask: the classes, their probabilities, its words."""
    if not math.prod(shape):
        return 0
    model, position = _read_model(data, matrix_shape(shape))
    if model.mask is None:
        return 0
    symbols = _Model(None, model.precision, model.frequencies)
    lengths, _ = _read_numbers(data, position, 2 * -(-math.prod(shape) // BLOCK))
    return len(model.head()) - len(symbols.head()) + 1 + 2 * int(lengths[::2].sum())


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix that an array is coded as: its first axis by the rest, one row where it has fewer than two axes."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class _Mask:
    """Which symbols are other than `rest`: `ones`, of 65536, in each context, class of row x class of column.

    With one class a row has 4096 elements, whatever the array's shape.
    """

    rest: int
    classes: int
    rows: NDArray[np.uint8]
    columns: NDArray[np.uint8]
    ones: NDArray[np.int64]


@dataclass(frozen=True)
class _Model:
    """All that is counted in the first pass. `frequencies` of the symbols (under the mask), of 2 ** precision."""

    mask: _Mask | None
    precision: int
    frequencies: NDArray[np.int64]

    @property
    def parts(self) -> int:
        """Pieces of words of a block."""
        return 1 if self.mask is None else 2

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """Frequency and first slot of each symbol, for the kernels."""
        return self.frequencies << 20 | np.cumsum(self.frequencies) - self.frequencies

    @cached_property
    def slots(self) -> NDArray[np.uint16]:
        """The symbol of each slot."""
        return np.repeat(np.arange(self.frequencies.size, dtype=np.uint16), self.frequencies)

    def head(self) -> bytes:
        """The model as bytes, which `_read_model` reads."""
        tail = leb128.write(self.precision, self.frequencies.size, *self.frequencies.tolist())
        if self.mask is None:
            return leb128.write(0) + tail
        bits = np.arange(self.mask.classes.bit_length() - 1)
        classes = np.concatenate([self.mask.rows, self.mask.columns])[:, None] >> bits & 1
        front = leb128.write(self.mask.classes, self.mask.rest, *self.mask.ones.tolist())
        return front + np.packbits(classes, bitorder="little").tobytes() + tail


def _read_model(data: Data, shape: tuple[int, int]) -> tuple[_Model, int]:
    """The model at the beginning of a stream and where it ends."""
    classes, position = leb128.read(data, 0)
    mask = None
    if classes:
        mask, position = _read_mask(data, position, classes, shape)
    precision, position = leb128.read(data, position)
    size, position = leb128.read(data, position)
    if precision not in PRECISIONS or size > MAX_ALPHABET:
        raise ArtifactError(f"stream is damaged: {size} symbols of {precision} bits")
    frequencies, position = _read_numbers(data, position, size)
    total = sum(frequencies.tolist())  # exactly: 64 bits could wrap around to what is expected
    if total != (1 << precision if size else 0):
        raise ArtifactError(f"stream is damaged: its frequencies add up to {total}")
    return _Model(mask, precision, frequencies), position


def _read_mask(data: Data, position: int, classes: int, shape: tuple[int, int]) -> tuple[_Mask, int]:
    rest, position = leb128.read(data, position)
    if classes not in CLASS_COUNTS or rest >= MAX_ALPHABET:
        raise ArtifactError(f"stream is damaged: {classes} classes, allowed: {CLASS_COUNTS}; rest is symbol {rest}")
    ones, position = _read_numbers(data, position, classes**2)
    if int(ones.max()) > 1 << MASK_BITS:
        raise ArtifactError(f"stream is damaged: a probability of {ones.max()} in {1 << MASK_BITS}")
    if classes == 1:
        return _Mask(rest, 1, *_one_class(math.prod(shape)), ones), position
    bits = classes.bit_length() - 1
    rows, columns = shape
    end = position + -(-(rows + columns) * bits // 8)
    if end > len(data):
        raise ArtifactError(f"stream is damaged: {len(data) - position} bytes for {rows + columns} classes")
    packed = np.frombuffer(data, np.uint8, end - position, position)
    flat = np.unpackbits(packed, count=(rows + columns) * bits, bitorder="little").reshape(-1, bits)
    every = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    return _Mask(rest, classes, every[:rows].copy(), every[rows:].copy(), ones), end


def _read_numbers(data: Data, position: int, count: int) -> tuple[NDArray[np.int64], int]:
    numbers = np.zeros(count, np.int64)
    for k in range(count):
        numbers[k], position = leb128.read(data, position)
    return numbers, position


# Fitting


def _fit(flat: Symbols, shape: tuple[int, int]) -> _Model:
    """The model that gives the fewest bytes by its own count."""
    counts = np.zeros(4 * MAX_ALPHABET, np.int64)
    count_symbols(flat, flat.size, counts)
    counts = counts.reshape(4, -1).sum(axis=0)
    counts = counts[: int(np.flatnonzero(counts)[-1]) + 1]
    rest = int(counts.argmax())
    others = counts.copy()
    others[rest] = 0
    whole = entropy(counts)
    if 4 * counts[rest] < flat.size:
        return _Model(None, *_quantized(counts))
    mask, mask_bits = _fit_mask(flat, shape, rest)
    if mask_bits + entropy(others) < 0.999 * whole:
        return _Model(mask, *_quantized(others))
    return _Model(None, *_quantized(counts))


def _fit_mask(flat: Symbols, shape: tuple[int, int], rest: int) -> tuple[_Mask, float]:
    """The mask's model, and the bits of model and mask."""
    rows, columns = np.zeros(shape[0], np.int64), np.zeros(shape[1], np.int64)
    count_lines(flat, *shape, rest, rows, columns)
    finest = CLASS_COUNTS[-1]
    fine = _classify(rows, finest), _classify(columns, finest)
    ones, sizes = np.zeros(finest**2, np.int64), np.outer(*(np.bincount(c, minlength=finest) for c in fine))
    count_cells(flat, *shape, rest, *fine, finest, ones)
    best: tuple[float, int] | None = None
    for classes in CLASS_COUNTS:
        merged = np.eye(classes, dtype=np.int64)[_merge(classes)]
        one, size = merged.T @ ones.reshape(finest, finest) @ merged, merged.T @ sizes @ merged
        side = sum(shape) * (classes.bit_length() - 1) + 16 * classes**2
        bits = _binary_bits(one, size) + side
        if best is None or bits < best[0]:
            best, counted = (bits, classes), (one, size)
    assert best is not None
    bits, classes = best
    one, size = counted
    inner = np.clip(np.rint((1 << MASK_BITS) * one / np.maximum(size, 1)), 1, (1 << MASK_BITS) - 1)
    told = np.where(one == 0, 0, np.where(one == size, 1 << MASK_BITS, inner)).astype(np.int64).ravel()
    lines = _one_class(flat.size) if classes == 1 else tuple(_merge(classes)[c] for c in fine)
    return _Mask(rest, classes, lines[0], lines[1], told), bits


def _one_class(size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.zeros(-(-size // _ROW), np.uint8), np.zeros(_ROW, np.uint8)


def _classify(ones: NDArray[np.int64], classes: int) -> NDArray[np.uint8]:
    """Lines in classes of about equal population by their ones; the empty lines are class 0."""
    alive = ones > 0
    result = np.zeros(ones.size, np.uint8)
    if alive.any():
        edges = np.quantile(ones[alive], np.arange(1, classes - 1) / (classes - 1))
        result[alive] = 1 + np.searchsorted(edges, ones[alive], side="left")
    return result


def _merge(classes: int) -> NDArray[np.uint8]:
    """The class, of fewer, of each of the finest ones; empty lines stay by themselves unless there is but one class."""
    finest = CLASS_COUNTS[-1]
    if classes == 1:
        return np.zeros(finest, np.uint8)
    alive = 1 + np.arange(finest - 1) * (classes - 1) // (finest - 1)
    return np.concatenate([[0], alive]).astype(np.uint8)


def entropy(counts: NDArray[np.int64]) -> float:
    """Bits of symbols of these counts at their own entropy."""
    some = counts[counts > 0]
    return float(-(some * np.log2(some / some.sum())).sum()) if some.size else 0.0


def _binary_bits(ones: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    return _entropies(ones, sizes) + _entropies(sizes - ones, sizes)


def _entropies(counts: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    some = counts > 0
    return float(-(counts[some] * np.log2(counts[some] / sizes[some])).sum())


def _quantized(counts: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """The smallest precision that costs next to nothing, and the frequencies at it."""
    if not counts.any():
        return PRECISIONS[0], np.zeros(0, np.int64)
    tried = [(p, _frequencies(counts, p)) for p in PRECISIONS if np.count_nonzero(counts) <= 1 << p]
    some = counts > 0
    bits = [float((counts[some] * (p - np.log2(f[some]))).sum()) + 8 * len(leb128.write(*f.tolist())) for p, f in tried]
    return next(way for way, cost in zip(tried, bits, strict=True) if cost <= 1.0005 * min(bits))


def _frequencies(counts: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Whole numbers that add up to 2 ** precision, in the counts' proportion, at least 1 where a symbol occurs."""
    total, some = 1 << precision, counts > 0

    def scaled(by: float) -> NDArray[np.int64]:
        return np.where(some, np.maximum(1, np.floor(by * counts)), 0).astype(np.int64)

    low, high = 0.0, total / counts.sum()
    for _ in range(60):  # the largest scale that does not exceed the total
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).sum() <= total else (low, middle)
    result = scaled(low)
    left = total - int(result.sum())
    gain = np.where(some, counts * np.log2(1 + 1 / np.maximum(result, 1)), -1)
    result[np.argsort(-gain, kind="stable")[:left]] += 1
    result[counts.argmax()] += total - int(result.sum())
    return result


# Blocks


def _encode_block(model: _Model, flat: Symbols, start: int) -> list[Symbols]:
    """The words of a block: of its mask, if there is one, and of its symbols."""
    part = flat[start : start + BLOCK]
    parts = []
    if model.mask is not None:
        mask = model.mask
        words, state = np.zeros(part.size + 1, np.uint16), _fresh()
        stop = start + part.size
        lines = mask.columns.size, mask.rest, mask.rows, mask.columns, mask.classes, mask.ones
        at = encode_mask(flat, start, stop, *lines, state, words, words.size)
        parts.append(np.concatenate([_words_of(state), words[at:]]))
        chosen = np.empty(part.size + 1, np.uint16)
        part = chosen[: pick(flat, start, stop, mask.rest, chosen)]
    if not part.size:
        return [*parts, part]
    words, state = np.zeros(part.size + 1, np.uint16), _fresh()
    at = encode_symbols(part, part.size, model.precision, model.table, state, words, words.size)
    return [*parts, np.concatenate([_words_of(state), words[at:]])]


def _decode_block(model: _Model, start: int, stop: int, parts: list[Data]) -> Symbols:
    symbols = np.empty(stop - start, np.uint16)
    count, mask = stop - start, model.mask
    if mask is not None:
        bits, (state, words) = np.empty(count, np.uint8), _opened(parts[0])
        lines = mask.columns.size, mask.rows, mask.columns, mask.classes, mask.ones
        at = decode_mask(bits, start, stop, *lines, state, words, 2 * _LANES, words.size - _LANES)
        _check_end(at, words, state)
        count = int(np.count_nonzero(bits))
    chosen = symbols if mask is None else np.empty(count + 1, np.uint16)
    if not count:
        if parts[-1]:
            raise ArtifactError(f"stream is damaged: {len(parts[-1])} bytes for no symbol")
    elif not model.frequencies.size:
        raise ArtifactError(f"stream is damaged: {count} symbols of an empty alphabet")
    else:
        state, words = _opened(parts[-1])
        at = decode_symbols(
            chosen, count, model.precision, model.slots, model.table, state, words, 2 * _LANES, words.size - _LANES
        )
        _check_end(at, words, state)
    if mask is not None:
        spread(bits, stop - start, mask.rest, chosen, symbols)
    return symbols


def _fresh() -> NDArray[np.int64]:
    return np.full(_LANES, LEAST, np.int64)


def _words_of(state: NDArray[np.int64]) -> Symbols:
    """High and low word of each state."""
    return np.stack([state >> 16, state & 0xFFFF], axis=1).astype(np.uint16).ravel()


def _opened(part: Data) -> tuple[NDArray[np.int64], Symbols]:
    """The states at the beginning of a block's part, and its words with room after them."""
    told = np.frombuffer(part, "<u2")
    if told.size < 2 * _LANES:
        raise ArtifactError(f"stream is damaged: a block of {len(part)} bytes, expected: {4 * _LANES} or more")
    pairs = told[: 2 * _LANES].reshape(-1, 2).astype(np.int64)
    words = np.zeros(told.size + _LANES, np.uint16)
    words[: told.size] = told
    return pairs[:, 0] << 16 | pairs[:, 1], words


def _check_end(at: int, words: Symbols, state: NDArray[np.int64]) -> None:
    if at != words.size - _LANES or (state != LEAST).any():
        raise ArtifactError("stream is damaged: a block does not end where it should")
