"""`bench FILE`: inputs from a graph's own shapes, times, peak memory, MACs, and what is refused."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from local_search import write_task
from onnx import TensorProto, helper, numpy_helper, save

from autocompress import cli
from autocompress.deploy import file_times as timing
from autocompress.deploy import memory
from autocompress.deploy.macs import macs
from autocompress.deploy.made_up import fixed_batch, made_up
from autocompress.deploy.memory import peak_bytes
from autocompress.errors import ExportError, UsageError
from autocompress.file_bench import bench_file

FLOAT = TensorProto.FLOAT


def model(nodes, inputs, constants, kind=FLOAT):
    """A model of these nodes; inputs are (kind, shape) by name, the output "y" is of unknown shape."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def product(path, width, outputs=1, batch="batch"):
    """A file that multiplies (batch, width) by (width, outputs)."""
    weight = np.random.default_rng(0).standard_normal((width, outputs)).astype(np.float32)
    save(model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (FLOAT, [batch, width])}, {"w": weight}), path)
    return path


@pytest.fixture
def fast(monkeypatch):
    """Few turns, and no process for the memory."""
    monkeypatch.setattr(timing, "times_of_onnx", partial(timing.times_of_onnx, turns=2, seconds=0.0))
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 12345)


# ---------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Input:
    """As a session tells of one."""

    name: str
    type: str
    shape: tuple


def test_inputs_have_the_shapes_kinds_and_lengths_of_the_graph():
    inputs = [
        Input("x", "tensor(float)", ("batch", 3, "batch")),
        Input("half", "tensor(float16)", (None, 2)),
        Input("ids", "tensor(int64)", ("batch", "sequence")),
        Input("on", "tensor(bool)", (4, None)),
        Input("rate", "tensor(int32)", ()),
    ]
    made = made_up(inputs, 5, {"sequence": 7, "on.1": 2})
    again = made_up(inputs, 5, {"sequence": 7, "on.1": 2})
    assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
        "x": ("float32", (5, 3, 5)), "half": ("float16", (5, 2)), "ids": ("int64", (5, 7)), "on": ("bool", (4, 2)),
        "rate": ("int32", ()),
    }  # fmt: skip
    assert all(np.array_equal(array, again[name]) for name, array in made.items())
    assert set(made["ids"].flat) == {0, 1}
    for name in ("x", "half"):
        assert np.isfinite(made[name]).all()
        assert made[name].std() > 0.1


def test_inputs_that_cannot_be_made_up_are_named():
    ids = Input("ids", "tensor(int64)", ("batch", "sequence"))
    with pytest.raises(UsageError, match=r"input 'ids' has a free axis 'sequence': say how long it is with --dim seq"):
        made_up([ids], 1, {})
    with pytest.raises(ExportError, match=r"input 'text' is a tensor\(string\): no such input can be made up"):
        made_up([Input("text", "tensor(string)", ("batch",))], 1, {})
    with pytest.raises(UsageError, match="batch is 2, allowed: 4, which the file fixes"):
        made_up([Input("x", "tensor(float)", (4, 3))], 2, {})
    with pytest.raises(UsageError, match="dim is batch=3, but that axis is the batch: --batch says how long it is"):
        made_up([ids], 1, {"sequence": 2, "batch": 3})
    with pytest.raises(UsageError, match=r"input 'ids' has the shape \[4096, 65537\], allowed: up to 268435456 values"):
        made_up([ids], 4096, {"sequence": 65537})
    table = Input("table", "tensor(float)", ("rows", 3))
    assert {k: v.shape for k, v in made_up([ids, table], 2, {"sequence": 5, "rows": 4}).items()} == {
        "ids": (2, 5),
        "table": (4, 3),
    }
    assert fixed_batch([Input("x", "tensor(float)", (4, 3)), ids]) is None
    assert fixed_batch([Input("rate", "tensor(float)", ())]) is None


# ---------------------------------------------------------------------- memory and MACs


def test_memory_grows_by_what_a_call_holds(tmp_path):
    """An output of 4 MB an example, and perhaps a copy of it."""
    file = product(tmp_path / "wide.onnx", 1, 1_000_000)
    held = {}
    for batch in (1, 17):
        np.savez(tmp_path / "in.npz", **{"arg.x": np.ones((batch, 1), np.float32), "arg.other": np.ones(1)})
        held[batch] = peak_bytes(file, tmp_path / "in.npz")
    assert 0.9 * 64e6 < held[17] - held[1] < 2.2 * 64e6


