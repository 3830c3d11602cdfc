"""The format mlflow: a folder that MLflow loads and serves, verified, and its place in a study's registry."""

import getpass
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import yaml
from local_search import local, one_thread  # noqa: F401 (fixtures)
from test_cli import done, fail, study, work  # noqa: F401 (fixtures)
from test_deploy import FACTS, SMALL, TwoInputs, compressed, damaged_onnx, double_a_table, make_task, mlp, smoke  # noqa: F401
from test_tracking import free_port, synthetic_study, target

from autocompress.compress.artifact import load
from autocompress.deploy import onnx as deploy_onnx
from autocompress.deploy.export import export
from autocompress.errors import ExportError, TrackingError, UsageError
from autocompress.tracking import sync
from autocompress.tracking.register import check_names, model_tags, register, write_model

FILES = [
    *("MLmodel", "conda.yaml", "input_example.json", "model.onnx", "python_env.yaml", "requirements.txt"),
    "serving_input_example.json",
]


@pytest.fixture(scope="module")
def made(smoke):  # noqa: F811
    """The smoke test's artifact as a MLflow folder, where another file was before."""
    task, artifact, onnx_folder, _ = smoke
    out = onnx_folder.parent / "model"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    return task, artifact, out, export(artifact, task, "mlflow", out, FACTS)


def test_the_folder_holds_the_onnx_file_and_names_its_packages(made, smoke):  # noqa: F811
    _, _, out, manifest = made
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "manifest.json", "notes.txt"])
    assert (out / "model.onnx").read_bytes() == (smoke[2] / "model.onnx").read_bytes()
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == FILES
    assert manifest["sha256"] == hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest()
    pins = dict(line.split("==") for line in (out / "requirements.txt").read_text().splitlines())
    assert set(pins) == {"mlflow", "onnx", "onnxruntime"}
    assert pins["onnxruntime"] == ort.__version__
    assert manifest["verification"]["runtime"] == f"mlflow {pins['mlflow']}, onnxruntime {pins['onnxruntime']}"
    assert manifest["verification"]["metric_difference"] == 0
    assert manifest["verification"]["examples"] == 333
    described = yaml.safe_load((out / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "mlflow.onnx"
    assert "code" not in described["flavors"]["python_function"]
    assert json.loads(described["signature"]["inputs"]) == [
        {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 1, 8, 8]}}
    ]


def test_no_pickle_no_path_and_no_user_goes_along(made):
    for name in FILES:
        data = (made[2] / name).read_bytes()
        for leak in (str(Path.cwd()), str(made[2]), str(Path.home()), getpass.getuser() + "@", "cloudpickle", "tmp"):
            assert leak.encode() not in data, name


def test_the_example_is_none_of_the_data(made):
    assert not np.any(json.loads((made[2] / "input_example.json").read_text()))


def test_mlflow_gives_what_the_artifact_gives(made):
    from mlflow import pyfunc

    task, artifact, out, _ = made
    model = pyfunc.load_model(str(out))
    module = load(artifact, model=task.model)
    for count in (1, 5):
        with torch.no_grad():
            wanted = module(task.test[0][:count]).numpy()
        np.testing.assert_allclose(model.predict(task.test[0][:count].numpy())["output"], wanted, atol=1e-5)


@pytest.mark.slow
def test_several_inputs_go_by_name(tmp_path):
    from mlflow import pyfunc

    torch.manual_seed(1)
    task = make_task(TwoInputs(), (torch.randn(90, 12), torch.randn(90, 5)), names=("a", "b"))
    artifact = compressed(task, SMALL, tmp_path)
    manifest = export(artifact, task, "mlflow", tmp_path / "out", FACTS)
    assert [value["name"] for value in manifest["inputs"]] == ["a", "b"]
    model = pyfunc.load_model(str(tmp_path / "out"))
    inputs = {name: part[:3] for name, part in zip(("a", "b"), task.test.inputs, strict=True)}
    with torch.no_grad():
        wanted = load(artifact, model=task.model)(**inputs).numpy()
    found = model.predict({name: part.numpy() for name, part in inputs.items()})
    np.testing.assert_allclose(found["output"], wanted, atol=1e-5)


