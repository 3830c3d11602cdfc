"""Weights drawn at random in the shapes of AlexNet and SqueezeNet v1.0, pruned and quantized as Deep Compression says.

Nothing is trained: `bench_codec.py --shapes` tests with them whether the coder and the file hold what the paper's nets
would need, 6.9 and 0.47 MB. Densities and bits of AlexNet are those of Han et al., arXiv 1510.00149, table 4; those of
SqueezeNet follow Iandola et al., arXiv 1602.07360, table 1 (33 % kept in all).

A weight is the product of a Laplace draw with a scale of its row and one of its input channel, both log-normal: trained
layers have rows and columns of very different strength. The spread is those scales' deviation. At 0 all weights are
independent, no coder can find anything, and the values' entropy is about what Huffman coding leaves in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from autocompress.codec.tensors import Artifact, Coded, Raw
from autocompress.compress import quantize

SPREAD = 0.3
"""A mild one: a trained LeNet's rows and columns differ more."""


@dataclass(frozen=True)
class Layer:
    """A weight's shape, the share of it that is kept, and the bits of a codebook's index."""

    shape: tuple[int, ...]
    kept: float
    bits: int


@dataclass(frozen=True)
class PaperNet:
    """A net's layers, and the bytes that its file may have."""

    layers: Mapping[str, Layer]
    most: int


def _alexnet() -> dict[str, Layer]:
    return {
        "conv1": Layer((96, 3, 11, 11), 0.84, 8),
        "conv2": Layer((256, 48, 5, 5), 0.38, 8),
        "conv3": Layer((384, 256, 3, 3), 0.35, 8),
        "conv4": Layer((384, 192, 3, 3), 0.37, 8),
        "conv5": Layer((256, 192, 3, 3), 0.37, 8),
        "fc6": Layer((4096, 9216), 0.09, 5),
        "fc7": Layer((4096, 4096), 0.09, 5),
        "fc8": Layer((1000, 4096), 0.25, 5),
    }


def _squeezenet() -> dict[str, Layer]:
    layers = {"conv1": Layer((96, 3, 7, 7), 1.0, 6)}
    into = 96
    fires = [(16, 1.0, 1.0, 0.33)] * 2 + [(32, 1.0, 1.0, 0.33)] * 2
    fires += [(48, 1.0, 0.5, 0.33), (48, 0.5, 1.0, 0.33), (64, 1.0, 0.5, 0.33), (64, 0.5, 1.0, 0.3)]
    for place, (squeeze, kept, kept1, kept3) in enumerate(fires, start=2):
        out = 4 * squeeze
        layers[f"fire{place}.squeeze"] = Layer((squeeze, into, 1, 1), kept, 6)
        layers[f"fire{place}.expand1"] = Layer((out, squeeze, 1, 1), kept1, 6)
        layers[f"fire{place}.expand3"] = Layer((out, squeeze, 3, 3), kept3, 6)
        into = 2 * out
    layers["conv10"] = Layer((1000, 512, 1, 1), 0.2, 6)
    return layers


PAPER = {"AlexNet": PaperNet(_alexnet(), 6_900_000), "SqueezeNet": PaperNet(_squeezenet(), 470_000)}


def drawn(name: str, spread: float = SPREAD, seed: int = 0) -> Artifact:
    """A net's artifact: each layer coded, and its bias in bfloat16, as artifacts of so few bits have it."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Coded | Raw] = {}
    for layer_name, layer in PAPER[name].layers.items():
        tensors[f"{layer_name}.weight"] = draw(layer, rng, spread)
        bias = rng.normal(0, 0.1, layer.shape[0]).astype(np.float32)
        tensors[f"{layer_name}.bias"] = Raw((bias.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
    return Artifact(tensors)


def draw(layer: Layer, rng: np.random.Generator, spread: float) -> Coded:
    """One weight, pruned by magnitude and clustered; the values are in order."""
    rows, columns = layer.shape[0], int(np.prod(layer.shape[1:]))
    kernel = int(np.prod(layer.shape[2:]))
    weight = rng.laplace(size=(rows, columns)).astype(np.float32)
    weight *= np.exp(spread * rng.normal(size=(rows, 1))).astype(np.float32)
    weight *= np.repeat(np.exp(spread * rng.normal(size=columns // kernel)), kernel).astype(np.float32)
    flat = torch.from_numpy(weight.ravel())
    least = float(np.quantile(np.abs(weight), 1 - layer.kept)) if layer.kept < 1 else -1.0
    keep = flat.abs() > least
    table = quantize.kmeans(flat[keep], 2**layer.bits - (layer.kept < 1))
    codes = quantize.nearest(flat[keep], table)
    if layer.kept == 1:
        symbols = codes
    else:
        below = int((table < 0).sum())
        symbols = torch.full((flat.numel(),), below)
        symbols[keep] = codes + (codes >= below)
        table = torch.cat([table[:below], torch.zeros(1), table[below:]])
    return Coded(symbols.numpy().astype(np.uint16).reshape(layer.shape), table.numpy().astype(np.float32))
