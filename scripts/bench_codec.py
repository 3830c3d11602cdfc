"""The bytes that coders need for the same quantized tensors, and how fast ours are.

    python scripts/bench_codec.py FILES [--peers PYTHON] [--json FILE] [--detail FILE]
    python scripts/bench_codec.py --shapes
    python scripts/bench_codec.py --speed [--elements 1000000]

Files are artifacts of a search (.acz) or integer levels by name (.npz, see `codec_nets.py`). What is coded is the
symbols of their quantized tensors, each tensor for itself, tables and headers aside. gzip, xz and zstd (left out
where the package zstandard is missing) get one byte a symbol, two where the alphabet is larger, the tensors of a file
in a row. Huffman is the format of Deep Compression at the index width that suits each tensor best. Every stream of
ours is decoded again.

DeepCABAC (MPEG-7 part 17, nncodec 2.1.3) wants a Python of its own with its C++ extension, whose path is `--peers`:

    python -m venv peer && peer/bin/pip install numpy pybind11 setuptools wheel
    peer/bin/pip download --no-deps --no-build-isolation --no-binary :all: nncodec==2.1.3
    tar xzf nncodec-2.1.3.tar.gz && S=nncodec-2.1.3/src/nncodec/extensions/deepCABAC/source
    g++ -O2 -std=c++17 -shared -fPIC -I$S -I$S/Lib $(peer/bin/python -m pybind11 --includes) $(find $S -name "*.cpp") \\
        -o $(peer/bin/python -c "import sysconfig as s; print(s.get_path('platlib') + '/deepCABAC' \\
             + s.get_config_var('EXT_SUFFIX'))")

It gets signed levels, zero the rest and the values in order, and its best setting for each tensor counts.

`--shapes` tests the coder alone, not compression: weights drawn at random in the shapes of AlexNet and SqueezeNet, at
the densities and bit-widths of Deep Compression, should make files no longer than the paper's (see `paper_nets.py`).
Speed is that of one thread, on symbols drawn at random: 8 bits dense, and 15 values at 90 % zeros.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import huffman, mixed_stream, mixing
from autocompress.codec import rans as fast_coder
from autocompress.codec.container import pack, unpack
from autocompress.codec.tensors import Artifact, Coded
from autocompress.compress.artifact import read

Symbols = NDArray[np.uint16]


@dataclass(frozen=True)
class Tensor:
    """What is coded: `symbols` as a file of ours has them, `levels` the same as signed numbers, the rest zero."""

    symbols: Symbols
    levels: NDArray[np.int32]


@dataclass(frozen=True)
class Bytes:
    """Bytes of one tensor under each coder that codes tensors one by one; `deepcabac` where it was asked."""

    shape: tuple[int, ...]
    density: float
    entropy: float
    huffman: int
    fast: int
    max: int
    deepcabac: int | None = None


@dataclass(frozen=True)
class Net:
    """Bytes of one file's tensors: together by the general compressors, and each for itself."""

    file: str
    gzip: int
    xz: int
    zstd: int | None
    tensors: Mapping[str, Bytes]

    def total(self, coder: str) -> float | None:
        """The bytes of a coder for all tensors, None where it was not there."""
        if coder in ("gzip", "xz", "zstd"):
            whole: int | None = getattr(self, coder)
            return whole
        each = [getattr(t, coder) for t in self.tensors.values()]
        return None if None in each else sum(each)

    @property
    def elements(self) -> int:
        return sum(int(np.prod(t.shape)) for t in self.tensors.values())

    @property
    def density(self) -> float:
        return sum(t.density * np.prod(t.shape) for t in self.tensors.values()) / max(1, self.elements)


COLUMNS = ("entropy", "gzip", "zstd", "xz", "huffman", "deepcabac", "fast", "max")


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The quantized tensors of an artifact or of an archive of levels."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            found = {name: archive[name] for name in archive.files}
        return {name: Tensor((q - q.min(initial=0)).astype(np.uint16), centred(q)) for name, q in found.items()}
    return tensors_in(read(path))


def tensors_in(artifact: Artifact) -> dict[str, Tensor]:
    """The quantized tensors of an artifact."""
    coded = {name: t for name, t in artifact.tensors.items() if isinstance(t, Coded)}
    ranks = {name: np.argsort(np.argsort(t.table, kind="stable")) for name, t in coded.items()}
    return {name: Tensor(t.symbols, centred(ranks[name][t.symbols])) for name, t in coded.items()}


