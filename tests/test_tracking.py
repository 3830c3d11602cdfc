"""MLflow as a view of a study: what a plain client finds, live, rebuilt, and when the store is away."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.errors import TrackingError, UsageError
from autocompress.plan import LayerPlan, LayerSpec, Measurement, Plan, Recipe
from autocompress.record import StudyRecord, TrialRecord
from autocompress.tracking import Home, LocalWriter, MlflowTracker, NullTracker, Target, default_uri, sync
from autocompress.tracking.curve import Curve
from autocompress.tracking.process import ProcessWriter
from autocompress.tracking.runs import layer_keys, trial_points
from autocompress.tracking.view import read_view_tag, varied_knobs

LAYERS = (
    LayerSpec("conv1", "conv2d", (16, 1, 3, 3), 9_000),
    LayerSpec("fc1", "linear", (120, 256), 30_720),
    LayerSpec("fc2", "linear", (10, 120), 1_200),
)
LAYERS_MATRIX = {"conv1": (16, 9), "fc1": (120, 256), "fc2": (10, 120)}
BASELINE_BYTES = 140_000


def synthetic_trial(number: int, rng: random.Random, state: str = "complete") -> TrialRecord:
    """A trial whose size and accuracy follow from a random plan, with three rungs; trial 0 is the baseline."""
    if number == 0:
        plan = Plan({spec.name: LayerPlan() for spec in LAYERS}, Recipe(epochs=0.0, distillation=0.0))
        only = Measurement(0, 0.0, BASELINE_BYTES - 500, 0.978, 40_920, 0.4)
        return TrialRecord(0, "complete", plan, 0, (only,), only, seconds=0.4, origin="baseline")
    layers = {
        spec.name: LayerPlan(
            rank=rng.choice([None, 3, 2]) if spec.name != "conv1" else None,
            bits=rng.randint(2, 8),
            threshold=round(rng.uniform(0.0, 2.0), 3),
        )
        for spec in LAYERS
    }
    plan = Plan(layers, Recipe(epochs=1.0, learning_rate=round(10 ** rng.uniform(-4, -2), 6), distillation=0.5))
    bits = sum(layer.bits for layer in layers.values()) / 3
    density = sum(math.exp(-layer.threshold) for layer in layers.values()) / 3
    size = int(BASELINE_BYTES * bits / 32 * density) + rng.randint(100, 900)
    accuracy = 0.975 - 0.5 * math.exp(-size / 4_000) - rng.uniform(0.0, 0.06)
    rungs = tuple(
        Measurement(r, 0.5 * r, size + 10 * (2 - r), accuracy - 0.03 * (2 - r) ** 2, 30_000 + number, 0.5 * (r + 1))
        for r in range(3)
    )
    if state == "failed":
        return TrialRecord(number, "failed", plan, number, error="loss became NaN at rung 1", seconds=0.7)
    rungs = rungs[: 2 if state == "stopped" else 3]
    best = rungs[-1]
    if number % 5 == 2:  # the best rung is not the last one
        best = replace(rungs[-1], rung=0, size_bytes=size + 3, metric_val=accuracy + 0.001)
        rungs = (best, *rungs[1:])
    return TrialRecord(number, state, plan, number, rungs, best, seconds=1.5 + number / 100)


def synthetic_study(trials: int, name: str = "toy", seed: int = 0) -> StudyRecord:
    """A study of that many settled trials: one in seven stopped, one in eleven failed."""
    rng = random.Random(seed)
    states = ["failed" if n % 11 == 10 else "stopped" if n % 7 == 6 else "complete" for n in range(trials)]
    return StudyRecord(
        study=name,
        task="digits",
        metric="accuracy",
        direction="maximize",
        seed=seed,
        baseline_bytes=BASELINE_BYTES,
        layers=LAYERS,
        trials=tuple(synthetic_trial(n, rng, state) for n, state in enumerate(states)),
        asked=trials,
        command="autocompress search digits --trials 12",
        created="2026-01-02T03:04:05+00:00",
        space={"layers": {"*": {"bits": [2, 8]}}},
        versions={"torch": "2.9", "autocompress": "0.1"},
        fingerprint={"model": "abc"},
    )


def upto(record: StudyRecord, trials: int) -> StudyRecord:
    return replace(record, trials=record.trials[:trials])


def with_test_metrics(record: StudyRecord) -> StudyRecord:
    """The record as it is at the end of a search: the front's members and the baseline are tested."""
    tested = {trial.number for trial in record.front} | {0}
    trials = [replace(t, metric_test=0.5 + t.number / 100) if t.number in tested else t for t in record.trials]
    return replace(record, trials=tuple(trials))


