"""One trial: compress, finetune, write, read back, measure. Knows no Optuna and no Ray."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

import autocompress
from autocompress.codec import container
from autocompress.codec.tensors import Artifact
from autocompress.compress import apply, artifact, calibrate, lowrank, order
from autocompress.compress.activations import Activation, find_activations
from autocompress.compress.estimate import Estimator
from autocompress.compress.factors import Factoriser
from autocompress.compress.finetune import Batch, Feed, finetune
from autocompress.compress.infomax import Tap, last_layer
from autocompress.compress.layers import Inventory, find_layers
from autocompress.compress.lineage import State
from autocompress.compress.products import macs_of
from autocompress.compress.ranges import Grids, sample
from autocompress.compress.recalibrate import BATCHES, recalibrate
from autocompress.compress.responses import Inputs, gather
from autocompress.compress.structure import float_tensors, map_tensors
from autocompress.compress.units import Units
from autocompress.errors import AutocompressError, TaskError, TrialFailed
from autocompress.plan import LayerSpec, Measurement, Plan, Recipe, check
from autocompress.tasks.augment import augmented
from autocompress.tasks.batches import (
    batches,
    call_model,
    evaluate,
    first_batch,
    first_of,
    is_pair,
    join,
    num_batches,
    to_device,
)
from autocompress.tasks.randomness import preserved
from autocompress.tasks.task import Task
from autocompress.tasks.wording import one_line

DEFAULT_STEPS = 500
_CALIBRATION = (256, 8192, 2e11)
"""Least and most examples that factors are fitted to and checked on, and the multiply-accumulates to spend on them."""
CALIBRATION_EXAMPLES = 256
"""Training examples at most that layers' inputs are looked at with."""
_CALIBRATION_BYTES = 256 * 1024 * 1024
"""Of the largest input of a layer over all of these: examples are fewer where it would be more."""
_GUIDE_BYTES = 512 * 1024 * 1024
_ANY = 1 << 62
_END = object()


@dataclass(frozen=True)
class Budget:
    """How much a trial may spend: `rungs`, rising shares (0 to 1) of its recipe's epochs at which it is measured."""

    rungs: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        if not self.rungs or not rising or self.rungs[0] < 0 or self.rungs[-1] > 1:
            raise ValueError(f"rungs are {self.rungs}, allowed: rising shares of the epochs, 0 to 1")


@dataclass(frozen=True)
class Outcome:
    """What a trial gives at one rung: numbers, the file that they were measured on, the state behind it.

    `state()` is to be called before the next outcome is asked for, which trains the same tensors on.
    """

    measurement: Measurement
    artifact: bytes = field(repr=False)
    state: Callable[[], State] = field(repr=False)


@dataclass(frozen=True)
class Deployed:
    """What a trial's file is where it is to run: its bytes, and where these are measured there, the time of a call
    over the float32 model's, and the metric on validation data; what its writer decided by measuring."""

    size_bytes: int
    latency: float | None = None
    metric_val: float | None = None
    decided: Mapping[str, Any] | None = None


