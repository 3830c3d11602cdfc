"""Plans carried out: the order of the steps, values that equal the file's, ties, and going on from a state."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.codec import container
from autocompress.compress import apply, artifact, lowrank, prune, quantize
from autocompress.compress.finetune import Feed, finetune
from autocompress.compress.layers import find_layers
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe

IMAGES = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 5, (24,), generator=torch.Generator().manual_seed(2))


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False),
                        nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 5))  # fmt: skip
    return net.eval()


MODEL = make()
LAYERS = find_layers(MODEL, lambda m: m(IMAGES[:1])).layers


def svd_of(model):
    return lambda spec, scheme: lowrank.svd(model.get_submodule(spec.name).weight, scheme)


def plan_of(**layers):
    """`_0=...` names layer "0"; the rest stay as they are."""
    given = {name.removeprefix("_"): layer for name, layer in layers.items()}
    return Plan({s.name: given.get(s.name, LayerPlan()) for s in LAYERS}, Recipe(2.0, 1e-2, 0.0))


def everywhere(**settings):
    ranks = {"0": 3, "3": 4, "5": 5, "7": 2} if settings.pop("ranks", False) else {}
    return Plan({s.name: LayerPlan(rank=ranks.get(s.name), **settings) for s in LAYERS}, Recipe(2.0, 1e-2, 0.0))


def compress(plan, start=None, model=MODEL):
    return apply.compress(model, LAYERS, plan, svd_of(model), start)


def train(compressed, epochs=1.0, rate=1e-2):
    feed = Feed(lambda i: ((IMAGES[j : j + 8], LABELS[j : j + 8], None) for j in (0, 8, 16)), 3)
    for _ in finetune(compressed, feed, F.cross_entropy, Recipe(epochs, rate, 0.0), [epochs]):
        pass
    return compressed


def decoded(compressed):
    """The tensors of the file that it is written to."""
    data = container.pack(container.Artifact(compressed.encode()))
    return {key: artifact.to_tensor(entry) for key, entry in container.unpack(data).tensors.items()}


PLANS = {
    **{f"codebook {bits}": everywhere(bits=bits) for bits in (1, 2, 5, 8, 16, 32)},
    **{f"uniform {bits}": everywhere(bits=bits, quantizer="uniform") for bits in (1, 2, 4, 8)},
    **{f"pruned codebook {bits}": everywhere(bits=bits, threshold=0.8) for bits in (1, 4)},
    **{f"pruned uniform {bits}": everywhere(bits=bits, threshold=0.8, quantizer="uniform") for bits in (1, 4)},
    **{f"pruned {b}": everywhere(bits=b, threshold=0.8) for b in (16, 32)},
    "ranks": everywhere(ranks=True),
    "ranks pruned codebook": everywhere(ranks=True, bits=3, threshold=0.6),
    "ranks pruned uniform": everywhere(ranks=True, bits=4, threshold=0.6, quantizer="uniform"),
    "spatial": plan_of(
        _0=LayerPlan(rank=3, scheme="spatial", bits=5), _3=LayerPlan(rank=6, scheme="spatial", threshold=0.4)
    ),
    "all pruned but one": everywhere(threshold=1e9, bits=2),
    "nothing": plan_of(),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained"])
def test_the_file_holds_what_the_model_computes_with(name, trained):
    before = copy.deepcopy(MODEL.state_dict())
    compressed = compress(PLANS[name])
    if trained:
        train(compressed)
    tensors = decoded(compressed)
    substitutes = compressed.substitutes()
    for key, value in substitutes.items():
        assert torch.equal(tensors[key].float(), value.detach()), key
    layers = PLANS[name].layers.values()
    norms = {f"1.{what}" for what in ("running_mean", "running_var")} if all(x.bits <= 16 for x in layers) else set()
    for key, value in artifact.unique_state(compressed.module).items():
        if key not in substitutes:
            assert torch.equal(tensors[key].to(value), value.bfloat16().to(value) if key in norms else value), key
    assert set(tensors) == set(artifact.unique_state(compressed.module))
    assert all(torch.equal(tensor, before[key]) for key, tensor in MODEL.state_dict().items())
    assert all(p.grad is None for p in MODEL.parameters())


@pytest.mark.parametrize("name", PLANS)
def test_bits_bound_the_number_of_values(name):
    plan = PLANS[name]
    for key, entry in compress(plan).encode().items():
        path = key.removesuffix(".weight")
        layer = plan.layers.get(path) or plan.layers.get(path.rsplit(".", 1)[0])
        if layer is None or not key.endswith(".weight"):
            continue
        values = artifact.to_tensor(entry).unique()
        if layer.bits <= 8:
            allowed = 2**layer.bits + (layer.threshold > 0)
            assert len(values[values != 0]) <= 2**layer.bits
            assert len(values) <= allowed
            assert isinstance(entry, container.Coded)


@pytest.mark.parametrize(
    ("plan", "short"),
    [
        (plan_of(), set()),
        (plan_of(_0=LayerPlan(bits=4), _5=LayerPlan(bits=16, rank=5)), {"0.bias", "5.1.bias"}),
        (plan_of(_3=LayerPlan(bits=4)), set()),  # has no bias
        (plan_of(_0=LayerPlan(threshold=1.0)), set()),
        (everywhere(bits=8), {"0.bias", "5.bias", "7.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}),
    ],
)
def test_what_is_beside_the_codes_is_as_precise_as_the_layers(plan, short):
    entries = train(compress(plan)).encode()
    assert {key for key, entry in entries.items() if entry.dtype == "bfloat16"} == short


def test_the_order_is_low_rank_then_prune_then_quantize():
    layer = LayerPlan(rank=4, bits=3, threshold=0.7)
    tensors = decoded(compress(plan_of(_5=layer)))
    left, values, right = np.linalg.svd(MODEL[5].weight.detach().double().numpy(), full_matrices=False)
    signs = np.sign(left[0] * lowrank.svd(MODEL[5].weight)[0][0].numpy())  # free in each pair of vectors
    left, right = left * signs, right * signs[:, None]
    tall, wide = left[:, :4] * np.sqrt(values[:4]), np.sqrt(values[:4])[:, None] * right[:4]
    for key, factor in (("5.0.weight", torch.from_numpy(wide).float()), ("5.1.weight", torch.from_numpy(tall).float())):
        kept = factor.abs() >= 0.7 * factor.double().std(correction=0).float()
        table = quantize.kmeans(factor[kept], 8)
        wanted = torch.zeros_like(factor)
        wanted[kept] = table[(factor[kept][:, None] - table).abs().argmin(1)]
        assert torch.allclose(tensors[key], wanted.bfloat16().float(), atol=1e-5)
        assert 0.2 < kept.float().mean() < 0.8
    product = tensors["5.1.weight"] @ tensors["5.0.weight"]
    correlation = torch.corrcoef(torch.stack([product.flatten(), torch.from_numpy(tall @ wide).float().flatten()]))
    assert correlation[0, 1] > 0.85


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5])
def test_thresholds_count_in_the_layers_standard_deviation(threshold):
    tensors = decoded(compress(everywhere(threshold=threshold)))
    for spec in LAYERS:
        weight = MODEL.get_submodule(spec.name).weight.detach()
        kept = weight.abs().double() >= threshold * np.std(weight.double().numpy())
        if not kept.any():
            kept = weight.abs() == weight.abs().max()
        assert torch.equal(tensors[f"{spec.name}.weight"], torch.where(kept, weight, 0))


def test_a_bare_layer_in_two():
    model = nn.Linear(20, 16).eval()
    layers = find_layers(model, lambda m: m(torch.ones(1, 20))).layers
    compressed = apply.compress(model, layers, Plan({"": LayerPlan(rank=2, bits=6)}), svd_of(model))
    assert set(compressed.codes) == {"0.weight", "1.weight"}
    inputs = torch.randn(3, 20)
    whole = decoded(compressed)["1.weight"] @ decoded(compressed)["0.weight"]
    outputs = apply.call_with(compressed.module, compressed.substitutes(), inputs)
    assert torch.allclose(outputs, F.linear(inputs, whole, model.bias.bfloat16().float()), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay(dtype):
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 4)).to(dtype).eval()
    layers = find_layers(model, lambda m: m(torch.ones(1, 20, dtype=dtype))).layers
    for settings in (
        {"bits": 3, "threshold": 0.5},
        {"bits": 4, "quantizer": "uniform"},
        {"threshold": 1.0},
        {"rank": 3},
    ):
        plan = Plan({"0": LayerPlan(**settings), "1": LayerPlan(bits=5)})
        compressed = apply.compress(model, layers, plan, svd_of(model))
        tensors = decoded(compressed)
        assert {t.dtype for t in tensors.values()} == {dtype}
        for key, value in compressed.substitutes().items():
            assert torch.allclose(tensors[key], value, rtol=1e-6, atol=0), key


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def test_tied_weights_are_substituted_in_both_places_and_learn_from_both():
    torch.manual_seed(0)
    model, tokens, targets = Tied().eval(), torch.tensor([1, 4, 8]), torch.tensor([2, 0, 8])
    layers = find_layers(model, lambda m: m(tokens)).layers
    compressed = apply.compress(model, layers, Plan({"out": LayerPlan(threshold=0.5)}), svd_of(model))
    assert list(compressed.codes) == ["embed.weight"]
    assert compressed.aliases == {"out.weight": "embed.weight"}
    assert list(compressed.encode()) == ["embed.weight", "out.bias"]
    (code,) = compressed.codes.values()
    F.cross_entropy(apply.call_with(compressed.module, compressed.substitutes(), tokens), targets).backward()

    weight = code.values().detach().requires_grad_()
    F.cross_entropy(F.linear(F.embedding(tokens, weight), weight, model.out.bias), targets).backward()
    assert torch.allclose(code.weights.grad, weight.grad.flatten()[code.positions], atol=1e-7)
    assert [p.shape for p in compressed.others()] == [(9,)]


class Twice(nn.Module):
    """A module under two names, one of its weights also that of another module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(4, 4), nn.Linear(4, 4), lambda x: 2 * x
        self.b.weight, self.again = self.a.weight, self.a

    def forward(self, x):
        return self.again(self.f(self.b(self.a(x))))


