"""Layers' inputs of few values: how ranges are found, learned and applied.

Notation: x an input of a layer, s the scale, z the zero point, a whole number; b bits give the levels 0 .. top:

    q = clamp(round(x / s) + z, 0, top)        x' = s (q - z)

Zero is always a level, so that what ReLU and padding leave stays zero. Ranges are fitted to some training
examples; finetuning learns s and z (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576, its beta being -s z).

A layer's modules get a forward pre-hook, so that the model keeps its classes and state keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.compress.calibrate import places_of, watched
from autocompress.errors import PlanError
from autocompress.plan import LayerSpec

SAMPLED = 1 << 16
"""Values of a layer's inputs that its range is fitted to, drawn evenly."""
_SHARES = tuple(0.01 ** (k / 39) for k in range(40))
"""Ranges tried, as shares of the widest."""
_LEAST = 1e-12
"""The smallest scale: inputs that are all zero have a range too."""


@dataclass(frozen=True)
class Grid:
    """A fixed range: called with a tensor it gives the nearest levels' values, in the tensor's dtype.

    Standard operators, so that it can be exported. Gradients pass straight through inside the range.
    """

    bits: int
    scale: float
    zero_point: int

    @property
    def top(self) -> int:
        """The highest level."""
        return (1 << self.bits) - 1

    def __call__(self, x: Tensor) -> Tensor:
        wide, low, high = _wide(x), -self.zero_point, self.top - self.zero_point
        scale = float(np.float32(self.scale))
        value = wide.detach().mul(float(np.float32(1) / np.float32(scale))).round().clamp(low, high).mul(scale)
        if wide.requires_grad and torch.is_grad_enabled():
            inside = wide.clamp((low - 0.5) * scale, (high + 0.5) * scale)
            value = value + (inside - inside.detach())
        return value.to(x.dtype)


class Range:
    """A range that is learned: `log_scale` () and, where inputs have both signs, `shift` () = z / top are leaf tensors.

    Called with a tensor it does what its `grid()` does, differentiable in the tensor and in these. Inputs that need
    no gradient, those of the model itself, leave them as they are.
    """

    def __init__(self, grid: Grid, device: torch.device | str | None = None) -> None:
        self.bits, self.top = grid.bits, grid.top
        self.log_scale = torch.tensor(grid.scale, device=device).log().requires_grad_()
        self.shift = torch.tensor(grid.zero_point / grid.top, device=device)
        if 0 < grid.zero_point < grid.top:
            self.shift.requires_grad_()

    @property
    def trained(self) -> list[Tensor]:
        """The leaf tensors."""
        return [self.log_scale, self.shift] if self.shift.requires_grad else [self.log_scale]

    def __call__(self, x: Tensor) -> Tensor:
        if not x.requires_grad:  # inputs of the model itself: nothing learns before them, and backward can end here
            with torch.no_grad():
                return _FakeQuantize.apply(x, self.log_scale.exp(), self.shift * self.top, self.top)  # type: ignore[no-untyped-call, no-any-return]
        return _FakeQuantize.apply(x, self.log_scale.exp(), self.shift * self.top, self.top)  # type: ignore[no-untyped-call, no-any-return]

    def grid(self) -> Grid:
        """The range at this moment, as a file carries it: six digits of the scale."""
        scale, zero = self.log_scale.detach().exp(), (self.shift.detach() * self.top).round().clamp(0, self.top)
        return Grid(self.bits, float(f"{max(_LEAST, float(scale)):.6g}"), int(zero))

    def state(self) -> Tensor:
        """(2,), what `with_state` takes."""
        return torch.stack([self.log_scale.detach(), self.shift.detach()])

    def with_state(self, state: Tensor) -> Range:
        """The range itself, its values taken from another one's `state`."""
        with torch.no_grad():
            self.log_scale.copy_(state[0])
            self.shift.copy_(state[1])
        return self


class _FakeQuantize(torch.autograd.Function):
    """(x, s, z, top) -> x'. Straight through to x inside the range; to s and z by LSQ+'s equations 4 and 5.

    dx'/ds = q - z - (inside ? x / s : 0), dx'/dz = inside ? 0 : -s. Bit for bit what
    torch.fake_quantize_per_tensor_affine gives, in vectorised passes: about 20 times faster on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        wide, zero = _wide(x), zero.round().clamp(0, top)
        level = wide.mul(scale.reciprocal()).round_().add_(zero)
        value = level.clamp(0, top).sub_(zero).mul_(scale)
        ctx.save_for_backward(wide, level, value, scale)
        ctx.top = top
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, level, value, scale = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        # Python numbers and no masks: with tensors of bool these passes take ten times as long on a CPU
        passed = torch.ops.aten.hardtanh_backward(grad, level, -0.5, ctx.top + 0.5)
        stopped = grad - passed
        on_zero = -stopped.sum() * scale if ctx.needs_input_grad[2] else None
        on_scale = ((value - x).mul_(passed).sum() + stopped.mul_(value).sum()) / scale
        return passed.to(grads[0].dtype), on_scale, on_zero, None


@dataclass(frozen=True)
class Hook:
    """A forward pre-hook that passes a layer's input through a `Grid` or a `Range`."""

    through: Grid | Range

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.through(args[0]), *args[1:]), kwargs
        return args, kwargs | {"input": self.through(kwargs["input"])}


