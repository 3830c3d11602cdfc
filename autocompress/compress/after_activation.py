"""Factors of least error after the activation: E |f(W x + b) - f(L R p + c)|^2, f elementwise, p features of x.

Errors where a ReLU is off cost nothing, so that a lower rank reaches the same error (Zhang et al. 2015,
arXiv 1411.4229, section 3, who alternate with auxiliary variables and a penalty). Here a step moves the outputs z
against the gradient of the true error, t = z - g / curvature, and the next z is the best fit of rank r to t, which is
a reduced-rank regression in closed form: a projected gradient with Nesterov's momentum, started anew when the error
rises. The gradient's slope is the steeper one of f at z and at the target: where z is off and should not be, f is
flat, and nothing would bring it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.compress.reduced_rank import leading, root_of

STEPS = 40
_PATIENCE = 5
"""Steps without an error lower by a thousandth after which nothing more is expected."""

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prior:
    """What is known of the features p without the rows: the outputs are `whole` (out, k) p, nearly or exactly, plus a
    constant, `moments` (k, k) are those of p, about its `mean` (k,); float64, from as many inputs as there are."""

    whole: Tensor
    moments: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Fit:
    """L (out, rank), R (rank, k) and c (out,), in float64; `error` is the mean squared one on rows held out."""

    left: Tensor
    right: Tensor
    shift: Tensor
    error: float


def fitted(
    features: Tensor,
    outputs: Tensor,
    function: Function,
    *,
    rank: int | None,
    shift: Tensor | None = None,
    prior: Prior | None = None,
    steps: int = STEPS,
) -> Fit:
    """The fit to outputs (n, out), which go into the function, by features (n, k).

    Without a rank L is the only factor and R the identity. A `shift` (out,) given is kept, else it is fitted. The
    last fifth of the rows, which no step is fitted to, chooses between the steps. With a prior the first step is its
    best fit of that rank, and rows are needed for what moves away from it alone.
    """
    middle = fitted_rows(len(features))
    features, others = features[:middle], features[middle:]
    goal = function(outputs[middle:])
    outputs = outputs[:middle]
    solve = _Regression(features, rank, shift, prior)
    wanted, slope = function(outputs), _slope(function, outputs)
    best = solve(outputs)
    z = solve.predicted(best)
    lowest = _error(function(predicted(best, others)), goal)
    at, momentum, idle, last = z, 1.0, 0, _error(function(z), wanted)
    for _ in range(steps):
        got, own = function(at), _slope(function, at)
        steeper = torch.where(own.abs() >= slope.abs(), own, slope)
        found = solve(at - (got - wanted) * steeper)
        z, before = solve.predicted(found), z
        error, checked = _error(function(z), wanted), _error(function(predicted(found, others)), goal)
        idle = 0 if checked < lowest * 0.999 else idle + 1
        if checked < lowest:
            best, lowest = found, checked
        if error > last:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        at, momentum, last = z + (momentum - 1) / grown * (z - before), grown, error
        if idle >= _PATIENCE:
            break
    return Fit(*best, lowest)


def predicted(fit: tuple[Tensor, Tensor, Tensor], features: Tensor) -> Tensor:
    """The outputs (n, out) that L, R and c give."""
    left, right, shift = (part.to(features) for part in fit)
    return features @ right.T @ left.T + shift


def fitted_rows(count: int) -> int:
    """How many of so many rows steps are fitted to; the others choose."""
    return max(1, 4 * count // 5)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The mean squared difference of rows (n, out) over the variance of those wanted: 1 is as bad as their mean."""
    spread = float((wanted - wanted.mean(dim=0)).double().square().mean())
    lost = _error(got, wanted)
    return lost / spread if spread > 0 else float(lost > 0)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).double().square().mean())


def _slope(function: Function, at: Tensor) -> Tensor:
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x)
    return slope


class _Regression:
    """Reduced-rank regressions of many targets on the same features."""

    def __init__(self, features: Tensor, rank: int | None, shift: Tensor | None, prior: Prior | None) -> None:
        self.rank, self.shift, self.whole = rank, shift, None if prior is None else prior.whole
        if prior is not None:
            self.mean = prior.mean.to(features)
        else:
            self.mean = features.mean(dim=0) if shift is None else torch.zeros_like(features[0])
        self.given, self.features = features, features - self.mean
        self.own = root_of(self.features.T @ self.features / len(features))
        self.root = self.own if prior is None else root_of(prior.moments)
        self.known = None if self.whole is None else self.features @ self.whole.to(features).T

    def __call__(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = targets if self.known is None else targets - self.known
        centre = moved.mean(dim=0) if self.shift is None else self.shift.to(targets)
        moved = moved - centre
        cross = (self.features.T @ moved / len(targets)).double()
        least = torch.cholesky_solve(cross, self.own).T
        least = least if self.whole is None else least + self.whole
        if self.rank is None:
            left, right = least, torch.eye(least.shape[1], dtype=least.dtype, device=least.device)
        else:
            half = least @ self.root  # (out, k); its Gram is that of the fit
            left = leading(half @ half.T)[:, : self.rank]
            right = left.T @ least
        return left, right, centre.double() - left @ (right @ self.mean.double())

    def predicted(self, fit: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return predicted(fit, self.given)
