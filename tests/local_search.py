"""A small user task in a file, and a search that runs its trials in this process, without Ray and MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autocompress.compress import lineage
from autocompress.tracking import NullTracker
from autocompress.trial import Budget, Workbench, run_trial

TASK = """
import torch
from torch import nn
from autocompress import Task

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.second = nn.Linear(24, 16)
        self.last = nn.Linear(16, 1)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))[:, 0]

def split(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x, torch.sin(x[:, 0]) + x[:, 1] * x[:, 2]

def error(outputs, targets):
    return float((outputs - targets).abs().mean())

def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    x, y = split(1, 512)
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        adam.step()
    return net

def task() -> Task:
    return Task(trained(), split(1, 512), split(2, 256), split(3, 256), nn.functional.mse_loss, error,
                direction="minimize", name="waves", batch_size=64)
"""


def write_task(folder: Path, extra: str = "", name: str = "waves.py") -> Path:
    file = folder / name
    file.write_text(TASK + extra, encoding="utf-8")
    return file


def run_here(task, ledger, cluster, trials, rungs, *, trial=None, states=False) -> None:
    """As `engine.run`, one trial after the other in this process."""
    bench = Workbench(task)
    while (job := ledger.next()) is not None:
        error = None
        try:
            start = None if job.start is None else lineage.unpack(job.start, f"the state of trial {job.parent}")
            for outcome, last in _with_last((trial or run_trial)(bench, job.plan, Budget(rungs), job.seed, start)):
                state = lineage.pack(outcome.state()) if states and last else None
                ledger.measured(job.number, outcome.measurement, outcome.artifact, last, state)
        except Exception as problem:
            error = str(problem)
        ledger.ended(job.number, error)


def _with_last(outcomes) -> Iterator:
    outcomes = list(outcomes)
    return ((outcome, index == len(outcomes) - 1) for index, outcome in enumerate(outcomes))


@pytest.fixture
def local(monkeypatch):
    """Searches run in this process and tell no MLflow."""
    monkeypatch.setattr("autocompress.engine.run", run_here)
    monkeypatch.setattr("autocompress.api._tracker", lambda *_: NullTracker())


@pytest.fixture
def one_thread():
    """Torch works on one thread: the models here are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
