"""The artifact file: named tensors and a JSON header in one checksummed file.

The head is described in `header`. The stream of a tensor, by its kind:

    raw      `plain`'s bytes ("raw/max" if they use the max coder)
    sparse   the length of a mask's stream, that stream, the values under the mask as `plain`'s bytes
    coded    a table of values (`tables`), a stream of symbols into it
    grid     scale (float32), lowest level (int32), size (a number), a stream of symbols: evenly spaced values

Streams of symbols and masks come from the coder that the kind names after its slash: the fast one
(`rans`), the max coder (`mixed_stream`) or Deep Compression's (`huffman`). Numbers are LEB128.
Nothing in a file is executed, and every length is checked before memory is taken.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import first_format, header, huffman, leb128, mixed_stream, plain, rans, rans_kernels, tables
from autocompress.codec.header import FAST, HUFFMAN, MAX, Entry
from autocompress.codec.tensors import Artifact, Coded, Raw, grid_table, numpy_type
from autocompress.errors import ArtifactError

AUTO = "auto"
EFFORTS = (AUTO, FAST, MAX, HUFFMAN)
"""`pack`'s efforts: the fast coder, the max coder, the shorter of both for files that are not large, Huffman codes."""
MAX_ELEMENTS = 1 << 30
"""Elements of all tensors together that a file may ask for, unless the reader allows more."""
MOST_MIXED = 1 << 22
"""Elements of all tensors together up to which "auto" tries the max coder."""
FREE, PER_BYTE = 1 << 20, 64
"""Elements that a file may have the max coder make of nothing, and of each byte of a tensor's stream.

The max coder decodes some million elements a second, whatever their bytes: else a small file could
ask for hours.
"""
SPARSE = 0.7
"""The share of nonzero elements up to which a tensor of floats is tried as a mask and values."""
_PER_FLOAT = 8
"""How many elements a float counts as: the max coder tells its upper half in sixteen decisions or more."""
_GRID = struct.Struct("<fi")


def pack(artifact: Artifact, effort: str = AUTO) -> bytes:
    """The bytes of the file. `unpack` gives back an equal artifact. Raises ValueError for an unknown effort."""
    effort = settled(effort, sum(math.prod(tensor.shape) for tensor in artifact.tensors.values()))
    rows, streams, free = [], [], FREE
    units: dict[int, NDArray[np.bool_]] = {}
    for index, (name, tensor) in enumerate(artifact.tensors.items()):
        feeder = _feeder(units, index, tensor) if effort in (AUTO, MAX) else None
        kind, stream = _encode(tensor, effort, feeder)
        if isinstance(tensor, Coded) and len(tensor.shape) > 1 and effort in (AUTO, MAX):
            units[index] = dead_units(tensor)
        if _mixed_freely(kind, math.prod(tensor.shape), len(stream)) > free:
            kind, stream = _encode(tensor, FAST)
        free -= _mixed_freely(kind, math.prod(tensor.shape), len(stream))
        rows.append((name, kind, tensor.dtype, tensor.shape))
        streams.append(stream)
    return b"".join([header.write(artifact.header, rows, streams), *streams])


def settled(effort: str, elements: int) -> str:
    """The effort that a file of so many elements comes to. Raises ValueError for an unknown effort."""
    if effort not in EFFORTS:
        raise ValueError(f"effort is {effort!r}, allowed: {', '.join(EFFORTS)}")
    return FAST if effort == AUTO and elements > MOST_MIXED else effort


def unpack(data: bytes, *, max_elements: int = MAX_ELEMENTS) -> Artifact:
    """The artifact in `data`. Raises ArtifactError for anything damaged, truncated or too large."""
    archive = Archive(data, max_elements)
    return Artifact({name: archive.tensor(name) for name in archive.entries}, archive.header)


@dataclass(frozen=True)
class Part:
    """Elements start .. stop - 1 of a tensor, in row order, of NumPy's type `dtype`.

    `into` decodes them into an array of that size and type, in any thread.
    """

    start: int
    stop: int
    dtype: np.dtype[Any]
    into: Callable[[NDArray[Any]], None]

    def values(self) -> NDArray[Any]:
        """The elements in an array of their own."""
        array = np.empty(self.stop - self.start, self.dtype)
        self.into(array)
        return array


