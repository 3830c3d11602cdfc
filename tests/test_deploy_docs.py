"""The programs of docs/deploy.md, run on real exports where the page says: they print what the artifact computes."""

import ast
import contextlib
import getpass
import hashlib
import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import zipfile
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from headless import browser, free_port, missing  # noqa: F401 (one is a fixture)
from test_deploy import FACTS, SMALL, compressed, make_task
from test_executorch import HERE, WITHOUT
from torch import nn

from autocompress import cli
from autocompress.compress.artifact import load
from autocompress.deploy import file_times, verify
from autocompress.deploy.export import export
from autocompress.deploy.files import FILES
from autocompress.plan import LayerPlan
from autocompress.report import human_count
from autocompress.tasks import nets
from autocompress.tasks.folders import cache_root
from autocompress.tasks.resnet import Residual

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "onnxruntime in Python": "run.py",
    "Node.js": "run.mjs",
    "Browser": "index.html",
    "OpenVINO": "run.py",
    "torch": "run.py",
    "Archive": "run.py",
    "Archive without autocompress": "run.py",
    "ExecuTorch": "run.py",
    "mlflow models serve": "run.py",
    "Ray Serve": "run.py",
}
"""By heading, the name of the page's program."""
BATCHES = (1, 32)
INSTALL_S, RUN_S = 500, 120


@cache
def blocks() -> tuple[tuple[str, str, str], ...]:
    """The page's fenced blocks: heading, language, text."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", "## Deploying\n" + text, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0].strip()
        found += [(heading, *pair) for pair in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    return tuple(found)


def program(heading: str) -> str:
    """The section's one program."""
    (code,) = (text for told, language, text in blocks() if told == heading and language != "sh")
    return code


def lines(heading: str) -> list[list[str]]:
    """The words of the section's shell lines."""
    return [
        shlex.split(line, comments=True)
        for told, language, text in blocks()
        if (told, language) == (heading, "sh")
        for line in text.splitlines()
    ]


# ---------------------------------------------------------------------- exports


