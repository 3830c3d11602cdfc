"""Searches for a deployment's bytes: sizes are those of the file that an export writes."""

import json
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from local_search import local, one_thread, write_task  # noqa: F401 (fixtures)
from test_cli import done, fail, work  # noqa: F401 (fixtures)
from test_deploy import FACTS, compressed, make_task, mlp
from test_trial import task_of
from torch import nn

from autocompress import api
from autocompress.compress.artifact import load
from autocompress.deploy import latency, target
from autocompress.deploy.export import export
from autocompress.deploy.int8_choose import decided_in
from autocompress.deploy.target import Target, check_holds, check_target, prepared
from autocompress.deploy.verify import runner
from autocompress.errors import SpaceError, UsageError
from autocompress.plan import LayerPlan, Plan, Recipe, uncompressed
from autocompress.search.space_file import load_space
from autocompress.tasks.batches import evaluate, predict
from autocompress.timing import Timing
from autocompress.trial import Budget, Deployed, Workbench, run_trial


class Untouched:
    """Data that must not be looked at."""

    def __init__(self, what):
        self.what = what

    def __iter__(self):
        raise AssertionError(f"{self.what} was looked at")

    __getitem__ = __len__ = __iter__


@pytest.fixture
def brief(monkeypatch):
    """Turns of timing are short."""
    monkeypatch.setattr(latency, "in_files", partial(latency.in_files, seconds=0.002))


def test_a_size_is_that_of_the_exported_file_and_not_chosen_on_test_data(tmp_path, brief):
    task = make_task(mlp(), (torch.randn(40, 1, 8, 8),))
    with torch.no_grad():
        first = next(m for m in task.model.modules() if isinstance(m, nn.Linear))
        first.weight[:5] = 0  # units to cut
    artifact = compressed(task, LayerPlan(bits=3, threshold=1.0), tmp_path)
    data = artifact.read_bytes()
    manifest = export(artifact, task, "onnx", tmp_path / "out", FACTS)
    assert manifest["cut"]["dead_units"] >= 5
    bench = Workbench(replace(task, test=Untouched("test")))
    plan = Plan({spec.name: LayerPlan(bits=3, threshold=1.0) for spec in bench.layers}, Recipe(0.0))
    plain = prepared("onnx", Timing(1), bench)
    found = plain(bench.task, data, plan)
    assert found.size_bytes == manifest["size_bytes"]
    assert 0 < found.latency < 5
    assert Target("archive")(bench.task, data, plan) == Deployed(len(data))
    assert prepared("archive", None, bench).baseline_bytes == 0
    whole = sum(p.numel() * 4 for p in task.model.parameters())
    assert whole < plain.baseline_bytes < whole + 2000
    assert plain(bench.task, data, uncompressed(bench.layers)) == Deployed(plain.baseline_bytes, 1.0)


def test_what_computes_in_8_bits_by_itself_is_measured_where_it_runs(tmp_path, monkeypatch):
    task = make_task(mlp(), (torch.randn(40, 1, 8, 8),))
    data = compressed(task, LayerPlan(bits=8), tmp_path).read_bytes()
    task = replace(task, test=Untouched("test"))
    plan = Plan({name: LayerPlan(bits=8) for name in ("1", "3")}, Recipe(0.0))
    made = Target("onnx-int8")
    found = made(task, data, plan)
    assert 0 < found.size_bytes < sum(p.numel() * 4 for p in task.model.parameters())
    calls = []

    def counting(fmt, file, keywords):
        run, runtime = runner(fmt, file, keywords)
        return lambda inputs: calls.append(fmt) or [0 * out for out in run(inputs)], runtime

    monkeypatch.setattr(target, "runner", counting)
    zeros = made(task, data, plan).metric_val
    assert calls == ["onnx"]
    assert zeros != found.metric_val
    outputs = torch.zeros_like(predict(task.model, task.val)[0])
    assert zeros == pytest.approx(task.metric(outputs, predict(task.model, task.val)[1]))
    assert Target("onnx")(task, data, plan).metric_val is None


