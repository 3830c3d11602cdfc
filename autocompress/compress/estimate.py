"""The bytes of a plan's file before any training, without coding it once a few knots are known: for ranking many plans.

A tensor's stream is estimated as the order-0 entropy of its symbols times a ratio. The histogram is exact: the
weights of a layer are sorted once, and pruning, k-means and grids need only prefix sums over them. The ratio
depends on layer, threshold, bits and rank and changes slowly with them: it is measured with the real coders at a
few *knots*, when a plan first comes between them, and interpolated. The head of the file is built for real.
"""

# ruff: noqa: PLR0917  (kernels take plain numbers and arrays)
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.codec import container, header, leb128, mixed_stream, rans, tables
from autocompress.codec.jit import Int, Int64s, Words, kernel
from autocompress.codec.tensors import Coded
from autocompress.compress import apply, artifact, clustering, lowrank, quantize, ranges
from autocompress.compress.clustering import scaled
from autocompress.compress.codes import Code
from autocompress.compress.factors import Factoriser
from autocompress.compress.scales import count_groups
from autocompress.errors import TrialFailed
from autocompress.plan import FLOAT_BITS, LayerPlan, LayerSpec, Plan, bias_beside, check

_SCALE = 0.0123456
"""Stands for the scale of a layer's inputs, which is not known yet."""
_OVERHEAD = 6.0
"""Bytes of nearly any stream beside its entropy; ratios are of both together, so that they are tame near nothing."""
_BITS = (1, 2, 4, 8)
"""Bit-widths of knots."""
_MORE_BITS = (1, 2, 3, 4, 8)
"""Of a grid that is not symmetric, whose bytes are set beside those of one that is: half a level apart at 2 bits."""
_MOST_PRUNED = 0.998
"""The share of weights that the highest threshold of a knot prunes."""
_MIDDLE = 4
"""The bit-width whose ratio is measured at all thresholds and ranks."""
_APART = (0.1, 0.5, 1.0, 2.0)
"""Thresholds at which the ratios of other bit-widths are set beside that of `_MIDDLE`."""
_LEAST = 0.1
"""The lowest threshold of a knot but 0, at which there is no zero to spare."""
_MOST = 1 << 20
"""Weights of a tensor that are kept in order, and are coded at knots; of more, a sample and some rows."""
_SMALL = 4096
"""Weights of a tensor up to which distinct values are looked for."""


