"""Runtimes of a loaded model: the same outputs from factors, dense and sparse weights, and a choice by measurement."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from test_artifact import Net, Tied, compressed, filled
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.compress import lowrank
from autocompress.compress.runtime import SparseLinear, Whole, arranged, check, interleaved
from autocompress.errors import UsageError
from autocompress.plan import LayerPlan

mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(),
    reason="torch computes CSR products with MKL alone; without it, sparse is refused (tested below)",
)
ROWS = torch.linspace(-1, 1, 5 * 40).reshape(5, 40)


def pruned(out, inputs, zeros, bias=True, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(
            torch.randn(out, inputs, generator=draw) * (torch.rand(out, inputs, generator=draw) >= zeros)
        )
    return layer.eval()


def sparse(layer):
    return SparseLinear(layer.weight, layer.bias)


def close(a, b):
    """Equal but for the order of float sums."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5) if a.dtype == torch.float32 else torch.allclose(a, b, atol=1e-12)


def kinds(module):
    return [type(m).__name__ for m in module.modules()]


# --- the sparse layer ------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "dtype"), itertools.product((True, False), (torch.float32, torch.float64)))
@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7), (2, 3, 7), (1, 1, 1, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
def test_a_sparse_layer_computes_what_the_dense_one_does(shape, bias, dtype):
    layer = pruned(11, 7, 0.7, bias, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = sparse(layer)(x)
    assert close(y, layer(x))
    assert y.is_contiguous()


STRIDED = (
    torch.randn(7, 4).t(),
    torch.randn(4, 14)[:, ::2],
    torch.randn(1, 7).expand(3, 7),
    torch.randn(14)[::2],
    torch.randn(7, 1, 2).permute(2, 1, 0),
    torch.randn(7, 1, 1).permute(2, 1, 0),
)


@pytest.mark.parametrize("x", STRIDED, ids=lambda x: str(x.stride()))
def test_a_sparse_layer_takes_inputs_however_they_lie_in_memory(x):
    layer = pruned(5, 7, 0.5)
    assert close(sparse(layer)(x), layer(x))


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 4), torch.ones(3, 4), torch.tensor([[0.0, -0.0, 2.0]]), torch.eye(6)]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_zeros_will_do(weight, rows):
    layer = SparseLinear(weight, nn.Parameter(torch.arange(float(len(weight)))))
    x = torch.randn(rows, weight.shape[1])
    assert close(layer(x), F.linear(x, weight, layer.bias))
    assert torch.equal(layer.weight, weight)


def test_what_has_no_sparse_product_is_computed_densely():
    layer = pruned(11, 7, 0.7)
    x = torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse(layer)(x), layer(x))
        assert sparse(layer)(x).dtype == torch.bfloat16
    assert torch.equal(sparse(layer).half()(x.half()), copy.deepcopy(layer).half()(x.half()))


