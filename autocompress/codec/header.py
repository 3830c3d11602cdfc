"""The head of a file: what its tensors are and where their streams lie, then any JSON.

Little-endian:

    "ACZ3"  magic
    u32     length of the header, u32 its CRC-32
    bytes   the header: the table of tensors, then JSON, UTF-8, deflated (RFC 1951, with `_DICTIONARY`)
    bytes   one stream after the other, as the table lists them

The table: the number of tensors; for each its kind and its dtype (one byte, the place in `KINDS`
and `DTYPES`), the number of its axes, their lengths, the length of its stream, and the stream's
CRC-32 (u32). Numbers are LEB128. The JSON's "tensors" are their names. In "ACZ1", which is still
read, the header is zlib's, and each entry of "tensors" is [name, kind, dtype, shape, length, CRC-32].
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from autocompress.codec import leb128, plain
from autocompress.codec.tensors import DTYPES
from autocompress.errors import ArtifactError

MAGIC, FIRST_MAGIC = b"ACZ3", b"ACZ1"
FAST, MAX, HUFFMAN = "fast", "max", "huffman"
CODERS = (FAST, MAX, HUFFMAN)
KINDS = ("raw", "raw/max", *(f"{kind}/{coder}" for kind in ("sparse", "coded", "grid") for coder in CODERS))
"""How a tensor is told, and by which coder; the order is part of the format."""
_FIRST_KINDS = ("raw", "sparse", "coded", "grid")
_FRONT = struct.Struct("<4sII")
_MAX_HEADER = 16 * 1024 * 1024
_FREE_HEADER, _PER_BYTE = 1 << 16, 32
"""Bytes of JSON that a header may always have, and more for each of its own bytes: else a small file could ask for much
memory."""
_MOST_NESTED = 200
_MOST_AXES = 16
_DICTIONARY = (
    b'[["Tanh",{}],["GELU",{}],["SiLU",{}],["Sigmoid",{}],["Softmax",{"dim":-1}],["Dropout",{"p":0.1}],["Embedding",'
    b'["LSTM",["GroupNorm",{"num_groups":["LayerNorm",{"normalized_shape":[["BatchNorm1d",["AvgPool2d",'
    b'["Conv1d",["ConvTranspose2d",["Identity",{}],["LeakyReLU",{}],["AdaptiveAvgPool2d",{"output_size":[1,1]}],'
    b'"class":"embed.conv1.bn1.layer1.fc1.fc2.head.encoder.attention.query.key.value.out.downsample.0.running_mean",'
    b'"running_var","num_batches_tracked","float32","float16","bfloat16","codebook","uniform",'
    b'"padding_mode":"zeros","stride":[2,2],"padding":[1,1],"dilation":[1,1],"groups":"bias":false}],'
    b'{"made_by":"0.1.0","ranks":{"0":[8,"channel"],"1":[16,"spatial"]},"plan":{"0":[4,0.0],"2":[3,1.5],"model":'
    b'["Sequential",[["0",["Conv2d",{"in_channels":1,"out_channels":16,"kernel_size":[3,3],"padding":[1,1]}]],'
    b'["1",["BatchNorm2d",{"num_features":16}]],["2",["ReLU",{}]],["3",["MaxPool2d",{"kernel_size":2,"stride":2}]],'
    b'["4",["Flatten",{}]],["5",["Linear",{"in_features":64,"out_features":10}]],["6",["ReLU",{}]]]],'
    b'"tensors":["0.weight","0.bias","1.weight","1.bias","2.weight","2.bias","2.0.weight","2.1.weight","2.1.bias",'
    b'"3.weight","3.bias","4.weight","4.bias","5.weight","5.bias","6.weight","6.bias","8.weight","8.bias"]}'
)
"""What the JSON of small models is likely to hold, most likely last; the compressor refers to it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. Its stream is the `length` bytes from `start` on."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int
    checksum: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def coder(self) -> str:
        """The coder of its symbols, "" where there is none."""
        return self.kind.partition("/")[2]


@dataclass(frozen=True)
class Head:
    """`header` is the JSON without the tensors; `first` is true for a file of the first format."""

    entries: tuple[Entry, ...]
    header: Mapping[str, Any]
    streams_at: int
    first: bool = False


Row = tuple[str, str, str, tuple[int, ...]]
"""Name, kind, dtype and shape of a tensor."""


def write(header: Mapping[str, Any], rows: Sequence[Row], streams: Sequence[bytes]) -> bytes:
    """All of a file that comes before its streams."""
    table = [leb128.write(len(rows))]
    for (_, kind, dtype, shape), stream in zip(rows, streams, strict=True):
        codes = bytes([KINDS.index(kind), list(DTYPES).index(dtype)])
        sizes = leb128.write(len(shape), *shape, len(stream))
        table.append(codes + sizes + struct.pack("<I", zlib.crc32(stream)))
    names = {"tensors": [name for name, *_ in rows]}
    text = json.dumps({**header, **names}, separators=(",", ":"), ensure_ascii=False).encode()
    short = plain.deflate(text, 9, _DICTIONARY)
    packed = b"".join(table) + (short if len(text) <= _most_text(short) else plain.deflate(text, 0, _DICTIONARY))
    return _FRONT.pack(MAGIC, len(packed), zlib.crc32(packed)) + packed


