"""The main job in processes of its own: search, kill, resume, look, load, export; what is on disk is what happened."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_search import write_task

pytestmark = pytest.mark.ray

LOAD = """
import json, sys, torch
import autocompress as ac
from waves import Net, task
t = task()
model = ac.load(sys.argv[1], model=Net())
with torch.no_grad():
    print(json.dumps([t.metric(model(x), y) for x, y in (t.val, t.test)]))
"""


def autocompress(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "autocompress.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    process = autocompress(folder, *arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    return out + err


def front(folder: Path) -> dict:
    return json.loads(run(folder, "front", "--json"))


def until_trials(process: subprocess.Popen, count: int) -> None:
    """Read the search's lines until so many trials have ended."""
    seen = 0
    for line in process.stdout:
        seen += line.startswith("trial ")
        if seen >= count:
            return
    raise AssertionError(f"the search ended after {seen} trials: {process.stderr.read()}")


def search(*more: str) -> tuple[str, ...]:
    return ("search", "waves.py:task", "--finetune-epochs", "1", "--workers", "2", *more)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with a search that was killed after three trials and then resumed to seven."""
    folder = tmp_path_factory.mktemp("main-job")
    write_task(folder)
    process = autocompress(folder, *search("--trials", "7", "--study", "mine"))
    until_trials(process, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {t["trial"] for t in front(folder)["front"]}
    assert before
    said = run(folder, "resume", "mine")
    assert "trials to run" in said
    return folder


def test_every_trial_is_there_once(killed):
    import optuna

    shown = front(killed)
    assert sum(shown["trials"].values()) == 7
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{killed}/autocompress_runs/studies/mine/study.db")
    assert [t.number for t in study.trials] == list(range(7))
    assert all(t.state.is_finished() for t in study.trials)
    best = {(t.values[0], t.values[1]) for t in study.best_trials}
    assert {(p["size_bytes"], p["metric_val"]) for p in shown["front"]} == best


def test_files_are_what_was_measured(killed):
    for point in front(killed)["front"]:
        file = killed / "autocompress_runs" / point["artifact"]
        assert file.stat().st_size == point["size_bytes"]
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(file)], cwd=killed, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == [point["metric_val"], point["metric_test"]]


def test_mlflow_agrees_with_the_study(killed):
    from mlflow import MlflowClient

    shown = front(killed)
    client = MlflowClient(tracking_uri=shown["tracking_uri"])
    parent = client.get_run(shown["run_id"])
    runs = client.search_runs([parent.info.experiment_id], "tags.`autocompress.role` = 'trial'")
    assert sorted(int(r.data.tags["autocompress.trial"]) for r in runs) == list(range(7))
    members = {p["trial"]: p for p in shown["front"]}
    flagged = {int(r.data.tags["autocompress.trial"]): r for r in runs if r.data.tags["pareto"] == "true"}
    assert flagged.keys() == members.keys()
    for number, run_of in flagged.items():
        for key in ("size_bytes", "metric_val", "metric_test", "macs"):
            assert run_of.data.metrics[key] == members[number][key]
    assert parent.data.metrics["hypervolume"] == pytest.approx(shown["hypervolume"])
    files = {f.path for f in client.list_artifacts(parent.info.run_id, "front")}
    assert files == {f"front/front.{kind}" for kind in ("json", "csv", "png", "html")}


def test_nothing_is_left_running(killed):
    ours = str(killed)
    left = [p.info for p in psutil.process_iter(["pid", "cwd", "name"]) if (p.info["cwd"] or "").startswith(ours)]
    assert left == []


def test_an_export_runs_without_us(killed):
    import numpy as np
    import onnxruntime
    import torch

    said = run(killed, "export", "mine", "--pick", "smallest", "-o", "deploy")
    assert "checked" in said
    manifest = json.loads((killed / "deploy/manifest.json").read_text())
    data = (killed / "deploy" / manifest["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == manifest["sha256"]
    session = onnxruntime.InferenceSession(data)
    for batch in (1, 64):
        (outputs,) = session.run(None, {session.get_inputs()[0].name: torch.randn(batch, 8).numpy()})
        assert len(outputs) == batch
        assert np.isfinite(outputs).all()


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_stops_cleanly(tmp_path, number, group):
    """Also one to the whole process group, as Ctrl-C and `timeout` send it."""
    write_task(tmp_path)
    process = autocompress(tmp_path, *search("--trials", "500", "--study", "s"))
    until_trials(process, 2)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=90)
    assert time.monotonic() - sent < 45
    assert process.returncode == 130, out + err
    assert "autocompress resume s" in err
    shown = front(tmp_path)
    assert 2 <= sum(shown["trials"].values()) < 500
    assert all((tmp_path / "autocompress_runs" / p["artifact"]).is_file() for p in shown["front"])