@pytest.mark.parametrize("x", [torch.ones(2, 8), torch.ones(14), torch.ones(1, 7, dtype=torch.float64)])
def test_a_wrong_input_is_refused_as_by_the_dense_layer(x):
    for layer in (pruned(11, 7, 0.7), sparse(pruned(11, 7, 0.7))):
        with pytest.raises(RuntimeError, match=r"shape|size|dtype"):
            layer(x)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_reach_the_input_and_the_bias(rows):
    layer = pruned(11, 7, 0.7)
    x = torch.randn(rows, 7, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    found = torch.autograd.grad(sparse(layer)(x).square().sum(), (x, layer.bias))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_the_state_of_a_sparse_layer_is_that_of_the_dense_one():
    layer, other = pruned(11, 7, 0.7), pruned(11, 7, 0.5, seed=5)
    held = sparse(layer)
    state = held.state_dict()
    assert list(state) == list(layer.state_dict())
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    pruned(11, 7, 0).load_state_dict(state)
    held.load_state_dict(other.state_dict())  # with another number of zeros
    x = torch.randn(3, 7)
    assert close(held(x), other(x))
    with pytest.raises(RuntimeError, match=r"'weight' has shape \[3, 7\], this model's has \[11, 7\]"):
        held.load_state_dict({"weight": torch.ones(3, 7), "bias": torch.ones(11)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        held.load_state_dict({"bias": torch.ones(11)})
    assert held.load_state_dict({"bias": torch.ones(11)}, strict=False).missing_keys == ["weight"]
    assert repr(held) == "SparseLinear(in_features=7, out_features=11, bias=True, nonzero=50.6%)" or "nonzero=" in repr(
        held
    )


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved, lambda m: m.double().float(),
              lambda m: m.to("cpu"), lambda m: m.requires_grad_(False).train().eval()]
)  # fmt: skip
def test_a_sparse_layer_is_copied_moved_and_saved_like_any_module(again):
    layer = pruned(11, 7, 0.7)
    found = again(nn.Sequential(sparse(layer)))
    x = torch.randn(3, 7)
    assert close(found(x), layer(x))
    assert kinds(found) == ["Sequential", "SparseLinear"]


def test_a_copy_shares_nothing():
    layer = sparse(pruned(11, 7, 0.7))
    other = copy.deepcopy(layer)
    other.load_state_dict(pruned(11, 7, 0.9, seed=2).state_dict())
    assert torch.equal(layer.weight, pruned(11, 7, 0.7).weight)


# --- which layers become sparse --------------------------------------------------------------


def sparse_of(module, runtime="sparse", **options):
    result = arranged(copy.deepcopy(module), {}, runtime, **options)
    return [name for name, m in result.named_modules() if isinstance(m, SparseLinear)], result


class Reads(nn.Module):
    """Computes with a child's weight by itself."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, x):
        return x @ self.fc.weight.t()


class Hidden(nn.Module):
    """The same where no method names the weight."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, x):
        return x @ dict(self.fc.state_dict())["weight"].t()


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@mkl
def test_layers_of_enough_zeros_become_sparse():
    net = nn.Sequential(pruned(8, 40, 0.95), nn.ReLU(), pruned(8, 8, 0.0), nn.Sequential(pruned(3, 8, 0.9, bias=False)))
    names, result = sparse_of(net)
    assert names == ["0", "3.0"]
    assert result[2].weight.equal(net[2].weight)
    assert close(result(ROWS), net(ROWS))
    bare = pruned(8, 40, 0.95)
    assert sparse_of(bare)[0] == [""]
    assert isinstance(bare, nn.Linear)


@mkl
def test_what_a_sparse_layer_could_not_stand_for_is_left():
    with_hook, shared, own = pruned(40, 40, 0.95), pruned(40, 40, 0.95), Own(40, 40)
    with_hook.register_forward_hook(lambda module, inputs, output: output * 2)
    own.load_state_dict(shared.state_dict())
    tied = nn.Sequential(pruned(40, 40, 0.95), pruned(40, 40, 0.95))
    tied[1].weight = tied[0].weight
    left = nn.Sequential(with_hook, shared, shared, own, Reads(pruned(40, 40, 0.95)), tied, pruned(40, 40, 0.95).half())
    names, result = sparse_of(left)
    assert names == []
    assert result[5][1].weight is result[5][0].weight


@mkl
@pytest.mark.parametrize("make", [
    lambda: nn.TransformerEncoderLayer(40, 4, 40, batch_first=True),
    lambda: nn.TransformerDecoderLayer(40, 4, 40, batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(40, 4, 40, batch_first=True), 2),
], ids=["encoder layer", "decoder layer", "encoder"])  # fmt: skip
def test_transformers_of_torch_go_on_computing_what_they_did(make):
    model = make().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand(weight.shape) >= 0.9 if weight.dim() == 2 else 1)
        x = torch.randn(2, 6, 40)
        inputs = (x, x) if isinstance(model, nn.TransformerDecoderLayer) else (x,)
        wanted = model(*inputs)
        names, result = sparse_of(model)
        assert not any("out_proj" in name for name in names)
        assert close(result(*inputs), wanted)


@mkl
def test_a_parent_that_reads_the_weight_unseen_gets_it_all_the_same():
    model = Hidden(pruned(8, 40, 0.95))
    names, result = sparse_of(model)
    assert names == ["fc"]
    assert torch.equal(result(ROWS), model(ROWS))


# --- auto ------------------------------------------------------------------------------------


def clock(**seconds):
    """A measurement by kind of layer that runs each once, and what it was given."""
    seen = []

    def measure(calls):
        modules = [call.func for call in calls]
        outputs = [call() for call in calls]
        assert len({tuple(y.shape) for y in outputs}) == 1
        seen.append((outputs[0].shape, [type(m).__name__ for m in modules]))
        return [seconds[type(m).__name__] for m in modules]

    return measure, seen


