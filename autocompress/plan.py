"""What a trial is asked to do and what it gives: layers, plans, recipes, measurements.

Everything here is frozen, pure Python, and survives a JSON round trip unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autocompress.errors import PlanError

SCHEMES = ("channel", "spatial", "tucker", "best")
SVDS = ("plain", "activation", "relu")
QUANTIZERS = ("codebook", "uniform", "asymmetric")
SALIENCIES = ("magnitude", "activation", "hessian")
ROUNDINGS = ("nearest", "hessian")
GRANULARITIES = ("tensor", "channel")
"""Of scales, or a number of consecutive weights of a row."""
PRECISIONS = ("float32", "bfloat16", "float16")
FLOAT_BITS = 32
BIT_WIDTHS = (*range(1, 9), 16, FLOAT_BITS)
"""1 to 8: that many bits of code into a table; 16: float16; 32: the weights as they are."""
ACTIVATION_BITS = (4, 8, FLOAT_BITS)
BLOCK = 8
"""Channels that processors compute together: onnxruntime's float32 convolutions of 12, 24 and 48 channels take 0.93 of
the time of 16, 32 and 64, of 8, 16 and 32 channels 0.47 (ResNet-8)."""
CODED_BITS = 8
"""Up to these weights are codes."""
SEEN = ("linear", "conv1d", "conv2d", "conv3d")
"""Kinds of layers that multiply their inputs by their weight, row by row: what can be known of it can be used."""
UNSEEN = ("embedding", "transposed", "recurrent", "attention", "parameter")
"""All other kinds: their weights are pruned and rounded by themselves, and never factorised."""
LOOKED_UP = ("embedding", "parameter")
"""Kinds of which an example may use some rows alone, or others than those that training has seen."""
PARAMETERS = ("recurrent", "attention", "parameter")
"""Kinds whose module holds several weights, or one of another name: each goes by its state key."""
SHORT_BITS = 16
"""Up to these a layer's bias is carried in bfloat16; where all layers have so few, normalisation layers are too."""