@dataclass(frozen=True)
class Sizes:
    """Bytes of a tensor's stream: where its values are zero or not, which values they are, the table that these go by.

    The max coder tells both in one stream: its mask is what the mask alone would take.
    """

    mask: int
    codes: int
    table: int


class Archive:
    """A file whose tensors are decoded when they are asked for. Any thread may ask.

    Raises ArtifactError where the file is no artifact, is truncated, or asks for more than
    `max_elements` in all; a damaged stream is told when it is decoded.
    """

    def __init__(self, data: bytes, max_elements: int = MAX_ELEMENTS) -> None:
        head = header.read(data)
        self._data, self._first = memoryview(data), head.first
        self.header, self.size = head.header, len(data)
        self.entries = {entry.name: entry for entry in head.entries}
        self._all = head.entries
        self._order = {entry.name: index for index, entry in enumerate(head.entries)}
        self._units: dict[int, NDArray[np.bool_]] = {}
        _check_sizes(head, len(data), max_elements)

    def stream(self, name: str) -> bytes:
        """A tensor's bytes. Raises ArtifactError where they are not what was written."""
        return self._view(name).tobytes()

    def _view(self, name: str) -> memoryview:
        entry = self.entries[name]
        stream = self._data[entry.start : entry.start + entry.length]
        if zlib.crc32(stream) != entry.checksum:
            raise ArtifactError(f"artifact is damaged: the checksum of {name!r} is wrong")
        return stream

    def tensor(self, name: str) -> Raw | Coded:
        """A tensor, decoded. Raises ArtifactError."""
        entry, stream = self.entries[name], self.stream(name)
        with _damage_at(name):
            if self._first:
                tensor = first_format.decode_tensor(entry.kind, entry.dtype, entry.shape, stream)
                return _checked(tensor) if isinstance(tensor, Coded) else tensor
            return _decode(entry, stream, self._dead(self._order[name]))

    def _dead(self, index: int) -> NDArray[np.bool_] | None:
        """The dead units of the layer that feeds a tensor, None where none is told.

        Feeders may have feeders: they are decoded one after the other, the first one first.
        """
        entries, chain = self._all, []
        while distance := self._feeder_of(entries[index]):
            index -= distance
            if index < 0 or len(entries[index].shape) < 2 or not entries[index].coder:
                raise ArtifactError(f"its feeder, {distance} tensors before, is no layer")
            chain.append(index)
            if index in self._units:
                break
        dead: NDArray[np.bool_] | None = None
        for feeder in reversed(chain):
            if feeder not in self._units:
                found = _decode(entries[feeder], self.stream(entries[feeder].name), dead)
                self._units[feeder] = dead_units(found)
            dead = self._units[feeder]
        return dead

    def _feeder_of(self, entry: Entry) -> int:
        if entry.kind not in ("coded/max", "grid/max"):
            return 0
        stream = self.stream(entry.name)
        return mixed_stream.feeder_of(stream[_read_table(entry.kind, stream)[2] :])

    def sizes(self, name: str, tensor: Raw | Coded) -> Sizes:
        """Where the bytes of a tensor's stream are; `tensor` is what it decodes to. Raises ArtifactError."""
        entry, stream = self.entries[name], self.stream(name)
        if self._first or entry.kind.startswith("raw"):
            return Sizes(0, entry.length, 0)
        if entry.kind.startswith("sparse"):
            length, position = leb128.read(stream, 0)
            return Sizes(position + length, entry.length - position - length, 0)
        assert isinstance(tensor, Coded)
        at = _read_table(entry.kind, stream)[2]
        if entry.coder == FAST:
            mask = rans.mask_bytes(stream[at:], entry.shape)
        elif entry.coder == HUFFMAN:
            mask = huffman.gap_bytes(stream[at:], entry.shape)
        else:
            mask = min(len(mixed_stream.encode(mixed_stream.mask(tensor.symbols))), entry.length - at)
        return Sizes(mask, entry.length - at - mask, at)

    def parts(self, name: str) -> list[Part]:
        """A tensor in parts that decode independently: float32 values, or a raw tensor's own; one axis.

        bfloat16 comes as its bits, in uint16.
        """
        entry = self.entries[name]
        if self._first or entry.kind not in ("coded/fast", "grid/fast"):
            coded = not entry.kind.startswith(("raw", "sparse"))
            dtype = np.dtype(np.float32) if coded else numpy_type(entry.dtype)
            return [Part(0, entry.elements, dtype, partial(self._whole, name))]
        stream = self._view(name)
        with _damage_at(name):
            table, _, position = _read_table(entry.kind, stream)
            found = rans.blocks(stream[position:], entry.shape)
        float32 = np.dtype(np.float32)
        return [Part(block.start, block.stop, float32, partial(_look_up, name, block, table)) for block in found]

    def _whole(self, name: str, array: NDArray[Any]) -> None:
        tensor = self.tensor(name)
        array[:] = (tensor.values() if isinstance(tensor, Coded) else tensor.array).reshape(-1)


