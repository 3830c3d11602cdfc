"""The max coder: an inverse over all kinds of matrices, the same in plain Python, shorter where there is structure."""

import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_jit import in_python

from autocompress.codec import mixed_stream, mixing, rans
from autocompress.errors import ArtifactError


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile before Hypothesis looks at the clock."""
    mixing.encode(np.zeros((1, 1), int))


levels_of = st.sampled_from([0, 1, 3, 100, 1 << 16])
shapes = st.tuples(st.integers(0, 9), st.integers(0, 40))


@st.composite
def matrices(draw):
    most = draw(levels_of)
    values = st.one_of(st.just(0), st.integers(-most, most))
    return draw(hnp.arrays(np.int32, draw(shapes), elements=values))


@given(matrices(), st.sampled_from([0, 2, 3, 7, 50]), st.integers(1, 12))
def test_decode_is_the_inverse(matrix, lag, group):
    data = mixing.encode(matrix, lag, group)
    assert np.array_equal(mixing.decode(data, matrix.shape, lag, group), matrix)


@settings(max_examples=15, deadline=None)
@given(matrices().filter(lambda m: m.size), st.sampled_from([0, 2, 5]), st.sampled_from([1, 4]))
def test_the_machine_code_does_what_the_python_says(matrix, lag, group):
    rows, columns = matrix.shape
    prob, weight = mixing._start()
    now = [0, 0xFFFFFFFF, *[0] * 38]
    data = [0] * (matrix.size * 70 + 64)
    row, column = [0] * (3 * rows), [0] * (3 * columns + 4 + columns)
    tables, prior = mixing._tables().tolist(), mixing._prior(np.count_nonzero(matrix), matrix.size)
    plain = in_python(mixing.code_levels)
    draw = np.random.default_rng(matrix.size)
    dead = draw.random(rows) < 0.3, draw.random(columns) < 0.3
    likely = np.concatenate(dead).astype(int).tolist()
    args = (matrix.ravel().tolist(), rows, columns, lag, group, prior, likely, 1)
    end = plain(*args, now, prob.tolist(), weight.tolist(), tables, row, column, data, len(data))
    written = bytes(data[:end]) + mixing._between(now[0], now[1])
    data = mixing.encode(matrix, lag, group, dead=dead)
    assert data == bytes([prior]) + written.rstrip(b"\0")
    assert np.array_equal(mixing.decode(data, matrix.shape, lag, group, dead=dead), matrix)


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_columns_that_read_dead_units_cost_next_to_nothing(density):
    draw = np.random.default_rng(0)
    alive = np.sort(draw.permutation(300)[:100])
    dead = np.ones(300, bool)
    dead[alive] = False
    symbols = np.zeros((100, 300), int)
    symbols[:, alive] = (draw.random((100, 100)) < density) * draw.integers(1, 8, (100, 100))
    told = mixed_stream.encode(symbols, feeder=mixed_stream.Feeder(1, dead))
    assert len(told) < len(mixed_stream.encode(symbols[:, alive])) + 10  # 200 columns
    assert len(told) < len(mixed_stream.encode(symbols)) - 25
    assert mixed_stream.feeder_of(told) == 1
    assert np.array_equal(mixed_stream.decode(told, symbols.shape, dead), symbols)
    wrong = mixed_stream.encode(symbols, feeder=mixed_stream.Feeder(1, ~dead))
    assert len(wrong) <= len(mixed_stream.encode(symbols))  # a hint that misleads is left out


@pytest.mark.parametrize("alphabet", [2, 5, 33, 256])
def test_independent_symbols_cost_their_entropy(alphabet):
    rng = np.random.default_rng(alphabet)
    p = rng.dirichlet(np.full(alphabet, 2.0))
    symbols = rng.choice(alphabet, p=p, size=(200, 500))
    ideal = -float(p @ np.log2(p)) * symbols.size / 8
    assert ideal < len(mixed_stream.encode(symbols)) < 1.02 * ideal + 40 * math.sqrt(alphabet)


def image_layer(rng):
    """A sparse layer on 20 x 20 pixels whose weights lie around the middle, a third of its rows dead."""
    y, x = np.mgrid[:20, :20]
    likely = 0.4 * np.exp(-((x - 10) ** 2 + (y - 10) ** 2) / 30.0).ravel()
    mask = (rng.random((90, 400)) < likely) & (rng.random((90, 1)) < 0.66)
    return (mask * rng.integers(1, 4, mask.shape) * rng.choice([-1, 1], mask.shape) + 3).astype(np.uint16)


def test_structure_is_found_by_itself():
    symbols = image_layer(np.random.default_rng(0))
    counts = np.bincount(symbols.ravel()) / symbols.size
    ideal = -sum(p * math.log2(p) for p in counts if p) * symbols.size / 8
    size = len(mixed_stream.encode(symbols))
    assert size < 0.85 * ideal
    assert size < 0.98 * len(rans.encode(symbols))
    assert np.array_equal(mixed_stream.decode(mixed_stream.encode(symbols), symbols.shape), symbols)


def test_the_lag_of_an_image_is_seen():
    symbols = image_layer(np.random.default_rng(1))
    assert mixed_stream._lags(symbols.astype(np.int32) - 3, symbols.shape, True) == [0, 20]


@given(
    hnp.arrays(
        np.uint16, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6), elements=st.integers(0, 65535)
    )
)
def test_streams_of_any_shape(symbols):
    back = mixed_stream.decode(mixed_stream.encode(symbols), symbols.shape)
    assert back.dtype == np.uint16
    assert np.array_equal(back, symbols)


def test_nothing_but_zeros_costs_nearly_nothing():
    assert len(mixing.encode(np.zeros((1000, 1000), int))) < 40
    assert len(mixing.encode(np.zeros((0, 5), int))) == 1


GOLDEN = (
    [[0, 0, 3, 0, -1, 0], [0, 0, 0, 0, 0, 0], [1, 0, -2, 0, 0, 40000]],
    "389202ec4488eafd0e",
)


def test_the_format_stays_as_it_is():
    matrix, data = GOLDEN
    assert mixing.encode(np.array(matrix), 2, 3).hex() == data
    assert mixing.decode(bytes.fromhex(data), (3, 6), 2, 3).tolist() == matrix


def test_no_table_depends_on_the_last_digit_of_a_logarithm():
    p = (np.arange(4096) + 0.5) / 4096
    stretch = mixing.ONE * np.log(p / (1 - p))
    squash = 65536 / (1 + np.exp(-np.arange(-mixing.TOP, mixing.TOP + 1) / mixing.ONE))
    for exact in (stretch, squash[squash != 32768]):
        assert np.abs(exact % 1 - 0.5).min() > 1e-7, "rounded the same on every machine"
    first = (1 << 21) * 2.0 ** (-np.delete(np.arange(31), slice(0, 31, 3)) / 3)
    assert np.abs(first % 1 - 0.5).min() > 1e-7
    log = 24 * np.log2(np.arange(1, 4096))
    powers = 2 ** np.arange(12)
    rest = np.delete(log, powers - 1)
    assert np.abs(rest - np.rint(rest)).min() > 1e-7
    assert mixing._tables()[mixing.LOG + powers].tolist() == [24 * k for k in range(12)]
    exact = [(x**24).bit_length() - 1 for x in range(1, 4096)]
    assert mixing._tables()[mixing.LOG + 1 : mixing.LEARN].tolist() == exact


@given(st.binary(max_size=200), st.sampled_from([(5, 7), (1, 60), (40, 3, 3, 3), (12,), ()]))
def test_any_bytes_give_symbols_or_a_clear_error(data, shape):
    with suppress(ArtifactError):
        assert mixed_stream.decode(data, shape).shape == shape


def test_values_that_are_not_allowed_are_refused():
    with pytest.raises(ValueError, match="levels are -65537 to 0, allowed: up to 65536 in magnitude"):
        mixing.encode(np.array([[-65537, 0]]))
    for lag, group in ((1, 1), (-1, 1), (0, 0), (1 << 64, 1), (0, 1 << 60)):
        with pytest.raises(ValueError, match=f"lag is {lag} and group {group}"):
            mixing.encode(np.zeros((2, 2), int), lag, group)
    with pytest.raises(ValueError, match="pace is 2, allowed: 0 to 1"):
        mixing.encode(np.zeros((2, 2), int), pace=2)
    with pytest.raises(ArtifactError, match="a transposed matrix of 3 axes"):
        mixed_stream.decode(bytes([0, 1, 0]), (3, 4, 1))
    with pytest.raises(ArtifactError, match="its way is 16"):
        mixed_stream.decode(bytes([0, 16, 0]), (3, 4))
    with pytest.raises(ArtifactError, match="it has a feeder, and none is given"):
        mixed_stream.decode(bytes([0, 8, 1]), (3, 4))
    with pytest.raises(ArtifactError, match="3 units feed 4 columns"):
        mixed_stream.decode(bytes([0, 8, 1]), (3, 4), np.zeros(3, bool))
    with pytest.raises(ArtifactError, match="it feeds itself"):
        mixed_stream.feeder_of(bytes([0, 8, 0]))
    with pytest.raises(ValueError, match="3 rows and columns may be dead, there are 4"):
        mixing.encode(np.zeros((2, 2), int), dead=(np.zeros(1, bool), np.zeros(2, bool)))
