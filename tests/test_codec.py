"""The entropy coder: inverse over all kinds of arrays, size against the entropy, damage always told."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.codec import entropy
from autocompress.errors import ArtifactError


def roundtrip(symbols, alphabet):
    data = entropy.encode(symbols, alphabet)
    back = entropy.decode(data, symbols.shape)
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
    roundtrip(symbols, alphabet)


@pytest.mark.parametrize("alphabet", [2, 3, 16, 33])
@pytest.mark.parametrize("skew", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(300, 784), (50, 20, 5, 5), (1, 20000)])
def test_size_of_independent_symbols_is_that_of_the_entropy(alphabet, skew, shape):
    draw = np.random.default_rng(0)
    weights = np.exp(-skew * draw.permutation(alphabet))
    symbols = draw.choice(alphabet, shape, p=weights / weights.sum())
    assert roundtrip(symbols, alphabet) <= 1.02 * entropy_bytes(symbols) + 64


def test_size_of_a_large_alphabet_adds_a_byte_a_symbol():
    draw = np.random.default_rng(1)
    symbols = np.clip(np.rint(draw.normal(128, 30, (300, 400))), 0, 256).astype(int)
    assert roundtrip(symbols, 257) <= 1.02 * entropy_bytes(symbols) + 64 + 257


@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_structure_of_rows_and_columns_is_used(axis):
    draw = np.random.default_rng(2)
    rows, columns = (draw.beta(0.3, 1.5, n) if axis in (name, "both") else np.full(n, 0.5) for name, n in
                     (("rows", 300), ("columns", 784)))  # fmt: skip
    mask = draw.random((300, 784)) < rows[:, None] * columns
    p = np.clip(rows[:, None] * columns, 1e-12, 1 - 1e-12)
    ideal = float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum() / 8)  # a coder that knows every probability
    size = roundtrip(mask.astype(int), 2)
    assert size < 0.93 * entropy_bytes(mask)
    assert size > ideal


def test_dead_rows_and_columns_cost_next_to_nothing():
    draw = np.random.default_rng(3)
    symbols = draw.integers(1, 16, (300, 784))
    symbols[draw.random(300) < 0.7] = 0
    symbols[:, draw.random(784) < 0.7] = 0
    alive = symbols[symbols.any(axis=1)][:, symbols.any(axis=0)]
    side = 2 * (300 + 784) / 8  # at most two bits a row and column
    assert roundtrip(symbols, 16) <= 1.02 * entropy_bytes(alive) + side + 64
    assert roundtrip(np.zeros((4096, 4096), int), 16) < 64


def test_symbols_outside_the_alphabet_are_refused():
    with pytest.raises(ValueError, match="symbols are 0 to 4, allowed: 0 to 3"):
        entropy.encode(np.arange(5), 4)
    with pytest.raises(ValueError, match="symbols are -1 to 0"):
        entropy.encode(np.array([-1, 0]), 4)
    for alphabet in (0, 65537):
        with pytest.raises(ValueError, match=f"alphabet is {alphabet}, allowed: 1 to 65536"):
            entropy.encode(np.zeros(3, int), alphabet)


def stream():
    draw = np.random.default_rng(4)
    symbols = draw.integers(0, 9, (12, 30)) * (draw.random((12, 30)) < 0.4)
    symbols[draw.random(12) < 0.3] = 0
    return symbols, entropy.encode(symbols, 9)


def decoded_or_refused(data, shape):
    """Whatever the bytes are: symbols of that shape, or an ArtifactError."""
    try:
        result = entropy.decode(data, shape)
    except ArtifactError:
        return
    assert result.shape == shape


def test_every_truncation_of_a_stream_is_handled():
    symbols, data = stream()
    for length in range(len(data)):
        decoded_or_refused(data[:length], symbols.shape)
    for length in range(8):
        with pytest.raises(ArtifactError, match="damaged"):
            entropy.decode(data[:length], symbols.shape)


def test_flipped_and_random_bytes_are_handled():
    symbols, data = stream()
    draw = np.random.default_rng(5)
    for _ in range(700):
        broken = bytearray(data)
        for place in draw.integers(0, len(data), draw.integers(1, 4)):
            broken[place] ^= int(draw.integers(1, 256))
        decoded_or_refused(bytes(broken), symbols.shape)
    for _ in range(300):
        head = struct.pack("<HHB", *draw.integers(0, 9, 2), draw.choice([1, 2, 4, 8, 16]))
        decoded_or_refused(head + draw.bytes(int(draw.integers(0, 400))), symbols.shape)


def test_a_stream_for_another_shape_is_handled():
    symbols, data = stream()
    for shape in [(), (0,), (360,), (30, 12), (12, 31), (11, 30), (1, 1), (40000, 3)]:
        if math.prod(shape) != symbols.size or shape != symbols.shape:
            decoded_or_refused(data, shape)


def test_a_few_bytes_cannot_ask_for_long_work():
    for classes, probabilities in ((1, bytes([128])), (1, bytes([254])), (1, bytes([16]))):
        head = struct.pack("<HHB", 0, 1, classes) + probabilities + bytes([0, 255])
        with pytest.raises(ArtifactError, match="4 bytes cannot hold 1073741824 symbols"):
            entropy.decode(head + bytes(4), (32768, 32768))


def test_decoding_takes_memory_in_proportion_to_the_elements():
    shape = (2000, 3000)
    data = entropy.encode(np.eye(*shape, dtype=int), 2)
    tracemalloc.start()
    try:
        entropy.decode(data, shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 9 * math.prod(shape)
