"""A model as it is to be deployed: without what training wraps around its modules and weights.

Weights that are computed from others at each call (weight and spectral normalisation, parametrizations, masks of
`torch.nn.utils.prune`) become the values that they have in evaluation mode; compiled, data-parallel and averaged
modules become what they wrap.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_Hook = WeightNorm | SpectralNorm | BasePruningMethod
_Made = dict[tuple[int, ...], tuple[nn.Parameter, list[nn.Parameter]]]
"""Parameters that were made, by the ids of what they were computed from, which are held so that ids stay theirs."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model's module with plain layers, in the modes of training that it has: itself where it has no other ones.

    Else a copy, which computes what the model does in evaluation mode; weights that are computed from the same tensors
    and equal are one in it. The model stays as it is. One that cannot be copied, or whose weights are computed in a
    way that is not known, comes back as it came.
    """
    model = _inner(model)
    if all(_inner(module) is module and not _is_computed(module) for module in model.modules()):
        return model
    try:
        with _without_graphs(model):
            found = copy.deepcopy(model)
        _settle_all(found)
    except Exception:  # what cannot be copied is said where a task is checked
        return model
    return found


def _inner(module: nn.Module) -> nn.Module:
    """What compiled, data-parallel and averaged modules wrap."""
    while True:
        kind = type(module)
        if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"):  # slow to import
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, DataParallel | DistributedDataParallel | AveragedModel):
            module = module.module
        else:
            return module


def _is_computed(module: nn.Module) -> bool:
    """Whether tensors of a module's own are computed from others at each call."""
    return bool(_lists(module) or _hooks(module))


def _lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Parametrizations by the name of the tensor."""
    if not parametrize.is_parametrized(module):
        return {}
    found = module.get_submodule("parametrizations").named_children()
    return {name: each for name, each in found if isinstance(each, parametrize.ParametrizationList)}


def _hooks(module: nn.Module) -> list[tuple[int, _Hook]]:
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _HOOKS)]


def _tensor_name(hook: _Hook) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def _parts(hook: _Hook) -> tuple[str, ...]:
    """The names of the parameters that a hook's tensor is computed from."""
    ends = ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)
    return tuple(_tensor_name(hook) + end for end in ends)


@contextmanager
def _without_graphs(model: nn.Module) -> Iterator[None]:
    """Tensors that are computed anew at each call are for a while without their graphs, which cannot be copied."""
    held: list[tuple[nn.Module, str, Tensor]] = []
    lists: list[tuple[nn.RNNBase, list[Any]]] = []
    for module in model.modules():
        for _, hook in _hooks(module):
            name = _tensor_name(hook)
            held.append((module, name, getattr(module, name)))
        if isinstance(module, nn.RNNBase):
            lists.append((module, module._flat_weights))
    try:
        for module, name, tensor in held:
            setattr(module, name, tensor.detach())
        for each, tensors in lists:
            each._flat_weights = [t if isinstance(t, nn.Parameter | None) else t.detach() for t in tensors]
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)
        for each, tensors in lists:
            each._flat_weights = tensors


@torch.no_grad()
def _settle_all(model: nn.Module) -> None:
    """Make plain modules and parameters of a copy."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # spectral norms go on estimating when they are read in training
    made: _Made = {}
    for module in list(model.modules()):
        _settle_hooks(module, made)
        _settle_parametrized(module, made)
        if module._compiled_call_impl is not None:  # of the original's class, which is bound to the original
            module._compiled_call_impl = None
        for name, child in module._modules.items():
            if child is not None and _inner(child) is not child:
                module._modules[name] = _inner(child)
    for module, training in modes:
        module.training = training


def _settle_hooks(module: nn.Module, made: _Made) -> None:
    for key, hook in reversed(_hooks(module)):
        name, own = _tensor_name(hook), [module.get_parameter(part) for part in _parts(hook)]
        if isinstance(hook, BasePruningMethod):  # its `remove` writes into a parameter that others may share
            value = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            del module._forward_pre_hooks[key], module._buffers[f"{name}_mask"]
            delattr(module, f"{name}_orig")
            delattr(module, name)
        else:
            remove = nn.utils.remove_weight_norm if isinstance(hook, WeightNorm) else nn.utils.remove_spectral_norm
            remove(module, name)
            value = module.get_parameter(name)
            delattr(module, name)
        setattr(module, name, _parameter(value, own, made))


def _settle_parametrized(module: nn.Module, made: _Made) -> None:
    """Not by `remove_parametrizations`: that takes the attribute from the class, which a copy shares."""
    lists = _lists(module)
    if not lists:
        return
    values = {name: getattr(module, name) for name in lists}
    kind = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, found in lists.items():
        own = list(found.parameters(recurse=False))
        if own:
            setattr(module, name, _parameter(values[name], own, made))
        else:
            module.register_buffer(name, values[name].detach().clone())


def _parameter(value: Tensor, sources: list[nn.Parameter], made: _Made) -> nn.Parameter:
    """A parameter with the value: the one that was made of the same sources, where that has it too."""
    key = tuple(map(id, sources))
    if key in made and torch.equal(made[key][0], value):
        return made[key][0]
    trained = any(source.requires_grad for source in sources) and value.is_floating_point()
    made[key] = nn.Parameter(value.detach().clone(), trained), sources
    return made[key][0]
