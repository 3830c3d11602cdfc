"""Weights of recurrent operations as one constant each, where an exporter takes torch's apart and joins them anew.

ONNX has the gates in another order than torch, and both directions in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.deploy.int8_layers import RECURRENT, Graph, without_dead_ends
from autocompress.deploy.onnx import Form, smallest_form
from autocompress.deploy.sessions import session_of

Array = NDArray[Any]


def joined(model: Any, exact: Mapping[str, Form]) -> tuple[Any, dict[str, Form]]:
    """A new model in which W and R of each LSTM, GRU and RNN are constants, and the exact forms of what it holds.

    Each has the name of the first weight that it is made of; equal ones are one. Where a weight would be there twice,
    since something else reads it, the model is the one that was given.
    """
    graph, made = Graph(model.graph), type(model).FromString(model.SerializeToString())
    read = [name for node in model.graph.node if node.op_type in RECURRENT for name in node.input[1:3]]
    chains = {name: _chain(graph, name) for name in dict.fromkeys(read) if name in graph.maker}
    leaves = {name: _weights(graph, chain) for name, chain in chains.items()}
    arrays = _computed(model, graph, {name: chain for name, chain in chains.items() if leaves[name]})
    if not arrays:
        return model, dict(exact)
    same: dict[tuple[Any, bytes], str] = {}
    first = {name: same.setdefault((array.shape, array.tobytes()), name) for name, array in arrays.items()}
    for node in made.graph.node:
        if node.op_type in RECURRENT:
            node.input[1:3] = [f":{first[name]}" if name in first else name for name in node.input[1:3]]
    without_dead_ends(made.graph)
    names = {f":{name}": leaves[name][0] for name in same.values()}
    left = {tensor.name for tensor in made.graph.initializer}
    if len(set(names.values())) < len(names) or any(left & set(leaves[name]) for name in first):
        return model, dict(exact)
    for node in made.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    held = {names[f":{name}"]: arrays[name] for name in same.values()}
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    forms = {name: smallest_form(name, array) for name, array in held.items()}
    forms = {name: form for name, form in forms.items() if form.kind != "plain"}
    return made, {name: form for name, form in exact.items() if name in left} | forms


def _chain(graph: Graph, name: str) -> list[Any]:
    """The nodes, each once and after those that it reads, that compute a tensor of constants; none if others do too."""
    found: dict[str, Any] = {}
    pending = [name]
    while pending:
        node = graph.maker.get(pending.pop())
        if node is None or node.output[0] in found:
            continue
        found[node.output[0]] = node
        pending += node.input
    made = {output for node in found.values() for output in node.output}
    constant = all(name in graph.constants or name in made or not name for n in found.values() for name in n.input)
    return [node for node in graph.proto.node if node.output[0] in found] if constant else []


def _weights(graph: Graph, chain: list[Any]) -> list[str]:
    """The names of the constants of two or more axes that a chain reads."""
    names = (name for node in chain for name in node.input if name in graph.constants)
    return [name for name in names if graph.constants[name].ndim > 1]


def _computed(model: Any, graph: Graph, chains: Mapping[str, list[Any]]) -> dict[str, Array]:
    """By name what the chains give."""
    if not chains:
        return {}
    nodes = {node.output[0]: node for chain in chains.values() for node in chain}
    ordered = [node for node in graph.proto.node if node.output[0] in nodes]
    read = {name for node in ordered for name in node.input}
    given = [tensor for tensor in graph.proto.initializer if tensor.name in read]
    outputs = [helper.make_empty_tensor_value_info(name) for name in chains]
    part = type(model)(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.CopyFrom(helper.make_graph(ordered, "weights", [], outputs, given))
    return dict(zip(chains, session_of(part).run(list(chains), {}), strict=True))
