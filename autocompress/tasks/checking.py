"""Whether a `Task` keeps its contract: each mistake is one line that names the field, its value and what is allowed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from autocompress.compress.structure import map_tensors
from autocompress.errors import AutocompressError, TaskError
from autocompress.tasks import randomness
from autocompress.tasks.augment import augmented
from autocompress.tasks.batches import (
    Batch,
    call_model,
    finite_metric,
    first_batch,
    first_of,
    is_pair,
    loss_name,
    model_device,
    to_device,
)
from autocompress.tasks.task import Task
from autocompress.tasks.wording import describe, one_line

SPLITS = ("train", "val", "test")
_EXAMPLES = 64  # in the batch of a trial run, unless a DataLoader has its own


def check_task(task: Task) -> None:
    """Raise TaskError unless every field is right and model, loss and metric work on a first batch.

    Model, data and global random state are left untouched; a copy of the model runs, on the
    model's device: in evaluation mode on `val`, then in training mode on `train`.
    """
    check_fields(task)
    where = f"task {task.name!r}"
    try:
        model = copy.deepcopy(task.model)
    except Exception as error:
        raise TaskError(f"{where}: model cannot be copied with copy.deepcopy: {one_line(error)}") from error
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise TaskError(f"{where}: model holds no values in {key!r}, which is on the meta device: load its weights")
    device = model_device(model)
    with randomness.preserved():
        parts = {split: to_device(_peek(task, split), device) for split in SPLITS}
        outputs = _check_step(task, model.eval(), parts["val"], "val")
        _check_metric(task, outputs, parts["val"][1])
        _check_example(task, model, parts["val"][0])
        _check_step(task, model.train(), _augmented(task, parts["train"]), "train", augmented=task.augment is not None)


def check_fields(task: Task) -> None:
    """Raise TaskError for a field of the wrong type or value, or splits that share their data; runs nothing."""
    if not isinstance(task, Task):
        raise TaskError(f"task is a {type(task).__name__}, allowed: an autocompress.Task")
    where = f"task {task.name!r}"
    _require(isinstance(task.name, str) and bool(task.name), "task", "name", task.name, "a text that is not empty")
    _require(isinstance(task.model, nn.Module), where, "model", task.model, "a torch.nn.Module")
    _require(task.direction in ("maximize", "minimize"), where, "direction", task.direction, "'maximize' or 'minimize'")
    _require(callable(task.loss), where, "loss", task.loss, "a function loss(outputs, targets)")
    _require(callable(task.metric), where, "metric", task.metric, "a function metric(outputs, targets)")
    size = task.batch_size
    _require(type(size) is int and size >= 1, where, "batch_size", size, "a whole number, 1 or more")
    _require(isinstance(task.metric_name, str), where, "metric_name", task.metric_name, "a text")
    inputs = task.example_inputs
    _require(inputs is None or isinstance(inputs, tuple), where, "example_inputs", inputs, "a tuple, or None")
    augment = task.augment
    _require(augment is None or callable(augment), where, "augment", augment, "a function augment(inputs), or None")
    own = task.finetune
    allowed = "a function finetune(model, feed, loss, recipe, rungs), or None"
    _require(own is None or callable(own), where, "finetune", own, allowed)
    for split in SPLITS:
        _check_split(where, split, getattr(task, split))
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if _same(getattr(task, one), getattr(task, other)):
            raise TaskError(f"{where}: {one} and {other} are the same data; the splits must be disjoint")


def _check_split(where: str, split: str, data: Any) -> None:
    if is_pair(data):
        lengths = [len(part) if part.dim() else None for part in data]
        if lengths[0] != lengths[1] or lengths[0] is None:
            shapes = " and ".join(str(tuple(part.shape)) for part in data)
            raise TaskError(
                f"{where}: {split} is tensors of shapes {shapes}, allowed: the same number along the first axis"
            )
    else:
        indexed = (
            hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes | Mapping)
        )
        of_arrays = isinstance(data, tuple | torch.Tensor) or hasattr(data, "__array__")
        fits = isinstance(data, Dataset | DataLoader) or (indexed and not of_arrays)
        _require(fits, where, split, data, "a Dataset of (input, target), a pair of tensors, or a DataLoader")
    try:
        empty = len(data[0] if is_pair(data) else data) == 0
    except TypeError:  # an iterable data set tells no length; an empty one shows at its first batch
        empty = False
    if empty:
        raise TaskError(f"{where}: {split} is empty, allowed: at least one example")


def _same(one: Any, other: Any) -> bool:
    return one is other or (is_pair(one) and is_pair(other) and one[0] is other[0])


def _peek(task: Task, split: str) -> Batch:
    """The first batch; a `DataLoader`'s own generator is then where it was."""
    data = getattr(task, split)
    generators = [
        g for g in (getattr(data, "generator", None), getattr(getattr(data, "sampler", None), "generator", None)) if g
    ]
    states = [generator.get_state() for generator in generators]
    try:
        return first_batch(data, min(task.batch_size, _EXAMPLES))
    except TaskError as error:
        raise TaskError(f"task {task.name!r}: {split}: {error}") from error
    except Exception as error:
        raise TaskError(f"task {task.name!r}: {split} gives no batch: {one_line(error)}") from error
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _augmented(task: Task, batch: Batch) -> Batch:
    """The batch as finetuning would see it."""
    try:
        return augmented(task.augment, batch[0]), batch[1]
    except TaskError as error:
        raise TaskError(f"task {task.name!r}: on the first batch of train {error}") from error


