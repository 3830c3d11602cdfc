"""How a loaded model runs on a CPU: factors kept or multiplied out, weights dense or sparse, by rule or by measurement.

Products with a sparse weight are those of MKL (`torch.sparse_csr`, 32-bit indices), which beat SciPy's loops at one
example as at many. Not built: block sparse weights, since the zeros of a pruned layer come in no blocks (at 90 % zeros
four of five blocks of 4 x 4 hold a weight), and sparse convolutions, for which torch has no kernel.
"""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.compress import lowrank
from autocompress.errors import UsageError

Runtime: TypeAlias = Literal["factorised", "dense", "sparse", "auto"]
Trials: TypeAlias = Callable[[str, nn.Module], list[Tensor]]
"""The inputs on which to measure a layer, given its path and the dense layer; none for one that is not reached."""
Measure: TypeAlias = Callable[[Sequence[Callable[[], Any]]], Sequence[float]]
"""Seconds that one run of each of some functions takes."""

SPARSE_FROM = 0.8
"""The share of zeros from which "sparse" takes a weight: it is faster but for small layers and a single example."""
TRIED_FROM = 0.5
"""The share of zeros from which "auto" measures."""
MARGIN = 0.95
"""What is not dense must take at most this part of the dense layer's time, so that noise costs no more than 5 %."""
_PRODUCTS = (torch.float32, torch.float64)
_SIZES = {1: (16, 64, 256), 2: (7, 14, 28), 3: (4, 8, 16)}
"""Positions along each axis of the inputs that a convolution of so many axes is measured on, for want of an example."""
_MOST_IMAGES = 4
"""Examples that these have at most: a convolution's time is in proportion to them."""


@dataclass(frozen=True)
class Whole:
    """What factors stand for: the original layer (its values do not matter) and the factors' scheme."""

    layer: nn.Module
    scheme: str


class SparseLinear(nn.Module):
    """An nn.Linear, for inference, whose weight (out, in) is held as compressed sparse rows.

    Computes what the dense layer does but for the order of its sums, for finite inputs of any number of leading
    dimensions; gradients reach the input and the bias, the weight is fixed. Its state is that of the nn.Linear:
    `weight` is made dense whenever it is read. Where there is no sparse product (autocast, 16 bits) it is dense.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self._hold(weight)
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), a new tensor each time."""
        return self._csr.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        shape, rows = x.shape, self._csr
        if shape[-1] != self.in_features or not self._has_product or torch.is_autocast_enabled(self._device):
            return F.linear(x, self.weight, self.bias)
        bias = self._parameters["bias"]  # `self.bias` would be looked for in three places, and microseconds count
        if shape.numel() == self.in_features:
            vector = x.view(-1)
            y = torch.mv(rows, vector) if bias is None else torch.addmv(bias, rows, vector)
            return y.view(*shape[:-1], -1)
        columns = x.reshape(-1, self.in_features).t()  # features first is what the kernel is fast at
        y = torch.mm(rows, columns) if bias is None else torch.addmm(bias.unsqueeze(1), rows, columns)
        return y.t().contiguous().view(*shape[:-1], self.out_features)  # whoever comes next may call view

    def extra_repr(self) -> str:
        share = self._csr.values().numel() / (self.out_features * self.in_features)
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, nonzero={share:.1%}"

    def _hold(self, weight: Tensor) -> None:
        with _no_beta_warning():
            rows = weight.detach().to_sparse_csr()
        self._set(rows.crow_indices().int(), rows.col_indices().int(), rows.values())

    def _set(self, starts: Tensor, columns: Tensor, values: Tensor) -> None:
        shape = (self.out_features, self.in_features)
        with _no_beta_warning():  # checked, since a product with wrong indices reads foreign memory
            self._csr = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=True)
        self._has_product, self._device = values.dtype in _PRODUCTS, values.device.type

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._csr.crow_indices(), self._csr.col_indices(), self._csr.values()

    # torch copies, moves and saves no module that holds a sparse tensor: those who ask get its parts, or a dense one

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set(*map(fn, self._parts()))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_csr": self._parts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set(*state["_csr"])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, missing, _, errors = rest
        key = prefix + "weight"
        super()._load_from_state_dict({k: v for k, v in state.items() if k != key}, prefix, *rest)
        weight, shape = state.get(key), (self.out_features, self.in_features)
        if weight is None:
            missing += [key] * strict
        elif weight.shape != shape:
            errors.append(f"{key!r} has shape {list(weight.shape)}, this model's has {list(shape)}")
        else:
            held = self._csr.values()
            self._hold(weight.to(device=held.device, dtype=held.dtype))


