"""The `Task`: what a user brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    Data = Any
    Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A trained model with its data, loss and metric.

    `model` is held as it is to be deployed (`compress.unwrapped`): normalised and otherwise computed weights as plain
    ones, compiled and data-parallel modules as what they wrap.
    `train`, `val`, `test`: each a `Dataset` of (input, target), a pair of tensors with examples
    along the first axis, or a `DataLoader`. An input that is a tuple or a mapping is passed to
    the model as `model(*input)` or `model(**input)`. Finetuning uses `train`, choosing uses `val`;
    `test` is measured for the front only.
    `loss(outputs, targets)` gives a scalar tensor; `metric(outputs, targets)` a float over a
    whole split, to be maximised or minimised as `direction` says.
    `batch_size` is that of finetuning (a `DataLoader` keeps its own). `example_inputs`, the
    positional inputs of one call, are taken from the first batch of `val` when left out.
    `augment(inputs)` gives a varied training batch's inputs, on the device, of the same structure;
    finetuning alone calls it, each time anew. What it draws from the global random state follows from
    the trial's seed. It travels to workers, so it must be picklable (`tasks.augment.Augment` is).
    `finetune` takes the place of `compress.finetune.finetune`, and is called as that is:
    `finetune(model, feed, loss, recipe, rungs)` gives an iterator that trains up to each of `rungs`, epochs,
    rising, and yields there. `model.substitutes()` are the weights that the file will hold, differentiable, by state
    key, for `compress.apply.call_with(model.module, substitutes, inputs)`; what to train is `code.trained()` of
    each of `model.codes.values()`, `found.trained` of each of `model.ranges.values()`, and `model.others()`.
    `feed.epoch(i)` gives the batches of epoch i: inputs, targets, the uncompressed model's outputs or None, with
    InfoMax its features. Under a rate it has to call a `compress.rate.Charge` in each step itself: else no price is
    paid. It must be picklable too.
    """

    model: nn.Module
    train: Data
    val: Data
    test: Data
    loss: Loss
    metric: Callable[[Any, Any], float]
    direction: Literal["maximize", "minimize"] = "maximize"
    name: str = "task"
    example_inputs: tuple[Any, ...] | None = None
    batch_size: int = 128
    metric_name: str = ""
    augment: Callable[[Any], Any] | None = None
    finetune: Callable[..., Iterator[Any]] | None = None

    def __post_init__(self) -> None:
        from torch import nn

        from autocompress.compress.unwrapped import unwrapped

        if isinstance(self.model, nn.Module):
            object.__setattr__(self, "model", unwrapped(self.model))
