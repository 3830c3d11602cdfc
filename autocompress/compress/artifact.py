"""Artifact <-> nn.Module: what a trial writes, and `autocompress.load`."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.codec import container
from autocompress.codec.container import Archive, Part
from autocompress.codec.header import Entry
from autocompress.codec.tensors import Artifact, Coded, Raw
from autocompress.compress import architecture, lowrank, ranges
from autocompress.compress import runtime as runtimes
from autocompress.compress.calibrate import is_layer
from autocompress.compress.scales import expanded
from autocompress.compress.unwrapped import unwrapped
from autocompress.errors import ArtifactError
from autocompress.plan import LayerPlan, Plan

SCALE = "#scale"
"""What follows a weight's key in the name of the scales that its levels are multiplied by."""
_SHORT = ("float16", "bfloat16")
_MANY = 1 << 18
"""Elements of a file from which it is worth decoding in threads."""


def raw_tensor(tensor: Tensor) -> Raw:
    """The tensor as the artifact carries it exactly."""
    name = str(tensor.dtype).removeprefix("torch.")
    values = tensor.detach().cpu().contiguous()
    bits = values.view(torch.uint16) if tensor.dtype == torch.bfloat16 else values
    return Raw(bits.numpy(), name)


def to_tensor(entry: Coded | Raw) -> Tensor:
    """The entry as a tensor of its dtype."""
    if isinstance(entry, Coded):
        return torch.from_numpy(entry.values()).to(getattr(torch, entry.dtype))
    array = np.require(entry.array, requirements=["W"])
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if entry.dtype == "bfloat16" else tensor


def write(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Coded | Raw],
    version: str,
    effort: str = container.AUTO,
    *,
    grids: Mapping[str, ranges.Grid] | None = None,
) -> bytes:
    """The bytes of the file of `described`; `effort` is one of `container.EFFORTS`."""
    return container.pack(described(model, plan, tensors, version, grids=grids), effort)


def described(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Coded | Raw],
    version: str,
    *,
    grids: Mapping[str, ranges.Grid] | None = None,
) -> Artifact:
    """What a file holds. `model` is the uncompressed one: its architecture goes in where it is a standard tree.

    `grids` are the ranges of layers' inputs by layer name.
    """
    header = described_plan(plan, version) | described_model(model) | described_grids(grids or {})
    return Artifact(tensors, header)


def described_plan(plan: Plan, version: str) -> dict[str, Any]:
    """What a file's header says of its plan."""
    ranks = {
        name: [layer.rank if layer.core is None else list(layer.core), layer.scheme]
        for name, layer in plan.layers.items()
        if layer.rank is not None
    }
    plans = {name: [layer.bits, round(layer.threshold, 6)] for name, layer in plan.layers.items()}
    return {"made_by": version, "ranks": ranks, "plan": plans}


def described_grids(grids: Mapping[str, ranges.Grid]) -> dict[str, Any]:
    """What a file's header says of layers' inputs: nothing where they are floats."""
    told = {name: [grid.bits, grid.scale, grid.zero_point] for name, grid in grids.items()}
    return {"activations": told} if told else {}


def described_model(model: nn.Module) -> dict[str, Any]:
    """What a file's header says of the uncompressed model: its tree of standard layers, or its class."""
    tree = architecture.describe(model)
    return {"class": type(model).__name__} if tree is None else {"model": tree}


def read(path: str | Path) -> Artifact:
    """The decoded file. Raises ArtifactError where it is missing, damaged or no artifact."""
    with _named(path):
        return container.unpack(_bytes_of(path))


