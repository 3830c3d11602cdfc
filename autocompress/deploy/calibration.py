"""Inputs that show the ranges of activations: examples of the training data, never of the test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from autocompress.errors import ExportError
from autocompress.tasks.batches import batches
from autocompress.tasks.task import Task

EXAMPLES = 512


def training_inputs(task: Task, names: Sequence[str], *, count: int = EXAMPLES) -> list[dict[str, Tensor]]:
    """Batches of inputs by name, `count` training examples in all or all that there are; always the same.

    They are drawn at random: data is often sorted by class. A task that brings a `DataLoader` gives its first
    batches. `names` are those of a call's inputs, in order. Raises ExportError where there is no example.
    """
    found: list[dict[str, Tensor]] = []
    left = count
    for inputs, _ in batches(task.train, task.batch_size, shuffle_seed=0, device="cpu"):
        batch = _by_name(inputs, names)
        found.append({name: tensor[:left] for name, tensor in batch.items()})
        left -= len(next(iter(batch.values())))
        if left <= 0:
            break
    if not found:
        raise ExportError(f"task {task.name!r} has no training example to calibrate int8 with")
    return found


def _by_name(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return {name: inputs[name] for name in names}
    return dict(zip(names, [inputs] if isinstance(inputs, Tensor) else inputs, strict=True))
