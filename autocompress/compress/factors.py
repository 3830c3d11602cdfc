"""A layer's factors by what they are to approximate: its weight, its outputs, or its outputs after the activation.

Nested SVDs, Tucker bases and fits are kept once made, by layer, scheme and criterion, for all trials of a study.
Where the mean of the inputs is known, the mean error of the outputs goes into the bias of the layer, or into the
running mean of the batch normalisation behind it; where there is neither, moments are not centred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress import after_activation, lowrank, reduced_rank
from autocompress.compress.activations import Activation
from autocompress.compress.responses import Inputs
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, LayerSpec

_WIDE = 2048
"""Inputs of a layer beyond which its moments in float64 are not kept but made anew."""
_MEASURED = 48
"""Ranks of a layer whose errors are measured for tolerances."""
_KEPT = 512
"""Factors of single ranks that are kept; the oldest ones go."""


@dataclass(frozen=True)
class Factors:
    """Weights of the factors, first one first (float64), and what the bias grows by (out,), if it may change."""

    weights: tuple[Tensor, ...]
    shift: Tensor | None = None


class Factoriser:
    """Makes the factors of a model's layers.

    `svds(spec, scheme)` gives the plain SVD of a layer's weight; `inputs()` and `activations()` what its layers get
    and what follows them, called once when first needed.
    """

    def __init__(
        self,
        model: nn.Module,
        svds: Callable[[LayerSpec, str], lowrank.Svd],
        inputs: Callable[[], Mapping[str, Inputs]] | None = None,
        activations: Callable[[], Mapping[str, Activation]] | None = None,
    ) -> None:
        self._model, self._svds, self._make_inputs, self._make_activations = model, svds, inputs, activations
        self._kept: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def inputs(self) -> Mapping[str, Inputs]:
        """What layers get, by name; empty without calibration."""
        return self._make_inputs() if self._make_inputs is not None else {}

    @cached_property
    def activations(self) -> Mapping[str, Activation]:
        """What follows layers, by name."""
        return self._make_activations() if self._make_activations is not None else {}

    def activation(self, spec: LayerSpec) -> Activation:
        """What follows a layer."""
        return self.activations.get(spec.name, Activation(why="it was not looked for"))

    def settled(self, spec: LayerSpec, plan: LayerPlan) -> LayerPlan:
        """The plan with the scheme that "best" means, and the ranks that "tucker" means.

        At the weights of the channel scheme at the plan's rank: the scheme of least output error (of least error of
        the weight for svd "plain"), and Tucker's ranks likewise.
        """
        if plan.rank is None or plan.scheme not in ("tucker", "best") or plan.core is not None:
            return plan
        key = (spec.name, "settled", plan.rank, plan.scheme, plan.svd)
        scheme, rank, core = self._once(key, lambda: self._settle(spec, plan))
        return replace(plan, scheme=scheme, rank=rank, core=core)

    def _settle(self, spec: LayerSpec, plan: LayerPlan) -> tuple[str, int, tuple[int, int] | None]:
        assert plan.rank is not None
        budget = plan.rank * sum(spec.matrix("channel"))
        linear = replace(plan, svd="plain" if plan.svd == "plain" else "activation")
        candidates = []
        if plan.scheme == "best":
            candidates.append(replace(linear, scheme="channel"))
            if (rank := budget // sum(spec.matrix("spatial"))) >= 1:
                rank = min(rank, spec.max_rank("spatial"))
                candidates.append(replace(linear, scheme="spatial", rank=rank))
        if "tucker" in spec.schemes:
            kernel = spec.shape[2] * spec.shape[3]
            core = reduced_rank.tucker_ranks(self._bases(spec, linear.svd)[2], budget, kernel)
            made = replace(linear, scheme="tucker", core=core)
            if spec.weights(made) <= budget:
                candidates.append(made)
        if len(candidates) == 1:
            best = candidates[0]
        else:
            best = min(candidates, key=lambda found: self.linear_error(spec, found))
        assert best.rank is not None
        return best.scheme, best.rank, best.core

    def factors(self, spec: LayerSpec, plan: LayerPlan, weight: Tensor | None = None) -> Factors:
        """The factors of a layer under a settled plan; of another weight of it, if one is given."""
        if weight is not None:
            return Factoriser(self._model, self._svds, lambda: self.inputs, lambda: self.activations)._make(
                spec, plan, weight
            )
        return self._once((spec.name, *plan.factorisation), lambda: self._make(spec, plan, None))  # type: ignore[no-any-return]

    def linear_error(self, spec: LayerSpec, plan: LayerPlan) -> float:
        """The squared error of the weight for svd "plain", else of the outputs, their mean mended where it can be."""
        made = self.factors(spec, plan)
        whole = lowrank.multiplied(made.weights, spec.shape, plan.scheme)
        return reduced_rank.output_error(
            (whole - self._weight(spec)).flatten(1), None if plan.svd == "plain" else self._moments(spec)
        )

    def error(self, spec: LayerSpec, plan: LayerPlan, *, after: bool = True) -> float:
        """The relative squared error after the activation (or before it) on inputs that no factor was fitted to.

        Over the variance of what the whole layer gives. Raises TrialFailed without calibration inputs.
        """
        rows, follows = self._inputs(spec).check, self.activation(spec)
        weight, bias = self._weight(spec).flatten(1).float(), self._bias(spec)
        made = self.factors(spec, plan)
        whole = lowrank.multiplied(made.weights, spec.shape, plan.scheme).flatten(1).float()
        wanted = follows.before(rows @ weight.T + bias)
        got = follows.before(rows @ whole.T + bias + (0 if made.shift is None else made.shift.to(bias)))
        if after:
            wanted, got = follows.function(wanted), follows.function(got)
        return after_activation.relative_error(got, wanted)

    def smallest_rank(self, spec: LayerSpec, plan: LayerPlan, tolerance: float, *, after: bool = True) -> int | None:
        """The smallest rank whose error is within the tolerance, by bisection, since it grows as the rank falls.

        None where no rank that makes the layer smaller is within it.
        """
        low, high = 1, spec.max_rank(plan.scheme)

        def within(rank: int) -> bool:
            settled = self.settled(spec, replace(plan, rank=rank, core=None))
            return self.error(spec, settled, after=after) <= tolerance

        if plan.svd == "relu":
            start = self.smallest_rank(spec, replace(plan, svd="activation"), tolerance, after=after)
            if start is not None:
                if not within(start):
                    return start
                high = start
                if start > 2 and not within(start // 2):
                    low = start // 2 + 1
            elif not high or not within(high):
                return None
        elif not high or not within(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if within(middle) else (middle + 1, high)
        return high

    def errors(self, spec: LayerSpec, scheme: str, svd: str) -> tuple[tuple[int, float], ...]:
        """Ranks, rising up to the highest, about evenly on a logarithmic scale, and their errors after the activation.

        Errors of factors fitted to what comes after the activation are bounded by those fitted to the outputs,
        which are measured in their stead.
        """

        def make() -> tuple[tuple[int, float], ...]:
            highest = spec.max_rank(scheme)
            ranks = sorted({round(highest ** (step / (_MEASURED - 1))) for step in range(_MEASURED)})
            plans = (LayerPlan(rank=rank, scheme=scheme, svd=linear) for rank in ranks)
            return tuple((p.rank or 1, self.error(spec, self.settled(spec, p))) for p in plans)

        linear = "plain" if svd == "plain" else "activation"
        return self._once((spec.name, "errors", scheme, linear), make)  # type: ignore[no-any-return]

    def _prior(
        self, spec: LayerSpec, plan: LayerPlan, linear: tuple[Tensor, ...], *, weight: Tensor, maps: Tensor | None
    ) -> after_activation.Prior | None:
        """What the moments of the inputs tell of features by these maps, which are the weight or the first factor's."""
        inputs = self._inputs(spec)
        if inputs.gram is None:
            return None
        moments, matrix, scale = self._moments(spec), weight.flatten(1).double(), self.activation(spec).scale
        mean = inputs.mean.double() if self.shifts(spec) else torch.zeros_like(inputs.mean, dtype=torch.float64)
        if maps is None:
            whole = matrix
        elif plan.scheme == "channel":
            whole = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
            moments, mean = matrix @ moments @ matrix.T, matrix @ mean
        else:
            first = linear[0].flatten(1).double()
            whole, _ = reduced_rank.refitted(matrix, moments, first)
            moments = reduced_rank.mapped(reduced_rank.mapped(moments, first).T, first)
            mean = reduced_rank.mapped(mean[None], first)[0]
        return after_activation.Prior(whole if scale is None else scale.to(whole)[:, None] * whole, moments, mean)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]

    def _weight(self, spec: LayerSpec) -> Tensor:
        weight: Tensor = self._model.get_submodule(spec.name).weight  # type: ignore[assignment]
        return weight.detach()

    def _bias(self, spec: LayerSpec) -> Tensor:
        bias: Tensor | None = self._model.get_submodule(spec.name).bias  # type: ignore[assignment]
        return torch.zeros(spec.shape[0], device=self._weight(spec).device) if bias is None else bias.detach().float()

    def _inputs(self, spec: LayerSpec) -> Inputs:
        if spec.name not in self.inputs:
            raise TrialFailed(f"layer {spec.label!r} has no calibration inputs: no training batch reaches it")
        return self.inputs[spec.name]

    def shifts(self, spec: LayerSpec) -> bool:
        """Whether the mean of the layer's outputs can be mended, by a bias or a batch normalisation of its own."""
        bias: Tensor | None = self._model.get_submodule(spec.name).bias  # type: ignore[assignment]
        if bias is not None:
            parts = self._model.modules()
            return sum(held is bias for part in parts for held in part._parameters.values()) == 1
        norm = self.activation(spec).norm
        return norm is not None and [follows.norm for follows in self.activations.values()].count(norm) == 1

    def _moments(self, spec: LayerSpec) -> Tensor:
        """Damped second moments of the layer's inputs (d, d), centred where their mean can be mended."""

        def make() -> Tensor:
            inputs = self._inputs(spec)
            rows = inputs.fit
            gram = (rows.T @ rows / len(rows) if inputs.gram is None else inputs.gram).double()
            if self.shifts(spec):
                gram = gram - torch.outer(inputs.mean.double(), inputs.mean.double())
            return reduced_rank.damped(gram)

        if spec.parameters // spec.shape[0] > _WIDE:
            return make()
        return self._once((spec.name, "moments"), make)  # type: ignore[no-any-return]

    def nested(self, spec: LayerSpec, scheme: str, svd: str, weight: Tensor | None = None) -> lowrank.Svd:
        """Terms of which each rank takes the first ones, of the channel or the spatial scheme."""
        if svd == "plain" or self._make_inputs is None:
            return self._svds(spec, scheme) if weight is None else lowrank.svd(weight, scheme)
        if weight is None:
            return self._once((spec.name, "nested", scheme), lambda: self._nested(spec, scheme, self._weight(spec)))  # type: ignore[no-any-return]
        return self._nested(spec, scheme, weight)

    def _nested(self, spec: LayerSpec, scheme: str, weight: Tensor) -> lowrank.Svd:
        if scheme == "spatial":
            return reduced_rank.spatial_svd(weight, self._moments(spec))
        matrix, inputs = weight.flatten(1), self._inputs(spec)
        if inputs.gram is None and matrix.shape[0] <= matrix.shape[1]:
            rows = inputs.fit - inputs.mean if self.shifts(spec) else inputs.fit
            outputs = (rows @ matrix.float().T).double()
            return reduced_rank.component_svd(matrix, reduced_rank.damped(outputs.T @ outputs / len(outputs)))
        return reduced_rank.channel_svd(matrix, self._moments(spec))

    def _bases(self, spec: LayerSpec, svd: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        moments = None if svd == "plain" or self._make_inputs is None else self._moments(spec)
        if weight is not None:
            return reduced_rank.tucker_bases(weight, moments)
        key = (spec.name, "bases", svd == "plain")
        return self._once(key, lambda: reduced_rank.tucker_bases(self._weight(spec), moments))  # type: ignore[no-any-return]

    def _make(self, spec: LayerSpec, plan: LayerPlan, weight: Tensor | None) -> Factors:
        assert plan.rank is not None
        linear = self._linear(spec, plan, weight)
        if plan.svd == "plain" or self._make_inputs is None:
            return Factors(linear)
        own = self._weight(spec) if weight is None else weight
        if plan.svd == "relu" and self.activation(spec).name:
            return self._after(spec, plan, linear, own)
        return Factors(linear, self._mended(spec, plan, linear, own))

    def _mended(self, spec: LayerSpec, plan: LayerPlan, factors: tuple[Tensor, ...], weight: Tensor) -> Tensor | None:
        """The mean error of the outputs (out,) by these factors; None where it cannot be mended."""
        if not self.shifts(spec):
            return None
        lost = weight.double() - lowrank.multiplied(factors, spec.shape, plan.scheme)
        return lost.flatten(1) @ self._inputs(spec).mean.double()

    def _linear(self, spec: LayerSpec, plan: LayerPlan, weight: Tensor | None) -> tuple[Tensor, ...]:
        """Factors of least error of the weight or of the outputs."""
        assert plan.rank is not None
        aware = plan.svd != "plain" and self._make_inputs is not None
        own = self._weight(spec) if weight is None else weight
        if plan.scheme == "tucker":
            assert plan.core is not None
            moments = self._moments(spec) if aware else None
            return reduced_rank.tucker_factors(own, moments, self._bases(spec, plan.svd, weight)[0], plan.core)
        pair = lowrank.factor_weights(
            spec.shape, self.nested(spec, plan.scheme, plan.svd, weight), plan.rank, plan.scheme
        )
        if plan.scheme == "spatial" and aware:
            last, _ = reduced_rank.refitted(own.flatten(1), self._moments(spec), pair[0].flatten(1))
            return reduced_rank.balanced((pair[0], last.reshape(pair[1].shape[0], plan.rank, 1, -1)))
        return pair

    def _after(self, spec: LayerSpec, plan: LayerPlan, linear: tuple[Tensor, ...], weight: Tensor) -> Factors:
        """Factors of least error after the activation: their output side is fitted, for channel the input side too."""
        assert plan.rank is not None
        follows, rows = self.activation(spec), self._inputs(spec).fit
        bias, matrix = self._bias(spec), weight.flatten(1).float()
        raw = rows @ matrix.T
        free = self.shifts(spec)
        kept = None if free else follows.before(bias[None])[0]
        out, width = matrix.shape
        maps: Tensor | None = None  # rows -> features; None is the identity
        rank: int | None = plan.rank
        if plan.scheme == "channel" and out < width:
            maps = matrix
        elif plan.scheme != "channel":
            maps = linear[0].flatten(1).float()
            rank = None if plan.core is None else plan.core[1]
        features = rows if maps is None else raw if maps is matrix else reduced_rank.mapped(rows, maps)
        fit = after_activation.fitted(
            features,
            follows.before(raw + bias),
            follows.function,
            rank=rank,
            shift=kept,
            prior=self._prior(spec, plan, linear, weight=weight, maps=maps),
        )
        start = after_activation.fitted_rows(len(rows))
        shift_of_linear = self._mended(spec, plan, linear, weight)
        other = lowrank.multiplied(linear, spec.shape, plan.scheme).flatten(1).float()
        moved = bias if shift_of_linear is None else bias + shift_of_linear.to(bias)
        wanted = follows.function(follows.before(raw[start:] + bias))
        got = follows.function(follows.before(rows[start:] @ other.T + moved))
        if float((got - wanted).double().square().mean()) <= fit.error:
            return Factors(linear, shift_of_linear)
        left, right, shift = fit.left, fit.right, fit.shift
        if follows.scale is not None and follows.shift is not None:
            scale = follows.scale.to(left)
            inverse = torch.where(scale.abs() > 1e-12, 1 / scale, torch.zeros_like(scale))
            left, shift = left * inverse[:, None], (shift - follows.shift.to(left)) * inverse
        shift_by = shift - bias.double() if free else None
        if plan.scheme == "channel":
            first = right if maps is None else right @ maps.double()
            return Factors(reduced_rank.balanced((first.reshape(plan.rank, *spec.shape[1:]),
                                                  left.reshape(*linear[1].shape))), shift_by)  # fmt: skip
        if plan.core is not None:
            few, many = plan.core
            core = right.reshape(many, few, *spec.shape[2:])
            return Factors(reduced_rank.balanced((linear[0], core, left.reshape(linear[2].shape))), shift_by)
        return Factors(reduced_rank.balanced((linear[0], left.reshape(linear[1].shape))), shift_by)