@contextmanager
def opened(path: str | Path) -> Iterator[Archive]:
    """The file, whose tensors are decoded when they are asked for. Raises ArtifactError as `read` does."""
    with _named(path):
        yield Archive(_bytes_of(path))


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    runtime: runtimes.Runtime = "factorised",
    batch: int = 1,
    example: Any = None,
) -> nn.Module:
    """The compressed model, in eval mode on the CPU, computing exactly what its trial measured.

    Other runtimes compute the same but for rounding. `runtime`: "factorised" has two layers in the place of one of
    low rank; "dense" has the modules of the original architecture alone; "sparse" is "factorised" with `SparseLinear`
    for each nn.Linear of at least 80 % zeros; "auto" times these layer by layer on this machine (some hundredths of a
    second each), with the inputs that they get in a call of the model with `example` or else with `batch` rows, and
    takes what needs at most 95 % of the dense layer's time. Convolutions are wide or narrow by their images: for them
    an example is better.

    `model`, an instance of the original architecture (its weights do not matter; wrapped or not, see `unwrapped`), is
    needed unless the model is a tree of nn.Sequential and standard layers; it is copied, not changed.
    Large files are decoded in several threads (torch.get_num_threads() of them), a part at a time.
    Raises ArtifactError for a damaged file, a missing or a wrong architecture (named by tensor
    and shape), UsageError for another runtime. Nothing in the file is executed and nothing that it names is imported.
    """
    runtimes.check(runtime, batch)
    source, data = str(path), _bytes_of(path)
    model = None if model is None else unwrapped(model)
    own = 0 if model is None else sum(tensor.numel() for tensor in unique_state(model).values())
    with _named(path):
        archive = Archive(data, max(container.MAX_ELEMENTS, own))
    shapes = {name: entry.shape for name, entry in archive.entries.items()}
    module = _skeleton(archive.header, shapes, model, source)  # before memory is taken for tensors
    with _named(path):
        module = _filled(module, archive)
    wholes = _wholes(archive.header, model, source) if runtime in ("dense", "auto") else {}
    module = runtimes.arranged(module, wholes, runtime, batch=batch, example=example)
    return _with_grids(module, archive.header, source)


def restore(artifact: Artifact, model: nn.Module | None = None, source: str = "artifact") -> nn.Module:
    """`load` for an artifact that is decoded already."""
    shapes = {name: tensor.shape for name, tensor in artifact.tensors.items()}
    model = None if model is None else unwrapped(model)
    module = _ready(_skeleton(artifact.header, shapes, model, source), artifact.tensors)
    fill(module, artifact.tensors)
    return _with_grids(module.eval(), artifact.header, source)


def unique_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by state key, each tensor once under its first name."""
    seen: dict[int, str] = {}
    return {
        key: tensor
        for key, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and seen.setdefault(id(tensor), key) == key
    }


def fill(module: nn.Module, tensors: Mapping[str, Coded | Raw]) -> None:
    """Copy the tensors into the module's state; keys and shapes must fit."""
    with torch.no_grad():
        state = unique_state(module)
        for key, target in state.items():
            target.copy_(to_tensor(tensors[key]))
        for key in _scaled(state, tensors):
            _multiply(state[key], to_tensor(tensors[key + SCALE]))