def attach(model: nn.Module, name: str, through: Grid | Range, others: Iterable[str] = ()) -> None:
    """From now on the inputs of the module of that path, and of `others`, pass through the range."""
    for module in {id(m): m for m in (model.get_submodule(path) for path in (name, *others))}.values():
        module.register_forward_pre_hook(Hook(through), with_kwargs=True)


def attached(model: nn.Module) -> dict[str, Grid | Range]:
    """The ranges of a model's layers, by module path."""
    return {
        path: hook.through
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Hook)
    }


def sample(
    model: nn.Module, specs: Sequence[LayerSpec], batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """By layer name some values of its inputs over the batches, (n,) float64 on the CPU, the extremes among them.

    Layers whose inputs cannot be seen are left out (`calibrate`).
    """
    places = places_of(model, specs)
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, _: nn.Module, x: Tensor) -> None:
        flat = x.detach().flatten()
        step = max(1, flat.numel() // SAMPLED)  # odd, or a column of a matrix would be missed
        some = torch.cat([flat[:: step | 1], flat.min()[None], flat.max()[None]])
        seen.setdefault(name, []).append(some.double().cpu())

    with torch.no_grad(), watched(model, places, note):
        for inputs in batches:
            call(model, inputs)
    return {name: torch.cat(seen[name]) for name in places if name in seen}


def fitted(values: Tensor, bits: int, clipping: str = "fitted", power: float = 1.5) -> Grid:
    """The range of `bits` for these values (n,).

    `clipping`: "minmax" spans all of them, "percentile" all but a thousandth at either end, "fitted" has the least sum
    of |error|^`power` among 40 shares of the widest range, down to a hundredth. Squares follow outliers too far: with
    8 bits in Llama 15M, perplexity 2.90, the power 1.5 gives 2.99, squares 3.24, magnitudes 3.71, "minmax" 3.21 and
    "percentile" 3.73; on small image nets all but "minmax" are alike.
    """
    values = values.double()
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if clipping == "percentile":
        ends = torch.quantile(values[:: values.numel() // 1_000_000 + 1], torch.tensor([0.001, 0.999]).to(values))
        low, high = min(0.0, float(ends[0])), max(0.0, float(ends[1]))
    if clipping != "fitted":
        return _between(low, high, bits)

    def error(grid: Grid) -> float:
        lowest, highest = -grid.zero_point, grid.top - grid.zero_point
        value = torch.round(values / grid.scale).clamp_(lowest, highest).mul_(grid.scale)
        return float(value.sub_(values).abs_().pow_(power).sum())

    return min((_between(low * share, high * share, bits) for share in _SHARES), key=error)


def _between(low: float, high: float, bits: int) -> Grid:
    top = 2**bits - 1
    scale = float(f"{max(_LEAST, (high - low) / top):.6g}")
    return Grid(bits, scale, min(top, max(0, round(-low / scale))))


class Grids:
    """The ranges of a model's layers, each fitted when a plan first needs it, to values that are sampled once."""

    def __init__(self, sampled: Callable[[], Mapping[str, Tensor]]) -> None:
        self._sample, self._fitted = sampled, dict[tuple[str, int], Grid]()

    @cached_property
    def _values(self) -> Mapping[str, Tensor]:
        return self._sample()

    def sees(self, spec: LayerSpec) -> bool:
        """Whether a layer's inputs can be seen."""
        return spec.name in self._values

    def __call__(self, spec: LayerSpec, bits: int) -> Grid:
        """The range of a layer's input. Raises PlanError for a layer whose inputs cannot be seen."""
        key = spec.name, bits
        if key not in self._fitted:
            values = self._values.get(spec.name)
            if values is None:
                reached = "a parent module computes with its weight by itself, or no example reaches it"
                because = reached if spec.seen else f"{spec.whole_because}, whose inputs are not looked at"
                raise PlanError(f"layer {spec.label!r}: activation_bits is {bits}, allowed: 32 ({because})")
            self._fitted[key] = fitted(values, bits)
        return self._fitted[key]


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32 where it has fewer bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
