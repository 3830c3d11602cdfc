"""Latencies: calls take turns, ratios are of neighbouring turns, and the record, MLflow and the terminal tell them."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from local_search import local, one_thread, write_task  # noqa: F401
from torch import nn
from torch.nn import functional as F

from autocompress import Task, api, cli, report
from autocompress.deploy import latency, turns
from autocompress.deploy.export import export
from autocompress.deploy.turns import Turns, in_turns
from autocompress.errors import ExportError, StudyError, UsageError
from autocompress.folders import Records
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.record import Latency
from autocompress.search.study import StudyStore
from autocompress.tracking import runs
from autocompress.trial import Budget, Workbench, run_trial

ONE = Latency("onnx", 1, 1, 2e-3, 1.9e-3, 2.2e-3, 4e-3, 0.5, 1234)


def test_calls_take_turns_and_none_is_always_first():
    seen = []
    in_turns({name: lambda name=name: seen.append(name) for name in "abc"}, turns=4, seconds=0.0)
    firsts = [b for a, b in pairwise([None, *seen]) if a != b]  # each turn's calls, warm ones too, are in a row
    assert "".join(firsts) == "abc" + "bca" + "cab" + "abc"
    assert len(seen) == 4 * 3 * 2 * 3


def test_turns_end_where_they_take_too_long():
    for most, wanted in ((0.0, 5), (60.0, 8)):
        found = in_turns({"a": lambda: None, "b": lambda: None}, turns=8, seconds=0.0, most=most)
        assert [len(times.medians) for times in found.values()] == [wanted, wanted]


def test_ratios_and_quartiles():
    slow, fast = Turns((2.0, 6.0, 10.0, 6.0, 8.0)), Turns((1.0, 2.0, 5.0, 2.0, 2.0))
    assert slow.over(fast) == 3.0  # of 2, 3, 2, 3, 4; the ratio of medians is 3 too, of means 2.7
    assert slow.quartiles == (6.0, 6.0, 8.0)


def test_times_are_those_of_the_calls(monkeypatch):
    clock = [0.0]

    def takes(seconds):
        clock[0] += seconds

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = in_turns({"a": lambda: takes(0.004), "b": lambda: takes(0.008)}, turns=5, seconds=0.01)
    assert found["a"].quartiles == pytest.approx((0.004, 0.004, 0.004))
    assert found["a"].over(found["b"]) == pytest.approx(0.5)
    assert clock[0] == pytest.approx(5 * 2 * (3 * 0.004 + 3 * 0.008))  # three calls at least, as often to warm up


@pytest.fixture(scope="module")
def wide():
    """A task whose layer of dead units is most of its work, and its artifact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    with torch.no_grad():
        net[2].weight[:, 40:] = 0.0
    x, y = torch.randn(20, 256), torch.randint(0, 4, (20,))
    metric = lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean())  # noqa: E731
    return Task(net, (x, y), (x, y), (x, y), F.cross_entropy, metric, batch_size=10)


def test_an_artifact_of_dead_units_is_faster_than_float32(wide, tmp_path):
    bench = Workbench(wide, "cpu")
    plan = Plan({spec.name: LayerPlan(bits=8, threshold=1e-3) for spec in bench.layers}, Recipe(0.0, 1e-3, 0.0))
    *_, outcome = run_trial(bench, plan, Budget((0.0,)))
    path = tmp_path / "trial.acz"
    path.write_bytes(outcome.artifact)
    found = latency.measure(wide, {7: path}, batches=(1, 40), turns=6, seconds=0.004)
    assert list(found) == [7]
    one, many = found[7]
    assert (one.target, one.batch, many.batch, one.threads) == ("onnx", 1, 40, 1)
    for each in (one, many):
        assert each.low <= each.median <= each.high
        assert each.ratio < 0.6
        assert each.ratio == pytest.approx(each.median / each.baseline, rel=0.5)
        assert 1000 < each.size_bytes < 4 * 256 * 2048
        assert each.baseline_memory_bytes > each.memory_bytes + 1e6
        assert each.macs == 256 * 40 + 40 * 256 + 256 * 4
    (short,) = latency.measure(wide, {7: path}, target="onnx-int8", batches=(1,), turns=6, seconds=0.004)[7]
    assert (short.target, short.batch) == ("onnx-int8", 1)
    assert short.size_bytes < 0.8 * one.size_bytes
    with pytest.raises(UsageError, match="target is 'torch', allowed: onnx, onnx-int8"):
        latency.measure(wide, {7: path}, target="torch")
    with pytest.raises(UsageError, match="threads is 0, allowed: 1 to 1024"):
        latency.measure(wide, {7: path}, threads=0)
    with pytest.raises(UsageError, match="batch is -3, allowed: 1 to 65536"):
        latency.measure(wide, {7: path}, batches=(1, -3))


