"""The printed link, opened in headless Chromium on a real MLflow server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from headless import browser, free_port  # noqa: F401 (one is a fixture)
from test_tracking import run_live, synthetic_study, with_test_metrics

from autocompress import report
from autocompress.errors import UsageError
from autocompress.tracking import Home, Target, default_uri, serve, sync
from autocompress.tracking.server import check_port

pytestmark = pytest.mark.ui
TRIALS = 40
PATIENCE_S = 90

SERVE = """
import signal, sys
from pathlib import Path
from autocompress.tracking import serve
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
uri, root, port, path = sys.argv[1:]
try:
    serve(uri, Path(root), int(port), path, lambda link: print(link, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def processes_of_group(group: int) -> list[int]:
    """The live processes of a process group, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Home]:
    """A store with one study of 40 trials, written as a search writes it."""
    folder = tmp_path_factory.mktemp("ui")
    record = with_test_metrics(synthetic_study(TRIALS, "digits"))
    target = Target(default_uri(folder), folder / "artifacts", report.write_front, report.describe)
    return folder, sync(record, target)


@pytest.fixture(scope="module")
def link(study: tuple[Path, Home]) -> Iterator[str]:
    """What `autocompress ui` prints; afterwards the server ends as by Ctrl-C and leaves no process."""
    folder, home = study
    command = [sys.executable, "-c", SERVE, default_uri(folder), str(folder / "artifacts"), str(free_port()), home.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    servers = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert servers, "the server was running"
    assert [pid for group in servers for pid in processes_of_group(group)] == []


def children(parent: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in text.stdout.split()]


SCATTERS = """
return [...document.querySelectorAll('.js-plotly-plot')]
    .filter(plot => plot.data && plot.data.some(trace => (trace.type || 'scatter').startsWith('scatter')))
    .map(plot => plot.data.map(trace => ({x: Array.from(trace.x || []), y: Array.from(trace.y || [])})));
"""


def scatter_points(browser: Any) -> list[set[tuple[float, float]]]:  # noqa: F811
    """The points of each scatter on the page, once one of them has some."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        plots = browser.execute_script(SCATTERS)
        points = [{p for t in traces for p in zip(t["x"], t["y"], strict=True)} for traces in plots]
        if any(points):
            return points
        time.sleep(0.5)
    pytest.fail(f"no scatter within {PATIENCE_S} s; the page says: {browser.title!r}")


def test_the_link_opens_on_a_scatter_with_the_trials(browser: Any, link: str, tmp_path: Path) -> None:  # noqa: F811
    assert link.startswith("http://127.0.0.1:")
    browser.get(link)
    scatter_points(browser)
    for label in ("Close", "Hide banner"):  # the assistant, and the note that a view is shared: for the picture only
        for button in browser.find_elements("css selector", f"button[aria-label='{label}']"):
            button.click()
    time.sleep(5)
    record = synthetic_study(TRIALS, "digits")
    wanted = {(t.best.size_bytes, t.best.metric_val) for t in record.measured if t.best}
    shown = scatter_points(browser)
    screenshot = Path(os.environ.get("AUTOCOMPRESS_SCREENSHOT") or tmp_path / "front.png")
    browser.save_screenshot(str(screenshot))
    assert wanted in shown
    assert screenshot.stat().st_size > 50_000


def test_the_server_shows_the_artifacts(study: tuple[Path, Home], link: str) -> None:
    root = link.partition("/#/")[0]
    url = f"{root}/get-artifact?path=front/front.json&run_uuid={study[1].run_id}"
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert b'"front"' in answer.read()


def test_a_tracker_writes_to_a_running_server(link: str) -> None:
    from mlflow import MlflowClient

    uri = link.partition("/#/")[0]
    record = synthetic_study(4, "remote")
    tracker = run_live(record, uri, None)
    assert tracker.problem is None
    assert tracker.home is not None
    assert tracker.home.url.startswith(f"{uri}/#/experiments/{tracker.home.experiment_id}/runs?")
    client = MlflowClient(tracking_uri=uri)
    assert len(client.search_runs([tracker.home.experiment_id])) == 5
    assert client.get_run(tracker.home.run_id).info.status == "FINISHED"


def test_a_port_that_is_taken_is_named(link: str) -> None:
    port = int(link.partition("/#/")[0].rpartition(":")[2])
    with pytest.raises(UsageError, match=f"port {port} cannot be used"):
        serve("sqlite:///nowhere.db", None, port, "/")
    with pytest.raises(UsageError, match="port is 70000"):
        check_port(70000)


def test_an_http_store_needs_no_server() -> None:
    told: list[str] = []
    serve("http://me:secret@example.org/mlflow", None, 5000, "/#/experiments/1", told.append)
    assert told == ["http://example.org/mlflow/#/experiments/1"]