def read(data: bytes) -> Head:
    """What a file holds, from its first bytes alone. Raises ArtifactError."""
    if data[:4] not in (MAGIC, FIRST_MAGIC) or len(data) < _FRONT.size:
        raise ArtifactError(f"not an autocompress artifact: it starts with {bytes(data[:4])!r}, not {MAGIC!r}")
    _, length, checksum = _FRONT.unpack_from(data)
    packed = bytes(data[_FRONT.size : _FRONT.size + length])
    if len(packed) != length:
        raise ArtifactError(f"artifact is truncated: its header has {length} bytes, {len(packed)} are there")
    if zlib.crc32(packed) != checksum:
        raise ArtifactError("artifact is damaged: its header's checksum is wrong")
    first = data[:4] == FIRST_MAGIC
    if first:
        header = _json(_unzipped(packed))
        rows = header["tensors"]
    else:
        table, position = _read_table(packed)
        header = _json(plain.inflate(packed[position:], _most_text(packed[position:]), _DICTIONARY))
        if len(table) != len(header["tensors"]):
            raise ArtifactError(f"artifact is damaged: {len(header['tensors'])} names for {len(table)} tensors")
        rows = [[name, *row] for name, row in zip(header["tensors"], table, strict=True)]
    start = _FRONT.size + length
    starts = accumulate((_length(row) for row in rows), initial=start)
    kinds = _FIRST_KINDS if first else KINDS
    entries = tuple(_entry(row, at, kinds) for row, at in zip(rows, starts, strict=False))
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise ArtifactError(f"artifact is damaged: it holds {entry.name!r} twice")
        names.add(entry.name)
    return Head(entries, {k: v for k, v in header.items() if k != "tensors"}, start, first)


def _read_table(packed: bytes) -> tuple[list[list[Any]], int]:
    """Kind, dtype, shape, stream length and CRC-32 of each tensor, and where the JSON begins."""
    count, position = leb128.read(packed, 0)
    dtypes, rows = list(DTYPES), []
    for _ in range(count):
        if len(packed) < position + 3:
            raise ArtifactError("artifact is damaged: its table of tensors has no end")
        kind, dtype = packed[position], packed[position + 1]
        axes, position = leb128.read(packed, position + 2)
        shape = []
        for _ in range(min(axes, _MOST_AXES + 1)):
            size, position = leb128.read(packed, position)
            shape.append(size)
        length, position = leb128.read(packed, position)
        if kind >= len(KINDS) or dtype >= len(dtypes) or len(packed) < position + 4:
            raise ArtifactError(f"artifact is damaged: kind {kind} and dtype {dtype} in its table of tensors")
        rows.append([KINDS[kind], dtypes[dtype], shape, length, *struct.unpack_from("<I", packed, position)])
        position += 4
    return rows, position


def _most_text(packed: bytes) -> int:
    """Bytes of JSON that so many bytes may hold."""
    return min(_MAX_HEADER, _FREE_HEADER + _PER_BYTE * len(packed))


def _json(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact is damaged: its header is no JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), list):
        raise ArtifactError("artifact is damaged: its header lists no tensors")
    level: list[Any] = [header]
    for _ in range(_MOST_NESTED):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, list | dict)]
    if level:
        raise ArtifactError(f"artifact is damaged: its header is nested more than {_MOST_NESTED} times")
    return header


def _unzipped(packed: bytes) -> bytes:
    """The first format's header, which has zlib's frame around it."""
    machine = zlib.decompressobj()
    try:
        text = machine.decompress(packed, _most_text(packed) + 1)
    except zlib.error as error:
        raise ArtifactError(f"artifact is damaged: {error}") from error
    if len(text) > _most_text(packed) or not machine.eof or machine.unused_data:
        raise ArtifactError("artifact is damaged: its header has the wrong length")
    return text


def _length(row: Any) -> int:
    return row[4] if isinstance(row, list) and len(row) == 6 and type(row[4]) is int else 0


def _entry(row: Any, start: int, kinds: Sequence[str]) -> Entry:
    match row:
        case [str(name), str(kind), str(dtype), list(shape), int(length), int(checksum)]:
            pass
        case _:
            raise ArtifactError("artifact is damaged: an entry of its tensor list is malformed")
    if kind not in kinds:
        raise ArtifactError(f"artifact is damaged: {name!r} is of unknown kind {kind!r}")
    if dtype not in DTYPES:
        raise ArtifactError(f"artifact is damaged: {name!r} has unknown dtype {dtype!r}")
    fits = all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and type(length) is int and 0 <= length < 1 << 62
    if len(shape) > _MOST_AXES or not fits:
        raise ArtifactError(f"artifact is damaged: {name!r} has shape {shape} and length {length}")
    return Entry(name, kind, dtype, tuple(shape), start, length, checksum)