def test_a_folder_that_computes_something_else_is_not_written(smoke, monkeypatch, tmp_path):  # noqa: F811
    task, artifact, _, manifest = smoke
    damage = damaged_onnx(smoke, double_a_table)

    def write(*arguments):
        return damage(*arguments) | {key: manifest[key] for key in ("inputs", "outputs")}

    monkeypatch.setattr(deploy_onnx, "write", write)
    with pytest.raises(ExportError, match=r"model.onnx does not compute what the artifact does"):
        export(artifact, task, "mlflow", tmp_path / "out", FACTS)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_quiet(made, tmp_path, capfd):
    file = tmp_path / "model.onnx"
    file.write_bytes((made[2] / "model.onnx").read_bytes())
    write_model(file, made[3]["inputs"], made[3]["outputs"])
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


# the registry


@pytest.mark.parametrize("name", ["net", "Net 2.0", "a-b_c", "näher"])
def test_names_that_mlflow_takes(name):
    from mlflow.utils.validation import _validate_model_name

    check_names(name, "champion")
    _validate_model_name(name)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "..", "a\nb", "x" * 256])
def test_names_that_are_refused(name):
    with pytest.raises(UsageError, match=r"register is '.*', allowed: up to 255 letters, digits, spaces and _ \. -"):
        check_names(name, None)


def test_an_alias_that_is_refused_leaves_the_version(made, store, monkeypatch):
    from mlflow import MlflowClient

    def refuse(*_):
        raise RuntimeError("no aliases today")

    record, uri = store
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuse)
    with pytest.raises(TrackingError, match=r"version 1 of 'half' is registered, but not as 'champion': .*no aliases"):
        register(record, uri, made[2], made[3], name="half", alias="champion")
    assert MlflowClient(uri).get_model_version("half", "1").status == "READY"


def test_a_version_whose_link_is_refused_is_gone(made, store, monkeypatch):
    from mlflow import MlflowClient

    def refuse(*_):
        raise RuntimeError("no tags today")

    record, uri = store
    monkeypatch.setattr(MlflowClient, "set_logged_model_tags", refuse)
    with pytest.raises(TrackingError, match="the model was not registered: .*no tags today"):  # noqa: RUF043
        register(record, uri, made[2], made[3], name="gone")
    assert not list(MlflowClient(uri).search_model_versions("name = 'gone'"))


@pytest.mark.parametrize("alias", ["", "a b", "latest", "Latest", "v3", "a/b", "x" * 256])
def test_aliases_that_are_refused(alias):
    with pytest.raises(UsageError, match=r"alias is '.*', allowed: up to 255 letters, digits, _ and -; 'latest'"):
        check_names("net", alias)


def test_an_alias_needs_a_name():
    with pytest.raises(UsageError, match="alias is 'champion', allowed with a name to register only: --register NAME"):
        check_names(None, "champion")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with a study of four trials, and its URI."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    record = synthetic_study(4, "live")
    sync(record, target(uri, folder / "artifacts"))
    return record, uri


def test_a_registered_model_is_of_its_trial_and_holds_the_verified_files(made, store):
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    _, _, out, manifest = made
    record, uri = store
    first = register(record, uri, out, manifest, name="net", alias="champion")
    second = register(record, uri, out, manifest, name="net", alias="champion")
    assert (first.version, second.version) == ("1", "2")
    assert (first.uri, second.tracking_uri) == ("models:/net@champion", uri)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_model_version_by_alias("net", "champion")
    assert str(found.version) == "2"
    run = client.get_run(found.run_id)
    assert run.data.tags["autocompress.trial"] == "3" == str(FACTS["trial"])
    wanted = {
        "autocompress.study": "s",
        "autocompress.trial": "3",
        "autocompress.size_bytes": str(len((out / "model.onnx").read_bytes())),
        "autocompress.metric": "accuracy",
        "autocompress.metric_test": f"{manifest['verification']['metric_exported']:.6g}",
        "autocompress.sha256": hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest(),
    }
    assert model_tags(manifest) == wanted
    assert wanted.items() <= found.tags.items()
    models = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    (model,) = [model for model in models if model.artifact_location == found.source]
    assert wanted.items() <= model.tags.items()
    assert str(model.status) == "READY"
    assert model.source_run_id == found.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "net", "version": found.version}]
    held = Path(download_artifacts(model.artifact_location))
    for name in (*FILES, "manifest.json"):
        assert (held / name).read_bytes() == (out / name).read_bytes()
    assert not (held / "notes.txt").exists()