def _check_step(task: Task, model: nn.Module, batch: Batch, split: str, *, augmented: bool = False) -> Any:
    """The outputs on that batch, detached; the loss on it was a finite scalar with a gradient."""
    where = f"task {task.name!r}"
    which = f"the first batch of {split}{' as augment made it' if augmented else ''}"
    inputs, targets = batch
    mode = "training" if model.training else "evaluation"
    with torch.enable_grad():
        try:
            outputs = call_model(model, inputs)
        except Exception as error:
            given = f"on {which}, {describe(inputs)}"
            raise TaskError(f"{where}: model fails in {mode} mode {given}: {one_line(error)}") from error
        named = f"loss {loss_name(task)!r} on {which}"
        try:
            loss = task.loss(outputs, targets)
        except Exception as error:
            given = f"outputs {describe(outputs)}, targets {describe(targets)}"
            raise TaskError(f"{where}: {named} fails, {given}: {one_line(error)}") from error
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise TaskError(f"{where}: {named} is a {describe(loss)}, allowed: a scalar tensor, shape ()")
    if not math.isfinite(loss.item()):
        raise TaskError(f"{where}: {named} is {loss.item()}, allowed: a finite number")
    if any(p.requires_grad for p in model.parameters()) and not loss.requires_grad:
        raise TaskError(f"{where}: {named} has no gradient, allowed: one that reaches the model's parameters")
    return map_tensors(outputs, torch.Tensor.detach)


def _check_metric(task: Task, outputs: Any, targets: Any) -> None:
    try:
        finite_metric(task, to_device(outputs, "cpu"), to_device(targets, "cpu"), "the first batch of val")
    except AutocompressError as error:
        raise TaskError(f"task {task.name!r}: {error}") from error


def _check_example(task: Task, model: nn.Module, inputs: Any) -> None:
    """Whether the model takes `example_inputs`, or without them a single one of the inputs: such a call is exported."""
    own = task.example_inputs
    given = first_of(inputs) if own is None else to_device(own, model_device(model))
    try:
        with torch.no_grad():
            call_model(model, given)
    except Exception as error:
        what = "a single example of val" if own is None else "example_inputs"
        how = "; give example_inputs that it takes" if own is None else ""
        said = f"model fails on {what}, {describe(given)}: {one_line(error)}{how}"
        raise TaskError(f"task {task.name!r}: {said}") from error


def _require(fits: bool, where: str, field: str, value: Any, allowed: str) -> None:
    if fits:
        return
    shown = repr(value) if value is None or isinstance(value, str | int | float | bool) else f"a {describe(value)}"
    raise TaskError(f"{where}: {field} is {shown}, allowed: {allowed}")
