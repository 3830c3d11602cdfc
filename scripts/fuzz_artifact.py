"""Damages artifacts in every way it can think of, and says what does not end in an ArtifactError or the right model.

    python scripts/fuzz_artifact.py --count 100000 --seed 0 --seconds 3600 --keep FOLDER
    python scripts/fuzz_artifact.py --atheris --seconds 3600 --keep FOLDER

Each damaged file goes through `unpack` and `load`. Told, with the file kept in the folder: any exception other than
ArtifactError, an error of more than one line, more than 5 seconds of the processor, memory beyond twice what an honest
file of that shape needs, a model other than the right one where no checksum was mended, and any crash: files are tried
in batches, each in a process of its own. The coders' machine code runs with each array against a page that may not be
touched, on either side by turns, so that reading or writing past its ends is a crash. `--atheris` looks for files by
the lines that they reach in the codec instead (it needs the package atheris).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from autocompress.codec import container, header, jit, leb128, plain
from autocompress.codec.tensors import DTYPES, Artifact, Coded, Raw, grid_table
from autocompress.compress import apply, artifact, lowrank
from autocompress.compress.layers import find_layers
from autocompress.errors import ArtifactError
from autocompress.plan import LayerPlan, Plan

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SLOW = 5.0
ELEMENTS = 1 << 21
"""Elements that a damaged file may ask for here, so that a hundred thousand of them can be tried."""
FREE = 8 << 20
"""Bytes of memory below which nobody asks what an honest file needs."""
HUGE = (0, 1, 2, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 65537, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
        1 << 32, 1 << 40, (1 << 48) - 1, 1 << 48, (1 << 49) - 1, 1 << 60, (1 << 63) - 1, 1 << 64)  # fmt: skip
DIMENSIONS = (0, 1, 2, 3, 7, 8, 9, 64, 1000, 4096, 1 << 16, 1 << 19, 1 << 20, 1 << 29, 1 << 30, 1 << 40, (1 << 48) - 1)

# --- honest files ----------------------------------------------------------------------------


class Net(nn.Module):
    """No tree of standard layers: it has to be given to `load`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.out.weight = self.embed.weight
        self.wide, self.register = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.bfloat16)
        self.register_buffer("offset", torch.arange(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens))))


@dataclass(frozen=True)
class Sample:
    """An honest file, and the model that it needs, if any."""

    name: str
    data: bytes
    model: nn.Module | None = None


def written(model: nn.Module, inputs: torch.Tensor, plans: dict[str, LayerPlan], effort: str) -> bytes:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw).abs() * 0.4 + 0.1)
    layers = find_layers(model.eval(), lambda m: m(inputs)).layers
    plan = Plan({s.name: plans.get(s.name, LayerPlan()) for s in layers})
    state = apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))
    return artifact.write(model, plan, state.encode(), "fuzz", effort)


def tensors() -> Artifact:
    """A tensor of each kind and several dtypes, large enough that every part of a stream is there."""
    draw = np.random.default_rng(7)
    symbols = (draw.integers(0, 5, (24, 60)) * (draw.random((24, 60)) < 0.3)).astype(np.uint16)
    symbols[::3], symbols[:, ::5] = 0, 0
    sparse = np.where(draw.random((30, 20)) < 0.1, draw.normal(size=(30, 20)), 0).astype(np.float32)
    return Artifact(
        {
            "coded": Coded(symbols, np.sort(draw.normal(size=5)).astype(np.float32)),
            "short table": Coded(symbols[:9].reshape(9, 4, 3, 5), np.arange(5, dtype=np.float32)),
            "grid": Coded(symbols[::-1].copy(), grid_table(0.5, -2, 5), "float32", (0.5, -2)),
            "dense": Coded(draw.integers(0, 200, (5, 70)).astype(np.uint16), np.arange(200, dtype=np.float32)),
            "sparse": Raw(sparse, "float32"),
            "float": Raw(draw.normal(size=(6, 9)).astype(np.float32), "float32"),
            "raw": Raw(draw.normal(size=7), "float64"),
            "bits": Raw(draw.integers(0, 9, 40).astype(np.uint16), "bfloat16"),
            "count": Raw(np.array(469, np.int64), "int64"),
            "flags": Raw(draw.random(9) < 0.5, "bool"),
            "none": Raw(np.zeros((3, 0), np.float32), "float32"),
        },
        {"model": ["Identity", {}]},
    )


