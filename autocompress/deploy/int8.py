"""ONNX files whose layers compute with 8-bit activations in plain onnxruntime, where that is faster.

From the float32 graph of `onnx.graph_of`: ranges are calibrated on some training examples (`int8_calibrate`),
weights rounded per output (`int8_weights`), the form of each layer chosen by measuring (`int8_choose`), the graph laid
out for onnxruntime to fuse (`int8_graph`). Where validation data says that the metric falls too far, the layers that
harm the outputs most are left in float32.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from autocompress.deploy import onnx
from autocompress.deploy.calibration import training_inputs
from autocompress.deploy.int8_calibrate import Named, Seen, corrected_bias, ranges_of, seen
from autocompress.deploy.int8_choose import Choosing, Group, Plan, chosen, pays
from autocompress.deploy.int8_graph import int8_graph
from autocompress.deploy.int8_layers import UNRANGED, Layer, layers_of, names_of, own_ranges
from autocompress.deploy.int8_pools import pooled
from autocompress.deploy.int8_recurrent import joined
from autocompress.deploy.int8_rounding import refined
from autocompress.deploy.int8_weights import Rounded, float_form, level_form, rounded
from autocompress.deploy.recorder import Recorder, structured
from autocompress.deploy.sessions import Session, session_of
from autocompress.deploy.turns import in_turns
from autocompress.deploy.verify import load_inputs, quantized_metric_holds, save_inputs
from autocompress.errors import ExportError
from autocompress.tasks.batches import batches, finite_metric, join

if TYPE_CHECKING:
    from autocompress.tasks.task import Task

Array = NDArray[Any]
Each = TypeVar("Each")

EXAMPLES = 256
"""Training examples that ranges are calibrated on."""
_SHARE = 0.5
"""Of the tolerance, how far it may fall on validation data, on which the layers are chosen."""
FAR = 0.08
"""The distance of outputs from float32's, on calibration inputs, beyond which harmful layers go back to float32: the
metric of some hundred validation examples does not tell yet what breaks."""
_BATCH, _VALIDATED = 32, 256
_TURNS = 15
_TURN_SECONDS = 0.006
_AS_FAST = 1.03
"""Up to here one of two models is as fast as the other."""
_CONVERSION = 60
"""Bytes of a conversion between float32 and 8 bits."""
_NOT_WORTH = "8 bits save neither time nor bytes in all"


@dataclass(frozen=True)
class Net:
    """A float32 model, its layers, and what calibration tells of its tensors.

    `plain` is the model as the format onnx has it, with the forms of its weights.
    """

    model: Any
    exact: Mapping[str, onnx.Form]
    layers: Sequence[Layer]
    tensors: Mapping[str, Seen]
    ranges: Mapping[str, Any]
    calls: Sequence[Named]
    plain: tuple[Any, Mapping[str, onnx.Form]] = (None, {})

    @cached_property
    def weights(self) -> dict[Layer, Rounded]:
        """As 8-bit layers take them."""
        nearest = {
            part: rounded(part.values, part.axis, alone=layer.kind == "table")
            for layer in self.layers
            if layer.kind not in ("add", "constant")
            for part in layer.weights
        }
        return refined(self.model, nearest, self.calls)

    @cached_property
    def biases(self) -> dict[Layer, Array | None]:
        """As 8-bit layers take them."""
        return {
            layer: corrected_bias(layer, weight, self.tensors[layer.sources[0]])
            for layer, weight in self.weights.items()
            if layer.kind not in UNRANGED
        }

    @cached_property
    def alone(self) -> dict[str, onnx.Form]:
        """By name the weights in a form that is float32 again when it is loaded."""
        held = {tensor.name: tensor for tensor in self.model.graph.initializer}
        parts = (part for layer in self.layers for part in layer.weights if part.name in held)
        axes = {part.name: 0 if part.turned else part.axis for part in parts}
        found: dict[str, onnx.Form] = {}
        for name, axis in axes.items():
            values = numpy_helper.to_array(held[name])
            exact = self.exact.get(name) or onnx.Form("plain", (), {name: values})
            found[name] = float_form(name, rounded(values, axis, alone=True), exact)
        return found

    def keeps(self, layer: Layer, form: str) -> bool:
        """Whether the layer's weight is the float32 one in that form."""
        return form == "float32" or all(self.weights[part].exact for part in layer.weights)

    def lone(self, forms: Mapping[Layer, str]) -> dict[str, onnx.Form]:
        """By name the weights of layers of the form "weights"."""
        parts = (part for layer, form in forms.items() if form == "weights" for part in layer.weights)
        return {part.name: self.alone[part.name] for part in parts}

    def rounds(self, forms: Mapping[Layer, str]) -> bool:
        """Whether anything is in 8 bits in these forms."""
        lone = {form.kind for form in self.lone(forms).values()}
        return "int8" in lone or bool({"static", "dynamic"} & set(forms.values()))

    def graph(self, forms: Mapping[Layer, str]) -> Any:
        """The model with its layers in these forms, the weights of "weights" as they are."""
        return int8_graph(self.model, forms, self.ranges, self.weights, self.biases)

    def final(self, forms: Mapping[Layer, str], *, small: bool) -> tuple[Any, dict[str, onnx.Form]]:
        """The model and the forms of its constants; if `small`, also of those of its 8-bit layers."""
        made = self.graph(forms)
        lone = self.lone(forms)
        found = {name: form for name, form in {**self.exact, **lone}.items() if form.kind != "plain"}
        if small:
            levels = [t for t in made.graph.initializer if t.data_type == TensorProto.INT8]
            short = {t.name: level_form(t.name, numpy_helper.to_array(t)) for t in levels}
            found |= {name: form for name, form in short.items() if form is not None}
        return made, found