def centred(levels: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """The levels less the commonest of them."""
    values, counts = np.unique(levels, return_counts=True)
    result: NDArray[np.int32] = (levels - (values[counts.argmax()] if values.size else 0)).astype(np.int32)
    return result


def order0(symbols: Symbols) -> float:
    """Bytes at the entropy of the tensor's histogram."""
    counts = np.bincount(symbols.ravel())
    p = counts[counts > 0] / max(1, symbols.size)
    return float(-(p * np.log2(p)).sum() * symbols.size / 8)


def plain(symbols: Symbols) -> bytes:
    return symbols.astype(np.uint8 if symbols.size == 0 or symbols.max() < 256 else np.uint16).tobytes()


def length(symbols: Symbols, data: bytes, decode: Callable[[bytes, tuple[int, ...]], Symbols]) -> int:
    """The stream's length, once it has decoded to the symbols."""
    if not np.array_equal(decode(data, symbols.shape), symbols):
        raise SystemExit(f"{decode.__module__}: a tensor of shape {symbols.shape} does not decode to itself")
    return len(data)


def fast(symbols: Symbols) -> bytes:
    """The fast coder's stream."""
    return fast_coder.encode(symbols)


def measured(symbols: Symbols, deepcabac: int | None) -> Bytes:
    """Every coder of tensors on one of them."""
    rest = int(np.bincount(symbols.ravel()).max()) if symbols.size else 0
    return Bytes(
        symbols.shape,
        1 - rest / max(1, symbols.size),
        order0(symbols),
        length(symbols, huffman.encode(symbols), huffman.decode),
        length(symbols, fast(symbols), fast_coder.decode),
        length(symbols, mixed_stream.encode(symbols), mixed_stream.decode),
        deepcabac,
    )


def deepcabac(levels: Mapping[str, NDArray[np.int32]], python: str) -> dict[str, int]:
    """Bytes of each tensor, by the peer's own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.npz"
        np.savez(path, **{str(k): t for k, t in enumerate(levels.values())})  # type: ignore[arg-type]
        script = Path(__file__).with_name("peer_deepcabac.py")
        ran = subprocess.run([python, str(script), str(path)], stdout=subprocess.PIPE, check=True, text=True)
    answer = json.loads(ran.stdout)
    return {name: int(answer[str(k)]["bytes"]) for k, name in enumerate(levels)}


def zstd_bytes(data: bytes) -> int | None:
    if importlib.util.find_spec("zstandard") is None:
        return None
    import zstandard

    return len(zstandard.ZstdCompressor(level=22).compress(data))


def measure(path: Path, python: str | None) -> Net:
    """Every coder on one file."""
    tensors = tensors_of(path)
    if not tensors:
        raise SystemExit(f"{path} has no quantized tensor")
    peers = deepcabac({name: t.levels for name, t in tensors.items()}, python) if python else {}
    row = b"".join(plain(t.symbols) for t in tensors.values())
    return Net(
        path.stem if path.suffix == ".npz" else "/".join(path.parts[-3:]),
        len(gzip.compress(row, 9)),
        len(lzma.compress(row, preset=9 | lzma.PRESET_EXTREME)),
        zstd_bytes(row),
        {name: measured(t.symbols, peers.get(name)) for name, t in tensors.items()},
    )


def show(nets: Iterable[Net]) -> Iterator[Net]:
    """The nets again, each with a line printed; below the last line how the max coder compares."""
    print(f"{'':<38}{'symbols':>9}{'density':>8}" + "".join(f"{c:>10}" for c in COLUMNS), flush=True)
    seen = []
    for net in nets:
        totals = [net.total(c) for c in COLUMNS]
        numbers = "".join(f"{'-' if total is None else round(total):>10}" for total in totals)
        print(f"{net.file[-37:]:<38}{net.elements:>9}{net.density:>8.3f}{numbers}", flush=True)
        seen.append(net)
        yield net
    for line in comparisons(seen):
        print(line)


def comparisons(nets: Sequence[Net]) -> Iterator[str]:
    """The max coder against each other one: mean over the nets, and the net where it does worst."""
    sparse = [net for net in nets if net.density <= 0.5]
    for what, among in (
        (f"{len(nets)} nets", nets),
        (f"the {len(sparse)} of them with half their weights or less", sparse),
    ):
        for coder in COLUMNS[:-1]:
            ratios = {n.file: n.total("max") / n.total(coder) - 1 for n in among if n.total(coder)}  # type: ignore[operator]
            if ratios:
                worst = max(ratios, key=lambda name: ratios[name])
                mean = 100 * float(np.mean(list(ratios.values())))
                yield f"max against {coder}, {what}: mean {mean:+.1f} %, worst {100 * ratios[worst]:+.1f} % ({worst})"
    if any(net.zstd is None for net in nets):
        yield "zstd is left out: the package zstandard is not installed"


def shapes() -> list[dict[str, Any]]:
    """Lengths of files with the weights of the paper's nets as they are drawn, beside the paper's."""
    from paper_nets import PAPER, SPREAD, drawn

    found: list[dict[str, Any]] = []
    for (name, paper), spread in product(PAPER.items(), (0.0, SPREAD)):
        artifact = drawn(name, spread)
        began = time.perf_counter()
        data = pack(artifact)
        seconds = time.perf_counter() - began
        coded = {key: t.symbols for key, t in artifact.tensors.items() if isinstance(t, Coded)}
        back = tensors_in(unpack(data))
        if not all(np.array_equal(symbols, back[key].symbols) for key, symbols in coded.items()):
            raise SystemExit(f"{name}: its file does not decode to it")
        ideal, han = sum(map(order0, coded.values())), sum(len(huffman.encode(t)) for t in coded.values())
        verdict = "no longer" if len(data) <= paper.most else "LONGER"
        print(f"{name}, spread {spread}: {len(data) / 1e6:.3f} MB, {verdict} than {paper.most / 1e6:.2f} MB", end=" ")
        print(f"(order-0 {ideal / 1e6:.3f}, Huffman {han / 1e6:.3f}), packed in {seconds:.1f} s")
        found.append(
            {"net": name, "spread": spread, "bytes": len(data), "most": paper.most, "entropy": ideal, "huffman": han}
        )
    return found


def speed(elements: int) -> list[dict[str, Any]]:
    """Million symbols a second, coding and decoding, of both coders; and what the first call of the max coder costs."""
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    mixed_stream.encode(np.zeros((2, 2), np.uint16))
    fast_coder.decode(fast_coder.encode(np.eye(64, 64, dtype=np.uint16)), (64, 64))  # compiles
    print(f"first call of the max coder: {time.perf_counter() - began:.2f} s")
    rows = max(1, round(elements**0.5))
    shape = (rows, elements // rows)
    dense = np.clip(np.rint(rng.normal(128, 30, shape)), 0, 255).astype(np.uint16)
    sparse = np.where(rng.random(shape) < 0.1, rng.integers(1, 16, shape), 0).astype(np.uint16)
    found = []
    for what, symbols in (("8 bits dense", dense), ("90 % zeros", sparse)):
        levels = symbols.astype(np.int32)
        ways: list[tuple[str, Callable[[], bytes], Callable[[bytes], Any]]] = [
            ("fast", partial(fast_coder.encode, symbols), partial(fast_coder.decode, shape=shape)),
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
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has DeepCABAC")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--detail", metavar="FILE", help="the bytes of each tensor, as JSON")
    options = parser.parse_args()
    if not (options.files or options.speed or options.shapes):
        parser.error("give artifacts or archives, --shapes, or --speed")
    result: dict[str, Any] = {}
    if options.files:
        nets = list(show(measure(path, options.peers) for path in dict.fromkeys(options.files)))
        result["sizes"] = [
            {"file": n.file, "symbols": n.elements, "density": n.density} | {c: n.total(c) for c in COLUMNS}
            for n in nets
        ]
        if options.detail:
            detail = {n.file: {name: asdict(t) for name, t in n.tensors.items()} for n in nets}
            Path(options.detail).write_text(json.dumps(detail, indent=1), encoding="utf-8")
    if options.shapes:
        result["shapes"] = shapes()
    if options.speed:
        result["speed"] = speed(options.elements)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