@cache
def corpus() -> tuple[Sample, ...]:
    """Honest files of every kind, coder and format."""
    tree = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2, bias=False), nn.Flatten(),
        nn.Linear(96, 12), nn.LayerNorm(12), nn.Linear(12, 4),
    )  # fmt: skip
    image, words = torch.ones(2, 2, 8, 8), torch.tensor([[1, 5, 10]])
    plans = {
        "0": LayerPlan(rank=2, bits=4), "3": LayerPlan(bits=3, threshold=0.5, quantizer="uniform"),
        "5": LayerPlan(bits=3, threshold=1.2), "7": LayerPlan(bits=32, threshold=0.8),
    }  # fmt: skip
    own = {"mix": LayerPlan(rank=2, bits=5), "out": LayerPlan(bits=2, threshold=0.5)}
    net = Net()
    found = []
    for effort in container.EFFORTS:
        found.append(Sample(f"tree-{effort}", written(tree, image, plans, effort)))
        found.append(Sample(f"net-{effort}", written(net, words, own, effort), net))
        found.append(Sample(f"tensors-{effort}", container.pack(tensors(), effort)))
    blocks = np.zeros((1100, 1000), np.uint16)  # more than one block of the fast coder
    blocks[::50, ::9] = 1 + np.arange(22 * 112).reshape(22, 112) % 7
    linear = ["Linear", {"in_features": 1000, "out_features": 1100, "bias": False}]
    weight = Artifact({"weight": Coded(blocks, np.arange(8, dtype=np.float32))}, {"model": linear})
    found.append(Sample("blocks", container.pack(weight, container.FAST)))
    bare = nn.Linear(9, 5)
    found.append(Sample("bare", written(bare, torch.ones(2, 9), {"": LayerPlan(bits=3, threshold=0.3)}, "max")))
    found += [Sample(path.name, path.read_bytes()) for path in sorted(GOLDEN.glob("*.acz"))]
    return tuple(found)


def small_corpus() -> tuple[Sample, ...]:
    """The honest files of few elements."""
    return tuple(sample for sample in corpus() if sample.name != "blocks")


# --- a file taken apart ----------------------------------------------------------------------


@dataclass
class Pieces:
    """A file's parts. A row: kind, dtype, shape, length of the stream (None: its own), its CRC-32 (None: the right)."""

    first: bool
    rows: list[list[Any]]
    json: Any
    streams: list[bytes]
    checksum: int | None = None
    tail: bytes = b""
    names: list[Any] = field(default_factory=list)


def take_apart(data: bytes) -> Pieces:
    """Raises ArtifactError where the file's head is not to be understood."""
    head = header.read(data)
    index = header._FIRST_KINDS.index if head.first else header.KINDS.index
    rows = [[index(e.kind), list(DTYPES).index(e.dtype), list(e.shape), None, None] for e in head.entries]
    streams = [data[e.start : e.start + e.length] for e in head.entries]
    return Pieces(head.first, rows, json.loads(json.dumps(dict(head.header))), streams,
                  names=[e.name for e in head.entries])  # fmt: skip


def stale(pieces: Pieces, data: bytes) -> Pieces:
    """With the checksums that the file had, whatever is changed afterwards."""
    head = header.read(data)
    for row, entry in zip(pieces.rows, head.entries, strict=True):
        row[4] = entry.checksum
    return replace(pieces, checksum=struct.unpack_from("<I", data, 8)[0])


def assemble(p: Pieces) -> bytes:
    """The file, checksums mended where none are given."""
    streams = b"".join(p.streams)
    ends = [(len(s) if row[3] is None else row[3], zlib.crc32(s) if row[4] is None else row[4])
            for row, s in zip(p.rows, p.streams, strict=False)]  # fmt: skip
    body = p.json if isinstance(p.json, dict) else {"": p.json}
    if p.first:
        kinds, dtypes = (*header._FIRST_KINDS, "pickle"), (*DTYPES, "object")
        rows = [[name, kinds[row[0] % len(kinds)], dtypes[row[1] % len(dtypes)], row[2], *end]
                for name, row, end in zip(p.names, p.rows, ends, strict=False)]  # fmt: skip
        packed = zlib.compress(json.dumps({**body, "tensors": rows}).encode("utf-8", "surrogatepass"))
    else:
        table = [leb128.write(len(p.rows))]
        for row, (length, checksum) in zip(p.rows, ends, strict=False):
            sizes = leb128.write(len(row[2]), *row[2], length)
            table.append(bytes([row[0] & 255, row[1] & 255]) + sizes + struct.pack("<I", checksum & 0xFFFFFFFF))
        text = json.dumps({**body, "tensors": p.names}).encode("utf-8", "surrogatepass")
        packed = b"".join(table) + plain.deflate(text, 1, header._DICTIONARY)
    checksum = zlib.crc32(packed) if p.checksum is None else p.checksum
    magic = header.FIRST_MAGIC if p.first else header.MAGIC
    return struct.pack("<4sII", magic, len(packed), checksum) + packed + streams + p.tail


