"""The order of a model's units in a file: any computes the same, and in a good one neighbours are alike.

The units of a group (`units`), the neurons between two linear layers or the channels of a residual stream, may change
places together in every tensor that has them. The file's coder goes through a weight row by row and predicts by what
it has just seen, so each unit is put after the one that its weights are most like, dense ones first. Of n units an
order is worth log2 n! bits at most to a coder that knows nothing of their likeness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.codec.container import AUTO
from autocompress.codec.header import MAX
from autocompress.codec.tensors import Coded, Raw
from autocompress.compress.artifact import SCALE
from autocompress.compress.units import Group, Place, Wiring

MOST = 1 << 20
"""Elements of a file up to which an order is looked for: in larger ones it is worth less than the search."""
MOST_UNITS = 1 << 12
"""Units of a group up to which an order is looked for: each is compared with every other, in memory at once."""
TOLERANCE = 1e-2
"""The difference of outputs, over their spread, at which an order is none: other orders of addition stay far below."""
Tensors = Mapping[str, Coded | Raw]
Number = TypeVar("Number", bound=np.generic)


def is_tried(tensors: Tensors, effort: str) -> bool:
    """Whether an order is worth trying: with a coder that profits, in a file of coded weights that is not large."""
    coded = any(isinstance(tensor, Coded) and tensor.symbols.ndim > 1 for tensor in tensors.values())
    elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return coded and elements <= MOST and effort in (AUTO, MAX)


def is_near(one: Tensor, other: Tensor) -> bool:
    """Whether outputs are alike but for rounding: their differences, as a share of the spread of the finite ones."""
    finite = one[one.isfinite()]
    apart = torch.where(one == other, 0.0, one - other).norm()
    return float(apart) <= TOLERANCE * float((finite - finite.mean()).norm())


def ordered(tensors: Tensors, wiring: Wiring) -> dict[str, Coded | Raw]:
    """The tensors of a file with the units of each group in an order that takes fewer bytes; keys in the same order.

    Groups of which no weight is coded stay as they are, those of more than `MOST_UNITS`, and those with a weight whose
    scales count along the units.
    """
    found = dict(tensors)
    for group in wiring.groups:
        places = _in_file(group, found) if group.size <= MOST_UNITS else []
        patterns = [
            pattern for place in places if (pattern := _pattern(found[place.key], place, group.size)) is not None
        ]
        if not patterns:
            continue
        order = chained(np.concatenate(patterns, axis=1))
        for place in places:
            found[place.key] = moved(found[place.key], place, order)
    return found


def chained(nonzero: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order (n,) of patterns (n, d): the fullest first, then the one most like the last, by the cosine of the two.

    Where none has anything in common with the last, the fullest that is left.
    """
    vectors = nonzero.astype(np.float32)
    alike, counts = vectors @ vectors.T, vectors.sum(axis=1)
    likeness = (alike + 1e-3) / np.sqrt((counts + 0.1)[:, None] * (counts + 0.1)[None, :])
    order = [int(counts.argmax())]
    left = np.ones(len(vectors), dtype=bool)
    left[order[0]] = False
    while left.any():
        last = order[-1]
        best = likeness[last] if (alike[last] * left).any() else counts
        order.append(int(np.where(left, best, -np.inf).argmax()))
        left[order[-1]] = False
    return np.array(order)


def moved(tensor: Coded | Raw, place: Place, order: NDArray[np.int64]) -> Coded | Raw:
    """The tensor with its units in that order."""
    if isinstance(tensor, Coded):
        return Coded(_moved(tensor.symbols, place, order), tensor.table, tensor.dtype, tensor.grid)
    return Raw(_moved(tensor.array, place, order), tensor.dtype)


def _moved(array: NDArray[Number], place: Place, order: NDArray[np.int64]) -> NDArray[Number]:
    if place.repeat == 1:
        return np.ascontiguousarray(array.take(order, axis=place.axis))
    parted = array.reshape(array.shape[0], len(order), place.repeat, *array.shape[2:])
    return np.ascontiguousarray(parted.take(order, axis=1)).reshape(array.shape)


def _in_file(group: Group, tensors: Tensors) -> list[Place]:
    """The places of a group as the file has them, where a layer may be two factors; none where they cannot be moved."""
    found = []
    for place in sorted(group.places, key=lambda place: (place.axis, place.key)):
        key = _key_in_file(place, tensors)
        scale = tensors.get(f"{key}{SCALE}")
        if scale is not None and place.axis == 1 and len(scale.shape) > 1:
            return []
        if scale is not None and place.axis == 0:
            found.append(Place(f"{key}{SCALE}", 0))
        found.append(Place(key, place.axis, place.repeat))
    return found


def _key_in_file(place: Place, tensors: Tensors) -> str:
    """The key of the tensor that has the units: of factors the last has a layer's outputs, the first its inputs."""
    if place.key in tensors:
        return place.key
    owner, _, name = place.key.rpartition(".")
    parts = sorted(key for key in tensors if key.startswith(f"{owner}.".lstrip(".")) and key.rpartition(".")[2] == name)
    return parts[0] if place.axis else parts[-1]


def _pattern(tensor: Coded | Raw, place: Place, size: int) -> NDArray[np.bool_] | None:
    """Which elements of each unit are not the most frequent one, (size, d); None of what is no coded weight."""
    if not isinstance(tensor, Coded) or tensor.symbols.ndim < 2:
        return None
    rest = int(np.bincount(tensor.symbols.ravel()).argmax())
    other: NDArray[np.bool_] = tensor.symbols != rest
    if place.axis == 0:
        return other.reshape(size, -1)
    parted = other.reshape(other.shape[0], size, place.repeat, *other.shape[2:])
    return np.moveaxis(parted, 1, 0).reshape(size, -1)
