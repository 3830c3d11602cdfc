"""Exports: small weights are exact, files run without us, manifests tell the truth, failures leave nothing."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.codec import header
from autocompress.codec.tensors import Coded
from autocompress.compress import tracing
from autocompress.compress.artifact import load, read
from autocompress.deploy import onnx as deploy_onnx
from autocompress.deploy import slim, torch_export, verify
from autocompress.deploy.export import export
from autocompress.deploy.files import write_file
from autocompress.deploy.recorder import Recorder
from autocompress.deploy.sessions import session_of
from autocompress.errors import ArtifactError, ExportError, UsageError
from autocompress.plan import LayerPlan, Plan
from autocompress.tasks.task import Task
from autocompress.tasks.wording import without_paths
from autocompress.trial import Budget, Workbench, run_trial

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

FACTS = {"study": "s", "trial": 3, "baseline": {"size_bytes": 123456}, "recipe": {"epochs": 0.0}}


# ---------------------------------------------------------------------- the forms of weights


def loaded(model: "onnx.ModelProto", tmp: Path) -> "onnx.ModelProto":
    """The model as onnxruntime holds it after constant folding."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp / "loaded.onnx")


def folded(form: deploy_onnx.Form, shape: tuple[int, ...], tmp: Path) -> np.ndarray:
    """The tensor that is left of a form in onnxruntime; the graph around it adds one input."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*form.nodes, onnx.helper.make_node("Add", ["w", "x"], ["y"])],
        "form",
        [value("x", onnx.TensorProto.FLOAT, [*shape])],
        [value("y", onnx.TensorProto.FLOAT, [*shape])],
        [onnx.numpy_helper.from_array(array, name) for name, array in form.constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", deploy_onnx.OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    result = loaded(model, tmp).graph
    assert [node.op_type for node in result.node] == ["Add"]
    assert len(result.initializer) == 1
    return onnx.numpy_helper.to_array(result.initializer[0])


def few_values(shape, levels, zeros, seed=0):
    """An array of `levels` values (and zero), a share `zeros` of it zero."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=levels).astype(np.float32)
    return np.where(rng.random(shape) < zeros, np.float32(0), table[rng.integers(0, levels, shape)])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    levels=st.sampled_from([1, 2, 3, 5, 15, 16, 17, 255, 256, 300, 5000]),
    zeros=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_form_is_folded_to_the_same_bits(tmp_path_factory, shape, levels, zeros, seed):
    values = few_values(tuple(shape), levels, zeros, seed)
    forms = [deploy_onnx.smallest_form("w", values), *deploy_onnx._vector_forms("w", values)]
    forms.append(deploy_onnx._sparse("w", values))
    full = np.random.default_rng(seed).random(shape[0]) < 0.5
    if len(shape) > 1 and 0 < full.sum() < len(full):
        forms.append(deploy_onnx._rows("w", values, full))
        columns = np.arange(values[0].size) % 2 == 0
        forms += [deploy_onnx._columns("w", values, columns)] if len(columns) > 1 else []
    tmp = tmp_path_factory.mktemp("form")
    for form in forms:
        assert folded(form, values.shape, tmp).tobytes() == values.tobytes(), form.kind


@pytest.mark.parametrize(
    ("levels", "bits"), [(2, 1), (3, 1.6), (4, 2), (5, 32 / 13), (16, 4), (17, 32 / 7), (256, 8), (1000, 32 / 3)]
)
def test_dense_codes_take_the_bits_of_their_base(levels, bits, tmp_path):
    rng = np.random.default_rng(1)
    values = rng.permutation(np.arange(65536) % levels).reshape(256, 256).astype(np.float32) + np.float32(0.1)
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind == "dense"
    payload = 65536 * bits / 8 + 4 * levels
    assert payload <= form.size_bytes <= payload + 700
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


@pytest.mark.parametrize(("zeros", "most_bits"), [(0.8, 1.8), (0.9, 1.0), (0.98, 0.3)])
def test_sparse_codes_come_close_to_their_entropy(zeros, most_bits, tmp_path):
    values = few_values((512, 512), 15, zeros)
    form = deploy_onnx.smallest_form("w", values)
    kept = 1 - zeros
    entropy = -zeros * math.log2(zeros) - kept * math.log2(kept) + kept * math.log2(15)
    assert form.kind == "sparse, dense"
    assert entropy < 8 * form.size_bytes / values.size < most_bits
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


