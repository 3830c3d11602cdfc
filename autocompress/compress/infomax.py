"""InfoMax: features of the compressed model that tell as much as they can of the uncompressed model's.

Notation: N the examples of a batch, f (N, d) features of the compressed model and g (N, d) those of the
uncompressed one, both of length 1 in each row; t the temperature.

    L = -1/N sum_i log softmax_j(f_i . g_j / t)[j = i]

is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4), and log N - L is a lower bound of the mutual
information of f and g in nats. As a way to distil: Tian et al. 2020, arXiv 1910.10699. It needs no labels. Features
are what the layer takes that runs last: those that the task's outputs are read from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import TrialFailed
from autocompress.plan import LayerSpec

TEMPERATURE = 0.1
MOST = 1024
"""Examples of a batch that are told apart: the matrix of all pairs grows with their square."""


def info_nce(features: Tensor, others: Tensor) -> Tensor:
    """The mean of L from f to g and from g to f, a scalar: each row is to find its own among the other's rows.

    Differentiable in the features, not in the others.
    """
    return _InfoNCE.apply(features[:MOST].float(), others[:MOST].float())  # type: ignore[no-untyped-call, no-any-return]


class _InfoNCE(torch.autograd.Function):
    """(F, G), rows of any length -> the loss; its gradient to F in closed form, in half of the time of autograd's.

    With s = f . g / t: dL/ds_ij = (softmax of row i at j + softmax of column j at i - 2 [i = j]) / 2N.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, others: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_(min=1e-12)
        f, g = features / length, F.normalize(others, dim=1).div_(TEMPERATURE)
        pairs = (f @ g.T).exp_()  # |s| <= 1 / t: no overflow
        rows, columns = pairs.sum(1, keepdim=True), pairs.sum(0)
        ctx.save_for_backward(f, g, length, pairs, rows, columns)
        loss: Tensor = rows.log().sum() + columns.log().sum() - 2 * torch.dot(f.flatten(), g.flatten())
        return loss / (2 * len(f))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        f, g, length, pairs, rows, columns = ctx.saved_tensors
        on_f = torch.mm(pairs * (1 / rows + 1 / columns), g).sub_(g, alpha=2)
        along = (on_f * f).sum(1, keepdim=True)
        return on_f.addcmul_(f, along, value=-1).mul_(grads[0] / (2 * len(f)) / length), None


def pooled(inputs: Tensor, kind: str) -> Tensor:
    """A layer's inputs as features (N, channels): the mean over all places."""
    if inputs.dim() <= 2:
        return inputs if inputs.dim() == 2 else inputs.reshape(len(inputs), -1)
    return inputs.flatten(1, -2).mean(1) if kind == "linear" else inputs.flatten(2).mean(2)


def last_layer(model: nn.Module, specs: Sequence[LayerSpec], call: Callable[[], Any]) -> LayerSpec:
    """The layer, of those whose inputs are seen, that runs last when `call()` runs the model.

    Raises TrialFailed where none is called.
    """
    ran: list[LayerSpec] = []
    owners = [(spec, name) for spec in specs if spec.seen for name in (spec.name, *spec.shared_with)]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, spec=spec: ran.append(spec))
        for spec, name in owners
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise TrialFailed("infomax needs a layer that the model calls, and it calls none")
    return ran[-1]


class Tap:
    """A context in which a model's run leaves the features that one of its layers takes.

    `features` (N, d) are those of the latest run, with their gradient.
    """

    def __init__(self, model: nn.Module, layer: LayerSpec) -> None:
        self.layer, self.taken = layer, Tensor()
        self.modules = [model.get_submodule(name) for name in (layer.name, *layer.shared_with)]

    @property
    def features(self) -> Tensor:
        """Raises TrialFailed where the layer did not run."""
        if self.taken.numel() == 0:
            raise TrialFailed(f"infomax: layer {self.layer.label!r} did not run")
        return pooled(self.taken, self.layer.kind)

    def __enter__(self) -> Tap:
        self.hooks = [module.register_forward_pre_hook(self._take, with_kwargs=True) for module in self.modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.taken = args[0] if args else next(iter(kwargs.values()))
