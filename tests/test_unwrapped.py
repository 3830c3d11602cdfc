"""What training wraps around a model: the wrapped model and its own copy of torch's are the reference."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import autocompress
from autocompress.codec import container
from autocompress.compress import artifact
from autocompress.compress.unwrapped import unwrapped
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.random_unstructured(layer, "bias", 0.25)


def twice(layer: nn.Module) -> nn.Module:
    """Two parametrizations, one over the other."""
    return parametrizations.spectral_norm(parametrizations.weight_norm(layer))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "both": twice,
    "pruned": pruned,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda layer: torch.compile(nn.DataParallel(layer)),
}


def net(wrap: Callable[[nn.Module], nn.Module], wrap_all: Callable[[nn.Module], nn.Module] = lambda m: m) -> nn.Module:
    """A small convolutional net, wrapped, whose weights were trained for a step since."""
    torch.manual_seed(0)
    inner = nn.Sequential(
        wrap(nn.Conv1d(1, 6, 3, padding=1)), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(48, 4))
    )
    model = wrap_all(inner)
    inner(torch.randn(8, 1, 8)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.3 * parameter.grad)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_computes_what_the_wrapped_model_does_with_plain_layers(way: str) -> None:
    eager = way if "compiled" not in way else "parallel"  # what compiled modules wrap is the reference for them
    reference, model = net(WAYS[eager]).eval(), net(WAYS[way])
    found = unwrapped(model)
    assert [type(m) for m in found.modules()] == [type(m) for m in net(lambda m: m).modules()]
    assert set(found.state_dict()) == set(net(lambda m: m).state_dict())
    assert found.training
    inputs = torch.randn(5, 1, 8)
    torch.testing.assert_close(found.eval()(inputs), reference(inputs), rtol=1e-6, atol=1e-6)
    copy.deepcopy(found)
    assert unwrapped(found) is found


@pytest.mark.parametrize("way", WAYS)
def test_leaves_the_model_itself_as_it_is(way: str) -> None:
    model = net(WAYS[way])
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    kinds = [type(m) for m in model.modules()]
    inputs, called = torch.randn(5, 1, 8), "compiled" not in way  # that would take seconds
    outputs = model.eval()(inputs) if called else None
    found = unwrapped(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(id(after[key]) == which and torch.equal(after[key], value) for key, (which, value) in before.items())
    assert [type(m) for m in model.modules()] == kinds
    if called:
        assert torch.equal(model(inputs), outputs)


@pytest.mark.parametrize("wrap_all", [torch.compile, nn.DataParallel])
def test_a_wrapper_around_the_whole_gives_what_it_wraps(wrap_all: Callable[[nn.Module], nn.Module]) -> None:
    model = net(lambda m: m)
    assert unwrapped(wrap_all(model)) is model
    assert unwrapped(nn.DataParallel(wrap_all(model))) is model


def test_distributed(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = net(lambda m: m)
        assert unwrapped(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_in_two_places_stays_one() -> None:
    shared = parametrizations.weight_norm(nn.Linear(4, 4))
    compiled = torch.compile(nn.Linear(4, 4))
    found = unwrapped(nn.ModuleList([shared, compiled, shared, compiled]))
    assert found[0] is found[2]
    assert found[1] is found[3]
    assert type(found[0]) is type(found[1]) is nn.Linear


def test_recurrent_weights() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 5)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        nn.utils.weight_norm(model, name)
    with torch.no_grad():
        model.weight_hh_l0_g.mul_(1.5)
    inputs = torch.randn(4, 2, 3)
    found = unwrapped(model)
    torch.testing.assert_close(found(inputs), model(inputs))
    assert set(found.state_dict()) == set(nn.LSTM(3, 5).state_dict())


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "parametrized weight_norm", "orthogonal", "pruned"])
def test_what_is_frozen_stays_frozen(way: str) -> None:
    model = net(WAYS[way])
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    found = unwrapped(model)
    assert not found[0].weight.requires_grad
    assert found[4].weight.requires_grad


def test_a_model_that_cannot_be_copied_comes_back() -> None:
    model = net(parametrizations.weight_norm)
    model.held = torch.ones(1, requires_grad=True) * 2  # not a leaf
    assert unwrapped(model) is model


@pytest.mark.parametrize("way", ["weight_norm", "parametrized spectral_norm", "compiled", "parallel", "pruned"])
def test_a_task_compresses_and_loads_it(way: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    data = [(torch.randn(40, 1, 8), torch.randint(4, (40,))) for _ in range(3)]
    loss = nn.functional.cross_entropy
    task = autocompress.Task(net(WAYS[way]), *data, loss=loss, metric=lambda o, t: float((o.argmax(1) == t).sum() / 40))
    bench = Workbench(task, "cpu")
    assert [spec.name for spec in bench.layers] == ["0", "4"]
    plan = Plan({spec.name: LayerPlan(bits=4, threshold=0.3) for spec in bench.layers}, Recipe(epochs=1))
    *_, outcome = run_trial(bench, plan, Budget((1.0,)))
    file = tmp_path / "artifact.acz"
    file.write_bytes(outcome.artifact)
    loaded = [artifact.load(file), artifact.load(file, model=net(WAYS[way])), artifact.load(file, model=task.model)]
    loaded.append(artifact.restore(container.unpack(outcome.artifact), net(WAYS[way])))
    first, *others = (module(data[0][0]) for module in loaded)
    assert all(torch.equal(first, other) for other in others)
    assert replace(task, name="again").model is task.model


class Deep(nn.Module):
    """Wrapped modules far inside, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.DataParallel(parametrizations.weight_norm(nn.Linear(6, 6)))
        blocks = [nn.ModuleDict({"mix": shared, "norm": pruned(nn.Linear(6, 6))}) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block["norm"](block["mix"](x)))
        return x


