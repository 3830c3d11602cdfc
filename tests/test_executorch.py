"""ExecuTorch programs: what they compute, at which batch sizes, int8 by its metric, and the missing package."""

import importlib.util
import json
import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_deploy import FACTS, SMALL, ConvNet, Pairs, TwoInputs, compressed, make_task, mlp, smoke  # noqa: F401
from torch import nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from autocompress.compress.artifact import load
from autocompress.deploy import executorch, latency, verify
from autocompress.deploy import export as deploy_export
from autocompress.deploy.calibration import training_inputs
from autocompress.deploy.export import _in_parts, export
from autocompress.errors import ExportError
from autocompress.plan import LayerPlan

FORMATS = ["executorch", "executorch-int8"]
HERE = importlib.util.find_spec("executorch") is not None or "CI" in os.environ  # `.ci/run` installs the extra
WITHOUT = "an optional package of 240 MB, pip install 'autocompress[executorch]'; under CI it must be there"


def runs(test):
    """Marks a test that lowers a model: seconds each, where the extra is installed."""
    return pytest.mark.slow(pytest.mark.skipif(not HERE, reason=WITHOUT)(test))


# without the package


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_missing_package_is_one_line_that_names_the_extra(smoke, tmp_path, monkeypatch, fmt):  # noqa: F811
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ExportError) as caught:
        export(smoke[1], smoke[0], fmt, tmp_path / "out", FACTS)
    assert str(caught.value) == f"format {fmt} needs the package executorch: pip install 'autocompress[executorch]'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("cause", "fixed"), [(ConstraintViolationError("batch"), True), (OSError("full"), False)])
def test_only_a_batch_that_the_code_fixes_gives_a_program_for_one_example(cause, fixed, monkeypatch, tmp_path):
    tried = []

    def program(module, inputs, keywords, largest, calibration):
        tried.append(largest)
        if largest == 1:
            return b"program"
        try:
            raise RuntimeError("constraints") from cause
        except RuntimeError as error:
            raise ExportError("cannot be lowered") from error

    monkeypatch.setattr(executorch, "require", lambda fmt: None)
    monkeypatch.setattr(executorch, "_program", program)
    call = partial(executorch.write, "executorch", nn.Linear(2, 2), {}, False, tmp_path / "model.pte")
    if fixed:
        assert call() == {"batch": {"fixed": 1, "because": "cannot be lowered"}}
        assert (tmp_path / "model.pte").read_bytes() == b"program"
    else:
        with pytest.raises(ExportError, match="cannot be lowered"):
            call()
    assert tried == [executorch.MAX_BATCH, 1][: 1 + fixed]


def numbered_task(count, **more):
    """A task whose training inputs are 0, 1, 2, ..., and whose test set may not be looked at."""
    x = torch.arange(count, dtype=torch.float32)[:, None]
    task = make_task(nn.Linear(1, 3), (x,))
    return replace(task, test=None, val=None, batch_size=32, **more)


def test_calibration_is_a_sample_of_the_training_data_and_always_the_same():
    task = numbered_task(1000)
    found, again = (training_inputs(task, ["x"], count=100) for _ in range(2))
    drawn = torch.cat([batch["x"] for batch in found])
    assert [len(batch["x"]) for batch in found] == [32, 32, 32, 4]
    assert torch.equal(drawn, torch.cat([batch["x"] for batch in again]))
    assert len(set(drawn.flatten().tolist())) == 100
    assert drawn.min() < 100
    assert drawn.max() >= 900


def test_calibration_takes_what_there_is_and_keeps_names():
    few = numbered_task(20)
    assert sum(len(batch["x"]) for batch in training_inputs(few, ["x"])) == 20
    a, b = torch.arange(8.0)[:, None], -torch.arange(8.0)[:, None]
    for names in (None, ("b", "a")):
        pairs = Pairs((a, b) if names is None else (b, a), torch.zeros(8), names)
        (found,) = training_inputs(replace(few, train=pairs), ["a", "b"])
        assert list(found) == ["a", "b"]
        assert torch.equal(found["a"], -found["b"])
        assert found["a"].min() >= 0
    with pytest.raises(ExportError, match="no training example to calibrate int8 with"):
        training_inputs(replace(few, train=(torch.zeros(0, 1), torch.zeros(0))), ["x"])


