"""Plan -> compressed model: low rank, then prune, then quantize. The only place where the order exists.

A `Compressed` holds a copy of the model with factorised layers in place, and for each weight of
a layer (or factor) a `Code`: the float weights that stay and how they become values. Training
substitutes each weight by its code's values (`torch.func.functional_call`), so that any module,
shared weights included, sees compressed weights without knowing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.codec.container import Coded, Raw, grid_table
from autocompress.compress import lowrank, prune, quantize
from autocompress.compress.artifact import raw_tensor, unique_state
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, LayerSpec, Plan

SvdSource = Callable[[LayerSpec, str], lowrank.Svd]


@dataclass(frozen=True)
class State:
    """What finetuning goes on from: the float tensors behind a trial's codes, and its plan.

    `tensors` holds, by state key of the compressed model, the full float weights (pruned ones as
    they were when they were pruned), all other parameters and buffers, and for each code
    "KEY#unit" (the standard deviation that thresholds count in, that of the weights at first) and
    "KEY#table" or "KEY#step".
    """

    plan: Plan
    tensors: Mapping[str, Tensor]


class Code:
    """One weight: the floats that stay, their positions, and the table or step that they go by.

    `weights` (n,) and `table` (k,) or `step` () are leaf tensors that an optimiser may train;
    a table's entries may pass each other in training.
    """

    def __init__(self, weight: Tensor, plan: LayerPlan, start: Mapping[str, Tensor], key: str) -> None:
        self.shape, self.bits, self.kind = tuple(weight.shape), plan.bits, plan.quantizer
        self.dense = weight.detach().clone()
        unit = start.get(f"{key}#unit")
        self.unit = float(weight.detach().double().std(correction=0)) if unit is None else float(unit)
        mask = prune.magnitude_mask(weight, plan.threshold, self.unit)
        self.pruned = not bool(mask.all())
        self.positions = mask.flatten().nonzero().squeeze(1)
        self.weights = self.dense.flatten()[self.positions].clone().requires_grad_()
        self.table: Tensor | None = None
        self.step: Tensor | None = None
        if self.bits <= 8 and self.kind == "codebook":
            table = start.get(f"{key}#table")
            if table is None:
                table = quantize.kmeans(self.weights, 2**self.bits)
            self.table = table.to(self.weights).detach().clone().requires_grad_()
        elif self.bits <= 8:
            step = start.get(f"{key}#step")
            value = torch.tensor(quantize.grid_step(self.weights, self.bits)) if step is None else step
            self.step = value.to(self.weights).detach().clone().requires_grad_()

    def values(self) -> Tensor:
        """The weight that the model computes with, in the weight's shape; differentiable."""
        if self.table is not None:
            kept = quantize.CodebookWeight.apply(self.weights, self.table.sort().values)  # type: ignore[no-untyped-call]
        elif self.step is not None:
            kept = quantize.GridWeight.apply(self.weights, self.step, self.bits)  # type: ignore[no-untyped-call]
        elif self.bits == 16:
            kept = self.weights + (self.weights.half().to(self.weights) - self.weights).detach()
        else:
            kept = self.weights
        if not self.pruned:
            return kept.view(self.shape)  # type: ignore[no-any-return]
        flat = kept.new_zeros(self.dense.numel())
        return flat.index_copy(0, self.positions, kept).view(self.shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self) -> Coded | Raw:
        """The tensor as the artifact holds it; its values equal `values()` in float32."""
        if self.table is None and self.step is None:
            dtype = torch.float16 if self.bits == 16 else self.dense.dtype
            return raw_tensor(self.values().to(dtype))
        if self.table is not None:
            rising = self.table.sort().values
            used, codes = torch.unique(quantize.nearest(self.weights, rising), return_inverse=True)
            table, grid = rising[used].float().cpu().numpy(), None
            if self.pruned:
                codes, table = codes + 1, np.concatenate([np.zeros(1, np.float32), table])
        else:
            assert self.step is not None
            level = quantize.to_grid(self.weights, self.bits, self.step).long()
            low = min(int(level.min()), 0)
            grid = (float(np.float32(self.step.item())), low)
            codes = level - low
            table = grid_table(*grid, max(int(level.max()), 0) - low + 1)
        symbols = codes.new_full((self.dense.numel(),), 0 if grid is None else -grid[1])
        symbols[self.positions] = codes
        return Coded(symbols.view(self.shape).cpu().numpy().astype(np.uint16), table, _name(self.dense.dtype), grid)

    def full(self) -> Tensor:
        """All float weights: the trained ones, and the pruned ones as they were."""
        flat = self.dense.flatten().clone()
        flat[self.positions] = self.weights.detach()
        return flat.view(self.shape)


