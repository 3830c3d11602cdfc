"""Batch normalisation's running statistics, counted anew for a model whose weights are compressed.

They are means and variances of what the layers before give, and compression changes those. Counting them
on training batches anew costs a few forward passes and no labels (Wu & Johnson 2021, arXiv 2105.07576,
"precise" statistics; after quantization: Sun et al. 2019, arXiv 1910.11175).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.compress.apply import Compressed, call_with
from autocompress.compress.finetune import is_frozen

BATCHES = 32
"""Training batches that statistics are counted on."""


def recalibratable(module: nn.Module) -> Iterator[_BatchNorm]:
    """The batch normalisation layers with running statistics that are not frozen."""
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None and not is_frozen(part):
            yield part


@torch.no_grad()
def recalibrate(model: Compressed, inputs: Iterable[Any]) -> None:
    """Set running means and variances to those of the layers' inputs under the model's present codes.

    Each of the batches `inputs` counts as much as another; a variance is the mean of the batches' unbiased ones,
    as in training. Layers before normalise by the batch meanwhile; all else, dropout say, is in evaluation mode.
    A layer that the model does not reach keeps what it has.
    """
    layers = list(recalibratable(model.module))
    if not layers:
        return
    before = [[buffer.clone() for buffer in layer.buffers(recurse=False)] for layer in layers]
    momenta = [layer.momentum for layer in layers]
    model.module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the cumulative average
        layer.train()
    substitutes = model.substitutes()
    for batch in inputs:
        call_with(model.module, substitutes, batch)
    for layer, momentum, (mean, variance, seen) in zip(layers, momenta, before, strict=True):
        assert layer.running_mean is not None and layer.running_var is not None  # noqa: PT018 - for the type checker
        assert layer.num_batches_tracked is not None
        if not layer.num_batches_tracked:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        layer.num_batches_tracked.copy_(seen)
        layer.momentum = momentum
