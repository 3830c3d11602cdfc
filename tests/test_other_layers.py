"""Weights of embeddings, recurrent layers, attention, transposed convolutions, a model's own: torch is the reference.

A model that holds a trial's weights in its own parameters must compute what the trial did.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autocompress
from autocompress import report
from autocompress.compress import apply, artifact
from autocompress.compress.layers import find_layers
from autocompress.compress.rate import RatedCode
from autocompress.errors import SpaceError
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.preflight import check_space
from autocompress.search.space import positions
from autocompress.search.space_file import load_space
from autocompress.trial import Budget, Workbench, run_trial


class Words(nn.Module):
    """Rows of a table, added to places of the model's own."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.places = table, nn.Parameter(torch.randn(1, 6, 44))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) + self.places[:, : tokens.shape[1]]


class Tied(nn.Module):
    """The table of the inputs is also that of the scores; it comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 44), nn.Linear(44, 40)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(tokens)))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(40, 12, mode="mean", sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(10, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 9)
        for at in x.unbind(1):
            h = self.cell(at, h)
        return h


class Attention(nn.Module):
    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention, self.widths = nn.MultiheadAttention(10, 2, batch_first=True, **widths), widths

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., : self.widths.get("kdim", 10)], x[..., : self.widths.get("vdim", 10)])[0]


TOKENS, SERIES = torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(1)), torch.randn(8, 6, 10)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, tuple[str, int]]]] = {
    "embedding": (
        lambda: Words(nn.Embedding(40, 44, padding_idx=0)),
        TOKENS,
        {"places": ("parameter", 0), "table": ("embedding", 0)},
    ),
    "sparse embedding": (
        lambda: Words(nn.Embedding(40, 44, sparse=True)),
        TOKENS,
        {"places": ("parameter", 0), "table": ("embedding", 0)},
    ),
    "bag": (Bag, TOKENS, {"table": ("embedding", 0)}),
    "tied": (Tied, TOKENS, {"out": ("linear", 6 * 40 * 44)}),
    "lstm": (
        lambda: Recurrent(nn.LSTM(10, 8, 2, batch_first=True, bidirectional=True, proj_size=4)),
        SERIES,
        {
            f"rnn.weight_{kind}_l{layer}{way}": ("recurrent", 6 * 32 * width if kind != "hr" else 6 * 4 * 8)
            for layer, inputs in enumerate((10, 8))
            for way in ("", "_reverse")
            for kind, width in (("ih", inputs), ("hh", 4), ("hr", 0))
        },
    ),
    "gru": (
        lambda: Recurrent(nn.GRU(10, 8, batch_first=True)),
        SERIES,
        {"rnn.weight_ih_l0": ("recurrent", 6 * 24 * 10), "rnn.weight_hh_l0": ("recurrent", 6 * 24 * 8)},
    ),
    "bare rnn": (
        lambda: nn.Sequential(nn.Linear(10, 10), Recurrent(nn.RNN(10, 8, batch_first=True, bias=False))),
        SERIES,
        {
            "0": ("linear", 600),
            "1.rnn.weight_ih_l0": ("recurrent", 480),
            "1.rnn.weight_hh_l0": ("recurrent", 384),
        },
    ),
    "cell": (Cell, SERIES, {"cell.weight_ih": ("recurrent", 6 * 270), "cell.weight_hh": ("recurrent", 6 * 243)}),
    "attention": (
        Attention,
        SERIES,
        {"attention.in_proj_weight": ("attention", 6 * 300), "attention.out_proj": ("linear", 0)},
    ),
    "wide attention": (
        lambda: Attention(kdim=7, vdim=5),
        SERIES,
        {
            "attention.q_proj_weight": ("attention", 600),
            "attention.k_proj_weight": ("attention", 420),
            "attention.v_proj_weight": ("attention", 300),
            "attention.out_proj": ("linear", 0),
        },
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), nn.Tanh()),
        SERIES,
        {"0": ("transposed", 10 * 6 * 2 * 3)},
    ),
}


def made(name: str) -> tuple[nn.Module, Tensor, dict[str, tuple[str, int]]]:
    build, inputs, expected = MODELS[name]
    torch.manual_seed(0)
    return build().eval(), inputs, expected


def compressed(model: nn.Module, inputs: Tensor, layer: LayerPlan, recipe: Recipe | None = None) -> apply.Compressed:
    layers = find_layers(model, lambda m: m(inputs)).layers
    plan = Plan({spec.name: layer for spec in layers}, recipe or Recipe())
    return apply.compress(model, layers, plan, lambda *_: pytest.fail("no factors here"), calibration=lambda: inputs)


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_their_products(name):
    model, inputs, expected = made(name)
    found = find_layers(model, lambda m: m(inputs))
    assert {spec.name: (spec.kind, spec.macs) for spec in found.layers} == expected
    for spec in found.layers:
        assert tuple(model.get_parameter(spec.key).shape) == spec.shape
        assert not spec.factorable or spec.kind == "linear"
        assert type(spec).from_json(spec.to_json()) == spec
    assert found.parameters == sum(tensor.numel() for tensor in artifact.unique_state(model).values())
    assert all("weight" not in kept.name for kept in found.kept)


@pytest.mark.filterwarnings("ignore:the inputs of 'attention.out_proj' cannot be seen")
@pytest.mark.parametrize("rate", [0.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_training_did(name, rate):
    """The values that training substitutes, the file's, and a plain model that holds them."""
    model, inputs, _ = made(name)
    before = copy.deepcopy(model.state_dict())
    layer = LayerPlan(bits=3, threshold=0.4, quantizer="uniform", rounding="hessian", saliency="hessian")
    found = compressed(model, inputs, layer, Recipe(rate=rate))
    outputs = apply.call_with(found.module, found.substitutes(), inputs)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for key, value in found.substitutes().items():
            plain.get_parameter(key).copy_(value)
    assert torch.allclose(outputs, plain(inputs), atol=1e-6)
    assert not torch.allclose(outputs, model(inputs), atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    data = artifact.write(model, found.plan, found.encode(), "test")
    back = artifact.restore(artifact.container.unpack(data), model)
    assert torch.allclose(back(inputs), outputs, atol=1e-6)
    for spec in find_layers(model, lambda m: m(inputs)).layers:
        assert back.get_parameter(spec.key).unique().numel() <= 7


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_weights(name):
    """Those of the plain model at the same values."""
    model, inputs, expected = made(name)
    found = compressed(model, inputs, LayerPlan(bits=16))
    values = found.substitutes()
    plain = copy.deepcopy(found.module)
    with torch.no_grad():
        for key, value in values.items():
            plain.get_parameter(key).copy_(value)
    apply.call_with(found.module, values, inputs).square().sum().backward()
    plain(inputs).square().sum().backward()
    assert len(found.codes) == len(expected)
    for key, code in found.codes.items():
        assert torch.allclose(code.weights.grad, plain.get_parameter(key).grad.flatten()[code.positions], atol=1e-4), (
            key
        )


def test_a_recurrent_layer_is_as_before_after_a_call_that_fails():
    model, inputs, _ = made("lstm")
    found = compressed(model, inputs, LayerPlan(bits=2))
    held = list(found.module.rnn._flat_weights)
    with pytest.raises(RuntimeError):
        apply.call_with(found.module, found.substitutes(), inputs[..., :3])
    assert [id(weight) for weight in found.module.rnn._flat_weights] == [id(weight) for weight in held]
    copy.deepcopy(found.module)


class Flattening(nn.LSTM):
    """Moves its weights before each call, as many models on CUDA do."""

    moved = 0

    def flatten_parameters(self) -> None:
        Flattening.moved += 1

    def forward(self, x: Tensor) -> Tensor:
        self.flatten_parameters()
        return super().forward(x)[0]


def test_a_recurrent_layer_moves_no_substitutes():
    torch.manual_seed(0)
    model = nn.Sequential(Flattening(10, 8, batch_first=True)).eval()
    found = compressed(model, SERIES, LayerPlan(bits=2))
    Flattening.moved = 0
    outputs = apply.call_with(found.module, found.substitutes(), SERIES)
    assert Flattening.moved == 0
    assert not torch.equal(found.module(SERIES), outputs)
    assert Flattening.moved > 0


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_biases_beside_them_are_short(rate):
    """In bfloat16, or coded under a rate, as those beside linear layers are."""
    model, inputs, _ = made("lstm")
    found = compressed(model, inputs, LayerPlan(bits=5, quantizer="uniform"), Recipe(rate=rate))
    names = {key for key in model.state_dict() if "bias" in key}
    if rate:
        assert names <= found.codes.keys()
    else:
        assert found.shortened == names
        values = found.substitutes()
        assert all(torch.equal(values[key], values[key].bfloat16().float()) for key in names)


def word_task(sparse: bool = False) -> autocompress.Task:
    """Which of three classes most of a text's words are of; the last ten words occur in no training text."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(60, 8, mode="sum", sparse=sparse), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(60, 8))
    texts = torch.randint(0, 50, (600, 5))
    with torch.no_grad():
        targets = model(texts).argmax(1)
    parts = [(texts[i : i + 200], targets[i : i + 200]) for i in (0, 200, 400)]

    def accuracy(outputs: Tensor, wanted: Tensor) -> float:
        return float((outputs.argmax(1) == wanted).float().mean())

    return autocompress.Task(model.eval(), *parts, F.cross_entropy, accuracy, batch_size=20)


@pytest.mark.parametrize("rate", [1e-3, 3.0])
def test_a_table_keeps_the_rows_that_no_example_has(monkeypatch, rate):
    """Silence clears what nobody reads, and a price what nothing holds, but another text may have the word."""
    monkeypatch.setattr("autocompress.compress.rate.SILENT", (20, 20))
    task = word_task()
    bench = Workbench(task)
    plan = Plan({s.name: LayerPlan(bits=5, quantizer="uniform") for s in bench.layers}, Recipe(9.0, 2e-2, 0.0, rate))
    outcome = run_trial(bench, plan, Budget((0.0, 1.0)))
    last = list(outcome)[-1]
    back = artifact.restore(artifact.container.unpack(last.artifact), task.model)
    unseen, before = back[0].weight[50:].detach(), task.model[0].weight[50:].detach()
    assert float(F.cosine_similarity(unseen, before).min()) > 0.9
    seen = back[0].weight[:50].detach()
    assert (float((seen == 0).double().mean()) > 0.1) == (rate > 1)


def test_a_sparse_table_is_finetuned_and_stays_sparse():
    task = word_task(sparse=True)
    bench = Workbench(task)
    for layer in (LayerPlan(), LayerPlan(bits=2)):
        plan = Plan({spec.name: layer for spec in bench.layers}, Recipe(4.0, 3e-3))
        first, last = (artifact.restore(artifact.container.unpack(o.artifact), task.model)
                       for o in run_trial(bench, plan, Budget((0.0, 1.0))))  # fmt: skip
        assert not torch.equal(first[0].weight[:50], last[0].weight[:50])
    assert task.model[0].sparse


def test_tables_look_up_and_layers_multiply():
    """What may be silent: rows of anything that is not known to multiply may be picked."""
    kinds = ("embedding", True), ("bag", True), ("lstm", False), ("transposed", False), ("tied", False)
    for name, expected in kinds:
        model, inputs, _ = made(name)
        found = compressed(model, inputs, LayerPlan(bits=5, quantizer="uniform"), Recipe(rate=1.0))
        looked_up = {code.looked_up for key, code in found.codes.items() if "bias" not in key}
        assert looked_up == {expected}
        assert all(isinstance(code, RatedCode) for code in found.codes.values())


def test_spaces_tell_them_by_kind():
    model, inputs, _ = made("embedding")
    layers = find_layers(model, lambda m: m(inputs)).layers
    rules = [{"match": "*", "rank": [0.2, 1.0], "bits": 4}, {"kind": "embedding", "bits": [5, 6]}]
    found = load_space({"version": 1, "layers": rules}, layers)
    assert [knob.name for knob in found.knobs if "recipe" not in knob.name] == ["table.bits"]
    assert found.middle(1.0).layers["places"] == LayerPlan(bits=4)


def test_the_estimate_is_near_the_file():
    task = word_task()
    model = nn.Sequential(nn.EmbeddingBag(60, 200, mode="sum"), nn.Linear(200, 3))
    bench = Workbench(replace(task, model=model.eval()))
    for layer in (LayerPlan(bits=3), LayerPlan(bits=4, threshold=1.0, quantizer="uniform")):
        plan = Plan({spec.name: layer for spec in bench.layers})
        (outcome,) = run_trial(bench, plan, Budget((0.0,)))
        assert bench.estimate(plan) == pytest.approx(len(outcome.artifact), rel=0.08)


@pytest.mark.parametrize("quantizer", ["codebook", "uniform", "asymmetric"])
@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_a_padding_of_zeros_stays_zero(quantizer, rate):
    """No gradient reaches it; one that holds something is a row like others."""
    model, inputs, _ = made("embedding")
    quantizer = "uniform" if rate else quantizer
    found = compressed(model, inputs, LayerPlan(bits=3, quantizer=quantizer), Recipe(rate=rate))
    assert not found.substitutes()["table.weight"][0].any()
    assert not artifact.to_tensor(found.encode()["table.weight"])[0].any()
    with torch.no_grad():
        model.table.weight[0] = 1.0
    found = compressed(model, inputs, LayerPlan(bits=3, quantizer=quantizer), Recipe(rate=rate))
    assert found.substitutes()["table.weight"][0].any()


def test_the_bias_of_scores_has_no_padding():
    """A tied table's row of zeros is that of a word which the scores' bias makes unlikely."""
    torch.manual_seed(0)
    model = Tied().eval()
    model.table.padding_idx = 3
    with torch.no_grad():
        model.table.weight[3] = 0
        model.out.bias[3] = -5.0
    found = compressed(model, TOKENS, LayerPlan(bits=5, quantizer="uniform"), Recipe(rate=1.0))
    values = {key: value.detach() for key, value in found.substitutes().items()}
    assert not values["table.weight"][3].any()
    assert float(values["out.bias"][3]) == pytest.approx(-5, abs=0.1)


class Own(nn.Module):
    """Matrices with names that mean something elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.randn(20, 20))
        self.groups, self.shift = nn.ModuleList([nn.Tanh()]), nn.Parameter(torch.randn(1, 300))

    def forward(self, x: Tensor) -> Tensor:
        return self.groups[0](x @ self.weight) @ self.bias + self.shift[:, :20]