@mkl
@pytest.mark.parametrize(("seconds", "wanted"), [(0.5, ["0"]), (0.94, ["0"]), (0.96, []), (1.0, []), (2.0, [])])
def test_auto_takes_what_is_faster_by_a_margin(seconds, wanted):
    net = nn.Sequential(pruned(8, 40, 0.95), nn.ReLU(), pruned(8, 8, 0.2))
    measure, seen = clock(Linear=1.0, SparseLinear=seconds)
    assert sparse_of(net, "auto", batch=7, measure=measure)[0] == wanted
    assert seen == [((7, 8), ["Linear", "SparseLinear"])]  # the layer of few zeros is not measured


def factorised_file(make, plan, inputs, path):
    data, outputs = compressed(filled(make()), plan, inputs)
    path.write_bytes(data)
    return path, outputs


@pytest.mark.parametrize(("seconds", "kept"), [(0.9, True), (1.0, False)])
def test_auto_keeps_factors_where_they_are_faster(seconds, kept):
    dense = pruned(30, 40, 0)
    pair = nn.Sequential(pruned(4, 40, 0, bias=False), pruned(30, 4, 0))
    measure, seen = clock(Linear=1.0, Sequential=seconds)
    result = arranged(nn.Sequential(pair), {"0": Whole(dense, "channel")}, "auto", batch=3, measure=measure)
    assert kinds(result[0])[0] == ("Sequential" if kept else "Linear")
    assert seen == [((3, 30), ["Linear", "Sequential"])]
    assert close(result(ROWS), pair(ROWS))


class Calls(nn.Module):
    """Calls one of its layers on all tokens, then on one, and another never."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.spare = pruned(40, 40, 0.95), pruned(3, 40, 0.95), pruned(40, 40, 0.95)

    def forward(self, x, *, times):
        x = self.fc(x).mul_(times)
        return self.head(self.fc(x[:, 0]))


@mkl
def test_auto_measures_on_what_an_example_brings():
    measure, seen = clock(Linear=1.0, SparseLinear=0.5)
    model, example = Calls(), {"x": torch.randn(2, 6, 40), "times": 2.0}
    names, result = sparse_of(model, "auto", example=example, measure=measure)
    assert names == ["fc", "head"]
    assert [shape for shape, _ in seen] == [(2, 6, 40), (2, 3)]
    assert close(result(**example), model(**example))
    assert not any(m._forward_pre_hooks for m in result.modules())


@pytest.mark.parametrize("slow_at", [None, 7, 28])
def test_factorised_convolutions_are_kept_where_they_are_faster_at_every_size(slow_at):
    dense = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    pair = lowrank.factorised(dense, LayerPlan(rank=2))
    sizes = []

    def measure(calls):
        x = calls[0].args[0]
        sizes.append(tuple(x.shape))
        return [1.0, 2.0 if x.shape[-1] == slow_at else 0.5]

    wholes = {"0": Whole(dense, "channel")}
    result = arranged(nn.Sequential(pair), wholes, "auto", batch=32, measure=measure)
    assert (result[0] is pair) == (slow_at is None)
    assert sizes == [(4, 4, s, s) for s in (7, 14, 28)][: 1 if slow_at == 7 else 3]
    own = arranged(nn.Sequential(pair), wholes, "auto", example=torch.randn(5, 4, 28, 20), measure=measure)
    assert own[0] is pair
    assert sizes[-1] == (5, 4, 28, 20)


def test_interleaved_runs_all_in_turn_and_finds_the_slower_one():
    turns = []

    def work(name, steps):
        turns.append(name)
        return sum(range(steps))

    fast, slow = interleaved([lambda: work("a", 10), lambda: work("b", 100_000)], budget=0.0)
    assert fast < slow / 10
    assert [k for k, _ in itertools.groupby(turns)][:6] == ["a", "b", "a", "b", "a", "b"]


# --- load ------------------------------------------------------------------------------------

RGB = torch.randn(2, 4, 9, 9)
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20, bias=False)),
               {"0": LayerPlan(rank=4, bits=5), "2": LayerPlan(bits=4, threshold=2.0)}, ROWS),
    "bare": (lambda: nn.Linear(40, 30), {"": LayerPlan(rank=4)}, ROWS),
    "sparse factors": (lambda: nn.Sequential(nn.Linear(40, 30)),
                       {"0": LayerPlan(rank=10, bits=4, threshold=2.0)}, ROWS),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2)),
               {"0": LayerPlan(rank=3)}, torch.randn(2, 4, 15)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, (3, 5), stride=(1, 2), padding=(0, 2)), nn.BatchNorm2d(8)),
               {"0": LayerPlan(rank=3, bits=6)}, RGB),
    "spatial": (lambda: nn.Sequential(nn.Conv2d(4, 8, (3, 5), stride=(1, 2), padding=(0, 2), bias=False)),
                {"0": LayerPlan(rank=3, scheme="spatial")}, RGB),
    "same": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular")),
             {"0": LayerPlan(rank=3)}, RGB),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1)),
               {"0": LayerPlan(rank=2)}, torch.randn(1, 2, 4, 4, 4)),
    "float64": (lambda: nn.Sequential(nn.Linear(40, 30, dtype=torch.float64)),
                {"0": LayerPlan(rank=4)}, ROWS.double()),
}  # fmt: skip


@pytest.mark.parametrize("own", [False, True], ids=["tree", "own model"])
@pytest.mark.parametrize("case", CASES)
def test_every_runtime_computes_the_same(case, own, tmp_path):
    make, plan, inputs = CASES[case]
    path, outputs = factorised_file(make, plan, inputs, tmp_path / "m.acz")
    model = make() if own else None
    with torch.no_grad():
        for runtime in ("factorised", "dense", "auto", *["sparse"] * torch.backends.mkl.is_available()):
            found = ac.load(path, model=model, runtime=runtime, batch=2)
            assert torch.allclose(found(inputs), outputs, rtol=1e-4, atol=1e-5), runtime
            assert not any(m.training for m in found.modules())
        assert torch.equal(ac.load(path, model=model)(inputs), ac.load(path, model=model, runtime="factorised")(inputs))


@pytest.mark.parametrize("case", CASES)
def test_dense_has_the_modules_and_the_state_of_the_original(case, tmp_path):
    make, plan, inputs = CASES[case]
    path, _ = factorised_file(make, plan, inputs, tmp_path / "m.acz")
    original, dense = make(), ac.load(path, runtime="dense")
    assert repr(dense) == repr(original)
    shapes = {key: (value.shape, value.dtype) for key, value in dense.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in original.state_dict().items()}
    assert repr(ac.load(path)) != repr(original)
    original.load_state_dict(dense.state_dict())


class Named(nn.Linear):
    """A user's own class, frozen, without a forward of its own."""


