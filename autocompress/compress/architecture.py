"""Architectures as data: trees of nn.Sequential and standard layers, described and built from a fixed list.

A description is nested JSON: [type, {constructor arguments that differ from the defaults}] for a
layer and ["Sequential", [[name, child], ...]] for a container. Nothing outside the list below is
ever built, so that a file cannot name code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import nn

from autocompress.errors import ArtifactError

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode")

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    **{f"Conv{d}d": _CONV for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": _NORM for d in (1, 2, 3)},
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine"),
    **{f"MaxPool{d}d": (*_POOL, "dilation") for d in (1, 2, 3)},
    **{f"AvgPool{d}d": (*_POOL, "count_include_pad") for d in (1, 2, 3)},
    **{f"AdaptiveAvgPool{d}d": ("output_size",) for d in (1, 2, 3)},
    **{f"AdaptiveMaxPool{d}d": ("output_size",) for d in (1, 2, 3)},
    **{f"Dropout{d}": ("p",) for d in ("", "1d", "2d", "3d")},
    **{f"ZeroPad{d}d": ("padding",) for d in (1, 2, 3)},
    "AlphaDropout": ("p",),
    "Flatten": ("start_dim", "end_dim"),
    "Unflatten": ("dim", "unflattened_size"),
    "PixelShuffle": ("upscale_factor",),
    "Upsample": ("size", "scale_factor", "mode", "align_corners"),
    "Identity": (),
    "ReLU": (),
    "ReLU6": (),
    "LeakyReLU": ("negative_slope",),
    "ELU": ("alpha",),
    "CELU": ("alpha",),
    "SELU": (),
    "GELU": ("approximate",),
    "SiLU": (),
    "Mish": (),
    "Softplus": ("beta", "threshold"),
    "Softsign": (),
    "Tanh": (),
    "Sigmoid": (),
    "Hardswish": (),
    "Hardsigmoid": (),
    "Hardtanh": ("min_val", "max_val"),
    "PReLU": ("num_parameters",),
    "Softmax": ("dim",),
    "LogSoftmax": ("dim",),
}
_FLOATS = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_EFFECT = ("inplace", "device", "init", "min_value", "max_value")
_MAX_DEPTH = 32
_MOST_LAYERS = 4096


def describe(model: nn.Module) -> list[Any] | None:
    """The description of a tree of standard layers; None where it would not build an equal model.

    That is so where a module is something else, has a setting that is not in the list below, hooks
    or extra tensors, or where two layers share a tensor.
    """
    tree = _describe(model)
    if tree is None:
        return None
    state = model.state_dict(keep_vars=True)
    distinct = len({id(tensor) for tensor in state.values()}) == len(state)
    try:
        built = build(tree).state_dict(keep_vars=True)
    except ArtifactError:
        return None
    return tree if distinct and _layout(built) == _layout(state) else None


def _describe(model: nn.Module) -> list[Any] | None:
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return None
    if type(model) is nn.Sequential:
        children = [[name, _describe(child)] for name, child in model._modules.items() if child is not None]
        return ["Sequential", children] if all(tree is not None for _, tree in children) else None
    kind = type(model).__name__
    names = _ARGUMENTS.get(kind)
    if names is None or type(model) is not getattr(nn, kind) or model._modules:
        return None
    defaults = _defaults(kind)
    unlisted = defaults.keys() - {*names, *_NO_EFFECT, "bias", "dtype"}
    if any(_plain(getattr(model, n, defaults[n])) != _plain(defaults[n]) for n in unlisted):
        return None
    arguments = {name: _plain(getattr(model, name)) for name in names}
    if "bias" in defaults:
        arguments["bias"] = getattr(model, "bias", None) is not None or getattr(model, "weight", None) is None
    changed = {n: v for n, v in arguments.items() if n not in defaults or not _same(v, _plain(defaults[n]))}
    dtypes = {t.dtype for t in (*model._parameters.values(), *model._buffers.values()) if t is not None}
    if other := {d for d in dtypes if d.is_floating_point} - {torch.float32}:
        changed["dtype"] = str(other.pop()).removeprefix("torch.")
    return [kind, changed]


def _same(value: Any, default: Any) -> bool:
    """Whether a value is the default, or the default once for each axis."""
    return bool(value == default or (isinstance(value, list) and value and all(v == default for v in value)))


def _layout(state: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}


def build(tree: Any) -> nn.Module:
    """The module of a description, parameters not initialised. Raises ArtifactError for anything else."""
    return _build(tree, 0, count(1))


def _build(tree: Any, depth: int, numbers: Iterator[int]) -> nn.Module:
    if next(numbers) > _MOST_LAYERS:
        raise ArtifactError(f"artifact is damaged: its architecture has more than {_MOST_LAYERS} layers")
    match tree:
        case ["Sequential", list(children)] if depth < _MAX_DEPTH:
            result = nn.Sequential()
            for child in children:
                match child:
                    case [str(name), subtree]:
                        _add(result, name, _build(subtree, depth + 1, numbers))
                    case _:
                        raise ArtifactError("artifact is damaged: a child of its architecture is malformed")
            return result
        case [str(kind), dict(arguments)] if kind in _ARGUMENTS:
            return _build_layer(kind, arguments)
        case _:
            raise ArtifactError(f"artifact is damaged: its architecture holds {str(tree)[:80]!r}")


def _add(parent: nn.Sequential, name: str, child: nn.Module) -> None:
    try:
        parent.add_module(name, child)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"artifact is damaged: layer name {name[:80]!r} is not allowed") from error


def _build_layer(kind: str, arguments: dict[str, Any]) -> nn.Module:
    allowed = {*_ARGUMENTS[kind], "bias", "dtype"}
    if unknown := arguments.keys() - allowed:
        raise ArtifactError(f"artifact is damaged: {kind} has arguments {sorted(unknown)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    try:
        if "dtype" in values:
            values["dtype"] = _FLOATS.get(values["dtype"], torch.float32)
        with torch.device("meta"):
            module: nn.Module = getattr(nn, kind)(**values)
        elements = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
    except Exception as error:  # whatever a constructor says of arguments from a damaged file
        raise ArtifactError(f"artifact is damaged: {kind}({arguments}) cannot be built ({error})") from error
    if elements > 1 << 32:
        raise ArtifactError(f"artifact asks for a {kind} of {elements} elements, allowed: {1 << 32}")
    return module


@cache
def _defaults(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(nn, kind).__init__).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list | torch.Size):
        return [_plain(v) for v in value]
    return value
