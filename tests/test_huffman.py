"""Deep Compression's format: an inverse, the paper's example, the shortest codes, and every kind of damage refused."""

import heapq
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_jit import in_python

from autocompress.codec import huffman, leb128
from autocompress.errors import ArtifactError


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile before Hypothesis looks at the clock."""
    huffman.decode(huffman.encode(np.arange(5)), (5,))


@st.composite
def symbols_of_any_shape(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=8))
    most = draw(st.sampled_from([0, 1, 2, 9, 300, 65535]))
    rest = draw(st.integers(0, most))
    return draw(hnp.arrays(np.uint16, shape, elements=st.one_of(st.just(rest), st.integers(0, most))))


@given(symbols_of_any_shape(), st.sampled_from([None, 0, 1, 2, 5, 8, 16]))
def test_decode_is_the_inverse(symbols, index_bits):
    back = huffman.decode(huffman.encode(symbols, index_bits), symbols.shape)
    assert back.dtype == np.uint16
    assert np.array_equal(back, symbols)


def sparse(density, shape=(100, 300), seed=0, alphabet=32):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(0, alphabet, shape), 7).astype(np.uint16)


@pytest.mark.parametrize("density", [0, 0.001, 0.08, 0.5, 1])
def test_the_width_that_is_chosen_gives_the_fewest_bytes(density):
    symbols = sparse(density)
    every = [len(huffman.encode(symbols, bits)) for bits in range(13)]
    assert len(huffman.encode(symbols)) == min(every)
    assert min(every) < max(every) or density == 0


def test_padding_zeros_stand_where_a_gap_is_too_large():
    """Figure 2 of the paper: 3 bits, distances 1, 3 and 11; the third is 8, a zero put between, and 3."""
    symbols = np.zeros(15, int)
    symbols[[0, 3, 14]] = [2, 1, 3]
    data = huffman.encode(symbols, 3)
    assert data[:3] == leb128.write(0, 3, 4)  # the rest symbol, 3 bits, four entries
    gaps, position = huffman._read_code(data, 3, 8)
    values, position = huffman._read_code(data, position, 1 << 16)
    body = np.frombuffer(data, np.uint8, offset=position)
    told, bit = huffman._read_symbols(gaps, 4, body, 0)
    assert (told + 1).tolist() == [1, 3, 8, 3]
    assert huffman._read_symbols(values, 4, body, bit)[0].tolist() == [2, 1, 0, 3]
    assert huffman.decode(data, (3, 5)).ravel().tolist() == symbols.tolist()


def heap_bits(counts):
    """Bits of a message under Huffman's code: the sum of all joined nodes."""
    heap = [n for n in counts if n]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


@given(st.lists(st.integers(0, 1000), max_size=80))
def test_code_lengths_are_the_shortest(counts):
    counts = np.array(counts, np.int64)
    code = huffman.optimal_code(counts)
    assert code.symbols.tolist() == np.flatnonzero(counts).tolist()
    assert int(counts[code.symbols] @ code.lengths) == heap_bits(counts.tolist())


def test_the_deepest_code_of_a_large_stream_fits():
    fibonacci = [1, 1]
    while sum(fibonacci) < 1 << 31:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    code = huffman.optimal_code(np.array(fibonacci))
    assert 40 < code.lengths.max() <= huffman._LONGEST
    table = huffman._write_code(code)
    back, position = huffman._read_code(table, 0, 1 << 16)
    assert position == len(table)
    assert back.lengths.tolist() == code.lengths.tolist()


