"""ONNX files that plain onnxruntime runs, with weights stored small and exactly.

A weight of few or of mostly zero values is written as integers and a chain of standard operators
(opset 13 on) that onnxruntime folds into the float32 weight when it loads the file: it then computes
with the very numbers of the artifact, at float32 speed. The chain is the smallest of

    constant   ConstantOfShape
    float16    cast to float32, where that gives every value back; bfloat16 likewise
    dense      table[digits]
    sparse     any of these forms, of the values that are not zero, scattered to cumsum(digits + 1) - 1
    mostly     the dense form of a few frequent values, the others scattered over it in the same way
    rows       any of these but the sparse one for rows (or columns) of few zeros, put into the sparse form of the rest

where `digits` are integers below some base, as many of them in each 32-bit word as fit, taken apart by
Mod(Div(word, base^i), base): 4 bits each for base 16, 1.6 bits for base 3. The sparse form is the relative
index of Deep Compression (Han et al. 2016, section 2): a gap that the base cannot hold is bridged by stored zeros.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.compress.tracing import quiet, reads_values
from autocompress.deploy.gelu import reordered
from autocompress.deploy.torch_registry import kept_registry
from autocompress.errors import ExportError
from autocompress.tasks.wording import one_line

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]

OPSET = 18
"""The lowest that torch's exporter writes without conversion; read by onnxruntime since 1.14."""

_WORD_BITS = 32
_MAX_TABLE = 1 << 16
_MOST_SPARSE = 0.9
"""The largest share of values that are not zero in a sparse form."""
_FEW = 2, 3, 4, 6, 9, 16
_MOST_RARE = 0.1
"""Frequent values that get a code of their own where the others are scattered, and the largest share of these."""
_FULLER = 0.2, 0.4, 0.7
"""Shares of values other than zero above which a row may be one of those with a form of their own."""
_FEWEST_IN_ROW = 32


