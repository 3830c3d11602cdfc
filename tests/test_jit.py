"""Compiled kernels against the same functions run as ordinary Python."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
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


REFUSED = {
    "a ** 2": "Pow",
    "len('a') + a": "'a'",
    "1 < a < 3": "1 < a < 3",
    "a or 5": "a or 5",
    "max(a, 3, key=abs)": "key=abs",
    "int(a, 16)": "int(a, 16)",
    "min(a)": "min(a)",
    "99999999999999999999": "99999999999999999999",
    "a << 64": "a << 64",
    "x[-1]": "x[-1]",
    "double(x)": "'x'",
    "double(a, a)": "double(a, a)",
    "twice(x, x)": "twice(x, x)",
    "shadowed(a)": "shadowed(a)",
    "a in x": "a in x",
    "a is None": "a is None",
    "[a][0]": "[a][0]",
    "1.5": "1.5",
}


def shadowed(a):
    return a


@kernel
def twice(x: Int64s, y: Int64s):
    return x[0] + y[0]


@kernel
def template(a: Int, x: Int64s):
    return 0


@pytest.mark.parametrize("expression", REFUSED)
def test_an_expression_that_is_not_supported_is_named(expression):
    refuses(f"return {expression}", REFUSED[expression])


@pytest.mark.parametrize(
    "body",
    [
        "for i in range(0, a, 2): pass",
        "for i in min(a, 3): pass",
        "for i in range(a): pass\nelse: a = 3",
        "while a: a -= 1\nelse: a = 3",
        "a, b = 1, 2",
        "x = 3",
        "assert a",
        "b: Int = 3",
        "abs = 3\nreturn abs(a)",
        "def inner(): pass",
        "del a",
    ],
)
def test_a_statement_that_is_not_supported_is_refused(body):
    refuses(body, "")


def refuses(body: str, named: str) -> None:
    entry = Kernel(template.python)
    entry.body = ast.parse(body).body
    with pytest.raises(TypeError, match=f"^template: .*{re.escape(named)}|the array x is assigned to"):
        entry(1, np.zeros(2, np.int64))


def test_parameters_are_plain():
    for bad in (lambda a: 0, test_parameters_are_plain.__class__):
        with pytest.raises((TypeError, ValueError)):
            kernel(bad)

    def default(a: Int = 3):
        return a

    with pytest.raises(TypeError, match="default: parameter a: 'Int' = 3 is not supported"):
        kernel(default)


def test_an_element_is_found_once():
    @kernel
    def bump(calls: Int64s):
        calls[0] += 1
        return calls[0]

    @kernel
    def add(x: Int64s, calls: Int64s):
        x[bump(calls)] += 5
        return calls[0]

    x, calls = np.zeros(4, np.int64), np.zeros(1, np.int64)
    assert add(x, calls) == 1
    assert x.tolist() == [0, 5, 0, 0]


def test_what_is_not_assigned_yet_is_zero():
    @kernel
    def maybe(a: Int):
        if a > 5:
            found = 7
        for i in range(a):
            found += i - i
        return found * 100 + i

    assert [maybe(3), maybe(6), maybe(0)] == [2, 705, 0]


def test_kernels_of_one_name_stay_apart():
    def make(by: int):
        @kernel
        def scale(x: Int):
            return x * by

        return scale

    one, ten = make(1), make(10)

    @kernel
    def both(x: Int):
        return one(x) + ten(x)

    assert both(3) == 33


def test_arrays_that_share_memory_and_numbers_that_do_not_fit_are_refused():
    values = np.zeros(4, np.int64)
    with pytest.raises(TypeError, match="two of its arrays share memory"):
        twice(values[:3], values[1:])
    assert twice(values[:2], values[2:]) == 0
    with pytest.raises(TypeError, match="x is 18446744073709551621, which needs more than 64 bits"):
        double(2**64 + 5)
    with pytest.raises(TypeError):
        double(2.9)
    with pytest.raises(TypeError, match="with one axis"):
        twice(values.reshape(2, 2), values)


def test_a_fork_while_another_thread_compiles_does_not_hang():
    code = (
        "import os, threading, numpy as np\n"
        "from autocompress.codec import mixing\n"
        "threading.Thread(target=mixing.encode, args=(np.ones((3, 3), int),)).start()\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        mixing.encode(np.ones((3, 3), int)); os._exit(0)\n"
        "    children.append(pid)\n"
        "assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
