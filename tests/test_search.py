"""Whole searches with Ray and MLflow, from the command line and from Python, and what is left after each kind of stop.

What is refused before a search starts, a resume on another model or other data among it, is in test_cli.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from local_search import write_task
from torch import nn

import autocompress as ac
from autocompress.codec import header
from autocompress.folders import Records
from autocompress.record import StudyRecord
from autocompress.search.study import StudyStore
from autocompress.tasks.batches import evaluate

pytestmark = pytest.mark.ray
PATIENCE_S = 240
MARK = "AUTOCOMPRESS_TEST_RUN"

SLOW = """
import time

plain = error

def error(outputs, targets):
    time.sleep(0.3)
    return plain(outputs, targets)
"""

TROUBLE = """
import dataclasses, os, signal
from pathlib import Path

DRIVER, HERE = os.getpid(), Path(__file__).parent
to_raise = False

def first(what):
    try:
        (HERE / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def loss(outputs, targets):
    global to_raise
    value = nn.functional.mse_loss(outputs, targets)
    if os.getpid() == DRIVER or to_raise:
        return value
    if first("nan"):
        return value * float("nan")
    if first("raised"):
        to_raise = True
    elif first("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return value

def metric(outputs, targets):
    global to_raise
    if to_raise:
        to_raise = False
        raise ValueError("no metric\\ntoday")
    return error(outputs, targets)

def troubled():
    return dataclasses.replace(task(), loss=loss, metric=metric, name="troubled")
"""

AGAIN = """
import json, sys
import autocompress as ac
from autocompress.tasks.batches import evaluate
import waves

task = waves.task()
found = []
for path in sys.argv[1:]:
    model = ac.load(path, model=waves.Net())
    plain = [waves.error(model(x).detach(), y) for x, y in (task.val, task.test)]
    found.append([evaluate(task, model, "val"), evaluate(task, model, "test"), *plain])
print(json.dumps(found))
"""


class Command:
    """`autocompress ...` in a process group of its own, whose output can be read as it comes."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOCOMPRESS_", "MLFLOW_", "RAY_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autocompress.cli", *arguments],
            cwd=folder,
            env={**environment, MARK: self.mark, "PYTHONPATH": str(Path(ac.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def read_until(self, pattern: str, times: int = 1) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            times -= bool(re.search(pattern, line))
            if not times:
                return
        raise AssertionError("".join(self.lines) + self.process.communicate()[1])

    def end(self, code: int = 0) -> tuple[str, str]:
        """What the command printed, once it has ended with that exit code."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        out = "".join(self.lines) + out
        assert self.process.returncode == code, out + err
        assert "Traceback" not in out + err
        return out, err

    def processes(self) -> list[psutil.Process]:
        """What it started and what those started, wherever they are now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def leaves_nothing(self) -> None:
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [(process.pid, process.name()) for process in left]
        for process in left:
            process.kill()
        assert not names


def command(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    run = Command(folder, *arguments)
    said = run.end(code)
    run.leaves_nothing()
    return said


def search(*more: str) -> tuple[str, ...]:
    return ("search", "waves.py:task", "--study", "s", "--workers", "2", "--finetune-epochs", "4", *more)


def record_of(folder: Path, study: str = "s") -> StudyRecord:
    return StudyStore.open(Records(folder / "autocompress_runs").file(study)).record()


def runs_of(record: StudyRecord) -> tuple[Any, dict[int, Any]]:
    """The parent's run and the trials' by number, as a plain client finds them; each trial is there once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=record.tracking_uri)
    parent = client.get_run(record.run_id)
    where = f"tags.`autocompress.role` = 'trial' and tags.`autocompress.study` = '{record.study}'"
    runs = client.search_runs([parent.info.experiment_id], where, max_results=1000)
    numbers = [int(run.data.tags["autocompress.trial"]) for run in runs]
    assert len(set(numbers)) == len(numbers)
    return parent, dict(zip(numbers, runs, strict=True))


def agrees(record: StudyRecord) -> None:
    """MLflow holds what the study holds."""
    parent, runs = runs_of(record)
    assert parent.data.tags["autocompress.role"] == "study"
    assert parent.info.status == "FINISHED"
    assert sorted(runs) == [trial.number for trial in record.trials]
    front = {trial.number for trial in record.front}
    for trial in record.trials:
        data = runs[trial.number].data
        assert data.tags["mlflow.parentRunId"] == record.run_id
        assert data.tags["pareto"] == ("true" if trial.number in front else "false")
        if trial.best is None:
            assert runs[trial.number].info.status == "FAILED"
            continue
        assert data.metrics["size_bytes"] == trial.best.size_bytes
        assert data.metrics["metric_val"] == pytest.approx(trial.best.metric_val, rel=1e-12)
        assert ("metric_test" in data.metrics) == (trial.metric_test is not None)
        for name, layer in trial.plan.layers.items():
            assert data.params[f"{name}.bits"] == str(layer.bits)
    assert parent.data.metrics["hypervolume"] == pytest.approx(record.hypervolume())


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search of 6 trials."""
    folder = tmp_path_factory.mktemp("searched")
    write_task(folder)
    out, err = command(folder, *search("--trials", "6"))
    assert err == ""
    assert "autocompress export s" in out
    return folder


@pytest.fixture(scope="module")
def shown(searched: Path) -> dict[str, Any]:
    """What `front --json` says of it."""
    front: dict[str, Any] = json.loads(command(searched, "front", "--json")[0])
    return front


def test_front_json(searched, shown):
    assert (shown["study"], shown["task"], shown["metric"], shown["direction"]) == ("s", "waves", "error", "minimize")
    assert sum(shown["trials"].values()) == 6
    assert set(shown["baseline"]) == {"size_bytes", "metric_val", "metric_test"}
    assert type(shown["hypervolume"]) is float
    assert shown["tracking_uri"].startswith("sqlite:")
    assert re.fullmatch("[0-9a-f]{32}", shown["run_id"])
    kinds = {"trial": int, "size_bytes": int, "ratio": float, "metric_val": float, "metric_test": float, "macs": int}
    for point in shown["front"]:
        assert {key: type(point[key]) for key in kinds} == kinds
        assert set(point) - {"parent"} == {*kinds, "artifact", "plan", "recipe"}
        assert point.get("parent", 0) in range(6)
        assert set(point["plan"]) == {"first", "second", "last"}
        assert {"rank", "bits", "threshold"} <= set(point["plan"]["first"])
        data = (searched / "autocompress_runs" / point["artifact"]).read_bytes()
        assert len(data) == point["size_bytes"]
        assert header.read(data).entries
    assert shown["front"][0]["ratio"] > 4
    for trial in record_of(searched).front:
        data = (searched / "autocompress_runs" / str(trial.artifact)).read_bytes()
        assert hashlib.sha256(data).hexdigest() == trial.sha256


def test_artifacts_give_the_recorded_metrics_in_a_fresh_process(searched, shown):
    points = [shown["front"][0], shown["front"][-1]]
    files = [str(searched / "autocompress_runs" / point["artifact"]) for point in points]
    fresh = subprocess.run(
        [sys.executable, "-c", AGAIN, *files], cwd=searched, capture_output=True, text=True, check=True
    )
    for point, (val, test, *plain) in zip(points, json.loads(fresh.stdout), strict=True):
        assert (val, test) == (point["metric_val"], point["metric_test"])
        assert plain == pytest.approx([val, test], rel=1e-6)


def test_mlflow_agrees_with_the_study(searched):
    record = record_of(searched)
    agrees(record)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=record.tracking_uri)
    files = {file.path for file in client.list_artifacts(record.run_id, "front")}
    assert {f"front/front.{kind}" for kind in ("json", "csv", "png", "html")} <= files
    history = client.get_metric_history(record.run_id, "hypervolume")
    assert sorted(point.step for point in history) == list(range(6))


def test_a_front_member_is_exported(searched):
    out, _ = command(searched, "export", "--pick", "smallest", "--format", "archive", "-o", "out")
    assert "checked against" in out
    manifest = json.loads((searched / "out" / "manifest.json").read_text())
    assert (searched / "out" / manifest["file"]).stat().st_size == manifest["size_bytes"]


def test_kill_9_of_the_driver_then_resume(tmp_path):
    write_task(tmp_path, SLOW)
    run = Command(tmp_path, *search("--trials", "9"))
    run.read_until(r"^trial +\d+ (complete|stopped)", times=4)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.communicate()
    run.leaves_nothing()
    left = record_of(tmp_path)
    finished = {t.number: t for t in left.trials if t.state != "running"}
    assert 4 <= len(finished) < 9

    out, _ = command(tmp_path, "resume", "s")
    record = record_of(tmp_path)
    assert [trial.number for trial in record.trials] == list(range(9))
    assert record.count("complete") + record.count("stopped") == 9
    assert left.run_id in (None, record.run_id)
    assert all(record.trials[n].measurements == t.measurements for n, t in finished.items())
    ended = [int(n) for n in re.findall(r"^trial +(\d+) ", out, re.MULTILINE)]
    assert sorted(ended) == sorted(set(range(9)) - set(finished))
    files = {path.name for path in (tmp_path / "autocompress_runs/studies/s/artifacts").iterdir()}
    assert files == {Path(str(t.artifact)).name for t in record.trials if t.artifact}
    agrees(record)


def test_ctrl_c_keeps_what_is_finished_and_a_second_search_on_the_study_is_refused(tmp_path):
    write_task(tmp_path, SLOW)
    run = Command(tmp_path, *search("--trials", "200"))
    run.read_until(r"^trial +\d+ (complete|stopped)", times=2)
    refused = Command(tmp_path, *search("--trials", "200")).end(code=2)[1]
    assert refused.strip() == "autocompress: study 's' is in use by another process; wait for it or stop it first"
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    _, err = run.end(code=130)
    assert "go on with: autocompress resume s" in err
    assert len(err.strip().splitlines()) == 1
    run.leaves_nothing()
    record = record_of(tmp_path)
    finished = [t for t in record.trials if t.state != "running"]
    assert len(finished) >= 2
    assert all(t.best is not None for t in finished)


def test_trouble_in_some_trials(tmp_path):
    """A loss that turns NaN, a metric that raises, a worker that is killed: each costs its trial, not the search."""
    write_task(tmp_path, TROUBLE)
    out, _ = command(
        *(tmp_path, "search", "waves.py:troubled", "--study", "t", "--trials", "9", "--workers", "2"),
        *("--finetune-epochs", "4"),
    )
    assert {"nan", "raised", "killed"} <= {path.name for path in tmp_path.iterdir()}
    record = record_of(tmp_path, "t")
    assert [trial.number for trial in record.trials] == list(range(9))
    errors = sorted(str(trial.error) for trial in record.trials if trial.state == "failed")
    assert len(errors) == 3
    assert any("loss became nan" in error for error in errors)
    assert any(re.search("ValueError.*no metric today|no metric today", error) for error in errors)
    assert any("worker process died" in error for error in errors)
    assert out.count(" failed: ") >= 3
    agrees(record)


def test_a_time_budget_ends_the_search_and_keeps_the_rest_for_later(tmp_path):
    """However short it is, the baseline is measured."""
    write_task(tmp_path)
    command(tmp_path, *search("--trials", "500", "--time-budget", "1s"))
    record = record_of(tmp_path)
    assert len(record.trials) == record.count("complete") == 1
    assert record.baseline is not None
    assert record.asked == 500
    agrees(record)


def regression(direction: str = "minimize") -> ac.Task:
    """A bare linear layer that was fitted, and data of its own."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 6, generator=generator) * (torch.rand(20, 6, generator=generator) > 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(20, 6)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 20, generator=generator)
        return x, x @ truth + 0.01 * torch.randn(count, 6, generator=generator)

    train = split(400)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(*train).solution.T)
        model.bias.zero_()
    return ac.Task(
        name="linear",
        model=model,
        train=train,
        val=split(200),
        test=split(200),
        loss=nn.functional.mse_loss,
        metric=lambda outputs, targets: float((outputs - targets).square().mean()),
        direction=direction,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_bare_linear_layer_from_python(tmp_path, one_thread):
    task = regression()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    random_before = torch.get_rng_state()
    study = ac.search(task, trials=6, workers=1, name="mine", dir=tmp_path / "runs", seed=3, finetune_epochs=4)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert task.model.training
    assert len(study.front) > 1
    for point in study.front:
        assert point.artifact.stat().st_size == point.size_bytes
        assert evaluate(task, point.model(), "val") == point.metric_val
        assert evaluate(task, point.model(), "test") == point.metric_test
        assert set(point.plan.layers) == {""}
    smallest = study.front.smallest()
    manifest = smallest.export(tmp_path / "out", format="archive")
    assert (tmp_path / "out" / manifest["file"]).read_bytes() == smallest.artifact.read_bytes()
    loaded = ac.load(smallest.artifact)  # a standard layer: no architecture needed
    assert evaluate(task, loaded, "test") == smallest.metric_test

    other = regression()
    with torch.no_grad():
        other.model.weight[0, 0] += 1
    with pytest.raises(ac.AutocompressError, match="another model"):
        ac.resume("mine", dir=tmp_path / "runs", task=other, trials=8)
    with pytest.raises(ac.AutocompressError, match="task=") as error:
        ac.resume("mine", dir=tmp_path / "runs")
    assert "mine" in str(error.value)
    assert ac.open_study("mine", dir=tmp_path / "runs", task=task).front.smallest() == smallest


def test_a_search_with_a_coder(tmp_path):
    """Its artifacts have it, a study keeps it, and another one is refused."""
    write_task(tmp_path)
    command(tmp_path, *search("--trials", "3", "--coder", "huffman"))
    front = json.loads(command(tmp_path, "front", "--json")[0])["front"]
    coders = set()
    for point in front:
        entries = header.read((tmp_path / "autocompress_runs" / point["artifact"]).read_bytes()).entries
        coders |= {entry.coder for entry in entries}
    assert coders == {"", "huffman"}
    with pytest.raises(AssertionError, match="exists with effort huffman, not auto"):
        command(tmp_path, *search("--trials", "4"))
