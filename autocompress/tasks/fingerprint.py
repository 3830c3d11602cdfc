"""What makes two tasks the same: short hashes of model, data and metric, equal in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from autocompress.tasks import randomness
from autocompress.tasks.batches import batches, is_pair, loss_name, metric_name, num_examples
from autocompress.tasks.task import Task

_SAMPLED = 64  # items hashed of a split that is not a pair of tensors


def fingerprint(task: Task) -> dict[str, str]:
    """16 hex digits each for "model", "data" and "metric".

    model: the tensors of the state dict by name, dtype, shape and bytes, and the tree of module
    types with their settings. data: all of a split that is a pair of tensors; of another its
    length and up to 64 evenly spaced items, but of `train` the length alone, since it may be augmented
    at random. metric: the names of loss and metric, and the direction.
    """
    data = hashlib.sha256()
    with randomness.preserved(seed=0):  # so that a split that draws at random gives the same items each time
        for split in ("train", "val", "test"):
            data.update(split.encode())
            _add_split(data, getattr(task, split), with_items=split != "train")
    names = json.dumps([loss_name(task), metric_name(task), task.direction])
    return {
        "model": _model_digest(task.model),
        "data": data.hexdigest()[:16],
        "metric": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def _model_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__qualname__}({module.extra_repr()})\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}=".encode())
        _add(digest, value)
    return digest.hexdigest()[:16]


def _add_split(digest: hashlib._Hash, data: Any, *, with_items: bool) -> None:
    if is_pair(data):
        _add(digest, tuple(data))
        return
    length = num_examples(data)
    digest.update(f"{length} examples\n".encode())
    if not with_items:
        return
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if length is None or isinstance(dataset, IterableDataset):
        for batch in batches(data, _SAMPLED, shuffle_seed=None, device=None):
            _add(digest, batch)
            return
    else:
        count = min(length, _SAMPLED)
        for k in range(count):
            _add(digest, dataset[k * (length - 1) // max(1, count - 1)])


def _add(digest: hashlib._Hash, value: Any) -> None:
    """Add a value, with its kind and shape, so that different values never read the same."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        plain = plain.to_dense() if plain.layout is not torch.strided else plain
        digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
        digest.update(plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping of {len(value)}".encode())
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"sequence of {len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, str | bytes | int | float | complex):
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        import numpy as np

        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype}{list(array.shape)}".encode() + array.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())
