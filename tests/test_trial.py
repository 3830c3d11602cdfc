"""Trials: measured on the very file, reproducible for a seed, and silent about the caller's world."""

import copy
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import autocompress as ac
from autocompress.compress import apply
from autocompress.errors import PlanError, TaskError, TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe, uncompressed
from autocompress.tasks.batches import evaluate
from autocompress.trial import Budget, Outcome, Workbench, run_trial


def data(count, seed, classes=True):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2:5].sum(1)], 1)
    return x, (y[:, 0] > 0).long() + 2 * (y[:, 1] > 0).long() if classes else y


def fraction(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean().item()


def squared(outputs, targets):
    return ((outputs - targets) ** 2).mean().item()


class Residual(nn.Module):
    """A user's own module: no tree, weights shared, dropout, a buffer."""

    def __init__(self, outputs):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, outputs)
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.again.weight
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(self.drop(self.norm(x + self.twin(torch.relu(self.again(x))))))


def tree():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def task_of(model=None, **more):
    torch.manual_seed(5)
    fields = {
        "model": (model or tree)(), "train": data(150, 0), "val": data(60, 1), "test": data(60, 2),
        "loss": F.cross_entropy, "metric": fraction, "batch_size": 32,
    }  # fmt: skip
    return ac.Task(**fields | more)


def regression():
    parts = {
        name: data(count, seed, False) for name, count, seed in (("train", 150, 0), ("val", 60, 1), ("test", 60, 2))
    }
    return task_of(lambda: Residual(2), loss=F.mse_loss, metric=squared, direction="minimize", **parts)


RECIPE = Recipe(1.0, 1e-2, 0.5)
SMALL = Plan({"0": LayerPlan(rank=4, bits=4, threshold=0.3), "4": LayerPlan(bits=3)}, RECIPE)


def outcomes(task, plan, *args, **more):
    return list(run_trial(task, plan, *args, **more))


def test_an_outcome_is_its_file(tmp_path):
    task = task_of()
    budget = Budget((0.0, 0.5, 1.0))
    found = outcomes(task, SMALL, budget)
    assert [o.measurement.rung for o in found] == [0, 1, 2]
    assert [o.measurement.epoch for o in found] == [0.0, 0.5, 1.0]
    assert len({o.artifact for o in found}) == 3
    path = tmp_path / "x.acz"
    for outcome in found:
        path.write_bytes(outcome.artifact)
        assert outcome.measurement.size_bytes == path.stat().st_size
        for loaded in (ac.load(path), ac.load(path, model=tree())):
            assert evaluate(task, loaded, "val") == outcome.measurement.metric_val
        assert outcome.measurement.macs == 4 * (8 + 32) + 32 * 4
        assert outcome.measurement.seconds >= 0
    assert isinstance(found[0], Outcome)
    assert len(repr(found[0])) < 1000


def test_a_users_own_regression_that_is_minimised(tmp_path):
    task = regression()
    plan = Plan(
        {"first": LayerPlan(rank=3, bits=8), "again": LayerPlan(bits=6, threshold=0.1), "head": LayerPlan()}, RECIPE
    )
    before = evaluate(task, task.model, "val")
    found = outcomes(task, plan, Budget((0.0, 1.0)))
    (tmp_path / "m.acz").write_bytes(found[-1].artifact)
    loaded = ac.load(tmp_path / "m.acz", model=Residual(2))
    assert evaluate(task, loaded, "val") == found[-1].measurement.metric_val
    assert loaded.twin.weight is loaded.again.weight
    assert found[-1].measurement.metric_val < found[0].measurement.metric_val  # it learned
    assert evaluate(task, task.model, "val") == before


def test_the_uncompressed_plan_is_the_model_itself(tmp_path):
    task = task_of()
    bench = Workbench(task)
    (only,) = outcomes(bench, uncompressed(bench.layers))
    assert only.measurement.metric_val == evaluate(task, task.model, "val")
    assert only.measurement.macs == sum(s.macs for s in bench.layers) == 8 * 32 + 32 * 4
    (tmp_path / "m.acz").write_bytes(only.artifact)
    for key, tensor in ac.load(tmp_path / "m.acz").state_dict().items():
        assert torch.equal(tensor, task.model.state_dict()[key]), key


