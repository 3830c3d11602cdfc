"""How fast linear layers run sparse and in two factors against dense, and what runtime="auto" makes of them.

    python scripts/bench_runtime.py [--seconds 0.3] [--threads 1]

One run measures all: medians over rounds in which dense and the other take turns, so that a busy machine slows both.
`csr` and `factors` are speed-ups over nn.Linear (above 1 is faster). `auto` is what was taken after its own, shorter
measurement, the speed-up of that when measured again here, and what the choice cost. The zeros are at random places.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial

import torch
from torch import nn

from autocompress.compress import lowrank
from autocompress.compress.runtime import SparseLinear, Whole, arranged, interleaved
from autocompress.plan import LayerPlan

SHAPES = ((300, 784), (512, 512), (1024, 1024), (4096, 1024), (4096, 4096))
"""(out, in)"""
ZEROS = (0.8, 0.9, 0.95, 0.99)
RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 0.45)
"""Shares of the smaller side."""
BATCHES = (1, 32)


def linear(out: int, inputs: int, zeros: float, draw: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, out)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(out, inputs, generator=draw) >= zeros)
    return layer.eval()


def factors(layer: nn.Module, rank: int, draw: torch.Generator) -> nn.Sequential:
    pair = lowrank.factorised(layer, LayerPlan(rank=rank))
    with torch.no_grad():
        for factor in pair:
            factor.weight.normal_(generator=draw)
    return pair.eval()


def report(
    what: str,
    *,
    dense: nn.Linear,
    other: nn.Module,
    loaded: nn.Module,
    wholes: dict[str, Whole],
    batch: int,
    time_s: float,
) -> tuple[bool, float]:
    """Print a row; whether "auto" took a dense layer, and the time of what it took as a part of the dense one's."""
    begun = time.perf_counter()
    taken = arranged(nn.Sequential(loaded), wholes, "auto", batch=batch).get_submodule("0")
    cost = time.perf_counter() - begun
    x = torch.randn(batch, dense.in_features)
    base, product = interleaved([partial(dense, x), partial(other, x)], time_s)
    again, chosen = interleaved([partial(dense, x), partial(taken, x)], time_s)
    kind = {"Linear": "dense", "SparseLinear": "csr", "Sequential": "factors"}[type(taken).__name__]
    speeds = f"{base * 1e6:8.0f} us  {base / product:6.2f}x   {kind:7s} {again / chosen:6.2f}x  {cost * 1e3:5.0f} ms"
    print(f"{what}  {batch:5d}  {speeds}", flush=True)
    return kind == "dense", chosen / again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each comparison")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    draw = torch.Generator().manual_seed(0)
    parts: list[tuple[bool, float]] = []
    print(" out x in    zeros  batch     dense      csr   auto takes      in")
    for out, inputs in SHAPES:
        for zeros in ZEROS:
            for batch in BATCHES:
                dense = linear(out, inputs, zeros, draw)
                sparse = SparseLinear(dense.weight, dense.bias)
                what = f"{out:4d} x {inputs:4d}   {zeros:.2f}"
                row = report(
                    what, dense=dense, other=sparse, loaded=dense, wholes={}, batch=batch, time_s=arguments.seconds
                )
                parts.append(row)
    print(" out x in    rank   batch     dense  factors   auto takes      in")
    for out, inputs in SHAPES:
        for share in RANKS:
            for batch in BATCHES:
                dense = linear(out, inputs, 0.0, draw)
                rank = int(share * min(out, inputs))
                pair = factors(dense, rank, draw)
                what, wholes = f"{out:4d} x {inputs:4d}   {rank:4d}", {"0": Whole(dense, "channel")}
                row = report(
                    what, dense=dense, other=pair, loaded=pair, wholes=wholes, batch=batch, time_s=arguments.seconds
                )
                parts.append(row)
    for taken, what in ((False, "sparse or factors"), (True, "dense, which is noise")):
        print(f"auto's worst choice of {what}: {max(part for dense, part in parts if dense == taken):.3f} of dense")
    nets(draw, arguments.seconds)


def nets(draw: torch.Generator, time_s: float) -> None:
    """Print whole nets: dense against what "auto" makes of them, with an example."""
    print(" net                  batch       dense    auto      in")
    for name, sizes, shape in (
        ("LeNet-300-100", ((300, 784, 0.92), (100, 300, 0.9), (10, 100, 0.0)), (784,)),
        ("4 x 1024", ((1024, 1024, 0.92),) * 4, (1024,)),
        ("4 x 4096", ((4096, 4096, 0.92),) * 4, (4096,)),
    ):
        layers = [linear(*size, draw) for size in sizes]
        net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        compare(name, net, net, {}, shape=shape, time_s=time_s)
    for name, share in (("convs, rank 25 %", 0.25), ("convs, rank 70 %", 0.7)):
        convs = [nn.Conv2d(inputs, out, 3, padding=1) for inputs, out in ((3, 64), (64, 64), (64, 128), (128, 128))]
        net = nn.Sequential(*(part for conv in convs for part in (conv, nn.ReLU()))).eval()
        loaded = copy.deepcopy(net)
        wholes = {str(at): Whole(net[at], "channel") for at in (2, 4, 6)}
        for at, whole in wholes.items():
            loaded[int(at)] = factors(whole.layer, int(share * whole.layer.weight.shape[0]), draw)
        compare(name, net, loaded, wholes, shape=(3, 28, 28), time_s=time_s)


def compare(
    name: str, dense: nn.Module, loaded: nn.Module, wholes: dict[str, Whole], *, shape: tuple[int, ...], time_s: float
) -> None:
    for batch in BATCHES:
        x, own = torch.randn(batch, *shape), copy.deepcopy(loaded)
        begun = time.perf_counter()
        taken = arranged(own, wholes, "auto", example=x)
        cost = time.perf_counter() - begun
        base, auto = interleaved([partial(dense, x), partial(taken, x)], time_s)
        print(f" {name:20s} {batch:5d} {base * 1e6:8.0f} us {base / auto:6.2f}x {cost * 1e3:4.0f} ms", flush=True)


if __name__ == "__main__":
    main()