class PreNorm(Own):
    pass


@pytest.mark.parametrize("build", [Own, PreNorm])
def test_matrices_of_the_models_own_whatever_they_are_called(build):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(3, 20)
    found = find_layers(model, lambda m: m(x))
    assert [(spec.name, spec.kind, spec.groups) for spec in found.layers] == [
        ("weight", "parameter", 1),
        ("bias", "parameter", 1),
    ]
    assert [kept.reason for kept in found.kept] == [f"parameter 'shift' of {build.__name__}"]
    json.dumps([spec.to_json() for spec in found.layers])
    for rate in (0.0, 1.0):
        plan = Plan({"weight": LayerPlan(bits=4, quantizer="uniform"), "bias": LayerPlan()}, Recipe(rate=rate))
        made_of = apply.compress(model, found.layers, plan, lambda *_: pytest.fail("no factors here"))
        assert made_of.codes.keys() == {"weight"}
        assert not made_of.shortened
        plan = Plan(dict.fromkeys(("weight", "bias"), LayerPlan(bits=2, quantizer="uniform")), Recipe(rate=rate))
        both = apply.compress(model, found.layers, plan, lambda *_: pytest.fail("no factors here"))
        assert both.substitutes()["bias"].unique().numel() <= 3


class Adapted(nn.Linear):
    """A linear layer and a product of low rank beside it."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.down, self.up = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class TwoTables(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(40, 8)
        self.other = nn.Parameter(torch.randn(40, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * F.embedding(tokens, self.other)


def test_matrices_of_subclasses_are_layers_too():
    torch.manual_seed(0)
    found = find_layers(Adapted().eval(), lambda m: m(torch.randn(2, 64)))
    assert {(spec.name, spec.kind) for spec in found.layers} == {
        ("", "linear"),
        ("down", "parameter"),
        ("up", "parameter"),
    }
    found = find_layers(TwoTables().eval(), lambda m: m(TOKENS))
    assert {(spec.name, spec.kind) for spec in found.layers} == {("", "embedding"), ("other", "parameter")}


class TwoReaders(nn.Module):
    """Two recurrent layers with one hidden weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(10, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.b.weight_hh_l0 = self.a.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(hx=None, input=self.a(x)[0])[0]


def test_a_weight_of_two_recurrent_layers_answers_to_both_names():
    torch.manual_seed(0)
    model = TwoReaders().eval()
    layers = find_layers(model, lambda m: m(SERIES)).layers
    (shared,) = (spec for spec in layers if spec.shared_with)
    assert (shared.name, shared.shared_with, shared.modules) == ("a.weight_hh_l0", ("b.weight_hh_l0",), ("a", "b"))
    assert shared.macs == 2 * 6 * 24 * 8
    rules = [{"match": "*", "bits": 4}, {"match": "b.weight_hh_l0", "bits": 2}]
    plan = load_space({"version": 1, "layers": rules}, layers).middle(1.0)
    assert plan.layers["a.weight_hh_l0"].bits == 2
    found = apply.compress(model, layers, plan, lambda *_: pytest.fail("no factors here"))
    back = artifact.restore(artifact.container.unpack(artifact.write(model, plan, found.encode(), "test")), model)
    assert torch.allclose(back(SERIES), apply.call_with(found.module, found.substitutes(), SERIES), atol=1e-6)
    assert back.b.weight_hh_l0.unique().numel() <= 4


class Crossed(nn.Module):
    """An attention whose inputs have different lengths, given by name in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True, kdim=10, vdim=5)
        self.same = nn.MultiheadAttention(10, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        few, half = x[:, :2], x[..., :5]
        return self.attention(value=half, key=x, query=few)[0] + self.same(few, value=x, key=x)[0]


def test_products_of_inputs_given_by_name():
    found = find_layers(Crossed().eval(), lambda m: m(SERIES))
    macs = {spec.name: spec.macs for spec in found.layers if spec.kind == "attention"}
    assert macs == {
        "attention.q_proj_weight": 2 * 10 * 10,
        "attention.k_proj_weight": 6 * 10 * 10,
        "attention.v_proj_weight": 6 * 10 * 5,
        "same.in_proj_weight": (2 + 6 + 6) * 100,
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["embedding", "gru", "transposed"])
def test_nothing_is_said_of_inputs_that_are_not_looked_at(name):
    model, inputs, _ = made(name)
    compressed(model, inputs, LayerPlan(bits=3, rounding="hessian", saliency="hessian"))


def test_tables_are_no_first_layer():
    model, inputs, _ = made("embedding")
    chain = nn.Sequential(model, nn.Linear(44, 44), nn.GRU(44, 8, batch_first=True)).eval()
    layers = find_layers(chain, lambda m: m(inputs)).layers
    assert [spec.kind for spec in layers] == ["parameter", "embedding", "linear", "recurrent", "recurrent"]
    assert positions(layers) == [{"middle"}, {"middle"}, {"first"}, {"middle"}, {"last"}]
    assert positions(layers[:2]) == [{"first"}, {"last"}]


class Packed(nn.Module):
    """A sequence of which only so many places are real; one weight is used in both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(10, 8, 2, batch_first=True)
        self.rnn.weight_hh_l1 = self.rnn.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), 4)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.rnn(packed)[1][0][-1]


