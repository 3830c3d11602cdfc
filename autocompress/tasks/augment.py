"""Augmentation of training batches: how a task's own is called, and one for images that travels with a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autocompress.errors import TaskError
from autocompress.tasks.wording import describe, one_line


@dataclass(frozen=True)
class Augment:
    """Images (N, C, H, W), varied at random: what a `Task.augment` of images may be.

    `flip` mirrors each image left to right with probability one half; `shift` moves the whole batch by
    up to that many pixels in both directions (what leaves on one side comes in on the other); `crop`
    moves each image on its own by up to that many pixels, zeros coming in (He et al. 2015, arXiv
    1512.03385, section 4.2). Draws from `generator`, where None from torch's global one.
    """

    shift: int = 0
    flip: bool = False
    crop: int = 0

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The varied images, of the same shape; those given are left as they are."""
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored.to(images.device), images.flip(-1), images)
        if self.shift:
            down, right = torch.randint(-self.shift, self.shift + 1, (2,), generator=generator).tolist()
            images = images.roll((down, right), (-2, -1))
        if self.crop:
            images = _cropped(images, self.crop, generator)
        return images


def _cropped(images: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """Each image out of itself with `most` zeros around it, at a place of its own."""
    count, _, height, width = images.shape
    place = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator).to(images.device)
    rows = place[0] + torch.arange(height, device=images.device)
    columns = place[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augmented(augment: Callable[[Any], Any] | None, inputs: Any) -> Any:
    """What a `Task.augment` makes of a batch's inputs; these themselves without one.

    Raises TaskError where it raises, or gives something else than tensors where it was given tensors.
    """
    if augment is None:
        return inputs
    try:
        made = augment(inputs)
    except Exception as error:
        raise TaskError(f"augment fails on {describe(inputs)}: {one_line(error)}") from error
    if not _alike(inputs, made):
        raise TaskError(f"augment makes {describe(made)} of {describe(inputs)}, allowed: inputs of the same structure")
    return made


def _alike(given: Any, made: Any) -> bool:
    """Whether tensors, mappings and sequences stand where they stood; shapes are the model's business."""
    if isinstance(given, Tensor):
        return isinstance(made, Tensor)
    if isinstance(given, Mapping):
        return isinstance(made, Mapping) and all(
            key in made and _alike(value, made[key]) for key, value in given.items()
        )
    if isinstance(given, tuple | list):
        if not isinstance(made, tuple | list) or len(made) != len(given):
            return False
        return all(_alike(*pair) for pair in zip(given, made, strict=True))
    return True