def test_a_trial_that_the_store_lacks_goes_to_the_study(made, store):
    from mlflow import MlflowClient

    record, uri = store
    told = made[3] | {"recorded": {**FACTS, "trial": 77}}
    found = register(record, uri, made[2], told, name="other")
    run = MlflowClient(tracking_uri=uri).get_run(MlflowClient(uri).get_model_version("other", found.version).run_id)
    assert run.data.tags["autocompress.role"] == "study"
    assert found.uri == f"models:/other/{found.version}"


def test_what_fails_half_way_leaves_no_model(made, store, tmp_path):
    from mlflow import MlflowClient

    record, uri = store
    client = MlflowClient(tracking_uri=uri)

    def models():
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        return {model.model_id for model in client.search_logged_models(ids)}

    before = models()
    with pytest.raises(TrackingError, match=r"MLflow at sqlite.*: the model was not registered: ") as caught:
        register(record, uri, tmp_path, made[3], name="net")  # no file is there
    assert "\n" not in str(caught.value)
    assert models() == before


def test_a_store_that_is_away_or_does_not_know_the_study(made, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"study 'else' is not in MLflow at .*: run autocompress sync else"):
        register(synthetic_study(2, "else"), store[1], made[2], made[3], name="net")
    away = f"http://me:secret@127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError, match=r"MLflow at http://127.0.0.1:\d+: the model was not registered") as caught:
        register(store[0], away, made[2], made[3], name="net")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


EXPORT = ("export", "mine", "-o", "out")


def test_mistakes_on_the_command_line(study, fail):  # noqa: F811
    for more, words in (
        (("--register", "net"), "register is 'net' and the format 'onnx': only the format mlflow can be registered"),
        (("--alias", "champion", "--format", "torch"), "alias is 'champion' and the format 'torch': only the format"),
        (("--format", "mlflow", "--alias", "champion"), "alias is 'champion', allowed with a name to register only"),
        (("--format", "mlflow", "--register", "a/b"), "register is 'a/b', allowed: up to 255 letters"),
        (("--format", "mlflow", "--register", "net"), "study 'mine' is not in MLflow yet: run autocompress sync mine"),
    ):
        assert words in fail(2, *EXPORT, *more)
    assert not (study / "out").exists()
    assert "cannot write to folder '/proc/out'" in fail(1, "export", "mine", "--format", "mlflow", "-o", "/proc/out")


@pytest.mark.slow
def test_registered_on_the_command_line(study, done, fail, monkeypatch):  # noqa: F811
    done("sync", "mine")
    text = done(*EXPORT, "--format", "mlflow", "--register", "net", "--alias", "champion")
    assert "registered  net version 1" in text
    assert re.search(r"MLFLOW_TRACKING_URI=sqlite:\S+ mlflow models serve -m models:/net@champion --env-manager", text)
    manifest = json.loads((study / "out" / "manifest.json").read_text())
    assert manifest["recorded"]["study"] == "mine"
    assert "registered" not in manifest
    (study / "autocompress_runs" / "mlflow.db").write_bytes(b"gone" * 500)
    assert "MLflow at sqlite" in fail(1, *EXPORT, "--format", "mlflow", "--register", "net")


# serving


def ask(url: str, payload: object) -> dict:
    request = urllib.request.Request(url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict = json.load(answer)
        return found


@pytest.fixture
def server(made, store):
    """`mlflow models serve` of the champion, on a free port: where calls go."""
    record, uri = store
    register(record, uri, made[2], made[3], name="served", alias="champion")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion", "--env-manager"]
    process = subprocess.Popen(
        [*command, "local", "--host", "127.0.0.1", "--port", str(port)],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it looks for its web server there
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_mlflow_serves_what_the_artifact_gives(made, server):
    task, artifact, out, _ = made
    inputs = task.test[0][:7]
    answer = ask(server, {"inputs": inputs.tolist()})
    with torch.no_grad():
        wanted = load(artifact, model=task.model)(inputs).numpy()
    np.testing.assert_allclose(np.array(answer["predictions"]["output"]), wanted, atol=1e-5)
    example = json.loads((out / "serving_input_example.json").read_text())
    assert np.array(ask(server, example)["predictions"]["output"]).shape == (1, 10)
