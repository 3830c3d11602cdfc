"""Architectures as data: trees of nn.Sequential and standard layers, described and built from a fixed list.

A description is nested JSON: [type, {constructor arguments that differ from the defaults}] for a
layer and ["Sequential", [[name, child], ...]] for a container. Nothing outside the list below is
ever built, so that a file cannot name code.
"""

from __future__ import annotations

import inspect
from functools import cache
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
_MAX_DEPTH = 32


def describe(model: nn.Module) -> list[Any] | None:
    """The description of a tree of standard layers; None where any module is something else."""
    if type(model) is nn.Sequential:
        children = [[name, describe(child)] for name, child in model.named_children()]
        distinct = len({id(child) for child in model.children()}) == len(model)
        plain = distinct and all(tree is not None for _, tree in children) and not _own_state(model)
        return ["Sequential", children] if plain else None
    kind = type(model).__name__
    names = _ARGUMENTS.get(kind)
    if names is None or type(model) is not getattr(nn, kind) or _has_extras(model):
        return None
    defaults = _defaults(kind)
    arguments = {name: _plain(getattr(model, name)) for name in names}
    if isinstance(model, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.LayerNorm):
        arguments["bias"] = model.bias is not None
    changed = {n: v for n, v in arguments.items() if n not in defaults or v != _plain(defaults[n])}
    dtypes = {t.dtype for t in model.parameters(recurse=False)}
    if dtypes - {torch.float32}:
        changed["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    return [kind, changed]


def build(tree: Any, depth: int = 0) -> nn.Module:
    """The module of a description, parameters not initialised. Raises ArtifactError for anything else."""
    match tree:
        case ["Sequential", list(children)] if depth < _MAX_DEPTH:
            result = nn.Sequential()
            for child in children:
                match child:
                    case [str(name), subtree]:
                        _add(result, name, build(subtree, depth + 1))
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
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    if "dtype" in values:
        values["dtype"] = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(
            values["dtype"], torch.float32
        )
    try:
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


def _own_state(model: nn.Module) -> bool:
    return bool(model._parameters or model._buffers) or _has_hooks(model)


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks)


def _has_extras(model: nn.Module) -> bool:
    return bool(list(model.children())) or _has_hooks(model)