@dataclass(frozen=True)
class Form:
    """Nodes and constants that compute one tensor, named as the last node's output (or as the only constant)."""

    kind: str
    nodes: tuple[Any, ...]
    constants: Mapping[str, Array]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes that the form adds to a file."""
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        return sum(part.ByteSize() + 4 for part in (*tensors, *self.nodes))


def smallest_form(name: str, values: NDArray[np.float32]) -> Form:
    """The form of fewest bytes that gives `values` bit for bit; of kind "plain" where float32 itself is smallest."""
    bits = values.reshape(-1).view(np.uint32)
    if values.size and (bits == bits[0]).all():
        return _smallest([*_vector_forms(name, values), _constant(name, values)])
    forms = _vector_forms(name, values)
    if np.count_nonzero(bits) < _MOST_SPARSE * values.size:
        forms.append(_sparse(name, values))
        forms += [_rows(name, values, full) for full in _fuller(values)]
        forms += [_columns(name, values, full) for full in _fuller(_turned(values))]
    return _smallest(forms)


def _smallest(forms: Sequence[Form]) -> Form:
    return min(forms, key=lambda form: form.size_bytes)


def _vector_forms(name: str, values: NDArray[np.float32]) -> list[Form]:
    """The forms that store every value."""
    forms = [Form("plain", (), {name: values})]
    bits = values.view(np.uint32)
    for dtype in (np.dtype(np.float16), np.dtype(bfloat16)):
        with np.errstate(over="ignore"):
            half = values.astype(dtype)
        if np.array_equal(half.astype(np.float32).view(np.uint32), bits):
            cast = helper.make_node("Cast", [f"{name}:half"], [name], to=onnx.TensorProto.FLOAT)
            forms.append(Form(dtype.name, (cast,), {f"{name}:half": half}))
    table, codes, counts = np.unique(bits.reshape(-1), return_inverse=True, return_counts=True)
    if table.size <= min(_MAX_TABLE, values.size // 2):
        forms.append(_dense(name, values.shape, codes, table.view(np.float32)))
        forms += _mostly(name, values, table.view(np.float32), codes, counts)
    return forms


def _constant(name: str, values: NDArray[np.float32]) -> Form:
    first = values.reshape(-1)[:1]
    zero = not first.view(np.uint32).any()  # which is what is filled in where no value is told
    told = {} if zero else {"value": numpy_helper.from_array(first, "value")}
    node = helper.make_node("ConstantOfShape", [f"{name}:shape"], [name], **told)
    return Form("constant", (node,), {f"{name}:shape": np.array(values.shape, np.int64)})


def _dense(name: str, shape: tuple[int, ...], codes: Array, table: NDArray[np.float32]) -> Form:
    packed = digits(f"{name}:codes", codes, table.size)
    nodes = (
        helper.make_node("Gather", [f"{name}:table", f"{name}:codes"], [f"{name}:flat"]),
        helper.make_node("Reshape", [f"{name}:flat", f"{name}:shape"], [name]),
    )
    constants: dict[str, Array] = {f"{name}:table": table, f"{name}:shape": np.array(shape, np.int64)}
    return Form("dense", packed.nodes + nodes, {**packed.constants, **constants})


def _mostly(
    name: str, values: NDArray[np.float32], table: NDArray[np.float32], codes: Array, counts: Array
) -> Iterator[Form]:
    """The forms that store a code of one of the most frequent values for each, and scatter the others over them."""
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    for few in _FEW:
        rare = values.size - int(counts[order[:few]].sum())
        if few < table.size and rare < _MOST_RARE * values.size:
            kept = rank[codes] < few
            below = _dense(f"{name}:most", (values.size,), np.where(kept, rank[codes], 0), table[order[:few]])
            yield _scattered(name, values, np.flatnonzero(~kept), below, "mostly")


def _sparse(name: str, values: NDArray[np.float32]) -> Form:
    """Of the values that are not +0.0, scattered over zeros."""
    at = np.flatnonzero(values.reshape(-1).view(np.uint32))
    if not at.size:
        return _constant(name, values)
    return _scattered(name, values, at, _constant(f"{name}:zeros", np.zeros(values.size, np.float32)), "sparse")


def _scattered(name: str, values: NDArray[np.float32], at: Array, below: Form, kind: str) -> Form:
    """`values` by those at the flat positions `at`, put over what the flat form `below` gives."""
    flat = values.reshape(-1)
    gaps = np.diff(at, prepend=-1) - 1
    base = _gap_base(gaps, value_bits=_bits(np.unique(flat[at]).size + 1))
    ends = np.cumsum(gaps // base + 1) - 1
    steps = np.full(int(ends[-1]) + 1, base - 1)
    steps[ends] = gaps % base
    gap_form = digits(f"{name}:gaps", steps, base, flat=True)
    kept_form = _smallest(_vector_forms(f"{name}:kept", flat[np.cumsum(steps + 1) - 1]))
    nodes = (
        helper.make_node("Add", [f"{name}:gaps", ":int_1"], [f"{name}:steps"]),
        helper.make_node("CumSum", [f"{name}:steps", ":int_0"], [f"{name}:ends"]),
        helper.make_node("Sub", [f"{name}:ends", ":int_1"], [f"{name}:at"]),
        helper.make_node("ScatterElements", [below.nodes[-1].output[0], f"{name}:at", f"{name}:kept"], [f"{name}:all"]),
        helper.make_node("Reshape", [f"{name}:all", f"{name}:shape"], [name]),
    )
    constants: dict[str, Array] = {
        ":int_0": np.array(0),
        ":int_1": np.array(1),
        f"{name}:shape": np.array(values.shape, np.int64),
    }
    parts = (below, gap_form, kept_form)
    return Form(
        f"{kind}, {kept_form.kind}",
        (*(node for part in parts for node in part.nodes), *nodes),
        {key: value for part in parts for key, value in part.constants.items()} | constants,
    )


def _fuller(values: NDArray[np.float32]) -> Iterator[Array]:
    """Ways to tell rows that have few zeros from others that have many: bool (rows,), some of each kind."""
    if values.ndim < 2 or values[0].size < _FEWEST_IN_ROW:
        return
    shares = (values.view(np.uint32).reshape(len(values), -1) != 0).mean(axis=1)
    masks = [shares > least for least in _FULLER]
    distinct = {int(mask.sum()): mask for mask in masks}  # each is a part of the one before
    yield from (mask for number, mask in distinct.items() if 0 < number < len(values))


def _rows(name: str, values: NDArray[np.float32], full: Array) -> Form:
    """The `full` rows in a form of their own, the others as `_sparse`, or in columns."""
    rest = np.where(full.reshape(-1, *(1 for _ in values.shape[1:])), np.float32(0), values)
    columns = [_columns(f"{name}:rest", rest, mask) for mask in _fuller(_turned(rest))]
    others = _smallest([_sparse(f"{name}:rest", rest), *columns])
    return _put(name, others, values[full], full)


def _columns(name: str, values: NDArray[np.float32], full: Array) -> Form:
    """The `full` columns, of the values as (rows, columns), in a form of their own, the others as `_sparse`."""
    turned = _turned(values)
    others = _sparse(f"{name}:rest", np.where(full[:, None], np.float32(0), turned))
    made = _put(f"{name}:turned", others, turned[full], full)
    nodes = (
        helper.make_node("Transpose", [f"{name}:turned"], [f"{name}:flat"]),
        helper.make_node("Reshape", [f"{name}:flat", f"{name}:shape"], [name]),
    )
    shape = {f"{name}:shape": np.array(values.shape, np.int64)}
    return Form(made.kind.replace("rows", "columns"), (*made.nodes, *nodes), {**made.constants, **shape})


def _put(name: str, others: Form, own: NDArray[np.float32], full: Array) -> Form:
    """The rows `own` in the places `full` of what a form gives."""
    made = _smallest(_vector_forms(f"{name}:full", own))
    put = helper.make_node("ScatterND", [others.nodes[-1].output[0], f"{name}:rows", f"{name}:full"], [name])
    constants = {**others.constants, **made.constants, f"{name}:rows": np.flatnonzero(full)[:, None]}
    return Form(f"rows, {made.kind}", (*others.nodes, *made.nodes, put), constants)


def _turned(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(columns, rows) of the values as (rows, columns)."""
    return np.ascontiguousarray(values.reshape(len(values), -1).T) if values.ndim > 1 else values


