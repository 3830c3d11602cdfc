"""The memory that an ONNX file takes in onnxruntime, measured in a fresh process.

As a program it imports only numpy and onnxruntime:

    python -P memory.py FILE INPUTS.npz THREADS

It prints, in bytes, by how much loading the file and one call raised the peak of what the process holds in memory,
with its libraries and the inputs ("arg.NAME" in INPUTS.npz) loaded before; null where the system does not tell.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from pathlib import Path


def peak_bytes(file: Path, inputs: Path, threads: int = 1) -> int | None:
    """The program's figure for that file and those inputs, None where the system does not tell. Raises ExportError."""
    from autocompress.errors import ExportError

    command = [sys.executable, "-P", __file__, str(file), str(inputs), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{file.name} does not run in a process of its own: {lines[-1]}")
    found: int | None = json.loads(done.stdout)
    return found


def _held_most() -> int | None:
    """The process's peak so far, since `_forget` where that works."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget() -> None:
    """Let the peak be what is held now: imports may have held more."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str]) -> int:
    """The program; 0 if the call was run."""
    import numpy as np
    import onnxruntime

    file, inputs, threads = arguments
    try:
        with np.load(inputs, allow_pickle=False) as held:
            arrays = {name.removeprefix("arg."): held[name] for name in held.files}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
        options.log_severity_level = 3
        _forget()
        before = _held_most()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        session.run(None, {name: array for name, array in arrays.items() if name in names})
        after = _held_most()
    except Exception as error:  # onnxruntime's own exceptions have no common base
        print(" ".join(str(error).split())[:400] or type(error).__name__, file=sys.stderr)
        return 1
    print(json.dumps(None if before is None or after is None else after - before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