def entropy_of(shares):
    return -sum(p * math.log2(p) for p in shares if p)


def test_full_rows_and_columns_have_forms_of_their_own(tmp_path):
    """As a layer trained under a price becomes: few units read everything, the others what is always on."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random((600, 800)) < 0.01, np.float32(0.1), np.float32(0))
    rows, columns = rng.permutation(600)[:60], rng.permutation(800)[:12]
    values[:, columns] = rng.choice(np.float32([-0.1, 0.1]), (600, 12))
    values[rows] = rng.choice(np.float32([-0.1, 0.1]), (60, 800))
    values[rows[0], :60] = rng.choice(np.float32([-0.2, 0.2, 0.3, 0]), 60)
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind.startswith("rows, mostly")
    ideal = 60 * 800 + 540 * 12 + 60 * (2 + math.log2(800)) + 540 * 788 * entropy_of([0.01, 0.99])
    assert ideal / 8 < form.size_bytes < 1.15 * ideal / 8 + 6000
    assert form.size_bytes < 0.5 * deploy_onnx._sparse("w", values).size_bytes
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()
    turned = deploy_onnx.smallest_form("w", values.T.reshape(800, 30, 20))
    assert turned.size_bytes < 1.2 * form.size_bytes
    form = deploy_onnx._columns("w", values.T.reshape(800, 30, 20), np.isin(np.arange(600), rows))
    assert form.kind.startswith("columns, mostly")
    assert folded(form, (800, 30, 20), tmp_path).tobytes() == values.T.tobytes()


@pytest.mark.parametrize("often", [2, 3])
def test_rare_values_are_scattered_over_frequent_ones(often, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.choice(np.float32([-0.1, 0.1, 0.2][:often]), (200, 300))
    values[rng.random(values.shape) < 0.01] = np.nan
    values[rng.random(values.shape) < 0.002] = -0.0
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind.startswith("mostly")
    bits = values.size * (math.log2(often) + entropy_of([0.012, 0.988]) + 0.012)
    assert bits / 8 < form.size_bytes < 1.1 * bits / 8 + 2000
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


def test_special_values_keep_their_bits(tmp_path):
    values = np.zeros(4000, np.float32)
    values[[0, 1999, 3999]] = [-0.0, np.nan, np.inf]
    values[77] = 1e-42  # denormal
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind.startswith("sparse")
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision_values_take_two_bytes(kind, dtype, tmp_path):
    scale = 1e-20 if kind == "bfloat16" else 1.0  # float16 has no such exponent
    values = (scale * torch.randn(100, 90, generator=torch.Generator().manual_seed(0))).to(dtype).float().numpy()
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind == kind
    assert form.size_bytes < 2 * values.size + 100
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


def test_sparse_float_values_are_not_stored_densely(tmp_path):
    rng = np.random.default_rng(0)
    values = np.where(rng.random((300, 200)) < 0.9, 0, rng.normal(size=(300, 200))).astype(np.float32)
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind == "sparse, plain"
    assert form.size_bytes < 0.13 * values.nbytes
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


def test_dense_floats_and_tiny_tensors_stay_plain():
    rng = np.random.default_rng(0)
    assert deploy_onnx.smallest_form("w", rng.normal(size=(50, 50)).astype(np.float32)).kind == "plain"
    assert deploy_onnx.smallest_form("w", np.zeros((2, 2), np.float32)).kind == "plain"
    assert deploy_onnx.smallest_form("w", np.zeros((0, 3), np.float32)).kind == "plain"


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1])
def test_a_tensor_of_one_value_is_a_constant(value, tmp_path):
    values = np.full((64, 3), value, np.float32)
    form = deploy_onnx.smallest_form("w", values)
    assert form.kind == "constant"
    assert form.size_bytes < 100
    assert folded(form, values.shape, tmp_path).tobytes() == values.tobytes()


# ---------------------------------------------------------------------- models


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.deep = nn.Conv2d(24, 32, 3, groups=2)
        self.head = nn.Linear(32 * 9, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        x = F.max_pool2d(F.relu(self.deep(F.pad(x, (1, 1, 1, 1)))), 2)
        return self.head(x.flatten(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(12, 32), nn.Linear(5, 32), nn.Linear(32, 3)

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(a)) * torch.sigmoid(self.right(b)))


class Regression(nn.Module):
    """Custom forward: a residual block, a weight used twice, a matrix product of 3-D inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(6, 48), nn.Linear(48, 48), nn.Linear(48, 1)

    def forward(self, x):
        hidden = F.gelu(self.up(x))
        hidden = hidden + self.mix(F.gelu(self.mix(hidden)))
        return self.down(hidden).mean(dim=1)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def rmse(outputs, targets):
    return float(((outputs - targets) ** 2).mean().sqrt())