def test_what_was_held_before_does_not_count(tmp_path, capsys):
    np.savez(tmp_path / "in.npz", **{"arg.x": np.ones((17, 1), np.float32)})
    file = product(tmp_path / "wide.onnx", 1, 1_000_000)
    assert np.ones(40_000_000).sum() == 4e7  # 320 MB that are gone again
    assert memory.main([str(file), str(tmp_path / "in.npz"), "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found < 2.2 * 68e6
    assert found > 0.9 * 68e6 or not can_forget()  # else an older peak hides it


def can_forget():
    """Whether the system lets a process forget its peak: Linux does, some containers do not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def test_a_file_that_does_not_run_there_is_one_line(tmp_path):
    np.savez(tmp_path / "in.npz", **{"arg.x": np.ones((1, 2), np.float32)})
    with pytest.raises(ExportError, match=r"wide.onnx does not run in a process of its own: .*index: 1 Got: 2 Exp"):
        peak_bytes(product(tmp_path / "wide.onnx", 3), tmp_path / "in.npz")


def test_a_system_that_tells_no_peak(monkeypatch, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", **{"arg.x": np.ones((1, 3), np.float32)})
    monkeypatch.setattr(memory, "_held_most", lambda: None)
    monkeypatch.setattr(memory, "_forget", lambda: None)
    assert memory.main([str(product(tmp_path / "a.onnx", 3)), str(tmp_path / "in.npz"), "1"]) == 0
    assert json.loads(capsys.readouterr().out) is None


def test_macs_of_products_of_whole_numbers_and_of_free_lengths():
    node, eight, whole = helper.make_node, TensorProto.UINT8, TensorProto.INT32
    w = np.zeros((7, 5), np.uint8)
    assert macs(model([node("MatMulInteger", ["x", "w"], ["y"])], {"x": (eight, ["batch", 7])}, {"w": w}, whole)) == 35
    kernel = np.zeros((6, 2, 3, 3), np.uint8)
    conv = node("ConvInteger", ["x", "w"], ["y"])
    assert macs(model([conv], {"x": (eight, ["n", 2, 5, 5])}, {"w": kernel}, whole)) == 6 * 3 * 3 * 2 * 9
    scales = {name: np.ones((), np.float32) for name in ("s1", "s2", "s3")}
    zeros = {name: np.zeros((), np.uint8) for name in ("z1", "z2", "z3")}
    linear = node("QLinearMatMul", ["x", "s1", "z1", "w", "s2", "z2", "s3", "z3"], ["y"])
    assert macs(model([linear], {"x": (eight, ["batch", 7])}, {"w": w, **scales, **zeros}, eight)) == 35
    long = model([node("MatMul", ["x", "w"], ["y"])], {"x": (FLOAT, ["batch", "time", 7])}, {"w": w.astype(np.float32)})
    assert macs(long, {"time": 4}) == 4 * 35
    with pytest.raises(ExportError, match="the shape of 'x', at a MatMul, cannot be inferred"):
        macs(long)
    with pytest.raises(ExportError, match="the multiply-accumulates of a Einsum are not known"):
        macs(model([node("Einsum", ["x"], ["y"], equation="ij->i")], {"x": (FLOAT, ["batch", 7])}, {}))


# ---------------------------------------------------------------------- times


def test_a_file_beside_a_larger_one(tmp_path):
    file, other = product(tmp_path / "a.onnx", 64, 64), product(tmp_path / "b.onnx", 1024, 2048)
    found = timing.times_of_onnx(file, baseline=other, batches=(4,), turns=4, seconds=0.002)
    assert (found.file, found.baseline) == (str(file), str(other))
    assert (found.size_bytes, found.macs) == (file.stat().st_size, 64 * 64)
    (one,) = found.times
    assert one.low <= one.median <= one.high
    assert one.ratio < 0.5
    assert one.ratio == pytest.approx(one.median / one.baseline, rel=0.9)
    assert one.baseline_memory_bytes > 4 * 1024 * 2048
    assert one.baseline_memory_bytes > one.memory_bytes + 2e6
    (alone,) = timing.times_of_onnx(file, batches=(1,), turns=2, seconds=0.0).times
    assert alone.ratio is alone.baseline is alone.baseline_memory_bytes is None


def test_files_beside_a_model_count(tmp_path):
    file = tmp_path / "m.onnx"
    node, weight = helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((300, 5), np.float32)
    made = model([node], {"x": (FLOAT, ["batch", 300])}, {"w": weight})
    save(made, file, save_as_external_data=True, location="m.data", size_threshold=0)
    found = timing.times_of_onnx(file, batches=(1,), turns=2, seconds=0.0)
    assert found.size_bytes == file.stat().st_size + (tmp_path / "m.data").stat().st_size > 6000
    assert found.macs == 1500


def test_the_one_batch_size_of_a_file_is_taken(fast, tmp_path):
    file = product(tmp_path / "a.onnx", 8, batch=3)
    assert [one.batch for one in timing.times_of_onnx(file).times] == [3]
    with pytest.raises(UsageError, match="batch is 1, allowed: 3, which the file fixes"):
        timing.times_of_onnx(file, batches=(1, 3))
    assert [one.batch for one in timing.times_of_onnx(product(tmp_path / "b.onnx", 8)).times] == [1, 32]


# ---------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_json(fast, tmp_path, capsys):
    file, other = product(tmp_path / "a.onnx", 30, 40), product(tmp_path / "b.onnx", 30, 50)
    assert cli.main(["bench", str(file), "--baseline", str(other), "--batch", "2"]) == 0
    told = capsys.readouterr().out
    assert f"{file}: 4.88 KB" in told
    assert "1.20 K MACs an example, 1 thread" in told
    assert "12.3 KB" in told
    assert f"its: of {other}, in turns" in told
    assert cli.main(["bench", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["batch"] for one in told["times"]] == [1, 32]
    assert (told["macs"], told["baseline"], told["times"][0]["memory_bytes"]) == (1200, None, 12345)


def test_a_file_wins_over_a_study_of_its_name(fast, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waves").write_text("no model")
    assert cli.main(["bench", "waves", "--dir", str(tmp_path / "runs")]) == 2
    assert "'waves' is neither an archive nor a file that ends in .onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.onnx"], "file 'none.onnx' does not exist"),
        (["none.acz"], "file 'none.acz' does not exist"),
        (["a.onnx", "--baseline", "none.onnx"], "file 'none.onnx' of --baseline does not exist"),
        (["a.onnx", "--task", "digits"], "--task is 'digits', but 'a.onnx' is no archive"),
        (["a.onnx", "--target", "onnx"], "--target is 'onnx', but 'a.onnx' is no archive"),
        (["a.onnx", "--dim", "x"], "'x' is not NAME=N"),
        (["a.onnx", "--dim", "x=0"], "'x=0' is not NAME=N"),
        (["a.onnx", "--dim", "sequence=2"], "dim is sequence=2, allowed: the free axes batch"),
        (["a.onnx", "--dim", "batch=2"], "dim is batch=2, but that axis is the batch"),
        (["a.onnx", "--threads", "0"], "threads is 0, allowed: 1 to 1024"),
        (["a.onnx", "--batch", "1", "1"], "allowed: each size once"),
        (["b.acz"], "'b.acz' is an archive: say with --task what makes its model"),
        (["b.acz", "--task", "t", "--dim", "x=2"], "--dim is x=2, but 'b.acz' is an archive"),
        (["b.acz", "--task", "t", "--baseline", "a.onnx"], "--baseline is 'a.onnx', but 'b.acz' is an archive"),
        (["b.acz", "--task", "t", "--batch", "0"], "batch is 0, allowed: 1 to 65536"),
        (["study", "--baseline", "a.onnx"], "--baseline is for a file; a study knows its own"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    product("a.onnx", 3)
    (tmp_path / "b.acz").write_bytes(b"ACZ3 and more")
    try:
        code = cli.main(["bench", *words, "--dir", str(tmp_path / "runs")])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    assert cli.main(["bench", str(tmp_path / "a.onnx")]) == 1
    assert "onnxruntime does not load a.onnx" in capsys.readouterr().err


@pytest.mark.slow
def test_an_archive_is_timed_beside_its_float32_model(tmp_path, capsys):
    from autocompress.plan import LayerPlan, Plan, Recipe
    from autocompress.tasks.loading import load_task
    from autocompress.trial import Budget, Workbench, run_trial

    spec = f"{write_task(tmp_path)}:task"
    bench = Workbench(load_task(spec), "cpu")
    plan = Plan({layer.name: LayerPlan(bits=4, threshold=1.0) for layer in bench.layers}, Recipe(0.0, 1e-3, 0.0))
    *_, outcome = run_trial(bench, plan, Budget((0.0,)))
    file = tmp_path / "model.acz"
    file.write_bytes(outcome.artifact)
    assert cli.main(["bench", str(file), "--task", spec, "--json", "--batch", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    (one,) = told["times"]
    assert 0 < told["macs"] <= sum(layer.macs for layer in bench.layers)
    assert told["size_bytes"] > len(outcome.artifact)
    assert one["ratio"] > 0
    assert one["memory_bytes"] > 0
    found = bench_file(file, task=spec, batches=(2,))
    assert (found.archive, found.baseline, found.times[0].batch) == (True, "the float32 model", 2)