def residual_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8, 8),
        Residual(8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def small_mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


NETS = {
    "digits": (nets.digits_net, (1, 8, 8), SMALL),
    "lenet300": (nets.lenet300, (1, 28, 28), SMALL),
    "residual": (residual_net, (3, 16, 16), SMALL),
    "low rank": (small_mlp, (1, 8, 8), LayerPlan(rank=6, bits=4)),
    "linear": (small_mlp, (1, 8, 8), SMALL),
}


class Exports:
    """Artifacts and their exports, each made once."""

    def __init__(self, root):
        self.root = root
        self.artifact = cache(self._artifact)
        self.folder = cache(self._folder)

    def _artifact(self, name):
        make, shape, plan = NETS[name]
        torch.manual_seed(0)
        task = make_task(make(), (torch.randn(40, *shape),))
        folder = self.root / name
        folder.mkdir()
        return task, compressed(task, plan, folder)

    def _folder(self, name, fmt):
        task, artifact = self.artifact(name)
        out = self.root / name / fmt
        export(artifact, task, fmt, out, FACTS)
        return out

    def outputs(self, name):
        """By batch the artifact's own outputs, (batch, 10)."""
        task, artifact = self.artifact(name)
        shape = NETS[name][1]
        module = load(artifact, model=task.model)
        inputs = [torch.sin(torch.arange(b * np.prod(shape), dtype=torch.float64)).float() for b in BATCHES]
        with torch.no_grad():
            return [module(x.view(-1, *shape)).numpy() for x in inputs]


def run_here(fmt, file, folder, *, keywords):
    """As `verify.run_apart`, without a process of its own: that it needs none of ours is told in test_deploy."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert verify.main([fmt, str(file), str(folder), "keywords" if keywords else "positional"]) == 0, told
    return json.loads((folder / "runtime.json").read_text())["runtime"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_apart", run_here)
        yield Exports(tmp_path_factory.mktemp("exports"))


def place(exports, name, fmt, heading, folder):
    """A reader's folder: the export as `deploy`, and the page's program; the program's file."""
    shutil.copytree(exports.folder(name, fmt), folder / "deploy")
    file = folder / PROGRAMS[heading]
    file.write_text(program(heading), encoding="utf-8")
    return file


def check(printed, exports, name):
    """One line of JSON for each batch, of the artifact's outputs."""
    told = [np.array(json.loads(line)) for line in printed.splitlines()]
    wanted = exports.outputs(name)
    assert len(told) == len(wanted)
    for found, right in zip(told, wanted, strict=True):
        assert np.abs(found.reshape(right.shape) - right).max() <= 1e-4 * np.abs(right).max()


# ---------------------------------------------------------------------- the page


def test_every_program_of_the_page_is_run_here():
    assert Counter(heading for heading, language, _ in blocks() if language != "sh") == Counter(list(PROGRAMS))
    commands = {line[0] for heading, language, _ in blocks() if language == "sh" for line in lines(heading)}
    assert commands == {"autocompress", "pip", "npm", "node", "python", "mlflow"}


def test_the_page_exports_in_every_format():
    found = [cli._parser().parse_args(words[1:]) for words in lines("Deploying") if words[0] == "autocompress"]
    assert sorted(options.format for options in found) == sorted(FILES)
    assert {options.out for options in found} == {"deploy"}


@pytest.mark.parametrize("heading", [heading for heading, name in PROGRAMS.items() if name == "run.py"])
def test_programs_import_what_their_section_says(heading):
    tree = ast.walk(ast.parse(program(heading)))
    nodes = list(tree)
    modules = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    wanted = {
        "onnxruntime in Python": {"onnxruntime"},
        "OpenVINO": {"openvino"},
        "torch": {"torch"},
        "Archive": {"torch", "autocompress"},
        "Archive without autocompress": set(),
        "ExecuTorch": {"torch", "executorch"},
        "mlflow models serve": set(),
        "Ray Serve": {"ray", "onnxruntime"},
    }
    assert modules - sys.stdlib_module_names - {"numpy"} == wanted[heading]


# ---------------------------------------------------------------------- in this environment


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs a program in its folder; what it prints."""

    def run(file):
        monkeypatch.chdir(file.parent)
        capsys.readouterr()
        exec(compile(file.read_text(encoding="utf-8"), file, "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["digits", "lenet300", "residual"])
def test_onnxruntime(name, exports, printed, tmp_path):
    file = place(exports, name, "onnx", "onnxruntime in Python", tmp_path)
    check(printed(file), exports, name)


def test_a_file_is_measured(exports, tmp_path, monkeypatch, capsys):
    (words,) = lines("Which file is how large")
    shutil.copytree(exports.folder("digits", "onnx"), tmp_path / "deploy")
    shutil.copyfile(exports.folder("residual", "onnx") / "model.onnx", tmp_path / "other.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_times, "times_of_onnx", partial(file_times.times_of_onnx, turns=2, seconds=0.0))
    assert cli.main(words[1:]) == 0
    manifest = json.loads((tmp_path / "deploy" / "manifest.json").read_text())
    assert f"{human_count(manifest['cut']['macs'])} MACs an example" in capsys.readouterr().out


def test_onnxruntime_in_8_bits(exports, printed, tmp_path):
    file = place(exports, "digits", "onnx-int8", "onnxruntime in Python", tmp_path)
    assert "`deploy/model.int8.onnx` for the same program" in (ROOT / "docs" / "deploy.md").read_text()
    file.write_text(file.read_text().replace("model.onnx", "model.int8.onnx"))
    told = [np.array(json.loads(line)) for line in printed(file).splitlines()]
    for found, right in zip(told, exports.outputs("digits"), strict=True):
        assert np.abs(found - right).max() <= 0.15 * np.abs(right).max()


@pytest.mark.parametrize("name", ["digits", "lenet300", "residual"])
def test_torch(name, exports, printed, tmp_path):
    file = place(exports, name, "torch", "torch", tmp_path)
    shutil.copytree(tmp_path / "deploy", tmp_path / "trusted", ignore=shutil.ignore_patterns("*.pt2"))
    check(printed(file), exports, name)


def test_torch_opens_no_file_of_others(exports, printed, tmp_path):
    file = place(exports, "residual", "torch", "torch", tmp_path)
    shutil.copytree(tmp_path / "deploy", tmp_path / "trusted", ignore=shutil.ignore_patterns("*.pt2"))
    data = bytearray((tmp_path / "deploy" / "model.pt2").read_bytes())
    data[-1] ^= 1
    (tmp_path / "deploy" / "model.pt2").write_bytes(data)
    with pytest.raises(SystemExit, match="not the file that was exported"):
        printed(file)


@pytest.mark.parametrize("name", ["digits", "lenet300", "low rank"])
def test_archive(name, exports, printed, tmp_path):
    file = place(exports, name, "archive", "Archive", tmp_path)
    check(printed(file), exports, name)


def test_archive_into_a_module_of_ones_own(exports, printed, tmp_path, monkeypatch):
    file = place(exports, "residual", "archive", "Archive", tmp_path)
    net = "from test_deploy_docs import residual_net as Net\n"
    text = file.read_text().replace('load("deploy/model.acz")', 'load("deploy/model.acz", model=Net())')
    assert 'load("deploy/model.acz", model=Net())' in (ROOT / "docs" / "deploy.md").read_text()
    file.write_text(net + text)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    check(printed(file), exports, "residual")


def test_archive_without_autocompress(exports, printed, tmp_path):
    file = place(exports, "linear", "archive", "Archive without autocompress", tmp_path)
    for name in ("scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    first, _ = lines("Archive without autocompress")
    subprocess.run([sys.executable, *first[1:]], cwd=tmp_path, check=True, timeout=RUN_S)
    check(printed(file), exports, "linear")


def test_files_need_nothing_of_ours(exports, printed, tmp_path, monkeypatch):
    """A residual net's classes are ours: its files run where they cannot be imported."""
    files = {}
    for fmt, heading in (("onnx", "onnxruntime in Python"), ("torch", "torch")):
        (tmp_path / fmt).mkdir()
        files[heading] = place(exports, "residual", fmt, heading, tmp_path / fmt)
    shutil.copytree(tmp_path / "torch" / "deploy", tmp_path / "torch" / "trusted")
    wanted = exports.outputs("residual")
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "autocompress"]:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            importlib.import_module("autocompress.tasks.resnet")
        told = [printed(file) for file in files.values()]
    for text in told:
        for line, right in zip(text.splitlines(), wanted, strict=True):
            np.testing.assert_allclose(json.loads(line), right, atol=1e-5)


