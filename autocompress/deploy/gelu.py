"""GELU as onnxruntime knows it: opsets below 20 spell it out, and it fuses x * (1 + erf) * 0.5 but not the exporter's
x * (0.5 * (1 + erf)), which takes several times as long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from onnx import TensorProto, numpy_helper

_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


def reordered(graph: Any) -> None:
    """Have the graph halve last in each GELU; halves are exact, so that its values stay as they are."""
    made = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    halves = {tensor.name for tensor in graph.initializer if _is_half(tensor)}
    for last in graph.node:
        for place, name in enumerate(last.input if last.op_type == "Mul" else ()):
            inner = made.get(name)
            if inner is None or inner.op_type != "Mul" or uses[name] > 1:
                continue
            half, grown = sorted(inner.input, key=lambda given: given not in halves)
            whole = last.input[1 - place]
            if half in halves and _is_grown(grown, whole, made):
                _set(inner, whole, grown)
                _set(last, name, half)
                break


def _is_half(tensor: Any) -> bool:
    return not tensor.dims and tensor.data_type in _FLOATS and float(numpy_helper.to_array(tensor)) == 0.5


def _is_grown(name: str, whole: str, made: Mapping[str, Any]) -> bool:
    """Whether a value is a sum with the erf of a multiple of the whole."""
    added = made.get(name)
    erfs = [made.get(source) for source in added.input] if added is not None and added.op_type == "Add" else []
    scaled = [made.get(erf.input[0]) for erf in erfs if erf is not None and erf.op_type == "Erf"]
    return any(node is not None and whole in node.input for node in scaled)


def _set(node: Any, *names: str) -> None:
    del node.input[:]
    node.input.extend(names)