def check(runtime: str, batch: int) -> None:
    """Raise UsageError unless these are values that `arranged` takes."""
    if runtime not in get_args(Runtime):
        raise UsageError(f"runtime is {runtime!r}, allowed: {', '.join(get_args(Runtime))}")
    if not (isinstance(batch, int) and batch >= 1):
        raise UsageError(f"batch is {batch!r}, allowed: 1 and more")
    if runtime == "sparse" and not _has_mkl():
        raise UsageError("runtime 'sparse' needs a torch with MKL, which this one is without: use 'auto'")


def interleaved(calls: Sequence[Callable[[], Any]], budget: float = 0.02, limit: float = 1.0) -> list[float]:
    """Seconds a run of each takes, medians over rounds in which all take their turn.

    Takes about `budget` seconds in all, as many as five rounds need where that is more, and a round more than
    `limit` at most.
    """
    for call in calls:
        call()
    repeats = [max(1, int(100e-6 / max(_seconds(call, 1), 1e-9))) for call in calls]
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    spent = 0.0
    while not rounds or spent < budget or (len(rounds) < 5 and spent < limit):
        rounds.append([_seconds(*each) for each in zip(calls, repeats, strict=True)])
        spent = time.perf_counter() - begun
    return [median(times) for times in zip(*rounds, strict=True)]


def arranged(
    module: nn.Module,
    wholes: Mapping[str, Whole],
    runtime: Runtime,
    *,
    batch: int = 1,
    example: Any = None,
    measure: Measure = interleaved,
) -> nn.Module:
    """The module with its layers as the runtime wants them; it is changed in place where it is not replaced itself.

    `wholes` names the places where two factors stand, as `lowrank.factorised` makes them. "auto" measures on what each
    layer gets when the model is called with `example` (a tensor, or a tuple or mapping of arguments), or else on
    `batch` rows for a linear layer and images of several sizes for a convolution, and takes what is fastest on all of
    them, now, on this machine and its thread count. Layers that the example does not reach stay as they are.
    """
    with torch.no_grad():
        match runtime:
            case "dense":
                for name, whole in wholes.items():
                    module = lowrank.replace(module, name, _multiplied(module.get_submodule(name), whole))
            case "sparse":
                for name, layer in _candidates(module, SPARSE_FROM).items():
                    module = lowrank.replace(module, name, SparseLinear(layer.weight, layer.bias))
            case "auto":
                found = None if example is None else _reaching(module, wholes, example)
                trials = partial(_trials, batch=batch, found=found)
                module = _sparse_where_faster(module, trials, measure)
                module = _multiplied_where_faster(module, wholes, trials, measure)
    return module


def _sparse_where_faster(module: nn.Module, trials: Trials, measure: Measure) -> nn.Module:
    for name, layer in _candidates(module, TRIED_FROM).items() if _has_mkl() else ():
        if inputs := trials(name, layer):
            sparse = SparseLinear(layer.weight, layer.bias)
            if _is_faster(sparse, layer, inputs, measure):
                module = lowrank.replace(module, name, sparse)
    return module


def _multiplied_where_faster(
    module: nn.Module, wholes: Mapping[str, Whole], trials: Trials, measure: Measure
) -> nn.Module:
    for name, whole in wholes.items():
        pair = module.get_submodule(name)
        ones = torch.ones(_weight(whole.layer).shape, dtype=_weight(whole.layer).dtype)  # values take no time
        dense = _with_weight(whole, ones, _bias(pair))
        if not _is_faster(pair, dense, trials(name, dense), measure):
            module = lowrank.replace(module, name, _multiplied(pair, whole))
    return module