@dataclass(frozen=True)
class Decided:
    """What a write decides: the form of each layer, why, and the seconds of calls that were timed for it.

    `packed`: whether levels are in their small forms; `pays`: whether the file is not that of the format onnx;
    `checked`: the metrics on validation data; `by`: "clock" or "record".
    """

    forms: Mapping[Layer, str]
    because: Mapping[Layer, str]
    packed: bool
    pays: bool
    checked: Mapping[str, Any]
    by: str = "clock"
    seconds: Mapping[Layer, Mapping[str, float]] = field(default_factory=dict)

    def model(self, net: Net) -> tuple[Any, Mapping[str, onnx.Form]]:
        """What is written."""
        return net.final(self.forms, small=self.packed) if self.pays else net.plain


def write(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    names: list[str],
    path: Path,
    *,
    recorder: Recorder,
    task: Task,
    choosing: Choosing | None = None,
) -> dict[str, Any]:
    """Writes the file; what the manifest says of it. Arguments as of `onnx.write`; `recorder` knows the calls.

    What is not worth it (`int8_choose.pays`) is the very file that `onnx.write` writes. Forms that `choosing` knows
    are taken where they are those of this net's layers and the metric on validation data holds; else the clock
    decides. Raises ExportError where that metric is beyond the tolerance with every layer in float32.
    """
    choosing = choosing or Choosing()
    net = net_of(module, inputs, names, recorder, task)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        validation = Validation(task, recorder, Path(folder))
        decided = recorded(net, choosing, validation) or measured(net, choosing, validation, module, Path(folder))
    details = onnx.save(*decided.model(net), module, path)
    del details["same_graph_float32_bytes"]
    return details | {
        "layers": {
            name: {
                "form": decided.forms[layer],
                "because": decided.because[layer],
                "call_seconds": {form: round(second, 8) for form, second in decided.seconds.get(layer, {}).items()},
                **({"keeps_its_levels": net.keeps(layer, decided.forms[layer])} if layer in net.weights else {}),
            }
            for name, layer in zip(names_of(net.layers), net.layers, strict=True)
        },
        "decided": {"by": decided.by, "batch": choosing.batch, "packed": decided.packed, "pays": decided.pays},
        "calibration": {"examples": _count(net.calls), "split": "train"},
        "validation": dict(decided.checked),
    }


def measured(net: Net, choosing: Choosing, validation: Validation, module: torch.nn.Module, folder: Path) -> Decided:
    """What the clock says, and the metric on validation data. Raises ExportError as `held_back`."""
    groups, members = groups_of(net)
    timer = Timer(net, members, choosing)
    starts = [{"": "static"}, {"": "dynamic"}, {"": "weights"}]
    choices = chosen(groups, starts, timer, beside=_beside(net, members)) if groups else []
    forms = _by_layer([choice.form for choice in choices], members)
    because = _by_layer([choice.because for choice in choices], members)
    seconds = _by_layer([choice.seconds for choice in choices], members)
    forms, because, checked = held_back(net, forms, because, validation)
    small, long = net.final(forms, small=True), net.final(forms, small=False)
    packed = len(small[1]) == len(long[1]) or timer.over(small, long) <= _AS_FAST
    file = small if packed else long
    part = _saved_bytes(file, module, folder) / _saved_bytes(net.plain, module, folder)
    worth = net.rounds(forms) and pays(part, timer.over(file, net.plain))
    if not worth:
        because |= {layer: _NOT_WORTH for layer, form in forms.items() if form != "float32"}
        forms = dict.fromkeys(forms, "float32")
        checked |= {"metric": checked["metric_float32"], "distance": 0.0}
    return Decided(forms, because, packed, worth, checked, seconds=seconds)