def test_codes_are_told_in_the_bits_that_the_code_says():
    symbols = sparse(0.1)
    at = np.flatnonzero(symbols != 7)
    gaps, values = np.diff(at, prepend=-1) - 1, symbols.ravel()[at]
    assert gaps.max() < 256
    bits = heap_bits(np.bincount(gaps).tolist()) + heap_bits(np.bincount(values).tolist())
    tables = sum(len(huffman._write_code(huffman.optimal_code(np.bincount(told)))) for told in (gaps, values))
    assert len(huffman.encode(symbols, 8)) == len(leb128.write(7, 8, at.size)) + tables + -(-bits // 8)


def test_what_costs_nothing_costs_nothing():
    assert len(huffman.encode(np.full((1000, 1000), 3))) < 12
    assert len(huffman.encode(np.zeros((0, 5), int))) < 12
    one_of_many = np.zeros(1000, int)
    one_of_many[500] = 9
    assert len(huffman.encode(one_of_many)) < 16


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=200).filter(lambda s: len(set(s)) > 1))
def test_the_machine_code_does_what_the_python_says(symbols):
    code = huffman.optimal_code(np.bincount(symbols))
    data = np.frombuffer(huffman._write_symbols([(code, np.array(symbols))]), np.uint8)
    order, per_length = huffman._canonical(code)
    args = (per_length.tolist(), code.symbols[order].tolist(), per_length.size - 1, data.tolist(), data.size, 0)
    found = [0] * len(symbols)
    end = in_python(huffman.read_codes)(found, len(symbols), *args)
    assert found == symbols
    assert -(-end // 8) == data.size
    assert huffman._read_symbols(code, len(symbols), data, 0)[1] == end


@pytest.mark.parametrize(("symbols", "bits"), [([-1], None), ([1 << 16], None), ([0, 1], 17), ([0, 1], -1)], ids=str)
def test_what_has_no_stream_is_refused(symbols, bits):
    with pytest.raises(ValueError, match="allowed: 0 to"):
        huffman.encode(np.array(symbols), bits)


def test_every_truncation_is_refused():
    symbols = sparse(0.1, (20, 30))
    data = huffman.encode(symbols)
    for end in range(len(data)):
        with pytest.raises(ArtifactError, match="damaged"):
            huffman.decode(data[:end], symbols.shape)
    with pytest.raises(ArtifactError, match="are used"):
        huffman.decode(data + b"\0", symbols.shape)


@given(st.binary(max_size=60), st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_arbitrary_bytes_decode_or_are_refused(data, shape):
    with suppress(ArtifactError):
        assert huffman.decode(data, shape).shape == shape


@settings(max_examples=200)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_decodes_or_is_refused(at, value):
    symbols = sparse(0.2, (10, 30))
    data = bytearray(huffman.encode(symbols))
    data[at % len(data)] = value
    with suppress(ArtifactError):
        assert huffman.decode(bytes(data), symbols.shape).shape == symbols.shape


def one_symbol(symbol):
    return leb128.write(symbol, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (leb128.write(1 << 16, 5, 0), "rest symbol 65536"),
        (leb128.write(0, 17, 0), "index of 17 bits"),
        (leb128.write(0, 5, 101), "101 entries for 100 symbols"),
        (leb128.write(0, 5, 1 << 40), "entries for 100 symbols"),
        (leb128.write(0, 5, 1) + leb128.write(32, 1), "symbols 32 to 32 of 32"),
        (leb128.write(0, 5, 1) + one_symbol(0) + leb128.write(65535, 2), "65536 of 65536"),
        (leb128.write(0, 5, 1) + one_symbol(0) + leb128.write(0, 1 << 40), "of 65536"),
        (leb128.write(0, 5, 1) + leb128.write(0, 0) + one_symbol(1), "a code of no symbols"),
        (leb128.write(0, 5, 1) + leb128.write(0, 2) + b"\7", "2 lengths of 7 bits"),
        (leb128.write(0, 5, 1) + leb128.write(0, 2) + b"\0", "2 lengths of 0 bits"),
        (leb128.write(0, 5, 1) + leb128.write(0, 3) + b"\1\xe0", "no complete code"),
        (leb128.write(0, 5, 1) + leb128.write(0, 2) + b"\1\x80", "no complete code"),
        (leb128.write(0, 5, 100) + leb128.write(0, 2) + b"\1\xc0" + one_symbol(1), "cannot hold 100 codes"),
        (leb128.write(0, 16, 2) + one_symbol(65535) + one_symbol(1), "an entry at 131071 of 100"),
    ],
)
def test_hostile_lengths_are_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        huffman.decode(data, (10, 10))


def test_little_memory_is_taken_for_what_a_damaged_stream_claims():
    data = leb128.write(0, 5, 1 << 26) + leb128.write(0, 2) + b"\1\xc0" + one_symbol(1)
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        huffman.decode(data, (1 << 13, 1 << 13))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