@dataclass(frozen=True)
class LayerSpec:
    """One compressible weight, as found in the model.

    `name` is the dotted path of the (first) module that owns the weight, "" for a model that
    is a bare layer, or of `PARAMETERS` the weight's own (rnn.weight_hh_l0); `shape` is the weight's, output channels
    first where it has any (an embedding's rows are its entries, a transposed convolution's its inputs); `macs` counts
    the multiply-accumulates of one example, over every module that uses the weight;
    `shared_with` names the other modules that use the same tensor, or of `PARAMETERS` its other keys; `factorable` is
    false where only the whole weight can stand (grouped convolutions, shared weights, weights that a parent
    module reads by itself, and all kinds but those of `SEEN`) and `whole_because` then says why.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    groups: int = 1
    shared_with: tuple[str, ...] = ()
    factorable: bool = True
    whole_because: str = ""

    @property
    def label(self) -> str:
        """The name that users see: `name`, or "model" for a bare layer."""
        return self.name or "model"

    @property
    def key(self) -> str:
        """The weight's key in the model's state."""
        return self.name if self.kind in PARAMETERS else f"{self.name}.weight".lstrip(".")

    @property
    def modules(self) -> tuple[str, ...]:
        """The dotted paths of the modules that use the weight, its owner first."""
        if self.kind not in PARAMETERS:
            return (self.name, *self.shared_with)
        return tuple(key.rpartition(".")[0] for key in (self.name, *self.shared_with))

    @property
    def seen(self) -> bool:
        """Whether the weight multiplies inputs that can be looked at: others go by their weights alone."""
        return self.kind in SEEN

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The factorisations that this layer allows; the first is the default.

        tucker needs a kernel of more than one weight and more than one input channel: else it is channel with
        weights to spare.
        """
        if not self.factorable:
            return ()
        if self.kind != "conv2d":
            return SCHEMES[:1]
        return tuple(s for s in SCHEMES if s != "tucker" or (self.shape[1] > 1 and math.prod(self.shape[2:]) > 1))

    def matrix(self, scheme: str = "channel") -> tuple[int, int]:
        """Rows and columns of the matrix whose rank the scheme limits.

        channel: out x (in * kernel). spatial (Jaderberg et al. 2014, arXiv 1405.3866):
        (in * kernel height) x (out * kernel width). tucker and best count the ranks of channel, whose weights
        they may spend otherwise.
        """
        out, *rest = self.shape
        if scheme != "spatial":
            return out, math.prod(rest)
        inner, height, width = rest
        return inner * height, out * width

    def full_rank(self, scheme: str = "channel") -> int:
        """The rank of an unconstrained weight, at least 1."""
        return max(1, min(self.matrix(scheme)))

    def max_rank(self, scheme: str = "channel") -> int:
        """The largest rank whose two factors hold fewer weights than the layer; 0 if none does."""
        if scheme not in self.schemes:
            return 0
        rows, columns = self.matrix(scheme)
        return max(0, (rows * columns - 1) // (rows + columns))

    def weights(self, plan: LayerPlan) -> int:
        """The number of weights under a plan; of tucker and best before their ranks are chosen, at most so many."""
        if plan.rank is None:
            return self.parameters
        if plan.core is not None:
            (out, inner, *kernel), (few, many) = self.shape, plan.core
            return inner * few + few * many * math.prod(kernel) + many * out
        return plan.rank * sum(self.matrix(plan.scheme))

    def units(self, plan: LayerPlan) -> int:
        """The number of output units (rows, output channels) that a plan's width keeps, at least one.

        Of `2 * BLOCK` or more the nearest multiple of `BLOCK`, or all: what lies between runs no faster.
        """
        size, wanted = self.shape[0], plan.width * self.shape[0]
        if size < 2 * BLOCK:
            return max(1, round(wanted))
        below = max(BLOCK, BLOCK * int(wanted // BLOCK))
        above = min(size, below + BLOCK)
        return above if above - wanted <= wanted - below else below

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerSpec:
        data = dict(value)
        return cls(**data | {"shape": tuple(data["shape"]), "shared_with": tuple(data["shared_with"])})


MOST_THRESHOLD = 10.0
"""Standard deviations beyond which a threshold is a mistake: hardly a weight lies there."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    `rank` None keeps the layer whole. `threshold` counts in standard deviations of the layer's
    weights: so many are pruned as lie below; which, says `saliency`. `bits` is one of `BIT_WIDTHS`.
    `svd` is what the factors approximate: the weight ("plain"), the layer's outputs ("activation"), or what the
    activation after the layer makes of them ("relu", any elementwise activation; "activation" where none is known).
    `core` are the ranks of "tucker", inputs first; None: those of least error that cost no more weights than the
    channel scheme at `rank`.
    `rounding` "hessian" minimises the error of the layer's outputs; `granularity` is what has a scale of its own: the
    tensor, a channel (an output's row), or so many consecutive weights of a row. Saliency and rounding but the first
    ones look at the training data, and have no effect on layers whose inputs are not looked at (`LayerSpec.seen`).
    Under a `Recipe.rate` there is one scale, and "hessian" chooses levels by the error they make and the bits they
    cost, from which finetuning goes on; without it saliency has no effect.
    `activation_bits`, one of `ACTIVATION_BITS`, are those of the layer's inputs; 32 leaves them as they are.
    `width` is the share of the layer's output units that is kept (`LayerSpec.units`); the whole rows of the others, of
    least saliency (`compress/units.py`), are zero, and `threshold` prunes among the rows that are kept. Layers whose
    outputs are added to each other need equal widths; one whose units cannot go, such as the last, needs 1.
    """

    rank: int | None = None
    bits: int = FLOAT_BITS
    threshold: float = 0.0
    scheme: str = "channel"
    quantizer: str = "codebook"
    svd: str = "plain"
    core: tuple[int, int] | None = None
    saliency: str = "magnitude"
    rounding: str = "nearest"
    granularity: str | int = "tensor"
    activation_bits: int = FLOAT_BITS
    width: float = 1.0

    @property
    def factorisation(self) -> tuple[Any, ...]:
        """What the factors' shapes and values go by; equal for all whole layers."""
        return () if self.rank is None else (self.rank, self.scheme, self.core, self.svd)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerPlan:
        data = dict(value)
        return cls(**data | {"core": tuple(data["core"])} if data.get("core") else data)


@dataclass(frozen=True)
class Recipe:
    """What holds for a whole trial.

    `epochs` of finetuning over the training data (fractions allowed), Adam's `learning_rate`,
    the weight of `distillation` from the uncompressed model, 0 (none) to 1 (nothing else), and `rate`,
    the price of the file's bits in the training loss: loss + rate x (bits per priced element); 0 for none.
    `precision` of the forward pass, one of `PRECISIONS` (weights and loss stay float32; float16 on CUDA only);
    `accumulation`: batches to each step of the optimiser; `infomax`: the weight of a contrastive loss that
    keeps the features in front of the last layer telling of the uncompressed model's, 0 for none.
    """

    epochs: float = 1.0
    learning_rate: float = 1e-3
    distillation: float = 0.5
    rate: float = 0.0
    precision: str = "float32"
    accumulation: int = 1
    infomax: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A `LayerPlan` for each layer, by name, and a recipe."""

    layers: Mapping[str, LayerPlan]
    recipe: Recipe = field(default_factory=Recipe)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "recipe": self.recipe.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        layers = {name: LayerPlan.from_json(layer) for name, layer in value["layers"].items()}
        return cls(layers, Recipe(**value["recipe"]))

    def key(self) -> str:
        """A text that is equal for equal plans, whatever the order of their layers."""
        import json

        return json.dumps(self.to_json(), sort_keys=True)


@dataclass(frozen=True)
class Measurement:
    """What a trial gives at one rung.

    `epoch` counts finetuning so far, `size_bytes` is the length of the artifact, `metric_val`
    the task's metric on the validation split by the model that the artifact decodes to, `macs`
    the multiply-accumulates of one example, `seconds` the time since the trial began. Of a search that aims at another
    target than the archive `size_bytes` is the length of that file, and `metric_val` what it computes, where it
    quantizes by itself. `latency`, where that is an objective, is the time of a call over the float32 model's.
    `decided` is what the writer of that file decided by measuring, where it did (`deploy.int8_choose.decided_in`), so
    that the file can be written again.
    """

    rung: int
    epoch: float
    size_bytes: int
    metric_val: float
    macs: int
    seconds: float
    latency: float | None = None
    decided: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        optional = ("latency", "decided")
        return {key: value for key, value in asdict(self).items() if key not in optional or value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        return cls(**value)


def bias_beside(key: str) -> str | None:
    """The state key that a bias beside a weight would have, by the weight's; None of a weight of another name.

    x.weight has x.bias, x.weight_hh_l0 x.bias_hh_l0, x.in_proj_weight x.in_proj_bias.
    """
    owner, _, leaf = key.rpartition(".")
    if leaf != "in_proj_weight" and leaf.partition("_")[0] != "weight":
        return None
    return f"{owner}.{leaf.replace('weight', 'bias')}".lstrip(".")


def uncompressed(specs: Iterable[LayerSpec]) -> Plan:
    """The plan that changes nothing and finetunes nothing: trial 0 of each study."""
    return Plan({spec.name: LayerPlan() for spec in specs}, Recipe(epochs=0.0, distillation=0.0))


def check(plan: Plan, specs: Iterable[LayerSpec]) -> None:
    """Raise `PlanError`, naming layer, value and allowed range, unless the layers can carry it out."""
    by_name = {spec.name: spec for spec in specs}
    for name in plan.layers.keys() - by_name.keys():
        raise PlanError(f"plan names layer {name!r}, which is not one of {sorted(by_name)}")
    for name, spec in by_name.items():
        if name not in plan.layers:
            raise PlanError(f"plan has no entry for layer {name!r}")
        _check_layer(plan.layers[name], spec)
        _check_rated(plan.layers[name], spec, plan.recipe)
    recipe = plan.recipe
    _within("recipe", "epochs", recipe.epochs, 0.0, math.inf)
    _within("recipe", "distillation", recipe.distillation, 0.0, 1.0)
    _within("recipe", "rate", recipe.rate, 0.0, math.inf)
    _within("recipe", "infomax", recipe.infomax, 0.0, math.inf)
    if recipe.precision not in PRECISIONS:
        raise PlanError(f"recipe: precision is {recipe.precision!r}, allowed: {', '.join(PRECISIONS)}")
    if type(recipe.accumulation) is not int or recipe.accumulation < 1:
        raise PlanError(f"recipe: accumulation is {recipe.accumulation!r}, allowed: a whole number, 1 or more")
    if not (recipe.learning_rate > 0 and math.isfinite(recipe.learning_rate)):
        raise PlanError(f"recipe: learning_rate is {recipe.learning_rate}, allowed: above 0")


def _check_layer(plan: LayerPlan, spec: LayerSpec) -> None:
    where = f"layer {spec.label!r}"
    if plan.bits not in BIT_WIDTHS:
        raise PlanError(f"{where}: bits is {plan.bits}, allowed: {', '.join(map(str, BIT_WIDTHS))}")
    if plan.quantizer not in QUANTIZERS:
        raise PlanError(f"{where}: quantizer is {plan.quantizer!r}, allowed: {', '.join(QUANTIZERS)}")
    _within(where, "threshold", plan.threshold, 0.0, MOST_THRESHOLD)
    if plan.svd not in SVDS:
        raise PlanError(f"{where}: svd is {plan.svd!r}, allowed: {', '.join(SVDS)}")
    if plan.activation_bits not in ACTIVATION_BITS:
        allowed = ", ".join(map(str, ACTIVATION_BITS))
        raise PlanError(f"{where}: activation_bits is {plan.activation_bits}, allowed: {allowed}")
    if plan.core is not None:
        _check_core(where, plan, spec)
    if plan.saliency not in SALIENCIES:
        raise PlanError(f"{where}: saliency is {plan.saliency!r}, allowed: {', '.join(SALIENCIES)}")
    if plan.rounding not in ROUNDINGS:
        raise PlanError(f"{where}: rounding is {plan.rounding!r}, allowed: {', '.join(ROUNDINGS)}")
    _check_granularity(where, plan)
    if type(plan.width) not in (int, float) or not 0 < plan.width <= 1:
        raise PlanError(f"{where}: width is {plan.width!r}, allowed: a number above 0 up to 1")
    if plan.rank is None:
        return
    if not spec.factorable:
        raise PlanError(f"{where}: rank is {plan.rank}, allowed: full only ({spec.whole_because})")
    if plan.scheme not in spec.schemes:
        raise PlanError(f"{where}: scheme is {plan.scheme!r}, allowed: {', '.join(spec.schemes)}")
    highest = spec.max_rank(plan.scheme)
    if not (isinstance(plan.rank, int) and 1 <= plan.rank <= highest):
        allowed = f"1 to {highest}, or full" if highest else "full only (two factors would be larger)"
        raise PlanError(f"{where}: rank is {plan.rank}, allowed: {allowed}")


def _check_core(where: str, plan: LayerPlan, spec: LayerSpec) -> None:
    if plan.rank is None or plan.scheme != "tucker" or "tucker" not in spec.schemes:
        raise PlanError(f"{where}: core is {plan.core}, allowed: none without a rank and the scheme tucker")
    out, inner = spec.shape[:2]
    match plan.core:
        case (int(few), int(many)) if 1 <= few <= inner and 1 <= many <= out:
            if spec.weights(plan) >= spec.parameters:
                raise PlanError(f"{where}: core is {plan.core}, allowed: ranks whose three factors are smaller")
        case _:
            raise PlanError(f"{where}: core is {plan.core}, allowed: 1 to {inner} and 1 to {out}")


def _check_granularity(where: str, plan: LayerPlan) -> None:
    value = plan.granularity
    if not (value in GRANULARITIES or (type(value) is int and value >= 1)):
        raise PlanError(
            f"{where}: granularity is {value!r}, allowed: {', '.join(GRANULARITIES)}, a whole number from 1"
        )
    if value != "tensor" and plan.quantizer == "codebook" and plan.bits <= CODED_BITS:
        raise PlanError(f"{where}: granularity is {value!r}, allowed: tensor where quantizer is codebook")


def _check_rated(plan: LayerPlan, spec: LayerSpec, recipe: Recipe) -> None:
    if not (recipe.rate > 0 and 2 <= plan.bits <= CODED_BITS):
        return
    where = f"layer {spec.label!r}"
    if plan.granularity != "tensor":
        raise PlanError(f"{where}: granularity is {plan.granularity!r}, allowed: tensor where rate is above 0")
    if plan.quantizer == "asymmetric":
        raise PlanError(f"{where}: quantizer is 'asymmetric', allowed: codebook, uniform where rate is above 0")


def _within(where: str, what: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high) or math.isinf(value):
        allowed = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
        raise PlanError(f"{where}: {what} is {value}, allowed: {allowed}")