def test_a_module_of_two_names_is_as_before_after_a_call():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 4)
    layers = find_layers(model, lambda m: m(x)).layers
    compressed = apply.compress(model, layers, Plan({"a": LayerPlan(bits=2)}), svd_of(model))
    assert compressed.aliases == {"b.weight": "a.weight"}
    weight = compressed.module.a.weight
    apply.call_with(compressed.module, compressed.substitutes(), x).sum().backward()
    assert compressed.module.a.weight is compressed.module.b.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert compressed.codes["a.weight"].weights.grad is not None


def test_frozen_parameters_are_not_trained():
    model = make()
    model[1].requires_grad_(False)
    compressed = compress(plan_of(_5=LayerPlan(bits=2)), model=model)
    trained = {id(p) for p in compressed.others()}
    names = {name for name, p in compressed.module.named_parameters() if id(p) in trained}
    assert names == {"0.weight", "0.bias", "3.weight", "5.bias", "7.weight", "7.bias"}


def test_a_frozen_weight_that_is_compressed_is_finetuned():
    """Compression moves it anyhow; what of the layer is not compressed stays."""
    model = make().requires_grad_(False)
    compressed = compress(plan_of(_5=LayerPlan(bits=2)), model=model)
    assert list(compressed.others()) == []
    (code,) = compressed.codes.values()
    assert all(tensor.requires_grad for group in code.trained() for tensor in group)