class Pairs(torch.utils.data.Dataset):
    """Inputs of several tensors, as tuples or as mappings."""

    def __init__(self, inputs, targets, names=None):
        self.inputs, self.targets, self.names = inputs, targets, names

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        row = tuple(part[index] for part in self.inputs)
        return (dict(zip(self.names, row, strict=True)) if self.names else row), self.targets[index]


def test_inputs_are_named_in_the_order_of_the_signature(tmp_path):
    class Two(nn.Module):
        def forward(self, left, right):
            return left - right

    found = Recorder(Two(), tmp_path).named({"right": torch.ones(2, 1), "left": torch.zeros(2, 1)})
    assert list(found) == ["left", "right"]
    assert found["right"].all()


def make_task(model, inputs, *, names=None, metric=accuracy, example_inputs=None):
    """The task of a model on random inputs; the targets are what the model says, with noise."""
    model = model.eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        outputs = model(*inputs)
    noisy = outputs + 0.3 * outputs.std() * torch.randn_like(outputs)
    targets = noisy.argmax(1) if metric is accuracy else noisy
    data = (inputs[0], targets) if len(inputs) == 1 else Pairs(inputs, targets, names)
    loss = F.cross_entropy if metric is accuracy else F.mse_loss
    direction = "maximize" if metric is accuracy else "minimize"
    return Task(model, data, data, data, loss, metric, direction, example_inputs=example_inputs)


def compressed(task, layer, folder):
    """A real artifact: every layer under `layer`, no finetuning."""
    bench = Workbench(task, "cpu")
    plan = Plan({spec.name: layer if spec.factorable else replace(layer, rank=None) for spec in bench.layers})
    (outcome,) = run_trial(bench, plan, Budget((0.0,)))
    path = folder / "trial.acz"
    path.write_bytes(outcome.artifact)
    return path


SMALL = LayerPlan(bits=4, threshold=1.2)


def numpy_inputs(task, count):
    """The first test inputs, for a session of one or several inputs in order."""
    if isinstance(task.test, tuple):
        return [task.test[0][:count]]
    return [part[:count] for part in task.test.inputs]


def check_against_torch(task, artifact, file):
    """onnxruntime alone gives what the decoded module gives, at batch 1, 5 and 64."""
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = getattr(task.test, "names", None) or [value.name for value in session.get_inputs()]
    assert {value.name for value in session.get_inputs()} == set(names)
    assert all(value.shape[0] == "batch" for value in (*session.get_inputs(), *session.get_outputs()))
    module = load(artifact, model=task.model)
    for count in (1, 5, 64):
        inputs = numpy_inputs(task, count)
        (found,) = session.run(None, {name: part.numpy() for name, part in zip(names, inputs, strict=True)})
        with torch.no_grad():
            np.testing.assert_allclose(found, module(*inputs).numpy(), atol=1e-5, rtol=1e-5)


def check_weights(artifact, file, tmp):
    """Every weight with a form is folded by onnxruntime to the artifact's bits; the manifest names the forms."""
    manifest = json.loads((file.parent / "manifest.json").read_text())
    forms, cut = manifest["weight_forms"], manifest["cut"].get("layers", {})
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in loaded(onnx.load(file), tmp).graph.initializer]
    held = {part.tobytes() for array in arrays for part in (array, array.T)}
    coded = {name: tensor for name, tensor in read(artifact).tensors.items() if isinstance(tensor, Coded)}
    big = [name for name, tensor in coded.items() if tensor.symbols.size >= 1000]
    assert set(big) <= set(forms) | set(cut)
    shapes = [array.shape for array in arrays] + [array.shape[::-1] for array in arrays]
    for name in big:
        if name in cut:  # `test_slim` tells that what stays is what was there
            assert list(coded[name].values().shape) == cut[name][0]
            assert tuple(cut[name][1]) in shapes
        else:
            assert coded[name].values().tobytes() in held, name


