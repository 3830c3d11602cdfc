"""Compiled kernels against the same functions run as ordinary Python."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.codec.jit import Bytes, Int, Int32s, Int64s, Kernel, kernel

LIMIT = 100


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile before Hypothesis looks at the clock."""
    arithmetic(1, 1, 0)
    conditions(1, 1)
    loops(*(np.zeros(1, kind) if kind else 0 for kind in ("i8", "", "i8", "i4", "u1")))


small = st.integers(-(2**31), 2**31)


def in_python(entry: Kernel) -> Callable[..., Any]:
    """The kernel and all that it calls as plain functions."""
    names = {
        name: value.python if isinstance(value, Kernel) else value for name, value in entry.python.__globals__.items()
    }
    for name, value in names.items():
        if isinstance(value, FunctionType) and isinstance(entry.python.__globals__[name], Kernel):
            names[name] = FunctionType(value.__code__, names, name)
    return FunctionType(entry.python.__code__, names)


@kernel
def arithmetic(a: Int, b: Int, which: Int):
    if which == 0:
        return a + b * 3 - -a
    elif which == 1:
        return a // b
    elif which == 2:
        return a % b
    elif which == 3:
        return (a & b) ^ (a | 5) ^ ~b
    elif which == 4:
        return (a >> (b & 15)) + ((a & 255) << (b & 7))
    elif which == 5:
        return max(a, b, 7) - min(a, b) + abs(a) + int(a)
    return a if a < b and b <= 50 else b


@kernel
def conditions(a: Int, b: Int):
    found = 0
    if a < b and not (a == 3 or b != 4):
        found += 1
    if a <= 0 or b > 10 or a >= 100:
        found += 2
    if not a:
        found += 4
    found += 8 * (a == b)
    found += 16 if a and b else 32
    return found


@kernel
def double(x: Int):
    return 2 * x


@kernel
def fill(at: Int, value: Int, to: Int64s):
    to[at] = value
    return 0


@kernel
def loops(values: Int64s, n: Int, out: Int64s, small: Int32s, raw: Bytes):
    total = 0
    for i in range(n):
        if values[i] == 7:
            break
        if values[i] < 0:
            continue
        for j in range(2, 5):
            total += double(values[i]) + j
        fill(i, total, out)
        small[i] = -i
        raw[i] = total & 255
    left = total
    while True:
        left //= 2
        if left < LIMIT:
            return left + total


@given(st.integers(-1000, 1000), st.integers(-60, 60).filter(bool), st.integers(0, 5))
def test_arithmetic_is_that_of_python(a, b, which):
    assert arithmetic(a, b, which) == in_python(arithmetic)(a, b, which)


@given(small, small.filter(bool), st.integers(0, 5))
def test_large_numbers_too(a, b, which):
    assert arithmetic(a, b, which) == in_python(arithmetic)(a, b, which)


@given(st.integers(-3, 12), st.integers(-3, 12))
def test_conditions_are_those_of_python(a, b):
    assert conditions(a, b) == int(in_python(conditions)(a, b))


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=12))
def test_loops_and_arrays(values):
    n = len(values)
    arrays = [np.zeros(n, kind) for kind in ("i8", "i4", "u1")]
    expected = [[0] * n for _ in range(3)]
    result = loops(np.array(values), n, *arrays)
    assert result == in_python(loops)(values, n, *expected)
    assert [array.tolist() for array in arrays] == expected


@kernel
def signed(narrow: Int32s, raw: Bytes):
    narrow[0] = 1 << 31
    raw[0] = 511
    return narrow[0] + raw[0]


def test_narrow_arrays_wrap_around():
    assert signed(np.zeros(1, np.int32), np.zeros(1, np.uint8)) == -(2**31) + 255


def test_and_or_stop_early():
    @kernel
    def guarded(values: Int64s, at: Int, n: Int):
        return at < n and values[at] == 5

    values = np.array([5, 4])
    assert [guarded(values, at, 2) for at in (0, 1, 1 << 50)] == [1, 0, 0]


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="values must be a contiguous array of int64"):
        loops(np.zeros(3, np.int32), 3, *(np.zeros(3, kind) for kind in ("i8", "i4", "u1")))
    with pytest.raises(TypeError, match="values must be a contiguous array of int64"):
        loops(np.zeros(6, np.int64)[::2], 3, *(np.zeros(3, kind) for kind in ("i8", "i4", "u1")))
    with pytest.raises(TypeError, match="takes 2 arguments, 1 were given"):
        conditions(1)


def test_what_is_not_supported_is_named():
    @kernel
    def power(a: Int):
        return a**2

    @kernel
    def text(a: Int):
        return len("a") + a

    @kernel
    def chain(a: Int):
        return 1 < a < 3

    with pytest.raises(TypeError, match="1 < a < 3' is not supported in a kernel"):
        chain(2)
    with pytest.raises(TypeError, match="Pow is not supported in a kernel"):
        power(2)
    with pytest.raises(TypeError, match="is not supported in a kernel"):
        text(2)