@pytest.mark.parametrize(
    ("expected", "found", "direction", "holds"),
    [
        (0.98, 0.970, "maximize", True),
        (0.98, 0.969, "maximize", False),
        (0.98, 1.0, "maximize", True),
        (98.0, 97.03, "maximize", True),
        (98.0, 97.0, "maximize", False),
        (0.50, 0.505, "minimize", True),
        (0.50, 0.506, "minimize", False),
        (0.50, 0.1, "minimize", True),
        (-5.0, -5.06, "maximize", False),
        (0.0, 0.0, "minimize", True),
        (0.5, math.nan, "maximize", False),
    ],
)
def test_a_quantized_metric_may_lose_a_point(expected, found, direction, holds):
    assert verify.quantized_metric_holds(expected, found, direction) is holds


def test_calls_in_parts():
    assert _in_parts([1, 44, 64, 256], {"max": 64}) == [1, 44, 64]
    assert _in_parts([77, 256], {"max": 64}) == [13, 64]
    assert _in_parts([1, 77], {"fixed": 1, "because": ""}) == [1]


@pytest.fixture
def stand_in(monkeypatch):
    """Programs that give the artifact's outputs and noise of so many standard deviations."""

    def install(noise):
        def run(fmt, task, recorder, file):
            generator = np.random.default_rng(0)

            def call(inputs):
                outputs = recorder.module(*map(torch.from_numpy, inputs.values())).detach().numpy()
                return [(outputs + noise * outputs.std() * generator.normal(size=outputs.shape)).astype(np.float32)]

            verify.run_calls(recorder.folder, call)
            return "stand-in"

        def write(fmt, module, inputs, keywords, path, *, calibration):
            assert sum(len(batch["input"]) for batch in calibration) == (333 if fmt.endswith("int8") else 0)
            path.write_bytes(b"program")
            return {"batch": {"max": 64}}

        monkeypatch.setattr(executorch, "write", write)
        monkeypatch.setattr(deploy_export, "_run", run)
        monkeypatch.setattr(latency, "_in_runtime", lambda *_: lambda inputs: lambda: None)

    return install


def test_int8_is_held_to_its_metric_float32_to_its_outputs(smoke, stand_in, tmp_path):  # noqa: F811
    task, artifact, _, _ = smoke
    stand_in(0.01)
    with pytest.raises(ExportError, match=r"model.pte does not compute what the artifact does: 'output' differs"):
        export(artifact, task, "executorch", tmp_path / "out", FACTS)
    assert list(tmp_path.iterdir()) == []
    checks = export(artifact, task, "executorch-int8", tmp_path / "out", FACTS)["verification"]
    assert checks == json.loads((tmp_path / "out" / "manifest.json").read_text())["verification"]
    assert checks["metric_difference"] == checks["metric_exported"] - checks["metric_artifact"]
    assert abs(checks["metric_difference"]) <= 0.01
    assert checks["max_abs_difference"] > verify.OUTPUT_TOLERANCE * checks["max_abs_output"]
    assert checks["batch_sizes"] == [1, 13, 64]
    assert checks["latency"]["threads"] is None  # the runtime takes what it likes
    assert checks["latency"]["float32_seconds"] > 0


@pytest.mark.parametrize(("noise", "words"), [(3.0, "has a test accuracy of 0"), (math.nan, "does not compute")])
def test_int8_that_loses_more_than_a_point_leaves_nothing(smoke, stand_in, tmp_path, noise, words):  # noqa: F811
    stand_in(noise)
    with pytest.raises(ExportError, match=rf"model.int8.pte {words}"):
        export(smoke[1], smoke[0], "executorch-int8", tmp_path / "out", FACTS)
    assert list(tmp_path.iterdir()) == []


# with it


def execute(file, *inputs):
    """What ExecuTorch's own runtime gives for one call."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(file))
    return program.load_method("forward").execute(list(inputs))[0].clone()


def check_against_torch(task, artifact, file, inputs, counts=(1, 2, 5, 64)):
    module = load(artifact, model=task.model)
    for count in counts:
        some = [part[:count].contiguous() for part in inputs]
        with torch.no_grad():
            np.testing.assert_allclose(execute(file, *some).numpy(), module(*some).numpy(), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    """A conv net's task, artifact and both programs with their manifests."""
    folder = tmp_path_factory.mktemp("conv")
    torch.manual_seed(0)
    task = make_task(ConvNet(), (torch.randn(200, 1, 12, 12),))
    artifact = compressed(task, LayerPlan(bits=6, threshold=0.5), folder)
    return task, artifact, {fmt: (folder / fmt, export(artifact, task, fmt, folder / fmt, FACTS)) for fmt in FORMATS}