class Compressed:
    """A model under a plan, ready for finetuning and encoding.

    `module` is a copy with factorised layers; `codes` maps its state keys to their codes (one for
    all the names of a shared weight).
    """

    def __init__(self, module: nn.Module, plan: Plan, codes: Mapping[str, Code], aliases: Mapping[str, str]) -> None:
        self.module, self.plan, self.codes, self.aliases = module, plan, codes, aliases

    def substitutes(self) -> dict[str, Tensor]:
        """The weights of all codes by state key, shared ones under each of their names."""
        values = {key: in_fast_layout(code.values()) for key, code in self.codes.items()}
        return values | {alias: values[key] for alias, key in self.aliases.items()}

    def others(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained as they are: all but the coded and the frozen ones."""
        coded = {*self.codes, *self.aliases}
        for key, parameter in self.module.named_parameters():
            if key not in coded and parameter.requires_grad:
                yield parameter

    def encode(self) -> dict[str, Coded | Raw]:
        """Every tensor of the model's state by key, shared ones once."""
        result: dict[str, Coded | Raw] = {}
        for key, tensor in unique_state(self.module).items():
            result[key] = self.codes[key].encode() if key in self.codes else raw_tensor(tensor)
        return result

    def state(self) -> State:
        """What a later trial can go on from."""
        tensors = {key: tensor.detach().clone() for key, tensor in unique_state(self.module).items()}
        for key, code in self.codes.items():
            tensors[key] = code.full()
            tensors[f"{key}#unit"] = torch.tensor(code.unit, dtype=torch.float64)
            if code.table is not None:
                tensors[f"{key}#table"] = code.table.detach().clone()
            if code.step is not None:
                tensors[f"{key}#step"] = code.step.detach().clone()
        return State(self.plan, tensors)


def compress(
    model: nn.Module, specs: Sequence[LayerSpec], plan: Plan, svds: SvdSource, start: State | None = None
) -> Compressed:
    """A compressed copy of the model; the model itself is not touched.

    `svds(spec, scheme)` gives the SVD of the layer's original weight. With `start`, weights go on
    from that state instead: factors of the same rank and scheme as they are, others by a new SVD;
    tables and steps as they are where the layer's plan is the same, else fitted anew.
    Raises TrialFailed for weights that are not finite.
    """
    module = copy.deepcopy(model)
    if start is not None:
        _take_over(module, specs, start)
    keys: dict[str, LayerSpec] = {}
    for spec in specs:
        layer = plan.layers[spec.name]
        prefix = f"{spec.name}." if spec.name else ""
        if layer.rank is None:
            keys[f"{prefix}weight"] = spec
        else:
            module = _factorise(module, spec, layer, svds, start)
            keys |= {f"{prefix}0.weight": spec, f"{prefix}1.weight": spec}
    first = {id(tensor): key for key, tensor in unique_state(module).items()}
    codes: dict[str, Code] = {}
    for key, spec in keys.items():
        layer, weight = plan.layers[spec.name], module.get_parameter(key)
        if not torch.isfinite(weight).all():
            raise TrialFailed(f"weight {key!r} holds values that are not finite")
        if layer != LayerPlan():
            learned = {} if start is None else _learned(start, start.plan.layers[spec.name], layer)
            codes[first[id(weight)]] = Code(weight, layer, learned, first[id(weight)])
    aliases = {
        key: first[id(tensor)]
        for key, tensor in module.state_dict(keep_vars=True).items()
        if first.get(id(tensor), key) != key and first[id(tensor)] in codes
    }
    return Compressed(module, plan, codes, aliases)


def _learned(start: State, old: LayerPlan, new: LayerPlan) -> Mapping[str, Tensor]:
    """What of a state's "#" entries fits a layer whose plan was `old` and is now `new`."""
    if old == new:
        return start.tensors
    whole = old.rank is None and new.rank is None
    if whole or (old.rank, old.scheme) == (new.rank, new.scheme):
        return {key: tensor for key, tensor in start.tensors.items() if key.endswith("#unit")}
    return {}


def _take_over(module: nn.Module, specs: Sequence[LayerSpec], start: State) -> None:
    """Copy a state's tensors into a module that is not factorised yet."""
    factorised = [s for s in specs if start.plan.layers[s.name].rank is not None]
    bias_of = {f"{s.name}.bias".lstrip("."): f"{s.name}.1.bias".lstrip(".") for s in factorised}
    whole = {f"{s.name}.weight".lstrip("."): _product(s, start) for s in factorised}
    with torch.no_grad():
        for key, tensor in unique_state(module).items():
            source = whole.get(key, start.tensors.get(bias_of.get(key, key)))
            if source is None or source.shape != tensor.shape:
                raise TrialFailed(f"the state to start from has no {key!r} of shape {list(tensor.shape)}")
            tensor.copy_(source)


def _product(spec: LayerSpec, start: State) -> Tensor:
    """The whole weight that a state's two factors stand for."""
    first, second = (start.tensors[f"{spec.name}.{i}.weight".lstrip(".")] for i in (0, 1))
    return lowrank.product(first, second, spec.shape, start.plan.layers[spec.name].scheme)


def _factorise(module: nn.Module, spec: LayerSpec, plan: LayerPlan, svds: SvdSource, start: State | None) -> nn.Module:
    """The module with two factors in the layer's place, weights set."""
    assert plan.rank is not None
    target = module.get_submodule(spec.name)
    old = start.plan.layers[spec.name] if start is not None else None
    if start is not None and old is not None and (old.rank, old.scheme) == (plan.rank, plan.scheme):
        factors = tuple(start.tensors[f"{spec.name}.{i}.weight".lstrip(".")] for i in (0, 1))
    else:
        parts = svds(spec, plan.scheme) if start is None else lowrank.svd(target.weight, plan.scheme)  # type: ignore[arg-type]
        factors = lowrank.factor_weights(spec.shape, parts, plan.rank, plan.scheme)
    pair = lowrank.factorised(target, plan)
    with torch.no_grad():
        for i, factor in enumerate(factors):
            pair.get_parameter(f"{i}.weight").copy_(factor)
    return lowrank.replace(module, spec.name, pair)


def in_fast_layout(tensor: Tensor) -> Tensor:
    """Images and their kernels with channels last in memory, on which CPU convolutions train about 1.8x faster.

    `.to` and not `.contiguous`, which leaves the strides of a single channel as they are.
    """
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call_with(module: nn.Module, substitutes: Mapping[str, Tensor], inputs: Any) -> Any:
    """The module's output with some of its tensors substituted, for a tensor, tuple or mapping of inputs."""
    args, kwargs = as_call(inputs)
    return torch.func.functional_call(module, dict(substitutes), args, kwargs, tie_weights=False)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model call for one batch of inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})
