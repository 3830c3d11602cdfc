"""Weights as whole numbers of 8 bits and a scale for each output.

    w ~ scale * level,   |level| <= 127

Products of uint8 and int8 are added in pairs in 16 bits where a CPU has no VNNI: 255 (a + b) must stay below 2^15,
so neighbours' levels add up to 128 at most. That takes less than the eighth bit: seldom are two neighbours large
and of one sign. A weight that lies on a grid of so few levels already keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from autocompress.deploy.onnx import Form, smallest_form

Array = NDArray[Any]

MOST = 127
"""The highest level."""
PAIR = 128
"""The largest sum of two neighbours: 255 * 128 < 2^15."""
_NARROW = (0.85, 0.92, 1.0)
"""Steps tried, as shares of that of which the largest weight is `MOST`: the first two cut it off."""
_STEPS = (*_NARROW, *(1 + k / 12 for k in range(1, 12)), 2 * MOST / PAIR)
"""Those where neighbours must be safe: of the last one any are."""
_FEW = 84
"""More levels than these take a byte each also as digits of words."""
_MOST_STEPS = 2**30
"""Of a bias in int32: as many are left for the sum of products."""
_TINY = float(np.finfo(np.float32).tiny)
_SAME = 1e-3
"""How far from a whole number of steps, in steps, a weight on a grid may lie."""


@dataclass(frozen=True)
class Rounded:
    """`levels` (int8, the weight's shape), `scales` (float32, one per index of `axis`), whether nothing was lost.

    Of several axes, which are then the first ones, there is a scale per tuple of indices, in their order.
    """

    levels: Array
    scales: Array
    axis: int | tuple[int, ...]
    exact: bool

    def values(self) -> NDArray[np.float32]:
        """What the levels stand for."""
        return (self.levels.astype(np.float32) * self.spread(self.scales)).astype(np.float32)

    def spread(self, numbers: Array) -> Array:
        """Numbers per scale in a shape that meets the levels'."""
        axes = _axes(self.axis)
        return numbers.reshape([size if axis in axes else 1 for axis, size in enumerate(self.levels.shape)])

    def holding(self, bias: Array, step: float) -> Rounded:
        """The weight, itself where it will do, with scales such that int32 holds the bias in steps of `scale * step`.

        A row of smaller weights gets a wider scale, on which most of them are zero: beside the bias they do not count.
        Of a row of zeros the bias alone tells the scale.
        """
        others = tuple(axis for axis in range(self.levels.ndim) if axis not in _axes(self.axis))
        used = np.where(self.levels.any(axis=others), self.scales.astype(np.float64), 0.0)
        least = np.abs(bias.astype(np.float64)) / (_MOST_STEPS * step)
        scales = np.maximum(np.maximum(used, least), _TINY / min(step, 1.0)).astype(np.float32)
        if np.array_equal(scales, self.scales):
            return self
        levels = np.rint(self.levels * self.spread(used / scales)).astype(np.int8)
        return Rounded(levels, scales, self.axis, self.exact)


def _axes(axis: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else axis


def rounded(values: NDArray[np.float32], axis: int | tuple[int, ...], *, alone: bool) -> Rounded:
    """The weight's levels per index of `axis`: those of its own grid where it has one, else of the least squared error.

    The error is the least among steps tried. If not `alone` no two neighbours overflow (`safe`).
    """
    places = range(len(_axes(axis)))
    moved = np.moveaxis(values, _axes(axis), places)
    shape = (-1, *moved.shape[len(places) :])
    rows = moved.reshape(int(np.prod(moved.shape[: len(places)])), -1)
    steps = np.array(list(takewhile(bool, (step_of(row, MOST) for row in rows))))
    exact = len(steps) == len(rows)
    levels = _levels(rows, steps) if exact else np.zeros(0, np.int8)
    if not exact or not (alone or safe(levels.reshape(shape)).all()):
        exact, steps = False, _best_steps(rows, shape, alone)
        levels = _levels(rows, steps)
    whole = np.ascontiguousarray(np.moveaxis(levels.reshape(moved.shape), places, _axes(axis)))
    return Rounded(whole, steps.astype(np.float32), axis, exact)


def _levels(rows: Array, steps: Array) -> NDArray[np.int8]:
    whole = np.rint(rows / steps.astype(np.float32)[:, None])
    return np.clip(whole, -MOST, MOST).astype(np.int8)


def _best_steps(rows: Array, shape: tuple[int, ...], alone: bool) -> Array:
    """Of each row the step of least squared error among those tried that are safe."""
    widest = np.maximum(np.abs(rows).max(axis=1, initial=0) / MOST, _TINY)
    best, least = np.full(len(rows), np.nan), np.full(len(rows), np.inf)
    for factor in _NARROW if alone else _STEPS:
        steps = widest * factor
        levels = _levels(rows, steps)
        error = np.square(levels * steps.astype(np.float32)[:, None] - rows).sum(axis=1)
        better = (error < least) & (True if alone else safe(levels.reshape(shape)))
        best, least = np.where(better, steps, best), np.where(better, error, least)
    return best


def step_of(row: Array, top: int) -> float:
    """The widest step of which all values are whole multiples, at most `top` of them; 0 where there is none.

    1 for zeros alone.
    """
    parts = np.unique(np.abs(row))
    parts = parts[parts > 0]
    if not parts.size:
        return 1.0
    if parts.size > top:
        return 0.0
    counts = np.arange(1, top + 1)[:, None]
    steps = parts / parts[-1] * counts
    fits = (np.abs(steps - np.rint(steps)) <= _SAME).all(axis=1)
    return float(parts[-1] / counts[fits.argmax(), 0]) if fits.any() else 0.0


def safe(levels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """For each row (outputs, inputs, ...) whether 255 (a + b) stays within 16 bits for any two neighbours.

    Kernels go through a convolution's weights with places or with inputs running fastest.
    """
    orders = [levels, np.moveaxis(levels, 1, -1)] if levels.ndim > 2 else [levels]
    good = np.ones(len(levels), np.bool_)
    for order in orders:
        flat = order.reshape(len(levels), -1).astype(np.int16)
        good &= np.abs(flat[:, 1:] + flat[:, :-1]).max(axis=1, initial=0) <= PAIR
    return good


def float_form(name: str, rounded: Rounded, exact: Form) -> Form:
    """The weight as float32 that is folded at load: its levels times their scales, or `exact` if that is no longer."""
    nodes = (
        helper.make_node("Cast", [f"{name}:levels"], [f"{name}:float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}:float", f"{name}:scales"], [name]),
    )
    scales = rounded.spread(rounded.scales)
    constants: Mapping[str, Array] = {f"{name}:levels": rounded.levels, f"{name}:scales": scales}
    form = Form("int8", nodes, constants)
    return exact if exact.size_bytes <= form.size_bytes else form


def level_form(name: str, levels: Array) -> Form | None:
    """A form shorter than INT8 itself that is folded to those levels, cast; None where there is none."""
    if np.unique(levels).size > _FEW and np.count_nonzero(levels) > levels.size / 2:
        return None
    inner = smallest_form(f"{name}:few", levels.astype(np.float32))
    cast = helper.make_node("Cast", [f"{name}:few"], [name], to=onnx.TensorProto.INT8)
    form = Form(f"int8, {inner.kind}", (*inner.nodes, cast), inner.constants)
    return form if form.size_bytes < Form("", (), {name: levels}).size_bytes else None
