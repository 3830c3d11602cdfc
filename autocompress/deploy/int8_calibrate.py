"""What a layer's tensors hold on calibration examples, and the range of each that harms the layers after it least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

CLIPPINGS: tuple[tuple[str, float], ...] = (("minmax", 0), ("percentile", 0), ("fitted", 2.0), ("fitted", 1.5))
"""The ranges tried: how they are clipped, and the power of the error that "fitted" has least."""
_EXAMPLES = 16
"""Of the first batch, on which layers' output errors are measured."""
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
    inputs = {value.name for value in model.graph.input}
    watched = type(model).FromString(model.SerializeToString())
    present = {value.name for value in watched.graph.output}
    names = [name for name in tensors if name not in inputs]
    for name in names:
        if name not in present:
            watched.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = session_of(watched)
    found: dict[str, Seen] = {}
    for feed in calls:
        arrays = dict(zip(names, session.run(names, session.feed(feed)), strict=True)) if names else {}
        for name, axes in tensors.items():
            array = arrays.get(name, feed.get(name))
            if array is not None and array.dtype == np.float32:
                _note(found, name, array, axes, len(calls))
    return found


def _note(found: dict[str, Seen], name: str, array: Array, axes: Iterable[int], calls: int) -> None:
    flat = array.reshape(-1)
    step = max(1, flat.size * calls // SAMPLED) | 1  # odd, or a column of a matrix would be missed
    some = np.concatenate([flat[::step], [flat.min(), flat.max()]])
    old = found.setdefault(name, Seen([], array[:_EXAMPLES], {}, {}))
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
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.kind in ("conv", "gemm", "matmul"):
            readers.setdefault(layer.sources[0], []).append(layer)
    return {
        name: _unsigned(fixed[name]) if name in fixed else chosen_range(tensor, readers.get(name, []))
        for name, tensor in found.items()
    }


def _unsigned(grid: Grid) -> Grid:
    """The range with all the levels of uint8, which hold its own."""
    return Grid(8, grid.scale, grid.zero_point)


def chosen_range(tensor: Seen, readers: Sequence[Layer]) -> Grid:
    """The range of the least error, see `ranges_of`."""
    sample = tensor.sample()
    tried = dict.fromkeys(fitted(sample, 8, kind, power or 1.5) for kind, power in CLIPPINGS)
    if len(tried) == 1:
        return next(iter(tried))
    values = torch.from_numpy(tensor.first)
    maps = [(layer, outputs_of(layer, values)) for layer in readers]

    def error(grid: Grid) -> float:
        if not maps:
            return float((grid(sample) - sample).square().mean())
        moved = grid(values)
        return sum(
            float((outputs_of(layer, moved) - y).square().mean() / (y.square().mean() + 1e-30)) for layer, y in maps
        )

    return min(tried, key=error)


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
