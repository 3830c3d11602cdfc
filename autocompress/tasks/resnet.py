"""The block of residual nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(f(x) + g(x)): f two 3 x 3 convolutions with batch norm (He et al. 2015, arXiv 1512.03385, figure 2).

    g is the identity where shapes stay, else a 1 x 1 convolution.
    """

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, padding=1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.shortcut = nn.Identity() if (inner, stride) == (outer, 1) else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, outer, height / stride, width / stride) of x, (N, inner, height, width)."""
        return torch.relu(self.body(x) + self.shortcut(x))