def _scaled(state: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """The keys of weights that have scales."""
    found = (name.removesuffix(SCALE) for name in names if name.endswith(SCALE) and name not in state)
    return [key for key in found if key in state]


def _multiply(weight: Tensor, scale: Tensor) -> None:
    """Multiply a weight by its scales: (rows,), or (rows, groups) of columns of the weight as a matrix."""
    rows = weight.view(len(weight), -1)
    rows.mul_(expanded(scale.to(weight).view(len(weight), -1), (rows.shape[0], rows.shape[1])))


def _bytes_of(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"artifact {str(path)!r} cannot be read: {error.strerror or error}") from error


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except MemoryError:
        raise ArtifactError(f"{path}: it asks for more memory than there is") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _hollow(model: nn.Module) -> nn.Module:
    """A copy whose parameters and persistent buffers hold no values yet: theirs come from a file."""
    memo: dict[int, Any] = {}
    for tensor in unique_state(model).values():
        if type(tensor) in (nn.Parameter, Tensor) and not tensor.__dict__ and not tensor.is_meta:
            empty = torch.empty_like(tensor, device="cpu", requires_grad=False)
            parameter = type(tensor) is nn.Parameter
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    return copy.deepcopy(model, memo)


def _skeleton(
    header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module | None, source: str
) -> nn.Module:
    """The module that tensors of these shapes go into, without their values."""
    if model is not None:
        module = _hollow(model).cpu()
    elif "model" in header:
        module = architecture.build(header["model"])
    else:
        raise ArtifactError(
            f"{source} holds the weights of a {header.get('class', 'model')!r} whose architecture is not a "
            "tree of standard layers: give it as load(path, model=YourModel())"
        )
    ranks = {name: (_layer(module, name, source), found) for name, found in _ranks(header, source).items()}
    for name, (layer, plan) in ranks.items():
        module = _factorise(module, layer, name, plan, source)
    _check_shapes(module, shapes, source)
    return module


def _ready(module: nn.Module, tensors: Mapping[str, Coded | Raw | Entry]) -> nn.Module:
    """The module with memory for its tensors, whose dtypes must fit."""
    for key, target in unique_state(module).items():
        found, wanted = tensors[key].dtype, str(target.dtype).removeprefix("torch.")
        if found != wanted and not (found in _SHORT and target.is_floating_point()):  # 16 bits of a wider weight
            raise ArtifactError(f"{key!r} is {found} in the artifact, {wanted} in the given model")
    if any(tensor.is_meta for tensor in unique_state(module).values()):
        try:
            module = module.to_empty(device="cpu")
        except RuntimeError as error:
            raise MemoryError from error  # which is what torch means
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # else other kernels, other last bits
    return module


def _filled(module: nn.Module, archive: Archive) -> nn.Module:
    """The module with an archive's values, decoded part by part."""
    module = _ready(module, archive.entries)
    state = unique_state(module)
    size = sum(entry.elements for entry in archive.entries.values())
    threads = torch.get_num_threads() if size > _MANY else 1
    places = {name: state[name].detach() for name in archive.entries if name in state}
    rows = {name: place.contiguous() for name, place in places.items()}  # parts are told in the order of rows
    jobs = ((rows[name], archive.entries[name].dtype, part) for name in rows for part in archive.parts(name))
    if threads == 1:
        for job in jobs:
            _put(*job)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in _ahead(pool, jobs, 4 * threads):
                done.result()
    with torch.no_grad():
        for name, place in places.items():
            if not place.is_contiguous():
                place.copy_(rows[name])
        for key in _scaled(state, archive.entries):
            _multiply(state[key], to_tensor(archive.tensor(key + SCALE)))
    return module.eval()


def _put(target: Tensor, dtype: str, part: Part) -> None:
    """Decode a part into its place."""
    place = target.view(-1)[part.start : part.stop]
    if target.dtype == torch.float32 and dtype == "float32" and target.is_cpu:
        part.into(place.numpy())
        return
    values = torch.from_numpy(part.values())
    if dtype == "bfloat16" and values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    values = values.to(getattr(torch, dtype))
    with torch.no_grad():
        place.copy_(values)


def _ahead(pool: ThreadPoolExecutor, jobs: Iterator[tuple[Tensor, str, Part]], most: int) -> Iterator[Future[None]]:
    """The jobs' futures in order, no more than `most` of them begun and not taken."""
    waiting: deque[Future[None]] = deque()
    for job in jobs:
        waiting.append(pool.submit(_put, *job))
        if len(waiting) >= most:
            yield waiting.popleft()
    yield from waiting


def _wholes(header: Mapping[str, Any], model: nn.Module | None, source: str) -> dict[str, runtimes.Whole]:
    """The layers of the original architecture that are factors in the file."""
    ranks = _ranks(header, source)
    if not ranks:
        return {}
    original = architecture.build(header["model"]) if model is None else model
    return {name: runtimes.Whole(original.get_submodule(name), plan.scheme) for name, plan in ranks.items()}


def _check_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    wanted = unique_state(module)
    scaled = _scaled(wanted, shapes)
    for key in scaled:
        shape, target = shapes[key + SCALE], wanted[key]
        columns = target.numel() // max(1, len(target)) if target.dim() > 1 else 0
        groups = shape[1] if len(shape) == 2 else 1
        if len(shape) not in (1, 2) or shape[:1] != tuple(target.shape[:1]) or not 1 <= groups <= columns:
            raise ArtifactError(f"{source} has scales of shape {list(shape)} for {key!r} of shape {list(target.shape)}")
    for key in shapes:
        if key not in wanted and key.removesuffix(SCALE) not in scaled:
            raise ArtifactError(f"{source} holds {key!r}, which the given model does not have")
    for key, target in wanted.items():
        if key not in shapes:
            raise ArtifactError(f"the given model has {key!r} of shape {list(target.shape)}, {source} does not")
        if shapes[key] != tuple(target.shape):
            found = f"{list(shapes[key])} in {source}, {list(target.shape)} in the given model"
            raise ArtifactError(f"{key!r} has shape {found}")


def _ranks(header: Mapping[str, Any], source: str) -> dict[str, LayerPlan]:
    """Rank, scheme and core of the layers that are factors in the file."""
    ranks = header.get("ranks", {})
    if not isinstance(ranks, dict):
        raise ArtifactError(f"{source} is damaged: its ranks are no table")
    result = {}

    def whole(*numbers: Any) -> bool:
        return all(type(number) is int and number > 0 for number in numbers)

    for name, value in ranks.items():
        match value:
            case [rank, "channel" | "spatial" as scheme] if whole(rank):
                result[name] = LayerPlan(rank=rank, scheme=scheme)
            case [[few, many], "tucker"] if whole(few, many):
                result[name] = LayerPlan(rank=1, scheme="tucker", core=(few, many))
            case _:
                raise ArtifactError(f"{source} is damaged: rank of {name!r} is {value!r}")
    return result


def _grids(header: Mapping[str, Any], source: str) -> dict[str, ranges.Grid]:
    """The ranges of layers' inputs, by layer name."""
    told = header.get("activations", {})
    if not isinstance(told, dict):
        raise ArtifactError(f"{source} is damaged: its activations are no table")
    result = {}
    for name, value in told.items():
        match value:
            case [int(bits), int() | float() as scale, int(zero)] if (
                not any(isinstance(each, bool) for each in value)
                and 1 <= bits <= 16
                and 1e-30 < scale < 1e30
                and 0 <= zero < 1 << bits
            ):
                result[name] = ranges.Grid(bits, float(scale), zero)
            case _:
                raise ArtifactError(f"{source} is damaged: activations of {name!r} are {value!r}")
    return result


def _with_grids(module: nn.Module, header: Mapping[str, Any], source: str) -> nn.Module:
    """The module, layers' inputs passing through the ranges that the header has for them.

    Of a shared weight every layer gets its range.
    """
    for name, grid in _grids(header, source).items():
        weight = getattr(_layer(module, name, source), "weight", None)
        same = [path for path, other in module.named_modules() if is_layer(other) and other.weight is weight]
        ranges.attach(module, name, grid, same)
    return module


def _layer(module: nn.Module, name: str, source: str) -> nn.Module:
    try:
        return module.get_submodule(name) if name else module
    except AttributeError:
        raise ArtifactError(f"{source} has a layer {name!r}, which the given model does not have") from None


def _factorise(module: nn.Module, target: nn.Module, name: str, plan: LayerPlan, source: str) -> nn.Module:
    standard = isinstance(target, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not standard or (plan.scheme != "channel" and not isinstance(target, nn.Conv2d)):
        count = ("two", "three")[lowrank.parts_of(plan.scheme) - 2]
        raise ArtifactError(
            f"layer {name!r} is a {type(target).__name__} in the given model, {source} has {count} factors"
        )
    weight: Tensor = target.weight  # type: ignore[assignment]
    if plan.core is not None:
        pairs = list(zip(plan.core, (weight.shape[1], weight.shape[0]), strict=True))
    else:
        pairs = [(plan.rank or 1, min(lowrank.as_matrix(weight, plan.scheme).shape))]
    for rank, full in pairs:
        if rank > full:
            raise ArtifactError(f"layer {name!r} has rank {rank} in {source}, {full} is full in the given model")
    try:
        factors = lowrank.factorised(target, plan)
    except Exception as error:  # whatever a constructor says of a layer's settings from a damaged file
        raise ArtifactError(f"{source}: layer {name!r} cannot have factors ({error})") from error
    return lowrank.replace(module, name, factors)
