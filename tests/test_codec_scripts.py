"""The codec's benchmark: the same tensors from both kinds of files, every coder's bytes, and what it concludes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.codec import huffman, mixed_stream
from autocompress.codec.container import Artifact, Coded, Raw, pack

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("bench_codec", "codec_nets", "paper_nets")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


LEVELS = np.random.default_rng(0).choice([-2, -1, 0, 1, 5], p=[0.05, 0.1, 0.7, 0.1, 0.05], size=(40, 50))


def test_a_table_in_any_order_gives_the_levels_of_its_values(script):
    values, order = np.array([-0.7, -0.1, 0.0, 0.2, 0.9], "f4"), [2, 4, 0, 3, 1]
    place = np.searchsorted([-2, -1, 0, 1, 5], LEVELS)
    coded = Coded(np.argsort(order)[place].astype(np.uint16), values[order])
    ranks = place - 2
    assert np.array_equal(coded.values(), values[place])
    assert np.array_equal(script("codec_nets").levels_of(coded), ranks)
    assert np.array_equal(script("bench_codec").tensors_in(Artifact({"x": coded}))["x"].levels, ranks)


def test_archives_and_artifacts_are_measured_alike(script, tmp_path):
    bench = script("bench_codec")
    symbols = (LEVELS + 2).astype(np.uint16)
    raw = Raw(np.ones(3, "f4"), "float32")
    (tmp_path / "a.acz").write_bytes(pack(Artifact({"x": Coded(symbols, np.arange(-2, 6, dtype="f4")), "b": raw})))
    np.savez(tmp_path / "a.npz", x=LEVELS)
    one, other = (bench.measure(tmp_path / name, None) for name in ("a.acz", "a.npz"))
    assert one.tensors == other.tensors
    assert (one.gzip, one.xz, one.zstd) == (other.gzip, other.xz, other.zstd)
    assert one.total("huffman") == len(huffman.encode(symbols))
    assert one.total("max") == len(mixed_stream.encode(symbols))
    assert one.total("deepcabac") is None
    assert one.density == pytest.approx(np.count_nonzero(LEVELS) / LEVELS.size)


def test_the_worst_net_is_told(script):
    bench = script("bench_codec")
    tensor = {n: bench.Bytes((10, 10), 0.1, 50.0, 100, 90, size, 80) for n, size in (("good", 60), ("bad", 84))}
    nets = [bench.Net(name, 100, 100, None, {"w": bytes_}) for name, bytes_ in tensor.items()]
    lines = list(bench.comparisons(nets))
    assert "max against deepcabac, 2 nets: mean -10.0 %, worst +5.0 % (bad)" in lines
    assert lines[-1].startswith("zstd is left out")


@pytest.mark.parametrize(
    ("kept", "bits", "codebook"), [(0.1, 4, True), (0.3, 4, False), (1.0, 4, True), (1.0, 8, False)]
)
def test_a_carried_weight_is_pruned_and_quantized(script, kept, bits, codebook):
    nets = script("codec_nets")
    weight = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    levels = nets.quantized(weight, nets.Way(kept, bits, codebook))
    nonzero = levels != 0
    assert levels.shape == (50, 60)
    assert len(np.unique(levels)) <= 2**bits
    assert nonzero.mean() <= kept
    assert nonzero.mean() > kept * 0.7 or kept == 1
    assert np.abs(weight.numpy()[nonzero]).min() >= np.abs(weight.numpy()[~nonzero]).max() or kept == 1
    assert np.corrcoef(levels[nonzero], weight.numpy()[nonzero])[0, 1] > 0.9


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_drawn_weight_has_the_density_and_the_values_that_were_asked_for(script, spread):
    paper = script("paper_nets")
    coded = paper.draw(paper.Layer((64, 32, 3, 3), 0.35, 6), np.random.default_rng(0), spread)
    values = coded.values()
    assert np.count_nonzero(values) / values.size == pytest.approx(0.35, abs=0.005)
    assert len(coded.table) <= 64
    assert (np.diff(coded.table) > 0).all()


def test_the_paper_nets_have_the_weights_that_the_papers_say(script):
    nets = script("paper_nets").PAPER
    weights = {name: sum(int(np.prod(layer.shape)) for layer in net.layers.values()) for name, net in nets.items()}
    kept = sum(layer.kept * np.prod(layer.shape) for layer in nets["SqueezeNet"].layers.values())
    assert weights == {"AlexNet": 60_954_656, "SqueezeNet": 1_244_448}
    assert kept / weights["SqueezeNet"] == pytest.approx(0.33, abs=0.01)
