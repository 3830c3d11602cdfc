"""Calls of a model, recorded: their inputs and outputs as arrays, by the names that they get in a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.deploy import verify
from autocompress.errors import ExportError

Named = dict[str, NDArray[Any]]


class Recorder(nn.Module):
    """Passes calls on to `module`, with arguments by name if `keywords`.

    Inputs are made contiguous, as they are stored: another layout may give a convolution's outputs other last bits.
    Keeps by call their inputs in `folder` and their outputs in memory.
    """

    def __init__(self, module: nn.Module, folder: Path, *, keywords: bool = False) -> None:
        super().__init__()
        self.module, self.folder, self.model = module, folder, type(module).__name__
        self.outputs: dict[str, Named] = {}
        self.examples = 0
        self.keywords = keywords
        self.structure: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs for the next batch of the test set."""
        self.keywords = bool(kwargs)
        inputs = arrays_of(self.model, "input", self._by_name(args, kwargs))
        self.structure = call_module(self.module, inputs, self.keywords)
        self._keep(f"test-{len(self.outputs):06d}", inputs, self.structure)
        self.examples += examples_of(self.model, inputs)
        return self.structure

    def run(self, call: str, inputs: Named) -> None:
        """Records one more call."""
        self.structure = call_module(self.module, inputs, self.keywords)
        self._keep(call, inputs, self.structure)

    def first(self, count: int) -> Named:
        """The inputs of the first `count` test examples (or examples of any calls), or of all if there are fewer."""
        parts: list[Named] = []
        for call in self.tests or self.outputs:
            parts.append(verify.load_inputs(self.folder, call))
            if sum(examples_of(self.model, part) for part in parts) >= count:
                break
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def repeated(self, count: int) -> Named:
        """The inputs of `count` examples: the first ones, from the start again where there are fewer."""
        return {name: np.resize(array, (count, *array.shape[1:])) for name, array in self.first(count).items()}

    def named(self, inputs: Any) -> Named:
        """A batch's inputs by the names that they get in a file."""
        keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = () if keywords else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        return arrays_of(self.model, "input", self._by_name(args, keywords))

    @property
    def tests(self) -> list[str]:
        """The calls that make up the test set, in order."""
        return [call for call in self.outputs if call.startswith("test-")]

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs in the order of the model's signature, by the names that they get in a file."""
        if not kwargs:
            return dict(zip(numbered("input", len(args)), args, strict=True))
        declared = [name for name in inspect.signature(self.module.forward).parameters if name in kwargs]
        return {name: kwargs[name] for name in (*declared, *(name for name in kwargs if name not in declared))}

    def _keep(self, call: str, inputs: Named, outputs: Any) -> None:
        self.outputs[call] = arrays_of(self.model, "output", output_tensors(self.model, outputs))
        verify.save_inputs(self.folder, call, inputs)


def call_module(module: nn.Module, inputs: Named, keywords: bool) -> Any:
    """The module's outputs for arrays."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        return module(**tensors) if keywords else module(*tensors.values())


def output_tensors(model: str, outputs: Any) -> dict[str, Any]:
    """A model's outputs by the names that they get in a file."""
    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, tuple | list):
        return dict(zip(numbered("output", len(outputs)), outputs, strict=True))
    raise ExportError(f"{model} returns a {type(outputs).__name__}; allowed: a tensor, a tuple or a mapping of tensors")


def numbered(word: str, count: int) -> list[str]:
    """One name, or one with a number for each of several."""
    return [word] if count == 1 else [f"{word}_{index}" for index in range(count)]


def arrays_of(model: str, what: str, tensors: Mapping[str, Any]) -> Named:
    """The tensors as arrays. Raises ExportError, which names `model` and `what` they are, for anything else."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"{what} {name!r} of {model} is a {type(value).__name__}; only tensors can be exported")
    try:
        return {name: np.asarray(value.detach().cpu().numpy(), order="C") for name, value in tensors.items()}
    except TypeError as error:
        raise ExportError(f"an {what} of {model} has a dtype that cannot be exported: {error}") from error


def examples_of(model: str, inputs: Named) -> int:
    """The batch size. Raises ExportError unless every input has it along its first axis."""
    sizes = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ExportError(f"the inputs of {model} must all have the examples along their first axis, they have {sizes}")
    return next(iter(sizes.values()))


def structured(like: Any, tensors: list[torch.Tensor]) -> Any:
    """`tensors` in the structure of the outputs `like`."""
    if isinstance(like, torch.Tensor):
        return tensors[0]
    if isinstance(like, Mapping):
        return dict(zip(like, tensors, strict=True))
    return type(like)(*tensors) if hasattr(like, "_fields") else tuple(tensors)