def test_wrapped_modules_far_inside() -> None:
    torch.manual_seed(0)
    model = Deep()
    found = unwrapped(model)
    assert {type(m) for m in found.modules()} == {Deep, nn.ModuleList, nn.ModuleDict, nn.Linear}
    assert found.blocks[0]["mix"] is found.blocks[1]["mix"]
    inputs = torch.randn(4, 6)
    torch.testing.assert_close(found(inputs), model(inputs))


def test_a_mask_on_one_of_two_tied_weights_stays_on_that_one() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["table"].weight
    table = model["table"].weight.detach().clone()
    prune.l1_unstructured(model["head"], "weight", 0.5)
    found = unwrapped(model)
    assert torch.equal(found["table"].weight, table)
    assert torch.equal(found["head"].weight, model["head"].weight)
    assert torch.equal(model["table"].weight, table)


@pytest.mark.parametrize("way", ["parametrized weight_norm", "pruned"])
def test_tied_weights_stay_tied(way: str) -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(5, 5), nn.Linear(5, 5)
    other.weight = one.weight
    if way == "pruned":
        mask = torch.rand(5, 5) > 0.5
        for layer in (one, other):
            prune.custom_from_mask(layer, "weight", mask)
    else:
        one, other = WAYS[way](one), WAYS[way](other)
        other.parametrizations["weight"] = one.parametrizations["weight"]
    found = unwrapped(nn.Sequential(one, other))
    assert found[0].weight is found[1].weight
    assert found[0].bias is not found[1].bias
    assert torch.equal(found[0].weight, one.weight)


def test_parametrized_recurrent_weights() -> None:
    torch.manual_seed(0)
    model = nn.GRU(3, 5)
    parametrizations.weight_norm(model, "weight_hh_l0")
    with torch.no_grad():
        model.parametrizations.weight_hh_l0.original0.mul_(1.5)
    inputs = torch.randn(4, 2, 3)
    expected = model(inputs)[0]
    found = unwrapped(model)
    assert type(found) is nn.GRU
    torch.testing.assert_close(found(inputs)[0], expected)
    torch.testing.assert_close(model(inputs)[0], expected)


def test_a_buffer_stays_a_buffer() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("shift", torch.zeros(3))
    parametrize.register_parametrization(model, "shift", nn.Softplus())
    found = unwrapped(model)
    assert [name for name, _ in found.named_buffers()] == ["shift"]
    assert found.shift.tolist() == pytest.approx([0.6931472] * 3)


def test_a_weight_is_frozen_where_all_it_comes_from_is() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    model.parametrizations.weight.original0.requires_grad_(False)
    assert unwrapped(model).weight.requires_grad


@pytest.mark.parametrize("prepared", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_masks_over_normalised_weights_never_end_in_an_error(prepared: Callable[[nn.Module], nn.Module]) -> None:
    model = prepared(nn.Linear(4, 4))
    name = "weight_v" if prepared is nn.utils.weight_norm else "weight_orig"
    prune.l1_unstructured(model, name, 0.5)
    found = unwrapped(model)
    inputs = torch.randn(3, 4)
    assert found is model or torch.allclose(found.eval()(inputs), model.eval()(inputs), equal_nan=True)


def test_names_like_those_of_wrappers_are_no_wrappers() -> None:
    class OptimizedModule(nn.Linear):
        pass

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parametrizations = nn.ModuleDict({"a": nn.Linear(2, 2)})

    for model in (OptimizedModule(2, 2), nn.Sequential(OptimizedModule(2, 2)), Own(), nn.Sequential(Own())):
        assert unwrapped(model) is model


def test_averaged_weights_are_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert unwrapped(averaged) is averaged.module


def test_a_copy_does_not_call_the_original() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 3))
    model.compile(backend="eager")
    found = unwrapped(model)
    with torch.no_grad():
        found.weight.zero_()
        found.bias.zero_()
    assert not found(torch.ones(1, 3)).any()


def test_a_parametrization_of_ones_own() -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return (weight + weight.T) / 2

    model = nn.Linear(5, 5)
    parametrize.register_parametrization(model, "weight", Symmetric())
    found = unwrapped(model)
    assert torch.equal(found.weight, found.weight.T)
    assert torch.equal(found.weight, model.weight)


def test_looking_for_compiled_modules_imports_no_compiler() -> None:
    program = "import sys, torch; from autocompress.compress.unwrapped import unwrapped; unwrapped(torch.nn.ReLU()); "
    program += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr
