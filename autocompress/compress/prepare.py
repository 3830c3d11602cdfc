"""The layers of a model one after the other under plans that ask for their inputs: activation, Hessian.

All calibration examples run through the model once, as one batch. Before a layer is called, its inputs, which the
compressed layers before it gave, are looked at, the layer is solved, and goes on with the values it will have: so an
error made early is seen later (Frantar et al. 2022, arXiv 2210.17323). The uncompressed model runs beside it, a layer
at a time, so that the inputs that a layer should have got are known too (`solve.towards`).

A layer that is called several times is solved in front, by the inputs of all its calls in the model whose other layers
are not compressed. One whose inputs cannot be seen (`calibrate`) is left to magnitude and nearest.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress import calibrate
from autocompress.compress.calibrate import Moments
from autocompress.compress.solve import Prepared

Places = Mapping[str, Sequence[nn.Module]]
Solver = Callable[[str, Tensor, Moments, int], Prepared]
"""(key, weight, moments of its inputs, groups) -> what it becomes."""


class _Done(Exception):
    """Every layer has been seen: the rest of the model need not run."""


def prepare(  # noqa: PLR0917
    module: nn.Module,
    plain: Mapping[str, Tensor],
    wanted: Mapping[str, str],
    solve: Solver,
    values: Callable[[str, Prepared], Tensor],
    run: Callable[[nn.Module], Any],
) -> dict[str, Prepared]:
    """By state key what each weight of `wanted` (keys, with the name that users know) becomes.

    `plain` are the values of all other compressed weights; `values(key, prepared)` those of one that is solved;
    `run(module)` calls a model with the calibration batch. The module is as before afterwards. Warns, naming them,
    of layers whose inputs are never seen.
    """
    calls, sums = _looked_over(module, wanted, run)
    single = [key for key in wanted if calls[key] == 1]
    result: dict[str, Prepared] = {}
    before = {key: module.get_parameter(key).data for key in (*plain, *wanted)}
    original = copy.deepcopy(module)

    def settle(key: str, layer: nn.Module, moments: Moments) -> None:
        result[key] = solve(key, before[key], moments, getattr(layer, "groups", 1))
        module.get_parameter(key).data = values(key, result[key])

    try:
        for key, value in plain.items():
            module.get_parameter(key).data = value
        for key, moments in sums.items():
            settle(key, _users(module, key)[0], moments)
        if single:
            with _inputs_of(original, _places(original, single), run) as should:

                def look(key: str, layer: nn.Module, x: Tensor) -> None:
                    moments = Moments()
                    if not should(key, x.shape, lambda wanted: moments.add(layer, x, wanted)):
                        moments.add(layer, x)
                    settle(key, layer, moments)
                    if all(k in result for k in single):
                        raise _Done

                with torch.no_grad(), calibrate.watched(module, _places(module, single), look):
                    run(module)
    except _Done:
        pass
    finally:
        for key, value in before.items():
            module.get_parameter(key).data = value
    unseen = [label for key, label in wanted.items() if key not in result]
    if unseen:
        warnings.warn(
            f"the inputs of {', '.join(map(repr, unseen))} cannot be seen, since a parent module computes with the "
            "weight by itself: pruned by magnitude and rounded to nearest",
            stacklevel=2,
        )
    return result


def _looked_over(
    module: nn.Module, keys: Mapping[str, str], run: Callable[[nn.Module], Any]
) -> tuple[Counter[str], dict[str, Moments]]:
    """How often each layer is called, and the moments of those that are called more than once."""
    calls: Counter[str] = Counter()
    sums: dict[str, Moments] = {}
    places = _places(module, keys)

    def count(key: str, _: nn.Module, __: Tensor) -> None:
        calls[key] += 1

    def add(key: str, layer: nn.Module, x: Tensor) -> None:
        sums.setdefault(key, Moments()).add(layer, x)

    with torch.no_grad():
        with calibrate.watched(module, places, count):
            run(module)
        often = {key: places[key] for key in keys if calls[key] > 1}
        if often:
            with calibrate.watched(module, often, add):
                run(module)
    return calls, sums


@contextmanager
def _inputs_of(
    model: nn.Module, places: Places, run: Callable[[nn.Module], Any]
) -> Iterator[Callable[[str, torch.Size, Callable[[Tensor], None]], bool]]:
    """Runs a model in a thread of its own that waits at each layer until it is asked for.

    It gives a function: (key, shape, use) calls `use` with the layer's inputs, in the order in which layers are called.
    From the first on that the model calls elsewhere, or with another shape (a mixture of experts that sends examples
    other ways), it calls `use` no more, and gives False.
    """
    waiting: Queue[tuple[str, Tensor] | BaseException | None] = Queue(1)
    used: Queue[bool] = Queue(1)

    def stop_at(key: str, _: nn.Module, x: Tensor) -> None:
        waiting.put((key, x))
        if not used.get():
            raise _Done

    def follow() -> None:
        try:
            with torch.no_grad(), calibrate.watched(model, places, stop_at):
                run(model)
            waiting.put(None)
        except _Done:
            pass
        except BaseException as error:
            waiting.put(error)

    together = True

    def should(key: str, shape: torch.Size, use: Callable[[Tensor], None]) -> bool:
        nonlocal together
        if together:
            found = waiting.get()
            if isinstance(found, BaseException):
                raise found
            together = found is not None and found[0] == key and found[1].shape == shape
            if found is not None and together:
                use(found[1])
                used.put(True)
        return together

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield should
    finally:
        used.put(False)
        thread.join()


def _places(module: nn.Module, keys: Any) -> dict[str, list[nn.Module]]:
    return {key: _users(module, key) for key in keys}


def _users(module: nn.Module, key: str) -> list[nn.Module]:
    """The layers that multiply by a weight."""
    weight = module.get_parameter(key)
    parts = (part for part in module.modules() if calibrate.is_layer(part))
    return [part for part in parts if part._parameters.get("weight") is weight]
