"""Global random state, put back after code that may draw from it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Puts the state of Python's, NumPy's and torch's generators (CUDA's too) back at the end.

    With a seed, all start from it inside.
    """
    python, numpy = random.getstate(), np.random.get_state()
    cuda: Any = torch.cuda  # its functions are not annotated
    devices = list(range(cuda.device_count())) if cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
