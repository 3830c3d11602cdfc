"""Which weights go: thresholds to masks."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, threshold: float, unit: float) -> Tensor:
    """True where a weight stays: |w| >= threshold x unit. Bool, the weight's shape.

    `unit` is the standard deviation of the layer's weights before any training: Deep Compression's rule (Han et
    al. 2015, arXiv 1510.00149). The largest weight always stays, so that no layer dies whole.
    """
    size = weight.detach().abs()
    if threshold <= 0:
        return torch.ones_like(size, dtype=torch.bool)
    return size >= min(threshold * unit, float(size.max()))
