"""Context-modelled range coding of small integer arrays.

One stream holds one array of symbols, seen as a matrix (first axis x the rest). The commonest
symbol, the *rest* symbol (the zero of a pruned layer), is told apart from the others by a mask.
Each mask bit is coded with the probability of its context: the density class of its row and of
its column. The symbols under the mask follow with the histogram of the layer. Two passes: all
probabilities are counted first and written in front, so that coding and decoding are vectorised.

Layout, little-endian: u16 rest symbol, u16 alphabet size, u8 number of classes C, then
row classes and column classes (absent when C = 1), the C*C mask probabilities (u8 each),
the histogram (u8 a symbol), and the range coder's 32-bit words.
Probabilities are companded: a byte q stands for (q / 255)^2, exactly 0 and 1 at its ends.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autocompress.errors import ArtifactError

Symbols = NDArray[np.uint16]
_HEAD = struct.Struct("<HHB")
_CLASS_COUNTS = (1, 2, 4, 8, 16)
MAX_ALPHABET = 1 << 16


def encode(symbols: NDArray[np.integer[Any]], alphabet: int) -> bytes:
    """The bytes that `decode` turns back into `symbols`, values 0 .. alphabet - 1, any shape.

    The number of density classes is the one that gives the fewest bytes by the model's own count.
    """
    if not 1 <= alphabet <= MAX_ALPHABET:
        raise ValueError(f"alphabet is {alphabet}, allowed: 1 to {MAX_ALPHABET}")
    given = np.asarray(symbols)
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < alphabet:
        raise ValueError(f"symbols are {given.min()} to {given.max()}, allowed: 0 to {alphabet - 1}")
    matrix = _as_matrix(given.astype(np.uint16))
    counts = np.bincount(matrix.ravel(), minlength=alphabet)
    rest = int(counts.argmax())
    mask = matrix != rest
    classes = min((_classify(mask, n) for n in _CLASS_COUNTS), key=lambda c: _mask_bytes(mask, c))
    others = counts.copy()
    others[rest] = 0
    weights = _compand(others / max(1, others.max()))
    probabilities = _compand(_cell_densities(mask, classes))
    head = _HEAD.pack(rest, alphabet - 1, classes.count) + _class_bytes(classes)
    head += probabilities.tobytes() + weights.tobytes()
    coder = _new_encoder()
    for rows, columns, probability in _groups(classes, probabilities):
        if 0 < probability < 1:
            coder.encode(mask[np.ix_(rows, columns)].ravel().astype(np.int32), _bernoulli(probability))
    chosen = matrix[mask]
    if np.count_nonzero(weights) > 1 and chosen.size:
        coder.encode(_rank_of(weights)[chosen].astype(np.int32), _categorical(weights))
    return head + np.asarray(coder.get_compressed(), dtype="<u4").tobytes()


def decode(data: bytes, shape: tuple[int, ...]) -> Symbols:
    """The symbols of `encode`, uint16, in the shape given. Raises ArtifactError for a stream that cannot be one."""
    rows, columns = matrix_shape(shape)
    try:
        rest, highest, count = _HEAD.unpack_from(data)
        position = _HEAD.size
        classes, position = _read_classes(data, position, count, rows, columns)
        probabilities, position = _read_bytes(data, position, classes.count**2)
        weights, position = _read_bytes(data, position, highest + 1)
        if (len(data) - position) % 4:
            raise ArtifactError("stream is damaged: its coded part is not a whole number of words")
        least = sum(-r.size * c.size * math.log2(max(p, 1 - p)) for r, c, p in _groups(classes, probabilities))
        if 0.9 * least / 8 > len(data) - position + 8:  # else a few bytes could ask for hours of decoding
            raise ArtifactError(f"stream is damaged: {len(data) - position} bytes cannot hold {rows * columns} symbols")
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


@dataclass(frozen=True)
class _Classes:
    """Density classes 0 .. count - 1 of each row and each column."""

    count: int
    rows: NDArray[np.uint8]
    columns: NDArray[np.uint8]


def _as_matrix(symbols: Symbols) -> Symbols:
    return symbols.reshape(matrix_shape(symbols.shape))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix that an array is coded as: its first axis by the rest, one row where it has fewer than two axes."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _classify(mask: NDArray[np.bool_], count: int) -> _Classes:
    """Rows and columns in `count` classes of equal population by density; the dead ones are class 0."""

    def split(density: NDArray[np.int64]) -> NDArray[np.uint8]:
        if count == 1:
            return np.zeros(density.size, dtype=np.uint8)
        alive = density > 0
        result = np.zeros(density.size, dtype=np.uint8)
        edges: ArrayLike = np.quantile(density[alive], np.arange(1, count - 1) / (count - 1)) if alive.any() else []
        result[alive] = 1 + np.searchsorted(edges, density[alive], side="left")
        return result

    return _Classes(count, split(mask.sum(axis=1)), split(mask.sum(axis=0)))


def _cell_densities(mask: NDArray[np.bool_], classes: _Classes) -> NDArray[np.float64]:
    ones, sizes = _cell_counts(mask, classes)
    return ones / np.maximum(sizes, 1)


def _cell_counts(mask: NDArray[np.bool_], classes: _Classes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ones and elements of each context: products of class indicators, no sort needed."""
    n = classes.count
    rows = np.eye(n)[classes.rows]
    columns = np.eye(n)[classes.columns]
    by_row = np.zeros((n, mask.shape[1]))
    for k in range(n):
        by_row[k] = mask[classes.rows == k].sum(axis=0)
    ones = by_row @ columns
    sizes = np.outer(rows.sum(axis=0), columns.sum(axis=0))
    return ones.ravel(), sizes.ravel()


def _mask_bytes(mask: NDArray[np.bool_], classes: _Classes) -> float:
    """The length of the mask under its classes, side information included."""
    ones, sizes = _cell_counts(mask, classes)
    p = (_compand(ones / np.maximum(sizes, 1)) / 255.0) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.nan_to_num(ones * np.log2(p)) - np.nan_to_num((sizes - ones) * np.log2(1 - p))
    return float(bits.sum()) / 8 + len(_class_bytes(classes)) + classes.count**2


def _compand(p: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Probabilities to bytes; 0 and 1 exactly where p is exactly that."""
    q = np.clip(np.rint(255 * np.sqrt(p)), 1, 254)
    return np.where(p <= 0, 0, np.where(p >= 1, 255, q)).astype(np.uint8)


def _class_bytes(classes: _Classes) -> bytes:
    if classes.count == 1:
        return b""
    bits = (classes.count - 1).bit_length()
    every = np.concatenate([classes.rows, classes.columns])
    return np.packbits((every[:, None] >> np.arange(bits)) & 1).tobytes()


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


def _rank_of(weights: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Symbol -> its place among the symbols that occur."""
    return np.cumsum(weights > 0) - 1


def _new_encoder() -> Any:
    import constriction

    return constriction.stream.queue.RangeEncoder()


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
