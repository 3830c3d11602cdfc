"""The deployment benchmark: work counted from graphs, and what it tells of a study."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from local_search import local, one_thread, write_task  # noqa: F401
from torch import nn

from autocompress import api
from autocompress.deploy import onnx as deploy_onnx
from autocompress.deploy.slim import slimmed
from autocompress.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    yield importlib.import_module("bench_deploy")
    sys.modules.pop("bench_deploy", None)


def graph_of(nodes, inputs, constants):
    """A model of these nodes; the last one's output is "y", of unknown shape."""
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    tensors = [onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in constants.items()]
    inputs = [value(name, kind, shape) for name, shape in inputs.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [value("y", kind, None)], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", deploy_onnx.OPSET)])


def test_macs_of_single_nodes(bench):
    node = onnx.helper.make_node
    conv = node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1], group=2)
    assert bench.macs(graph_of([conv], {"x": ["batch", 4, 9, 9]}, {"w": (6, 2, 3, 3)})) == 6 * 5 * 5 * 2 * 9
    gemm = node("Gemm", ["x", "w"], ["y"], transB=1)
    assert bench.macs(graph_of([gemm], {"x": ["batch", 7]}, {"w": (5, 7)})) == 35
    gemm = node("Gemm", ["w", "x"], ["y"], transA=1)
    assert bench.macs(graph_of([gemm], {"x": ["batch", 3]}, {"w": (1, 5)})) == 5 * 3
    product = node("MatMul", ["x", "z"], ["y"])
    assert bench.macs(graph_of([product], {"x": ["batch", 2, 3, 4], "z": ["batch", 2, 4, 5]}, {})) == 2 * 3 * 4 * 5
    assert bench.macs(graph_of([node("Relu", ["x"], ["y"])], {"x": ["batch", 2]}, {})) == 0


def test_a_shape_that_cannot_be_known_is_named(bench):
    gemm = onnx.helper.make_node("Gemm", ["x", "w"], ["y"])
    with pytest.raises(ExportError, match="the shape of 'x', at a Gemm, cannot be inferred"):
        bench.macs(graph_of([gemm], {"x": ["batch", "width"]}, {"w": (7, 5)}))


@pytest.mark.slow
def test_macs_of_an_export_are_those_of_the_cut(bench, tmp_path):
    """Weights as forms, a BatchNorm in its Conv, a reshape: against `slim`'s count from the graph of torch."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 20), nn.ReLU(), nn.Linear(20, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[5].weight.mul_(torch.rand_like(net[5].weight) < 0.1).sign_()
        net[7].weight[:, 5:] = 0
    inputs = {"input": torch.randn(2, 3, 8, 8)}
    small, cut = slimmed(net, inputs, False)
    deploy_onnx.write(net, inputs, False, ["output"], tmp_path / "whole.onnx")
    deploy_onnx.write(small, inputs, False, ["output"], tmp_path / "small.onnx")
    assert bench.macs(onnx.load(tmp_path / "whole.onnx")) == cut.of_macs == 8 * 64 * 27 + 128 * 20 + 20 * 4
    assert bench.macs(onnx.load(tmp_path / "small.onnx")) == cut.macs < cut.of_macs


def test_differences_are_parts_of_the_largest_output(bench):
    wanted = [np.array([[1.0, -4.0]]), np.array([2.0])]
    assert bench.difference(wanted, [np.array([1.0, -3.0]), np.array([2.5])]) == 0.25  # flat, as Node.js gives them
    assert bench.difference([np.zeros(2)], [np.zeros(2)]) == 0


def test_zeros_are_those_of_weights(bench):
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].bias[:] = 0
    assert bench.zeros(net) == pytest.approx(4 / 30)


@pytest.mark.slow
def test_a_study_is_told_as_json_and_as_tables(bench, tmp_path, local, one_thread, monkeypatch, capsys):  # noqa: F811
    folder = tmp_path / "runs"
    api.search(f"{write_task(tmp_path)}:task", trials=3, workers=1, name="waves", dir=folder, finetune_epochs=0.5)
    members = [trial.number for trial in api.open_study("waves", dir=folder).record.front]
    arguments = ["bench_deploy", "waves", "--dir", str(folder), "--turns", "2", "--batch", "2", "--sparsest", "1"]
    capsys.readouterr()
    monkeypatch.setattr(bench.latency, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", [*arguments, "--formats", "archive", "--json"])
    assert bench.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["trial"] for row in told["front"]] == members
    for row in told["front"]:
        assert row["limit_bytes"] == 2 * row["archive_bytes"] + 4096
        assert 0 < row["differences"]["onnxruntime"] < 1e-5
        assert row["archive_bytes"] < row["onnx_bytes"] < row["float32_bytes"] + 4096
        assert list(row["times"]) == ["2"]
    (file,) = told["formats"]
    assert file["format"] == "archive"
    assert file["difference"] == 0
    assert file["size_bytes"] in [row["archive_bytes"] for row in told["front"]]
    bench.print_exported([bench.Exported(**file)])
    (slim,) = told["dead_units"]
    assert slim["macs_whole"] == 8 * 24 + 24 * 16 + 16
    assert slim["difference"] < 1e-5
    rows = [bench.Member(**{k: v for k, v in row.items() if k != "limit_bytes"}) for row in told["front"]]
    bench.print_front([replace(row, times={2: 0.5}) for row in rows], [2])
    bench.print_slims([replace(bench.Slim(**slim), speeds={2: 1.5})], [2])
    printed = capsys.readouterr().out
    assert f"of {len(rows)} over the limit" in printed
    assert "592" in printed
    monkeypatch.setattr(sys, "argv", ["bench_deploy", "nowhere", "--dir", str(folder)])
    assert bench.main() == 1
    assert capsys.readouterr().err.startswith("bench_deploy: study 'nowhere' does not exist")