def write_front(record: StudyRecord, folder: Path) -> Sequence[Path]:
    file = folder / "front.json"
    file.write_text(json.dumps(record.to_front_json()))
    return [file]


def describe(record: StudyRecord) -> str:
    return f"**{record.study}**: {len(record.front)} on the front"


def target(uri: str, artifacts: Path | None) -> Target:
    return Target(uri, artifacts, write_front, describe)


def wait_until_open(tracker: MlflowTracker) -> None:
    deadline = time.monotonic() + 60
    while tracker.home is None and tracker.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)


def run_live(
    record: StudyRecord, uri: str, artifacts: Path | None, status: str = "FINISHED", *, local: bool = True
) -> MlflowTracker:
    """Write a whole study as a search does: trial by trial, then the end. `local`: no process for it."""
    goal = target(uri, artifacts)
    tracker = MlflowTracker(goal, writer=LocalWriter(goal) if local else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocompress.tracking.tracker.GATHER_S", 0.0)
        tracker.start(upto(record, 0))
        wait_until_open(tracker)
        for number, trial in enumerate(record.trials, 1):
            tracker.log(upto(record, number), trial)
            time.sleep(0.03)
        tracker.finish(with_test_metrics(record), status)  # type: ignore[arg-type]
    return tracker


def content(uri: str, home: Home) -> dict[str, object]:
    """All that a plain client finds of a study, without ids and times."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([home.experiment_id], max_results=5000)
    found: dict[str, object] = {}
    for run in runs:
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        history = {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        assert run.info.run_name not in found
        found[run.info.run_name] = (run.info.status, tags, run.data.params, run.data.metrics, history, files)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One SQLite store for the module: creating its schema takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    return default_uri(folder), folder / "artifacts"


@pytest.fixture(scope="module")
def live(store: tuple[str, Path]) -> tuple[StudyRecord, MlflowTracker]:
    record = synthetic_study(24, "live")
    tracker = run_live(record, *store, local=False)
    assert tracker.problem is None
    return with_test_metrics(record), tracker


def test_a_plain_client_finds_each_trial(live: tuple[StudyRecord, MlflowTracker], store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    record, tracker = live
    assert tracker.home is not None
    client = MlflowClient(tracking_uri=store[0])
    runs = client.search_runs([tracker.home.experiment_id], "tags.`autocompress.role` = 'trial'")
    by_number = {int(run.data.tags["autocompress.trial"]): run for run in runs}
    assert sorted(by_number) == list(range(24))
    for trial in record.trials:
        run = by_number[trial.number]
        assert run.data.tags["mlflow.parentRunId"] == tracker.home.run_id
        assert run.data.tags["autocompress.study"] == "live"
        assert run.data.tags["autocompress.state"] == trial.state
        assert run.info.run_name == f"trial {trial.number}"
        assert run.info.end_time - run.info.start_time == pytest.approx(1000 * trial.seconds, abs=2)
        for name, layer in trial.plan.layers.items():
            assert run.data.params[f"{name}.rank"] == ("full" if layer.rank is None else str(layer.rank))
            assert int(run.data.params[f"{name}.bits"]) == layer.bits
            assert float(run.data.params[f"{name}.threshold"]) == layer.threshold
            if trial.number != 0:
                share = 1.0 if layer.rank is None else layer.rank / min(LAYERS_MATRIX[name])
                assert float(run.data.params[f"{name}.rank_share"]) == pytest.approx(share, rel=1e-3)
        bits = {name: layer.bits for name, layer in trial.plan.layers.items()}
        weighted = sum(bits[name] * math.prod(LAYERS_MATRIX[name]) for name in bits)
        mean = weighted / sum(map(math.prod, LAYERS_MATRIX.values()))
        assert ("mean_bits" in run.data.params) == (trial.number != 0)
        assert float(run.data.params.get("mean_bits", mean)) == pytest.approx(mean, rel=1e-3)
        assert float(run.data.params["recipe.learning_rate"]) == trial.plan.recipe.learning_rate
        plan = json.loads(Path(client.download_artifacts(run.info.run_id, "plan.json")).read_text())
        assert Plan.from_json(plan) == trial.plan
        if trial.state == "failed":
            assert run.info.status == "FAILED"
            assert run.data.tags["autocompress.error"] == "loss became NaN at rung 1"
            assert run.data.metrics.keys() == {"seconds"}
            continue
        assert run.info.status == "FINISHED"
        assert trial.best is not None
        assert run.data.metrics["size_bytes"] == trial.best.size_bytes
        assert run.data.metrics["metric_val"] == trial.best.metric_val
        assert run.data.metrics["ratio"] == BASELINE_BYTES / trial.best.size_bytes
        assert run.data.metrics["macs"] == trial.best.macs
        history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "metric_val")}
        assert [history[m.rung] for m in trial.measurements] == [m.metric_val for m in trial.measurements]
        assert run.data.metrics.get("metric_test") == trial.metric_test
        assert len(run.data.metrics) <= 10
    assert any(t.best != t.measurements[-1] for t in record.measured), "the fixture holds a best rung before the last"


def test_pareto_flags_follow_the_front(live: tuple[StudyRecord, MlflowTracker], store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    record, tracker = live
    assert tracker.home is not None
    points = {
        t.number: (t.best.size_bytes, -t.best.metric_val) for t in record.trials if t.best and t.state != "failed"
    }

    def beaten(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return b != a and b[0] <= a[0] and b[1] <= a[1]

    front = {n for n, p in points.items() if not any(beaten(p, q) for q in points.values())}
    once = {t.number for k in range(1, 25) for t in upto(record, k).front}
    assert once > front, "the fixture has members that leave the front"
    client = MlflowClient(tracking_uri=store[0])
    found = client.search_runs([tracker.home.experiment_id], "tags.pareto = 'true'")
    assert {int(run.data.tags["autocompress.trial"]) for run in found} == front
    rest = client.search_runs([tracker.home.experiment_id], "tags.pareto = 'false'")
    assert len(rest) == 24 - len(front)


def test_only_the_runs_whose_membership_changed_are_written_again(store: tuple[str, Path]) -> None:
    from autocompress.tracking.mirror import Mirror
    from autocompress.tracking.store import connect

    record = synthetic_study(16, "flags")
    client = connect(store[0])
    mirror = Mirror(client, store[0], upto(record, 0), store[1])
    rewritten: list[str] = []
    log_batch = client.log_batch

    def spy(run_id: str, *args: object, tags: Sequence[object] = (), **keywords: object) -> None:
        rewritten.extend([run_id] * bool(tags))
        log_batch(run_id, *args, tags=tags, **keywords)

    client.log_batch = spy
    left = 0
    for number in range(1, 17):
        before, after = upto(record, number - 1).front, upto(record, number).front
        leavers = {t.number for t in before} - {t.number for t in after}
        rewritten.clear()
        mirror.update(upto(record, number), {})
        assert len(rewritten) == len(leavers)
        found = client.search_runs([mirror.home.experiment_id], "tags.pareto = 'true'")
        assert {int(run.data.tags["autocompress.trial"]) for run in found} == {t.number for t in after}
        left += len(leavers)
    assert left > 3


def test_the_parent_run(live: tuple[StudyRecord, MlflowTracker], store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    record, tracker = live
    home = tracker.home
    assert home is not None
    client = MlflowClient(tracking_uri=store[0])
    run = client.get_run(home.run_id)
    assert (run.info.run_name, run.info.status) == ("live", "FINISHED")
    assert run.data.tags["autocompress.role"] == "study"
    assert run.data.tags["mlflow.note.content"] == describe(record)
    assert run.data.tags["autocompress.command"] == record.command
    expected = {"sampler": "tpe", "target": "archive", "seed": "0", "workers": "1", "task": "digits"}
    expected |= {"metric": "accuracy", "asked": "24"}
    assert run.data.params == expected | {"direction": "maximize"}
    history = {m.step: m.value for m in client.get_metric_history(home.run_id, "hypervolume")}
    assert history == pytest.approx({n: record.hypervolume(n) for n in range(24)})
    assert run.data.metrics["hypervolume"] == pytest.approx(record.hypervolume())
    paths = {file.path for file in client.list_artifacts(home.run_id)}
    assert paths == {"front", "space.json", "study.json"}
    assert [file.path for file in client.list_artifacts(home.run_id, "front")] == ["front/front.json"]
    space = json.loads(Path(client.download_artifacts(home.run_id, "space.json")).read_text())
    assert space == record.space
    assert (store[1] / home.run_id / "artifacts" / "front" / "front.json").exists()


def test_the_saved_view_is_in_the_experiment(live: tuple[StudyRecord, MlflowTracker], store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    record, tracker = live
    home = tracker.home
    assert home is not None
    assert home.url.startswith(f"/#/experiments/{home.experiment_id}/runs?viewStateShareKey=")
    assert home.url.endswith("&compareRunsMode=CHART")
    key = home.url.partition("viewStateShareKey=")[2].partition("&")[0]
    experiment = MlflowClient(tracking_uri=store[0]).get_experiment(home.experiment_id)
    assert experiment.name == "autocompress/live"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    tag = experiment.tags[f"mlflow.sharedViewState.{key}"]
    assert len(tag) < 5000
    state = read_view_tag(tag)
    assert (state["orderByKey"], state["orderByAsc"]) == ("tags.`pareto`", False)
    scatter = state["compareRunCharts"][0]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("size_bytes", "metric_val")
    parallel = next(chart for chart in state["compareRunCharts"] if chart["type"] == "PARALLEL")
    assert parallel["selectedParams"] == ["mean_bits", *varied_knobs(record)]
    assert 2 < len(parallel["selectedParams"]) <= 9


def test_a_rebuilt_store_equals_the_live_one_and_a_second_sync_changes_nothing(
    live: tuple[StudyRecord, MlflowTracker], store: tuple[str, Path]
) -> None:
    from mlflow import MlflowClient

    record, tracker = live
    assert tracker.home is not None
    written = content(store[0], tracker.home)
    MlflowClient(tracking_uri=store[0]).delete_experiment(tracker.home.experiment_id)
    lost = replace(record, run_id=tracker.home.run_id, experiment_id=tracker.home.experiment_id)
    home = sync(lost, target(*store))
    assert home.experiment_id != tracker.home.experiment_id
    assert content(store[0], home) == written
    again = sync(lost, target(*store))
    assert again == home
    assert content(store[0], home) == written
    MlflowClient(tracking_uri=store[0]).restore_experiment(tracker.home.experiment_id)


def test_sync_mends_what_is_missing_wrong_or_there_twice(store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    record = with_test_metrics(synthetic_study(8, "damaged"))
    home = sync(record, target(*store))
    good = content(store[0], home)
    client = MlflowClient(tracking_uri=store[0])
    runs = {
        run.info.run_name: run.info.run_id
        for run in client.search_runs([home.experiment_id], "tags.`autocompress.role` = 'trial'")
    }
    client.delete_run(runs["trial 1"])
    client.log_metric(runs["trial 3"], "metric_val", 0.1, step=99)
    client.set_tag(runs["trial 4"], "pareto", "perhaps")
    client.log_param(runs["trial 5"], "fc9.bits", "7")
    double = {"mlflow.parentRunId": home.run_id, "autocompress.role": "trial", "autocompress.trial": "2"}
    client.create_run(home.experiment_id, tags=double, run_name="twice")
    client.update_run(runs["trial 6"], "RUNNING")
    sync(record, target(*store))
    assert content(store[0], home) == good


def test_a_resume_continues_the_same_parent(store: tuple[str, Path]) -> None:
    record = synthetic_study(16, "resumed")
    first = run_live(upto(record, 7), *store, status="KILLED").home
    assert first is not None
    assert content(store[0], first)["resumed"][0] == "KILLED"  # type: ignore[index]
    second = run_live(replace(record, asked=20), *store)
    assert second.problem is None
    assert second.home == first
    found = content(store[0], first)
    assert set(found) == {"resumed", *(f"trial {n}" for n in range(16))}
    status, tags, *_, history, _ = found["resumed"]  # type: ignore[misc]
    assert status == "FINISHED"
    assert tags["autocompress.asked"] == "20"
    assert [step for step, _ in history["hypervolume"]] == list(range(16))


def test_an_experiment_of_another_study_or_a_deleted_one_is_passed_over(store: tuple[str, Path]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store[0])
    client.delete_experiment(client.create_experiment("autocompress/shared"))
    mine = synthetic_study(2, "shared")
    yours = replace(mine, created="2026-02-03T00:00:00+00:00")
    homes = [sync(study, target(*store)) for study in (mine, yours, mine, yours)]
    assert homes[0] == homes[2]
    assert homes[1] == homes[3]
    names = [client.get_experiment(home.experiment_id).name for home in homes[:2]]
    assert names == ["autocompress/shared-2", "autocompress/shared-3"]


def test_home_is_told_once_from_the_thread(store: tuple[str, Path]) -> None:
    told: list[Home] = []
    record = synthetic_study(1, "told")
    tracker = MlflowTracker(target(*store), on_home=told.append, writer=LocalWriter(target(*store)))
    tracker.start(record)
    tracker.finish(record, "FAILED")
    assert told == [tracker.home]


def test_artifacts_that_are_refused_do_not_stop_the_runs(store: tuple[str, Path], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    record = synthetic_study(3, "refused")
    tracker = run_live(record, store[0], blocked / "artifacts")
    assert tracker.problem is not None
    assert "refused" in tracker.problem
    assert "\n" not in tracker.problem
    assert tracker.home is not None
    blocked.unlink()
    home = sync(record, target(store[0], None))
    found = content(store[0], home)
    assert all(run[5] == ["plan.json"] for name, run in found.items() if name != "refused")  # type: ignore[index]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_store_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("autocompress.tracking.tracker.FIRST_RETRY_S", 0.1)
    record = synthetic_study(3)
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    tracker = MlflowTracker(target(uri, None))
    began = time.monotonic()
    tracker.start(record)
    tracker.log(record, record.trials[1])
    assert time.monotonic() - began < 0.1
    tracker.finish(record, "FINISHED")
    assert tracker.home is None
    assert tracker.problem is not None
    assert tracker.problem.startswith("MLflow at http://127.0.0.1:")
    assert "secret" not in tracker.problem
    with pytest.raises(TrackingError, match="MLflow at"):
        sync(record, target(uri, None))


def test_a_server_that_never_answers_does_not_hang_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.tracking.tracker.PATIENCE_S", 0.5)
    record = synthetic_study(2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = MlflowTracker(target(uri, None))
        tracker.start(record)
        tracker.finish(record, "FINISHED")
        assert tracker.problem == f"MLflow at {uri}: no answer in 0.5 s"


def test_the_store_is_caught_up_with_when_it_comes_back(
    store: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocompress.tracking import writer as module

    monkeypatch.setattr("autocompress.tracking.tracker.FIRST_RETRY_S", 0.05)
    connect, away = module.connect, [True]

    def flaky(uri: str) -> object:
        if away[0]:
            raise OSError("disk is full\nreally")
        return connect(uri)

    monkeypatch.setattr(module, "connect", flaky)
    record = synthetic_study(6, "flaky")
    tracker = MlflowTracker(target(*store), writer=LocalWriter(target(*store)))
    tracker.start(record)
    deadline = time.monotonic() + 5
    while tracker.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tracker.problem is not None
    assert tracker.problem.endswith("disk is full really")
    away[0] = False
    tracker.finish(record, "FINISHED")
    assert tracker.problem is None
    assert tracker.home is not None
    assert len(content(store[0], tracker.home)) == 7


def ignore(busy: bool) -> None:
    """Nobody watches the writer."""


def test_a_writer_that_is_killed_is_begun_again(store: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.tracking.tracker.GATHER_S", 0.0)
    record = synthetic_study(9, "killed")
    writer = ProcessWriter(target(*store))
    tracker = MlflowTracker(target(*store), writer=writer)
    tracker.start(upto(record, 4))
    wait_until_open(tracker)
    victim = writer.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    tracker.finish(record, "FINISHED")
    assert tracker.problem is None
    assert tracker.home is not None
    assert set(content(store[0], tracker.home)) == {"killed", *(f"trial {n}" for n in range(9))}


def test_what_goes_wrong_in_the_writers_process_is_told(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    writer = ProcessWriter(target(default_uri(tmp_path), tmp_path / "artifacts"))
    with pytest.raises(TrackingError, match="not a database"):
        writer.open(synthetic_study(1), ignore)
    first = writer.pid
    with pytest.raises(TrackingError, match="not a database"):
        writer.open(synthetic_study(1), ignore)
    assert first is not None
    assert writer.pid == first, "a process that answers is used again"
    os.kill(first, signal.SIGKILL)
    with pytest.raises(TrackingError, match=f"its writer, process {first}, ended with -9"):
        writer.write(synthetic_study(1), {}, None, ignore)
    writer.close()
    assert writer.pid is None
    with pytest.raises(TrackingError, match="closed"):
        writer.write(synthetic_study(1), {}, None, ignore)


HOLD = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_tracking import ProcessWriter, ignore, synthetic_study, target
from pathlib import Path
writer = ProcessWriter(target({uri!r}, Path({artifacts!r})))
writer.open(synthetic_study(1, "orphan"), ignore)
if os.fork() == 0:
    time.sleep(60)  # holds the driver's end of the socket, as a data loader's worker would
print(writer.pid, flush=True)
time.sleep(60)
"""


def test_the_writers_process_ends_with_its_driver(store: tuple[str, Path]) -> None:
    code = HOLD.format(tests=str(Path(__file__).parent), uri=store[0], artifacts=str(store[1]))
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    try:
        assert Path(f"/proc/{child}").exists()
        driver.kill()
        deadline = time.monotonic() + 5
        while _alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(child)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_writers_process_that_is_stuck_is_given_up(store: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.tracking.tracker.LOCAL_PATIENCE_S", 0.5)
    writer = ProcessWriter(target(*store))
    tracker = MlflowTracker(target(*store), writer=writer)
    tracker.start(synthetic_study(1, "stuck"))
    wait_until_open(tracker)
    stuck = writer.pid
    assert stuck is not None
    os.kill(stuck, signal.SIGSTOP)
    tracker.finish(synthetic_study(800, "stuck"), "FINISHED")  # more than a socket's buffer holds
    assert tracker.problem == f"MLflow at {store[0]}: no answer in 0.5 s"
    assert not _alive(stuck)
    assert writer.pid is None


def test_the_writers_process_finds_its_modules_whatever_is_on_the_path(
    store: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "platform.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "sitecustomize.py").write_text("print('hello', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), Path("/no/string"), *sys.path])
    tracker = run_live(synthetic_study(2, "shadowed"), *store, local=False)
    assert tracker.problem is None
    assert capfd.readouterr() == ("", "")


class Wire:
    """In the place of the process: keeps what it is sent, and agrees."""

    def __init__(self, sent: list[tuple]) -> None:  # type: ignore[type-arg]
        self.send, self.receive, self.end = sent.append, lambda: ("done", None), lambda: None


def test_only_new_and_changed_trials_travel_to_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple] = []  # type: ignore[type-arg]
    monkeypatch.setattr("autocompress.tracking.process._Child", lambda: Wire(sent))
    record = synthetic_study(6, "news")
    writer = ProcessWriter(target(default_uri(tmp_path), None))
    writer.open(upto(record, 3), ignore)
    changed = replace(record.trials[1], metric_test=0.25)
    later = replace(record, trials=(record.trials[0], changed, *record.trials[2:]))
    writer.write(later, {}, None, ignore)
    for (_, header, news, *_), numbers in zip(sent[1:], ([0, 1, 2], [1, 3, 4, 5]), strict=True):
        assert header.trials == ()
        assert [trial.number for trial in news] == numbers


