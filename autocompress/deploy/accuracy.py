"""The task's metric of an exported file, by what its runtime computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from autocompress.deploy.recorder import Recorder, structured
from autocompress.deploy.verify import Runner
from autocompress.tasks.batches import batches, finite_metric, join

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

_BATCH = 256
"""Examples of a call, as in an export's verification: the range of a dynamic product is that of the whole call."""


def metric_of(task: Task, recorder: Recorder, run: Runner, split: Literal["val", "test"]) -> float:
    """The metric on a whole split of what `run` gives; `recorder` knows the names of inputs and outputs.

    Raises TrialFailed unless it is a finite number.
    """
    outputs, targets = [], []
    for inputs, target in batches(getattr(task, split), _BATCH, shuffle_seed=None, device="cpu"):
        outputs.append(run(recorder.named(inputs)))
        targets.append(target)
    joined = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*outputs, strict=True)]
    return finite_metric(task, structured(recorder.structure, joined), join(targets), split)
