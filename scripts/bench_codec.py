"""The bytes that coders need for the same quantized tensors, and how fast ours are.

    python scripts/bench_codec.py STUDY_FOLDER/*.acz [--json FILE]
    python scripts/bench_codec.py --speed [--elements 1000000]

Files are artifacts of a search: what is coded is the symbols of their quantized tensors, each tensor for itself, tables
and headers aside. gzip and xz get one byte a symbol (two where the alphabet is larger), the tensors of a file in a row.
Speed is that of one thread, on symbols drawn at random: 8 bits dense, and 15 values at 90 % zeros.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import mixed_stream, mixing, rans
from autocompress.codec.tensors import Coded
from autocompress.compress.artifact import read

Symbols = NDArray[np.uint16]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file's quantized tensors under each coder, and their order-0 entropy."""

    file: str
    symbols: int
    density: float
    entropy: float
    gzip: int
    xz: int
    fast: int
    max: int


def order0(symbols: Symbols) -> float:
    """Bytes at the entropy of the tensor's histogram."""
    counts = np.bincount(symbols.ravel())
    p = counts[counts > 0] / max(1, symbols.size)
    return float(-(p * np.log2(p)).sum() * symbols.size / 8)


def plain(symbols: Symbols) -> bytes:
    return symbols.astype(np.uint8 if symbols.size == 0 or symbols.max() < 256 else np.uint16).tobytes()


def fast_bytes(symbols: Symbols) -> int:
    data = rans.encode(symbols)
    assert np.array_equal(rans.decode(data, symbols.shape), symbols)
    return len(data)


def max_bytes(symbols: Symbols) -> int:
    data = mixed_stream.encode(symbols)
    assert np.array_equal(mixed_stream.decode(data, symbols.shape), symbols)
    return len(data)


def sizes(path: Path) -> Sizes:
    """Every coder on one artifact; ours are decoded again and compared."""
    tensors = [t.symbols for t in read(path).tensors.values() if isinstance(t, Coded)]
    if not tensors:
        raise SystemExit(f"{path} has no quantized tensor")
    row = b"".join(map(plain, tensors))
    total = sum(t.size for t in tensors)
    nonzero = sum(t.size - int(np.bincount(t.ravel()).max()) for t in tensors if t.size)
    return Sizes(
        "/".join(path.parts[-3:]),
        total,
        nonzero / total,
        sum(map(order0, tensors)),
        len(zlib.compress(row, 9)),
        len(lzma.compress(row, preset=9 | lzma.PRESET_EXTREME)),
        sum(map(fast_bytes, tensors)),
        sum(map(max_bytes, tensors)),
    )


def show(rows: Sequence[Sizes]) -> None:
    columns = ("entropy", "gzip", "xz", "fast", "max")
    print(f"{'':<44}{'symbols':>10}{'density':>9}" + "".join(f"{c:>10}" for c in columns) + f"{'max/fast':>10}")
    for row in rows:
        numbers = "".join(f"{getattr(row, c):>10.0f}" for c in columns)
        print(f"{row.file[-43:]:<44}{row.symbols:>10}{row.density:>9.3f}{numbers}{row.max / row.fast:>10.3f}")
    for column in columns[:-1]:
        ratio = np.exp(np.mean([np.log(row.max / getattr(row, column)) for row in rows]))
        print(f"max against {column}: {100 * (ratio - 1):+.1f} % (geometric mean of {len(rows)} files)")


def speed(elements: int) -> list[dict[str, Any]]:
    """Million symbols a second, coding and decoding, of both coders; and what the first call of the max coder costs."""
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    mixed_stream.encode(np.zeros((2, 2), np.uint16))
    print(f"first call of the max coder: {time.perf_counter() - began:.2f} s")
    rows = max(1, round(elements**0.5))
    shape = (rows, elements // rows)
    dense = np.clip(np.rint(rng.normal(128, 30, shape)), 0, 255).astype(np.uint16)
    sparse = np.where(rng.random(shape) < 0.1, rng.integers(1, 16, shape), 0).astype(np.uint16)
    found = []
    for what, symbols in (("8 bits dense", dense), ("90 % zeros", sparse)):
        levels = symbols.astype(np.int32)
        ways: list[tuple[str, Callable[[], bytes], Callable[[bytes], Any]]] = [
            ("fast", partial(rans.encode, symbols), partial(rans.decode, shape=shape)),
            ("max", partial(mixing.encode, levels), partial(mixing.decode, shape=shape)),
        ]
        for name, encode, decode in ways:
            a = time.perf_counter()
            data = encode()
            b = time.perf_counter()
            back = decode(data)
            c = time.perf_counter()
            assert np.array_equal(back, symbols)
            million = symbols.size / 1e6
            found.append({"what": what, "coder": name, "encode": million / (b - a), "decode": million / (c - b)})
            print(f"{what:<14}{name:<6} codes {million / (b - a):6.1f}, decodes {million / (c - b):6.1f} M symbols/s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if not options.files and not options.speed:
        parser.error("give artifacts, or --speed")
    result: dict[str, Any] = {}
    if options.files:
        rows = [sizes(path) for path in options.files]
        show(rows)
        result["sizes"] = [asdict(row) for row in rows]
    if options.speed:
        result["speed"] = speed(options.elements)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