def test_a_call_is_timed_beside_the_float32_model(tmp_path, monkeypatch, brief):
    torch.manual_seed(0)
    asked, float32 = [], latency.float32
    monkeypatch.setattr(latency, "float32", lambda *given: asked.append(given[-2]) or float32(*given))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 5))
    task = make_task(wide.eval(), (torch.randn(40, 1, 8, 8),))
    task = replace(task, test=(task.val[0], (task.val[1] + 1) % 5))
    bench = Workbench(task)
    layers = {spec.name: LayerPlan() for spec in bench.layers}
    short = Plan({**layers, "3": LayerPlan(rank=20)}, Recipe(0.0))
    made = prepared("archive", Timing(3), bench)
    assert made.baseline_bytes == 0
    assert 1e-5 < made.timing.baseline < 1
    (outcome,) = run_trial(bench, short, Budget((0.0,)), effort="fast", deployed=pickle.loads(pickle.dumps(made)))
    assert outcome.measurement.size_bytes == len(outcome.artifact)
    assert outcome.measurement.latency < 0.7
    (whole,) = run_trial(bench, uncompressed(bench.layers), Budget((0.0,)), effort="fast", deployed=made)
    assert whole.measurement.latency == 1.0
    path = tmp_path / "a.acz"
    path.write_bytes(outcome.artifact)
    metrics, latencies = made.tested(task, {7: path})
    assert metrics == {}  # those of an archive are its model's
    assert latencies[7][0].key == ("onnx", 3, 1)
    assert latencies[7][0].ratio < 0.7
    assert asked == [[3], [3], [3]]  # before the search, in a trial, at the end
    assert evaluate(task, load(path), "test") != evaluate(task, load(path), "val")
    assert Target("onnx").tested(task, {7: path}) == ({7: pytest.approx(evaluate(task, load(path), "test"))}, {})


def test_a_trial_measures_it_at_each_rung(monkeypatch):
    """The size is asked for each rung's own artifact; that it is the file's is told above."""
    task = task_of()
    bench = Workbench(task)
    plan = Plan({spec.name: LayerPlan(bits=3, threshold=0.5) for spec in bench.layers}, Recipe(1.0))
    asked = []

    def deployed(given, data, which):
        asked.append((given, data, which))
        return Deployed(1000 + len(asked), 0.5)

    found = list(run_trial(bench, plan, Budget((0.0, 1.0)), deployed=deployed))
    assert [(o.measurement.size_bytes, o.measurement.latency) for o in found] == [(1001, 0.5), (1002, 0.5)]
    assert [data for _, data, _ in asked] == [outcome.artifact for outcome in found]
    assert all(given is task and which == plan for given, _, which in asked)


@pytest.mark.slow
def test_a_trial_measures_real_files():
    task = task_of()
    bench = Workbench(task)
    plan = Plan({spec.name: LayerPlan(bits=3, threshold=0.5) for spec in bench.layers}, Recipe(1.0))
    made = Target("onnx")
    for outcome in run_trial(bench, plan, Budget((0.0, 1.0)), deployed=made):
        assert outcome.measurement.size_bytes == made(task, outcome.artifact, plan).size_bytes > len(outcome.artifact)


@pytest.mark.parametrize("given", ["tflite", "", "torch", "ONNX"])
def test_a_target_must_be_known(given):
    with pytest.raises(
        UsageError, match=r"target is .*, allowed: archive, onnx, onnx-int8, executorch, executorch-int8"
    ):
        check_target(given)


def test_what_a_target_cannot_hold_is_told_by_name():
    bench = Workbench(task_of())
    for name in ("quantize_only", "prune_only", "default", "continuation"):
        space = load_space(name, bench.layers, bench.rank_errors)
        check_holds("onnx", space)
        check_holds("onnx-int8", space)
        with pytest.raises(SpaceError, match=r"sets (bits|threshold) \(layer '0': .*target 'executorch'.*rank"):
            check_holds("executorch", space)
    check_holds("executorch", load_space(target.RANKS_SPACE, bench.layers, bench.rank_errors))
    check_holds("executorch", load_space({"version": 1, "layers": [{"width": [0.5, 1.0]}]}, bench.layers))
    priced = {"version": 1, "layers": [{"match": "*", "rank": [0.2, 1.0]}], "recipe": {"rate": 0.5}}
    rates = load_space(priced, bench.layers, bench.rank_errors)
    with pytest.raises(SpaceError, match=r"sets (rate|bits)"):
        check_holds("executorch-int8", rates)


@pytest.fixture
def studied(work, local):  # noqa: F811
    write_task(work)
    return ["waves.py:task", "--study", "waves", "--trials", "4", "--finetune-epochs", "0.2"]


