"""Writes the golden artifacts, once: `python tests/golden/make.py`. A file that is there is never written again.

They are the promise that a file written today is read for ever; the tests decode them and compare
with the formulas below. A new format gets new files beside these: kinds.acz and model.acz are of the
first format, those with a 3 of the third.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def pattern(count: int, modulus: int) -> np.ndarray:
    """The whole numbers (7 i^2 + 3 i) mod modulus, i < count."""
    i = np.arange(count, dtype=np.int64)
    return (7 * i * i + 3 * i) % modulus


def structured_mask(rows: int, columns: int) -> np.ndarray:
    """0 or 1, denser towards the last rows and columns; a third of both are dead."""
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    mask = (pattern(rows * columns, 97).reshape(rows, columns) * (1 + (96 - i) // 12 * (128 - j) // 8)) < 97 * 8
    mask[i[:, 0] % 3 == 1] = False
    mask[:, j[0] % 3 == 2] = False
    return mask.astype(np.int64)


def kinds():
    """One tensor of each kind and dtype."""
    from autocompress.codec.tensors import Artifact, Coded, Raw, grid_table

    floats = pattern(60, 31) / 8.0 - 2.0
    sparse = np.where(pattern(400, 13) == 5, pattern(400, 29) - 14.0, 0.0).reshape(20, 20).astype(np.float32)
    sparse[3, 4] = -0.0
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45], np.float32)
    table = (pattern(9, 23) / 16.0 - 0.5).astype(np.float32)
    tensors = {
        "float64": Raw(floats.reshape(3, 4, 5), "float64"),
        "float32": Raw(floats.astype(np.float32), "float32"),
        "float16": Raw(floats.astype(np.float16).reshape(60, 1), "float16"),
        "bfloat16": Raw((floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), "bfloat16"),
        "complex64": Raw((floats + 1j * floats[::-1]).astype(np.complex64), "complex64"),
        "int64": Raw(pattern(30, 2**40), "int64"),
        "int32": Raw(pattern(30, 2**20).astype(np.int32).reshape(5, 6), "int32"),
        "uint8": Raw(pattern(30, 256).astype(np.uint8), "uint8"),
        "bool": Raw(pattern(30, 2).astype(bool), "bool"),
        "scalar": Raw(np.array(12345, np.int64), "int64"),
        "empty": Raw(np.zeros((0, 3), np.float32), "float32"),
        "special": Raw(special, "float32"),
        "sparse": Raw(sparse, "float32"),
        "coded": Coded(pattern(300, 9).reshape(10, 30).astype(np.uint16), table),
        "one symbol": Coded(np.full((5, 7), 2, np.uint16), table, "float64"),
        "grid": Coded(pattern(300, 15).reshape(3, 4, 5, 5).astype(np.uint16), grid_table(0.0123, -7, 15), "float32",
                      (float(np.float32(0.0123)), -7)),
        "structured": Coded((structured_mask(96, 128) * (1 + pattern(96 * 128, 7).reshape(96, 128))).astype(np.uint16),
                            np.arange(8, dtype=np.float32)),
    }  # fmt: skip
    return Artifact(tensors, {"made_by": "golden", "note": "grüße", "nested": {"a": [1, 2.5, None]}})


def fed():
    """Layers of which some read dead units: linear ones, one that reads images, a convolution."""
    from autocompress.codec.tensors import Artifact, Coded

    def layer(shape, dead, modulus):
        levels = pattern(int(np.prod(shape)), modulus).reshape(shape) % 9
        levels = np.where(levels < 5, 0, levels - 4)
        levels[dead] = 0
        return levels

    rows = [np.arange(n) % 3 != 1 for n in (36, 24, 40)]
    first, second, third = layer((36, 50), rows[0], 97), layer((24, 36), rows[1], 89), layer((40, 24), rows[2], 83)
    second[:, rows[0]] = 0
    third[:, rows[1]] = 0
    kernels = layer((12, 40, 3, 3), np.arange(12) == 3, 79)
    kernels[:, rows[2]] = 0
    flat = layer((10, 12 * 16), np.arange(10) == -1, 73).reshape(10, 12, 16)
    flat[:, 3] = 0
    levels = {"first": first, "second": second, "third": third, "kernels": kernels, "flat": flat.reshape(10, -1)}
    table = np.arange(5, dtype=np.float32) / 4
    return Artifact({name: Coded(array.astype(np.uint16), table) for name, array in levels.items()})


def network():
    """A tree of standard layers, weights by formula, and a plan that uses every option."""
    import torch
    from torch import nn

    from autocompress.plan import LayerPlan, Plan

    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding="valid", bias=False),
        nn.LeakyReLU(0.1),
        nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh()),
        nn.Linear(16, 10),
        nn.Linear(10, 3, dtype=torch.float32),
    )
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            values = torch.sin(0.37 * (1 + index) * torch.arange(1, tensor.numel() + 1, dtype=torch.float64) ** 1.1)
            values = values * 0.4 if tensor.dim() > 1 else values.abs() + 0.1
            tensor.copy_(values.reshape(tensor.shape).to(tensor.dtype))
    plan = Plan(
        {
            "0": LayerPlan(rank=3, bits=5, scheme="spatial"),
            "3": LayerPlan(rank=6, bits=4, threshold=0.5, quantizer="uniform"),
            "5.1": LayerPlan(rank=None, bits=3, threshold=1.0),
            "6": LayerPlan(rank=4, bits=16),
            "7": LayerPlan(bits=32, threshold=0.3),
        }
    )
    return model.eval(), plan


def inputs():
    """What the expected outputs are for: (4, 2, 8, 8)."""
    import torch

    return torch.from_numpy((pattern(4 * 2 * 64, 41) / 20.0 - 1.0).reshape(4, 2, 8, 8)).float()


def write(path: Path, data: bytes) -> None:
    """Write a file that is not there yet; say so where it is."""
    try:
        with path.open("xb") as file:
            file.write(data)
        print(f"wrote {path.name}, {len(data)} bytes")
    except FileExistsError:
        print(f"kept {path.name}: it is there already")


def main() -> None:
    import torch

    from autocompress.codec import container
    from autocompress.compress import apply, artifact, lowrank
    from autocompress.compress.layers import find_layers

    for effort in container.EFFORTS:
        write(HERE / f"kinds3-{effort}.acz", container.pack(kinds(), effort))
    write(HERE / "feeder3.acz", container.pack(fed(), "max"))
    model, plan = network()
    layers = find_layers(model, lambda m: m(inputs())).layers
    compressed = apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))
    data = artifact.write(model, plan, compressed.encode(), "golden")
    with torch.no_grad():
        outputs = artifact.restore(container.unpack(data))(inputs())
    write(HERE / "model3.acz", data)
    write(HERE / "model3.json", json.dumps({"outputs": outputs.double().tolist()}, indent=1).encode())


if __name__ == "__main__":
    main()
