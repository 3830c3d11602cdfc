"""The max coder: adaptive binary coding of a matrix of small integers, many predictions mixed into one.

Each level is told in a few binary decisions: zero or not; its sign; how many bits its magnitude
less one has, in unary; those bits below the first. Several predictors watch each decision, each
an adaptive probability for a context of its own (how dense the row and the column have been so
far, what stands left, above, one `lag` before, ...). Their logits are added up with learned
weights, one set chosen by where we are, one by the neighbours, and the two sums averaged
(logistic mixing: Mahoney, "Adaptive weighing of context models for lossless data compression",
2005). The probability drives a 32-bit arithmetic coder. All arithmetic is on integers, so that
decoding gives the same on every machine.
"""

# ruff: noqa: PLR0917  (kernels take plain numbers and arrays)
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec.jit import Bytes, Int, Int32s, Int64s, kernel

ONE = 256
"""1.0 as a logit."""
TOP = 12 * ONE
"""The largest logit."""
FLAG, SIGN, EXPONENT, MANTISSA = 0, 8, 13, 19
"""The first predictor of each kind of decision."""
PREDICTORS = 21
CONTEXTS = 1 << 13
"""Contexts a predictor has."""
STRETCH, SQUASH, RATE = 0, 4096, 4096 + 2 * TOP + 1
LOG, LEARN = RATE + 1024, RATE + 1024 + 4096
"""Where each table begins, see `_tables`."""
MOST_BITS = 16
"""Levels are at most 2 ** 16 in magnitude."""
MOST_SUM = 1 << 30
"""Where sums of magnitudes stop growing."""
PRIOR = 20
"""Elements that a row's or a column's density counts as seen before its first."""
PACES = (240, 40)
"""How much faster than in the end the weights learn at first; the smaller suits matrices of a few hundred levels."""
SLOWEST, SLOWEST_VALUE = 500, 400
"""Observations after which a probability adapts no slower, of flags and of the rest."""
CONTEXT, LOGIT = 4, 20
"""In `now`: 0 low, 1 high, 2 code, 3 position of the arithmetic coder, then contexts and logits of a decision."""


