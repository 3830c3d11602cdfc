"""Decodes an artifact by docs/artifact-format.md alone: NumPy and a range decoder, nothing of autocompress.

    python scripts/decode_artifact.py FILE.acz OUTPUT.npz

Writes every tensor under its name, bfloat16 as float32, and the header. Slow, and meant to be read: it is the proof
that the page says all. Huffman streams, which only `--coder huffman` writes, are left out.
"""

import json
import math
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from range_decoder import levels

DICTIONARY = (Path(__file__).parent.parent / "docs" / "artifact-dictionary.txt").read_bytes()
KINDS = ["raw", "raw/max", *(f"{kind}/{c}" for kind in ("sparse", "coded", "grid") for c in ("fast", "max", "huffman"))]
FLOATS, INTEGERS = "float64 float32 float16 complex64 complex128", "int64 int32 int16 int8 uint8 uint16 uint32 uint64"
DTYPES = [*FLOATS.split(), "bool", *INTEGERS.split(), "bfloat16"]
BLOCK = 1 << 20


def number(file):
    byte = file.read(1)[0]
    return byte if byte < 128 else byte - 128 + 128 * number(file)


def numbers(file, count):
    return [number(file) for _ in range(count)]


def array(file, dtype, count):
    return np.frombuffer(file.read(np.dtype(dtype).itemsize * count), dtype, count)


