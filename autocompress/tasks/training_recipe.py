"""How a base model is trained, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecipe:
    """How a base model is trained: AdamW on a one-cycle learning rate (Smith 2018, arXiv 1803.09820).

    `shift` moves each batch of images by up to that many pixels in both directions (what leaves on
    one side comes in on the other), `flip` mirrors each image left to right with probability one
    half. `threads` is for nets so small that more threads only get in each other's way; None takes
    what torch is set to.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    shift: int = 0
    flip: bool = False
    seed: int = 0
    threads: int | None = None
