"""The Deep Compression script on a small net: shares, masks that only shrink, and numbers that are the file's."""

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.codec import container, huffman
from autocompress.tasks.task import Task
from autocompress.trial import Workbench


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "deep_compression.py"
    spec = importlib.util.spec_from_file_location("deep_compression", path)
    sys.modules["deep_compression"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["deep_compression"]


def right(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


@pytest.fixture(scope="module")
def bench():
    draw = torch.Generator().manual_seed(0)
    rule = torch.randn(20, 4, generator=draw)
    splits = []
    for count in (200, 50, 50):
        x = torch.randn(count, 20, generator=draw)
        splits.append((x, (x @ rule).argmax(1)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    return Workbench(Task(model, *splits, nn.functional.cross_entropy, right, batch_size=20), "cpu")


@pytest.mark.parametrize("share", [0.02, 0.37, 1.0])
def test_a_threshold_keeps_the_share_of_the_largest(script, share):
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    (limit,) = script.thresholds({"a": weight}, {"a": 0.7}, {"a": share}).values()
    kept = weight.abs() >= limit * 0.7
    assert int(kept.sum()) == round(share * 600)
    assert not (~kept).any() or weight.abs()[kept].min() > weight.abs()[~kept].max()


def test_rounds_reach_the_papers_shares_and_no_weight_comes_back(script, bench, monkeypatch):
    said = script.NETS["lenet300"].layers
    net = replace(
        script.NETS["lenet300"],
        layers={"a": replace(said["ip1"], kept=0.25, bits=3), "b": replace(said["ip3"], kept=0.5, bits=4)},
        prune_rounds=3,
        cluster_rounds=2,
        epochs=2,
    )
    zeros, keep = [], script.without_pruned

    def watched(outcome):
        state = keep(outcome)
        zeros.append({key: (state.tensors[key] == 0).numpy() for key in ("0.weight", "2.weight")})
        return state

    monkeypatch.setattr(script, "without_pruned", watched)
    outcome = script.compressed(bench, net, 0, 1.0, lambda text: None)
    assert len(zeros) == 5
    for before, after in pairwise(zeros):
        assert all((after[key] | ~before[key]).all() for key in before)
    assert [round(1 - float(z["0.weight"].mean()), 2) for z in zeros] == [0.63, 0.4, 0.25, 0.25, 0.25]

    result = script.measured(bench, outcome)
    assert [row.kept for row in result.rows] == [0.25, 0.5]
    assert result.size_bytes == len(outcome.artifact)
    content = container.unpack(outcome.artifact)
    for row, key, bits in zip(result.rows, ("0.weight", "2.weight"), (3, 4), strict=True):
        tensor = content.tensors[key]
        assert len(np.unique(tensor.table[tensor.table != 0])) <= 2**bits
        stream = huffman.encode(tensor.symbols)
        told = (row.coded_bits + row.coded_gap_bits) * np.count_nonzero(tensor.values()) / 8
        assert round(told) == len(stream)
    text = script.report(net, 0.1, bench.baseline_bytes(), [result, result])
    assert f"file {result.size_bytes:,} bytes (paper 27,000)" in text
    assert "25.0 (25)" in text