def test_dense_keeps_a_users_class_and_leaves_the_model_given_alone(tmp_path):
    def make():
        net = Net(30)
        net.second = Named(30, 20)
        net.second.weight.requires_grad_(False)
        return net

    x = torch.randn(5, 4)
    path, outputs = factorised_file(make, {"second": LayerPlan(rank=4)}, x, tmp_path / "m.acz")
    model = make()
    before = model.second.weight.clone()
    dense = ac.load(path, model=model, runtime="dense")
    assert type(dense.second) is Named
    assert not dense.second.weight.requires_grad
    assert torch.allclose(dense(x), outputs, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.second.weight, before)
    assert type(ac.load(path, model=model).second) is nn.Sequential


@mkl
def test_sparse_takes_factors_too_and_leaves_tied_weights(tmp_path):
    make, plan, inputs = CASES["sparse factors"]
    path, _ = factorised_file(make, plan, inputs, tmp_path / "m.acz")
    assert kinds(ac.load(path, runtime="sparse")[0]) == ["Sequential", "SparseLinear", "SparseLinear"]
    words = torch.tensor([[1, 5, 10]])
    path, outputs = factorised_file(Tied, {"out": LayerPlan(bits=2, threshold=3.0)}, words, tmp_path / "t.acz")
    tied = ac.load(path, model=Tied(), runtime="sparse")
    assert tied.out.weight is tied.embed.weight
    with torch.no_grad():
        assert torch.equal(tied(words), outputs)


def test_other_runtimes_are_refused_before_the_file_is_opened(tmp_path):
    with pytest.raises(UsageError, match="runtime is 'csr', allowed: factorised, dense, sparse, auto"):
        ac.load(tmp_path / "none.acz", runtime="csr")
    for batch in (0, -1, 1.5, "1", None):
        with pytest.raises(UsageError, match=f"batch is {batch!r}, allowed: 1 and more"):
            ac.load(tmp_path / "none.acz", runtime="auto", batch=batch)


def test_without_mkl_sparse_is_refused_and_auto_stays_dense(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(UsageError, match="'sparse' needs a torch with MKL"):
        check("sparse", 1)
    check("auto", 1)
    assert (
        sparse_of(nn.Sequential(pruned(8, 40, 0.95)), "auto", measure=clock(Linear=1.0, SparseLinear=0.1)[0])[0] == []
    )