def test_a_model_with_channels_last_weights_is_compressed_alike():
    turned = copy.deepcopy(MODEL).to(memory_format=torch.channels_last)
    for plan in (PLANS["pruned codebook 4"], PLANS["spatial"], PLANS["ranks"]):
        one, other = decoded(compress(plan)), decoded(compress(plan, model=turned))
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = make()
    with torch.no_grad():
        model[5].weight[0, 0] = bad
    with pytest.raises(TrialFailed, match=r"weight '5\.weight' holds values that are not finite"):
        compress(plan_of(), model=model)


# --- going on from a state -------------------------------------------------------------------


def packed(compressed):
    return container.pack(container.Artifact(compressed.encode()))


@pytest.mark.parametrize("name", [n for n in PLANS if "pruned" not in n])
def test_the_state_of_a_trial_without_pruning_gives_the_same_file(name):
    plan = PLANS[name]
    if any(layer.threshold for layer in plan.layers.values()):
        plan = Plan({n: replace(layer, threshold=0.0) for n, layer in plan.layers.items()}, plan.recipe)
    compressed = train(compress(plan))
    again = compress(plan, compressed.state())
    assert packed(again) == packed(compressed)
    assert packed(again) != packed(compress(plan))
    inputs = IMAGES[:3]
    again.module.eval(), compressed.module.eval()
    assert torch.allclose(
        apply.call_with(again.module, again.substitutes(), inputs),
        apply.call_with(compressed.module, compressed.substitutes(), inputs),
        atol=1e-5,
    )


def test_a_state_is_a_copy_with_all_floats():
    compressed = train(compress(everywhere(threshold=0.8, bits=3)))
    state = compressed.state()
    kept = {key: tensor.clone() for key, tensor in state.tensors.items()}
    train(compressed, rate=0.1)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in state.tensors.items())
    for spec in LAYERS:
        key = f"{spec.name}.weight"
        original = MODEL.get_submodule(spec.name).weight.detach()
        gone = original.abs() < 0.8 * original.double().std(correction=0).float()
        assert torch.equal(state.tensors[key][gone], original[gone])  # pruned ones as they were
        assert not torch.equal(state.tensors[key][~gone], original[~gone])
        assert state.tensors[f"{key}#unit"].item() == pytest.approx(np.std(original.double().numpy()))


