"""Base models of the built-in tasks: trained once, then read from the cache folder.

Nothing random comes from outside: equal net, recipe and data give the same weights on the same
machine with the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autocompress.tasks.augment import Augment
from autocompress.tasks.folders import cache_root
from autocompress.tasks.training_recipe import TrainingRecipe

logger = logging.getLogger("autocompress")

Progress = Callable[[str], None]
_VERSION = 1  # of `train`; a change of what it computes must raise it
_UNUSABLE = (OSError, NotImplementedError)  # what a cache folder that cannot be used, or locked, raises


def base_model(
    name: str,
    build: Callable[[], nn.Module],
    recipe: TrainingRecipe,
    train_data: tuple[torch.Tensor, torch.Tensor],
    *,
    data_version: str,
    progress: Progress | None = None,
) -> nn.Module:
    """The net that `build` makes, trained, in evaluation mode: from the cache, else trained and kept there.

    Two processes at once train it once. A damaged file is trained anew and a folder that cannot
    be written is done without, each with a warning on the `autocompress` logger.
    """
    say = progress or logger.info
    key = json.dumps([_VERSION, str(_built(build, recipe.seed)), asdict(recipe), data_version])
    path = cache_root() / "models" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    model = _read(path, build, recipe)
    if model is not None:
        return model
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{name}: another process is training the base model, waiting for it")
            lock.acquire()
    except _UNUSABLE as error:
        _warn_once(f"cache folder {path.parent} cannot be used ({error}); the base model is not kept")
        return train(_built(build, recipe.seed), recipe, train_data, name, say)
    try:
        model = _read(path, build, recipe)
        if model is None:
            model = train(_built(build, recipe.seed), recipe, train_data, name, say)
            _write(path, model)
        return model
    finally:
        lock.release()


def train(
    model: nn.Module,
    recipe: TrainingRecipe,
    data: tuple[torch.Tensor, torch.Tensor],
    name: str = "model",
    progress: Progress | None = None,
) -> nn.Module:
    """`model` itself, trained on images (N, C, H, W) and labels (N,), in evaluation mode.

    Leaves the global random state alone.
    """
    with _threads(recipe.threads):
        return _train(model, recipe, data, name, progress or logger.info)


def _train(
    model: nn.Module, recipe: TrainingRecipe, data: tuple[torch.Tensor, torch.Tensor], name: str, say: Progress
) -> nn.Module:
    images, labels = data
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = max(1, len(images) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps, pct_start=0.25, cycle_momentum=False
    )
    augment = Augment(shift=recipe.shift, flip=recipe.flip)
    say(f"{name}: training the base model once, {recipe.epochs} epochs")
    started = said = time.monotonic()
    _lay_out(model.train(), torch.channels_last)  # a third faster than channels first on a CPU
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            loss = F.cross_entropy(model(augment(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        if time.monotonic() - said > 3:
            said = time.monotonic()
            say(f"{name}: epoch {epoch + 1} of {recipe.epochs}, loss {loss.item():.4f}, {said - started:.0f} s")
    say(f"{name}: base model trained in {time.monotonic() - started:.1f} s")
    return _lay_out(model.eval(), torch.contiguous_format)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lay_out(model: nn.Module, order: torch.memory_format) -> nn.Module:
    convert: Any = model.to  # not annotated for memory formats
    convert(memory_format=order)
    return model


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _read(path: Path, build: Callable[[], nn.Module], recipe: TrainingRecipe) -> nn.Module | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return None
    model = _built(build, recipe.seed)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("cached base model %s is damaged (%s); it is trained anew", path, reason)
        return None
    return model.eval()


def _write(path: Path, model: nn.Module) -> None:
    from safetensors.torch import save

    draft = path.with_suffix(f".{os.getpid()}.part")
    try:
        try:
            draft.write_bytes(save(model.state_dict()))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"cache folder {path.parent} cannot be used ({error}); the base model is not kept")


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