class Estimator:
    """Estimates the bytes of a model's compressed files at rung 0, that is, before finetuning.

    `svds(spec, scheme)` gives the SVD of a layer's original weight. Layers are sorted, and coded at knots,
    when a plan first needs it; later plans find all of it done.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[LayerSpec],
        svds: apply.SvdSource,
        version: str,
        effort: str = container.AUTO,
        *,
        factoriser: Factoriser | None = None,
    ) -> None:
        if effort == header.HUFFMAN:
            raise ValueError(f"effort is {effort!r}, allowed: what has been measured, auto, fast or max")
        self._model, self._specs, self._version, self._effort = model, tuple(specs), version, effort
        self._factoriser = Factoriser(model, svds) if factoriser is None else factoriser
        self._head = artifact.described_model(model)
        self._state = artifact.unique_state(model)
        first = {id(tensor): key for key, tensor in self._state.items()}
        self._layer_of = {first[id(model.get_parameter(spec.key))]: spec for spec in specs}
        self._bias_of = {key: spec for spec in specs if (key := bias_beside(spec.key)) is not None}
        self._pieces: dict[tuple[Any, ...], _Whole | _Factor] = {}
        self._plain: dict[tuple[str, bool, str], int] = {}
        self._logs: dict[tuple[Any, ...], float] = {}

    def size_bytes(self, plan: Plan) -> int:
        """About the bytes of the file that a trial of the plan writes before finetuning.

        Under a rate somewhat more than these: biases are counted as bfloat16, not as codes.
        Raises PlanError for a plan that the layers cannot carry out, and TrialFailed for weights that are not finite.
        """
        check(plan, self._specs)
        settled = {spec.name: self._factoriser.settled(spec, plan.layers[spec.name]) for spec in self._specs}
        plan = replace(plan, layers=settled)
        effort = container.settled(self._effort, sum(self._elements(plan)))
        rows, lengths = [], []
        for row, length in self._tensors(_as_coded(plan), effort):
            rows.append(row)
            lengths.append(length)
        few = {name: layer.activation_bits for name, layer in plan.layers.items() if layer.activation_bits < FLOAT_BITS}
        grids = {name: ranges.Grid(bits, _SCALE, 0) for name, bits in few.items()}
        told = artifact.described_plan(plan, self._version) | self._head | artifact.described_grids(grids)
        return len(header.write(told, rows, list(map(bytes, lengths)))) + sum(lengths)

    def _elements(self, plan: Plan) -> Iterator[int]:
        for key, tensor in self._state.items():
            spec = self._layer_of.get(key)
            layer = LayerPlan() if spec is None else plan.layers[spec.name]
            yield tensor.numel() if spec is None else spec.weights(layer)

    def _tensors(self, plan: Plan, effort: str) -> Iterator[tuple[header.Row, int]]:
        """Row and bytes of each tensor, in file order."""
        whole = Plan({name: replace(layer, rank=None) for name, layer in plan.layers.items()}, plan.recipe)
        short = apply.shortened(self._model, whole)
        for key, tensor in self._state.items():
            spec = self._layer_of.get(key)
            if spec is None:
                owner = self._bias_of.get(key)
                factorised = owner is not None and plan.layers[owner.name].rank is not None
                last = lowrank.parts_of(plan.layers[owner.name].scheme) - 1 if owner is not None else 0
                name = f"{key.removesuffix('bias')}{last}.bias" if factorised else key
                kind, dtype = "raw", "bfloat16" if key in short else _name(tensor)
                yield (name, kind, dtype, tuple(tensor.shape)), self._plain_bytes(key, key in short, effort)
                continue
            layer = plan.layers[spec.name]
            indices = (-1,) if layer.rank is None else range(lowrank.parts_of(layer.scheme))
            for index in indices:
                piece = self._piece(spec, layer, index)
                name = key if index < 0 else f"{key.removesuffix('weight')}{index}.weight"
                shape = piece.shape(layer.rank)
                share = spec.units(layer) / spec.shape[0] if index == indices[-1] else 1.0
                yield (name, *_told(layer, tensor), shape), self._coded_bytes(piece, layer, effort, share)
                if scales := _scales(layer, shape):
                    yield (
                        (f"{name}{artifact.SCALE}", "raw/max", "bfloat16", scales),
                        self._scale_bytes(piece, layer, math.prod(scales), effort),
                    )

    def _plain_bytes(self, key: str, short: bool, effort: str) -> int:
        """The stream of a tensor that is no layer's weight, coded once."""
        at = key, short, effort
        if at not in self._plain:
            tensor = self._state[key]
            raw = artifact.raw_tensor(tensor.bfloat16() if short else tensor)
            self._plain[at] = container.stream_bytes(raw, effort)
        return self._plain[at]

    def _scale_bytes(self, piece: _Whole | _Factor, layer: LayerPlan, count: int, effort: str) -> int:
        """The stream of so many scales, from those that were fitted once, at another rank and bit-width maybe."""
        at = f"{piece.at}{layer.quantizer}{layer.granularity}", False, effort
        if at not in self._plain:
            here = replace(layer, bits=_MIDDLE, threshold=0.0, rank=piece.reference)
            scale = Code(piece.weight(here.rank), here, {}, "").scale()
            self._plain[at] = 0 if scale is None else container.stream_bytes(scale, effort) * 1000 // scale.array.size
        return self._plain[at] * count // 1000

    def _piece(self, spec: LayerSpec, layer: LayerPlan, index: int) -> _Whole | _Factor:
        """The whole weight for the index -1, else a factor: one of Tucker-2 as it is, since its ranks are not nested.

        Factors fitted to what comes after the activation are taken to cost what those fitted to the outputs do.
        """
        svd = "activation" if layer.svd == "relu" else layer.svd
        if index < 0:
            at: tuple[Any, ...] = (spec.name, "", index)
        elif layer.scheme == "tucker":
            at = (spec.name, layer.scheme, index, svd, layer.core)
        else:
            at = (spec.name, layer.scheme, index, svd)
        if at not in self._pieces:
            weight = self._model.get_parameter(spec.key).detach()
            if not torch.isfinite(weight).all():
                raise TrialFailed(f"layer {spec.label!r} holds weights that are not finite")
            if index < 0:
                self._pieces[at] = _Whole(at, weight)
            elif layer.scheme == "tucker":
                factors = self._factoriser.factors(spec, replace(layer, svd=svd)).weights
                self._pieces[at] = _Whole(at, factors[index].to(weight.dtype))
            else:
                self._pieces[at] = _Factor(at, spec, self._factoriser.nested(spec, layer.scheme, svd), weight.dtype)
        return self._pieces[at]

    def _coded_bytes(self, piece: _Whole | _Factor, layer: LayerPlan, effort: str, share: float) -> int:
        """A stream's bytes, where that share of the rows is kept: rows of zeros cost next to nothing."""
        weights = piece.ordered(layer.rank)
        base, table, most = _base(weights, layer)
        shape = piece.shape(layer.rank)
        size = math.prod(shape)
        searched = len(shape) == 2 and mixed_stream.is_searched(size, size - round(most * size))
        first, last = weights.kept(layer.threshold)
        masked = last - first >= (1 - container.SPARSE) * weights.count
        log = self._log_ratio(piece, layer, searched if layer.bits <= _BITS[-1] else masked, effort)
        return round(base * math.exp(log) * share) + _table_bytes(table, layer, effort)

    def _log_ratio(self, piece: _Whole | _Factor, layer: LayerPlan, way: bool, effort: str) -> float:
        """The logarithm of what coders take over `_base`, interpolated.

        `way`: whether codes are tried in several ways, or floats get a mask of their own; ratios would jump there.
        """
        threshold, floor, log = layer.threshold, math.floor(2 * layer.threshold) / 2, 0.0
        if layer.bits > _BITS[-1]:
            for rank, share in piece.knots(layer.rank):
                below, above, last = piece.sides(rank)
                low, high = (above, max(above, last)) if way else (0.0, below)
                for at, part in _thresholds(threshold, (floor, floor + 0.5), low, high):
                    log += share * part * self._log_at(piece, replace(layer, threshold=at, rank=rank), way, effort)
            return log
        for rank, share in piece.knots(layer.rank):
            for at, part in _thresholds(threshold, (floor, floor + 0.5), _LEAST, piece.sides(rank)[2]):
                here = replace(layer, bits=_MIDDLE, threshold=at, rank=rank)
                log += share * part * self._log_at(piece, here, way, effort)
        if layer.bits == _MIDDLE:
            return log
        for at, part in _thresholds(threshold, _APART, _LEAST, piece.sides(piece.reference)[2]):
            here = replace(layer, bits=_MIDDLE, threshold=at, rank=piece.reference)
            log -= part * self._log_at(piece, here, way, effort)
            for bits, share in _between(layer.bits, _BITS if layer.quantizer != "asymmetric" else _MORE_BITS):
                log += part * share * self._log_at(piece, replace(here, bits=bits), way, effort)
        return log

    def _log_at(self, piece: _Whole | _Factor, layer: LayerPlan, way: bool, effort: str) -> float:
        """The logarithm at a knot: from a tensor that is really coded, once; of a large one some rows are.

        Where both coders are tried the max coder alone is run, whose stream is nearly always the shorter one.
        """
        way = way and layer.bits <= _BITS[-1] and effort != header.FAST
        key = (*piece.at, layer.bits, layer.threshold, layer.rank, layer.quantizer, layer.granularity, way, effort)
        if key not in self._logs:
            weight = piece.weight(layer.rank)
            part = weight[:: max(1, -(-weight.numel() // _MOST))]
            ordered = piece.ordered(layer.rank) if len(part) == len(weight) else _Whole(piece.at, part).ordered(None)
            coded, (base, *_) = Code(part, layer, {}, "").encode(), _base(ordered, layer)
            if isinstance(coded, Coded):
                fast = effort == header.FAST
                real = len(rans.encode(coded.symbols) if fast else mixed_stream.encode(coded.symbols, way))
            else:
                real = container.stream_bytes(coded, header.MAX if effort == container.AUTO else effort)
            self._logs[key] = math.log(max(1, real) / base)
        return self._logs[key]


def _as_coded(plan: Plan) -> Plan:
    """The plan with the quantizer that its layers get: under a rate, all that have levels lie on a grid."""
    layers = {k: replace(la, quantizer="uniform") if apply.is_rated(plan, la) else la for k, la in plan.layers.items()}
    return replace(plan, layers=layers)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _told(layer: LayerPlan, tensor: Tensor) -> tuple[str, str]:
    """The kind and the dtype that a layer's weight most likely has in a file; each takes a byte in any case."""
    if layer.bits <= _BITS[-1]:
        return ("coded/max" if layer.quantizer == "codebook" else "grid/max"), _name(tensor)
    return "sparse/max" if layer.threshold > 0 else "raw", "float16" if layer.bits == 16 else _name(tensor)


def _scales(layer: LayerPlan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight's scales, () where it has none of its own."""
    if layer.bits > _BITS[-1] or layer.granularity == "tensor":
        return ()
    groups = count_groups(math.prod(shape[1:]), layer.granularity)
    if groups > 1:
        return shape[0], groups
    return shape[:1] if shape[0] > 1 else ()


# Weights in order


@dataclass(frozen=True)
class _Ordered:
    """A tensor's weights, rising, as whole numbers: multiplied by `scale`. `sums[i]` is that of the first i.

    `unit` is the standard deviation of all the tensor's weights, in the same numbers; each value here stands
    for `each` of them.
    """

    values: NDArray[np.int64]
    sums: NDArray[np.int64]
    count: int
    scale: float
    unit: float
    each: float

    def sides(self) -> tuple[float, float, float]:
        """Thresholds just below and above that from which on floats get a mask; that which leaves next to nothing.

        No knot is beyond the last: the ratio of nearly nothing says nothing of the rest.
        """
        if not self.count or not self.unit:
            return 0.0, 0.0, math.inf
        pruned = 1 - container.SPARSE
        shares = (pruned - 0.01, pruned + 0.01, _MOST_PRUNED)
        low, high, last = np.quantile(np.abs(self.values[: self.count]), shares) / self.unit
        return float(low), float(high), float(last)

    def kept(self, threshold: float) -> tuple[int, int]:
        """The places, from and to, of those that the threshold prunes."""
        values = self.values[: self.count]
        if threshold <= 0 or not self.count:
            return 0, 0
        limit = round(min(threshold * self.unit, max(-int(values[0]), int(values[-1]))))
        first = int(np.searchsorted(values, -limit, side="right"))
        return first, max(first, int(np.searchsorted(values, limit, side="left")))


def _sample(count: int) -> NDArray[np.int64]:
    """Places of at most `_MOST` of so many weights in order, the first and the last among them."""
    return np.arange(count) if count <= _MOST else np.linspace(0, count - 1, _MOST).astype(np.int64)


class _Whole:
    """A layer's weight as it is."""

    reference: int | None = None

    def __init__(self, at: tuple[Any, ...], weight: Tensor) -> None:
        self.at, self._weight = at, weight

    def shape(self, rank: int | None) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._weight.shape)

    def weight(self, rank: int | None) -> Tensor:
        """The tensor itself."""
        return self._weight

    def knots(self, rank: int | None) -> list[tuple[int | None, float]]:
        """Ranks at which a ratio is measured and their shares in that of the rank given."""
        return [(None, 1.0)]

    def ordered(self, rank: int | None) -> _Ordered:
        """The tensor's weights in order."""
        return self._ordered

    def sides(self, rank: int | None) -> tuple[float, float, float]:
        """`_Ordered.sides` at a knot, kept."""
        return self._sides

    @cached_property
    def _sides(self) -> tuple[float, float, float]:
        return self._ordered.sides()

    @cached_property
    def _ordered(self) -> _Ordered:
        every, scale = scaled(self._weight.double().cpu().numpy().ravel())
        every.sort()
        values = every[_sample(every.size)]
        sums = np.concatenate([[0], np.cumsum(values)])
        unit = float(every.std()) if every.size else 0.0
        return _Ordered(values, sums, values.size, scale, unit, every.size / max(1, values.size))


class _Factor:
    """One of a layer's two factors, at any rank: its weights at the highest one in order, and the rank of each."""

    def __init__(self, at: tuple[Any, ...], spec: LayerSpec, parts: lowrank.Svd, dtype: torch.dtype) -> None:
        self.at, self._spec, self._parts, self._dtype = at, spec, parts, dtype
        highest = spec.max_rank(at[1])
        halves = [highest]
        while halves[-1] > 1:
            halves.append(halves[-1] // 2)
        self._knots = halves[::-1]
        self._sides: dict[int | None, tuple[float, float, float]] = {}
        self.reference = self._knots[max(0, len(halves) - 2)]
        weight = self.weight(highest)
        values, self._scale = scaled(weight.double().cpu().numpy())
        by_rank = values if at[2] == 0 else np.moveaxis(values, 1, 0)
        flat = np.ascontiguousarray(by_rank).reshape(highest, -1)
        order = np.argsort(flat, axis=None)[_sample(flat.size)]
        self._values = flat.ravel()[order]
        self._ranks = (order // flat.shape[1]).astype(np.uint16)
        self._each = flat.shape[1]
        exact = flat.astype(np.float64)
        self._means = np.cumsum(exact.sum(axis=1)), np.cumsum(np.square(exact).sum(axis=1))

    def shape(self, rank: int | None) -> tuple[int, ...]:
        """The tensor's shape."""
        out, inner, *kernel = self._spec.shape
        assert rank is not None
        if self.at[1] == "channel":
            return (rank, inner, *kernel) if self.at[2] == 0 else (out, rank, *(1 for _ in kernel))
        height, width = kernel
        return (rank, inner, height, 1) if self.at[2] == 0 else (out, rank, 1, width)

    def weight(self, rank: int | None) -> Tensor:
        """The tensor itself."""
        assert rank is not None
        return lowrank.factor_weights(self._spec.shape, self._parts, rank, self.at[1])[self.at[2]].to(self._dtype)

    def knots(self, rank: int | None) -> list[tuple[int | None, float]]:
        """Ranks at which a ratio is measured and their shares in that of the rank given."""
        assert rank is not None
        logs = [math.log(knot) for knot in self._knots]
        return [(self._knots[logs.index(at)], share) for at, share in _between(math.log(rank), logs)]

    def sides(self, rank: int | None) -> tuple[float, float, float]:
        """`_Ordered.sides` at a knot, kept."""
        if rank not in self._sides:
            self._sides[rank] = self.ordered(rank).sides()
        return self._sides[rank]

    def ordered(self, rank: int | None) -> _Ordered:
        """The tensor's weights in order."""
        assert rank is not None
        count = rank * self._each
        most = min(count, self._values.size)
        values, sums = np.empty(most + 1, np.int64), np.zeros(most + 1, np.int64)
        found = gather(self._values, self._ranks, self._values.size, rank, values, sums)
        mean, square = (float(total[rank - 1]) / count for total in self._means)
        unit = math.sqrt(max(0.0, square - mean * mean))
        return _Ordered(values, sums, found, self._scale, unit, count / max(1, found))


@kernel
def gather(values: Int64s, ranks: Words, count: Int, below: Int, taken: Int64s, sums: Int64s) -> Int:
    """Copy the values of a rank under `below`, in their order, and write their running sums; their number."""
    found = 0
    total = 0
    for i in range(count):
        taken[found] = values[i]
        if ranks[i] < below:
            found += 1
            total += values[i]
            sums[found] = total
    return found


# Knots


def _between(value: float, knots: Sequence[Any]) -> list[tuple[Any, float]]:
    """The knots beside a value that lies among them, and their shares by linear interpolation."""
    above = min(max(1, bisect_right(knots, value)), len(knots) - 1)
    if len(knots) == 1:
        return [(knots[0], 1.0)]
    low, high = knots[above - 1], knots[above]
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return [(knot, part) for knot, part in ((low, 1 - share), (high, share)) if part > 0]


def _thresholds(threshold: float, every: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    """The knots beside a threshold, of `every`, moved to within low and high, and their shares."""
    if threshold <= 0:
        return [(0.0, 1.0)]
    return _between(threshold, sorted({min(max(knot, low), high) for knot in every}))


# Histograms


def _base(weights: _Ordered, layer: LayerPlan) -> tuple[float, NDArray[np.float32], float]:
    """What ratios are of, in bytes; the table of values (none for 16 and 32 bits); the most common one's share."""
    first, last = weights.kept(layer.threshold)
    pruned = last - first
    kept, table = weights.count - pruned, np.zeros(0, np.float32)
    if layer.bits > _BITS[-1]:
        return weights.each * (rans.entropy(np.array([kept, pruned])) + kept * layer.bits) / 8 + _OVERHEAD, table, 0.0
    values = weights.values[: weights.count]
    if layer.quantizer == "codebook":
        found = _codebook(weights, first, last, 2**layer.bits)
        edges = np.floor((found[1:].astype(np.float64) + found[:-1]) / 2 * weights.scale).astype(np.int64)
        every = np.append(_counts(values, edges, first, last), pruned)
        table, place = np.unique(np.append(found, np.float32(0))[every > 0], return_inverse=True)
        counts = np.zeros(table.size, np.int64)
        np.add.at(counts, place, every[every > 0])
    else:
        step, high = _grid_step(weights, first, last, layer.bits)
        edges = np.array([0]) if layer.bits == 1 else np.ceil((np.arange(-high, high) + 0.5) * step).astype(np.int64)
        counts = _counts(values, edges - 1, first, last)
        if layer.bits == 1:
            counts = np.insert(counts, 1, 0)
        counts[high] += pruned
        span = np.append(np.flatnonzero(counts), high)
        table = np.zeros(span.max() - span.min() + 1, np.float32)
    return weights.each * rans.entropy(counts) / 8 + _OVERHEAD, table, float(counts.max() / max(1, counts.sum()))


def _table_bytes(table: NDArray[np.float32], layer: LayerPlan, effort: str) -> int:
    """The bytes of what stands before the symbols."""
    if layer.bits > _BITS[-1]:
        return 0
    if layer.quantizer != "codebook":
        return 8 + len(leb128.write(table.size))
    return len(tables.encode(table, effort != header.FAST))


def _counts(values: NDArray[np.int64], edges: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """How many values, but for those in places first to last - 1, are up to each edge and above the one before."""
    places = np.concatenate([np.searchsorted(values, edges, side="right"), [values.size]])
    places -= np.clip(places - first, 0, last - first)
    return np.diff(places, prepend=0)


def _codebook(weights: _Ordered, first: int, last: int, k: int) -> NDArray[np.float32]:
    """The table of `quantize.kmeans` at bfloat16's precision, rising."""
    count, values = weights.count, weights.values
    if count <= _SMALL or count - (last - first) <= k:
        distinct = np.unique(np.concatenate([values[:first], values[last:count]]))
        if distinct.size <= k:
            return _in_short(distinct / weights.scale)
    return _in_short(clustering.clustered(values, weights.sums, count, first, last, k) / weights.scale)


def _in_short(values: NDArray[np.float64]) -> NDArray[np.float32]:
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def _grid_step(weights: _Ordered, first: int, last: int, bits: int) -> tuple[float, int]:
    """The step of `quantize.grid_step`, in scaled numbers, and the highest level."""
    count, values, sums = weights.count, weights.values, weights.sums
    high = quantize.levels(bits)[1]
    kept = count - (last - first)
    below = values[0] if first else values[min(last, count - 1)]
    largest = float(max(abs(below), abs(values[count - 1] if last < count else values[first - 1]))) if kept else 0.0
    if not largest:
        return weights.scale, high
    if bits == 1:
        zero = int(np.searchsorted(values[:count], 0))
        left, right = sums[min(first, zero)], sums[count] - sums[max(last, zero)]
        inner = sums[max(last, zero)] - sums[last] if zero > last else 0
        outer = sums[first] - sums[zero] if zero < first else 0
        return float(right - left - inner + outer) / kept, high
    steps = largest / high * np.linspace(0.2, 1.0, 80)
    edges = np.ceil((np.arange(-high, high) + 0.5) * steps[:, None]).astype(np.int64)
    places = np.searchsorted(values[:count], edges.ravel(), side="left").reshape(edges.shape)
    places = np.pad(places, ((0, 0), (1, 1)), constant_values=((0, 0), (0, count)))
    inside = np.clip(places, first, last)
    sizes = np.diff(places - (inside - first), axis=1)
    totals = np.diff(sums[places] - (sums[inside] - sums[first]), axis=1).astype(np.float64)
    levels = np.arange(-high, high + 1)
    errors = steps**2 * (sizes * levels**2).sum(axis=1) - 2 * steps * (totals * levels).sum(axis=1)
    return float(steps[int(errors.argmin())]), high
