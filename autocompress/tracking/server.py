"""The MLflow UI for `autocompress ui`: a server on this machine while it is looked at."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from autocompress.errors import TrackingError, UsageError
from autocompress.record import without_password
from autocompress.tracking.store import ENVIRONMENT, is_http

HOST = "127.0.0.1"
START_S, STOP_S = 120.0, 5.0


def serve(uri: str, artifact_root: Path | None, port: int, path: str, ready: Callable[[str], None] = print) -> None:
    """Serve the MLflow UI of a database store on this machine until interrupted.

    `ready` is called with the full link, `path` on the server, once it answers. An http(s)
    store has a server already: `ready` is called at once and nothing is started. Raises
    UsageError where the port is taken, TrackingError where the server does not start or ends.
    Ctrl-C (KeyboardInterrupt) and SIGTERM stop the server and all its processes.
    """
    if is_http(uri):
        ready(path if is_http(path) else without_password(uri).rstrip("/") + path)
        return
    check_port(port)
    with tempfile.TemporaryFile() as log, _server(uri, artifact_root, port, log) as process:
        _wait_until_ready(process, port, log)
        ready(f"http://{HOST}:{port}{path}")
        process.wait()
        raise TrackingError(f"the MLflow server on port {port} ended: {_last_line(log)}")


def check_port(port: int) -> None:
    """Raise UsageError unless a server can listen on the port."""
    if not 1 <= port <= 65535:
        raise UsageError(f"port is {port}, allowed: 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


@contextmanager
def _server(uri: str, artifact_root: Path | None, port: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST]
    command += ["--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    if artifact_root is not None:
        command += ["--default-artifact-root", artifact_root.absolute().as_uri()]
    environment = {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        with _sigterm_as_interrupt():
            yield process
    finally:
        _stop(process)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with its workers: they share a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TrackingError(f"the MLflow server did not start: {_last_line(log)}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TrackingError(f"the MLflow server did not answer on port {port} within {START_S:g} s")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
