"""Statistics of layers' inputs: what pruning, rounding and ranges of activations go by.

Notation: x (d,) an input of a layer as a row of its weight matrix sees it, d = inputs x kernel of one group: for a
convolution a patch (stride, padding and dilation as the layer has them), for a linear layer its last axis.

Of a layer that is called in several places the inputs of all calls count. Where a parent computes with a weight by
itself (nn.MultiheadAttention with its out_proj) the inputs cannot be seen: such layers have no entry, and
who asks falls back on inputs that are all alike (activation and Hessian are then magnitude). Nor have layers of kinds
whose inputs are not looked at (`LayerSpec.seen`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.plan import LayerSpec

WIDEST, PART = 4608, 2048
"""Inputs of a layer up to which all second moments are held; of more, those within parts of at most so many."""
ROWS = 8192
"""Inputs of a layer that a batch gives at most (or 2 d of those held together), drawn evenly."""


@dataclass(frozen=True)
class Statistics:
    """Moments over `count` inputs of a layer, in float32: `gram` E[x x^T] (groups, d, d), `mean` E[x] (groups, d).

    A wide layer's inputs are in `parts` of d / parts that lie together, moments between which are not known: `gram` is
    then (groups * parts, d / parts, d / parts).
    """

    gram: Tensor
    mean: Tensor
    count: int

    @property
    def parts(self) -> int:
        """How many parts there are of each group."""
        return len(self.gram) // len(self.mean)


def parts_of(d: int) -> int:
    """In how many parts the moments of d inputs are held."""
    return 1 if d <= WIDEST else next(parts for parts in range(-(-d // PART), d + 1) if d % parts == 0)


def in_parts(rows: Tensor, parts: int) -> Tensor:
    """(g, n, d) as (g * parts, n, d / parts)."""
    g, n, d = rows.shape
    return rows.reshape(g, n, parts, d // parts).transpose(1, 2).reshape(g * parts, n, d // parts)


def gather(
    model: nn.Module,
    specs: Iterable[LayerSpec],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
) -> dict[str, Statistics]:
    """By layer name the statistics of its inputs over the batches; layers that none reaches are left out.

    `call(model, inputs)` runs the model, which is in eval mode meanwhile.
    """
    sums: dict[str, Moments] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> None:
        if name not in sums:
            sums[name] = Moments()
        sums[name].add(module, x)

    places = places_of(model, specs)
    with torch.no_grad(), watched(model, places, note):
        for inputs in batches:
            call(model, inputs)
    return {name: sums[name].statistics() for name in places if name in sums}


def places_of(model: nn.Module, specs: Iterable[LayerSpec]) -> dict[str, list[nn.Module]]:
    """By layer name the modules that multiply by its weight; nothing of kinds whose inputs are not looked at."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        spec.name: [modules[path] for path in dict.fromkeys((spec.name, *spec.shared_with)) if is_layer(modules[path])]
        for spec in specs
        if spec.seen
    }


@contextmanager
def watched(
    model: nn.Module, places: Mapping[str, Sequence[nn.Module]], note: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """While it lasts `note(name, module, x)` is called before each call of a module of `places`, in eval mode."""
    flags = [(module, module.training) for module in model.modules()]

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and x.numel():
                note(name, module, x.detach())

        return seen

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, modules in places.items()
        for module in {id(m): m for m in modules}.values()
    ]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag


def is_layer(module: nn.Module) -> bool:
    """Whether its weight multiplies its inputs: linear layers and convolutions."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def examples_in(inputs: Any) -> int:
    """The number of examples in a batch of inputs, by the first tensor in it; 1 where there is none."""
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else 1
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    return next((examples_in(part) for part in parts if isinstance(part, Tensor)), 1)


def largest_input(
    model: nn.Module, specs: Iterable[LayerSpec], inputs: Any, call: Callable[[nn.Module, Any], Any]
) -> int:
    """Elements of the largest input that a layer gets in a call of the model, for each example of `inputs`."""
    most = [0]

    def note(_: str, __: nn.Module, x: Tensor) -> None:
        most[0] = max(most[0], x.numel())

    with torch.no_grad(), watched(model, places_of(model, specs), note):
        call(model, inputs)
    return most[0] // examples_in(inputs)


class Moments:
    """Sums over the inputs of one layer, as they come. `drift` is E[(x' - x) x^T] for the inputs x' wanted instead."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.drift: Tensor | None = None
        self.mean: Tensor | None = None
        self.count = 0

    def add(self, module: nn.Module, x: Tensor, wanted: Tensor | None = None) -> None:
        """Count the inputs of one call, and beside them those that it should have had."""
        rows = patches(module, x)
        mean = rows.sum(1)
        parted = in_parts(rows, parts_of(rows.shape[2]))
        gram = torch.bmm(parted.transpose(1, 2), parted)
        if wanted is not None:
            should = in_parts(patches(module, wanted), parts_of(rows.shape[2]))
            drift = torch.bmm((should - parted).transpose(1, 2), parted) / rows.shape[1]
            self.drift = drift if self.drift is None else self.drift.add_(drift)
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.mean = mean if self.mean is None else self.mean.add_(mean)
        self.count += rows.shape[1]

    def statistics(self) -> Statistics:
        """The means over what was added."""
        assert self.gram is not None
        assert self.mean is not None
        return Statistics(self.gram / self.count, self.mean / self.count, self.count)


def patches(module: nn.Module, x: Tensor, most: int | None = None) -> Tensor:
    """The inputs of a layer's weight rows, (groups, rows, d) float32, of one call with x.

    d runs over inputs, then the kernel, as the weight does. Of more than `most` rows (None: `ROWS`, or 2 d if that is
    more) so many are taken, drawn without replacement by a generator of its own.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        chosen = _chosen(len(rows), rows.shape[1], most)
        return (rows if chosen is None else rows[chosen.to(x.device)]).float().unsqueeze(0)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    axes = len(module.kernel_size)
    x = x.unsqueeze(0) if x.dim() == axes + 1 else x  # a single image
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for axis in range(axes):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    places = (x.shape[0], *x.shape[2 : 2 + axes])
    d = x.shape[1] // module.groups * math.prod(module.kernel_size)
    chosen = _chosen(math.prod(places), d, most)
    first, *spatial = torch.unravel_index(torch.arange(math.prod(places)) if chosen is None else chosen, places)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    taken = x.permute(order)[(first.to(x.device), *(at.to(x.device) for at in spatial))]  # (rows, C, kernel)
    return taken.reshape(len(taken), module.groups, d).transpose(0, 1).float().contiguous()


def _chosen(rows: int, d: int, most: int | None) -> Tensor | None:
    """The places of the rows that are taken, rising; None for all."""
    most = max(ROWS, 2 * d // parts_of(d)) if most is None else most
    if rows <= most:
        return None
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:most].sort().values
