"""What a layer's tensors hold on calibration examples, and the range of each that harms the layers after it least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper

from autocompress.compress.ranges import SAMPLED, Grid, fitted
from autocompress.deploy.int8_layers import Layer
from autocompress.deploy.int8_weights import Rounded
from autocompress.deploy.sessions import session_of

Array = NDArray[Any]
Named = dict[str, Array]
Reader = Callable[[torch.Tensor], torch.Tensor]
"""What a layer gives for a tensor."""

CLIPPINGS: tuple[tuple[str, float], ...] = (("minmax", 0), ("percentile", 0), ("fitted", 2.0), ("fitted", 1.5))
"""The ranges tried: how they are clipped, and the power of the error that "fitted" has least."""
_NEGATIVE = (0.75, 0.5, 0.25, 0.0)
"""Of the lowest value, where a sum that ReLU clips may be cut below."""
_EXAMPLES, _CELLS = 16, 1 << 18
"""On which layers' output errors are measured: examples of the first batch, more until there are so many values."""
_ROWS = 1024
"""Of a product's inputs, at most."""


@dataclass
class Seen:
    """A tensor on the calibration examples: some values (n,), its extremes among them, and the first examples whole."""

    values: list[Array]
    first: Array
    sums: dict[int, Array]
    counts: dict[int, int]

    def mean(self, axis: int) -> Array:
        """Of each channel, over examples and places."""
        return np.asarray(self.sums[axis] / self.counts[axis])

    def sample(self) -> torch.Tensor:
        """The values (n,), float64."""
        return torch.from_numpy(np.concatenate(self.values)).double()


def seen(model: Any, tensors: Mapping[str, set[int]], calls: Sequence[Named]) -> dict[str, Seen]:
    """By name what the float32 model's tensors hold; `tensors` names the axes of which means are wanted."""
    found: dict[str, Seen] = {}
    for arrays in observed(model, list(tensors), calls):
        for name, array in arrays.items():
            if array.dtype == np.float32:
                _note(found, name, array, tensors[name], len(calls))
    return found


def observed(model: Any, names: Sequence[str], calls: Sequence[Mapping[str, Array]]) -> Iterator[Named]:
    """By name the model's tensors on one call after the other."""
    inputs = {value.name for value in model.graph.input}
    watched = type(model).FromString(model.SerializeToString())
    present = {value.name for value in watched.graph.output}
    made = [name for name in names if name not in inputs]
    for name in made:
        if name not in present:
            watched.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = session_of(watched)
    for feed in calls:
        arrays = dict(zip(made, session.run(made, session.feed(feed)), strict=True)) if made else {}
        yield {**{name: feed[name] for name in names if name in feed}, **arrays}


def _note(found: dict[str, Seen], name: str, array: Array, axes: Iterable[int], calls: int) -> None:
    flat = array.reshape(-1)
    step = max(1, flat.size * calls // SAMPLED) | 1  # odd, or a column of a matrix would be missed
    some = np.concatenate([flat[::step], [flat.min(), flat.max()]])
    old = found.setdefault(name, Seen([], array[:0], {}, {}))
    if old.first.size < _CELLS and old.first.shape[1:] == array.shape[1:]:
        more = max(_CELLS // max(1, array[:1].size), 0 if len(old.first) else _EXAMPLES) - len(old.first)
        old.first = np.concatenate([old.first, array[: max(0, more)]])
    old.values.append(some)
    for axis in axes:
        if array.ndim < 2:
            continue
        moved = np.moveaxis(array, axis, -1)
        moved = moved.reshape(-1, moved.shape[-1])
        old.sums[axis] = old.sums.get(axis, 0) + moved.sum(axis=0, dtype=np.float64)
        old.counts[axis] = old.counts.get(axis, 0) + len(moved)


def ranges_of(found: Mapping[str, Seen], layers: Sequence[Layer], fixed: Mapping[str, Grid]) -> dict[str, Grid]:
    """By tensor its range of 8 bits: the artifact's own where it has one, else of `CLIPPINGS` that of the least error.

    The error is that of the outputs of the layers that read the tensor, relative to their mean square; its own
    where none does.
    """
    readers: dict[str, list[Reader]] = {}
    clipped: set[str] = set()
    for layer in layers:
        if layer.kind in ("conv", "gemm", "matmul"):
            readers.setdefault(layer.sources[0], []).append(partial(outputs_of, layer))
        elif layer.kind == "add" and layer.activation is not None:
            for name, other in (layer.sources, layer.sources[::-1]):
                readers.setdefault(name, []).append(partial(_sum, torch.tensor(found[other].first)))
                clipped.add(name)
    return {
        name: _unsigned(fixed[name])
        if name in fixed
        else chosen_range(tensor, readers.get(name, []), clipped=name in clipped)
        for name, tensor in found.items()
    }


def _sum(other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x + other)


def _unsigned(grid: Grid) -> Grid:
    """The range with all the levels of uint8, which hold its own."""
    return Grid(8, grid.scale, grid.zero_point)


def chosen_range(tensor: Seen, readers: Sequence[Reader], *, clipped: bool = False) -> Grid:
    """The range of the least error, see `ranges_of`; if `clipped`, also of some that end closer below zero."""
    sample = tensor.sample()
    values = torch.tensor(tensor.first)
    maps = [(reader, reader(values)) for reader in readers]

    def error(grid: Grid) -> float:
        if not maps:
            return float((grid(sample) - sample).square().mean())
        moved = grid(values)
        return sum(float((reader(moved) - y).square().mean() / (y.square().mean() + 1e-30)) for reader, y in maps)

    best = _least([fitted(sample, 8, kind, power or 1.5) for kind, power in CLIPPINGS], error)
    low, high = -best.zero_point * best.scale, (best.top - best.zero_point) * best.scale
    cuts = [sample.clamp(low * share, high) for share in _NEGATIVE] if clipped and low < 0 < high else []
    return _least([best, *(fitted(part, 8, "minmax") for part in cuts)], error)


def _least(grids: Sequence[Grid], error: Callable[[Grid], float]) -> Grid:
    """The one of the least error."""
    tried = list(dict.fromkeys(grids))
    return tried[0] if len(tried) == 1 else min(tried, key=error)


def outputs_of(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """What a layer without its bias and ReLU gives for the input; of a product some rows."""
    values = torch.tensor(layer.values)
    if layer.kind != "conv":
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: max(1, len(rows) // _ROWS)] @ values
    given = layer.attributes
    rank = values.dim() - 2
    pads = given.get("pads", [0] * 2 * rank)
    padded = F.pad(x, [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])])
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    ones = [1] * rank
    return convolve(
        padded,
        values,
        stride=tuple(given.get("strides", ones)),
        dilation=tuple(given.get("dilations", ones)),
        groups=given.get("group", 1),
    )


def corrected_bias(layer: Layer, weight: Rounded, tensor: Seen) -> Array | None:
    """The bias that keeps the mean outputs in spite of the rounded weight, (outputs,); None where all is zero.

    Exact for mean inputs at every place; padding is taken as if it were them.
    """
    if weight.exact:
        return layer.bias
    lost = layer.values.astype(np.float64) - weight.values()
    mean = tensor.mean(layer.channels)
    if layer.kind == "conv":
        groups = layer.attributes.get("group", 1)
        taps = lost.reshape(*lost.shape[:2], -1).sum(axis=2).reshape(groups, -1, lost.shape[1])
        shift = np.einsum("goi,gi->go", taps, mean.reshape(groups, -1)).reshape(-1)
    else:
        shift = mean @ lost
    bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    return np.asarray(bias + shift, np.float32)
