"""The order of units in a file: another computes the same, and a good one takes fewer bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_trial import fraction
from test_units import Residual, images, task_of
from torch import nn

import autocompress as ac
from autocompress.codec import container
from autocompress.codec.tensors import Coded
from autocompress.compress import artifact, order
from autocompress.compress.apply import compress
from autocompress.compress.dead_units import Space
from autocompress.compress.units import Place
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial

X = images(20, 5)[0]


class Joined(nn.Module):
    """A concatenation reads `left` and `right`; `tail` reads it, and `last` reads `tail`."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1)
        self.tail, self.last = nn.Conv2d(12, 5, 1), nn.Linear(5 * 16, 4)

    def forward(self, x):
        y = torch.cat([self.left(x), self.right(x)], 1)
        return self.last(torch.relu(self.tail(torch.relu(y))).flatten(1))


def described(bench, layers, **options):
    plan = Plan({s.name: LayerPlan(**options | layers.get(s.name, {})) for s in bench.layers}, Recipe())
    model = compress(
        bench.model, bench.layers, plan, bench.svd, factoriser=bench.factoriser, units=bench.units,
        grids=bench.grids, calibration=lambda: bench.calibration,
    )  # fmt: skip
    return artifact.described(bench.task.model, model.plan, model.encode(), "test", grids=model.grids())


def outputs(bench, made):
    with torch.no_grad():
        return artifact.restore(made, bench.task.model)(X)


@pytest.fixture
def shuffled(monkeypatch):
    """Each group gets an order that no unit keeps its place in; the number of groups that got one."""
    seen = []

    def rolled(nonzero):
        seen.append(len(nonzero))
        return np.roll(np.random.RandomState(0).permutation(len(nonzero)), 1)

    monkeypatch.setattr(order, "chained", rolled)
    return seen


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ({}, {"bits": 4, "threshold": 0.5}),
        ({}, {"bits": 4, "quantizer": "uniform", "granularity": "channel"}),
        ({}, {"bits": 3, "quantizer": "asymmetric"}),
        ({}, {"bits": 3, "quantizer": "asymmetric", "granularity": "channel"}),
        ({"stem": {"granularity": 3}, "depth": {"granularity": 3}}, {"bits": 3, "quantizer": "uniform"}),
        ({}, {"bits": 3, "activation_bits": 8}),
        ({"hidden": {"rank": 4}, "wide": {"rank": 3, "scheme": "spatial"}, "narrow": {"rank": 3}}, {"bits": 5}),
        ({"stem": {"bits": 16}, "hidden": {"bits": 32}}, {"bits": 5}),
    ],
)
def test_any_order_computes_the_same(shuffled, layers, options):
    bench = Workbench(task_of(Residual), "cpu")
    plain = described(bench, layers, **options)
    moved = replace(plain, tensors=order.ordered(plain.tensors, bench.units.wiring))
    assert shuffled == [8, 6, 12]
    assert list(moved.tensors) == list(plain.tensors)
    key = "hidden.1.weight" if "rank" in layers.get("hidden", {}) else "hidden.weight"
    assert not torch.equal(artifact.to_tensor(plain.tensors[key]), artifact.to_tensor(moved.tensors[key]))
    torch.testing.assert_close(outputs(bench, moved), outputs(bench, plain), rtol=1e-4, atol=1e-5)


def test_units_that_scales_of_weights_count_along_stay(shuffled):
    bench = Workbench(task_of(Residual), "cpu")
    plain = described(bench, {"hidden": {"granularity": 8}}, bits=4, quantizer="uniform")
    moved = order.ordered(plain.tensors, bench.units.wiring)
    assert shuffled == [6, 12]  # the sum's units are what `hidden` reads
    assert moved["stem.weight"] is plain.tensors["stem.weight"]
    torch.testing.assert_close(
        outputs(bench, replace(plain, tensors=moved)), outputs(bench, plain), rtol=1e-4, atol=1e-5
    )


