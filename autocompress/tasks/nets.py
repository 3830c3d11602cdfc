"""The networks of the built-in tasks: untrained, plain `nn.Sequential` trees of standard layers, one with residuals.

Importing this module is fast; torch comes in when a network is built.

All take float32 images, (N, channels, height, width), and give (N, 10) logits. `F` below is the number of
float parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def digits_net() -> nn.Sequential:
    """A small conv net for 8 x 8 images; F = 38,282."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def lenet300() -> nn.Sequential:
    """LeNet-300-100 for 28 x 28 images (LeCun et al. 1998); F = 266,610."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet5() -> nn.Sequential:
    """LeNet-5 as Caffe has it, the one of Deep Compression (arXiv 1510.00149); F = 431,080."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def resnet8() -> nn.Sequential:
    """The ResNet-8 of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597) for 3 x 32 x 32 images; F = 77,946.

    Three stages of 16, 32 and 64 channels, one residual block each.
    """
    from torch import nn

    from autocompress.tasks.resnet import Residual

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16),
        Residual(16, 32, stride=2),
        Residual(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
