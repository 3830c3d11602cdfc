"""The tensors inside what a model takes or gives: tuples, lists, mappings, dataclasses, nested."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to each tensor in it; what is no tensor stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)({key: map_tensors(item, function) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        return like(value, [map_tensors(item, function) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in fields(value):
            object.__setattr__(mapped, field.name, map_tensors(getattr(value, field.name), function))
        return mapped
    return value


def float_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in `value`, in the order of its items and fields."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from float_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from float_tensors(getattr(value, field.name))


def like(sequence: Any, items: list[Any]) -> Any:
    """The items in a sequence of the same kind: named tuples keep their names."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)
