"""What of a model can be compressed: layers with shapes and MACs, and all else with the reason why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autocompress.compress import lowrank
from autocompress.compress.calibrate import is_layer
from autocompress.compress.products import PROJECTIONS, count_macs
from autocompress.errors import TaskError
from autocompress.plan import PARAMETERS, SEEN, LayerPlan, LayerSpec

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    nn.ConvTranspose1d: "transposed",
    nn.ConvTranspose2d: "transposed",
    nn.ConvTranspose3d: "transposed",
    nn.RNNBase: "recurrent",
    nn.RNNCellBase: "recurrent",
    nn.MultiheadAttention: "attention",
}
"""Of torch's modules; all other matrices are of the kind "parameter"."""
WHOLE = {
    "embedding": "a table that is looked up",
    "transposed": "transposed convolution",
    "recurrent": "one of several weights of a recurrent layer",
    "attention": "one of several weights of an attention",
    "parameter": "a matrix of the model's own",
}
"""Why layers of a kind have no factors, and their inputs are not looked at."""
_TABLES = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FEWEST = 256
"""Elements from which a matrix of the model's own is worth knobs of its own."""


@dataclass(frozen=True)
class Kept:
    """A parameter or buffer that is carried exactly, and why."""

    name: str
    elements: int
    reason: str


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a model, once: the layers that can be compressed, and what is kept."""

    layers: tuple[LayerSpec, ...]
    kept: tuple[Kept, ...]

    @property
    def parameters(self) -> int:
        """All parameters and buffers, shared ones counted once."""
        return sum(s.parameters for s in self.layers) + sum(k.elements for k in self.kept)


@dataclass(frozen=True)
class _Site:
    """One use of a tensor: module path, module, attribute."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def key(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


def find_layers(model: nn.Module, call: Callable[[nn.Module], Any]) -> Inventory:
    """The model's inventory. `call` runs one example through a module that it is given.

    The model is not touched: MACs are counted and factorisations tried on copies. Raises
    TaskError where no layer can be compressed.
    """
    layers: list[LayerSpec] = []
    kept: list[Kept] = []
    for sites in _tensors(model):
        spec = _layer(sites)
        if isinstance(spec, LayerSpec):
            layers.append(spec)
        else:
            kept.append(Kept(sites[0].key, _tensor(sites[0]).numel(), spec))
    if not layers:
        found = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise TaskError(
            f"model {type(model).__name__} has no layer to compress: it holds {', '.join(found)}, "
            "compressible are weights of linear layers, convolutions, recurrent layers, embeddings (without max_norm) "
            f"and attention, and other matrices of {FEWEST} or more elements"
        )
    macs = count_macs(model, layers, call)
    layers = [replace(spec, macs=macs[spec.name]) for spec in layers]
    return Inventory(tuple(_try_factors(model, layers, call)), tuple(kept))


def _tensors(model: nn.Module) -> list[list[_Site]]:
    """The places of each distinct parameter and buffer, in the order of the model's state."""
    sites: dict[int, list[_Site]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = [*module._parameters.items(), *module._buffers.items()]
        for attribute, tensor in own:
            if tensor is not None:
                sites.setdefault(id(tensor), []).append(_Site(path, module, attribute))
    return list(sites.values())


def _tensor(site: _Site) -> torch.Tensor:
    tensor: torch.Tensor = getattr(site.module, site.attribute)
    return tensor


def _layer(sites: Sequence[_Site]) -> LayerSpec | str:
    """The layer that the tensor is the weight of, or why there is none."""
    first, tensor = sites[0], _tensor(sites[0])
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        raise TaskError(f"parameter {first.key!r} is not initialised: run one batch through the model first")
    if first.attribute in first.module._buffers:
        return "buffer"
    home = next((s for s in sites if s.attribute == "weight" and is_layer(s.module)), first)
    kind, reason = _kind_of(home, tensor)
    if any(getattr(s.module, "max_norm", None) is not None for s in sites if isinstance(s.module, _TABLES)):
        return "embedding table that is normalised in each call (max_norm)"
    if not kind:
        return reason
    if not tensor.is_floating_point():
        return f"weights are {str(tensor.dtype).removeprefix('torch.')}, not real floating point"
    if tensor.numel() < 2:
        return "a single weight"
    module, others = home.module, [s for s in sites if s is not home]
    groups = getattr(module, "groups", 1) if kind in SEEN else 1
    because = ""
    if kind not in SEEN:
        because = WHOLE[kind]
    elif others:
        because = f"shared with {', '.join(o.path or 'model' for o in others)}"
    elif groups > 1:
        because = "grouped convolution"
    elif type(module).forward is not _base(module).forward:
        because = f"{type(module).__name__} has a forward of its own"
    elif module._forward_hooks or module._forward_pre_hooks:
        because = "the module has hooks"
    own = kind in PARAMETERS
    return LayerSpec(
        name=home.key if own else home.path,
        kind=kind,
        shape=tuple(tensor.shape),
        macs=0,
        groups=groups,
        shared_with=tuple(site.key if own else site.path for site in others),
        factorable=not because,
        whole_because=because,
    )


def _base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in KINDS if isinstance(module, base))