@pytest.fixture(scope="session")
def smoke(session_folder):
    """One ONNX export, shared by all modules: task, artifact, folder, manifest."""
    return _smoke(session_folder / "smoke")


@cache
def _smoke(folder):
    folder.mkdir()
    torch.manual_seed(0)
    task = make_task(mlp(), (torch.randn(333, 1, 8, 8),))
    artifact = compressed(task, SMALL, folder)
    return task, artifact, folder / "out", export(artifact, task, "onnx", folder / "out", FACTS)


def test_mlp_in_onnx(smoke, tmp_path):
    task, artifact, out, _ = smoke
    check_against_torch(task, artifact, out / "model.onnx")
    check_weights(artifact, out / "model.onnx", tmp_path)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.onnx"]


def test_inner_names_are_short_and_say_nothing(smoke):
    graph = onnx.load(smoke[2] / "model.onnx").graph
    known = {"input", "output", *dict(load(smoke[1]).named_parameters())}
    names = {name for node in graph.node for name in (*node.input, *node.output) if name}
    assert {len(name) for name in names - known} <= {1, 2}
    assert {"1.weight", "input", "output"} <= names
    assert not any(a.name in {"alpha", "beta", "transA"} for node in graph.node for a in node.attribute)


@pytest.mark.parametrize(
    ("error", "said"), [(ExportError("no"), "no"), (KeyError("odd"), "its graph is not understood")]
)
def test_what_cannot_be_cut_is_exported_whole(tmp_path, monkeypatch, error, said):
    def fails(*_):
        raise error

    torch.manual_seed(0)
    task = make_task(mlp(), (torch.randn(20, 1, 8, 8),))
    artifact = compressed(task, SMALL, tmp_path)
    monkeypatch.setattr(slim, "slimmed", fails)
    manifest = export(artifact, task, "onnx", tmp_path / "out", FACTS)
    assert manifest["cut"]["dead_units"] == 0
    assert said in manifest["cut"]["because"]
    check_against_torch(task, artifact, tmp_path / "out" / "model.onnx")


def test_manifest_tells_the_truth(smoke):
    task, artifact, out, manifest = smoke
    assert manifest == json.loads((out / "manifest.json").read_text())
    data = (out / "model.onnx").read_bytes()
    assert manifest["size_bytes"] == len(data)
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["artifact"] == {
        "size_bytes": len(artifact.read_bytes()),
        "sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
    }
    assert manifest["recorded"] == FACTS
    assert manifest["float32_model_bytes"] == 123456
    timed = manifest["verification"]["latency"]
    assert timed["ratio"] == pytest.approx(timed["seconds"] / timed["float32_seconds"], rel=0.5)
    assert 0 < timed["quartiles"][0] <= timed["seconds"] <= timed["quartiles"][1] < 0.1
    cut = manifest["cut"]
    weights = sum(p.numel() for p in task.model.parameters()) - cut["dead_units"]  # a bias each
    weights -= sum(math.prod(before) - math.prod(after) for before, after in cut["layers"].values())
    assert cut["dead_units"] > 0
    assert 4 * weights < manifest["same_graph_float32_bytes"] < 4 * weights + 2000
    assert manifest["size_bytes"] < manifest["same_graph_float32_bytes"] / 4
    assert manifest["inputs"] == [{"name": "input", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "output", "shape": ["batch", 10], "dtype": "float32"}]
    checks = manifest["verification"]
    (outputs,) = ort.InferenceSession(out / "model.onnx").run(None, {"input": task.test[0].numpy()})
    right = np.mean(outputs.argmax(1) == task.test[1].numpy())
    assert checks["metric_exported"] == pytest.approx(right, abs=1e-6)
    with torch.no_grad():
        exact = load(artifact, model=task.model)(task.test[0])
    assert checks["metric_artifact"] == pytest.approx(accuracy(exact, task.test[1]), abs=1e-6)
    assert checks["metric"] == "accuracy"
    assert checks["max_abs_output"] == pytest.approx(exact.abs().max().item(), rel=1e-5)
    assert 0 < checks["max_abs_difference"] < 1e-5
    assert checks["examples"] == 333
    assert checks["batch_sizes"] == [1, 64, 77, 256]
    assert checks["runtime"] == f"onnxruntime {ort.__version__}"
    model = onnx.load_from_string(data)
    assert manifest["opset"] == model.opset_import[0].version
    assert manifest["ir_version"] == model.ir_version


