"""Truncated SVD of a layer into two layers, and the three of Tucker-2.

Notation: W the weight, out x in (x kernel); r the rank. Each scheme sees W as a matrix M
(`LayerSpec.matrix`), M ~ U S V^T cut to r terms (Eckart & Young 1936), sqrt(S) to each side.

channel: M is out x (in * kernel). First layer: r outputs, the layer's own kernel; second: 1x1.
spatial: M is (in * height) x (out * width) (Jaderberg et al. 2014, arXiv 1405.3866). First layer:
    a column kernel (height x 1), second: a row kernel (1 x width).
tucker: out and in alone are cut, to b and a (Kim et al. 2016, arXiv 1511.06530, section 3.1). 1x1 to a channels,
    the layer's own kernel from a to b, 1x1 to the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def multiplied(factors: Sequence[Tensor], shape: tuple[int, ...], scheme: str) -> Tensor:
    """The weight that the factors of any scheme stand for, of the shape given."""
    if scheme != "tucker":
        first, second = factors
        return product(first, second, shape, scheme)
    first, core, last = factors
    return torch.einsum("ai,bahw,ob->oihw", first.flatten(1), core, last.flatten(1))


def parts_of(scheme: str) -> int:
    """How many factors a scheme has; the last one adds the bias."""
    return 3 if scheme == "tucker" else 2


def factorised(module: nn.Module, plan: LayerPlan) -> nn.Sequential:
    """Standard layers, of the module's device, dtype and settings, that take its place; weights are zero.

    The last one holds the module's own bias parameter. No random numbers are drawn. A plan of the scheme tucker
    needs its core.
    """
    assert plan.rank is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    common: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    has_bias = module.bias is not None
    factors: list[nn.Module]
    if isinstance(module, nn.Linear):
        factors = [
            _bare(nn.Linear, module.in_features, plan.rank, bias=False, **common),
            _bare(nn.Linear, plan.rank, module.out_features, bias=has_bias, **common),
        ]
    else:
        factors = _convolutions(module, plan, common)
    if has_bias:
        factors[-1].bias = module.bias
    made = nn.Sequential(*factors)
    made.train(module.training)
    return made


def _bare(kind: type[nn.Module], *args: Any, **settings: Any) -> nn.Module:
    """A layer whose parameters are zero, made without drawing random numbers."""
    module: nn.Module = nn.utils.skip_init(kind, *args, **settings)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _convolutions(module: nn.Module, plan: LayerPlan, common: dict[str, Any]) -> list[nn.Module]:
    assert plan.rank is not None
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    conv = _CONVS[module.weight.dim()]
    has_bias = module.bias is not None
    axes = range(len(module.kernel_size))

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

    inputs, outputs, rank = module.in_channels, module.out_channels, plan.rank
    match plan.scheme:
        case "tucker":
            assert plan.core is not None
            few, many = plan.core
            return [build(inputs, few, (), False), build(few, many, axes, False), build(many, outputs, (), has_bias)]
        case "spatial":
            return [build(inputs, rank, (0,), False), build(rank, outputs, (1,), has_bias)]
        case _:
            return [build(inputs, rank, axes, False), build(rank, outputs, (), has_bias)]


def replace(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The model with the module at `path` replaced; the module itself for the path "" ."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model
