"""What a search makes small and fast: the file that an export of a trial's artifact would write, where it runs."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from autocompress.codec import container
from autocompress.codec.header import FAST
from autocompress.compress.artifact import load
from autocompress.compress.structure import map_tensors
from autocompress.deploy import latency
from autocompress.deploy.accuracy import metric_of
from autocompress.deploy.export import export
from autocompress.deploy.files import FILES, QUANTIZED, write_file
from autocompress.deploy.int8_choose import Choosing, decided_in
from autocompress.deploy.recorder import Recorder
from autocompress.deploy.verify import runner
from autocompress.errors import AutocompressError, ExportError, SpaceError, UsageError
from autocompress.plan import FLOAT_BITS, LayerPlan, Plan, uncompressed
from autocompress.record import Latency
from autocompress.tasks.batches import call_model, first_batch, to_device
from autocompress.tasks.wording import one_line
from autocompress.timing import Timing
from autocompress.trial import Budget, Deployed, Workbench, run_trial

if TYPE_CHECKING:
    from autocompress.search.space import Space
    from autocompress.tasks.task import Task

TARGETS = ("archive", "onnx", "onnx-int8", "executorch", "executorch-int8")
"""The formats that a search can aim at. A .pt2 file and an MLflow model hold their weights as they are."""
RANKS_ONLY = frozenset({"executorch", "executorch-int8"})
"""Targets whose files hold all weights in the same bits: fewer weights save bytes (ranks, and units that go), zeros and
fewer levels nothing."""
RANKS_SPACE = "lowrank_only"
"""The space that is searched for them where none is named."""
FAST_SPACE = "fast"
"""The space that is searched where latency is an objective and none is named."""
_TURNS = 15
"""Of timing a trial's file; the front's are timed again at the end."""


class Target:
    """What a trial's artifact is where it is to run; `run_trial` calls it as `deployed`.

    Of a target other than the archive `size_bytes` is the length of the file as an export writes it, without dead
    units. Where its runtime computes in 8 bits by itself the metric is what that gives. `timing` asks for the time of a
    call, of the archive's ONNX file. The uncompressed plan is the float32 model, in `baseline_bytes`. `seconds`: about
    how long a file takes to write, where that is known. `float_format` is the format of the float32 model's file.
    `answers` are the clock's so far on forms of 8-bit files (`int8_choose.Choosing`).
    """

    def __init__(
        self,
        name: str,
        timing: Timing | None = None,
        baseline_bytes: int = 0,
        seconds: float = 0.0,
        answers: Mapping[Any, list[float]] | None = None,
    ) -> None:
        self.name, self.timing, self.baseline_bytes, self.seconds = name, timing, baseline_bytes, seconds
        self.answers = dict(answers or {})
        self.format = "onnx" if name == "archive" else name
        self.float_format = self.format.removesuffix("-int8")
        self._base: latency.Float32 | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers make their own sessions."""
        return Target, (self.name, self.timing, self.baseline_bytes, self.seconds, self.answers)

    @property
    def batch(self) -> int:
        """Examples of the calls that are timed."""
        return 1 if self.timing is None else self.timing.batch

    @property
    def exports(self) -> bool:
        """Whether anything but the artifact itself is measured."""
        return self.name != "archive" or self.timing is not None

    def __call__(self, task: Task, artifact: bytes, plan: Plan) -> Deployed:
        """Raises ExportError for what cannot be exported."""
        if not self.exports:
            return Deployed(len(artifact))
        archive = self.name == "archive"
        if all(layer == LayerPlan() for layer in plan.layers.values()):
            return Deployed(len(artifact) if archive else self.baseline_bytes, None if self.timing is None else 1.0)
        with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
            path = Path(scratch) / FILES["archive"]
            path.write_bytes(artifact)
            recorder, file, decided = self._written(task, path)
            length = len(artifact) if archive else file.stat().st_size
            ratio = None if self.timing is None else self._ratio(task, file, self.timing)
            metric = self._metric(task, recorder, file, "val") if self.name in QUANTIZED else None
            return Deployed(length, ratio, metric, decided)

    def tested(
        self,
        task: Task,
        artifacts: Mapping[int, Path],
        *,
        decided: Mapping[int, Any] | None = None,
        untested: Collection[int] | None = None,
    ) -> tuple[dict[int, float], dict[int, tuple[Latency, ...]]]:
        """By trial the test metrics of those `untested` (None: all) in the runtime and, with `timing`, all latencies.

        `decided` is what the writers of their files decided in the trials. No metrics of the archive, which are the
        artifacts' own. Calls take turns. Raises ExportError for what cannot be exported.
        """
        metrics: dict[int, float] = {}
        untested = artifacts.keys() if untested is None else untested
        if not self.exports:
            return metrics, {}
        with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
            files: dict[int, Path] = {}
            for number, artifact in artifacts.items():
                if self.timing is None and number not in untested:
                    continue
                recorder, file, _ = self._written(task, artifact, (decided or {}).get(number), folder=Path(scratch))
                if self.name != "archive" and number in untested:
                    metrics[number] = self._metric(task, recorder, file, "test")
                files[number] = file.rename(file.with_name(f"{number}-{file.name}"))
            if self.timing is None:
                return metrics, {}
            base = latency.float32(task, task.test, Path(scratch), [self.timing.batch], self.timing.threads)
            return metrics, latency.in_files(base, files, self.format, self.timing.threads)

    def _written(
        self, task: Task, artifact: Path, decided: Mapping[str, Any] | None = None, *, folder: Path | None = None
    ) -> tuple[Recorder, Path, dict[str, Any] | None]:
        """The target's file of an artifact, in the folder, else beside it, and what its writer decided."""
        folder = folder or artifact.parent
        recorder = _called(task, load(artifact, model=task.model), folder)
        file = folder / FILES[self.format]
        choosing = Choosing(self.batch, decided, self.answers)
        details = write_file(self.format, artifact, recorder, file, task=task, choosing=choosing)
        return recorder, file, decided_in(details)

    def _metric(self, task: Task, recorder: Recorder, file: Path, split: Literal["val", "test"]) -> float:
        run, _ = runner(self.float_format, str(file), recorder.keywords)
        try:
            return metric_of(task, recorder, run, split)
        except AutocompressError:
            raise
        except Exception as error:  # the runtimes' own exceptions have no common base
            raise ExportError(f"the exported {file.name} does not run: {one_line(error)}") from error

    def _ratio(self, task: Task, file: Path, timing: Timing) -> float:
        """The time of a call over the float32 model's."""
        if self._base is None:
            with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
                self._base = latency.float32(task, task.val, Path(scratch), [timing.batch], timing.threads)
        return latency.in_files(self._base, {0: file}, self.format, timing.threads, turns=_TURNS)[0][0].ratio