def _kind_of(site: _Site, tensor: torch.Tensor) -> tuple[str, str]:
    """A parameter's kind, or "" and why it is carried exactly."""
    module, owner = site.module, type(site.module).__name__
    if owner == "ParametrizationList":
        return "", "parametrized weight (weight_norm, spectral_norm and the like)"
    if isinstance(module, NORMS):
        return "", f"{site.attribute} of {owner}"
    kind = next((kind for base, kind in KINDS.items() if isinstance(module, base)), "parameter")
    if kind != "parameter" and _names_weight(site.attribute, kind) and tensor.dim() > 1:
        return kind, ""
    if kind not in PARAMETERS and "weight" not in module._parameters:
        return "", f"parameter {site.attribute!r} of a {owner} whose weight is made from it"
    return _own(site, tensor)


def _own(site: _Site, tensor: torch.Tensor) -> tuple[str, str]:
    """The same of a parameter that is no weight of torch's modules."""
    owner = type(site.module).__name__
    if sum(size > 1 for size in tensor.shape) > 1:
        few = f"parameter {site.attribute!r} of {owner}, a matrix of fewer than {FEWEST} elements"
        return ("parameter", "") if tensor.numel() >= FEWEST else ("", few)
    return "", f"{'bias' if 'bias' in site.attribute else f'parameter {site.attribute!r}'} of {owner}"


def _names_weight(attribute: str, kind: str) -> bool:
    """Whether modules of a kind call a weight so."""
    if kind == "attention":
        return attribute in PROJECTIONS
    return attribute.startswith("weight_") if kind == "recurrent" else attribute == "weight"


def _try_factors(model: nn.Module, layers: Sequence[LayerSpec], call: Callable[[nn.Module], Any]) -> list[LayerSpec]:
    """The layers, those marked whole whose parent fails when they are two modules instead of one.

    Some modules read a child's weight by themselves (MultiheadAttention, TransformerEncoderLayer). A layer with layers
    inside (a subclass with adapters) would lose them.
    """
    holders = {s.name for s in layers if any(o.name != s.name and o.name.startswith(_inside(s.name)) for o in layers)}
    inside = "it has layers inside"
    layers = [replace(s, factorable=False, whole_because=inside) if s.name in holders else s for s in layers]

    def runs(names: Sequence[str]) -> bool:
        probe = copy.deepcopy(model).eval()
        for spec in layers:
            if spec.name in names:
                probe = lowrank.replace(probe, spec.name, lowrank.factorised(_at(probe, spec.name), LayerPlan(rank=1)))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                call(probe)
        except Exception:  # whatever a user's module raises when its child is not what it expects
            return False
        return True

    free = [spec.name for spec in layers if spec.factorable and spec.max_rank() > 0]
    if not free or runs(free):
        return list(layers)
    bad = {name for name in free if not runs([name])}
    because = "a parent module reads this weight by itself"
    return [replace(s, factorable=False, whole_because=because) if s.name in bad else s for s in layers]


def _inside(path: str) -> str:
    return f"{path}." if path else ""


def _at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model