def test_units_that_a_concatenation_reads_stay(shuffled):
    bench = Workbench(task_of(Joined), "cpu")
    plain = described(bench, {}, bits=4)
    moved = replace(plain, tensors=order.ordered(plain.tensors, bench.units.wiring))
    assert shuffled == [5]
    assert moved.tensors["left.weight"] is plain.tensors["left.weight"]
    torch.testing.assert_close(outputs(bench, moved), outputs(bench, plain), rtol=1e-4, atol=1e-5)


def test_nothing_moves_without_codes_and_for_coders_that_do_not_profit():
    bench = Workbench(task_of(Residual), "cpu")
    floats, codes = described(bench, {}).tensors, described(bench, {}, bits=4).tensors
    assert not order.is_tried(floats, container.AUTO)
    assert [order.is_tried(codes, effort) for effort in container.EFFORTS] == [True, False, True, False]
    large = {"weight": Coded(np.zeros((1025, 1024), np.uint16), np.zeros(2, np.float32))}
    assert not order.is_tried(large, container.AUTO)
    moved = order.ordered(floats, bench.units.wiring)
    assert all(moved[key] is tensor for key, tensor in floats.items())


def test_each_follows_the_one_that_it_is_most_like():
    a, b = [1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0]
    near_a, near_b, empty = [1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0], [0] * 9
    found = order.chained(np.array([empty, b, near_a, near_b, a], bool))
    assert found.tolist() == [4, 2, 1, 3, 0]


def test_alike_units_apart_take_more_bytes_than_side_by_side():
    rng = np.random.RandomState(0)
    kinds = rng.rand(4, 300) < 0.2
    mixed = kinds[np.arange(80) % 4] & (rng.rand(80, 300) < 0.8)
    symbols = np.where(mixed, rng.randint(1, 4, mixed.shape), 0).astype(np.uint16)
    weight = Coded(symbols, np.arange(4, dtype=np.float32))
    place = Place("weight", 0)
    found = order.moved(weight, place, order.chained(mixed))
    assert sorted(map(bytes, found.symbols)) == sorted(map(bytes, symbols))
    assert container.stream_bytes(found) < 0.9 * container.stream_bytes(weight)


def test_repeated_columns_follow_their_units():
    tensor = Coded(np.arange(24, dtype=np.uint16).reshape(2, 12), np.arange(24, dtype=np.float32))
    found = order.moved(tensor, Place("w", 1, 4), np.array([2, 0, 1]))
    assert found.symbols.tolist() == [
        [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7],
        [20, 21, 22, 23, 12, 13, 14, 15, 16, 17, 18, 19],
    ]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def ends(bench):
    layer = LayerPlan(bits=5, quantizer="uniform", threshold=1.5)
    plan = Plan(dict.fromkeys((s.name for s in bench.layers), layer), Recipe(1.0, 1e-2))
    *_, last = run_trial(bench, plan, Budget((0.0, 1.0)))
    return last


def test_a_trial_measures_the_shorter_file(monkeypatch):
    bench = Workbench(task_of(Wide), "cpu")
    outcome = ends(bench)
    monkeypatch.setattr(order, "is_tried", lambda tensors, effort: False)
    plain = ends(Workbench(task_of(Wide), "cpu"))
    assert outcome.measurement.size_bytes == len(outcome.artifact) < 0.99 * len(plain.artifact)
    assert outcome.measurement.metric_val == plain.measurement.metric_val
    first, second = (artifact.restore(container.unpack(o.artifact), bench.task.model)(X) for o in (outcome, plain))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_an_order_that_changes_the_outputs_is_not_taken(monkeypatch):
    bench = Workbench(task_of(Wide), "cpu")
    groups = bench.units.wiring.groups
    lame = [replace(g, places=frozenset(p for p in g.places if p.axis == 0)) for g in groups]
    bench.units.__dict__["wiring"] = replace(bench.units.wiring, groups=tuple(lame))
    outcome = ends(bench)
    monkeypatch.setattr(order, "is_tried", lambda tensors, effort: False)
    assert outcome.artifact == ends(Workbench(task_of(Wide), "cpu")).artifact


def test_a_model_that_cannot_be_traced_keeps_its_order():
    class Branching(Wide):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > -1e9 else x

    outcome = ends(Workbench(task_of(Branching), "cpu"))
    assert F.cross_entropy(
        artifact.restore(container.unpack(outcome.artifact), Branching())(X), images(20, 5)[1]
    ).isfinite()


