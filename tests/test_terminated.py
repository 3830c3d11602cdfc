"""SIGTERM while the command line works: nothing half done is left, and nobody else's handler is touched."""

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_deploy import FACTS, SMALL, compressed, make_task, mlp, pair

from autocompress import api, cli, file_bench
from autocompress.deploy import verify
from autocompress.deploy.export import export


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A task and an artifact."""
    torch.manual_seed(0)
    task = make_task(mlp(), (torch.randn(40, 1, 8, 8),))
    return task, compressed(task, SMALL, tmp_path_factory.mktemp("made"))


@pytest.fixture
def default():
    """The process's handler is the system's, also afterwards."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the handler comes first")


def test_a_staged_export_is_removed(made, default, monkeypatch, tmp_path, capsys):
    task, artifact = made
    monkeypatch.setattr(verify, "run_apart", terminate)
    with pytest.raises(SystemExit) as ended, cli._tidy_when_terminated():
        export(artifact, task, "onnx", tmp_path / "out", FACTS)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "autocompress: terminated\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_files_that_are_being_replaced_stay_a_pair(moves, made, default, monkeypatch, tmp_path):
    task, artifact = made
    out = tmp_path / "out"
    export(artifact, task, "archive", out, {"mine": 1})
    real, done = os.replace, []

    def replace(source, target):
        real(source, target)
        done.append(target)
        if len(done) == moves:
            terminate()

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit), cli._tidy_when_terminated():
        export(artifact, task, "archive", out, {"mine": 2})
    assert pair(out)["recorded"] == {"mine": 1}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "model.acz", "out"]


def test_a_second_one_does_not_stop_the_tidying(default):
    tidied = []

    def tidy():
        try:
            terminate()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(1)

    with pytest.raises(SystemExit) as ended, cli._tidy_when_terminated():
        tidy()
    assert tidied == [1]
    assert ended.value.code == 143


def test_bench_ends_with_143(default, monkeypatch, tmp_path):
    file = tmp_path / "model.onnx"
    file.touch()
    monkeypatch.setattr(file_bench, "bench_file", terminate)
    monkeypatch.setattr(api, "bench", terminate)
    for arguments in (["bench", str(file)], ["bench"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 143


def test_a_search_ends_as_by_ctrl_c(default, monkeypatch, capsys):
    """Also where no trial runs and `engine` does not listen."""
    monkeypatch.setattr(api, "search", terminate)
    assert cli.main(["search", "digits"]) == 130
    assert "nothing was started" in capsys.readouterr().err


def test_a_handler_of_ones_own_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with cli._tidy_when_terminated():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_set_no_handler():
    def inside():
        with cli._tidy_when_terminated():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == signal.getsignal(signal.SIGTERM)


@pytest.mark.slow
def test_the_process_ends_with_143(made, tmp_path):
    """A process that exports and waits to be told; its child, the verification, goes with it."""
    _, artifact = made
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from test_deploy import FACTS, make_task, mlp
        from autocompress import api, cli, file_bench
        from autocompress.deploy import verify
        from autocompress.deploy.export import export

        def wait(*_, **__):
            print("now", flush=True)
            time.sleep(60)

        verify.run_apart = wait
        torch.manual_seed(0)
        with cli._tidy_when_terminated():
            export(Path({str(artifact)!r}), make_task(mlp(), (torch.randn(40, 1, 8, 8),)), "onnx", Path("out"), FACTS)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"now\n"
    assert [path.name.startswith(".autocompress-") for path in tmp_path.iterdir()] == [True]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []
