"""Brief finetuning of a compressed model: masks stay, codes follow their float weights.

The forward pass sees the values that the artifact will hold; gradients reach the float weights
straight through, the tables and steps by their own rules (`quantize`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.compress.apply import Compressed, call_with
from autocompress.compress.infomax import Tap, info_nce
from autocompress.compress.rate import Charge, RatedCode
from autocompress.compress.structure import float_tensors, map_tensors
from autocompress.errors import PlanError, TrialFailed
from autocompress.plan import LayerSpec, Recipe

TEMPERATURE = 2.0
WATCHED = 10
"""Steps between two looks at the losses on a GPU, each of which waits for it; divides `rate.REFRESH`."""
Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Any, ...]
"""Inputs, targets, the uncompressed model's outputs (None without distillation), with InfoMax its features (N, d)."""


@dataclass(frozen=True)
class Feed:
    """Training batches: `epoch(i)` iterates over those of epoch i; `steps` is how many an epoch has.

    `layer` is the one whose inputs are the features of InfoMax.
    """

    epoch: Callable[[int], Iterator[Batch]]
    steps: int
    layer: LayerSpec | None = None


def finetune(
    model: Compressed, feed: Feed, loss: Callable[[Any, Any], Tensor], recipe: Recipe, rungs: Sequence[float]
) -> Iterator[float]:
    """Train in place, stopping at each rung (epochs, rising) to yield it; a rung above 0 is at least one step.

    Adam (Kingma & Ba 2015) with a short warm-up and a cosine decay over `recipe.epochs`; tables and steps
    learn at a tenth of the rate. A step takes `recipe.accumulation` batches, or all of an epoch if these are fewer, of
    which it sees the mean.
    Raises TrialFailed when the loss is no longer finite, PlanError for a precision that the device lacks.
    """
    recipe = replace(recipe, accumulation=min(recipe.accumulation, feed.steps))
    per_epoch = feed.steps / recipe.accumulation
    total = max(1, round(recipe.epochs * per_epoch))
    if not model.codes and not model.ranges and not any(True for _ in model.others()):
        yield from rungs  # everything is frozen: nothing to train
        return
    device = model.device
    tap = Tap(model.module, feed.layer) if recipe.infomax > 0 and feed.layer is not None else None
    optimiser, scaler = _optimiser(model, recipe.learning_rate), _scaler(recipe.precision, device)
    rates = [group["lr"] for group in optimiser.param_groups]
    batches, watch = _endless(feed), _Watch(total, device)
    rated = [code for code in model.codes.values() if isinstance(code, RatedCode)]
    charge = Charge(rated, recipe.rate, model.paid, total, epoch=per_epoch)
    batches = _laid_out(model, batches, recipe.precision)
    step = 0
    for rung in rungs:
        until = min(total, max(round(rung * per_epoch), rung > 0))
        _train_mode(model.module)
        while step < until:
            optimiser.zero_grad(set_to_none=True)
            batch = next(batches)
            charge.clear(step, partial(_evaluated, model, batch[0]))
            values = model.substitutes()
            leaves = values if recipe.accumulation == 1 else _leaves(values)
            for again in range(recipe.accumulation):
                batch = next(batches) if again else batch
                value = _forward(model, leaves, tap, batch, recipe, loss=loss)
                watch(value, step)
                scaler.scale(value / recipe.accumulation).backward()  # type: ignore[no-untyped-call]
            if leaves is not values:
                _pass_on(leaves, values)
            scaler.unscale_(optimiser)
            charge(step)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * _rate(step, total)
            scaler.step(optimiser)
            scaler.update()
            step += 1
        watch.look()
        yield rung


def _laid_out(model: Compressed, batches: Iterator[Batch], precision: str) -> Iterator[Batch]:
    """The batches; the model is in the fast layout where it bears that: one that calls `view` on images does not."""
    first = next(batches)
    model.lay_out(fast=True)
    try:
        with _at_precision(precision, model.device):
            _evaluated(model, first[0])
    except RuntimeError:  # what else there is, a step will say
        model.lay_out(fast=False)
    return chain([first], batches)


@torch.no_grad()
def _evaluated(model: Compressed, inputs: Any) -> list[Tensor]:
    """The model's float outputs for a batch, in evaluation mode."""
    flags = [(module, module.training) for module in model.module.modules()]
    model.module.eval()
    try:
        return [t.float() for t in float_tensors(call_with(model.module, model.substitutes(), inputs))]
    finally:
        for module, flag in flags:
            module.training = flag


