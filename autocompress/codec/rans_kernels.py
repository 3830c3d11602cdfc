"""The loops of the fast coder: counting, and interleaved rANS of symbols and of mask bits.

States are in [2 ** 16, 2 ** 32) and emit 16-bit words. A symbol of frequency f of 2 ** p, whose
slots begin at b, takes state x to (x // f) * 2 ** p + x % f + b, after a word has been written
where the result would be too large. Encoding goes backwards, through the symbols and through the
words, so that decoding goes forwards.
"""

# ruff: noqa: PLR0917  (kernels take plain numbers and arrays)
from __future__ import annotations

from autocompress.codec.jit import Bytes, Int, Int32s, Int64s, Words, kernel


@kernel
def count_symbols(symbols: Words, count: Int, counts: Int64s) -> Int:
    """A histogram in four parts, which a processor need not wait for one by one."""
    for t in range(count):
        counts[((t & 3) << 16) + symbols[t]] += 1
    return 0


@kernel
def count_lines(symbols: Words, rows: Int, columns: Int, rest: Int, row: Int64s, column: Int64s) -> Int:
    """Count the symbols other than rest of each row and each column."""
    for i in range(rows):
        total = 0
        for j in range(columns):
            other = int(symbols[i * columns + j] != rest)
            total += other
            column[j] += other
        row[i] = total
    return 0


@kernel
def count_cells(
    symbols: Words, rows: Int, columns: Int, rest: Int, row: Bytes, column: Bytes, classes: Int, ones: Int64s
) -> Int:
    """Count the symbols other than rest by the classes of row and column."""
    for i in range(rows):
        for j in range(columns):
            ones[row[i] * classes + column[j]] += symbols[i * columns + j] != rest
    return 0


@kernel
def pick(symbols: Words, start: Int, stop: Int, rest: Int, chosen: Words) -> Int:
    """Copy the symbols other than rest of start .. stop - 1; their number. `chosen` has room for all, and one more."""
    found = 0
    for at in range(start, stop):
        chosen[found] = symbols[at]
        found += symbols[at] != rest
    return found


@kernel
def spread(mask: Bytes, count: Int, rest: Int, chosen: Words, symbols: Words) -> Int:
    """The inverse of `pick`. `chosen` has one more than the mask has ones."""
    taken = 0
    for at in range(count):
        symbols[at] = chosen[taken] if mask[at] else rest
        taken += mask[at]
    return 0


@kernel
def look_up(symbols: Words, count: Int, table: Int32s, values: Int32s) -> Int:
    """The table's entry of each symbol; symbols are in the table."""
    for t in range(count):
        values[t] = table[symbols[t]]
    return 0


@kernel
def encode_symbols(
    symbols: Words, count: Int, precision: Int, table: Int64s, state: Int64s, words: Words, at: Int
) -> Int:
    """Code symbols, the last first, into the words before `at`; where the words begin.

    `table[s]` is the frequency of s, shifted by 20, and where its slots begin.
    """
    for back in range(count):
        t = count - 1 - back
        entry = table[symbols[t]]
        frequency = entry >> 20
        x = state[t & 7]
        full = int(x >= frequency << 32 - precision)
        words[at - 1] = x
        at -= full
        x >>= full << 4
        quotient = x // frequency
        state[t & 7] = (quotient << precision) + x - quotient * frequency + (entry & 1048575)
    return at


@kernel
def decode_symbol(lane: Int, precision: Int, slots: Words, table: Int64s, state: Int64s, words: Words, at: Int) -> Int:
    """Decode one symbol; the symbol, and above its 16 bits whether a word was taken."""
    x = state[lane]
    slot = x & (1 << precision) - 1
    symbol = slots[slot]
    entry = table[symbol]
    x = (entry >> 20) * (x >> precision) + slot - (entry & 1048575)
    low = int(x < 65536)
    state[lane] = x << (low << 4) | words[at] & -low
    return int(symbol | low << 16)


@kernel
def decode_symbols(
    symbols: Words, count: Int, precision: Int, slots: Words, table: Int64s,
    state: Int64s, words: Words, at: Int, end: Int,
) -> Int:  # fmt: skip
    """Decode symbols from the words at `at`; the position after them, more than `end` where they are too few.

    Eight words after the end are looked at, and not used.
    """
    for group in range(count >> 3):
        if at > end:
            return at
        for lane in range(8):
            found = decode_symbol(lane, precision, slots, table, state, words, at)
            symbols[8 * group + lane] = found
            at += found >> 16
    if at <= end:
        for t in range(count >> 3 << 3, count):
            found = decode_symbol(t & 7, precision, slots, table, state, words, at)
            symbols[t] = found
            at += found >> 16
    return at


@kernel
def encode_mask(
    symbols: Words, start: Int, stop: Int, columns: Int, rest: Int,
    row: Bytes, column: Bytes, classes: Int, ones: Int64s, state: Int64s, words: Words, at: Int,
) -> Int:  # fmt: skip
    """Code whether each symbol is other than rest, the last first, into the words before `at`; where they begin.

    `ones` holds the probability of each context, of 65536. An element's lane counts from where its
    row begins in this block.
    """
    while stop > start:
        i = (stop - 1) // columns
        first = max(start, i * columns)
        base = row[i] * classes
        for back in range(stop - first):
            t = stop - 1 - back
            one = ones[base + column[t - i * columns]]
            other = int(symbols[t] != rest)
            frequency = one if other else 65536 - one
            lane = t - first & 7
            x = state[lane]
            full = int(x >= frequency << 16)
            words[at - 1] = x
            at -= full
            x >>= full << 4
            quotient = x // frequency
            state[lane] = (quotient << 16) + x - quotient * frequency + (0 if other else one)
        stop = first
    return at


@kernel
def decode_bit(lane: Int, one: Int, state: Int64s, words: Words, at: Int) -> Int:
    """Decode one mask bit; the bit, and above it whether a word was taken."""
    x = state[lane]
    slot = x & 65535
    bit = int(slot < one)
    x = (one if bit else 65536 - one) * (x >> 16) + slot - (0 if bit else one)
    low = int(x < 65536)
    state[lane] = x << (low << 4) | words[at] & -low
    return bit | low << 1


@kernel
def decode_mask(
    mask: Bytes, start: Int, stop: Int, columns: Int,
    row: Bytes, column: Bytes, classes: Int, ones: Int64s, state: Int64s, words: Words, at: Int, end: Int,
) -> Int:  # fmt: skip
    """Decode the mask of elements start .. stop - 1; the position after its words, see `decode_symbols`."""
    out = 0
    while start < stop:
        i = start // columns
        j = start - i * columns
        count = min(stop - start, columns - j)
        base = row[i] * classes
        for group in range(count >> 3):
            if at > end:
                return at
            for lane in range(8):
                found = decode_bit(lane, ones[base + column[j + 8 * group + lane]], state, words, at)
                mask[out + 8 * group + lane] = found & 1
                at += found >> 1
        if at > end:
            return at
        for t in range(count >> 3 << 3, count):
            found = decode_bit(t & 7, ones[base + column[j + t]], state, words, at)
            mask[out + t] = found & 1
            at += found >> 1
        start += count
        out += count
    return at