def test_the_curve_does_not_depend_on_the_order_of_arrival() -> None:
    record = synthetic_study(30)
    rng = random.Random(1)
    order = list(range(1, 30))
    rng.shuffle(order)
    curve, found, settled = Curve(), {}, {0}
    for number in order:
        settled.add(number)
        trials = [t if t.number in settled else replace(t, state="running", best=None) for t in record.trials]
        found |= curve.extend(replace(record, trials=tuple(trials)))
    assert found == pytest.approx({n: record.hypervolume(n) for n in range(30)})
    assert list(found) == list(range(30))


def test_values_that_are_not_finite_are_never_sent() -> None:
    trial = synthetic_study(3).trials[1]
    bad = replace(trial.measurements[0], metric_val=math.nan)
    points = trial_points(synthetic_study(3), replace(trial, measurements=(bad, *trial.measurements[1:])))
    assert all(math.isfinite(point.value) for point in points)
    assert [p.step for p in points if p.key == "metric_val"] == [1, 2]
    assert [p.step for p in points if p.key == "size_bytes"] == [0, 1, 2]


def test_layer_names_become_keys_that_mlflow_takes_and_stay_apart() -> None:
    from mlflow.utils.validation import _validate_param

    names = ["", "features.0", "block+1", "block*1", "a/b", "日本", "x" * 400, "y" * 400]
    keys = layer_keys({name: LayerPlan() for name in names})
    assert keys["features.0"] == "features.0"
    assert keys[""] == "model"
    assert len(set(keys.values())) == len(names)
    for key in keys.values():
        _validate_param(f"{key}.threshold", "1")


