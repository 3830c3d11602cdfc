"""A model as it is to be deployed: without what training wraps around its modules and weights.

Weights that are computed from others at each call (weight and spectral normalisation, parametrizations, masks of
`torch.nn.utils.prune`) become the values that they have in evaluation mode; compiled and data-parallel modules become
what they wrap.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model's module with plain layers, in the modes of training that it has: itself where it has no other ones.

    Else a copy, which computes what the model does in evaluation mode. The model stays as it is. One that cannot be
    copied comes back as it came.
    """
    model = _inner(model)
    if all(_inner(module) is module and not _is_computed(module) for module in model.modules()):
        return model
    _hold_values(model)
    try:
        found = copy.deepcopy(model)
    except Exception:  # what cannot be copied is said where a task is checked
        return model
    modes = [(module, module.training) for module in found.modules()]
    found.eval()  # spectral norms go on estimating when they are read in training
    for module in list(found.modules()):
        _settle(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _inner(child)
    for module, training in modes:
        module.training = training
    return found


def _inner(module: nn.Module) -> nn.Module:
    """What compiled and data-parallel modules wrap."""
    while True:
        if type(module).__name__ == "OptimizedModule":  # of torch._dynamo, which takes a second to import
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        else:
            return module


def _is_computed(module: nn.Module) -> bool:
    """Whether tensors of a module's own are computed from others at each call."""
    return parametrize.is_parametrized(module) or bool(_hooks(module))


def _hooks(module: nn.Module) -> list[tuple[int, WeightNorm | SpectralNorm | BasePruningMethod]]:
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _HOOKS)]


def _parts(hook: WeightNorm | SpectralNorm | BasePruningMethod) -> tuple[str, ...]:
    return ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)


def _tensor_name(hook: WeightNorm | SpectralNorm | BasePruningMethod) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


@torch.no_grad()
def _hold_values(model: nn.Module) -> None:
    """Have the tensors that hooks set, anew at each call, without their graphs, which cannot be copied."""
    for module in model.modules():
        for _, hook in _hooks(module):
            name = _tensor_name(hook)
            setattr(module, name, getattr(module, name).detach())


@torch.no_grad()
def _settle(module: nn.Module) -> None:
    """Make plain parameters of the tensors of a module, in evaluation mode, that are computed."""
    for key, hook in _hooks(module):
        name = _tensor_name(hook)
        trained = any(module.get_parameter(name + end).requires_grad for end in _parts(hook))
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(module, name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(module, name)
        else:
            hook.remove(module)
            del module._forward_pre_hooks[key]
        module.get_parameter(name).requires_grad_(trained)
    if parametrize.is_parametrized(module):
        _settle_parametrized(module)


def _settle_parametrized(module: nn.Module) -> None:
    """Not by `remove_parametrizations`: that takes the attribute from the class, which a copy shares."""
    lists = dict(module.get_submodule("parametrizations").named_children())
    values = {name: getattr(module, name).detach().clone() for name in lists}
    kind = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, found in lists.items():
        own = list(found.parameters(recurse=False))
        if own:
            setattr(module, name, nn.Parameter(values[name], any(p.requires_grad for p in own)))
        else:
            module.register_buffer(name, values[name])
