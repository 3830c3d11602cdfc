"""Augmentation of batches of images, as a value that travels with a task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