def test_the_null_tracker_does_nothing() -> None:
    record = synthetic_study(1)
    tracker = NullTracker()
    tracker.start(record)
    tracker.log(record, record.trials[0])
    tracker.finish(record, "FINISHED")
    assert (tracker.home, tracker.problem) == (None, None)


def test_a_store_whose_schema_could_not_be_finished_is_not_there(tmp_path, monkeypatch):
    """MLflow does not mend a schema that a full disk, or a kill, left half made."""
    from mlflow.store.db import utils

    from autocompress.tracking.store import connect

    def half(engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE datasets (dataset_uuid VARCHAR(36))")
        raise OSError("No space left on device")

    file = tmp_path / "records" / "mlflow.db"
    with monkeypatch.context() as patched:
        patched.setattr(utils, "_initialize_tables", half)
        with pytest.raises(OSError, match="No space left"):
            connect(f"sqlite:///{file}")
    assert list(file.parent.iterdir()) == []
    assert [e.name for e in connect(f"sqlite:///{file}").search_experiments()] == ["Default"]
    assert not [path.name for path in file.parent.iterdir() if path.name.startswith(".")]


def test_a_folder_that_no_address_can_hold_is_refused(tmp_path):
    assert default_uri(tmp_path / "a b #ü%20") == f"sqlite:///{tmp_path}/a b #ü%20/mlflow.db"
    with pytest.raises(UsageError, match=r"has a '\?' in its name"):
        default_uri(tmp_path / "what?")
