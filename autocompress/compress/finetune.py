"""Brief finetuning of a compressed model: masks stay, codes follow their float weights.

The forward pass sees the values that the artifact will hold; gradients reach the float weights
straight through, the tables and steps by their own rules (`quantize`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.compress.apply import Compressed, call_with, in_fast_layout
from autocompress.compress.rate import Charge, RatedCode
from autocompress.compress.structure import float_tensors
from autocompress.errors import TrialFailed
from autocompress.plan import Recipe

TEMPERATURE = 2.0
Batch = tuple[Any, Any, Any]
"""Inputs, targets, and the uncompressed model's outputs (None without distillation)."""


@dataclass(frozen=True)
class Feed:
    """Training batches: `epoch(i)` iterates over those of epoch i; `steps` is how many an epoch has."""

    epoch: Callable[[int], Iterator[Batch]]
    steps: int


def finetune(
    model: Compressed, feed: Feed, loss: Callable[[Any, Any], Tensor], recipe: Recipe, rungs: Sequence[float]
) -> Iterator[float]:
    """Train in place, stopping at each rung (epochs, rising) to yield it; a rung above 0 is at least one step.

    Adam (Kingma & Ba 2015) with a short warm-up and a cosine decay over `recipe.epochs`; tables and steps
    learn at a tenth of the rate. Raises TrialFailed when the loss is no longer finite.
    """
    total = max(1, round(recipe.epochs * feed.steps))
    if not model.codes and not any(True for _ in model.others()):
        yield from rungs  # everything is frozen: nothing to train
        return
    optimiser = _optimiser(model, recipe.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    batches = _endless(feed)
    rated = [code for code in model.codes.values() if isinstance(code, RatedCode)]
    charge = Charge(rated, recipe.rate, model.paid, total)
    for tensor in (*model.module.parameters(), *model.module.buffers()):
        tensor.data = in_fast_layout(tensor.data)
    step = 0
    for rung in rungs:
        until = min(total, max(round(rung * feed.steps), rung > 0))
        while step < until:
            inputs, targets, guide = next(batches)
            _train_mode(model.module)
            outputs = call_with(model.module, model.substitutes(), inputs)
            value = _objective(outputs, targets, guide, loss, recipe.distillation)
            if not math.isfinite(value.item()):
                raise TrialFailed(f"loss became {value.item()} at step {step} of {total}")
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            charge(step)
            optimiser.step()
            scheduler.step()
            step += 1
        yield rung


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
    q = F.softmax(guide / TEMPERATURE, dim=axis)
    positions = outputs.numel() // outputs.shape[axis]
    return TEMPERATURE**2 * F.kl_div(log_p, q, reduction="sum") / positions


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
    groups: list[dict[str, Any]] = [
        {"params": [*(t for quick, _ in trained for t in quick), *model.others()], "lr": rate},
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
