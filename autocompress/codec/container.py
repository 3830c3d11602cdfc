"""The artifact file: named tensors and a JSON header in one checksummed file.

Layout, little-endian:

    "ACZ2"  magic
    u32     length of the header, u32 its CRC-32
    bytes   the header: the table of tensors, then JSON, UTF-8, deflated (RFC 1951, with `_DICTIONARY`)
    bytes   one stream after the other, as the table lists them

The table: the number of tensors; for each its kind and its dtype (one byte, the place in `_KINDS`
and `_DTYPES`), the number of its axes, their lengths, the length of its stream, and the stream's
CRC-32 (u32). Numbers are LEB128. The JSON's "tensors" are their names. In "ACZ1", which is still
read, the header is zlib's, and each entry of "tensors" is [name, kind, dtype, shape, length, CRC-32].

Kinds: "raw" (the tensor's bytes, planes of equal significance together, deflated where that is
smaller), "sparse" (mask stream and the values under it), "coded" (table, then a symbol stream) and
"grid" (the same with an evenly spaced table given as scale and lowest level). A kind that ends in
"/mixed" has its symbol stream from the max coder (`mixed_stream`), any other from the fast one
(`entropy`).
Nothing in a file is executed, and every length is checked before memory is taken.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import entropy, leb128, mixed_stream
from autocompress.errors import ArtifactError

MAGIC, FIRST_MAGIC = b"ACZ2", b"ACZ1"
_FRONT = struct.Struct("<4sII")
_MAX_HEADER = 16 * 1024 * 1024
_MOST_AXES = 16
MOST_MIXED = mixed_stream.MOST_ELEMENTS
"""Elements of all tensors together up to which a file may have streams of the max coder."""
MAX_ELEMENTS = 1 << 30
"""Elements of all tensors together that a file may ask for, unless the reader allows more."""

_MIXED = "/mixed"
_KINDS = ("raw", *(kind + coder for kind in ("sparse", "coded", "grid") for coder in ("", _MIXED)))
_DTYPES = {
    **{name: name for name in ("float64", "float32", "float16", "complex64", "complex128", "bool")},
    **{name: name for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")},
    "bfloat16": "uint16",
}


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
class Raw:
    """A tensor carried exactly. bfloat16 has no numpy type: `array` then holds its bits as uint16."""

    array: NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.array.shape)


@dataclass(frozen=True)
class Coded:
    """A tensor of few values: `symbols` (uint16, the tensor's shape) into `table` (float32, one axis).

    `grid`, where given, is (scale, lowest level): table[i] = scale * (lowest + i) in float32.
    """

    symbols: NDArray[np.uint16]
    table: NDArray[np.float32]
    dtype: str = "float32"
    grid: tuple[float, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.symbols.shape)

    def values(self) -> NDArray[np.float32]:
        """The tensor in float32."""
        result: NDArray[np.float32] = self.table[self.symbols]
        return result


def grid_table(scale: float, lowest: int, size: int) -> NDArray[np.float32]:
    """The table of an evenly spaced grid: float32(scale) * (lowest + i), i < size."""
    levels = np.arange(lowest, lowest + size, dtype=np.float32)
    table: NDArray[np.float32] = np.float32(scale) * levels
    return table


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, in file order, and the header's other entries."""

    tensors: Mapping[str, Raw | Coded]
    header: Mapping[str, Any] = field(default_factory=dict)


def pack(artifact: Artifact) -> bytes:
    """The bytes of the file. `unpack` gives back an equal artifact.

    Up to `MOST_MIXED` elements in all, both coders are tried on each tensor; beyond, where their
    time would tell, the fast one alone is used.
    """
    mixed = sum(math.prod(tensor.shape) for tensor in artifact.tensors.values()) <= MOST_MIXED
    table, streams = [leb128.write(len(artifact.tensors))], []
    for tensor in artifact.tensors.values():
        kind, stream = _encode(tensor, mixed)
        codes = bytes([_KINDS.index(kind), list(_DTYPES).index(tensor.dtype)])
        sizes = leb128.write(len(tensor.shape), *tensor.shape, len(stream))
        table.append(codes + sizes + struct.pack("<I", zlib.crc32(stream)))
        streams.append(stream)
    names = list(artifact.tensors)
    text = json.dumps({**artifact.header, "tensors": names}, separators=(",", ":"), ensure_ascii=False)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    header = b"".join(table) + deflater.compress(text.encode()) + deflater.flush()
    return b"".join([_FRONT.pack(MAGIC, len(header), zlib.crc32(header)), header, *streams])


def read_header(data: bytes) -> dict[str, Any]:
    """The JSON header alone, without decoding any tensor; its "tensors" are lists of name, kind, dtype, shape,
    stream length and CRC-32, "streams_at" is where the first stream begins. Raises ArtifactError."""
    if len(data) < _FRONT.size or data[:4] not in (MAGIC, FIRST_MAGIC):
        raise ArtifactError(f"not an autocompress artifact: it starts with {bytes(data[:4])!r}, not {MAGIC!r}")
    _, length, checksum = _FRONT.unpack_from(data)
    packed = data[_FRONT.size : _FRONT.size + length]
    if len(packed) != length:
        raise ArtifactError(f"artifact is truncated: its header has {length} bytes, {len(packed)} are there")
    if zlib.crc32(packed) != checksum:
        raise ArtifactError("artifact is damaged: its header's checksum is wrong")
    table: list[list[Any]] | None = None
    if data[:4] == MAGIC:
        table, position = _read_table(packed)
        text = _inflate(packed[position:], _MAX_HEADER, zlib.decompressobj(-15, zdict=_DICTIONARY))
    else:
        text = _inflate(packed, _MAX_HEADER)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact is damaged: its header is no JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), list):
        raise ArtifactError("artifact is damaged: its header lists no tensors")
    if table is not None:
        if len(table) != len(header["tensors"]):
            raise ArtifactError(f"artifact is damaged: {len(header['tensors'])} names for {len(table)} tensors")
        header["tensors"] = [[name, *row] for name, row in zip(header["tensors"], table, strict=True)]
    return header | {"streams_at": _FRONT.size + length}


