"""Multiply-accumulates: what an example costs in the layers of a model, and of a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from autocompress.compress.calibrate import is_layer
from autocompress.plan import PARAMETERS, LayerSpec, Plan

PROJECTIONS = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}
"""What an attention's weights multiply."""


def macs_of(specs: Iterable[LayerSpec], plan: Plan, read: Mapping[str, int] | None = None) -> int:
    """Multiply-accumulates of one example in the compressible layers; pruned weights count as executed.

    A factorised layer's are scaled by its share of weights, exact where the stride is 1. Rows of units that go by the
    plan's width do not count, nor columns that read such units, where `read` tells by layer name how many inputs are
    left (`Units.read`).
    """
    total = 0
    for spec in specs:
        layer = plan.layers[spec.name]
        inputs = (read or {}).get(spec.name, spec.shape[1])
        left = replace(spec, shape=(spec.units(layer), inputs, *spec.shape[2:]))
        total += round(spec.macs * (left.weights(layer) / spec.parameters))
    return total


def count_macs(model: nn.Module, layers: Sequence[LayerSpec], call: Callable[[nn.Module], Any]) -> dict[str, int]:
    """Per layer and example: positions x weights, over every use of the weight to multiply; none where it is looked up.

    What a module computes with a weight that is no layer's of torch is not known and does not count.
    """
    probe = copy.deepcopy(model).eval()
    macs = {spec.name: 0 for spec in layers}
    modules = dict(probe.named_modules(remove_duplicate=False))
    examples = [1]

    def count(spec: LayerSpec) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            macs[spec.name] += _multiplications(module, spec, args, kwargs, output)

        return hook

    def note_examples(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        examples[0] = first.shape[0] if first is not None and first.dim() > 1 else 1

    probe.register_forward_pre_hook(note_examples, with_kwargs=True)

    for spec in layers:
        keys = (spec.name, *spec.shared_with)
        leaves = [key.rpartition(".")[2] if spec.kind in PARAMETERS else "" for key in keys]
        uses = {(id(modules[path]), leaf): path for path, leaf in zip(spec.modules, leaves, strict=True)}
        for path in uses.values():
            modules[path].register_forward_hook(count(spec), with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        call(probe)
    return {name: count // max(1, examples[0]) for name, count in macs.items()}


def _multiplications(
    module: nn.Module, spec: LayerSpec, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> int:
    """Multiply-accumulates of a weight in one call of a module, 0 where it is looked up or nothing is known."""

    def given(name: str, order: int = 0) -> torch.Tensor:
        """An input, empty where there is none."""
        found = kwargs.get(name, args[order] if order < len(args) else None)
        found = found.data if isinstance(found, PackedSequence) else found
        return found if isinstance(found, torch.Tensor) else torch.empty(0, 1)

    def vectors(name: str, order: int = 0) -> int:
        return given(name, order).numel() // max(1, given(name, order).shape[-1])

    if is_layer(module):
        return output.numel() // spec.shape[0] * spec.parameters  # type: ignore[no-any-return]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return given("input").numel() // spec.shape[0] * spec.parameters
    if spec.kind == "recurrent" and isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return vectors("input") * spec.parameters
    if spec.kind == "attention" and isinstance(module, nn.MultiheadAttention):
        read = PROJECTIONS[spec.name.rpartition(".")[2]]
        every = PROJECTIONS["in_proj_weight"]
        return sum(vectors(name, every.index(name)) for name in read) * spec.parameters // len(read)
    return 0