def mended(data: bytes) -> bytes:
    """The same file with right checksums, as far as its head can be read."""
    if len(data) < 12 or data[:4] not in (header.MAGIC, header.FIRST_MAGIC):
        return data
    length = min(struct.unpack_from("<I", data, 4)[0], len(data) - 12)
    packed = data[12 : 12 + length]
    fixed = struct.pack("<4sII", data[:4], length, zlib.crc32(packed)) + data[12:]
    try:
        return assemble(take_apart(fixed))
    except Exception:
        return fixed


# --- damage ----------------------------------------------------------------------------------


def damaged_bytes(draw: Random, data: bytes, others: Callable[[], bytes]) -> bytes:
    """Bytes with one to four changes."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        at = draw.randrange(len(out) + 1) if draw.random() < 0.6 else draw.randrange(min(len(out), 24) + 1)
        size = draw.choice((1, 1, 2, 4, 8, draw.randrange(1, 200)))
        match draw.randrange(11):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 2 if at < len(out):
                out[at] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
            case 3:
                del out[at:]
            case 4:
                out[at:at] = draw.randbytes(size)
            case 5:
                del out[at : at + size]
            case 6:
                out[at:at] = out[at : at + size]
            case 7:
                other = others()
                out[at:] = other[draw.randrange(len(other) + 1) :]
            case 8:  # a number for the one that stands here
                end = at
                while end < len(out) and out[end] & 128:
                    end += 1
                out[at : end + 1] = leb128.write(draw.choice(HUGE))
            case 9:
                form = draw.choice("HIQf")
                value = draw.choice((float("nan"), float("inf"), -0.0, 3e38)) if form == "f" else draw.choice(HUGE)
                room = struct.calcsize("<" + form)
                out[at : at + room] = struct.pack("<" + form, value if form == "f" else value % (1 << 8 * room))
            case _:
                out[at : at + size] = bytes(size) if draw.random() < 0.5 else b"\xff" * size
    return bytes(out)


def made_fast(draw: Random, shape: Sequence[int]) -> bytes:
    """A stream for the fast coder whose head is sound and whose words are anything."""

    def counts(total: int, size: int) -> list[int]:
        cuts = sorted(draw.randrange(total + 1) for _ in range(size - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    rows, columns = (1, int(np.prod(shape, dtype=object))) if len(shape) < 2 else (
        shape[0], int(np.prod(shape[1:], dtype=object)))  # fmt: skip
    classes = draw.choice((0, 1, 2, 4, 8, 16))
    if rows + columns > 1 << 16:
        classes = min(classes, 1)
    precision, size = draw.choice((12, 14, 16)), draw.choice((1, 2, 5, 300, 4096, 65536))
    head = leb128.write(classes)
    if classes:
        ones = [draw.choice((0, 1, 32768, 65535, 65536)) for _ in range(classes**2)]
        bits = (rows + columns) * (classes.bit_length() - 1)
        head += leb128.write(draw.choice((0, 3, 65535)), *ones) + draw.randbytes(-(-bits // 8))
    head += leb128.write(precision, size, *counts(1 << precision, size))
    blocks = min(64, -(-rows * columns // (1 << 20))) * (2 if classes else 1)
    pieces = []
    for _ in range(blocks):
        words = draw.randbytes(draw.choice((32, 32, 2 * draw.randrange(16, 200))))
        pieces.append(draw.choice((b"\1\0\0\0" * 8, words, b"\xff" * 64, bytes(40), b"")))
    return head + leb128.write(*(len(p) // 2 for p in pieces)) + b"".join(pieces)


def made_max(draw: Random) -> bytes:
    """A stream for the max coder: any orientation and lag, any bytes."""
    lag = draw.choice((0, 0, 2, 3, 5, 100, 4096, (1 << 31) - 1, 1 << 31, 1))
    head = leb128.write(draw.choice((0, 1, 70, 32768, 65535, 1 << 40)), draw.choice((0, 0, 1, 2)), lag)
    size = draw.randrange(400)
    return head + draw.choice((draw.randbytes(size), b"\xff" * size, bytes(size), bytes([draw.randrange(256)]) * size))


def made_stream(draw: Random, kind: str, shape: Sequence[int]) -> bytes:
    """A stream of a kind for a shape, its symbols from `made_fast` or `made_max`."""
    way = kind.partition("/")[2]
    symbols = made_max(draw) if way == "max" else made_fast(draw, shape)
    values = draw.choice((b"\x00", b"\x04" + draw.randbytes(40), b"\x82" + leb128.write(9) + draw.randbytes(80)))
    if kind.startswith("coded"):
        size = draw.choice((1, 5, 300, 65536))
        body = draw.randbytes(draw.randrange(60))
        mixed = b"\x02" + leb128.write(len(body)) + body
        return leb128.write(size) + draw.choice((b"\x00" + bytes(4 * size), b"\x01" + bytes(2 * size), mixed)) + symbols
    if kind.startswith("grid"):
        scale, lowest = draw.choice((0.5, 0.0, float("nan"), 3e38)), draw.choice((0, -2, (1 << 31) - 1, -(1 << 31)))
        return struct.pack("<fi", scale, lowest) + leb128.write(draw.choice((1, 5, 300, 65536))) + symbols
    if kind.startswith("sparse"):
        return leb128.write(len(symbols)) + symbols + values
    return values


def made_file(draw: Random, shape: Sequence[int]) -> bytes:
    """A file of one tensor of a shape, of any kind, with a stream that nobody wrote."""
    kind = draw.randrange(len(header.KINDS))
    stream = made_stream(draw, header.KINDS[kind], shape)
    return assemble(Pieces(False, [[kind, 1, list(shape), None, None]], {}, [stream], names=["x"]))


def damaged_shape(draw: Random, shape: list[int]) -> list[int]:  # noqa: PLR0911
    """Another shape, of as many elements or of many more."""
    size = int(np.prod(shape, dtype=object))
    at = draw.randrange(len(shape)) if shape else 0
    match draw.randrange(7):
        case 0:
            return draw.sample(shape, len(shape))
        case 1:
            return draw.choice(([size], [1, size], [size, 1], [1] * 5 + [size]))
        case 2 if shape:
            return [*shape[:at], draw.choice(DIMENSIONS), *shape[at + 1 :]]
        case 3 if shape:
            return [*shape[:at], shape[at] + draw.choice((-1, 1)) if shape[at] else 1, *shape[at + 1 :]]
        case 4:
            return [draw.choice(DIMENSIONS) for _ in range(draw.randrange(1, 4))]
        case 5:
            return draw.choice(([0, 1 << 40], [1 << 30, 1], [1, 1 << 30], [2, 1 << 29], [1 << 19, 2], [1, 1 << 20],
                                [1 << 20, 1], [0, 1 << 20], [1 << 10, 1 << 10], [1] * 17, [0, 0, 1 << 47]))  # fmt: skip
        case _:
            return [*shape, draw.choice((1, 1, 2, 0))]


def nested(depth: int) -> Any:
    result: Any = 1
    for _ in range(depth):
        result = [result]
    return result


def hostile_values(draw: Random) -> Any:
    layer = ["Linear", {"in_features": draw.choice(HUGE[:16]), "out_features": draw.choice(HUGE[:16])}]
    return draw.choice([
        None, True, -1, 1.5, 10**30, float("nan"), float("inf"), "", "x\ny", "\ud800", "a.b", "0", "forward", [], {},
        [[]], {"a": {}}, nested(50), nested(150), nested(900), layer, ["Sequential", [["0", layer], ["0", layer]]],
        ["Sequential", [[str(i), ["ReLU", {}]] for i in range(200)]], [2, "channel"], [1, "spatial"],
        {"0": [1, "channel"], "0.0": [1, "channel"]}, draw.choice(HUGE), "bfloat16", [3, 3], "same",
    ])  # fmt: skip


def damaged_json(draw: Random, value: Any, depth: int = 0) -> Any:  # noqa: PLR0911
    """The value with something in it replaced, left out, repeated or renamed."""
    if not isinstance(value, list | dict) or not value or (depth and draw.random() < 0.15):
        return hostile_values(draw)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        match draw.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[:at] + [value[at]] * draw.choice((2, 3, 30)) + value[at:]
            case 2:
                return draw.sample(value, len(value))
        return [*value[:at], damaged_json(draw, value[at], depth + 1), *value[at + 1 :]]
    key = draw.choice(list(value))
    rest = {k: v for k, v in value.items() if k != key}
    match draw.randrange(10):
        case 0:
            return rest
        case 1:
            return {**rest, draw.choice(("", "0", "dtype", "bias", "in_features", "ranks", "class")): value[key]}
        case 2:
            return {**value, draw.choice(("dtype", "ranks", "model", "class", "bias", "eps")): hostile_values(draw)}
    return {**value, key: damaged_json(draw, value[key], depth + 1)}


def damaged_pieces(draw: Random, p: Pieces, samples: Sequence[Sample]) -> Pieces:  # noqa: PLR0912
    """One to three changes of a file's parts."""
    others = lambda: draw.choice(samples).data  # noqa: E731
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not p.rows:
            return replace(p, tail=b"tail")
        at = draw.randrange(len(p.rows))
        row = p.rows[at]
        match draw.randrange(16):
            case 0 | 1 | 2 | 3 | 4:
                p.streams[at] = damaged_bytes(draw, p.streams[at], others)
            case 5:
                to = draw.randrange(len(p.rows))
                p.streams[at], p.streams[to] = p.streams[to], p.streams[at]
            case 6:
                with suppress(ArtifactError):
                    other = take_apart(others())
                    place = draw.randrange(len(other.rows))
                    p.streams[at] = other.streams[place]
                    if draw.random() < 0.5:
                        p.rows[at] = [*other.rows[place][:3], None, row[4]]
            case 7:
                row[0] = draw.randrange(len(header.KINDS) + 1)
            case 8:
                row[1] = draw.randrange(len(DTYPES) + 1)
            case 9:
                row[2] = damaged_shape(draw, row[2])
            case 10:
                row[3] = draw.choice(HUGE)
            case 11 if not p.first:
                row[2] = damaged_shape(draw, row[2]) if draw.random() < 0.6 else row[2]
                row[0] = draw.randrange(len(header.KINDS))
                p.streams[at] = made_stream(draw, header.KINDS[row[0]], row[2])
            case 12:
                p.names = damaged_json(draw, p.names)
                p.names = p.names if isinstance(p.names, list) else [p.names]
            case 13:
                match draw.randrange(3):
                    case 0:
                        p.rows, p.streams = [*p.rows, list(row)], [*p.streams, p.streams[at]]
                    case 1:
                        p.rows, p.streams = p.rows[:at] + p.rows[at + 1 :], p.streams[:at] + p.streams[at + 1 :]
                    case _:
                        p.tail = draw.randbytes(draw.randrange(9))
            case _:
                p.json = damaged_json(draw, p.json)
    return p


