"""`scripts/train_big_then_compress.py` on a tiny family: which file counts, equal compute, and the table."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.tasks.task import Task


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "train_big_then_compress.py"
    spec = importlib.util.spec_from_file_location("train_big_then_compress", path)
    sys.modules["train_big_then_compress"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_big_then_compress"]


def right(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def tiny(width):
    return nn.Sequential(nn.Linear(6, round(8 * width)), nn.ReLU(), nn.Linear(round(8 * width), 3))


def test_the_best_on_validation_that_fits_counts(script):
    points = [script.Point(1, 900, 0.7, 0.1), script.Point(1, 800, 0.9, 0.2), script.Point(1, 1001, 1.0, 0.9)]
    assert script.best(points, 1000) is points[1]
    assert script.best(points, 1001) is points[2]
    assert script.best(points, 799) is None


def test_widths_get_equal_compute_and_the_winner_is_marked(script, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    splits = []
    for count in (240, 60, 60):
        x = torch.randn(count, 6, generator=draw)
        splits.append((x, x[:, :3].argmax(1)))
    task = Task(tiny(1), *splits, nn.functional.cross_entropy, right, batch_size=20)
    family = script.Family(tiny, (1, 2), (10**6, 2000, 10))
    monkeypatch.setattr(script, "PRICES", (0.1, 1.0))
    spent, whole = [], script.trial

    def watched(bench, plan, seed, state=None):
        spent.append(plan.recipe.epochs * sum(spec.macs for spec in bench.layers))
        return whole(bench, plan, seed, state)

    monkeypatch.setattr(script, "trial", watched)
    with torch.random.fork_rng():
        base, points = script.run(task, family, 2, 0)
    assert spent == pytest.approx([spent[0], spent[0] / 4, spent[0] / 4] * 2)
    assert len(points) == 4
    assert {p.width for p in points} == {1, 2}

    again = [replace(p, test=p.test / 2) for p in points]
    table = script.errors(family, [points, again])
    for width in (1, 2):
        fits = max((p for p in points if p.width == width), key=lambda p: p.val)
        assert table[width][0] == pytest.approx(100 * (1 - 0.75 * fits.test))
        assert table[width][2] != table[width][2], "nothing fits into ten bytes"
    text = script.report(
        family, {w: 100 * (1 - p.test) for w, p in base.items()}, {1: [5.0, 2.0, 9.0], 2: [4.0, 3.0, 8.0]}
    )
    assert "[4.00]" in text
    assert "[2.00]" in text
    assert "widths above 1 win 2 of 3 sizes" in text