def _gap_base(gaps: Array, value_bits: float) -> int:
    """The base of fewest bits in all: a small one takes fewer bits a gap, but more stored zeros."""
    bases = [int(2 ** (_WORD_BITS / per_word) + 1e-9) for per_word in range(2, _WORD_BITS + 1)]
    return min(sorted(set(bases)), key=lambda base: (gaps // base + 1).sum() * (_bits(base) + value_bits))


def _bits(base: int) -> float:
    return _WORD_BITS / digits_per_word(base)


def digits_per_word(base: int) -> int:
    """How many digits below `base` a word holds: the largest d with base^d <= 2^32, one for a base of 2^32 or less."""
    count = 1
    while max(2, base) ** (count + 1) <= 1 << _WORD_BITS:
        count += 1
    return count


def digits(name: str, values: Array, base: int, *, flat: bool = False) -> Form:
    """`values`, n integers below `base`, as INT64 in their order: (n,), or unless `flat` (words, digits a word)."""
    base = max(2, base)
    per_word = digits_per_word(base)
    powers = np.array([base**i for i in range(per_word)], np.int64)
    padded = np.zeros(-(-values.size // per_word) * per_word, np.int64)
    padded[: values.size] = values
    words = (padded.reshape(-1, per_word) * powers).sum(axis=1, keepdims=True).astype(np.uint32)
    constants = {f"{name}:words": words, f":powers_{base}": powers[None], f":int_{base}": np.array(base)}
    exact = padded.size == values.size
    nodes = [
        helper.make_node("Cast", [f"{name}:words"], [f"{name}:int"], to=onnx.TensorProto.INT64),
        helper.make_node("Div", [f"{name}:int", f":powers_{base}"], [f"{name}:div"]),
        helper.make_node("Mod", [f"{name}:div", f":int_{base}"], [name if exact and not flat else f"{name}:mod"]),
    ]
    if flat or not exact:
        constants[":list_-1"] = np.array([-1])
        nodes.append(helper.make_node("Reshape", [f"{name}:mod", ":list_-1"], [name if exact else f"{name}:all"]))
    if not exact:
        constants |= {":list_0": np.array([0]), f"{name}:size": np.array([values.size])}
        nodes.append(helper.make_node("Slice", [f"{name}:all", ":list_0", f"{name}:size"], [name]))
    return Form("digits", tuple(nodes), constants)


def write(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, outputs: list[str], path: Path
) -> dict[str, Any]:
    """What the manifest says of the written file: opset, inputs, outputs, form of each weight, bytes without forms.

    `module` is in eval mode on the CPU; `inputs` are example tensors of two or more examples along the first axis,
    passed by name if `keywords`, else in order. Raises ExportError for a model that torch's exporters refuse.
    """
    model, forms = graph_of(module, inputs, keywords, outputs)
    return save(model, forms, module, path)


def graph_of(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, outputs: list[str], *, whole: bool = False
) -> tuple[Any, dict[str, Form]]:
    """The float32 model of `module`, and the smaller forms of its weights by name. Arguments and errors as in `write`.

    Nothing is folded into weights that have such a form; if `whole`, into none of two or more axes.
    """
    return graphs_of(module, inputs, keywords, outputs, whole=[whole])[0]


def graphs_of(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, outputs: list[str], *, whole: Sequence[bool]
) -> list[tuple[Any, dict[str, Form]]]:
    """What `graph_of` gives for each `whole`, of one and the same export."""
    found = _exported(module, inputs, keywords, outputs, whole)
    for model, _ in found:
        reordered(model.graph)
        _strip(model)
    return found


def save(model: Any, forms: Mapping[str, Form], module: nn.Module, path: Path) -> dict[str, Any]:
    """Writes the model with `forms` in the place of their initializers; what `write` says. Raises ExportError."""
    plain, plain_bytes = model.graph.initializer, model.ByteSize()
    model = inserted(model, forms)
    weights = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    _shorten(model.graph, keep=weights)
    try:
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"the ONNX graph of {type(module).__name__} is not valid: {one_line(error)}") from error
    return {
        "opset": next(entry.version for entry in model.opset_import if not entry.domain),
        "ir_version": model.ir_version,
        "inputs": [_described(value) for value in model.graph.input],
        "outputs": [_described(value) for value in model.graph.output],
        "weight_forms": {tensor.name: forms[tensor.name].kind for tensor in plain if tensor.name in forms},
        "same_graph_float32_bytes": plain_bytes,
    }


def _exported(
    module: nn.Module, inputs: Mapping[str, Any], keywords: bool, outputs: list[str], whole: Sequence[bool]
) -> list[tuple[Any, dict[str, Form]]]:
    """The simplified model and the forms of its weights for each `whole`, by torch.export, else by the older tracer."""
    import torch

    args: Any = () if keywords else tuple(inputs.values())
    options: dict[str, Any] = {
        "kwargs": dict(inputs) if keywords else None,
        "input_names": list(inputs),
        "output_names": outputs,
        "opset_version": OPSET,
        "verbose": False,
    }
    values: str | None = None
    for attempt in (_by_torch_export, _by_tracer):
        try:
            with quiet(), torch.no_grad():
                raw = attempt(module, args, options)
                forms = _forms(raw.graph)
                wide = {tensor.name for tensor in raw.graph.initializer if len(tensor.dims) > 1}
                models = [_optimized(_copied(raw), {*forms, *(wide if each else ())}) for each in whole]
            for model in models:
                _check_batch(model.graph, list(inputs))
            return [(model, dict(forms)) for model in models]
        except Exception as error:  # the exporters raise whatever the model's own code raises, too
            cause, values = error, values or reads_values(error)
    reason = values or (str(cause) if isinstance(cause, ExportError) else one_line(cause))
    raise ExportError(f"{type(module).__name__} cannot be exported to ONNX: {reason}") from cause


def _by_torch_export(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    import torch

    shapes = {name: {0: "batch"} for name in options["input_names"]}
    dynamic: Any = shapes if options["kwargs"] else tuple(shapes.values())
    with kept_registry():
        program = torch.onnx.export(module, args, dynamo=True, optimize=False, dynamic_shapes=dynamic, **options)
    if program is None:
        raise ExportError("torch.onnx gave no program")
    return program.model_proto


def _by_tracer(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    import torch
    from torch.jit import TracerWarning  # type: ignore[attr-defined]

    file: Any = BytesIO()  # which the tracer takes, whatever its annotation says
    axes = {name: {0: "batch"} for name in (*options["input_names"], *options["output_names"])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracerWarning)  # a way that inputs chose would be the only one in the file
        torch.onnx.export(module, args, file, dynamo=False, do_constant_folding=False, dynamic_axes=axes, **options)
    return onnx.load_from_string(file.getvalue())


def _check_batch(graph: Any, inputs: list[str]) -> None:
    """Raises ExportError for an input that got lost in tracing, or a batch size that became a constant."""
    shapes = {value.name: _described(value)["shape"] for value in (*graph.input, *graph.output)}
    for name in inputs:
        if name not in shapes:
            raise ExportError(f"input {name!r} has no effect that can be traced")
    for name, shape in shapes.items():
        if shape and shape[0] and not isinstance(shape[0], str):
            raise ExportError(f"its code fixes the batch size: {name!r} has shape {shape}")


def _forms(graph: Any) -> dict[str, Form]:
    """The forms of the float32 initializers that have one smaller than themselves."""
    floats = (tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    forms = {tensor.name: smallest_form(tensor.name, numpy_helper.to_array(tensor)) for tensor in floats}
    return {name: form for name, form in forms.items() if form.kind != "plain"}


def _optimized(model: Any, names: set[str]) -> Any:
    """The model simplified, with no constant folding through the weights of these names.

    They are inputs of the graph while it is simplified: else a BatchNorm is folded into its Conv, which
    would turn a weight of few values into one of many.
    """
    from onnxscript import optimizer

    kept = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in names}
    _replace(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name not in kept])
    for tensor in kept.values():
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = optimizer.optimize(model)
    _replace(model.graph.input, [value for value in model.graph.input if value.name not in kept])
    used = set(_names_read(model.graph))
    model.graph.initializer.extend(tensor for name, tensor in kept.items() if name in used)
    return model


def _copied(model: Any) -> Any:
    return type(model).FromString(model.SerializeToString())


def inserted(model: Any, forms: Mapping[str, Form]) -> Any:
    """A model with the forms in the place of their initializers, if those are there."""
    made = _copied(model)
    names = [tensor.name for tensor in model.graph.initializer if tensor.name in forms]
    constants: dict[str, Array] = {}
    for name in names:
        constants |= forms[name].constants
    _replace(made.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name not in forms])
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    _replace(made.graph.node, [*(node for name in names for node in forms[name].nodes), *model.graph.node])
    return made


def _strip(model: Any) -> None:
    """Takes out what the exporter writes about the machine and the source, and what can be inferred."""
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "autocompress", ""
    model.graph.name = "model"
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for graph in _graphs(model.graph):
        del graph.value_info[:]
        for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            item.doc_string = ""
            del item.metadata_props[:]
        for node in graph.node:
            node.name = ""


def _shorten(graph: Any, keep: set[str]) -> None:
    """Give what stands between inputs, outputs and the weights of `keep` short names, and leave out default attributes.

    A tensor is named some four times; beside a few KB of codes names were a fifth of a file.
    """
    for node in (node for node in graph.node if onnx.defs.has(node.op_type, node.domain)):
        defaults = onnx.defs.get_schema(node.op_type, OPSET, node.domain).attributes
        given = [
            a for a in node.attribute if a.name not in defaults or not _same_value(a, defaults[a.name].default_value)
        ]
        _replace(node.attribute, given)
    if len(list(_graphs(graph))) > 1:  # inner graphs see outer names
        return
    fixed = keep | {value.name for value in (*graph.input, *graph.output)}
    places = [name for node in graph.node for name in (*node.input, *node.output) if name and name not in fixed]
    short = (name for name in _short_names() if name not in fixed)
    names = dict(zip([name for name, _ in Counter(places).most_common()], short, strict=False))
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _short_names() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    for length in count(1):
        yield from map("".join, product(ascii_lowercase, repeat=length))


def _same_value(attribute: Any, default: Any) -> bool:
    return bool(default.type) and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and those inside its control-flow nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _names_read(graph: Any) -> Iterator[str]:
    for part in _graphs(graph):
        for node in part.node:
            yield from node.input
        yield from (value.name for value in part.output)


def _replace(field: Any, items: list[Any]) -> None:
    """Sets a repeated field of a protobuf message."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def _described(value: Any) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {"name": value.name, "shape": shape, "dtype": str(helper.tensor_dtype_to_np_dtype(kind.elem_type))}
