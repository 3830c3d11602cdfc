"""A task's data as batches, and what its model gives on a whole split.

A split is a `Dataset` of (input, target), a pair of tensors with examples along the first axis,
or a `DataLoader`. A batch is a pair (inputs, targets).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from autocompress.compress.structure import like, map_tensors
from autocompress.errors import TaskError, TrialFailed
from autocompress.tasks.task import Task
from autocompress.tasks.wording import one_line, shortened

Batch = tuple[Any, Any]
Device = torch.device | str | None


def is_pair(data: Any) -> bool:
    """Whether `data` is a pair of tensors."""
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data)


def batches(data: Any, batch_size: int, *, shuffle_seed: int | None, device: Device) -> Iterator[Batch]:
    """One pass over `data`, on `device` (where None, as the data has it).

    A seed means training: examples in an order that follows from the seed alone, and a last batch
    of a single example is dropped where another came before it, since batch normalisation
    cannot train on it. None means evaluation: every example, in order. A `DataLoader` is passed
    through as it is, with its own batch size, order and randomness. The global random state
    is left alone, but for what the data itself and a `DataLoader` draw from it.
    """
    passed: Iterator[Batch]
    if isinstance(data, DataLoader):
        passed = (_as_batch(batch) for batch in data)
    elif is_pair(data):
        passed = _pair_batches(data, batch_size, shuffle_seed)
    else:
        passed = _dataset_batches(data, batch_size, shuffle_seed)
    for inputs, targets in passed:
        yield to_device(inputs, device), to_device(targets, device)


def first_batch(data: Any, batch_size: int) -> Batch:
    """The first batch in evaluation order. Raises TaskError where there is none."""
    for batch in batches(data, batch_size, shuffle_seed=None, device=None):
        return batch
    raise TaskError("data is empty, allowed: at least one example")


def first_of(inputs: Any) -> Any:
    """The inputs of a batch's first example."""
    return map_tensors(inputs, lambda tensor: tensor[:1] if tensor.dim() else tensor)


def num_examples(data: Any) -> int | None:
    """The number of examples, None where the data does not tell it."""
    if is_pair(data):
        return len(data[0])
    try:
        sized: Any = data.dataset if isinstance(data, DataLoader) else data
        return len(sized)
    except TypeError:
        return None