def recorded(net: Net, choosing: Choosing, validation: Validation) -> Decided | None:
    """What an earlier write of this net decided for calls of as many examples.

    None where that is not known, was of other layers, or the metric on validation data does not hold with it.
    """
    told = choosing.decided
    if told is None or told["batch"] != choosing.batch:
        return None
    layers = dict(zip(names_of(net.layers), net.layers, strict=True))
    groups, members = groups_of(net)
    pairs = zip(groups, members, strict=True)
    options = {layer: {*group.options, "float32"} for group, part in pairs for layer in part}
    if told["forms"].keys() != layers.keys() or any(told["forms"][n] not in options[x] for n, x in layers.items()):
        return None
    forms = {layer: told["forms"][name] for name, layer in layers.items()}
    judge = Judge(net, validation)
    judged = judge(forms) if told["pays"] else judge.unchanged
    if judged.problem:
        return None
    because = dict.fromkeys(forms, "chosen when the trial was measured")
    checked = judged.told
    return Decided(forms, because, told["packed"], told["pays"], checked, "record")


def _saved_bytes(model: tuple[Any, Mapping[str, onnx.Form]], module: torch.nn.Module, folder: Path) -> int:
    """The length of the file."""
    onnx.save(*model, module, folder / "model.onnx")
    return (folder / "model.onnx").stat().st_size


def net_of(module: torch.nn.Module, inputs: Mapping[str, Any], names: list[str], recorder: Recorder, task: Task) -> Net:
    """The float32 net, observed on the first training examples of a shuffled pass."""
    plain, (model, exact) = onnx.graphs_of(module, inputs, recorder.keywords, names, whole=(False, True))
    model, exact = joined(pooled(model), exact)
    fixed = own_ranges(model)
    layers = layers_of(model)
    calls = _calibrating(task, list(inputs))
    wanted: dict[str, set[int]] = {}
    for layer in layers:
        if layer.kind not in UNRANGED:
            for source in layer.sources:
                wanted.setdefault(source, set()).add(layer.channels)
            wanted.setdefault(layer.result, set())
    tensors = seen(model, wanted, calls)
    layers = [layer for layer in layers if layer.kind in UNRANGED or _understood(layer, tensors)]
    return Net(model, exact, layers, tensors, ranges_of(tensors, layers, fixed), calls, plain)


def _understood(layer: Layer, tensors: Mapping[str, Seen]) -> bool:
    """Whether its tensors are finite float32; those of a sum of one shape."""
    parts = [tensors.get(name) for name in (*layer.sources, layer.result)]
    found = [part for part in parts if part is not None and all(np.isfinite(v).all() for v in part.values)]
    return len(found) == len(parts) and (layer.kind != "add" or len({p.first.shape for p in found}) == 1)


def _calibrating(task: Task, names: Sequence[str]) -> list[Named]:
    """`EXAMPLES` training examples in calls of at most `_BATCH`."""
    calls: list[Named] = []
    for batch in training_inputs(task, names, count=EXAMPLES):
        parts = zip(*(torch.split(tensor, _BATCH) for tensor in batch.values()), strict=True)
        calls += [{name: part.numpy() for name, part in zip(batch, row, strict=True)} for row in parts]
    return calls


class Validation:
    """The validation split, gone through once: inputs in files of a folder, targets in memory.

    Its calls have as many examples as those of the export's verification: the range of a dynamic product is that of
    the whole call.
    """

    def __init__(self, task: Task, recorder: Recorder, folder: Path) -> None:
        self.task, self.structure, self.folder = task, recorder.structure, folder
        self.targets: list[Any] = []
        for inputs, target in batches(task.val, _VALIDATED, shuffle_seed=None, device="cpu"):
            save_inputs(folder, str(len(self.targets)), recorder.named(inputs))
            self.targets.append(target)

    def metric(self, session: Session) -> float:
        """The task's metric of the session's outputs."""
        calls = (load_inputs(self.folder, str(index)) for index in range(len(self.targets)))
        outputs = [session.run(None, session.feed(call)) for call in calls]
        joined = [torch.from_numpy(np.concatenate(parts)) for parts in zip(*outputs, strict=True)]
        return finite_metric(self.task, structured(self.structure, joined), join(self.targets), "val")


def _count(calls: Sequence[Named]) -> int:
    return sum(len(next(iter(call.values()))) for call in calls)


def groups_of(net: Net) -> tuple[list[Group], list[list[Layer]]]:
    """The groups of layers that are alike, and their members."""
    members: dict[Any, list[Layer]] = {}
    for layer in net.layers:
        shape = () if layer.kind in UNRANGED else net.tensors[layer.sources[0]].first.shape[1:]
        attributes = tuple(sorted((name, str(value)) for name, value in layer.attributes.items()))
        kind = layer.nodes[0].op_type if layer.kind == "recurrent" else layer.kind
        members.setdefault((kind, layer.values.shape, shape, attributes), []).append(layer)
    names = dict(zip(net.layers, names_of(net.layers), strict=True))
    return [Group(names[part[0]], _options(net, part)) for part in members.values()], list(members.values())


def _options(net: Net, part: Sequence[Layer]) -> dict[str, int]:
    """By form about the bytes of a group's layers."""
    if part[0].kind == "add":
        return {"float32": 0, "static": 0}
    alone = sum(form.size_bytes for form in net.lone(dict.fromkeys(part, "weights")).values())
    if part[0].kind == "constant":
        return {"weights": alone}
    eight = sum({w.name: w.values.size for layer in part for w in layer.weights}.values())
    if part[0].kind == "recurrent":
        return {"weights": alone, **({"dynamic": eight} if part[0].dynamic else {})}
    if part[0].kind == "table":
        exact = sum(
            net.exact[layer.name].size_bytes if layer.name in net.exact else 4 * layer.values.size for layer in part
        )
        return {"static": eight, "float32": exact}
    return {"weights": alone, **({} if part[0].kind == "conv" else {"dynamic": eight}), "static": eight}


def structure(model: Any) -> str:
    """A sum over all of a model but the values of its float initializers."""
    bare = type(model).FromString(model.SerializeToString())
    for tensor in bare.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _examples(calls: Sequence[Named], count: int) -> Named:
    """The first examples of the calls, from the start again where there are fewer."""
    return {
        name: np.resize(np.concatenate([call[name] for call in calls])[:count], (count, *first.shape[1:]))
        for name, first in calls[0].items()
    }