class Normalised(nn.Module):
    """Two layers whose outputs one normalisation without scale and shift takes, by turns."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8, affine=False)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x.flatten(1))))
        return self.last(torch.relu(self.norm(self.second(y))))


def test_units_whose_mean_and_variance_are_also_others_stay(shuffled):
    bench = Workbench(task_of(Normalised), "cpu")
    plain = described(bench, {}, bits=4)
    moved = replace(plain, tensors=order.ordered(plain.tensors, bench.units.wiring))
    torch.testing.assert_close(outputs(bench, moved), outputs(bench, plain), rtol=1e-4, atol=1e-5)
    assert shuffled == []


def test_groups_of_very_many_units_stay(shuffled, monkeypatch):
    bench = Workbench(task_of(Wide), "cpu")
    tensors = described(bench, {}, bits=4).tensors
    monkeypatch.setattr(order, "MOST_UNITS", 63)
    assert all(moved is tensors[key] for key, moved in order.ordered(tensors, bench.units.wiring).items())
    monkeypatch.setattr(order, "MOST_UNITS", 64)
    order.ordered(tensors, bench.units.wiring)
    assert shuffled == [64, 64]


class Scaled(Wide):
    """Takes a number beside the examples, a tensor without axes."""

    def forward(self, x, factor):
        return super().forward(x * factor)


def test_inputs_without_axes_do_not_end_a_trial():
    x, y = images(20, 0)
    batches = [((x, torch.tensor(2.0)), y)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    model, example = Scaled(), (x[:1], torch.tensor(2.0))
    task = ac.Task(
        model, loader, loader, loader, F.cross_entropy, fraction, batch_size=20, name="x", example_inputs=example
    )
    bench = Workbench(task, "cpu")
    plan = Plan({s.name: LayerPlan(bits=4) for s in bench.layers}, Recipe())
    (outcome,) = run_trial(bench, plan, Budget((0.0,)))
    assert outcome.measurement.size_bytes > 0


class Numbered(Wide):
    """Gives the most likely class: no output is of floats."""

    def forward(self, x):
        return super().forward(x).argmax(1)


class Sums(Wide):
    """In half precision the norm of these outputs is infinite, and that of no difference is more than that."""

    def forward(self, x):
        return 6e4 * torch.tanh(100 * super().forward(x))


@pytest.mark.parametrize(("model", "dtype"), [(Numbered, torch.float32), (Sums, torch.float16)])
def test_orders_are_told_apart_only_by_finite_numbers(model, dtype):
    task = task_of(model)
    task.model.to(dtype)
    task = replace(task, train=(X.to(dtype), images(20, 5)[1]), val=(X.to(dtype), images(20, 5)[1]))
    bench = Workbench(task, "cpu")
    plain = described(bench, {}, bits=4)
    weight = plain.tensors["last.weight"]
    wrong = Coded(weight.symbols[::-1].copy(), weight.table, weight.dtype, weight.grid)
    assert not bench._agree(plain, replace(plain, tensors={**plain.tensors, "last.weight": wrong}))


def test_a_stream_of_very_many_sums_has_one_space():
    first = stream = Space(4)
    for _ in range(3000):
        added = Space(4)
        added.join(stream)
        stream = added
    assert first.root() is stream


def test_outputs_are_near_by_their_spread():
    wanted = torch.tensor([60000.0, 60004.0, 59996.0, 60001.0], dtype=torch.float64)
    assert order.is_near(wanted, wanted + 1e-3)
    assert not order.is_near(wanted, wanted.flip(0))  # a ten-thousandth of their size
    masked = torch.tensor([-torch.inf, 1.0, 2.0], dtype=torch.float64)
    assert order.is_near(masked, masked + 1e-6)
    assert not order.is_near(masked, masked.flip(0))
    assert not order.is_near(masked, torch.full_like(masked, torch.nan))
    assert order.is_near(torch.ones(3), torch.ones(3))
    assert not order.is_near(torch.ones(3), torch.ones(3) + 1e-3)
