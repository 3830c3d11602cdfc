"""Runs an exported file on stored inputs in a fresh process, by its runtime alone.

As a program it imports only numpy and the runtime, nothing of autocompress:

    python -P verify.py onnx|onnx-int8|torch|executorch|RUNNER.py FILE FOLDER positional|keywords

RUNNER.py is a program text whose `runner(FILE)` gives the runner and what it runs on.
It reads every FOLDER/*.inputs.npz (one call each; "arg.NAME" is an input, in the order of the call) and
writes *.outputs.npz beside it (the outputs "0", "1", ...) and runtime.json. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = list[NDArray[Any]]
Runner = Callable[[Mapping[str, NDArray[Any]]], Arrays]

METRIC_TOLERANCE = 0.001
"""0.1 points of a metric between 0 and 1, else a thousandth of its value."""
QUANTIZED_METRIC_TOLERANCE = 0.01
"""How much worse a metric may be where an export quantizes: a point of a fraction to be maximised, else one per cent
of its value."""
OUTPUT_TOLERANCE = 1e-3
"""Of the largest absolute output."""


def save_inputs(folder: Path, call: str, inputs: Mapping[str, NDArray[Any]]) -> Path:
    """Stores the inputs of one call; the file."""
    named: dict[str, Any] = {f"arg.{name}": array for name, array in inputs.items()}
    path = folder / f"{call}.inputs.npz"
    np.savez(path, **named)
    return path


def load_inputs(folder: Path, call: str) -> dict[str, NDArray[Any]]:
    """The inputs of one call, in the call's order."""
    with np.load(folder / f"{call}.inputs.npz", allow_pickle=False) as file:
        return {name.removeprefix("arg."): file[name] for name in file.files}


def load_outputs(folder: Path, call: str) -> Arrays:
    """The outputs of one call that was run."""
    with np.load(folder / f"{call}.outputs.npz", allow_pickle=False) as file:
        return [file[str(index)] for index in range(len(file.files))]


def run_calls(folder: Path, run: Runner) -> None:
    """Runs every stored call and stores its outputs."""
    for path in sorted(folder.glob("*.inputs.npz")):
        call = path.name.removesuffix(".inputs.npz")
        inputs = load_inputs(folder, call)
        try:
            outputs = run(inputs)
        except Exception as error:
            size = next(iter(inputs.values())).shape[0]
            raise RuntimeError(f"at batch size {size}: {' '.join(str(error).split())[:300]}") from error
        outputs_by_index: dict[str, Any] = {str(index): array for index, array in enumerate(outputs)}
        np.savez(folder / f"{call}.outputs.npz", **outputs_by_index)


def run_apart(fmt: str, file: Path, folder: Path, *, keywords: bool) -> str:
    """Runs every stored call in a fresh process; the runtime and its version. Raises ExportError if that fails."""
    from autocompress.errors import ExportError

    convention = "keywords" if keywords else "positional"
    command = [sys.executable, "-P", __file__, fmt, str(file), str(folder), convention]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"the exported {file.name} does not run: {lines[-1]}")
    return str(json.loads((folder / "runtime.json").read_text())["runtime"])


def largest_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest absolute difference, infinite where shapes differ or only one side is finite."""
    return float(_differences(expected, found).max(initial=0.0))


def mean_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The mean absolute difference, infinite where the largest one is."""
    differences = _differences(expected, found)
    return float(differences.mean()) if differences.size else 0.0


def _differences(expected: NDArray[Any], found: NDArray[Any]) -> NDArray[Any]:
    if expected.shape != found.shape:
        return np.array([np.inf])
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    differences: NDArray[Any] = np.where(np.isnan(difference), np.inf, difference)
    return differences


def metrics_agree(expected: float, found: float) -> bool:
    """Whether two metrics differ by no more than `METRIC_TOLERANCE`."""
    scale = 1.0 if 0 <= expected <= 1 else abs(expected)
    return abs(expected - found) <= METRIC_TOLERANCE * scale + 1e-9


def quantized_metric_holds(expected: float, found: float, direction: str, share: float = 1.0) -> bool:
    """Whether `found` is worse than `expected` by no more than that share of `QUANTIZED_METRIC_TOLERANCE`."""
    scale = 1.0 if direction == "maximize" and 0 <= expected <= 1 else abs(expected)
    worse = expected - found if direction == "maximize" else found - expected
    return worse <= share * QUANTIZED_METRIC_TOLERANCE * scale + 1e-9


def _onnx_runner(file: str) -> tuple[Runner, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        feed = {name: array for name, array in inputs.items() if name in names}
        return [np.asarray(output) for output in session.run(None, feed)]

    return run, f"onnxruntime {onnxruntime.__version__}"


def _torch_runner(file: str, keywords: bool) -> tuple[Runner, str]:
    import torch

    torch.set_num_threads(1)
    module = torch.export.load(file).module()

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            outputs = module(**tensors) if keywords else module(*tensors.values())
        if isinstance(outputs, Mapping):
            outputs = list(outputs.values())
        return [tensor.numpy() for tensor in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]

    return run, f"torch {torch.__version__}"


def _executorch_runner(file: str) -> tuple[Runner, str]:
    """Calls of more examples than the program plans memory for are run in parts."""
    from importlib.metadata import version

    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    most = method.metadata.input_tensor_meta(0).sizes()[0]

    def run(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        parts = zip(*(torch.split(torch.from_numpy(array), most) for array in inputs.values()), strict=True)
        outputs = [[tensor.numpy().copy() for tensor in method.execute(list(part))] for part in parts]
        return [np.concatenate(column) for column in zip(*outputs, strict=True)]

    return run, f"executorch {version('executorch')}"


def runner(fmt: str, file: str, keywords: bool) -> tuple[Runner, str]:
    """What runs the file on a call's inputs, and the runtime and its version."""
    if fmt.endswith(".py"):
        made: tuple[Runner, str] = runpy.run_path(fmt)["runner"](file)
        return made
    if fmt.startswith("onnx"):
        return _onnx_runner(file)
    return _torch_runner(file, keywords) if fmt == "torch" else _executorch_runner(file)


def main(arguments: list[str]) -> int:
    """The program; 0 if every call was run."""
    fmt, file, folder, convention = arguments
    try:
        run, runtime = runner(fmt, file, convention == "keywords")
        run_calls(Path(folder), run)
    except Exception as error:
        print(" ".join(str(error).split())[:400] or type(error).__name__, file=sys.stderr)
        return 1
    (Path(folder) / "runtime.json").write_text(json.dumps({"runtime": runtime}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