def prepared(name: str, timing: Timing | None, bench: Workbench, *, begun: bool = False) -> Target:
    """The target of a search that begins: the float32 model's bytes in it (0: the archive) and the time of its call.

    The float32 model is exported and verified as `export` does, on validation data. What the clock says of its layers'
    forms holds for every trial of the same structure. Of a study that has `begun` all but that and the seconds of a
    file is known, and not measured. Raises ExportError for a model that the target cannot run.
    """
    if name == "archive" and timing is None:
        return Target(name)
    plan = uncompressed(bench.layers)
    (whole,) = run_trial(bench, plan, Budget((1.0,)), effort=FAST)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        folder = Path(scratch)
        path = folder / FILES["archive"]
        path.write_bytes(whole.artifact)
        target = Target(name, timing)
        if not begun:
            as_val = replace(bench.task, test=bench.task.val)
            export(path, as_val, target.float_format, folder / "out", {}, timed=False)
        began = time.monotonic()
        target._written(bench.task, path)
        seconds = time.monotonic() - began
        length = 0
        if begun:
            return Target(name, timing, length, seconds, target.answers)
        if name != "archive":
            file = folder / FILES[target.float_format]
            recorder = _called(bench.task, copy.deepcopy(bench.task.model).cpu().eval(), folder)
            write_file(target.float_format, path, recorder, file, slim=False)
            length = file.stat().st_size
        if timing is not None:
            base = latency.float32(bench.task, bench.task.val, folder, [timing.batch], timing.threads)
            timing = timing.measured(latency.seconds_of(base))
    return Target(name, timing, length, seconds, target.answers)


def _called(task: Task, model: nn.Module, folder: Path) -> Recorder:
    """The model on the CPU, called with the first validation examples."""
    recorder = Recorder(model, folder)
    with torch.no_grad():
        call_model(recorder, to_device(_some(first_batch(task.val, 2)[0]), "cpu"))
    return recorder


def _some(inputs: object) -> object:
    """The first examples of a batch."""
    return map_tensors(inputs, lambda tensor: tensor[:2] if tensor.dim() else tensor)


def check_target(target: str, sampler: str = "tpe", effort: str = container.AUTO, timing: Timing | None = None) -> None:
    """Raise UsageError for a target that does not exist, or not with the sampler, effort and timing, and ExportError
    for one whose package is not installed."""
    if target not in TARGETS:
        raise UsageError(f"target is {target!r}, allowed: {', '.join(TARGETS)}")
    if timing is not None:
        if target in RANKS_ONLY:
            raise UsageError(f"latency is an objective and the target {target!r}: allowed: archive, onnx, onnx-int8")
        latency.check([timing.batch], timing.threads)
    if target != "archive" and effort != container.AUTO:
        raise UsageError(f"effort is {effort!r} and the target {target!r}: only archives are coded")
    if target in RANKS_ONLY:
        if sampler == "continuation":
            raise UsageError(
                f"sampler is {sampler!r} and the target {target!r}: it raises the price of bits, of which such a file "
                "gets no smaller; allowed: the other samplers"
            )
        from autocompress.deploy import executorch

        executorch.require(target)


def check_holds(target: str, space: Space) -> None:
    """Raise SpaceError for options of the space that make no file of the target smaller, by name."""
    if target not in RANKS_ONLY:
        return
    plan = space.middle(1.0)
    for name, layer in plan.layers.items():
        for option, value in _beyond_ranks(layer):
            raise SpaceError(
                f"the search space sets {option} (layer {name or 'model'!r}: {value}), of which a file of the target "
                f"{target!r} gets no smaller; allowed there: rank, width, scheme, svd (as in the space {RANKS_SPACE!r})"
            )
    if plan.recipe.rate:
        raise SpaceError(f"the search space sets rate ({plan.recipe.rate:g}), of which a file of the target {target!r} "
                         "gets no smaller")  # fmt: skip


def _beyond_ranks(layer: LayerPlan) -> list[tuple[str, float]]:
    options = {"bits": layer.bits, "activation_bits": layer.activation_bits}
    found: list[tuple[str, float]] = [(name, value) for name, value in options.items() if value != FLOAT_BITS]
    return found + ([("threshold", layer.threshold)] if layer.threshold else [])