@dataclass(frozen=True)
class Damaged:
    """A damaged file, what it was made from, and whether a checksum was mended: it may then hold anything."""

    data: bytes
    sample: Sample
    forged: bool


def damage(draw: Random, samples: Sequence[Sample]) -> Damaged:
    """One damaged file."""
    sample = draw.choice(samples)
    match draw.randrange(10):
        case 0 | 1:
            return Damaged(damaged_bytes(draw, sample.data, lambda: draw.choice(samples).data), sample, False)
        case 2:
            data = damaged_bytes(draw, sample.data, lambda: draw.choice(samples).data)
            return Damaged(mended(data), sample, True)
        case 3:
            other = draw.choice(samples).data  # one file's head, another's streams
            at, to = (header.read(d).streams_at for d in (sample.data, other))
            return Damaged(sample.data[:at] + other[to:], sample, False)
        case 4:
            pieces = stale(take_apart(sample.data), sample.data)
            return Damaged(assemble(damaged_pieces(draw, pieces, samples)), sample, False)
    return Damaged(assemble(damaged_pieces(draw, take_apart(sample.data), samples)), sample, True)


# --- trying a file ---------------------------------------------------------------------------


def fingerprint(found: Artifact) -> tuple[Any, ...]:
    """Equal for equal artifacts, to the last bit."""

    def whole(tensor: Raw | Coded) -> tuple[Any, ...]:
        if isinstance(tensor, Coded):
            return "coded", tensor.dtype, tensor.shape, tensor.symbols.tobytes(), tensor.table.tobytes()
        return "raw", tensor.dtype, tensor.shape, tensor.array.tobytes()

    return json.dumps(dict(found.header)), [(name, *whole(t)) for name, t in found.tensors.items()]