def test_nothing_of_the_callers_is_changed():
    task = regression()
    kept = copy.deepcopy(task.model.state_dict())
    modes = [m.training for m in task.model.modules()]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    bench = Workbench(task)
    plan = Plan({s.name: LayerPlan(bits=3, threshold=0.4) for s in bench.layers}, RECIPE)
    for _ in run_trial(bench, plan, Budget((0.0, 0.5, 1.0)), seed=9):
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
    assert all(torch.equal(tensor, kept[key]) for key, tensor in task.model.state_dict().items())
    assert [m.training for m in task.model.modules()] == modes
    assert all(p.grad is None for p in task.model.parameters())
    for tensor, own in zip(bench.model.parameters(), task.model.parameters(), strict=True):
        assert torch.equal(tensor, own)
        assert tensor is not own


class Noisy(Dataset):
    """Draws from all three global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = data(40, 0)
        return x[i] + 0.1 * torch.randn(8) + random.random() * 0.1 + np.random.rand() * 0.1, y[i]


@pytest.mark.parametrize("kind", ["pair", "noisy", "loader"])
def test_a_trial_follows_from_its_seed(kind):
    def train():
        if kind == "loader":
            return DataLoader(Noisy(), 10, shuffle=True)
        return data(150, 0) if kind == "pair" else Noisy()

    runs = []
    for noise, seed in ((1, 4), (2, 4), (3, 5)):
        torch.manual_seed(noise), random.seed(noise), np.random.seed(noise)
        bench = Workbench(task_of(train=train()))
        files = []
        for outcome in run_trial(bench, SMALL, Budget((0.0, 0.5, 1.0)), seed=seed):
            files.append(outcome.artifact)
            torch.rand(noise), random.random()  # the caller goes on drawing
        runs.append(files)
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[2][0]
    assert runs[0][2] != runs[2][2]


def test_a_bench_gives_every_trial_the_same_as_a_fresh_one():
    task = task_of()
    bench = Workbench(task)
    other = Plan({"0": LayerPlan(rank=2, bits=2), "4": LayerPlan(bits=1)}, RECIPE)
    first = outcomes(bench, SMALL)[-1].artifact
    outcomes(bench, other, seed=8)
    assert outcomes(bench, SMALL)[-1].artifact == first == outcomes(task, SMALL)[-1].artifact


def test_kept_guides_are_those_of_each_batch():
    """Distillation from outputs computed once for a pair of tensors, and batch by batch for a data set."""
    pair = data(64, 0)

    class AsDataset(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return pair[0][i], pair[1][i]

    for given in (pair, AsDataset()):
        bench = Workbench(task_of(train=given))
        seen = 0
        for x, y, guide in bench.feed(3, distil=True).epoch(0):
            with torch.no_grad():
                assert torch.allclose(guide, bench.model(x), atol=1e-6)
            for row, target in zip(x, y, strict=True):
                assert target == pair[1][(pair[0] == row).all(1)]
            seen += len(x)
        assert seen == 64
        assert all(guide is None for _, _, guide in bench.feed(3, distil=False).epoch(0))
        assert bench.steps_per_epoch == 2
    orders = [[x.tolist() for x, _, _ in bench.feed(3, distil=False).epoch(i)] for i in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_going_on_from_a_trial(tmp_path):
    bench = Workbench(task_of())
    mild = Plan({"0": LayerPlan(bits=8), "4": LayerPlan(bits=8)}, RECIPE)
    parent = outcomes(bench, mild)[-1]
    state = parent.state()
    assert isinstance(state, apply.State)
    again = outcomes(bench, mild, start=state)
    assert again[0].artifact == parent.artifact
    assert again[0].measurement.metric_val == parent.measurement.metric_val
    strong = Plan({"0": LayerPlan(rank=4, bits=3), "4": LayerPlan(bits=2, threshold=0.5)}, RECIPE)
    child, alone = outcomes(bench, strong, start=state), outcomes(bench, strong)
    assert child[0].artifact != alone[0].artifact
    assert child[1].measurement.size_bytes < parent.measurement.size_bytes


def test_an_estimate_is_near_the_first_rungs_file():
    task = task_of()
    task.model.train()(data(150, 0)[0])  # statistics of a trained model, not ones and zeros
    bench = Workbench(task)
    assert bench.estimate(SMALL) == pytest.approx(outcomes(bench, SMALL)[0].measurement.size_bytes, rel=0.03)
    with pytest.raises(PlanError, match="layer '0': rank is 99"):
        bench.estimate(Plan({"0": LayerPlan(rank=99), "4": LayerPlan()}))


def test_bad_plans_and_budgets_are_one_line():
    task = task_of()
    for plan, said in (
        (Plan({"0": LayerPlan(rank=99), "4": LayerPlan()}), r"layer '0': rank is 99, allowed: 1 to 6, or full"),
        (Plan({"0": LayerPlan(), "4": LayerPlan(bits=11)}), "layer '4': bits is 11, allowed: 1, 2"),
        (Plan({"0": LayerPlan()}), "plan has no entry for layer '4'"),
        (Plan({"0": LayerPlan(), "4": LayerPlan()}, Recipe(epochs=-2)), "recipe: epochs is -2"),
    ):
        with pytest.raises(PlanError, match=said) as caught:
            outcomes(task, plan)
        assert "\n" not in str(caught.value)
    for rungs in ((), (0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match=r"rungs are .*, allowed: rising shares"):
            Budget(rungs)


def test_a_loss_or_metric_that_is_not_finite_fails_the_trial():
    with pytest.raises(TrialFailed, match="loss became nan at step 0 of 5"):
        outcomes(task_of(loss=lambda o, t: o.sum() * float("nan")), SMALL)
    with pytest.raises(TrialFailed, match="metric 'metric' on val gave nan"):
        outcomes(task_of(metric=lambda o, t: float("nan")), SMALL)
    task = task_of()
    with torch.no_grad():
        task.model[0].weight[0, 0] = float("inf")
    with pytest.raises(TrialFailed, match="layer '0' holds weights that are not finite"):
        outcomes(task, SMALL)


def test_a_model_without_a_layer_says_what_it_holds():
    with pytest.raises(TaskError, match="no layer to compress: it holds BatchNorm1d"):
        outcomes(task_of(lambda: nn.Sequential(nn.BatchNorm1d(8))), SMALL)


def test_a_tiny_budget_still_gives_every_rung():
    short = Plan(SMALL.layers, Recipe(0.001, 1e-2, 0.0))
    assert [o.measurement.rung for o in outcomes(task_of(), short, Budget((0.0, 0.3, 1.0)))] == [0, 1, 2]
    none = Plan(SMALL.layers, Recipe(0.0, 1e-2, 0.0))
    assert [o.measurement.rung for o in outcomes(task_of(), none, Budget((0.0, 0.3, 1.0)))] == [0]


def test_the_baselines_size_is_that_of_its_float32_file():
    model = Residual(4)
    state = {k: v for k, v in model.state_dict().items() if k != "twin.weight"}
    assert Workbench(task_of(lambda: model)).baseline_bytes() == len(save(state))
    double = Workbench(task_of(lambda: nn.Sequential(nn.Linear(8, 4)).double()))
    header = struct.unpack("<Q", save({"0.weight": torch.zeros(4, 8), "0.bias": torch.zeros(4)})[:8])[0]
    assert double.baseline_bytes() == 8 + header + 4 * (32 + 4)
    assert set(load_safetensors(save(state))) == set(state)


def test_example_inputs_and_mappings():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    class Mappings(Dataset):
        def __init__(self, seed):
            self.x, self.y = data(20, seed)

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return {"left": self.x[i], "right": -self.x[i]}, self.y[i]

    task = task_of(Named, train=Mappings(0), val=Mappings(1), test=Mappings(2))
    plan = Plan({"a": LayerPlan(bits=3), "b": LayerPlan(rank=2)}, RECIPE)
    found = outcomes(task, plan)
    assert len(found) == 2
    assert {s.macs for s in Workbench(task).layers} == {32}