def decode(data):
    """The header's JSON and the tensors by name; bfloat16 as float32."""
    assert data[:4] == b"ACZ3", "no artifact of this format"
    length, checksum = np.frombuffer(data, "<u4", 2, 4)
    head, position, rows, tensors = BytesIO(data[12 : 12 + length]), 12 + int(length), [], {}
    assert zlib.crc32(head.getbuffer()) == checksum, "damaged header"
    for _ in range(number(head)):
        kind, dtype = head.read(2)
        shape = tuple(numbers(head, number(head)))
        rows.append((KINDS[kind], DTYPES[dtype], shape, number(head), array(head, "<u4", 1)[0]))
    header = json.loads(zlib.decompressobj(-15, zdict=DICTIONARY).decompress(head.read()))
    alive = []  # the units of each tensor that are not zero throughout
    for name, (kind, dtype, shape, length, checksum) in zip(header.pop("tensors"), rows, strict=True):
        stream, position = data[position : position + length], position + length
        assert len(stream) == length, f"truncated: {name}"
        assert zlib.crc32(stream) == checksum, f"damaged: {name}"
        tensors[name] = tensor(BytesIO(stream), *kind.partition("/")[::2], dtype, shape, alive=alive)
        alive.append(tensors[name].reshape(len(tensors[name]), -1).any(axis=1) if len(shape) > 1 and shape[0] else [])
    for name in [name for name in tensors if name.endswith("#scale")]:
        weight, scale = tensors[name.removesuffix("#scale")], tensors.pop(name)
        rows = weight.reshape(len(weight), -1)  # a view: each column's group has a scale
        rows *= scale.reshape(len(weight), -1)[
            :, np.arange(rows.shape[1]) * (scale.size // len(weight)) // rows.shape[1]
        ]
    return header, tensors


def tensor(stream, kind, coder, dtype, shape, *, alive):
    assert coder != "huffman", "Huffman streams are left out here"

    def symbols(stream, shape):
        return from_fast(stream, shape) if coder == "fast" else from_max(stream, shape, alive)

    if kind == "raw":
        return plain(stream, dtype, math.prod(shape)).reshape(shape)
    if kind == "sparse":
        mask = symbols(BytesIO(stream.read(number(stream))), shape) > 0
        values = plain(stream, dtype, int(mask.sum()))
        whole = np.zeros(shape, values.dtype)
        whole[mask] = values
        return whole
    if kind == "grid":
        scale, lowest = array(stream, "<f4", 1)[0], int(array(stream, "<i4", 1)[0])
        return (scale * np.arange(lowest, lowest + number(stream), dtype=np.float32))[symbols(stream, shape)]
    size, way = number(stream), stream.read(1)[0]
    if way == 2:
        places = np.cumsum(levels(stream.read(number(stream)), 1, size))
        table = float32(abs(places) | (places < 0) << 15)
    else:
        table = float32(array(stream, "<u2", size)) if way else array(stream, "<f4", size)
    return table[symbols(stream, shape)]


def float32(bfloat16):
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def plain(stream, dtype, count):
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")
    way, planes, first = stream.read(1)[0], np.zeros((kind.itemsize, count), np.uint8), 0
    if way & 128:
        values, first = levels(stream.read(number(stream)), 1, count)[0], 2
        planes[:2] = np.divmod(abs(values) - 1 | (values < 0) << 15, 256)
    first = first if kind.kind in "fc" or dtype == "bfloat16" else kind.itemsize - (way & 63)
    rest = zlib.decompressobj(-15).decompress(stream.read()) if way & 64 else stream.read()
    planes[first : first + (way & 63)] = np.frombuffer(rest, np.uint8).reshape(way & 63, count)
    whole = np.frombuffer(planes[::-1].T.tobytes(), kind)
    return float32(whole) if dtype == "bfloat16" else whole


def matrix(shape):
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def rans(words):
    """Decodes symbols of one of eight lanes; `find` tells a slot's symbol, frequency and first slot."""
    states, words = [words[k] << 16 | words[k + 1] for k in range(0, 16, 2)], iter(words[16:])

    def symbol(lane, precision, find):
        slot = states[lane % 8] % (1 << precision)
        found, frequency, first = find(slot)
        state = frequency * (states[lane % 8] >> precision) + slot - first
        states[lane % 8] = state << 16 | next(words) if state < 65536 else state
        return found

    return symbol


def from_fast(stream, shape):
    size, (rows, columns), out = math.prod(shape), matrix(shape), []
    classes = number(stream) if size else 0
    if classes:
        rest, ones, bits = number(stream), numbers(stream, classes**2), classes.bit_length() - 1
        rows, columns = (rows, columns) if bits else (-(-size // 4096), 4096)
        packed = np.unpackbits(array(stream, "u1", -(-(rows + columns) * bits // 8)), bitorder="little")
        line = [sum(int(packed[k * bits + b]) << b for b in range(bits)) for k in range(rows + columns)]
    precision, frequencies = (number(stream), numbers(stream, number(stream))) if size else (0, [])
    slots = [(s, f, sum(frequencies[:s])) for s, f in enumerate(frequencies) for _ in range(f)]
    lengths = numbers(stream, -(-size // BLOCK) * (2 if classes else 1))
    parts = iter([array(stream, "<u2", length).tolist() for length in lengths])
    for start in range(0, size, BLOCK):
        mask = [1] * min(BLOCK, size - start)
        symbol = rans(next(parts)) if classes else None
        for k in range(len(mask) if classes else 0):
            i, j = divmod(start + k, columns)
            one = ones[line[i] * classes + line[rows + j]]
            both = [(1, one, 0), (0, 65536 - one, one)]
            mask[k] = symbol(min(j, k), 16, lambda slot, one=one, both=both: both[slot >= one])
        symbol = rans(words) if (words := next(parts)) else None
        found = iter([symbol(k, precision, slots.__getitem__) for k in range(sum(mask))])
        out += [next(found) if bit else rest for bit in mask]
    return np.array(out, int).reshape(shape)


def from_max(stream, shape, alive):
    rest, way, (rows, columns), group = number(stream), number(stream), matrix(shape), max(1, math.prod(shape[2:]))
    lag = number(stream) if way & 2 else 0
    dead = np.zeros(1, bool)
    if way & 8:
        dead = ~alive[-number(stream)]
    dead = np.repeat(dead, columns // len(dead))
    if way & 1:
        return levels(stream.read(), columns, rows, (lag, 1, way >> 2 & 1), (dead, False)).T + rest
    return levels(stream.read(), rows, columns, (lag, group, way >> 2 & 1), (False, dead)).reshape(shape) + rest


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python scripts/decode_artifact.py FILE.acz OUTPUT.npz")
    header, tensors = decode(Path(sys.argv[1]).read_bytes())
    np.savez(sys.argv[2], __header__=json.dumps(header), **tensors)