Dead = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Which rows and which columns are likely to be empty."""


@kernel
def log_class(x: Int, table: Int32s) -> Int:
    """24 log2(x), rounded down, to 12 significant bits of x."""
    shift = 0
    while x >= 4096:
        x >>= 1
        shift += 24
    return int(table[LOG + x]) + shift


@kernel
def density_class(count: Int, of: Int, prior: Int, table: Int32s) -> Int:
    """0 (dense) to 15 (empty): 1.5 log2 of the elements over the nonzero ones among them."""
    return max(0, min(15, (log_class(10 * (of + PRIOR), table) - log_class(10 * count + prior, table)) >> 4))


@kernel
def learning(which: Int, weight: Int32s, table: Int32s) -> Int:
    """The learning rate of a set of weights, which counts its decisions in its last place."""
    seen = weight[which * 16 + 15]
    weight[which * 16 + 15] = min(seen + 1, 16 * 1023)
    return int(table[LEARN + (seen >> 4)])


@kernel
def decide(
    bit: Int, first: Int, predictors: Int, here: Int, near: Int, slowest: Int, encoding: Int,
    now: Int64s, prob: Int32s, weight: Int32s, table: Int32s, data: Bytes, size: Int,
) -> Int:  # fmt: skip
    """Code one decision (`bit` is it when encoding) under the contexts in `now`; learn from it; return it."""
    sum_here = 0
    sum_near = 0
    fresh = prob[first * CONTEXTS + now[CONTEXT]] & ~1023
    for k in range(predictors):
        at = (first + k) * CONTEXTS + now[CONTEXT + k]
        if prob[at] & 1023 == 0:
            prob[at] = fresh
        logit = table[STRETCH + (prob[at] >> 19)]
        now[LOGIT + k] = logit
        sum_here += weight[here * 16 + k] * logit
        sum_near += weight[near * 16 + k] * logit
    sum_here = max(-TOP, min(TOP, sum_here >> 16))
    sum_near = max(-TOP, min(TOP, sum_near >> 16))
    p = table[SQUASH + TOP + ((sum_here + sum_near) >> 1)]
    middle = now[0] + ((now[1] - now[0]) * p >> 16)
    if not encoding:
        bit = now[2] <= middle
    if bit:
        now[1] = middle
    else:
        now[0] = middle + 1
    while (now[0] ^ now[1]) < 16777216:
        if encoding:
            if now[3] < size:
                data[now[3]] = now[1] >> 24
        else:
            now[2] = (now[2] & 16777215) << 8
            if now[3] < size:
                now[2] |= data[now[3]]
        now[3] += 1
        now[0] = (now[0] & 16777215) << 8
        now[1] = (now[1] & 16777215) << 8 | 255
    truth = 65535 * bit
    error_here = learning(here, weight, table) * (truth - table[SQUASH + TOP + sum_here])
    error_near = learning(near, weight, table) * (truth - table[SQUASH + TOP + sum_near])
    for k in range(predictors):
        weight[here * 16 + k] += (error_here * now[LOGIT + k] + 2097152) >> 22
        weight[near * 16 + k] += (error_near * now[LOGIT + k] + 2097152) >> 22
        at = (first + k) * CONTEXTS + now[CONTEXT + k]
        seen = prob[at] & 1023
        p = prob[at] >> 10
        p += ((truth << 5) - p) * table[RATE + seen] >> 16
        prob[at] = p << 10 | min(seen + 1, slowest)
    return bit


@kernel
def mean_class(total: Int, count: Int, table: Int32s) -> Int:
    """0 to 63: eight times log2 of the mean magnitude."""
    return max(0, min(63, (log_class(8 * total + 8, table) - log_class(8 * count + 4, table)) // 3))


@kernel
def code_sign(
    plus: Int, i: Int, j: Int, left: Int, back: Int, encoding: Int,
    now: Int64s, prob: Int32s, weight: Int32s, table: Int32s, row: Int32s, column: Int32s, data: Bytes, size: Int,
) -> Int:  # fmt: skip
    """Code whether a level is positive; signs are 0 for none yet or zero, 1 plus, 2 minus."""
    sign_left = (left > 0) + 2 * (left < 0)
    sign_back = (back > 0) + 2 * (back < 0)
    sign_row = row[3 * i + 2]
    sign_column = column[3 * j + 2]
    now[CONTEXT] = 0
    now[CONTEXT + 1] = sign_left * 3 + sign_back
    now[CONTEXT + 2] = sign_row * 3 + sign_back
    now[CONTEXT + 3] = sign_left * 9 + sign_column * 3 + sign_row
    now[CONTEXT + 4] = j & 8191
    here = 32 + sign_left
    near = 32 + sign_column * 3 + sign_back
    return decide(plus, SIGN, 5, here, near, SLOWEST_VALUE, encoding, now, prob, weight, table, data, size)


@kernel
def code_magnitude(
    rest: Int, i: Int, j: Int, near: Int, c: Int, plus: Int, encoding: Int,
    now: Int64s, prob: Int32s, weight: Int32s, table: Int32s, row: Int32s, column: Int32s, data: Bytes, size: Int,
) -> Int:  # fmt: skip
    """Code a level's magnitude less one: how many bits it has, in unary, then the bits below the first."""
    in_row = mean_class(row[3 * i + 1], row[3 * i], table)
    in_column = mean_class(column[3 * j + 1], column[3 * j], table)
    beside = min(15, log_class(near + 1, table) // 12)
    bits = 0
    more = 1
    while more and bits < MOST_BITS:
        now[CONTEXT] = bits
        now[CONTEXT + 1] = bits * 64 + in_row
        now[CONTEXT + 2] = bits * 64 + in_column
        now[CONTEXT + 3] = (bits * 16 + c) * 2 + plus
        now[CONTEXT + 4] = bits * 128 + in_row + in_column
        now[CONTEXT + 5] = bits * 256 + (in_row + in_column >> 3) * 16 + beside
        here = 48 + min(7, bits)
        side = 48 + min(7, beside)
        bit = int(rest >> bits > 0)
        more = decide(bit, EXPONENT, 6, here, side, SLOWEST_VALUE, encoding, now, prob, weight, table, data, size)
        bits += more
    known = min(1, bits)
    for k in range(bits - 1):
        below = bits - 2 - k
        now[CONTEXT] = bits * 128 + (known if known < 64 else 64 + below)
        now[CONTEXT + 1] = 4096 + (bits * 64 + (known if known < 64 else 0)) * 2 + plus
        bit = rest >> below & 1
        bit = decide(bit, MANTISSA, 2, 60, 60, SLOWEST_VALUE, encoding, now, prob, weight, table, data, size)
        known = known * 2 + bit
    return known


@kernel
def note(at: Int, magnitude: Int, plus: Int, line: Int32s) -> Int:
    """Count a nonzero level to its row or column."""
    line[at] += 1
    line[at + 1] = min(MOST_SUM, line[at + 1] + magnitude)
    line[at + 2] = 2 - plus
    return 0


@kernel
def code_levels(
    levels: Int32s, rows: Int, columns: Int, lag: Int, group: Int, prior: Int, dead: Bytes, encoding: Int,
    now: Int64s, prob: Int32s, weight: Int32s, table: Int32s, row: Int32s, column: Int32s, data: Bytes, size: Int,
) -> Int:  # fmt: skip
    """Code all levels in row order; the position after the bytes that were written or read.

    `dead` tells which rows, then which columns, are likely to be empty. `row` and `column` hold what is
    known of each: nonzero elements, sum of magnitudes, last sign; then, in `column`, the nonzero
    elements of each group of columns.
    """
    for i in range(rows):
        in_group = 0
        for j in range(columns):
            at = i * columns + j
            part = j // group
            inside = j - part * group
            in_group *= inside > 0
            left = levels[at - 1] if j > 0 else 0
            left2 = levels[at - 2] if j > 1 else 0
            up = levels[at - columns] if i > 0 else 0
            back = levels[at - lag] if lag > 0 and j >= lag else 0
            back_right = levels[at - lag + 1] if lag > 0 and j >= lag else 0
            back_left = levels[at - lag - 1] if lag > 0 and j > lag else 0
            in_row = row[3 * i]
            in_column = column[3 * j]
            around = column[3 * j + 3] + (column[3 * j - 3] if j > 0 else 0)
            around += column[3 * (j - lag)] if lag > 0 and j >= lag else 0
            around += column[3 * (j + lag)] if lag > 0 and j + lag < columns else 0
            empty = (dead[i] != 0 and in_row == 0) or (dead[rows + j] != 0 and in_column == 0)
            r = 15 if empty else density_class(in_row, j, prior, table)
            c = 15 if empty else density_class(in_column, i, prior, table)
            n = density_class(around, (4 if lag > 0 else 2) * i, prior, table)
            now[CONTEXT] = r * 16 + c
            now[CONTEXT + 1] = r * 16 + (left != 0) * 8 + (up != 0) * 4 + (back != 0) * 2 + (left2 != 0)
            beside = (left != 0) * 16 + (back != 0) * 8 + (back_right != 0) * 4 + (left2 != 0) * 2 + (back_left != 0)
            now[CONTEXT + 2] = c * 32 + beside
            now[CONTEXT + 3] = j & 8191
            now[CONTEXT + 4] = i & 8191
            now[CONTEXT + 5] = min(31, in_row) * 32 + min(31, in_column)
            now[CONTEXT + 6] = (n * 16 + r) * 16 + c
            now[CONTEXT + 7] = n * 16 + r
            if group > 1:
                g = density_class(column[3 * columns + 3 + part], i * group, prior, table)
                now[CONTEXT + 6] = (g * 16 + n) * 4 + min(3, in_group)
                now[CONTEXT + 7] = min(inside, 2047) * 4 + min(3, in_group)
            here = (in_column == 0) + 2 * (in_row == 0) + 4 * (i < rows >> 3) + 8 * (j < columns >> 3)
            near = (left != 0) + 2 * (back != 0) + 4 * (up != 0) + 8 * (c > 8) + 16 * (r > 8)
            level = levels[at] if encoding else 0
            if decide(level != 0, FLAG, 8, here, near, SLOWEST, encoding, now, prob, weight, table, data, size):
                plus = code_sign(
                    level > 0, i, j, left, back, encoding, now, prob, weight, table, row, column, data, size
                )
                near = abs(left) + abs(back)
                magnitude = 1 + code_magnitude(
                    abs(level) - 1, i, j, near, c, plus, encoding, now, prob, weight, table, row, column, data, size
                )
                if not encoding:
                    levels[at] = magnitude if plus else -magnitude
                in_group += 1
                note(3 * i, magnitude, plus, row)
                note(3 * j, magnitude, plus, column)
                column[3 * columns + 3 + part] += 1
    return int(now[3])


def encode(
    levels: NDArray[np.integer[Any]], lag: int = 0, group: int = 1, pace: int = 0, *, dead: Dead | None = None
) -> bytes:
    """The bytes of a matrix of levels, at most 2 ** 16 in magnitude.

    `lag`: a column's likely relative is that many columns before it (the pixel above, in a layer
    that reads images), at least 2, or 0 for none. `group`: that many columns in a row belong
    together (a convolution's kernel). `pace`: a place in `PACES`. `dead`: which rows, and which
    columns, are likely to be empty. Raises ValueError for values that are not allowed.
    """
    _check(lag, group, pace)
    if levels.size and max(-int(levels.min()), int(levels.max())) > 1 << MOST_BITS:
        raise ValueError(f"levels are {levels.min()} to {levels.max()}, allowed: up to {1 << MOST_BITS} in magnitude")
    flat = np.ascontiguousarray(levels, dtype=np.int32).reshape(-1)
    prior = _prior(int(np.count_nonzero(flat)), flat.size)
    data = np.zeros(4 * flat.size + 64, np.uint8)
    now = _run(flat, levels.shape, (lag, group, pace), prior, data, code=None, dead=dead)
    if now[3] > data.size:  # more than 32 bits a level
        data = np.zeros(int(now[3]), np.uint8)
        now = _run(flat, levels.shape, (lag, group, pace), prior, data, code=None, dead=dead)
    coded = data[: now[3]].tobytes() + _between(int(now[0]), int(now[1]))
    return bytes([prior]) + coded.rstrip(b"\0")


def decode(
    data: bytes, shape: tuple[int, ...], lag: int = 0, group: int = 1, pace: int = 0, *, dead: Dead | None = None
) -> NDArray[np.int32]:
    """The matrix of `encode`, int32. Bytes that are damaged give other levels; bytes after the end count as zeros.

    Raises ValueError for a lag, a group or a pace that is not allowed.
    """
    _check(lag, group, pace)
    levels = np.zeros(shape, np.int32)
    body = np.frombuffer(data[1:].ljust(4, b"\0"), np.uint8)
    prior = max(1, data[0] if data else 1)
    _run(levels.reshape(-1), shape, (lag, group, pace), prior, body, code=int.from_bytes(body[:4]), dead=dead)
    return levels


def _check(lag: int, group: int, pace: int) -> None:
    if not 0 <= pace < len(PACES):
        raise ValueError(f"pace is {pace}, allowed: 0 to {len(PACES) - 1}")
    if not (lag == 0 or 2 <= lag < 1 << 31) or not 1 <= group < 1 << 31:
        raise ValueError(
            f"lag is {lag} and group {group}, allowed: a lag of 0 or 2 to 2^31 - 1, a group of 1 to 2^31 - 1"
        )


def _prior(nonzero: int, size: int) -> int:
    """Ten times the nonzero elements that `PRIOR` elements hold, at least 1: one byte."""
    return max(1, min(255, round(10 * PRIOR * nonzero / max(1, size))))


def _between(low: int, high: int) -> bytes:
    """The shortest bytes that, zeros following, make a number from low to high, both of 32 bits."""
    kept = next(kept for kept in range(5) if high >> (32 - 8 * kept) << (32 - 8 * kept) >= low)
    return (high >> (32 - 8 * kept)).to_bytes(kept)


def _run(
    flat: NDArray[np.int32],
    shape: tuple[int, ...],
    way: tuple[int, int, int],
    prior: int,
    data: NDArray[np.uint8],
    *,
    code: int | None,
    dead: Dead | None,
) -> NDArray[np.int64]:
    """Code the levels into the data, or out of it where its first four bytes are given as `code`; `now` afterwards."""
    (rows, columns), (lag, group, pace) = shape, way
    now = np.zeros(40, np.int64)
    if not flat.size:
        return now
    prob, weight = _start()
    row, column = np.zeros(3 * rows, np.int32), np.zeros(3 * columns + 4 + columns // group, np.int32)
    now[:4] = (0, 0xFFFFFFFF, code or 0, 0 if code is None else 4)
    state = (now, prob.copy(), weight.copy(), _tables(pace), row, column)
    likely = np.zeros(rows + columns, np.uint8) if dead is None else np.concatenate(dead).astype(np.uint8)
    if likely.size != rows + columns:
        raise ValueError(f"{likely.size} rows and columns may be dead, there are {rows + columns}")
    code_levels(flat, rows, columns, lag, group, prior, likely, int(code is None), *state, data, data.size)
    return now


@cache
def _start() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Probabilities (21 bits, and 10 of the observations so far) and weights before anything is seen."""
    prob = np.full((PREDICTORS, CONTEXTS), 1 << 30, np.int32)
    halves = [2.0 ** (-k / 3) for k in range(31)]  # the root of the two densities' product
    first = [[round(min(0.9, max(1e-3, halves[r + c])) * (1 << 21)) << 10 | 1 for c in range(16)] for r in range(16)]
    prob[FLAG, :256] = np.array(first).ravel()
    weight = np.full((64, 16), 7500, np.int32)
    weight[32:] = 12000
    weight[48:] = 11000
    weight[60] = 33000
    weight[:, 15] = 0
    return prob.ravel(), weight.ravel()


@cache
def _tables(pace: int = 0) -> NDArray[np.int32]:
    """Logit of a 12-bit probability; 16-bit probability of a logit; 16-bit rate after n observations; 24 log2 of a
    number; learning rate after 16 n decisions."""
    p = (np.arange(4096) + 0.5) / 4096
    stretch = np.rint(ONE * np.log(p / (1 - p)))
    squash = np.clip(np.rint(65536 / (1 + np.exp(-np.arange(-TOP, TOP + 1) / ONE))), 2, 65534)
    rate = 655360 // (10 * np.arange(1024) + 24)
    log = np.floor(24 * np.log2(np.maximum(np.arange(4096), 1)))
    learn = 16 + PACES[pace] * 600 // (600 + 16 * np.arange(1024))
    return np.concatenate([stretch, squash, rate, log, learn]).astype(np.int32)