def _leaves(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values cut off from what they come from, where the gradients of several batches gather."""
    leaves = {id(value): value.detach().requires_grad_(value.requires_grad) for value in values.values()}
    return {key: leaves[id(value)] for key, value in values.items()}


def _pass_on(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Go on backward from the gradients that have gathered in the leaves: once a step instead of once a batch."""
    reached = {id(value): key for key, value in values.items() if leaves[key].grad is not None}
    if reached:
        keys = reached.values()
        torch.autograd.backward([values[key] for key in keys], [leaves[key].grad for key in keys])


def _forward(
    model: Compressed, substitutes: Mapping[str, Tensor], tap: Tap | None, batch: Batch, recipe: Recipe, *, loss: Loss
) -> Tensor:
    """The objective on a batch: the model runs at the recipe's precision, the losses in float32."""
    inputs, targets, guide, *others = batch
    with _at_precision(recipe.precision, model.device), tap or nullcontext():
        outputs = call_with(model.module, substitutes, inputs)
    if recipe.precision != "float32":
        outputs = map_tensors(outputs, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    value = _objective(outputs, targets, guide, loss, recipe.distillation)
    return value if tap is None else value + recipe.infomax * info_nce(tap.features, others[0])


def _at_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def check_precision(precision: str, device: torch.device) -> None:
    """Raise PlanError for a precision that the device lacks."""
    if precision == "float16" and device.type != "cuda":
        raise PlanError(f"recipe: precision is 'float16' on device {device.type!r}, allowed there: float32, bfloat16")


def _scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What keeps float16's gradients from vanishing; it passes everything on as it is at other precisions."""
    check_precision(precision, device)
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


class _Watch:
    """Raises TrialFailed for a loss that is not finite, in its step on a CPU, within `WATCHED` steps on a GPU."""

    def __init__(self, total: int, device: torch.device) -> None:
        self.total, self.every = total, 1 if device.type == "cpu" else WATCHED
        self.seen: list[tuple[int, Tensor]] = []

    def __call__(self, value: Tensor, step: int) -> None:
        self.seen.append((step, value.detach()))
        if step % self.every == 0:
            self.look()

    def look(self) -> None:
        """Look at all losses since the last time."""
        if not self.seen:
            return
        losses = torch.stack([value for _, value in self.seen]).tolist()
        for (step, _), loss in zip(self.seen, losses, strict=True):
            if not math.isfinite(loss):
                raise TrialFailed(f"loss became {loss} at step {step} of {self.total}")
        self.seen.clear()


def _train_mode(module: nn.Module) -> None:
    """Training mode, but for the parts that are frozen: their running statistics are to stay."""
    module.train()
    for part in module.modules():
        if part._buffers and is_frozen(part):
            part.eval()


def is_frozen(part: nn.Module) -> bool:
    """Whether a module has parameters of its own, none of which is to be trained."""
    own = list(part.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def distillation_loss(outputs: Tensor, guide: Tensor, targets: Any) -> Tensor:
    """How far the outputs are from the uncompressed model's, a scalar.

    Class scores (targets are integers, of the outputs' shape without axis 1, or without the last):
    T^2 x the divergence of distributions softened along that axis (Hinton et al. 2015,
    arXiv 1503.02531, T = 2), a mean over positions; anything else: mean squared difference.
    """
    axis = _class_axis(outputs, targets)
    if axis is None:
        return F.mse_loss(outputs, guide)
    log_p = F.log_softmax(outputs / TEMPERATURE, dim=axis)
    log_q = F.log_softmax(guide / TEMPERATURE, dim=axis)
    positions = outputs.numel() // outputs.shape[axis]
    return TEMPERATURE**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / positions


def _distance(outputs: Any, guide: Any, targets: Any) -> Tensor:
    """The mean distillation loss over the float tensors in the outputs and in the uncompressed model's, in order.

    The last ones of the longer list are left out: some models give more in training than in evaluation.
    """
    pairs = list(zip(float_tensors(outputs), float_tensors(guide), strict=False))
    if not pairs:
        raise TrialFailed(
            f"distillation needs float tensors in the model's outputs, which are a {type(outputs).__name__}"
        )
    for index, (mine, other) in enumerate(pairs):
        if mine.shape != other.shape:
            shapes = f"{list(mine.shape)}, the uncompressed model's {list(other.shape)}"
            raise TrialFailed(f"distillation: tensor {index} of the outputs has shape {shapes}")
    distances = [distillation_loss(mine, other, targets) for mine, other in pairs]
    return distances[0] if len(distances) == 1 else torch.stack(distances).mean()


def _class_axis(outputs: Tensor, targets: Any) -> int | None:
    """The axis of class scores; None where the targets are no class numbers."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or outputs.dim() < 2:
        return None
    if targets.shape == outputs.shape[:1] + outputs.shape[2:]:
        axis = 1
    elif targets.shape == outputs.shape[:-1]:
        axis = -1
    else:
        return None
    return axis if outputs.shape[axis] > 1 else None


def _objective(
    outputs: Any, targets: Any, guide: Any, loss: Callable[[Any, Any], Tensor], distillation: float
) -> Tensor:
    if guide is None or distillation == 0:
        return loss(outputs, targets)
    distance = _distance(outputs, guide, targets)
    return distance if distillation == 1 else (1 - distillation) * loss(outputs, targets) + distillation * distance


def _optimiser(model: Compressed, rate: float) -> torch.optim.Optimizer:
    trained = [code.trained() for code in model.codes.values()]
    ranges = [tensor for found in model.ranges.values() for tensor in found.trained]
    groups: list[dict[str, Any]] = [
        {"params": [*(t for quick, _ in trained for t in quick), *ranges, *model.others()], "lr": rate},
        {"params": [t for _, slow in trained for t in slow], "lr": rate / 10},
    ]
    tensors = [tensor for group in groups for tensor in group["params"]]
    fused = all(t.is_floating_point() and t.device.type in ("cpu", "cuda") for t in tensors)
    return torch.optim.Adam([g for g in groups if g["params"]], fused=fused)


def _rate(step: int, total: int) -> float:
    warm = min(20, total // 10)
    ramp = (step + 1) / (warm + 1) if step < warm else 1.0
    return ramp * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))


def _endless(feed: Feed) -> Iterator[Batch]:
    epoch = 0
    while True:
        empty = True
        for batch in feed.epoch(epoch):
            empty = False
            yield batch
        if empty:
            raise TrialFailed("the training data gave no batch")
        epoch += 1
