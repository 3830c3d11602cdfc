"""The fast coder: inverse over all kinds of arrays, size against the entropy, damage always told."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.codec import leb128, rans
from autocompress.errors import ArtifactError


def roundtrip(symbols):
    data = rans.encode(symbols)
    back = rans.decode(data, symbols.shape)
    assert back.dtype == np.uint16
    assert back.shape == symbols.shape
    assert np.array_equal(back, symbols)
    return len(data)


def entropy_bytes(symbols):
    """Order-0: what an ideal coder that knows the histogram needs."""
    share = np.unique(symbols, return_counts=True)[1] / max(1, symbols.size)
    return float(-(share * np.log2(share)).sum() * symbols.size / 8)


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple) | st.sampled_from(
    [(), (0,), (1,), (0, 5), (5, 0), (1, 300), (300, 1), (64, 33), (3, 2, 5, 5)]
)
alphabets = st.sampled_from([1, 2, 3, 4, 16, 17, 256, 257, 4096, 65535, 65536])


@settings(max_examples=150, deadline=None)
@given(shapes, alphabets, st.integers(0, 2**32 - 1), st.sampled_from(["any", "one", "few", "rows", "zero"]))
def test_decode_is_the_inverse_of_encode(shape, alphabet, seed, kind):
    draw = np.random.default_rng(seed)
    symbols = draw.integers(0, alphabet, shape)
    if kind == "one":
        symbols = np.full(shape, alphabet - 1)
    elif kind == "few":
        symbols = np.where(draw.random(shape) < 0.05, symbols, alphabet // 2)
    elif kind == "zero":
        symbols = np.zeros(shape, int)
    elif kind == "rows" and symbols.ndim > 1:
        symbols[draw.random(shape[0]) < 0.5] = 0
        symbols[:, draw.random(shape[1]) < 0.5] = 0
    roundtrip(symbols)


@pytest.mark.parametrize("alphabet", [2, 3, 16, 33])
@pytest.mark.parametrize("skew", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(300, 784), (50, 20, 5, 5), (1, 20000)])
def test_size_of_independent_symbols_is_that_of_the_entropy(alphabet, skew, shape):
    draw = np.random.default_rng(0)
    weights = np.exp(-skew * draw.permutation(alphabet))
    symbols = draw.choice(alphabet, shape, p=weights / weights.sum())
    assert roundtrip(symbols) <= 1.01 * entropy_bytes(symbols) + 128


def test_size_of_a_large_alphabet_adds_a_byte_a_symbol():
    draw = np.random.default_rng(1)
    symbols = np.clip(np.rint(draw.normal(128, 30, (300, 400))), 0, 256).astype(int)
    assert roundtrip(symbols) <= 1.01 * entropy_bytes(symbols) + 128 + 257


@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_structure_of_rows_and_columns_is_used(axis):
    draw = np.random.default_rng(2)
    rows, columns = (draw.beta(0.3, 1.5, n) if axis in (name, "both") else np.full(n, 0.5) for name, n in
                     (("rows", 300), ("columns", 784)))  # fmt: skip
    mask = draw.random((300, 784)) < rows[:, None] * columns
    p = np.clip(rows[:, None] * columns, 1e-12, 1 - 1e-12)
    ideal = float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum() / 8)  # a coder that knows every probability
    size = roundtrip(mask.astype(int))
    assert size < 0.93 * entropy_bytes(mask)
    assert size > ideal


def test_dead_rows_and_columns_cost_next_to_nothing():
    draw = np.random.default_rng(3)
    symbols = draw.integers(1, 16, (300, 784))
    symbols[draw.random(300) < 0.7] = 0
    symbols[:, draw.random(784) < 0.7] = 0
    alive = symbols[symbols.any(axis=1)][:, symbols.any(axis=0)]
    side = 2 * (300 + 784) / 8  # at most two bits a row and column
    assert roundtrip(symbols) <= 1.02 * entropy_bytes(alive) + 2 * side + 128
    assert roundtrip(np.zeros((1024, 1024), int)) < 128


def test_symbols_of_more_than_16_bits_are_refused():
    with pytest.raises(ValueError, match="symbols are 0 to 65536, allowed: 0 to 65535"):
        rans.encode(np.arange(65537))
    with pytest.raises(ValueError, match="symbols are -1 to 0"):
        rans.encode(np.array([-1, 0]))


@pytest.mark.parametrize("density", [0.03, 0.8])
def test_blocks_decode_by_themselves(density, monkeypatch):
    """In any order, the last one shorter, rows going on from one block to the next."""
    monkeypatch.setattr(rans, "BLOCK", 1000)
    draw = np.random.default_rng(11)
    symbols = draw.integers(1, 40, (37, 143)) * (draw.random((37, 143)) < density * draw.beta(0.4, 0.4, (37, 1)))
    found = rans.blocks(rans.encode(symbols), symbols.shape)
    assert [(b.start, b.stop) for b in found] == [(k, min(5291, k + 1000)) for k in range(0, 5291, 1000)]
    for block in found[::-1]:
        assert np.array_equal(block.read(), symbols.reshape(-1)[block.start : block.stop])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300).filter(any), st.sampled_from([12, 14, 16]))
def test_frequencies_add_up_and_leave_no_symbol_out(counts, precision):
    counts = np.array(counts)
    found = rans._frequencies(counts, precision)
    assert found.sum() == 1 << precision
    assert ((found > 0) == (counts > 0)).all()
    ideal = counts / counts.sum() * (1 << precision)
    assert (found <= ideal + 2).all() or (found[counts > 0] == 1).any()


def by_the_book(data, count):
    """An rANS decoder in plain Python, one state at a time, for streams without a mask and of one block."""
    numbers, position = [], 0
    while len(numbers) < 3 or len(numbers) < 4 + numbers[2]:
        value, position = leb128.read(data, position)
        numbers.append(value)
    masked, precision, size, *frequencies, length = numbers
    assert (masked, len(frequencies), len(data) - position) == (0, size, 2 * length)
    words = [int.from_bytes(data[k : k + 2], "little") for k in range(position, len(data), 2)]
    states, rest, out = [words[2 * k] << 16 | words[2 * k + 1] for k in range(8)], words[16:], []
    for t in range(count):
        x = states[t % 8]
        slot = x % (1 << precision)
        symbol, below = 0, 0
        while slot >= below + frequencies[symbol]:
            below += frequencies[symbol]
            symbol += 1
        x = frequencies[symbol] * (x >> precision) + slot - below
        if x < 1 << 16:
            x = x << 16 | rest.pop(0)
        states[t % 8] = x
        out.append(symbol)
    assert states == [1 << 16] * 8
    assert not rest
    return out


def test_the_stream_is_what_the_papers_say():
    draw = np.random.default_rng(12)
    symbols = np.clip(np.rint(draw.normal(20, 6, 3001)), 0, 40).astype(int)
    assert by_the_book(rans.encode(symbols), 3001) == symbols.tolist()


def stream():
    draw = np.random.default_rng(4)
    symbols = draw.integers(0, 9, (12, 30)) * (draw.random((12, 30)) < 0.4)
    symbols[draw.random(12) < 0.3] = 0
    return symbols, rans.encode(symbols)


def decoded_or_refused(data, shape):
    """Whatever the bytes are: symbols of that shape, or an ArtifactError."""
    try:
        result = rans.decode(data, shape)
    except ArtifactError:
        return
    assert result.shape == shape


def test_every_truncation_of_a_stream_is_handled():
    symbols, data = stream()
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match="damaged"):
            rans.decode(data[:length], symbols.shape)


def test_flipped_and_random_bytes_are_handled():
    symbols, data = stream()
    draw = np.random.default_rng(5)
    for _ in range(700):
        broken = bytearray(data)
        for place in draw.integers(0, len(data), draw.integers(1, 4)):
            broken[place] ^= int(draw.integers(1, 256))
        decoded_or_refused(bytes(broken), symbols.shape)
    for _ in range(300):
        head = leb128.write(*draw.choice([0, 1, 2, 4, 8, 12, 16], 4).tolist())
        decoded_or_refused(head + draw.bytes(int(draw.integers(0, 400))), symbols.shape)


def test_a_stream_for_another_shape_is_handled():
    symbols, data = stream()
    for shape in [(), (0,), (360,), (30, 12), (12, 31), (11, 30), (1, 1), (40000, 3)]:
        if math.prod(shape) != symbols.size or shape != symbols.shape:
            decoded_or_refused(data, shape)


@pytest.mark.parametrize("one", [1, 32768, 65535])
def test_a_few_bytes_cannot_ask_for_long_work(one):
    head = leb128.write(1, 0, one, 12, 2, 0, 4096)
    with pytest.raises(ArtifactError, match="damaged"):
        rans.decode(head + bytes(4), (32768, 32768))
    lengths = leb128.write(*(16, 0) * 1024)
    with pytest.raises(ArtifactError, match="a block does not end where it should"):
        rans.decode(head + lengths + (b"\1\0\0\0" * 8) * 1024, (32768, 32768))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((3, 0), "3 classes, allowed"),
        ((1, 65536), "rest is symbol 65536"),
        ((1, 0, 65537), "a probability of 65537"),
        ((0, 13, 1, 8192), "1 symbols of 13 bits"),
        ((0, 12, 65537), "65537 symbols of 12 bits"),
        ((0, 12, 2, 4000, 97), "frequencies add up to 4097"),
        ((0, 12, 0, 0), "18 symbols of an empty alphabet"),
        ((0, 12, 1, 4096, 0), "a block of 0 bytes, expected: 32 or more"),
        ((0, 12, 1, 4096, 5), "0 bytes in its blocks, 10 stated"),
        ((1, 0, 65536, 12, 0, 0, 0), "a block of 0 bytes"),
        ((2, 0, 1, 1, 1, 1), "0 bytes for 9 classes"),
    ],
)
def test_damaged_heads_are_told(numbers, said):
    with pytest.raises(ArtifactError, match=said):
        rans.decode(leb128.write(*numbers), (3, 6))


def test_frequencies_that_add_up_only_in_64_bits_are_refused():
    """2 ** 64 + 2 ** 16: NumPy's repeat would write far beyond what it took."""
    head = leb128.write(0, 16, 32769, *[(1 << 49) - 1] * 32768, 32768 + 65536)
    with pytest.raises(ArtifactError, match="frequencies add up to 18446744073709617152"):
        rans.decode(head + leb128.write(16) + b"\1\0\0\0" * 8, (4,))


def test_symbols_where_there_are_none_are_told():
    with pytest.raises(ArtifactError, match="3 bytes for no symbol"):
        rans.decode(b"abc", (0, 2**40))


def test_decoding_takes_memory_in_proportion_to_the_elements():
    shape = (2000, 3000)
    data = rans.encode(np.eye(*shape, dtype=int))
    tracemalloc.start()
    try:
        rans.decode(data, shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 9 * math.prod(shape)