@runs
def test_float32_gives_the_artifact_at_each_batch_size(conv):
    task, artifact, made = conv
    out, manifest = made["executorch"]
    assert manifest["batch"] == {"max": executorch.MAX_BATCH}
    assert manifest["inputs"] == [{"name": "input", "shape": ["batch", 1, 12, 12], "dtype": "float32"}]
    assert manifest["cut"]["dead_units"] >= 0
    assert "because" not in manifest["cut"]
    assert manifest["verification"]["metric_difference"] == 0
    assert manifest["verification"]["batch_sizes"] == [1, 8, 64]
    assert manifest["verification"]["runtime"].startswith("executorch 1.")
    check_against_torch(task, artifact, out / "model.pte", [task.test[0]])
    with pytest.raises(RuntimeError):
        execute(out / "model.pte", torch.zeros(executorch.MAX_BATCH + 1, 1, 12, 12))


@runs
def test_int8_is_a_third_of_the_bytes_and_near(conv):
    task, artifact, made = conv
    (whole, _), (out, manifest) = made["executorch"], made["executorch-int8"]
    assert (out / "model.int8.pte").stat().st_size < 0.5 * (whole / "model.pte").stat().st_size
    with torch.no_grad():
        wanted = load(artifact, model=task.model)(task.test[0][:64])
    found = execute(out / "model.int8.pte", task.test[0][:64])
    assert 0 < (found - wanted).abs().mean() < 0.05 * wanted.std()
    assert abs(manifest["verification"]["metric_difference"]) <= verify.QUANTIZED_METRIC_TOLERANCE


@runs
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_program_names_no_path_and_no_source(conv, fmt):
    data = (conv[2][fmt][0] / deploy_export.FILES[fmt]).read_bytes()
    for leak in (b".py", b"site-packages", b"/tmp", str(Path.cwd()).encode(), str(Path.home()).encode(), b"torch.nn"):
        assert leak not in data


@runs
@pytest.mark.parametrize("names", [None, ("a", "b")])
def test_two_inputs(names, tmp_path):
    torch.manual_seed(1)
    inputs = (torch.randn(70, 12), torch.randn(70, 5))
    task = make_task(TwoInputs(), inputs, names=names)
    artifact = compressed(task, SMALL, tmp_path)
    for fmt in FORMATS:
        manifest = export(artifact, task, fmt, tmp_path / fmt, FACTS)
        assert manifest["batch"] == {"max": 64}
    check_against_torch(task, artifact, tmp_path / "executorch" / "model.pte", inputs)


class OneByOne(nn.Module):
    """Its code counts the batch, which fixes it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 40), nn.Linear(40, 3)

    def forward(self, x):
        return torch.stack([self.last(F.relu(self.first(x[row]))) for row in range(int(x.shape[0]))])


@runs
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_model_without_dynamic_batch_gets_a_program_for_one_example(fmt, tmp_path):
    torch.manual_seed(2)
    task = make_task(OneByOne(), (torch.randn(40, 6),))
    artifact = compressed(task, LayerPlan(bits=6), tmp_path)
    manifest = export(artifact, task, fmt, tmp_path / "out", FACTS)
    assert manifest["batch"]["fixed"] == 1
    assert "batch" in manifest["batch"]["because"]
    assert manifest["inputs"] == [{"name": "input", "shape": [1, 6], "dtype": "float32"}]
    assert manifest["outputs"][0]["shape"] == [1, 3]
    assert manifest["verification"]["batch_sizes"] == [1]
    assert manifest["verification"]["examples"] == 40
    if fmt == "executorch":
        check_against_torch(task, artifact, tmp_path / "out" / "model.pte", [task.test[0]], counts=(1,))


@runs
def test_inputs_of_few_bits_are_in_the_program(tmp_path):
    torch.manual_seed(0)
    task = make_task(mlp(), (torch.randn(100, 1, 8, 8),))
    artifact = compressed(task, LayerPlan(bits=6, activation_bits=8), tmp_path)
    manifest = export(artifact, task, "executorch", tmp_path / "out", FACTS)
    assert manifest["verification"]["metric_difference"] == pytest.approx(0, abs=1e-3)


@runs
def test_writing_is_quiet(tmp_path, capfd):
    module = mlp().eval()
    inputs = {"input": torch.randn(2, 1, 8, 8)}
    for fmt in FORMATS:
        executorch.write(fmt, module, inputs, False, tmp_path / fmt, calibration=[inputs])
    assert capfd.readouterr() == ("", "")


class Refused(nn.Module):
    """Its way depends on its input's values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


@runs
def test_a_model_that_cannot_be_lowered_is_one_line(tmp_path):
    torch.manual_seed(0)
    task = make_task(Refused(), (torch.randn(20, 4),))
    artifact = compressed(task, LayerPlan(bits=6), tmp_path)
    with pytest.raises(ExportError, match=r"Refused cannot be exported by torch\.export: ") as caught:
        export(artifact, task, "executorch", tmp_path / "out", FACTS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