def test_onnx_file_names_no_path_and_no_source(smoke):
    data = (smoke[2] / "model.onnx").read_bytes()
    for leak in (b".py", b"site-packages", str(Path.cwd()).encode(), b"torch.nn", b"stack_trace"):
        assert leak not in data


def test_onnx_verification_needs_neither_torch_nor_autocompress(smoke, tmp_path):
    task, _, out, _ = smoke
    verify.save_inputs(tmp_path, "one", {"input": task.test[0][:7].numpy()})
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['verify', 'onnx', {str(out / 'model.onnx')!r}, {str(tmp_path)!r}, 'positional']\n"
        "try:\n"
        f"    runpy.run_path({verify.__file__!r}, run_name='__main__')\n"
        "finally:\n"
        "    print({'torch', 'autocompress', 'onnx'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert verify.load_outputs(tmp_path, "one")[0].shape == (7, 10)


# ---------------------------------------------------------------------- what goes wrong


def damaged_onnx(smoke, change):
    """A writer that stores the smoke test's file after `change(model)`."""

    def write(module, inputs, keywords, outputs, path):
        model = onnx.load(smoke[2] / "model.onnx")
        change(model)
        path.write_bytes(model.SerializeToString())
        return {}

    return write


def double_a_table(model):
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1 and "." not in tensor.name:
            changed = 2 * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
            return
    raise AssertionError("no table to damage")


def fix_the_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 64


def name_an_unknown_operator(model):
    model.graph.node[-1].op_type = "Nonsense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_a_table, r"model.onnx does not compute what the artifact does: 'output' differs by \S+ at batch size"),
        (fix_the_batch, "model.onnx does not run: at batch size 1: .*Got invalid dimensions"),
        (name_an_unknown_operator, "model.onnx does not run: .*Nonsense"),
    ],
)
def test_a_failed_check_leaves_nothing_behind(smoke, monkeypatch, tmp_path, change, message):
    task, artifact, _, _ = smoke
    monkeypatch.setattr(deploy_onnx, "write", damaged_onnx(smoke, change))
    out = tmp_path / "a" / "b"
    with pytest.raises(ExportError, match=message) as caught:
        export(artifact, task, "onnx", out, FACTS)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    (out / "manifest.json").write_text("old")
    with pytest.raises(ExportError, match=message):
        export(artifact, task, "onnx", out, FACTS)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("manifest.json", "old")]


def test_a_metric_that_differs_is_refused(smoke, monkeypatch, tmp_path):
    task, artifact, _, _ = smoke
    monkeypatch.setattr(verify, "OUTPUT_TOLERANCE", 1e9)
    monkeypatch.setattr(deploy_onnx, "write", damaged_onnx(smoke, double_a_table))
    with pytest.raises(ExportError, match=r"model.onnx has a test accuracy of 0\.\d+, the artifact has 0\.\d+"):
        export(artifact, task, "onnx", tmp_path / "out", FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expected", "found", "agree"),
    [
        (0.98, 0.979, True),
        (0.98, 0.9785, False),
        (98.0, 97.95, True),
        (98.0, 97.8, False),
        (-5.0, -5.004, True),
        (-5.0, -5.006, False),
        (0.0, 0.0, True),
        (0.5, math.nan, False),
    ],
)
def test_metrics_agree_within_a_tenth_of_a_point(expected, found, agree):
    assert verify.metrics_agree(expected, found) is agree


def test_largest_difference_sees_shapes_and_nan():
    a = np.array([1.0, np.nan, np.inf], np.float32)
    assert verify.largest_difference(a, a) == 0
    assert verify.largest_difference(a, np.array([1.5, np.nan, np.inf], np.float32)) == 0.5
    assert verify.largest_difference(a, np.array([1.0, 2.0, np.inf], np.float32)) == np.inf
    assert verify.largest_difference(a, np.array([1.0, np.nan, -np.inf], np.float32)) == np.inf
    assert verify.largest_difference(a, a[:2]) == np.inf