@pytest.mark.parametrize("name", ["digits", "residual"])
def test_files_name_nothing_of_this_machine(name, exports):
    leaks = {str(Path.home()), str(ROOT), str(exports.root), sys.prefix, "site-packages"}
    leaks |= {name for name in (getpass.getuser(), platform.node()) if len(name) > 4}  # "root", "vm" are words of torch
    for fmt in ("onnx", "torch", "archive"):
        for file in exports.folder(name, fmt).iterdir():
            held = [file.read_bytes()]
            if file.suffix == ".pt2":
                with zipfile.ZipFile(file) as parts:
                    held += [parts.read(part) for part in parts.namelist()]
            for leak in leaks:
                assert not any(leak.encode() in data for data in held), (file.name, leak)
    onnx.checker.check_model(onnx.load(exports.folder(name, "onnx") / "model.onnx"), full_check=True)


# ---------------------------------------------------------------------- in environments of their own


def installed(words):
    """The folder in which that line was run, once for all sessions: with `node_modules`, or an environment `venv`."""
    folder = cache_root() / "deploy-docs" / hashlib.sha256(" ".join([sys.version, *words]).encode()).hexdigest()[:16]
    if shutil.which("npm") is None and words[0] == "npm":
        missing("npm and node are needed: apt-get install nodejs npm")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    try:
        if words[0] == "pip":
            subprocess.run([sys.executable, "-m", "venv", made / "venv"], check=True, timeout=RUN_S)
            words = [str(made / "venv" / "bin" / "python"), "-m", *words]
        done = subprocess.run(words, cwd=made, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode != 0:
            missing(f"{' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def output_of(words, folder, **settings):
    """What a program prints; none of this environment's packages is seen by it."""
    alone = {"PATH": "/usr/bin:/bin", **settings}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=RUN_S, env=alone, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_of(words):
    """The interpreter of the environment that a line of pip filled."""
    return installed(words) / "venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason=WITHOUT)
def test_executorch(exports, tmp_path):
    assert lines("ExecuTorch")[0][:2] == ["pip", "install"]
    for name in ("digits", "lenet300", "residual"):
        (tmp_path / name).mkdir()
        file = place(exports, name, "executorch", "ExecuTorch", tmp_path / name)
        check(output_of([sys.executable, file], tmp_path / name), exports, name)


@pytest.mark.slow
def test_mlflow_serves(exports, tmp_path):
    file = place(exports, "digits", "mlflow", "mlflow models serve", tmp_path)
    port = free_port()
    serve, _ = lines("mlflow models serve")
    words = [sys.executable, "-m", *(str(port) if word == "5001" else word for word in serve)]
    file.write_text(file.read_text().replace(":5001/", f":{port}/"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it looks for its web server there
    alone = {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(words, cwd=tmp_path, env=alone, **quiet)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping")
        check(output_of([sys.executable, file], tmp_path), exports, "digits")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_serve(exports, tmp_path):
    install, _ = lines("Ray Serve")
    file = place(exports, "digits", "onnx", "Ray Serve", tmp_path)
    file.write_text(file.read_text().replace("8000", str(free_port())))
    check(output_of([python_of(install), file], tmp_path, RAY_USAGE_STATS_ENABLED="0"), exports, "digits")


@pytest.mark.slow
def test_node(exports, tmp_path):
    install, run = lines("Node.js")
    modules = installed(install) / "node_modules"
    for name in ("digits", "lenet300", "residual"):
        folder = tmp_path / name
        folder.mkdir()
        place(exports, name, "onnx", "Node.js", folder)
        (folder / "node_modules").symlink_to(modules)
        check(output_of([shutil.which(run[0]), *run[1:]], folder), exports, name)


@pytest.mark.slow
def test_browser(exports, browser, tmp_path):  # noqa: F811
    install, serve = lines("Browser")
    modules = installed(install) / "node_modules"
    port = free_port()
    words = [sys.executable if word == "python" else str(port) if word == "8000" else word for word in serve]
    server = subprocess.Popen([*words, "--bind", "127.0.0.1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/")
        for name in ("digits", "lenet300", "residual"):
            folder = tmp_path / name
            folder.mkdir()
            place(exports, name, "onnx", "Browser", folder)
            (folder / "node_modules").symlink_to(modules)
            browser.get(f"http://127.0.0.1:{port}/{name}/index.html")
            deadline = time.monotonic() + RUN_S
            while browser.title != "done" and time.monotonic() < deadline:
                time.sleep(0.2)
            assert browser.title == "done", browser.get_log("browser")
            check(browser.find_element("id", "outputs").text.strip(), exports, name)
    finally:
        server.terminate()
        server.wait(10)


def wait_for(url):
    deadline = time.monotonic() + RUN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(f"nothing answers at {url}")


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["onnxruntime in Python", "OpenVINO"])
def test_a_bare_environment(heading, exports, tmp_path):
    install, _ = lines(heading)
    for name in ("digits", "lenet300", "residual"):
        (tmp_path / name).mkdir()
        file = place(exports, name, "onnx", heading, tmp_path / name)
        check(output_of([python_of(install), file], tmp_path / name), exports, name)


@pytest.mark.slow
def test_the_oldest_onnxruntime_prints_what_the_newest_does(exports, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (line.partition(">=")[2] for line in project["dependencies"] if line.startswith("onnxruntime>="))
    assert f"Any onnxruntime from {oldest} on" in (ROOT / "docs" / "deploy.md").read_text()
    python = python_of(["pip", "install", f"onnxruntime=={oldest}.0"])
    for name in ("digits", "lenet300", "residual", "low rank"):
        (tmp_path / name).mkdir()
        file = place(exports, name, "onnx", "onnxruntime in Python", tmp_path / name)
        check(output_of([python, file], tmp_path / name), exports, name)
    forms = json.loads((tmp_path / "lenet300" / "deploy" / "manifest.json").read_text())["weight_forms"]
    assert "sparse, dense" in forms.values()
    assert output_of([python, "-c", "import onnxruntime as o; print(o.__version__)"], tmp_path).strip() == f"{oldest}.0"
