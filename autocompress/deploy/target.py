"""What a search makes small: the bytes of the file that an export of a trial's artifact would write."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from autocompress.codec import container
from autocompress.compress.artifact import load
from autocompress.deploy.export import FILES, export, write_file
from autocompress.deploy.recorder import Recorder
from autocompress.errors import SpaceError, UsageError
from autocompress.plan import FLOAT_BITS, LayerPlan, uncompressed
from autocompress.tasks.batches import call_model, first_batch, to_device
from autocompress.trial import Budget, Workbench, run_trial

if TYPE_CHECKING:
    from autocompress.search.space import Space
    from autocompress.tasks.task import Task

TARGETS = ("archive", "onnx", "onnx-int8", "executorch", "executorch-int8")
"""The formats that a search can aim at. A .pt2 file and an MLflow model hold their weights as they are."""
RANKS_ONLY = frozenset({"executorch", "executorch-int8"})
"""Targets whose files hold weights of one width: what prunes weights or gives them fewer levels saves nothing."""
RANKS_SPACE = "lowrank_only"
"""The space that is searched for them where none is named."""


@dataclass(frozen=True)
class FileSize:
    """Gives the bytes of an artifact's file for the target, without dead units, in the same form as `export` does."""

    target: str

    def __call__(self, task: Task, artifact: bytes) -> int:
        """Raises ExportError for what cannot be exported."""
        if self.target == "archive":
            return len(artifact)
        with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
            path = Path(scratch) / FILES["archive"]
            path.write_bytes(artifact)
            return self._written(task, load(path, model=task.model), path, slim=True)

    def baseline(self, bench: Workbench) -> int | None:
        """The bytes of the float32 model's file, with nothing cut; None for the archive.

        The file is verified as `export` does, but on validation data. Raises ExportError for a model that the target
        cannot run.
        """
        if self.target == "archive":
            return None
        target = self.target.removesuffix("-int8")
        (whole,) = run_trial(bench, uncompressed(bench.layers), Budget((1.0,)))
        with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
            path = Path(scratch) / FILES["archive"]
            path.write_bytes(whole.artifact)
            export(path, replace(bench.task, test=bench.task.val), target, Path(scratch) / "out", {})
            model = copy.deepcopy(bench.task.model).cpu().eval()
            return FileSize(target)._written(bench.task, model, path, slim=False)

    def _written(self, task: Task, model: nn.Module, artifact: Path, *, slim: bool) -> int:
        folder = artifact.parent
        recorder = Recorder(model, folder)
        with torch.no_grad():
            call_model(recorder, to_device(_some(first_batch(task.val, 2)[0]), "cpu"))
        file = folder / FILES[self.target]
        write_file(self.target, artifact, recorder, file, slim=slim, task=task)
        return file.stat().st_size


def _some(inputs: object) -> object:
    """The first examples of a batch."""
    from autocompress.compress.structure import map_tensors

    return map_tensors(inputs, lambda tensor: tensor[:2] if tensor.dim() else tensor)


def check_target(target: str, sampler: str = "tpe", effort: str = container.AUTO) -> None:
    """Raise UsageError for a target that does not exist, or not with the sampler and effort, and ExportError for one
    whose package is not installed."""
    if target not in TARGETS:
        raise UsageError(f"target is {target!r}, allowed: {', '.join(TARGETS)}")
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
                f"{target!r} gets no smaller; allowed there: rank, scheme, svd (as in the space {RANKS_SPACE!r})"
            )
    if plan.recipe.rate:
        raise SpaceError(f"the search space sets rate ({plan.recipe.rate:g}), of which a file of the target {target!r} "
                         "gets no smaller")  # fmt: skip


def _beyond_ranks(layer: LayerPlan) -> list[tuple[str, float]]:
    options = {"bits": layer.bits, "activation_bits": layer.activation_bits}
    found: list[tuple[str, float]] = [(name, value) for name, value in options.items() if value != FLOAT_BITS]
    return found + ([("threshold", layer.threshold)] if layer.threshold else [])
