"""Which elementwise activation follows a layer, found by watching one call of the model.

Every function of torch that the call makes is seen (`torch.overrides.TorchFunctionMode`), so that modules,
functions and methods count alike. Between layer and activation a batch normalisation may stand, which in evaluation
is a scale and a shift of each unit, and what only moves values or takes maxima of rising functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autocompress.plan import LayerSpec

RISING = {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_",
          "softplus", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh", "hardtanh_", "hardsigmoid", "clamp",
          "clamp_", "clamp_min", "clamp_min_", "logsigmoid", "softsign",
          "prelu"}  # fmt: skip
ELEMENTWISE = RISING | {"gelu", "silu", "mish", "hardswish"}
_MOVING = {"flatten", "reshape", "view", "permute", "transpose", "contiguous", "dropout", "dropout2d", "squeeze",
           "unsqueeze", "movedim", "to", "float"}  # fmt: skip
_POOLING = {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "boolean_dispatch"}


@dataclass(frozen=True)
class Activation:
    """What follows a layer: `function` of `scale` x its outputs + `shift`, outputs in rows (n, out).

    `scale` and `shift` (out,) are those of a batch normalisation, whose path is `norm`; None without one. `name` is
    the function's; where no activation was found it is "" and `why` says so, and the function is the identity.
    """

    name: str = ""
    function: Callable[[Tensor], Tensor] = field(default=lambda rows: rows)
    scale: Tensor | None = None
    shift: Tensor | None = None
    norm: str | None = None
    why: str = ""

    def before(self, outputs: Tensor) -> Tensor:
        """What goes into the function for the layer's outputs (n, out)."""
        if self.scale is None or self.shift is None:
            return outputs
        return outputs * self.scale.to(outputs) + self.shift.to(outputs)


@dataclass(frozen=True)
class _Call:
    function: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int


class _Watch(TorchFunctionMode):
    """Remembers which calls read which tensors. Tensors are numbered, and kept so that no number is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.readers: dict[int, list[_Call]] = {}
        self.inside = 0

    def number(self, tensor: Tensor, new: bool = False) -> int:
        if new or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.kept)
            self.kept.append(tensor)
        return self.numbers[id(tensor)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = {self.number(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute such as shape or device, or T and data
            name = "attribute" if not isinstance(result, Tensor) else name
        if name == "attribute" or name in ("dim", "size", "numel", "is_floating_point", "register_hook"):
            return result
        output = self.number(result, new=True) if isinstance(result, Tensor) else -1
        for number in read:
            self.readers.setdefault(number, []).append(_Call(func, name, args, kwargs, output))
        return result


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, list | tuple):
            flat += _tensors(value)
    return flat


def find_activations(
    model: nn.Module, specs: Sequence[LayerSpec], call: Callable[[nn.Module], Any]
) -> dict[str, Activation]:
    """What follows each layer, by name, in one call of the model, which should be in eval mode."""
    watch = _Watch()
    outputs: dict[str, list[int]] = {spec.name: [] for spec in specs}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name].append(watch.number(output))

        return hook

    hooks = [model.get_submodule(spec.name).register_forward_hook(note(spec.name)) for spec in specs]
    try:
        with torch.no_grad(), watch:
            call(model)
    finally:
        for hook in hooks:
            hook.remove()
    norms = {id(part.running_mean): path for path, part in model.named_modules()
             if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None}  # fmt: skip
    found = {}
    for spec in specs:
        follows = [_following(watch, number, spec.shape[0], norms) for number in outputs[spec.name]]
        if not follows:
            found[spec.name] = Activation(why="the model does not call it")
        elif any((f.name, f.norm) != (follows[0].name, follows[0].norm) for f in follows):
            found[spec.name] = Activation(why="it is called several times, and different things follow")
        else:
            found[spec.name] = follows[0]
    return found


def _following(watch: _Watch, number: int, units: int, norms: dict[int, str]) -> Activation:
    scale: Tensor | None = None
    shift: Tensor | None = None
    norm: str | None = None
    pooled = moved = False
    while True:
        readers = watch.readers.get(number, [])
        if len(readers) != 1:
            return _none("nothing follows" if not readers else "several functions read its outputs", scale, shift, norm)
        reader = readers[0]
        number = reader.output
        if reader.name in ELEMENTWISE and (reader.name in RISING or not pooled):
            return Activation(reader.name.rstrip("_"), _on_rows(reader), scale, shift, norm)
        if reader.name == "batch_norm" and scale is None and not (moved or pooled):
            parts = _folded(reader, units)
            if parts is None:
                return Activation(why="a batch normalisation without running statistics follows")
            scale, shift = parts
            norm = norms.get(id(_argument(reader, 1, "running_mean")))
        elif reader.name.removesuffix("_with_indices") in _POOLING or "max_pool" in reader.name:
            pooled = True
        elif reader.name in _MOVING:
            moved = True
        else:
            return _none(f"{reader.name or 'a function of its own'} follows", scale, shift, norm)


def _none(why: str, scale: Tensor | None, shift: Tensor | None, norm: str | None) -> Activation:
    return Activation(scale=scale, shift=shift, norm=norm, why=why)


def _argument(call: _Call, place: int, name: str) -> Any:
    return call.kwargs[name] if name in call.kwargs else call.args[place] if len(call.args) > place else None


def _folded(call: _Call, units: int) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a batch normalisation in evaluation, (units,) each."""
    mean, variance = _argument(call, 1, "running_mean"), _argument(call, 2, "running_var")
    weight, bias = _argument(call, 3, "weight"), _argument(call, 4, "bias")
    epsilon = _argument(call, 7, "eps")
    if mean is None or variance is None or _argument(call, 5, "training") or mean.shape != (units,):
        return None
    scale = (variance.double() + (1e-5 if epsilon is None else epsilon)).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    return scale, (0 if bias is None else bias.detach().double()) - mean.double() * scale


def _on_rows(call: _Call) -> Callable[[Tensor], Tensor]:
    """The call's function with the same settings, for rows (n, units)."""
    function, rest = call.function, call.args[1:]
    settings = {key: value for key, value in call.kwargs.items() if key not in ("input", "inplace")}
    if call.name.endswith("_") or call.name in ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu",
                                                "hardtanh", "hardswish", "hardsigmoid"):  # fmt: skip
        plain: Any = getattr(F, call.name.rstrip("_"), None) or getattr(torch, call.name.rstrip("_"))
        takes_inplace = call.name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid") and bool(rest)
        rest = () if takes_inplace else rest
        if call.name in ("leaky_relu", "elu", "celu") and len(rest) > 1:
            rest = rest[:1]
        elif call.name in ("hardtanh") and len(rest) > 2:
            rest = rest[:2]
        elif call.name == "selu":
            rest = ()
        function = plain

    def apply(rows: Tensor) -> Tensor:
        others = tuple(value.to(rows) if isinstance(value, Tensor) else value for value in rest)
        result: Tensor = function(rows, *others, **settings)
        return result

    return apply
