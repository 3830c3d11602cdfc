"""The registry of torch.onnx.export is built once, and nobody else's exports notice."""

import pytest
import torch
from torch import nn

from autocompress.deploy import onnx, torch_registry
from autocompress.deploy.torch_registry import kept_registry

_registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
REGISTRY = _registration.ONNXRegistry


@pytest.fixture
def built(monkeypatch):
    """The versions that registries were built for, from an empty cache on."""
    monkeypatch.setattr(torch_registry, "_BUILT", {})
    seen, whole = [], REGISTRY.from_torchlib

    def from_torchlib(cls, opset_version):
        seen.append(opset_version)
        return whole(opset_version)

    monkeypatch.setattr(REGISTRY, "from_torchlib", classmethod(from_torchlib))
    return seen


def exported() -> bytes:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    model, _ = onnx.graph_of(net, {"input": torch.zeros(2, 5)}, False, ["output"])
    return model.SerializeToString(deterministic=True)


def test_it_is_built_once_and_files_are_the_same(built, monkeypatch):
    first, second = exported(), exported()
    assert built == [onnx.OPSET]
    monkeypatch.setattr(torch_registry, "_home", lambda: None)  # as where torch has it elsewhere
    assert exported() == first == second
    assert built == [onnx.OPSET] * 2


def test_each_export_has_a_copy_and_what_is_asked_for(built):
    whole = vars(REGISTRY)["from_torchlib"]
    with kept_registry():
        one, two = (REGISTRY().from_torchlib(opset_version=18) for _ in range(2))
        relu = torch.ops.aten.relu.default
        before = len(one.get_decomps(relu))
        one.register_op(relu, lambda x: x)
        assert (len(one.get_decomps(relu)), len(two.get_decomps(relu))) == (before + 1, before)
        assert len(REGISTRY.from_torchlib(opset_version=18).get_decomps(relu)) == before
        assert REGISTRY.from_torchlib(opset_version=20).opset_version == 20
    assert built == [18, 20]
    assert vars(REGISTRY)["from_torchlib"] is whole


def test_an_error_inside_leaves_torch_as_it_was():
    whole = vars(REGISTRY)["from_torchlib"]
    with pytest.raises(KeyError), kept_registry():
        raise KeyError
    assert vars(REGISTRY)["from_torchlib"] is whole


@pytest.mark.parametrize("change", ["gone", "no class method"])
def test_another_torch_builds_its_own(change, monkeypatch):
    if change == "gone":
        monkeypatch.delattr(_registration, "ONNXRegistry")
    else:
        monkeypatch.setattr(REGISTRY, "from_torchlib", lambda: 7)
    with kept_registry():
        assert change == "gone" or REGISTRY.from_torchlib() == 7


def test_a_registry_of_another_kind_is_passed_on(monkeypatch):
    monkeypatch.setattr(REGISTRY, "from_torchlib", classmethod(lambda cls: object()))
    with kept_registry():
        assert REGISTRY.from_torchlib() is not REGISTRY.from_torchlib()