def test_thresholds_keep_their_unit_over_generations():
    plan = plan_of(_5=LayerPlan(threshold=0.5))
    state = train(compress(plan), rate=0.05).state()
    unit = np.std(MODEL[5].weight.detach().double().numpy())
    later = compress(plan_of(_5=LayerPlan(threshold=1.0, bits=4)), state).codes["5.weight"]
    floats = state.tensors["5.weight"]
    assert later.unit == pytest.approx(unit)
    assert np.std(floats.double().numpy()) != pytest.approx(unit, rel=1e-3)
    assert torch.equal(later.positions, prune.magnitude_mask(floats, 1.0, unit).flatten().nonzero()[:, 0])


@pytest.mark.parametrize(("old", "new"), [(8, 2), (2, 8), (5, 4)])
@pytest.mark.parametrize("quantizer", ["codebook", "uniform"])
def test_another_bit_width_gets_a_table_of_its_own(old, new, quantizer):
    state = train(compress(everywhere(bits=old, quantizer=quantizer))).state()
    later = compress(everywhere(bits=new, quantizer=quantizer), state)
    for key, code in later.codes.items():
        floats = state.tensors[key].flatten()
        if quantizer == "codebook":
            assert torch.equal(code.table, quantize.kmeans(floats, 2**new))
        else:
            assert code.step.item() == pytest.approx(quantize.grid_step(floats, new))
        error = ((code.values().detach().flatten() - floats) ** 2).mean() / floats.var()
        assert error < {2: 0.2, 4: 0.03, 8: 0.001}[new], key


def test_another_quantizer_is_fitted_anew():
    state = train(compress(everywhere(bits=4))).state()
    for key, code in compress(everywhere(bits=4, quantizer="uniform"), state).codes.items():
        assert code.step.item() == pytest.approx(quantize.grid_step(state.tensors[key].flatten(), 4))


def whole_weights(state):
    """Layer name -> the weight that a state stands for."""
    result = {}
    for spec in LAYERS:
        layer = state.plan.layers[spec.name]
        if layer.rank is None:
            result[spec.name] = state.tensors[f"{spec.name}.weight"]
        else:
            pair = [state.tensors[f"{spec.name}.{i}.weight"] for i in (0, 1)]
            result[spec.name] = lowrank.product(*pair, spec.shape, layer.scheme)
    return result


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LayerPlan(), LayerPlan(rank=3)),
        (LayerPlan(), LayerPlan(rank=4, scheme="spatial")),
        (LayerPlan(rank=4), LayerPlan(rank=2)),
        (LayerPlan(rank=4, bits=3), LayerPlan(rank=3, bits=3, threshold=0.2)),
        (LayerPlan(rank=4), LayerPlan(rank=5, scheme="spatial")),
        (LayerPlan(rank=4, scheme="spatial"), LayerPlan()),
        (LayerPlan(rank=4, scheme="spatial"), LayerPlan(rank=2, scheme="spatial")),
    ],
)
def test_a_state_of_another_rank_goes_on_from_its_product(old, new):
    state = train(compress(plan_of(_3=old))).state()
    trained = whole_weights(state)["3"]
    later = compress(plan_of(_3=new), state).state()
    found = whole_weights(later)["3"]
    matrix = lowrank.as_matrix(trained, new.scheme).double()
    wanted = matrix
    if new.rank is not None:
        left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
        wanted = torch.from_numpy((left[:, : new.rank] * values[: new.rank]) @ right[: new.rank])
    assert torch.allclose(lowrank.as_matrix(found, new.scheme).double(), wanted, atol=1e-5)
    assert not torch.allclose(trained, MODEL[3].weight, atol=1e-3)
    for key in ("0.bias", "1.running_mean", "1.weight", "5.bias", "7.weight"):
        assert torch.equal(later.tensors[key], state.tensors[key]), key


def test_a_bias_moves_with_its_layer():
    state = train(compress(plan_of(_5=LayerPlan(rank=3), _0=LayerPlan()))).state()
    assert "5.1.bias" in state.tensors
    later = compress(plan_of(_0=LayerPlan(rank=2)), state).state()
    assert torch.equal(later.tensors["5.bias"], state.tensors["5.1.bias"])
    assert torch.equal(later.tensors["0.1.bias"], state.tensors["0.bias"])


def test_a_state_that_does_not_fit_is_named():
    state = compress(plan_of()).state()
    missing = apply.State(state.plan, {k: t for k, t in state.tensors.items() if k != "1.running_var"})
    with pytest.raises(TrialFailed, match=r"the state to start from has no '1\.running_var' of shape \[8\]"):
        compress(plan_of(), missing)
    wrong = apply.State(state.plan, {**state.tensors, "5.bias": torch.zeros(7)})
    with pytest.raises(TrialFailed, match=r"has no '5\.bias' of shape \[12\]"):
        compress(plan_of(), wrong)
