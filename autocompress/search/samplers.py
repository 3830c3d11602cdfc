"""Optuna's samplers by name, seeded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autocompress.errors import UsageError
from autocompress.search.continuation import CONTINUATION

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

OPTUNA = ("tpe", "nsga2", "nsga3", "gp", "qmc", "random")
SAMPLERS = (*OPTUNA, CONTINUATION)


def check_sampler(name: str) -> None:
    """Raise UsageError for a name that is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UsageError(f"sampler is {name!r}, allowed: {', '.join(SAMPLERS)}")


def make_sampler(name: str, seed: int, startup: int = 10) -> BaseSampler:
    """The Optuna sampler of that name; a random one for "continuation", which proposes by itself.

    `startup`: trials before TPE and GP begin to model.

    Raises UsageError for an unknown name.
    """
    check_sampler(name)
    import warnings

    import optuna
    from optuna import samplers

    seed %= 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=20)
        if name == "nsga3":
            return samplers.NSGAIIISampler(seed=seed, population_size=20)
        if name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if name == "qmc":
            return samplers.QMCSampler(seed=seed, scramble=True)
        return samplers.RandomSampler(seed=seed)