class Timer:
    """Times whole calls under plans of the groups' forms.

    How long a call takes does not depend on the weights' values: what was asked of a net of the same structure is
    known from the answers of `choosing`.
    """

    def __init__(self, net: Net, members: Sequence[Sequence[Layer]], choosing: Choosing) -> None:
        self.net, self.members, self.answers = net, members, choosing.answers
        self.example = _examples(net.calls, choosing.batch)
        self.sessions: dict[Plan, Session] = {}
        self.about = structure(net.model), choosing.batch

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        """The seconds under each plan, of the turn that other programs of the machine disturbed least."""
        question = (*self.about, *plans)
        if question not in self.answers:
            self.sessions = {plan: self.sessions.get(plan) or self._loaded(plan) for plan in plans}
            self.answers[question] = self._times([self.sessions[plan] for plan in plans])
        return self.answers[question]

    def over(self, one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
        """The time of a call of the first of two models as part of the second's."""
        a, b = self._times([session_of(onnx.inserted(*model)) for model in (one, other)])
        return a / b

    def _loaded(self, plan: Plan) -> Session:
        forms = _by_layer(plan, self.members)
        return session_of(self.net.graph(forms))

    def _times(self, sessions: Sequence[Session]) -> list[float]:
        feed = sessions[0].feed(self.example)
        calls = {str(k): partial(session.run, None, feed) for k, session in enumerate(sessions)}
        found = in_turns(calls, turns=_TURNS, seconds=_TURN_SECONDS)
        return [min(found[str(k)].medians) for k in range(len(sessions))]


def held_back(
    net: Net, forms: Mapping[Layer, str], because: Mapping[Layer, str], validation: Validation
) -> tuple[dict[Layer, str], dict[Layer, str], dict[str, Any]]:
    """The forms of which the metric on validation data holds, why, and the metrics; harmful layers in float32.

    Raises ExportError where it does not hold even so.
    """
    forms, because, judge = dict(forms), dict(because), Judge(net, validation)
    judged = judge(forms)
    steps = milder(net, forms) if judged.problem else iter(())
    while judged.problem:
        step = next(steps, None)
        if step is None:
            told = f"{judged.metric:.6g}, in float32 {judged.reference:.6g}"
            raise ExportError(f"in 8 bits the metric on validation data is {told}")
        forms |= step
        because |= dict.fromkeys(step, judged.problem)
        judged = judge(forms)
    return forms, because, judged.told


@dataclass(frozen=True)
class Judged:
    """The metric on validation data, that of float32, how far outputs are from float32's, and what is wrong if any."""

    metric: float
    reference: float
    distance: float
    problem: str = ""

    @property
    def told(self) -> dict[str, float]:
        """As the manifest has it."""
        return {"metric_float32": self.reference, "metric": self.metric, "distance": self.distance}


class Judge:
    """Whether a net computes what it should with its layers in some forms."""

    def __init__(self, net: Net, validation: Validation) -> None:
        session = session_of(net.model)
        self.net, self.validation = net, validation
        self.reference, self.wanted = validation.metric(session), _outputs(session, net.calls)
        self.unchanged = Judged(self.reference, self.reference, 0.0)

    def __call__(self, forms: Mapping[Layer, str]) -> Judged:
        session = session_of(onnx.inserted(*self.net.final(forms, small=False)))
        metric, far = self.validation.metric(session), distance(_outputs(session, self.net.calls), self.wanted)
        problem = "the outputs were too far from float32's" if far > FAR else ""
        if not quantized_metric_holds(self.reference, metric, self.validation.task.direction, _SHARE):
            problem = "the metric on validation data fell too far"
        return Judged(metric, self.reference, far, problem)


def _beside(net: Net, members: Sequence[Sequence[Layer]]) -> Callable[[Plan], int]:
    """About the bytes of the net's file that are no layer's weights, by plan of the groups' forms."""
    weights = {part.name for layer in net.layers for part in layer.weights}
    held = sum(len(tensor.raw_data) for tensor in net.model.graph.initializer if tensor.name in weights)
    nodes = int(net.model.ByteSize()) - held
    return lambda plan: nodes + _CONVERSION * conversions(net.model, _by_layer(plan, members))


def _by_layer(values: Sequence[Each], members: Sequence[Sequence[Layer]]) -> dict[Layer, Each]:
    """What the groups have, for each of their layers."""
    return {layer: value for value, part in zip(values, members, strict=True) for layer in part}


def conversions(model: Any, forms: Mapping[Layer, str]) -> int:
    """How many tensors pass between float32 and 8 bits where layers of the form "static" end."""
    eight = {x for x, form in forms.items() if form == "static" and x.kind in ("conv", "gemm", "matmul", "add")}
    inside = {node.output[0] for layer in eight for node in layer.nodes}
    made = {layer.result for layer in eight}
    read = {name for layer in eight for name in layer.sources}
    plain = {name for node in model.graph.node if node.output[0] not in inside for name in node.input}
    plain |= {value.name for value in model.graph.output}
    return len(read - made) + len(made & plain)


def milder(net: Net, forms: Mapping[Layer, str]) -> Iterator[dict[Layer, str]]:
    """Steps towards float32: products with fixed ranges get those of each call, then layers go as `by_harm` says."""
    dynamic = {layer: "dynamic" for layer in forms if forms[layer] == "static" and layer.kind in ("gemm", "matmul")}
    if dynamic:
        yield dynamic
    left = iter(by_harm(net, {**forms, **dynamic}))
    while some := list(islice(left, max(1, len(forms) // 8))):
        yield dict.fromkeys(some, "float32")


def by_harm(net: Net, forms: Mapping[Layer, str]) -> list[Layer]:
    """The layers that are not float32, the one first without which the outputs come closest to float32's."""
    calls = net.calls[:1]
    wanted = _outputs(session_of(net.model), calls)

    def error(tried: Mapping[Layer, str]) -> float:
        return distance(_outputs(session_of(onnx.inserted(*net.final(tried, small=False))), calls), wanted)

    return sorted((x for x in forms if forms[x] != "float32"), key=lambda layer: error({**forms, layer: "float32"}))


def distance(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """The root mean square of the differences over that of what is wanted, less its mean; of several outputs the most.

    An output that is the same throughout counts with its size.
    """
    return max((_distance(y, x) for y, x in zip(found, wanted, strict=True)), default=0.0)


def _distance(found: Array, wanted: Array) -> float:
    spread = max(np.square(wanted - wanted.mean()).mean(), 1e-6 * np.square(wanted).mean())
    missed = np.square(found - wanted).mean()
    return float(np.sqrt(missed / spread)) if missed else 0.0


def _outputs(session: Session, calls: Sequence[Named]) -> list[Array]:
    """Each float output on all the calls, flat, in float64."""
    every = [session.run(None, session.feed(call)) for call in calls]
    parts = [[np.asarray(y, np.float64).reshape(-1) for y in some] for some in zip(*every, strict=True)]
    return [np.concatenate(some) for some, first in zip(parts, every[0], strict=True) if first.dtype.kind == "f"]