@pytest.mark.slow
def test_a_search_for_onnx(work, studied, done, fail, tmp_path):  # noqa: F811
    text = done("search", *studied, "--target", "onnx")
    assert "(sizes are those of onnx files)" in text
    assert "--format onnx -o deploy" in text
    front = json.loads(done("front", "waves", "--json"))
    assert front["target"] == "onnx"
    for point in front["front"]:
        done("export", "waves", "--pick", f"trial={point['trial']}", "--format", "onnx", "-o", str(tmp_path / "out"))
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["size_bytes"] == point["size_bytes"]
    assert "exists with target onnx, not archive" in fail(2, "search", *studied)
    done("resume", "waves", "--trials", "5")
    assert json.loads(done("front", "waves", "--json"))["target"] == "onnx"


@pytest.mark.slow
def test_an_8_bit_file_of_a_search_is_written_again_byte_by_byte(work, studied, done, tmp_path):  # noqa: F811
    done("search", *studied, "--target", "onnx-int8", "--latency", "3")
    record = api.open_study("waves").record
    points = {point["trial"]: point for point in json.loads(done("front", "waves", "--json"))["front"]}
    members = [trial for trial in record.front if trial.number]
    assert members
    for trial in members:
        manifests = []
        for out in (tmp_path / "a", tmp_path / "b"):
            done("export", "waves", "--pick", f"trial={trial.number}", "--format", "onnx-int8", "-o", str(out))
            manifests.append(json.loads((out / "manifest.json").read_text()))
        first, again = manifests
        assert first["sha256"] == again["sha256"]
        assert first["size_bytes"] == points[trial.number]["size_bytes"]
        assert first["verification"]["metric_exported"] == points[trial.number]["metric_test"]
        assert (first["decided"]["by"], first["verification"]["latency"]["batch"]) == ("record", 3)
        assert decided_in(first) == trial.best.decided
        assert all(m.decided is None for m in trial.measurements if m is not trial.best)


@pytest.mark.slow
def test_a_study_with_results_is_not_verified_again(work, studied, done, monkeypatch):  # noqa: F811
    done("search", *studied, "--target", "onnx", "--latency")
    tested, asked = Target.tested, []

    def noted(self, task, files, **options):
        asked.append((set(files), set(options["untested"])))
        return tested(self, task, files, **options)

    monkeypatch.setattr(target, "export", None)
    monkeypatch.setattr(Target, "tested", noted)
    before = api.open_study("waves").record
    monkeypatch.setattr(target, "run_trial", None)
    done("resume", "waves")  # nothing is left: no file is written
    assert asked == []
    monkeypatch.setattr(target, "run_trial", run_trial)
    done("resume", "waves", "--trials", "5")
    after = api.open_study("waves").record
    assert after.timing == before.timing
    for files, untested in asked:  # with a new member all are timed
        assert untested - {0} <= files
        assert {t.number for t in after.front if t.number} <= files


def test_what_cannot_be_shipped_is_refused_before_the_search(work, studied, fail, monkeypatch):  # noqa: F811
    assert "target is 'tflite'" in fail(2, "search", *studied, "--target", "tflite")
    monkeypatch.setattr("autocompress.deploy.executorch.require", lambda fmt: None)
    said = fail(2, "search", *studied, "--target", "executorch", "--space", "quantize_only")
    assert "sets bits" in said
    write_task(
        work, "\nNet.forward = lambda self, x: self.first(x)[:, 0] * torch.tensor(x.tolist())[:, 0]\n", name="odd.py"
    )
    said = fail(1, "search", "odd.py:task", *studied[1:], "--target", "onnx")
    assert "cannot be exported to ONNX" in said
    assert not (work / "autocompress_runs" / "studies" / "waves").exists()


@pytest.mark.slow
def test_no_size_of_8_bits_is_chosen_on_test_data(tmp_path):
    task = make_task(mlp(), (torch.randn(40, 1, 8, 8),))
    data = compressed(task, LayerPlan(bits=4), tmp_path).read_bytes()
    bench = Workbench(replace(task, test=Untouched("test")))
    made = prepared("onnx-int8", Timing(1), bench)
    assert made(bench.task, data, Plan({"1": LayerPlan(bits=4)}, Recipe(0.0))).latency > 0
    assert made.baseline_bytes == prepared("onnx", None, bench).baseline_bytes > 0


def test_what_does_not_go_together_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="effort is 'max' and the target 'onnx': only archives are coded"):
        check_target("onnx", "tpe", "max")
    monkeypatch.setattr("autocompress.deploy.executorch.require", lambda fmt: None)
    with pytest.raises(UsageError, match="sampler is 'continuation' and the target 'executorch'"):
        check_target("executorch", "continuation")
    check_target("executorch", "tpe")
    check_target("onnx", "continuation")
