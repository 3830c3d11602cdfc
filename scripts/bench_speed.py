"""How fast the coders are, on a model of 20 million weights, and what memory and which share of time they take.

    python scripts/bench_speed.py [--peers PYTHON] [--json FILE] [--plot FILE] [--largest 100000000]

One thread unless it says two. A row codes the symbols of ten layers of 1000 x 2000: 8 bits dense (a normal distribution
on 255 levels) and 90 % zeros with 15 other values, rows and columns of unequal density. Rates are million weights a
second, the median of five rounds in which all coders take turns. `file` is the whole way: pack() to bytes, and load()
to a module of float32 weights, its memory the peak beyond the process before, over the float32 weights' bytes.
Beside ours: constriction's range coder with the layer's histogram, zstd at levels 3 and 19 on one byte a symbol where
the package zstandard is installed, and DeepCABAC where --peers names a Python that has it (see bench_codec.py).
--plot draws the time of the fast and the max coder from 10^4 to 10^8 weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.codec import mixed_stream, rans
from autocompress.codec.container import pack
from autocompress.codec.tensors import Artifact, Coded, Raw, grid_table

Symbols = NDArray[np.uint16]
LAYERS, SHAPE = 10, (1000, 2000)
SIDES = {"8 bits dense": 255, "90 % zeros": 16}


def draw(what: str, shape: tuple[int, int], seed: int) -> Symbols:
    """Symbols of one layer."""
    rng = np.random.default_rng(seed)
    if what == "8 bits dense":
        return np.clip(np.rint(rng.normal(127, 30, shape)), 0, 254).astype(np.uint16)
    rows, columns = rng.gamma(4, 0.25, (shape[0], 1)), rng.gamma(4, 0.25, (1, shape[1]))
    mask = rng.random(shape) < 0.1 * rows * columns
    levels = np.clip(np.rint(rng.normal(0, 3, shape)), -7, 7)
    return np.where(mask, np.where(levels == 0, 1, levels) + 8, 8).astype(np.uint16)


def constriction_ways() -> tuple[Callable[[Symbols], Any], Callable[[Any, Symbols], Symbols]] | None:
    if importlib.util.find_spec("constriction") is None:
        return None
    import constriction

    stream = constriction.stream

    def model(symbols: Symbols) -> Any:
        counts = np.bincount(symbols.ravel()).astype(np.float64)
        return stream.model.Categorical(np.maximum(counts, 1e-9) / counts.sum(), perfect=False)

    def encode(symbols: Symbols) -> Any:
        coder = stream.queue.RangeEncoder()
        coder.encode(symbols.ravel().astype(np.int32), model(symbols))
        return coder.get_compressed()

    def decode(data: Any, symbols: Symbols) -> Symbols:
        return stream.queue.RangeDecoder(data).decode(model(symbols), symbols.size).reshape(symbols.shape)

    return encode, decode


def zstd_ways(level: int) -> tuple[Callable[[Symbols], Any], Callable[[Any, Symbols], Symbols]] | None:
    if importlib.util.find_spec("zstandard") is None:
        return None
    import zstandard

    def decode(data: Any, symbols: Symbols) -> Symbols:
        plain = zstandard.ZstdDecompressor().decompress(data)
        return np.frombuffer(plain, np.uint8).astype(np.uint16).reshape(symbols.shape)

    return lambda symbols: zstandard.ZstdCompressor(level=level).compress(symbols.astype(np.uint8).tobytes()), decode


def rates(what: str, rounds: int) -> dict[str, dict[str, float]]:
    """Rates and bytes a weight of every coder, by name."""
    layers = [draw(what, SHAPE, seed) for seed in range(LAYERS)]
    ways: dict[str, Any] = {
        "fast": (rans.encode, lambda data, symbols: rans.decode(data, symbols.shape)),
        "constriction": constriction_ways(),
        "zstd -3": zstd_ways(3),
        "zstd -19": zstd_ways(19),
        "max": (mixed_stream.encode, lambda data, symbols: mixed_stream.decode(data, symbols.shape)),
    }
    slow = {"max": 2, "zstd -19": 1}
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name, way in ways.items() if way}
    for name in times:  # compiles
        encode, decode = ways[name]
        decode(encode(layers[0][:50]), layers[0][:50])
    for turn in range(rounds):
        for name, told in times.items():
            if turn and name in slow:
                continue
            encode, decode = ways[name]
            some = layers[: slow.get(name, LAYERS)]
            began = time.perf_counter()
            coded = [encode(symbols) for symbols in some]
            between = time.perf_counter()
            back = [decode(data, symbols) for data, symbols in zip(coded, some, strict=True)]
            ended = time.perf_counter()
            if not all(np.array_equal(a, b) for a, b in zip(back, some, strict=True)):
                raise SystemExit(f"{name} does not give back what it was given")
            size = sum(symbols.size for symbols in some)
            length = sum(memoryview(data).nbytes for data in coded)
            told.append((size / (between - began) / 1e6, size / (ended - between) / 1e6, 8 * length / size))
    found = {}
    for name, told in times.items():
        encode, decode, bits = (statistics.median(each) for each in zip(*told, strict=True))
        found[name] = {"encode": encode, "decode": decode, "bits": bits}
    return found


def threads(what: str, rounds: int = 9) -> dict[str, float]:
    """How many times as fast two threads decode a layer's blocks, and a whole file, as one; medians of turns."""
    symbols = draw(what, (4000, 5000), 0)
    data, shape = rans.encode(symbols), symbols.shape
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, told in times.items():
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda _: None, range(count)))
                began = time.perf_counter()
                blocks = list(pool.map(lambda block: block.read(), rans.blocks(data, shape)))
                told.append(time.perf_counter() - began)
            if not np.array_equal(np.concatenate(blocks), symbols.reshape(-1)):
                raise SystemExit("the blocks do not give back what they were given")
    one, two = (statistics.median(times[count]) for count in (1, 2))
    return {"one": symbols.size / one / 1e6, "two": symbols.size / two / 1e6, "ratio": one / two}


