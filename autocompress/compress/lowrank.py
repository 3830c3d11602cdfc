"""Truncated SVD of a layer into two layers.

Notation: W the weight, out x in (x kernel); r the rank. Each scheme sees W as a matrix M
(`LayerSpec.matrix`), M ~ U S V^T cut to r terms (Eckart & Young 1936), sqrt(S) to each side.

channel: M is out x (in * kernel). First layer: r outputs, the layer's own kernel; second: 1x1.
spatial: M is (in * height) x (out * width) (Jaderberg et al. 2014, arXiv 1405.3866). First layer:
    a column kernel (height x 1), second: a row kernel (1 x width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autocompress.plan import LayerPlan

Svd = tuple[Tensor, Tensor, Tensor]
_CONVS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def as_matrix(weight: Tensor, scheme: str) -> Tensor:
    """The weight as the matrix whose rank the scheme limits: (rows, columns) of `LayerSpec.matrix`."""
    if scheme == "channel":
        return weight.flatten(1)
    out, inner, height, width = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(inner * height, out * width)


def svd(weight: Tensor, scheme: str = "channel") -> Svd:
    """U (rows, k), S (k) falling, V^T (k, columns) of the scheme's matrix, in float64."""
    left, values, right = torch.linalg.svd(as_matrix(weight.detach(), scheme).double(), full_matrices=False)
    return left, values, right


def factor_weights(shape: tuple[int, ...], parts: Svd, rank: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Weights of the first and second layer, float64, for a layer of that weight shape."""
    left, values, right = parts
    root = values[:rank].sqrt()
    tall, wide = left[:, :rank] * root, root[:, None] * right[:rank]
    if scheme == "channel":
        out, inner, *kernel = shape
        return wide.reshape(rank, inner, *kernel), tall.reshape(out, rank, *(1 for _ in kernel))
    out, inner, height, width = shape
    first = tall.reshape(inner, height, rank).permute(2, 0, 1).unsqueeze(-1)
    second = wide.reshape(rank, out, width).permute(1, 0, 2).unsqueeze(2)
    return first.contiguous(), second.contiguous()


def product(first: Tensor, second: Tensor, shape: tuple[int, ...], scheme: str) -> Tensor:
    """The weight that two factors stand for, of the shape given: the inverse of `factor_weights`."""
    rank = first.shape[0]
    if scheme == "channel":
        return (second.reshape(shape[0], rank) @ first.reshape(rank, -1)).reshape(shape)
    return torch.einsum("rih,orw->oihw", first.squeeze(-1), second.squeeze(2))


def factorised(module: nn.Module, plan: LayerPlan) -> nn.Sequential:
    """Two standard layers, of the module's device, dtype and settings, that take its place; weights are zero.

    The second one holds the module's own bias parameter. No random numbers are drawn.
    """
    assert plan.rank is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    common: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    has_bias = module.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = _bare(nn.Linear, module.in_features, plan.rank, bias=False, **common)
        second = _bare(nn.Linear, plan.rank, module.out_features, bias=has_bias, **common)
    else:
        first, second = _convolutions(module, plan.rank, plan.scheme, common)
    if has_bias:
        second.bias = module.bias
    pair = nn.Sequential(first, second)
    pair.train(module.training)
    return pair


def _bare(kind: type[nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """A layer whose parameters are zero, made without drawing random numbers."""
    module: nn.Module = nn.utils.skip_init(kind, *args, **settings)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _convolutions(module: nn.Module, rank: int, scheme: str, common: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    conv = _CONVS[module.weight.dim()]
    has_bias = module.bias is not None
    axes = range(len(module.kernel_size))
    first_axes = axes if scheme == "channel" else (0,)
    last_axes = () if scheme == "channel" else (1,)

    def build(inputs: int, outputs: int, own: Any, bias: bool) -> nn.Module:
        def pick(values: Any, otherwise: int) -> tuple[int, ...]:
            return tuple(values[a] if a in own else otherwise for a in axes)

        padding = module.padding
        return _bare(
            conv,
            inputs,
            outputs,
            pick(module.kernel_size, 1),
            stride=pick(module.stride, 1),
            padding=padding if isinstance(padding, str) else pick(padding, 0),
            dilation=pick(module.dilation, 1),
            padding_mode=module.padding_mode,
            bias=bias,
            **common,
        )

    return (
        build(module.in_channels, rank, first_axes, False),
        build(rank, module.out_channels, last_axes, has_bias),
    )


def replace(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with the module at `path` replaced; the module itself for the path "" ."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model
