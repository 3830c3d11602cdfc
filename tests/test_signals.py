"""A signal ends a search cleanly: what is finished is kept, and the last line says how to go on."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from local_search import write_task

pytestmark = pytest.mark.ray


def autocompress(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "autocompress.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run(folder: Path, *arguments: str, code: int = 0) -> str:
    process = autocompress(folder, *arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    return out + err


def front(folder: Path) -> dict:
    return json.loads(run(folder, "front", "--json"))


def until_trials(process: subprocess.Popen, count: int) -> None:
    """Read the search's lines until so many trials have ended."""
    seen = 0
    for line in process.stdout:
        seen += line.startswith("trial ")
        if seen >= count:
            return
    raise AssertionError(f"the search ended after {seen} trials: {process.stderr.read()}")


def search(*more: str) -> tuple[str, ...]:
    return ("search", "waves.py:task", "--finetune-epochs", "1", "--workers", "2", *more)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_to_the_group_stops_the_search_cleanly(tmp_path, number):
    """To the whole process group, as Ctrl-C and `timeout` send it; Ray's daemons must not go first."""
    write_task(tmp_path)
    process = autocompress(tmp_path, *search("--trials", "500", "--study", "s"))
    until_trials(process, 2)
    sent = time.monotonic()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=90)
    assert time.monotonic() - sent < 45
    assert process.returncode == 130, out + err
    assert "autocompress resume s" in err
    shown = front(tmp_path)
    assert 2 <= sum(shown["trials"].values()) < 500
    assert all((tmp_path / "autocompress_runs" / p["artifact"]).is_file() for p in shown["front"])


@pytest.mark.slow
def test_workers_that_are_stopped_leave_no_files(tmp_path):
    write_task(tmp_path)
    with tempfile.TemporaryDirectory() as short:  # the paths of Ray's sockets must be
        options = {"env": os.environ | {"TMPDIR": short}}
        process = autocompress(tmp_path, *search("--trials", "500", "--study", "s", "--latency"), **options)
        until_trials(process, 2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130, out + err
        assert list(Path(short).glob("autocompress-*")) == []