def dead_units(tensor: Raw | Coded) -> NDArray[np.bool_]:
    """Which units of a layer of two axes or more are dead: the rows of its weight that are zero throughout."""
    other = (tensor.table != 0)[tensor.symbols] if isinstance(tensor, Coded) else tensor.array != 0
    rows = tensor.shape[0]
    return ~other.reshape(rows, -1).any(axis=1) if rows else np.zeros(0, np.bool_)


def _feeder(units: Mapping[int, NDArray[np.bool_]], index: int, tensor: Raw | Coded) -> mixed_stream.Feeder | None:
    """The nearest layer before a tensor whose units fit its columns, if any of them is dead."""
    if not isinstance(tensor, Coded) or len(tensor.shape) < 2:
        return None
    columns = math.prod(tensor.shape[1:])
    for before in range(index - 1, -1, -1):
        if before in units and units[before].size > 1 and columns and not columns % units[before].size:
            return mixed_stream.Feeder(index - before, units[before]) if units[before].any() else None
    return None


def _check_sizes(head: header.Head, length: int, max_elements: int) -> None:
    """Raises ArtifactError unless the streams fill the file and ask for no more than is allowed."""
    total = mixed = 0
    position = head.streams_at
    for entry in head.entries:
        total += math.prod(max(1, n) for n in entry.shape)
        mixed += _mixed_freely(entry.kind, entry.elements, entry.length)
        if mixed > FREE:
            raise ArtifactError(f"artifact is damaged: {entry.elements} symbols of {entry.name!r} in few bytes")
        if total > max_elements:
            raise ArtifactError(f"artifact asks for {total} elements at {entry.name!r}, allowed: {max_elements}")
        position += entry.length
        if position > length:
            left = max(0, length - position + entry.length)
            raise ArtifactError(f"artifact is truncated: {entry.name!r} has {entry.length} bytes, {left} are there")
    if position != length:
        raise ArtifactError(f"artifact is damaged: {length - position} bytes follow its last tensor")


def stream_bytes(tensor: Raw | Coded, effort: str = AUTO) -> int:
    """The length of a tensor's stream in a file of that `settled` effort."""
    return len(_encode(tensor, effort)[1])


def _mixed_freely(kind: str, elements: int, length: int) -> int:
    """Elements that the max coder has to decode beyond what the stream's bytes allow."""
    passes = {"raw": _PER_FLOAT, "sparse": 1 + _PER_FLOAT}.get(kind.partition("/")[0], 1) if kind.endswith(MAX) else 0
    return max(0, passes * elements - PER_BYTE * length)


@contextmanager
def _damage_at(name: str) -> Iterator[None]:
    """Tells whatever is wrong with a stream as an ArtifactError with the tensor's name."""
    try:
        yield
    except (struct.error, ValueError, ArtifactError) as error:
        raise ArtifactError(f"artifact is damaged at {name!r}: {error}") from error
    except MemoryError as error:
        raise ArtifactError(f"{name!r} asks for more memory than there is") from error


def _encode(tensor: Raw | Coded, effort: str, feeder: mixed_stream.Feeder | None = None) -> tuple[str, bytes]:
    """The kind and the stream of a tensor; its feeder, if there is one, is told where that is shorter."""
    mixed = effort in (AUTO, MAX)
    if isinstance(tensor, Coded):
        kind = "coded" if tensor.grid is None else "grid"
        head = tables.encode(tensor.table, mixed)
        if tensor.grid is not None:
            head = _GRID.pack(*tensor.grid) + leb128.write(tensor.table.size)
        coder, stream = _encode_symbols(tensor.symbols, effort, feeder)
        return f"{kind}/{coder}", head + stream
    whole = plain.encode(tensor.array, tensor.dtype, mixed)
    if tensor.array.dtype.kind == "f" and np.count_nonzero(tensor.array) <= SPARSE * tensor.array.size:
        mask = (tensor.array != 0) | np.signbit(tensor.array)
        coder, packed = _encode_symbols(mask, effort)
        sparse = leb128.write(len(packed)) + packed + plain.encode(tensor.array[mask], tensor.dtype, coder == MAX)
        if len(sparse) < len(whole):
            return f"sparse/{coder}", sparse
    return "raw/max" if plain.is_mixed(whole) else "raw", whole


def _encode_symbols(symbols: NDArray[Any], effort: str, feeder: mixed_stream.Feeder | None = None) -> tuple[str, bytes]:
    """The coder that an effort comes to, and its stream."""
    if effort == HUFFMAN:
        return HUFFMAN, huffman.encode(symbols)
    ways = []
    if effort != MAX:
        ways.append((FAST, rans.encode(symbols)))
    if effort != FAST:
        ways.append((MAX, mixed_stream.encode(symbols, None, feeder)))
    return min(ways, key=lambda way: len(way[1]))


_DECODERS = {FAST: rans.decode, MAX: mixed_stream.decode, HUFFMAN: huffman.decode}


def _decode(entry: Entry, stream: bytes, dead: NDArray[np.bool_] | None = None) -> Raw | Coded:
    """The tensor of a stream; `dead` are its feeder's units."""
    if entry.kind.startswith("raw"):
        if plain.is_mixed(stream) != (entry.coder == MAX):
            raise ArtifactError("its kind does not fit its coder")
        return Raw(plain.decode(stream, entry.dtype, entry.elements).reshape(entry.shape), entry.dtype)
    decode = _DECODERS[entry.coder]
    if entry.kind.startswith("sparse"):
        length, position = leb128.read(stream, 0)
        mask = decode(stream[position : position + length], entry.shape).astype(bool)
        rest = stream[position + length :]
        if plain.is_mixed(rest) and entry.coder != MAX:
            raise ArtifactError("its kind does not fit its coder")
        array = np.zeros(entry.shape, numpy_type(entry.dtype))
        array[mask] = plain.decode(rest, entry.dtype, int(np.count_nonzero(mask)))
        return Raw(array, entry.dtype)
    table, grid, position = _read_table(entry.kind, stream)
    symbols = stream[position:]
    told = mixed_stream.decode(symbols, entry.shape, dead) if entry.coder == MAX else decode(symbols, entry.shape)
    return _checked(Coded(told, table, entry.dtype, grid))


def _read_table(kind: str, stream: bytes | memoryview) -> tuple[NDArray[np.float32], tuple[float, int] | None, int]:
    """The values, the grid that they lie on, if any, and where the symbols begin."""
    if kind.startswith("coded"):
        table, position = tables.decode(stream, 0)
        return table, None, position
    scale, lowest = _GRID.unpack_from(stream)
    size, position = leb128.read(stream, _GRID.size)
    if size > tables.MOST:
        raise ArtifactError(f"a grid of {size} values, allowed: {tables.MOST}")
    return grid_table(scale, lowest, size), (scale, lowest), position


def _checked(tensor: Coded) -> Coded:
    if tensor.symbols.size and int(tensor.symbols.max()) >= tensor.table.size:
        raise ArtifactError(f"symbol {tensor.symbols.max()} of a table of {tensor.table.size}")
    return tensor


def _look_up(name: str, block: rans.Block, table: NDArray[np.float32], values: NDArray[np.float32]) -> None:
    if values.dtype != np.float32 or values.shape != (block.stop - block.start,):
        raise ValueError(f"an array of {values.shape} {values.dtype} for {block.stop - block.start} float32 values")
    with _damage_at(name):
        symbols = block.read()
        if symbols.size and int(symbols.max()) >= table.size:
            raise ArtifactError(f"symbol {symbols.max()} of a table of {table.size}")
        rans_kernels.look_up(symbols, symbols.size, table.view(np.int32), values.view(np.int32))
