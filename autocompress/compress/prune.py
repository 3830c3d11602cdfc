"""Which weights go: thresholds to masks."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, threshold: float, scale: float | None = None) -> Tensor:
    """True where a weight stays: |w| >= threshold x standard deviation. Bool, the weight's shape.

    Deep Compression's rule (Han et al. 2015, arXiv 1510.00149). `scale` replaces the standard
    deviation of the weight itself. The largest weight always stays, so that no layer dies whole.
    """
    size = weight.detach().abs()
    if threshold <= 0:
        return torch.ones_like(size, dtype=torch.bool)
    unit = float(weight.detach().double().std(correction=0)) if scale is None else scale
    return size >= min(threshold * unit, float(size.max()))