def whole_file(what: str, effort: str) -> dict[str, float]:
    """Seconds and memory of pack() and of load() in one thread and in two, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.acz"
        found = {}
        for step in ("pack", "load 1", "load 2"):
            command = [sys.executable, __file__, "--child", step, what, effort, str(path)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[step] = json.loads(told)
        return found


def child(step: str, what: str, effort: str, path: Path) -> None:
    """One step of `whole_file`: its rate, and its peak memory over the float32 weights'."""
    import torch
    from torch import nn

    from autocompress.codec.container import unpack
    from autocompress.compress.artifact import load

    model = nn.Sequential(*(nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(LAYERS)))
    size = LAYERS * SHAPE[0] * SHAPE[1]
    warm = Coded(np.zeros((64, 64), np.uint16), grid_table(1.0, 0, 2), "float32", (1.0, 0))
    unpack(
        pack(
            Artifact({"x": warm, "y": Raw(np.ones(3, np.float32), "float32")}, {}),
            "fast" if effort == "fast" else "max",
        )
    )
    torch.set_num_threads(int(step[-1]) if step != "pack" else 1)
    if step == "pack":
        table = grid_table(0.01, -(SIDES[what] // 2), SIDES[what] + 1)
        tensors = {
            f"{k}.weight": Coded(draw(what, SHAPE, k), table, "float32", (0.01, -(SIDES[what] // 2)))
            for k in range(LAYERS)
        }
    before = peak_memory(reset=True)
    times, peak = [], 0
    for _ in range(5 if effort == "fast" else 1):
        began = time.perf_counter()
        if step == "pack":
            data = pack(Artifact(tensors, {}), effort)
        else:
            load(path, model)
        times.append(time.perf_counter() - began)
        peak = peak or peak_memory() - before
    seconds = statistics.median(times)
    if step == "pack":
        path.write_bytes(data)
    print(json.dumps({"rate": size / seconds / 1e6, "memory": peak / (4 * size)}))


def peak_memory(reset: bool = False) -> int:
    """Bytes that the process has held at most, since the last reset; Linux tells them."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peer_rates(python: str, what: str) -> dict[str, float]:
    """DeepCABAC's rates on one layer, at its plainest setting."""
    code = (
        "import sys, time, json, numpy as np, deepCABAC as d\n"
        "x = np.load(sys.argv[1]); e = d.Encoder(); e.initCtxModels(10, 0); a = time.perf_counter()\n"
        "off = d.HdspMode.AlwaysOff; h = np.zeros(2, np.int8)\n"
        "e.encodeLayer(x, 0, 0, 1, 0, 0, np.zeros(len(x), np.int32), off, h, 0, 0); data = e.finish().tobytes()\n"
        "b = time.perf_counter(); y = np.zeros(x.shape, np.int32); r = d.Decoder()\n"
        "s = np.frombuffer(data, np.uint8); r.setStream(s); r.initCtxModels(10)\n"
        "r.decodeLayerAndCreateEPs(y, 0, 0, 1, 0, off, h, 0, 0); c = time.perf_counter(); assert (x == y).all()\n"
        "print(json.dumps([x.size / (b - a) / 1e6, x.size / (c - b) / 1e6, 8 * len(data) / x.size]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        symbols = draw(what, SHAPE, 0).astype(np.int32)
        levels = symbols - int(np.bincount(symbols.ravel()).argmax())
        np.save(Path(folder) / "x.npy", levels)
        told = subprocess.run(
            [python, "-c", code, str(Path(folder) / "x.npy")], check=True, capture_output=True, text=True
        ).stdout
    return dict(zip(("encode", "decode", "bits"), json.loads(told), strict=True))


def growth(largest: int) -> list[dict[str, Any]]:
    """Seconds of coding and decoding by the number of weights, at 90 % zeros; the max coder up to ten million."""
    found = []
    size = 10_000
    while size <= largest:
        symbols = draw("90 % zeros", (size // 100 if size < 10**6 else 1000, 100 if size < 10**6 else size // 1000), 0)
        for name, module in (("fast", rans), ("max", mixed_stream)):
            if name == "max" and size > 10**7:
                continue
            best = [float("inf")] * 2
            for _ in range(3 if size <= 10**6 else 1):
                a = time.perf_counter()
                data = module.encode(symbols)
                b = time.perf_counter()
                back = module.decode(data, symbols.shape)
                c = time.perf_counter()
                best = [min(best[0], b - a), min(best[1], c - b)]
            if not np.array_equal(back, symbols):
                raise SystemExit(f"{name} does not give back what it was given")
            found.append({"coder": name, "weights": size, "encode": best[0], "decode": best[1]})
            print(f"{name:<6}{size:>12} weights: codes in {best[0]:9.4f} s, decodes in {best[1]:9.4f} s", flush=True)
        size *= 10
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for coder in ("fast", "max"):
        for what in ("encode", "decode"):
            some = [row for row in rows if row["coder"] == coder]
            axes.loglog([r["weights"] for r in some], [r[what] for r in some], "o-", label=f"{coder}, {what}")
    sizes = np.array([1e5, 1e8])
    axes.loglog(sizes, 3e-9 * sizes, "k:", label="linear")
    axes.set_xlabel("weights, 90 % zeros")
    axes.set_ylabel("seconds, one thread")
    axes.legend()
    axes.grid(visible=True, alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=10**8)
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.child:
        step, what, effort, path = options.child
        child(step, what, effort, Path(path))
        return
    result: dict[str, Any] = {}
    for what in SIDES:
        found = rates(what, options.rounds)
        if options.peers:
            found["DeepCABAC"] = peer_rates(options.peers, what)
        print(f"\n{what}: million weights a second, one thread")
        for name, rate in found.items():
            print(
                f"  {name:<14}codes {rate['encode']:8.1f}  decodes {rate['decode']:8.1f}  {rate['bits']:6.3f} bits each"
            )
        two = threads(what)
        print(f"  decoding in two threads: {two['one']:.0f} -> {two['two']:.0f}, {two['ratio']:.2f}x")
        files = {effort: whole_file(what, effort) for effort in ("fast", "max")}
        for effort, steps in files.items():
            for step, told in steps.items():
                print(f"  file, {effort}, {step}: {told['rate']:.1f}, {told['memory']:.2f}x the float32 weights")
        result[what] = {"coders": found, "threads": two, "files": files}
    print()
    result["growth"] = growth(options.largest)
    if options.plot:
        plot(result["growth"], Path(options.plot))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