class Workbench:
    """A task made ready for many trials: layers found, SVDs and the model's own outputs kept once computed.

    The task's model is copied to `device`; the task itself is never changed.
    """

    def __init__(self, task: Task, device: str | torch.device | None = None) -> None:
        self.task = task
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = copy.deepcopy(task.model).to(self.device).eval()
        self._svds: dict[tuple[str, str], lowrank.Svd] = {}

    @cached_property
    def inventory(self) -> Inventory:
        """The model's layers, and what is carried exactly."""
        inputs = self.example()
        return find_layers(self.model, lambda model: call_model(model, inputs))

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers that a plan speaks of."""
        return self.inventory.layers

    def example(self) -> Any:
        """Inputs of one example, on the device."""
        inputs = self.task.example_inputs
        if inputs is None:  # a DataLoader gives a whole batch
            inputs = first_of(first_batch(self.task.val, 1)[0])
        return to_device(inputs, self.device)

    def svd(self, spec: LayerSpec, scheme: str) -> lowrank.Svd:
        """The SVD of a layer's original weight, computed once."""
        key = (spec.name, scheme)
        if key not in self._svds:
            weight = self.model.get_submodule(spec.name).weight
            if not torch.isfinite(weight).all():  # type: ignore[arg-type]
                raise TrialFailed(f"layer {spec.label!r} holds weights that are not finite")
            self._svds[key] = lowrank.svd(weight, scheme)  # type: ignore[arg-type]
        return self._svds[key]

    @cached_property
    def factoriser(self) -> Factoriser:
        """Factors of all schemes and criteria; the training data is looked at when they first need it."""
        return Factoriser(self.model, self.svd, self._layer_inputs, self._activations)

    def rank_errors(self, spec: LayerSpec, scheme: str, svd: str) -> tuple[tuple[int, float], ...]:
        """Ranks of a layer and their errors after the activation, as `Factoriser.errors`."""
        return self.factoriser.errors(spec, scheme, svd)

    def _factorable(self) -> list[LayerSpec]:
        return [spec for spec in self.layers if spec.factorable and spec.max_rank()]

    def _layer_inputs(self) -> dict[str, Inputs]:
        least, most, operations = _CALIBRATION
        examples = max(least, min(most, int(operations / max(1, sum(spec.macs for spec in self.layers)))))
        size = min(64, examples // 4)
        passed: list[Any] = []
        count = 0
        for inputs, targets in batches(self.task.train, size, shuffle_seed=0, device=self.device):
            passed.append(inputs)
            count += size if not isinstance(targets, Tensor) or not targets.dim() else len(targets)
            if count >= examples:
                break
        return gather(self.model, self._factorable(), passed, call_model)

    def _activations(self) -> dict[str, Activation]:
        inputs = self.example()
        return find_activations(self.model, self._factorable(), lambda model: call_model(model, inputs))

    @cached_property
    def calibration(self) -> Any:
        """Inputs of some hundred training examples as one batch, on the device: the same in each process.

        Of a split whose batches cannot be joined, the first batches that can.
        """
        example = self.example()
        most = calibrate.largest_input(self.model, self.layers, example, call_model) * 4
        wanted = max(1, min(CALIBRATION_EXAMPLES, _CALIBRATION_BYTES // max(1, most)))
        size = min(32, wanted)
        passed: list[Any] = []
        count = 0
        for inputs, _ in batches(self.task.train, size, shuffle_seed=0, device="cpu"):
            rows = calibrate.examples_in(inputs)
            if count and count + rows > wanted:
                break
            passed.append(inputs)
            count += rows
        if not passed:
            raise TaskError("train is empty")
        try:
            joined = join(passed)
        except TaskError:
            joined = passed[0]
        return to_device(joined, self.device)

    @cached_property
    def statistics(self) -> Mapping[str, calibrate.Statistics]:
        """Of the uncompressed model's layers' inputs, by layer name; computed once."""
        with preserved(0):
            return calibrate.gather(self.model, self.layers, [self.calibration], call_model)

    @cached_property
    def grids(self) -> Grids:
        """The ranges of layers' inputs by layer and bits, fitted to the uncompressed model's, each once."""
        return Grids(self._sampled)

    @cached_property
    def units(self) -> Units:
        """The units of the layers, and which of them a plan's width leaves."""
        return Units(self.model, self.layers, self.example, lambda: self.statistics)

    def _sampled(self) -> Mapping[str, Tensor]:
        with preserved(0):
            return sample(self.model, self.layers, [self.calibration], call_model)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training data."""
        count = num_batches(self.task.train, self.task.batch_size)
        if count is None:
            count = sum(1 for _ in batches(self.task.train, self.task.batch_size, shuffle_seed=0, device="cpu"))
        if not count:
            raise TaskError("train is empty")
        return count

    @property
    def default_epochs(self) -> float:
        """Epochs that amount to about `DEFAULT_STEPS` steps: what a recipe gets that names none."""
        return DEFAULT_STEPS / self.steps_per_epoch

    def feed(self, seed: int, distil: bool, infomax: bool = False) -> Feed:
        """Training batches, beside them the uncompressed model's outputs and features where they are asked for.

        Of augmented inputs those cannot be known in advance: they are computed as batches come.
        """
        task = self.task
        layer = self._last_layer if infomax else None
        kept = self._kept(distil, infomax) if task.augment is None else None

        def epoch(index: int) -> Iterator[Batch]:
            shuffle = (seed * 1_000_003 + index) % 2**63
            if kept is not None:
                inputs, targets = task.train
                order = torch.arange(len(inputs))
                for x, rows in batches((inputs, order), task.batch_size, shuffle_seed=shuffle, device="cpu"):
                    told = map_tensors(kept, lambda tensor, rows=rows: tensor.index_select(0, rows))  # type: ignore[misc]
                    yield to_device((x, targets[rows], *told), self.device)
                return
            for given, y in batches(task.train, task.batch_size, shuffle_seed=shuffle, device=self.device):
                x = augmented(task.augment, given)
                yield x, y, *self._told(x, distil, infomax)

        return Feed(epoch, self.steps_per_epoch, layer)

    def _told(self, x: Any, distil: bool, infomax: bool) -> tuple[Any, ...]:
        """What the uncompressed model tells of a batch: its outputs, or None, and with InfoMax its features."""
        if not distil and not infomax:
            return (None,)
        tap = Tap(self.model, self._last_layer) if infomax else None
        with torch.no_grad(), tap or nullcontext():
            outputs = call_model(self.model, x)
        return (outputs if distil else None, *([tap.features] if tap else []))

    def _kept(self, distil: bool, infomax: bool) -> tuple[Any, ...] | None:
        """`_told` of all training examples, where it is computed in advance."""
        told = (self._guides if distil else None, *([self._features] if infomax else []))
        wanted = (distil, infomax)
        lacking = any(what is None for what, asked in zip(told, wanted, strict=False) if asked)
        return None if lacking or not any(wanted) else told

    @cached_property
    def _last_layer(self) -> LayerSpec:
        inputs = self.example()
        with torch.no_grad():
            return last_layer(self.model, self.layers, lambda: call_model(self.model, inputs))

    def recalibrate(self, model: apply.Compressed) -> None:
        """Count batch normalisation's statistics anew, on the same training batches in every trial.

        They are augmented as those of finetuning are. The random state stays as it was.
        """
        task = self.task
        with preserved(seed=0):
            order = batches(task.train, task.batch_size, shuffle_seed=0, device=self.device)
            recalibrate(model, (augmented(task.augment, x) for x, _ in islice(order, BATCHES)))

    def written(self, model: apply.Compressed, effort: str = container.AUTO) -> bytes:
        """The file of a compressed model, its units in an order that takes fewer bytes where one is tried (`order`)."""
        source, tensors = self.task.model, model.encode()
        plain = artifact.described(source, model.plan, tensors, autocompress.__version__, grids=model.grids())
        data = container.pack(plain, effort)
        if not order.is_tried(tensors, effort):
            return data
        moved = order.ordered(tensors, self.units.wiring)
        if all(moved[key] is tensor for key, tensor in tensors.items()):
            return data
        other = replace(plain, tensors=moved)
        return min(data, container.pack(other, effort), key=len) if self._agree(plain, other) else data

    @cached_property
    def _batch(self) -> Any:
        """Inputs of a training batch, on the device; a loader is asked for it once."""
        with preserved(0):
            return next(iter(batches(self.task.train, self.task.batch_size, shuffle_seed=0, device=self.device)))[0]

    def _agree(self, one: Artifact, other: Artifact) -> bool:
        """Whether two artifacts compute the same on a batch of training inputs; not where no output is of floats."""
        inputs = self._batch
        found = []
        for each in (one, other):
            module = artifact.restore(each, self.task.model).to(self.device)
            with torch.no_grad(), preserved(0):
                found.append([tensor.double() for tensor in float_tensors(call_model(module, inputs))])
        first, second = found
        if not first or [a.shape for a in first] != [b.shape for b in second]:
            return False
        return all(map(order.is_near, first, second))

    @cached_property
    def _guides(self) -> Any:
        """The uncompressed model's outputs on a pair of tensors, once for all trials, if they fit in memory.

        A tensor or a tuple of the outputs' float tensors; None where they are not kept.
        """

        def guide(x: Tensor) -> Any:
            outputs = self._told(x, True, False)[0]
            return outputs if isinstance(outputs, Tensor) else tuple(float_tensors(outputs))

        return self._over_train(guide)

    @cached_property
    def _features(self) -> Any:
        """The uncompressed model's features (N, d) on a pair of tensors, in the same way."""
        return self._over_train(lambda x: self._told(x, False, True)[1])

    def _over_train(self, function: Callable[[Tensor], Any]) -> Any:
        """What a function gives on all training inputs, joined; None unless these are one tensor and it fits."""
        train = self.task.train
        if not is_pair(train):
            return None
        found = []
        for x in torch.split(train[0], 512):
            given = function(x.to(self.device))
            parts = list(float_tensors(given))
            if not parts or any(part.dim() == 0 or len(part) != len(x) for part in parts):
                return None
            if sum(part.nbytes for part in parts) / len(x) * len(train[0]) > _GUIDE_BYTES:
                return None
            found.append(to_device(given, "cpu"))
        return join(found)

    @cached_property
    def _estimator(self) -> Estimator:
        return Estimator(self.model, self.layers, self.svd, autocompress.__version__, factoriser=self.factoriser)

    def estimate(self, plan: Plan) -> int:
        """About the bytes of the plan's file at rung 0 and effort "auto", without compressing the model.

        Units stand as in the model: a file in which another order pays (`order`) is up to 5 % smaller.
        The first plans take up to seconds, in which layers are sorted and coded at a few settings; later
        ones take milliseconds. Raises PlanError and TrialFailed as `run_trial` does.
        """
        check(plan, self.layers)
        self.units.check(plan)
        return self._estimator.size_bytes(plan)

    def baseline_bytes(self) -> int:
        """The length of the model's float32 state as a safetensors file, shared tensors once."""
        from safetensors.torch import save

        state = artifact.unique_state(self.model)
        floats = {k: t.detach().cpu().contiguous() for k, t in state.items()}
        return len(save({k: t.float() if t.is_floating_point() else t for k, t in floats.items()}))


def _as_it_is(_: Task, artifact: bytes, plan: Plan) -> Deployed:
    return Deployed(len(artifact))


def run_trial(
    task: Task | Workbench,
    plan: Plan,
    budget: Budget | None = None,
    seed: int = 0,
    start: State | None = None,
    *,
    effort: str = container.AUTO,
    deployed: Callable[[Task, bytes, Plan], Deployed] = _as_it_is,
) -> Iterator[Outcome]:
    """The outcomes of a plan, one at each rung of the budget, from a model that the file decodes to.

    `start` is the state of a finished trial to go on from, `deployed(task, artifact, plan)` what counts where that is
    not the file itself (`deploy.target`), `effort` the coder of the files
    (`codec.container.EFFORTS`). Nothing global is changed: the random
    state is put back between outcomes. Raises PlanError for a plan that the layers cannot carry
    out and TrialFailed where the loss or the metric is not finite.
    """
    bench = task if isinstance(task, Workbench) else Workbench(task)
    check(plan, bench.layers)
    steps = _outcomes(bench, plan, budget or Budget(), seed, start, effort=effort, deployed=deployed)
    generator = _Seeded(seed)
    while True:
        with generator:
            outcome = next(steps, None)
        if outcome is None:
            return
        yield outcome


def _outcomes(
    bench: Workbench,
    plan: Plan,
    budget: Budget,
    seed: int,
    start: State | None,
    *,
    effort: str,
    deployed: Callable[[Task, bytes, Plan], Deployed],
) -> Iterator[Outcome]:
    began = time.monotonic()
    recipe, specs = plan.recipe, bench.layers
    model = apply.compress(
        bench.model,
        specs,
        plan,
        bench.svd,
        start,
        factoriser=bench.factoriser,
        grids=bench.grids,
        units=bench.units,
        calibration=lambda: bench.calibration,
    )
    read = bench.units.read(plan)
    epochs = recipe.epochs
    rungs = [share * epochs for share in budget.rungs] if epochs > 0 else [0.0]
    feed = bench.feed(seed, recipe.distillation > 0, recipe.infomax > 0) if epochs > 0 else None
    reached: Iterator[float] = iter(rungs)
    if feed is not None:
        own = bench.task.finetune
        reached = (finetune if own is None else _guarded(own))(model, feed, bench.task.loss, recipe, rungs)
    for rung, epoch in enumerate(reached):
        if model.codes:
            bench.recalibrate(model)
        if (name := model.broken()) is not None:
            raise TrialFailed(f"after {epoch:g} epochs of finetuning {name!r} holds values that are not finite")
        data = bench.written(model, effort)
        decoded = artifact.restore(container.unpack(data, max_elements=_ANY), bench.task.model).to(bench.device)
        found = deployed(bench.task, data, plan)
        metric = evaluate(bench.task, decoded, "val") if found.metric_val is None else found.metric_val
        numbers = Measurement(
            rung=rung,
            epoch=epoch,
            size_bytes=found.size_bytes,
            metric_val=metric,
            macs=macs_of(specs, model.plan, read),
            seconds=time.monotonic() - began,
            latency=found.latency,
            decided=found.decided,
        )
        yield Outcome(numbers, data, model.state)


def _guarded(own: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[float]]:
    """A task's own finetune function: its exceptions become TrialFailed, and it must reach every rung."""

    def guarded(
        model: apply.Compressed, feed: Feed, loss: Callable[[Any, Any], Tensor], recipe: Recipe, rungs: Sequence[float]
    ) -> Iterator[float]:
        try:
            reached = iter(own(model, feed, loss, recipe, list(rungs)))
            for rung in rungs:
                if next(reached, _END) is _END:
                    raise TrialFailed(f"the task's finetune ended before rung {rung:g} of {list(rungs)}")
                yield rung
        except AutocompressError:
            raise
        except Exception as error:
            raise TrialFailed(f"the task's finetune raised {one_line(error)}") from error

    return guarded


class _Seeded:
    """A context with random numbers of its own: goes on where it left off, puts the caller's back."""

    def __init__(self, seed: int) -> None:
        with preserved(seed % 2**32):
            self.inner = _random_state()

    def __enter__(self) -> None:
        self.outer = _random_state()
        _set_random_state(self.inner)

    def __exit__(self, *problem: Any) -> None:
        self.inner = _random_state()
        _set_random_state(self.outer)


def _random_state() -> tuple[Any, Any, Tensor, list[Tensor]]:
    """The states of Python's, NumPy's and torch's generators, CUDA's too where it is in use."""
    cuda: Any = torch.cuda  # its functions are not annotated
    on_devices = cuda.get_rng_state_all() if cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def _set_random_state(state: tuple[Any, Any, Tensor, list[Tensor]]) -> None:
    cuda: Any = torch.cuda
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        cuda.set_rng_state_all(state[3])
