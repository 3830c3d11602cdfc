"""Levels of 8 bits such that a layer's outputs change the least on calibration inputs, and those inputs' moments.

The second moments of what a row of weights meets say how its rounding errors add up (`compress.rounding`): a sweep
lets later columns make good for earlier ones, a descent moves each level to where it is best given the others.
Few examples tell little of many columns: of d columns and n inputs the moments between two of them count n / (n + d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from autocompress.compress import rounding
from autocompress.deploy.int8_calibrate import observed
from autocompress.deploy.int8_layers import Layer
from autocompress.deploy.int8_weights import MOST, PAIR, Rounded

Array = NDArray[Any]

PRODUCTS = frozenset(("conv", "gemm", "matmul"))
LARGEST = 2304
"""Columns of a row of weights above which moments would take too much memory."""
_ROWS = 2048
"""Of inputs of a call, about."""
_SHARES = (1.0, 0.92, 0.85, 0.78)
"""Of the step of the least squared error, what steps are tried: a sweep keeps neighbours safe by itself."""
_MANY = 1 << 17
"""Weights of a layer from which the first of these is the only one: a sweep of all takes a second a million weights."""
_DESCENTS = 2


def refined(model: Any, weights: Mapping[Layer, Rounded], calls: Sequence[Mapping[str, Array]]) -> dict[Layer, Rounded]:
    """The weights of products with levels of less output error on these calls of the model; exact ones stay."""
    todo = {layer: weight for layer, weight in weights.items() if not weight.exact and fits(layer)}
    hessians = moments(model, list(todo), calls)
    return {**weights, **{layer: swept(layer, weight, hessians[layer]) for layer, weight in todo.items()}}


def fits(layer: Layer) -> bool:
    """Whether the layer is a product whose moments are small enough."""
    return layer.kind in PRODUCTS and layer.values.size // layer.values.shape[_axis(layer)] <= LARGEST


def moments(model: Any, layers: Sequence[Layer], calls: Sequence[Mapping[str, Array]]) -> dict[Layer, torch.Tensor]:
    """By layer the damped second moments of what rows of its weight meet, (groups, d, d)."""
    keys = {layer: (layer.sources[0], *_geometry(layer)) for layer in layers}
    first = {key: layer for layer, key in keys.items()}
    sums: dict[Any, torch.Tensor] = {}
    counts = dict.fromkeys(first, 0)
    for arrays in observed(model, sorted({layer.sources[0] for layer in layers}), calls):
        for key, layer in first.items():
            rows = met(layer, torch.tensor(arrays[layer.sources[0]]), turn=counts[key])
            sums[key] = sums.get(key, 0) + rows.mT @ rows
            counts[key] += rows.shape[1]
    found = {key: _hessian(sums.pop(key), count) for key, count in counts.items()}
    return {layer: found[key] for layer, key in keys.items()}


def _geometry(layer: Layer) -> tuple[Any, ...]:
    """What tells, beside the source, what rows meet."""
    if layer.kind != "conv":
        return ()
    return layer.values.shape[1:], tuple(sorted((name, str(value)) for name, value in layer.attributes.items()))


def _hessian(sums: torch.Tensor, count: int) -> torch.Tensor:
    mean = sums / count
    diagonal = torch.diag_embed(mean.diagonal(dim1=1, dim2=2))
    share = count / (count + mean.shape[1])
    return rounding.damped(diagonal + share * (mean - diagonal))


def met(layer: Layer, x: torch.Tensor, turn: int = 0) -> torch.Tensor:
    """The inputs that rows of the weight are multiplied with, (groups, n, d), n about `_ROWS` at most.

    Of a convolution those at every so many places along each axis, from another one on each `turn`.
    """
    if layer.kind != "conv":
        rows = x.reshape(1, -1, x.shape[-1])
        return rows[:, :: max(1, rows.shape[1] // _ROWS)]
    given, rank = layer.attributes, layer.values.ndim - 2
    pads = given.get("pads", [0] * 2 * rank)
    x = F.pad(x, [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])])
    steps, gaps = given.get("strides", [1] * rank), given.get("dilations", [1] * rank)
    for axis, taps in enumerate(layer.values.shape[2:]):
        x = x.unfold(2 + axis, (taps - 1) * gaps[axis] + 1, steps[axis])[..., :: gaps[axis]]
    apart = max(1, round((len(x) * np.prod(x.shape[2 : 2 + rank]) / _ROWS) ** (1 / rank)))
    for axis in range(2, 2 + rank):
        places = torch.arange(turn % min(apart, x.shape[axis]), x.shape[axis], apart)
        x = x.index_select(axis, places)
    groups = given.get("group", 1)
    x = x.reshape(len(x), groups, -1, *x.shape[2:])
    x = x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return x.reshape(groups, int(np.prod(x.shape[1 : 2 + rank])), -1)


def swept(layer: Layer, nearest: Rounded, hessian: torch.Tensor) -> Rounded:
    """Of each row the levels and the step of the least output error, `nearest` (safe, of least squared error) or other.

    Sweeps at a few steps are tried, as that many copies of the rows.
    """
    axis = _axis(layer)
    shares = _SHARES[: 1 if layer.values.size >= _MANY else None]
    tried = len(shares)
    values = torch.tensor(np.moveaxis(layer.values, axis, 0))
    groups, _, columns = hessian.shape
    weight = values.reshape(groups, -1, columns)
    start = torch.tensor(np.moveaxis(nearest.levels, axis, 0)).reshape(weight.shape).float()
    scales = torch.tensor(nearest.scales).reshape(groups, 1, -1)
    steps = (scales * torch.tensor(shares)[:, None]).reshape(groups, -1)
    levels = _levels(weight.repeat(1, tried, 1), steps, hessian, _neighbours(values.shape[1:]))

    shape = (groups, 1 + tried, -1)
    levels = torch.cat([start, levels], dim=1).reshape(*shape, columns)
    steps = torch.cat([scales.reshape(groups, -1), steps], dim=1).reshape(shape)
    lost = (weight[:, None] - levels * steps[..., None]).reshape(groups, -1, columns)
    best = ((lost @ hessian) * lost).sum(2).reshape(shape).argmin(dim=1)
    step = steps.gather(1, best[:, None]).reshape(-1)
    whole = levels.gather(1, best[:, None, :, None].expand(-1, -1, -1, columns)).reshape(values.shape)
    made = np.ascontiguousarray(np.moveaxis(whole.to(torch.int8).numpy(), 0, axis))
    return replace(nearest, levels=made, scales=step.numpy())


def _levels(
    weight: torch.Tensor, step: torch.Tensor, hessian: torch.Tensor, around: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Levels of rows (groups, rows, d) with these steps (groups, rows), no two neighbours of which overflow."""
    levels = torch.zeros_like(weight)

    def rounder(wanted: torch.Tensor, column: int) -> torch.Tensor:
        near = levels[:, :, around[column]]
        high = (PAIR - near.amax(2)).clamp(max=MOST) if around[column] else torch.tensor(float(MOST))
        low = (-PAIR - near.amin(2)).clamp(min=-MOST) if around[column] else torch.tensor(-float(MOST))
        levels[:, :, column] = torch.minimum(torch.maximum(torch.round(wanted / step), low), high)
        return levels[:, :, column] * step

    values, _ = rounding.sweep(weight, hessian, rounder)
    for _ in range(_DESCENTS):
        values, _ = rounding.descend(weight, values, hessian, rounder)
    return levels


def _neighbours(shape: Sequence[int]) -> list[list[int]]:
    """For each column of (inputs, places...) those beside it in either of the orders that `int8_weights.safe` names."""
    places = np.arange(int(np.prod(shape))).reshape(shape[0], -1)
    found: list[set[int]] = [set() for _ in range(places.size)]
    for order in (places.reshape(-1).tolist(), places.T.reshape(-1).tolist()):
        for one, other in pairwise(order):
            found[one].add(other)
            found[other].add(one)
    return [sorted(beside) for beside in found]


def _axis(layer: Layer) -> int:
    """Of the outputs."""
    return 0 if layer.kind == "conv" else 1
