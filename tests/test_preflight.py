"""What a search will do: coverage is complete, numbers are those of the search."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress import preflight
from autocompress.search.space_file import load_space
from autocompress.tasks.task import Task
from autocompress.terminal import summed_up
from autocompress.trial import Workbench


@pytest.fixture(scope="module")
def bench() -> Workbench:
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    task = Task(
        model=net,
        train=(x, y),
        val=(x + 1, y),
        test=(x + 2, y),
        loss=F.cross_entropy,
        metric=lambda o, t: (o.argmax(1) == t).float().mean().item(),
        batch_size=16,
    )
    return Workbench(task)


def test_coverage_counts_every_value_once(bench):
    rows = preflight.coverage(bench)
    assert sum(row.elements for row in rows) == sum(t.numel() for t in bench.model.state_dict().values())
    assert [row.name for row in rows if row.kind != "kept"] == ["0", "3"]
    assert all(row.note for row in rows)


def test_estimate_grows_with_trials_and_leaves_the_task_alone(bench):
    before = {k: v.clone() for k, v in bench.task.model.state_dict().items()}
    threads = torch.get_num_threads()
    space = load_space(None, bench.layers)

    def ask(trials: int, **more: float) -> preflight.Preflight:
        return preflight.preflight(
            bench, space, trials=trials, workers=1, threads=1, epochs=2.0, rungs=3, startup=False, unstopped=3, **more
        )

    few, many = ask(4), ask(400)
    assert many.seconds > 10 * few.seconds
    assert ask(4, file_seconds=100.0).seconds > 3 * 3 * 100  # three trials after the baseline, three rungs
    assert few.knobs == len(space.knobs)
    assert few.compressed == 6 * 16 + 16 * 3
    assert 0 < few.share < 1
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[k], v) for k, v in bench.task.model.state_dict().items())


def test_summary_loses_no_value(bench):
    rows = preflight.coverage(bench)
    short = summed_up(rows, 1)
    assert sum(row.elements for row in short) == sum(row.elements for row in rows)
    assert len({row.note for row in short if row.kind == "kept"}) == sum(row.kind == "kept" for row in short)
    many = rows[:1] * 5
    assert [row.name for row in summed_up(many, 2)] == ["0", "0", "3 more layers"]


@pytest.mark.parametrize(("trials", "steps"), [(1, 0), (2, 1), (6, 2), (12, 4), (40, 10), (1000, 10)])
def test_ladder_takes_a_third_at_most(trials, steps):
    assert preflight.uniform_steps(trials) == steps


def test_a_sweep_takes_a_chain_per_worker_and_at_most_two_thirds_of_the_trials():
    assert [preflight.sweep_trials(40, workers) for workers in (1, 2, 8)] == [12, 24, 26]
    assert [preflight.sweep_trials(trials, 8) for trials in (1, 2, 3, 4)] == [0, 0, 1, 2]


def test_plans_that_look_at_the_training_data_are_timed_too(bench):
    layers = [{"bits": 4, "rounding": "hessian", "quantizer": "uniform", "activation_bits": 8}]
    space = load_space({"version": 1, "layers": layers}, bench.layers)
    found = preflight.preflight(bench, space, trials=3, workers=1, threads=1, epochs=0.5, rungs=2, startup=False)
    assert not found.problem
    assert found.seconds > 0


def test_finetuning_fills_a_time_budget_within_bounds(bench, monkeypatch):
    space = load_space("continuation", bench.layers)
    monkeypatch.setattr(bench, "steps_per_epoch", 100)
    monkeypatch.setattr(preflight, "_costs", lambda *_: (0.5, 2.0))  # seconds of a step, and of a measurement

    def epochs(seconds: float, workers: int = 1) -> float:
        way = {"trials": 10, "workers": workers, "threads": 1, "free": False}
        trials, epochs = preflight.filling(bench, space, seconds=seconds, **way)
        assert trials == 10
        return epochs

    alone = epochs(3000)
    spent = preflight.STARTUP_SECONDS + 8 * 2.0 + 10 * (alone * 100 * 0.5 + 2.0)
    assert spent == pytest.approx(0.9 * 3000)
    way = {"trials": 10, "workers": 1, "threads": 1, "free": False, "file_seconds": 50.0}
    _, fewer = preflight.filling(bench, space, seconds=3000, **way)
    spent = preflight.STARTUP_SECONDS + 8 * 52.0 + 10 * (fewer * 100 * 0.5 + 52.0)
    assert spent == pytest.approx(0.9 * 3000)
    assert epochs(3000) < epochs(3000, workers=2) < 2 * epochs(3000) + 1
    assert epochs(1) == pytest.approx(1.0)
    assert epochs(1e6) == preflight.MOST_STEPS / 100
    monkeypatch.setattr(bench, "steps_per_epoch", 2 * preflight.MOST_STEPS)
    assert epochs(1e6) == 1.0


def test_a_long_time_budget_gets_more_trials(bench, monkeypatch):
    space = load_space("continuation", bench.layers)
    monkeypatch.setattr(bench, "steps_per_epoch", 100)
    monkeypatch.setattr(preflight, "_costs", lambda *_: (0.5, 2.0))
    most = preflight.MOST_STEPS / 100
    one = most * 100 * 0.5 + 2.0  # seconds of the longest trial
    way = {"trials": 10, "workers": 2, "threads": 1, "free": True}
    for seconds in (1000, 1e4, 1e5):
        trials, epochs = preflight.filling(bench, space, seconds=seconds, **way)
        assert (trials > 10) == (epochs == most) == (seconds > 5e4)
    spent = preflight.STARTUP_SECONDS + 8 * 2.0 + 1.25 * trials / 2 * one  # of the last
    assert 0.9 * 1e5 - 1.25 * one < spent <= 0.9 * 1e5


@pytest.mark.parametrize("workers", [1, 2])
def test_slow_steps_give_fewer_trials_and_not_short_ones(bench, monkeypatch, workers):
    space = load_space("continuation", bench.layers)
    monkeypatch.setattr(bench, "steps_per_epoch", 300)
    monkeypatch.setattr(preflight, "_costs", lambda *_: (0.1, 2.0))
    way = {"trials": 60, "workers": workers, "threads": 1}
    chains = 1 + preflight.STEPS * workers
    step = 0.1 * (1.25 if workers > 1 else 1.0) / workers

    def spent(trials: int, steps: float) -> float:
        return preflight.STARTUP_SECONDS + 8 * 2.0 + trials * (steps + 20) * step

    for seconds, fewer, whole in ((1000, True, False), (4000, True, True), (1000 * 60, False, True)):
        trials, epochs = preflight.filling(bench, space, seconds=seconds, **way, free=True)
        asked, shorter = preflight.filling(bench, space, seconds=seconds, **way, free=False)
        assert asked == 60
        assert (trials < 60) == fewer
        assert trials >= chains
        assert (epochs * 300 >= preflight.LEAST_STEPS - 1e-6) == whole
        assert epochs > shorter or not fewer
        if fewer and whole:  # no more trials could be so long
            assert spent(trials + workers, preflight.LEAST_STEPS) > 0.9 * seconds
    assert preflight.filling(bench, space, seconds=1000, **way, free=True)[0] == chains


def test_what_cannot_be_measured_gives_no_epochs(bench, monkeypatch):
    def broken(*_: object) -> tuple[float, float]:
        raise ValueError("no such shape")

    monkeypatch.setattr(preflight, "_costs", broken)
    space = load_space("continuation", bench.layers)
    assert preflight.filling(bench, space, seconds=60, trials=3, workers=1, threads=1, free=True) is None