def _is_faster(other: nn.Module, dense: nn.Module, inputs: Sequence[Tensor], measure: Measure) -> bool:
    """Whether it takes less of the dense layer's time than the margin, for each of the inputs."""
    for x in inputs:
        base, seconds = measure([partial(dense, x), partial(other, x)])
        if seconds > MARGIN * base:
            return False
    return True


def _reaching(module: nn.Module, wholes: Mapping[str, Whole], example: Any) -> dict[str, Tensor]:
    """The largest tensor that each linear layer and each pair of factors is called with, by path."""
    found: dict[str, Tensor] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.numel() > (found[path].numel() if path in found else 0):
            found[path] = x.detach().clone()  # which the model may change in place

    hooks = [
        place.register_forward_pre_hook(partial(note, path))
        for path, place in module.named_modules()
        if path in wholes or isinstance(place, nn.Linear)
    ]
    args, keywords = as_call(example)
    try:
        module(*args, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model call for one batch of inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def _trials(name: str, layer: nn.Module, batch: int, found: Mapping[str, Tensor] | None) -> list[Tensor]:
    """Inputs for the layer: what was found to reach it; else (batch, in), or a few images of several sizes."""
    if found is not None:
        return [found[name]] if name in found else []
    dtype = _weight(layer).dtype
    if isinstance(layer, nn.Linear):
        return [torch.ones(batch, layer.in_features, dtype=dtype)]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [
        torch.ones(min(batch, _MOST_IMAGES), layer.in_channels, *(max(size, r) for r in reach), dtype=dtype)
        for size in _SIZES[len(reach)]
    ]


def _multiplied(pair: nn.Module, whole: Whole) -> nn.Module:
    """The plain layer that factors stand for; the product is summed in float64."""
    factors = [_weight(factor) for factor in pair.children()]
    shape = tuple(_weight(whole.layer).shape)
    product = lowrank.multiplied([factor.double() for factor in factors], shape, whole.scheme)
    return _with_weight(whole, product.to(factors[0].dtype).contiguous(), _bias(pair))


def _with_weight(whole: Whole, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A copy of the original layer that has this weight and bias, in eval mode."""
    layer = copy.deepcopy(whole.layer)
    layer.weight = nn.Parameter(weight, _weight(layer).requires_grad)
    setattr(layer, "bias", bias)  # noqa: B010  # which nn.Module's stubs want to be a Tensor
    return layer.eval()


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _bias(pair: nn.Module) -> nn.Parameter | None:
    """The bias of factors, which the last one adds."""
    bias: nn.Parameter | None = list(pair.children())[-1].bias  # type: ignore[assignment]
    return bias


def _candidates(module: nn.Module, zeros: float) -> dict[str, nn.Linear]:
    """Linear layers that can be sparse by path: used in one place, called by their parents, with so many zeros."""
    places = dict(module.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for place in places.values() for p in place._parameters.values() if p is not None)
    return {
        path: layer
        for path, layer in places.items()
        if type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
        and uses[id(layer.weight)] == 1
        and layer.weight.dtype in _PRODUCTS
        and 0 < layer.weight.numel() < 1 << 31
        and not (path and _reads_weights(type(places[path.rpartition(".")[0]])))
        and layer.weight.count_nonzero().item() <= (1 - zeros) * layer.weight.numel()
    }


def _reads_weights(kind: type[nn.Module]) -> bool:
    """Whether a class names a weight in its methods, as MultiheadAttention and TransformerEncoderLayer do.

    Such parents may compute with a child's weight without calling it. Those that this does not see get the right
    weight from a SparseLinear, slowly.
    """
    methods = (
        inspect.unwrap(value)
        for base in kind.__mro__
        if issubclass(base, nn.Module) and base is not nn.Module
        for name, value in vars(base).items()
        if inspect.isfunction(value) and "init" not in name and "reset" not in name
    )
    return any("weight" in method.__code__.co_names for method in methods)


@contextmanager
def _no_beta_warning() -> Iterator[None]:
    """torch warns once in a process that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        yield