def test_bad_calls_are_one_clear_line(smoke, tmp_path):
    task, artifact, _, _ = smoke
    with pytest.raises(UsageError, match="unknown export format 'tflite'; allowed: archive, onnx, onnx-int8, torch"):
        export(artifact, task, "tflite", tmp_path, FACTS)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExportError, match=f"cannot write to folder '{out}'"):
            export(artifact, task, "archive", out, FACTS)
    with pytest.raises(ExportError, match="cannot write to folder '/proc/autocompress'"):
        export(artifact, task, "archive", Path("/proc/autocompress"), FACTS)
    broken = tmp_path / "broken.acz"
    broken.write_bytes(artifact.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="truncated"):
        export(broken, task, "archive", tmp_path / "out", FACTS)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "broken.acz"}


@pytest.mark.parametrize("name", ["model.acz", "manifest.json"])
def test_a_folder_in_the_way_is_left_alone(name, smoke, tmp_path):
    task, artifact, _, _ = smoke
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=f"cannot write to folder '{tmp_path}': its {name} is a folder"):
        export(artifact, task, "archive", tmp_path, FACTS)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [name, f"{name}/notes.txt"]


def pair(folder):
    """A manifest, after it was compared with the file that it names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256((folder / manifest["file"]).read_bytes()).hexdigest()
    return manifest


def test_a_manifest_is_replaced_with_its_file(smoke, monkeypatch, tmp_path):
    """Of another export of ours first, then where the disk fails at each move."""
    task, artifact, _, _ = smoke
    other = compressed(task, LayerPlan(bits=3), tmp_path)
    out = tmp_path / "out"
    export(other, task, "archive", out, {"mine": 1})
    (out / "notes.txt").write_text("mine")
    real, moves = os.replace, []

    def fails(source, target):
        if Path(target).name == failing and Path(target).parent in (out, tmp_path / "new") and not moves:
            moves.append(target)
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    for failing in ("model.acz", "manifest.json"):  # noqa: B007
        moves.clear()
        with pytest.raises(ExportError, match="No space left on device"):
            export(artifact, task, "archive", out, {"mine": 2})
        assert pair(out)["recorded"] == {"mine": 1}
        assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.acz", "notes.txt"]
        moves.clear()
        with pytest.raises(ExportError, match="No space left on device"):
            export(artifact, task, "archive", tmp_path / "new", {"mine": 2})
        assert list((tmp_path / "new").iterdir()) == []
    export(artifact, task, "archive", out, {"mine": 2})
    assert pair(out)["recorded"] == {"mine": 2}
    assert (out / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------- archive


def test_archive_is_the_artifact(smoke, tmp_path):
    task, artifact, _, _ = smoke
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.acz").write_text("old")
    manifest = export(artifact, task, "archive", tmp_path, FACTS)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "model.acz", "manifest.json"}
    assert (tmp_path / "model.acz").read_bytes() == artifact.read_bytes()
    assert manifest["sha256"] == manifest["artifact"]["sha256"]
    assert manifest["verification"]["max_abs_difference"] == 0
    assert manifest["verification"]["metric_exported"] == manifest["verification"]["metric_artifact"]


@pytest.mark.parametrize("effort", ["fast", "max", "huffman"])
def test_an_archive_may_be_coded_anew(effort, smoke, tmp_path):
    task, artifact, _, _ = smoke
    manifest = export(artifact, task, "archive", tmp_path, FACTS, effort=effort)
    kinds = {entry.coder for entry in header.read((tmp_path / "model.acz").read_bytes()).entries}
    assert effort in kinds
    assert not kinds - {effort, "", "max" if effort == "max" else ""}
    assert manifest["size_bytes"] == (tmp_path / "model.acz").stat().st_size
    assert manifest["verification"]["max_abs_difference"] == 0
    with pytest.raises(UsageError, match="effort is 'most', allowed: auto, fast, max, huffman"):
        export(artifact, task, "archive", tmp_path, FACTS, effort="most")


def test_archive_that_computes_something_else_is_refused(smoke, monkeypatch, tmp_path):
    task, artifact, _, _ = smoke
    other = compressed(task, LayerPlan(bits=3), tmp_path)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: Path(target).write_bytes(other.read_bytes()))
    with pytest.raises(ExportError, match=r"model.acz does not compute what the artifact does"):
        export(artifact, task, "archive", tmp_path / "out", FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["trial.acz"]


# ---------------------------------------------------------------------- more models, through torch's exporters


CASES = {
    "conv": (lambda: make_task(ConvNet(), (torch.randn(90, 1, 12, 12),)), SMALL),
    "factorised": (lambda: make_task(mlp(), (torch.randn(90, 1, 8, 8),)), LayerPlan(rank=8, bits=3)),
    "factorised conv": (
        lambda: make_task(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten()), (torch.randn(90, 3, 6, 6),)),
        LayerPlan(rank=6, scheme="spatial", bits=2, quantizer="uniform"),
    ),
    "two inputs": (lambda: make_task(TwoInputs(), (torch.randn(90, 12), torch.randn(90, 5))), SMALL),
    "named inputs": (
        lambda: make_task(
            TwoInputs(),
            (torch.randn(90, 12), torch.randn(90, 5)),
            names=("a", "b"),
            example_inputs=(torch.randn(1, 12), torch.randn(1, 5)),
        ),
        SMALL,
    ),
    "regression": (lambda: make_task(Regression(), (torch.randn(90, 7, 6),), metric=rmse), LayerPlan(bits=5)),
    "bfloat16": (lambda: make_task(mlp(), (torch.randn(90, 1, 8, 8),)), LayerPlan(bits=16)),
    "bare layer": (lambda: make_task(nn.Linear(300, 4), (torch.randn(90, 300),)), SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_onnx_equals_torch(case, tmp_path):
    torch.manual_seed(1)
    make, layer = CASES[case]
    task = make()
    artifact = compressed(task, layer, tmp_path)
    manifest = export(artifact, task, "onnx", tmp_path / "out", FACTS)
    check_against_torch(task, artifact, tmp_path / "out" / "model.onnx")
    check_weights(artifact, tmp_path / "out" / "model.onnx", tmp_path)
    assert manifest["size_bytes"] < manifest["same_graph_float32_bytes"]
    if case == "bfloat16":
        assert set(manifest["weight_forms"].values()) <= {"float16", "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["conv", "factorised", "named inputs", "regression"])
def test_torch_export_equals_torch(case, tmp_path):
    torch.manual_seed(2)
    make, layer = CASES[case]
    task = make()
    artifact = compressed(task, layer, tmp_path)
    manifest = export(artifact, task, "torch", tmp_path / "out", FACTS)
    file = tmp_path / "out" / "model.pt2"
    program = torch.export.load(file).module()
    module = load(artifact, model=task.model)
    for count in (1, 5, 64):
        inputs = numpy_inputs(task, count)
        named = dict(zip(getattr(task.test, "names", None) or (), inputs, strict=False))
        with torch.no_grad():
            found = program(**named) if named else program(*inputs)
            torch.testing.assert_close(found, module(*inputs), atol=1e-5, rtol=1e-5)
    assert manifest["verification"]["fresh_process"] is True
    with zipfile.ZipFile(file) as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
        samples = [item.file_size for item in archive.infolist() if "sample_inputs" in item.filename]
    assert str(Path.cwd()).encode() not in held
    assert b"site-packages" not in held
    assert sum(samples) == 0  # no example of the user's data


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x).view(1, -1) if len(x) == 1 else self.fc(x.view(-1, 8)).view(2, -1)


@pytest.mark.slow
def test_a_model_that_torch_export_refuses_goes_through_the_tracer(tmp_path, capfd, monkeypatch):
    def refuses(*_):
        raise RuntimeError("not this one")

    torch.manual_seed(3)
    task = make_task(mlp(), (torch.randn(90, 1, 8, 8),))
    artifact = compressed(task, LayerPlan(bits=3), tmp_path)
    monkeypatch.setattr(deploy_onnx, "_by_torch_export", refuses)
    capfd.readouterr()
    export(artifact, task, "onnx", tmp_path / "out", FACTS)
    assert capfd.readouterr() == ("", "")
    check_against_torch(task, artifact, tmp_path / "out" / "model.onnx")
    check_weights(artifact, tmp_path / "out" / "model.onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["onnx", "torch"])
def test_a_fixed_batch_size_is_refused(fmt, tmp_path):
    torch.manual_seed(3)
    module = FixedBatch().eval()
    inputs = torch.randn(2, 8)
    write = partial(deploy_onnx.write, outputs=["output"]) if fmt == "onnx" else torch_export.write
    with pytest.raises(ExportError, match="FixedBatch cannot be exported") as caught:
        write(module, {"input": inputs}, False, path=tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Strides(nn.Module):
    """Its outputs tell the layout of its inputs, as the last bits of a convolution do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 4)

    def forward(self, x):
        return self.layer(x.flatten(1)) + (0 if x.is_contiguous() else 1e-6)


