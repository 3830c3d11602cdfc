"""The decoder that was written from the format's page alone gives what ours gives."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autocompress.codec import container, header
from autocompress.codec.container import unpack
from autocompress.codec.tensors import Artifact, Coded

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / "scripts" / name for name in ("decode_artifact.py", "range_decoder.py")]


@pytest.fixture(scope="module")
def decode():
    sys.path.insert(0, str(SCRIPTS[0].parent))
    try:
        return runpy.run_path(str(SCRIPTS[0]))["decode"]
    finally:
        sys.path.remove(str(SCRIPTS[0].parent))


def same(data, decode):
    told, tensors = decode(data)
    wanted = unpack(data)
    assert told == wanted.header
    assert list(tensors) == list(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        values = tensor.values() if isinstance(tensor, Coded) else tensor.array
        if not isinstance(tensor, Coded) and tensor.dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        assert tensors[name].shape == values.shape, name
        assert tensors[name].astype(values.dtype).tobytes() == np.ascontiguousarray(values).tobytes(), name


def test_it_is_short_and_uses_nothing_of_ours():
    allowed = {*sys.stdlib_module_names, "numpy", "range_decoder"}
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 200
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= allowed


def test_the_dictionary_is_ours():
    assert (ROOT / "docs" / "artifact-dictionary.txt").read_bytes() == header._DICTIONARY


@pytest.mark.parametrize("name", ["kinds3-auto", "kinds3-fast", "kinds3-max", "feeder3", "model3"])
def test_golden_files(name, decode):
    same((ROOT / "tests" / "golden" / f"{name}.acz").read_bytes(), decode)


@pytest.mark.parametrize("effort", ["fast", "max"])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (40,), (23, 31), (31, 45), (7, 5, 3, 3), (6, 4, 5)])
def test_many_shapes(effort, shape, decode):
    draw = np.random.default_rng(len(shape))
    tensors = {}
    for density, size in ((0.0, 2), (0.1, 5), (0.6, 300), (1.0, 17)):
        symbols = draw.integers(0, size, shape) * (draw.random(shape) < density)
        if len(shape) == 2:
            symbols *= draw.random((shape[0], 1)) < 0.6
        tensors[f"{size}"] = Coded(symbols.astype(np.uint16), draw.normal(0, 1, size).astype(np.float32))
    same(container.pack(Artifact(tensors), effort), decode)


def test_rows_go_on_from_block_to_block(decode, monkeypatch):
    from autocompress.codec import rans

    monkeypatch.setattr(rans, "BLOCK", 512)
    monkeypatch.setitem(decode.__globals__, "BLOCK", 512)
    draw = np.random.default_rng(3)
    symbols = draw.integers(1, 9, (61, 53)) * (draw.random((61, 53)) < draw.beta(0.3, 0.5, (61, 1)))
    same(container.pack(Artifact({"x": Coded(symbols.astype(np.uint16), np.arange(9, dtype="f4"))}), "fast"), decode)


def test_as_a_program(tmp_path):
    golden = ROOT / "tests" / "golden" / "model3.acz"
    subprocess.run([sys.executable, str(SCRIPTS[0]), str(golden), str(tmp_path / "x.npz")], check=True)
    with np.load(tmp_path / "x.npz") as found:
        assert set(unpack(golden.read_bytes()).tensors) | {"__header__"} == set(found.files)
        assert json.loads(str(found["__header__"]))["made_by"] == "golden"