def test_products_of_packed_sequences_and_of_a_weight_of_two_layers():
    found = find_layers(Packed().eval(), lambda m: m(SERIES))
    assert {spec.name: spec.macs for spec in found.layers} == {
        "rnn.weight_ih_l0": 4 * 32 * 10,
        "rnn.weight_hh_l0": 2 * 4 * 32 * 8,
        "rnn.weight_ih_l1": 4 * 32 * 8,
    }


class SelfAttention(nn.MultiheadAttention):
    """Takes one input, and makes the others of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x[..., :7], x[..., :5])[0]


def test_an_attention_of_one_input_is_no_reason_to_stop():
    model = nn.Sequential(SelfAttention(10, 2, kdim=7, vdim=5, batch_first=True), nn.Linear(10, 2)).eval()
    found = find_layers(model, lambda m: m(SERIES))
    assert {spec.name for spec in found.layers if not spec.seen} == {
        f"0.{which}_proj_weight" for which in ("q", "k", "v")
    }


class TwoNorms(nn.Module):
    """One table, of which a second reader changes the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Embedding(40, 8), nn.Embedding(40, 8, max_norm=1.0), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.a(tokens) + self.b(tokens))


def test_a_table_that_any_reader_changes_is_kept():
    found = find_layers(TwoNorms().eval(), lambda m: m(TOKENS))
    assert [spec.name for spec in found.layers] == ["out"]
    assert "max_norm" in next(kept.reason for kept in found.kept if kept.name == "a.weight")


def test_infomax_is_of_a_layer_whose_inputs_are_seen():
    bench = Workbench(word_task())
    layers = {spec.name: LayerPlan(bits=4) for spec in bench.layers}
    *_, last = run_trial(bench, Plan(layers, Recipe(1.0, 1e-3, 0.0, infomax=0.1)), Budget((0.0, 1.0)))
    assert last.measurement.epoch == 1.0
    task = replace(word_task(), model=nn.EmbeddingBag(60, 3, mode="sum").eval())
    bench = Workbench(task)
    source = {"version": 1, "layers": [{"bits": 4}], "recipe": {"infomax": [0.1, 0.2]}}
    with pytest.raises(SpaceError, match=r"sets infomax \(0.15\), which needs a linear layer or a convolution"):
        check_space(load_space(source, bench.layers), bench)


def test_bits_of_inputs_are_those_of_layers_that_have_some():
    bench = Workbench(word_task())
    plan = Plan({s.name: LayerPlan(bits=4, activation_bits=8 if s.seen else 32) for s in bench.layers})
    record = SimpleNamespace(layers=bench.layers)
    assert report.plan_summary(record, plan) == "4.0 bits, inputs 8.0 bits"