def _read_table(packed: bytes) -> tuple[list[list[Any]], int]:
    """Kind, dtype, shape, stream length and CRC-32 of each tensor, and where the JSON begins."""
    count, position = leb128.read(packed, 0)
    dtypes, rows = list(_DTYPES), []
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
        if kind >= len(_KINDS) or dtype >= len(dtypes) or len(packed) < position + 4:
            raise ArtifactError(f"artifact is damaged: kind {kind} and dtype {dtype} in its table of tensors")
        rows.append([_KINDS[kind], dtypes[dtype], shape, length, *struct.unpack_from("<I", packed, position)])
        position += 4
    return rows, position


def shapes(header: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a header lists, by name. Raises ArtifactError for a malformed list."""
    entries = [_check_entry(entry) for entry in header["tensors"]]
    return {name: shape for name, _, _, shape, _, _ in entries}


def unpack(data: bytes, *, max_elements: int = MAX_ELEMENTS) -> Artifact:
    """The artifact in `data`. Raises ArtifactError for anything damaged, truncated or too large."""
    header = read_header(data)
    position = header.pop("streams_at")
    tensors: dict[str, Raw | Coded] = {}
    total, mixed = 0, 0
    for entry in header.pop("tensors"):
        name, kind, dtype, shape, length, checksum = _check_entry(entry)
        total += math.prod(max(1, n) for n in shape)
        mixed += math.prod(shape) if kind.endswith(_MIXED) else 0
        if mixed > MOST_MIXED:  # else a small file could ask for hours of decoding
            raise ArtifactError(f"artifact is damaged: {mixed} mixed symbols at {name!r}, allowed: {MOST_MIXED}")
        if total > max_elements:
            raise ArtifactError(f"artifact asks for {total} elements at {name!r}, allowed: {max_elements}")
        stream = data[position : position + length]
        if len(stream) != length:
            raise ArtifactError(f"artifact is truncated: {name!r} has {length} bytes, {len(stream)} are there")
        if zlib.crc32(stream) != checksum:
            raise ArtifactError(f"artifact is damaged: the checksum of {name!r} is wrong")
        if name in tensors:
            raise ArtifactError(f"artifact is damaged: it holds {name!r} twice")
        position += length
        tensors[name] = _decode(name, kind, dtype, shape, stream)
    if position != len(data):
        raise ArtifactError(f"artifact is damaged: {len(data) - position} bytes follow its last tensor")
    return Artifact(tensors, header)


def _check_entry(entry: Any) -> tuple[str, str, str, tuple[int, ...], int, int]:
    match entry:
        case [str(name), str(kind), str(dtype), list(shape), int(length), int(checksum)]:
            pass
        case _:
            raise ArtifactError("artifact is damaged: an entry of its tensor list is malformed")
    if kind not in _KINDS:
        raise ArtifactError(f"artifact is damaged: {name!r} is of unknown kind {kind!r}")
    if dtype not in _DTYPES:
        raise ArtifactError(f"artifact is damaged: {name!r} has unknown dtype {dtype!r}")
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or length < 0:
        raise ArtifactError(f"artifact is damaged: {name!r} has shape {shape} and length {length}")
    return name, kind, dtype, tuple(shape), length, checksum


def _encode(tensor: Raw | Coded, mixed: bool) -> tuple[str, bytes]:
    if isinstance(tensor, Coded):
        coder, stream = _encode_symbols(tensor.symbols, max(1, tensor.table.size), mixed)
        if tensor.grid is not None:
            return "grid" + coder, struct.pack("<fiH", *tensor.grid, tensor.table.size - 1) + stream
        return "coded" + coder, struct.pack("<H", tensor.table.size - 1) + tensor.table.astype("<f4").tobytes() + stream
    array = np.ascontiguousarray(tensor.array)
    raw = _pack_bytes(array)
    if array.dtype.kind != "f" or np.count_nonzero(array) > 0.7 * array.size:
        return "raw", raw
    mask = (array != 0) | np.signbit(array)
    coder, packed_mask = _encode_symbols(mask, 2, mixed)
    sparse = struct.pack("<I", len(packed_mask)) + packed_mask + _pack_bytes(array[mask])
    return ("sparse" + coder, sparse) if len(sparse) < len(raw) else ("raw", raw)


def _encode_symbols(symbols: NDArray[Any], alphabet: int, mixed: bool) -> tuple[str, bytes]:
    """The fast coder's stream, or the max coder's where that is asked for and shorter; what its kind ends in."""
    fast = entropy.encode(symbols, alphabet)
    if not mixed:
        return "", fast
    slow = mixed_stream.encode(symbols)
    return (_MIXED, slow) if len(slow) < len(fast) else ("", fast)


def _decode(name: str, kind: str, dtype: str, shape: tuple[int, ...], stream: bytes) -> Raw | Coded:
    count = math.prod(shape)
    decode = mixed_stream.decode if kind.endswith(_MIXED) else entropy.decode
    kind = kind.removesuffix(_MIXED)
    try:
        if kind == "raw":
            return Raw(_unpack_bytes(stream, dtype, count).reshape(shape), dtype)
        if kind == "sparse":
            (length,) = struct.unpack_from("<I", stream)
            mask = decode(stream[4 : 4 + length], shape).astype(bool)
            array = np.zeros(shape, _numpy_type(dtype))
            array[mask] = _unpack_bytes(stream[4 + length :], dtype, int(mask.sum()))
            return Raw(array, dtype)
        if kind == "grid":
            scale, lowest, highest = struct.unpack_from("<fiH", stream)
            table, grid, position = grid_table(scale, lowest, highest + 1), (scale, lowest), 10
        else:
            (highest,) = struct.unpack_from("<H", stream)
            position = 2 + 4 * (highest + 1)
            table, grid = np.frombuffer(stream, "<f4", highest + 1, 2).astype(np.float32), None
        symbols = decode(stream[position:], shape)
    except (struct.error, ValueError) as error:
        raise ArtifactError(f"artifact is damaged at {name!r}: {error}") from error
    if symbols.size and int(symbols.max()) >= table.size:
        raise ArtifactError(f"artifact is damaged at {name!r}: symbol {symbols.max()} of a table of {table.size}")
    return Coded(symbols, table, dtype, grid)


def _numpy_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(_DTYPES[dtype]).newbyteorder("<")


def _pack_bytes(array: NDArray[Any]) -> bytes:
    """A flag byte (0 plain, 1 deflated) and the bytes, most significant planes together."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    flat = np.frombuffer(little.tobytes(), np.uint8)
    planes = flat.reshape(-1, array.dtype.itemsize).T.tobytes() if flat.size else b""
    deflated = zlib.compress(planes, 6)
    return b"\1" + deflated if len(deflated) < len(planes) else b"\0" + planes


def _unpack_bytes(data: bytes, dtype: str, count: int) -> NDArray[Any]:
    kind = _numpy_type(dtype)
    size = count * kind.itemsize
    if data[:1] not in (b"\0", b"\1"):
        raise ArtifactError(f"artifact is damaged: a raw stream starts with {data[:1]!r}")
    planes = _inflate(data[1:], size) if data[:1] == b"\1" else data[1:]
    if len(planes) != size:
        raise ArtifactError(f"artifact is damaged: {len(planes)} bytes for {count} elements of {dtype}")
    flat = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, count).T
    return np.frombuffer(np.ascontiguousarray(flat).tobytes(), kind).astype(kind.newbyteorder("="))


def _inflate(data: bytes, limit: int, machine: Any = None) -> bytes:
    """Inflated bytes, never more than `limit`."""
    machine = machine or zlib.decompressobj()
    try:
        result: bytes = machine.decompress(data, limit + 1)
    except zlib.error as error:
        raise ArtifactError(f"artifact is damaged: {error}") from error
    if len(result) > limit or not machine.eof or machine.unused_data:
        raise ArtifactError("artifact is damaged: a deflated part has the wrong length")
    return result