def state_of(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(key, t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
            for key, t in artifact.unique_state(model).items()]  # fmt: skip


@cache
def right() -> tuple[list[Any], list[Any]]:
    """What the honest files hold: their artifacts and their models."""
    models = []
    for sample in corpus():
        with suppress(ArtifactError):
            models.append(state_of(artifact.restore(container.unpack(sample.data), sample.model)))
    return [fingerprint(container.unpack(s.data)) for s in corpus()], models


def peak_of(work: Callable[[], Any]) -> tuple[Any, int, float]:
    """What the work gives (an ArtifactError too), the memory it took at most, and its seconds."""
    pages = _pages(os.getpid())
    if pages:
        os.pwrite(pages[0], b"5", 0)  # the peak begins here
    before = resident("VmRSS")
    tracemalloc.start(1)
    start = time.process_time()
    try:
        result = work()
    except ArtifactError as error:
        result = error
    finally:
        seconds = time.process_time() - start
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return result, max(traced, resident("VmHWM") - before), seconds


@cache
def _pages(process: int) -> tuple[int, int] | None:
    """Linux's account of a process's memory: a file that starts it anew, and it; None on other systems."""
    try:
        folder = f"/proc/{process}/"
        return os.open(folder + "clear_refs", os.O_WRONLY), os.open(folder + "status", os.O_RDONLY)
    except OSError:
        return None


def resident(key: str) -> int:
    """Bytes of this process that are in memory, now or at most; 0 where the system does not say."""
    pages = _pages(os.getpid())
    told = os.pread(pages[1], 1 << 14, 0).partition(key.encode() + b":")[2].split() if pages else []
    return int(told[0]) << 10 if told else 0


def honest_need(data: bytes, model: nn.Module | None, path: Path) -> int:
    """Memory that an honest file of the same kinds, dtypes and shapes needs, or one of that length without tensors."""
    try:
        entries = container.Archive(data, container.MAX_ELEMENTS).entries.values()
    except ArtifactError:
        return 4 * len(data) + FREE
    key = str([(e.name, e.kind, e.dtype, e.shape) for e in entries])
    if key not in _needs:
        _needs[key] = _honest_need(data, entries, model, path)
    return _needs[key] + 2 * len(data)


_needs: dict[str, int] = {}


def _honest_need(data: bytes, entries: Iterable[header.Entry], model: nn.Module | None, path: Path) -> int:
    draw = np.random.default_rng(0)
    made: dict[str, Raw | Coded] = {}
    for e in entries:
        if e.kind.startswith(("raw", "sparse")):
            kind = np.dtype(DTYPES[e.dtype])
            values = draw.integers(0, 2, e.shape) if kind.kind in "b" else draw.integers(0, 100, e.shape)
            made[e.name] = Raw((values * (draw.random(e.shape) < 0.5)).astype(kind), e.dtype)
        else:
            made[e.name] = Coded(draw.integers(0, 4, e.shape).astype(np.uint16), np.arange(4, dtype="f4"), e.dtype)
    head = header.read(data).header
    most = 0
    for effort in {e.coder for e in entries if e.coder in header.CODERS[:2]} or {container.FAST}:
        whole = container.pack(Artifact(made, head), effort)
        path.write_bytes(whole)
        most = max(most, peak_of(lambda d=whole: container.unpack(d))[1])
        most = max(most, peak_of(lambda: artifact.load(path, model))[1])
    return most


def faults(found: Damaged, path: Path) -> Iterator[str]:
    """What is wrong with how a damaged file is read."""
    path.write_bytes(found.data)
    given = found.sample.model
    peak = 0
    for name, work, known in (
        ("unpack", lambda: container.unpack(found.data), right()[0]),
        ("load", lambda: artifact.load(path, given), right()[1]),
    ):
        try:
            result, memory, seconds = peak_of(work)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            yield f"{name}: {type(error).__name__}: {str(error)[:200]!r} at {Path(place.filename).name}:{place.lineno}"
            continue
        peak = max(peak, memory)
        if seconds > SLOW:
            yield f"{name}: slow, {seconds:.1f} s"
        if isinstance(result, ArtifactError):
            if "\n" in str(result) or len(str(result)) > 2000:
                yield f"{name}: an error of {len(str(result))} characters, {str(result).count(chr(10)) + 1} lines"
        elif not found.forged and (fingerprint(result) if name == "unpack" else state_of(result)) not in known:
            yield f"{name}: silent damage"
    if peak > FREE:
        need = honest_need(found.data, given, path)
        if peak > 2 * need + FREE:
            yield f"memory: {peak >> 20} MB, an honest file of that shape needs {need >> 20}"


@contextmanager
def few_elements(most: int = ELEMENTS) -> Iterator[None]:
    """Files may ask for fewer elements than they usually may; warnings are not shown."""
    before, defaults = container.MAX_ELEMENTS, container.unpack.__kwdefaults__
    container.MAX_ELEMENTS = most
    container.unpack.__kwdefaults__ = {"max_elements": most}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        container.MAX_ELEMENTS, container.unpack.__kwdefaults__ = before, defaults


# --- arrays beside forbidden pages -----------------------------------------------------------


class Fence:
    """Runs kernels on copies of their arrays that end, or begin, where a page may not be touched."""

    ROOM = 1 << 30

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.areas: list[tuple[mmap.mmap, int, int]] = []
        self.turn = 0

    def area(self, index: int, size: int) -> tuple[mmap.mmap, int, int]:
        """Memory number `index` of at least that size; where it lies in its map, and its bytes."""
        size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        while len(self.areas) <= index:
            self.areas.append((mmap.mmap(-1, 2 * self.ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0), self.ROOM, 0))
        room, middle, had = self.areas[index]
        if had != size:
            start = self.address(room) + middle
            if had > size:
                self.protect(start + size, had - size, 0)
            self.protect(start, size, mmap.PROT_READ | mmap.PROT_WRITE)
            self.areas[index] = (room, middle, size)
        return self.areas[index]

    @staticmethod
    def address(room: mmap.mmap) -> int:
        return int(np.frombuffer(room, np.uint8).ctypes.data)

    def protect(self, start: int, size: int, how: int) -> None:
        if self.libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), how):
            raise OSError(ctypes.get_errno(), "mprotect")

    def copy(self, index: int, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        room, start, size = self.area(index, array.nbytes)
        start += 0 if self.turn & 1 else size - array.nbytes
        bare = (ctypes.c_uint8 * array.nbytes).from_address(self.address(room) + start)
        fenced = np.frombuffer(bare, array.dtype)
        fenced[...] = array
        return fenced

    def __call__(self, kernel: jit.Kernel, call: Callable[..., int], arguments: tuple[Any, ...]) -> int:
        self.turn += 1
        given = [self.copy(k, a) if isinstance(a, np.ndarray) and a.size else a for k, a in enumerate(arguments)]
        result = call(kernel, *given)
        for array, fenced in zip(arguments, given, strict=True):
            if fenced is not array and array.flags.writeable:
                array[...] = fenced
        return result


@contextmanager
def kernels_called(by: Callable[[jit.Kernel, Callable[..., int], tuple[Any, ...]], int]) -> Iterator[None]:
    """Kernels are called through `by`."""
    call = jit.Kernel.__call__
    jit.Kernel.__call__ = lambda kernel, *arguments: by(kernel, call, arguments)  # type: ignore[method-assign]
    try:
        yield
    finally:
        jit.Kernel.__call__ = call  # type: ignore[method-assign]


class Guarded:
    """An array for kernels run as plain Python: an index outside is an IndexError; what is stored wraps around."""

    def __init__(self, array: np.ndarray[Any, Any]):
        self.values = array.tolist()
        self.bits = 8 * array.itemsize
        self.signed = array.dtype.kind == "i"

    def place(self, at: int) -> int:
        if not 0 <= at < len(self.values):
            raise IndexError(f"element {at} of {len(self.values)}")
        return at

    def __getitem__(self, at: int) -> int:
        return int(self.values[self.place(at)])

    def __setitem__(self, at: int, value: int) -> None:
        value &= (1 << self.bits) - 1
        if self.signed and value >> (self.bits - 1):
            value -= 1 << self.bits
        self.values[self.place(at)] = value


@cache
def _plain(kernel: jit.Kernel) -> FunctionType:
    names = {n: v.python if isinstance(v, jit.Kernel) else v for n, v in kernel.python.__globals__.items()}
    for name, value in kernel.python.__globals__.items():
        if isinstance(value, jit.Kernel):
            names[name] = FunctionType(value.python.__code__, names, name)
    return FunctionType(kernel.python.__code__, names)


def guarded(kernel: jit.Kernel, call: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    """Run a kernel as plain Python on guarded arrays."""
    given = [Guarded(a) if isinstance(a, np.ndarray) else int(a) for a in arguments]
    result = int(_plain(kernel)(*given))
    for array, made in zip(arguments, given, strict=True):
        if isinstance(made, Guarded) and array.flags.writeable:
            array[...] = made.values
    return result


# --- runs ------------------------------------------------------------------------------------


def batch(seed: int, number: int, size: int, folder: Path, log: Path) -> None:
    """Try a batch of files; faults go to the log. The file being tried lies in the folder."""
    large = number % 20 == 19
    current, samples, counts = folder / "current.bin", corpus() if large else small_corpus(), Counter[str]()
    with kernels_called(Fence()), few_elements(ELEMENTS if large else 1 << 16), log.open("a") as out:
        for sample in samples:  # what is taken once in a process is no file's need
            list(faults(Damaged(sample.data, sample, False), folder / "x.acz"))
        for index in range(size):
            found = damage(Random(f"{seed}.{number}.{index}"), samples)
            current.write_bytes(found.data)
            told = list(faults(found, folder / "x.acz"))
            counts["forged" if found.forged else "unmended"] += 1
            for text in told:
                place = folder / f"{seed}.{number}.{index}.acz"
                place.write_bytes(found.data)
                out.write(json.dumps({"file": place.name, "sample": found.sample.name, "what": text}) + "\n")
                out.flush()
        (folder / "counts.json").write_text(json.dumps(counts))


def run(count: int, seed: int, seconds: float, keep: Path) -> Counter[str]:
    """Try that many damaged files, or for that long; how many there were, and how many of each fault."""
    keep.mkdir(parents=True, exist_ok=True)
    right()
    log, size, start, totals = keep / f"faults-{seed}.jsonl", 500, time.time(), Counter[str]()
    for number in range(-(-count // size)):
        if time.time() - start > seconds:
            break
        child = os.fork()
        if not child:
            try:
                batch(seed, number, min(size, count - number * size), keep, log)
            except BaseException:
                traceback.print_exc()
                os._exit(3)
            os._exit(0)
        status = waited(child, 300)
        if status:
            kept = keep / f"{seed}.{number}.crash.acz"
            kept.write_bytes((keep / "current.bin").read_bytes())
            what = "hang" if status == -signal.SIGALRM else f"crash, status {status}"
            with log.open("a") as out:
                out.write(json.dumps({"file": kept.name, "what": what}) + "\n")
            totals["crashed batches"] += 1
        else:
            totals += Counter(json.loads((keep / "counts.json").read_text()))
        done = totals["forged"] + totals["unmended"]
        if number % 10 == 9:
            print(f"{done} files, {time.time() - start:.0f} s, crashes {totals['crashed batches']}", flush=True)
    if log.exists():
        totals += Counter("fault: " + json.loads(line)["what"][:90] for line in log.read_text().splitlines())
    return totals


def waited(child: int, seconds: float) -> int:
    """A child's exit status; it is killed, and the status that of SIGALRM, where it takes longer."""
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def with_atheris(seconds: float, seed: int, keep: Path) -> None:
    """Coverage-guided: files are kept that reach new lines of the codec."""
    import atheris

    modules = [n for n in sys.modules if n.startswith(("autocompress.codec.", "autocompress.compress.ar"))]
    for name in modules:  # kernels are compiled from their source and stay as they are
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, FunctionType) and value.__module__ == name and not name.endswith(".jit"):
                atheris.instrument_func(value)
    samples, seen, path = small_corpus(), set[str](), Path(tempfile.mkdtemp()) / "x.acz"
    right()
    honest, grown = keep / "honest", keep / "grown"
    for folder in (honest, grown):
        folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        (honest / sample.name).write_bytes(sample.data)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        draw = Random(number)
        if draw.random() < 0.4:
            with suppress(Exception):
                own = Sample("grown", bytes(data))
                return assemble(damaged_pieces(draw, take_apart(own.data), (own, *samples)))[:most]
        changed = atheris.Mutate(data, most)
        return mended(changed)[:most] if draw.random() < 0.9 else changed

    def one(data: bytes) -> None:
        for model in (None, Net()):
            for text in faults(Damaged(data, Sample("atheris", data, model), True), path):
                key = text.split(":")[0] + text[-60:]
                if key not in seen:
                    seen.add(key)
                    place = keep / f"atheris-{seed}-{len(seen)}.acz"
                    place.write_bytes(data)
                    print(json.dumps({"file": place.name, "what": text}), flush=True)

    with kernels_called(Fence()), few_elements(1 << 16):
        settings = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=20000", "-timeout=60",
                    "-rss_limit_mb=6000", f"-artifact_prefix={keep}/", "-len_control=0"]  # fmt: skip
        atheris.Setup([sys.argv[0], *settings, str(grown), str(honest)], one, custom_mutator=mutate)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no batch begins later")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder for what is found")
    parser.add_argument("--atheris", action="store_true", help="coverage-guided")
    options = parser.parse_args()
    if options.atheris:
        return with_atheris(options.seconds, options.seed, options.keep)
    start = time.time()
    totals = run(options.count, options.seed, options.seconds, options.keep)
    for name, number in sorted(totals.items()):
        print(f"{number:8d}  {name}")
    print(f"{time.time() - start:.0f} s")
    sys.exit(any(name.startswith(("fault", "crash")) for name in totals))


if __name__ == "__main__":
    main()