def test_a_file_is_compared_on_inputs_of_one_layout(tmp_path):
    task = make_task(Strides(), (torch.randn(30, 4, 4, 3).permute(0, 3, 1, 2),))
    artifact = compressed(task, LayerPlan(bits=6), tmp_path)
    assert export(artifact, task, "archive", tmp_path / "out", FACTS)["verification"]["max_abs_difference"] == 0


class Guarded(nn.Module):
    """Another answer for other inputs, which no example shows."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        scores = self.net(x)
        return scores if float(x.mean()) > -0.3 else torch.zeros_like(scores)


@pytest.mark.parametrize("fmt", ["onnx", "torch"])
def test_a_way_that_inputs_choose_is_not_kept_as_the_only_one(fmt, tmp_path):
    task = make_task(Guarded(), (torch.randn(40, 1, 8, 8),))
    artifact = compressed(task, LayerPlan(), tmp_path)
    with pytest.raises(ExportError, match="cannot be exported"):
        export(artifact, task, fmt, tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


def test_texts_of_a_manifest_name_no_folder():
    for text, told in (
        ("No such file: '/home/someone/data/a b.txt'", "No such file: 'a b.txt'"),
        ('File "/tmp/x.py", line 3', 'File "x.py", line 3'),
        ("C:\\Users\\me\\net.py is odd", "net.py is odd"),
        ("1/2 of the rows, a/b", "1/2 of the rows, a/b"),
    ):
        assert without_paths(text) == told


def test_formats_that_calibrate_need_a_task(smoke, tmp_path):
    task, artifact, _, _ = smoke
    recorder = Recorder(load(artifact, model=task.model), tmp_path)
    recorder.run("example", {"input": np.zeros((2, 1, 8, 8), np.float32)})
    with pytest.raises(ExportError, match="format onnx-int8 needs a task"):
        write_file("onnx-int8", artifact, recorder, tmp_path / "model.onnx")


def test_a_graph_that_int8_does_not_understand_is_one_line(smoke, tmp_path, monkeypatch):
    task, artifact, _, _ = smoke

    def surprised(*_):
        raise KeyError("/home/someone/net")

    monkeypatch.setattr("autocompress.deploy.int8.layers_of", surprised)
    with pytest.raises(ExportError, match="cannot be exported to ONNX in 8 bits: KeyError: 'net'"):
        export(artifact, task, "onnx-int8", tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


def test_a_session_that_fails_says_so(smoke):
    session = session_of(smoke[2] / "model.onnx")
    with pytest.raises(ExportError, match="onnxruntime does not run the graph"):
        session.run(None, {"input": np.zeros((2, 3), np.float32)})


class Branches(nn.Module):
    """Looks at its inputs' values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x * 2 if x.mean().item() > 0 else x)


def test_a_model_that_reads_values_is_told_so():
    x = {"x": torch.randn(4, 3)}
    said = r"reads values of tensors at test_deploy\.py:\d+ \(\.item\(\), .*: let it compute with tensors alone"
    with pytest.raises(ExportError, match=f"Branches cannot be exported by torch.export: its forward {said}"):
        tracing.exported(Branches().eval(), x, keywords=False)
    with pytest.raises(ExportError, match=f"Branches cannot be exported to ONNX: its forward {said}"):
        deploy_onnx._exported(Branches().eval(), x, False, ["y"], whole=False)
    assert tracing.reads_values(KeyError("net")) is None