def num_batches(data: Any, batch_size: int, *, training: bool = True) -> int | None:
    """How many batches one pass of `batches` gives, None where the data does not tell it."""
    if isinstance(data, DataLoader):
        try:
            return len(data)
        except TypeError:
            return None
    examples = num_examples(data)
    if examples is None:
        return None
    full = math.ceil(examples / batch_size)
    return full - 1 if training and _drops_last(examples, batch_size) else full


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`; a tuple or list becomes positional, a mapping keyword arguments."""
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs)


def predict(model: nn.Module, data: Any, batch_size: int = 256, device: Device = None) -> Batch:
    """Outputs and targets of the whole split, joined along the first axis, on the CPU.

    The model runs in evaluation mode without gradients on `device` (where None, on its own) and
    its training flags are then as before. Raises TaskError where batches cannot be joined.
    """
    device = device or model_device(model)
    outputs, targets = [], []
    with evaluating(model), torch.no_grad():
        for inputs, target in batches(data, batch_size, shuffle_seed=None, device=device):
            outputs.append(to_device(call_model(model, inputs), "cpu"))
            targets.append(to_device(target, "cpu"))
    if not outputs:
        raise TaskError("data is empty, allowed: at least one example")
    return join(outputs), join(targets)


def evaluate(
    task: Task,
    model: nn.Module,
    split: Literal["train", "val", "test"],
    *,
    batch_size: int = 256,
    device: Device = None,
) -> float:
    """The task's metric of `model` on a whole split. Raises TrialFailed unless it is a finite number."""
    outputs, targets = predict(model, getattr(task, split), batch_size, device)
    return finite_metric(task, outputs, targets, split)


def finite_metric(task: Task, outputs: Any, targets: Any, split: str) -> float:
    """The task's metric of these outputs, as a float. Raises TrialFailed unless it is a finite number."""
    named = f"metric {metric_name(task)!r} on {split}"
    value: Any
    try:
        value = task.metric(outputs, targets)
    except Exception as error:
        raise TrialFailed(f"{named} raised {one_line(error)}") from error
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise TrialFailed(f"{named} gave {shortened(value)}, allowed: a finite number")
    return number


def metric_name(task: Task) -> str:
    """The metric's name for users: `Task.metric_name`, else the function's own, else "metric"."""
    return task.metric_name or _own_name(task.metric, "metric")


def loss_name(task: Task) -> str:
    """The loss function's own name, else "loss"."""
    return _own_name(task.loss, "loss")


def example_inputs(task: Task) -> tuple[Any, ...]:
    """The positional inputs of one call, on the CPU: the task's own, else one example of `val`.

    Raises TaskError where the inputs are a mapping, which has no positions.
    """
    if task.example_inputs is not None:
        return tuple(task.example_inputs)
    inputs, _ = first_batch(task.val, 1)
    if isinstance(inputs, Mapping):
        raise TaskError(
            f"task {task.name!r}: inputs are a mapping; give example_inputs, the positional inputs of one call"
        )
    parts = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(part[:1].cpu() if isinstance(part, torch.Tensor) and part.dim() else part for part in parts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode for a while; each module then has its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, flag in flags:
            module.training = flag


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer, the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(value: Any, device: Device) -> Any:
    """`value` with each tensor in it, also inside tuples, lists and mappings, on `device` (None: where it is)."""
    if device is None:
        return value
    return map_tensors(value, lambda tensor: tensor.to(device))


def join(parts: list[Any]) -> Any:
    """What a split gave batch by batch, joined along the first axis: tensors, or tuples or mappings of them.

    Scalars are stacked. Raises TaskError where shapes or kinds do not fit.
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        try:
            return torch.stack(parts) if first.dim() == 0 else torch.cat(parts)
        except (RuntimeError, TypeError) as error:
            raise TaskError(f"batches cannot be joined along the first axis: {one_line(error)}") from error
    if isinstance(first, Mapping):
        return type(first)({key: join([part[key] for part in parts]) for key in first})  # type: ignore[call-arg]
    if isinstance(first, tuple | list):
        if any(len(part) != len(first) for part in parts):
            return [item for part in parts for item in part]  # such as lists of strings
        return like(first, [join(list(column)) for column in zip(*parts, strict=True)])
    return None if first is None else parts


def _pair_batches(pair: Any, batch_size: int, shuffle_seed: int | None) -> Iterator[Batch]:
    inputs, targets = pair
    examples = len(inputs)
    if shuffle_seed is None:
        for start in range(0, examples, batch_size):
            yield inputs[start : start + batch_size], targets[start : start + batch_size]
        return
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(shuffle_seed))
    kept = examples - 1 if _drops_last(examples, batch_size) else examples
    for start in range(0, kept, batch_size):
        chosen = order[start : start + batch_size]
        yield inputs.index_select(0, chosen.to(inputs.device)), targets.index_select(0, chosen.to(targets.device))


def _dataset_batches(dataset: Any, batch_size: int, shuffle_seed: int | None) -> Iterator[Batch]:
    training = shuffle_seed is not None
    generator = torch.Generator().manual_seed(shuffle_seed or 0)  # always one, or the loader draws from the global
    ordered = isinstance(dataset, IterableDataset)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size, shuffle=training and not ordered, num_workers=0, generator=generator
    )
    examples = num_examples(dataset)
    most = num_batches(dataset, batch_size, training=training) if examples is not None else None
    for number, batch in enumerate(loader):
        if number == most:
            return
        yield _as_batch(batch)


def _drops_last(examples: int, batch_size: int) -> bool:
    return batch_size > 1 and examples > batch_size and examples % batch_size == 1


def _as_batch(batch: Any) -> Batch:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise TaskError(f"a batch is a {type(batch).__name__}{length}, allowed: a pair (inputs, targets)")


def _own_name(function: Any, default: str) -> str:
    function = getattr(function, "func", function)  # of functools.partial
    name = str(getattr(function, "__name__", type(function).__name__))
    return default if name == "<lambda>" else name