def test_bench_writes_the_record_which_mlflow_and_the_terminal_read(tmp_path, local, one_thread, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "runs"
    with pytest.raises(StudyError):
        api.bench("none", dir=folder)
    api.search(f"{write_task(tmp_path)}:task", trials=2, workers=1, name="timed", dir=folder, finetune_epochs=0.5)
    monkeypatch.setattr(latency, "measure", partial(latency.measure, turns=2, seconds=0.001))
    monkeypatch.setattr(latency, "peak_bytes", lambda file, *_: 4_000_000 + ("float32" in file.name))
    capsys.readouterr()
    assert cli.main(["bench", "timed", "--dir", str(folder), "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "onnx, batch 2" in said
    assert "4.00 MB memory" in said
    record = api.open_study("timed", dir=folder).record
    for trial, point in zip(record.front, record.to_front_json()["front"], strict=True):
        (told,) = trial.latencies
        assert json.loads(json.dumps(point["latencies"])) == [told.to_json()]
        assert (told.batch, told.memory_bytes, told.baseline_memory_bytes) == (2, 4_000_000, 4_000_001)
        assert 0 < told.macs <= trial.best.macs
        names = {p.key: p.value for p in runs.trial_points(record, trial)}
        assert names["latency_onnx_batch_2_ms"] == pytest.approx(1e3 * told.median)
        assert names["latency_onnx_batch_2_over_float32"] == told.ratio
    for arguments, said in ((["--batch", "0"], "batch is 0"), (["--batch", "1", "1"], "allowed: each size once")):
        assert cli.main(["bench", "timed", "--dir", str(folder), *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bench_keeps_the_latencies_of_each_target(tmp_path, local, one_thread, monkeypatch):  # noqa: F811
    folder = tmp_path / "runs"
    api.search(f"{write_task(tmp_path)}:task", trials=2, workers=1, name="timed", dir=folder, finetune_epochs=0.5)
    monkeypatch.setattr(latency, "measure", partial(latency.measure, turns=2, seconds=0.001))
    monkeypatch.setattr(latency, "peak_bytes", lambda file, *_: 4_000_000 + ("float32" in file.name))
    for more in ([], ["--target", "onnx-int8"]):
        assert cli.main(["bench", "timed", "--dir", str(folder), "--batch", "2", *more]) == 0
    told = api.open_study("timed", dir=folder).record.front[0].latencies
    assert {latency.target for latency in told} == {"onnx", "onnx-int8"}


def test_later_latencies_replace_those_of_the_same_key(tmp_path, local, one_thread):  # noqa: F811
    folder = tmp_path / "runs"
    api.search(f"{write_task(tmp_path)}:task", trials=1, workers=1, name="timed", dir=folder, finetune_epochs=0.5)
    store = StudyStore.open(Records.find(folder).file("timed"))
    store.note_latencies({0: [ONE, replace(ONE, batch=32)]})
    store.note_latencies({0: [replace(ONE, median=7.0)]})
    (trial,) = StudyStore.open(Records.find(folder).file("timed")).record().trials
    assert trial.latencies == (replace(ONE, median=7.0), replace(ONE, batch=32))


def test_the_table_has_a_dash_where_nothing_was_measured(tmp_path, local, one_thread):  # noqa: F811
    from rich.console import Console

    path = write_task(tmp_path)
    record = api.search(
        f"{path}:task", trials=4, workers=1, name="some", dir=tmp_path / "r", finetune_epochs=0.5
    ).record
    first, *_ = record.front
    other = replace(ONE, batch=8, threads=2, memory_bytes=2_500_000, macs=12_300_000)
    trials = [
        replace(trial, latencies=(ONE, other) if trial.number == first.number else (ONE,)) for trial in record.trials
    ]
    console = Console(width=200, record=True)
    console.print(report.latency_table(replace(record, trials=tuple(trials))))
    text = console.export_text()
    assert "onnx, batch 8, 2 threads" in text
    assert "1.23 KB  2 ms +- 8 %  0.50x" in text
    assert "0.50x  2.50 MB memory" in text
    assert "12.3 M" in text
    assert (" - " in text) == (len(record.front) > 1)


@pytest.mark.parametrize("fmt", ["onnx", "torch", "archive"])
def test_a_manifest_tells_the_time_in_the_runtime_of_its_format(wide, tmp_path, fmt, monkeypatch):
    bench = Workbench(wide, "cpu")
    plan = Plan({spec.name: LayerPlan(rank=16 if spec.name != "4" else None) for spec in bench.layers}, Recipe(0.0))
    *_, outcome = run_trial(bench, plan, Budget((0.0,)))
    (tmp_path / "trial.acz").write_bytes(outcome.artifact)
    monkeypatch.setattr(latency, "in_turns", partial(in_turns, seconds=0.002))
    before = torch.get_num_threads()
    told = export(tmp_path / "trial.acz", wide, fmt, tmp_path / "out", {}, batch=3)["verification"]["latency"]
    assert torch.get_num_threads() == before
    assert (told["batch"], told["threads"]) == (3, 1)
    low, high = told["quartiles"]
    assert 0 < low <= told["seconds"] <= high
    assert told["ratio"] < 0.8
    assert told["ratio"] == pytest.approx(told["seconds"] / told["float32_seconds"], rel=0.7)


def test_what_a_runtime_raises_is_one_line(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no zip")
    with pytest.raises(ExportError, match=r"the exported model.pt2 does not run: "):
        latency._in_runtime("torch", tmp_path / "model.pt2", False, 1)
