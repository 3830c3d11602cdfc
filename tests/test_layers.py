"""What of a model is compressible: every tensor once, tied ones as one, operations counted by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.compress.layers import find_layers
from autocompress.compress.products import macs_of
from autocompress.errors import TaskError
from autocompress.plan import LayerPlan, Plan, uncompressed


def inventory(model, *inputs):
    model = model.eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = find_layers(model, lambda m: m(*inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    covered(model, found)
    return found


def covered(model, found):
    """Every parameter and buffer of the model is in exactly one row, by one of its names."""
    names = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), set()).add(name)
    rows = [s.key for s in found.layers] + [k.name for k in found.kept]
    owners = [next(key for key, known in names.items() if row in known) for row in rows]
    assert sorted(owners) == sorted(names)
    assert found.parameters == sum(
        t.numel() for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )


def layer(found, name):
    return next(s for s in found.layers if s.name == name)


def reasons(found):
    return {k.name: k.reason for k in found.kept}


def test_macs_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 3 x 8 x 8 -> 8 x 4 x 4: 16 positions of 8 x 27
        nn.Conv2d(8, 8, 3, groups=8, padding=1),  # 16 positions of 8 x 9
        nn.Conv2d(8, 12, 1, groups=4),  # 16 positions of 12 x 2
        nn.Flatten(),
        nn.Linear(192, 10),
    )
    wanted = {"0": 16 * 8 * 27, "1": 16 * 8 * 9, "2": 16 * 12 * 2, "4": 1920}
    for count in (1, 5):  # of one example, whatever the batch
        found = inventory(net, torch.randn(count, 3, 8, 8))
        assert {s.name: s.macs for s in found.layers} == wanted
    assert [s.kind for s in found.layers] == ["conv2d", "conv2d", "conv2d", "linear"]
    assert [s.groups for s in found.layers] == [1, 8, 4, 1]
    assert layer(found, "1").shape == (8, 1, 3, 3)
    assert macs_of(found.layers, uncompressed(found.layers)) == sum(wanted.values())


def test_macs_of_one_and_three_dimensions_and_of_sequences():
    assert inventory(nn.Conv1d(2, 3, 4), torch.randn(2, 2, 9)).layers[0].macs == 6 * 3 * 8
    assert inventory(nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4)).layers[0].macs == 27 * 3 * 16
    assert inventory(nn.Linear(5, 7), torch.randn(4, 11, 5)).layers[0].macs == 11 * 35
    assert inventory(nn.Linear(5, 7), torch.randn(5)).layers[0].macs == 35


class Windows(nn.Module):
    """Folds time into the batch, and puts time first."""

    def __init__(self):
        super().__init__()
        self.folded, self.turned = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        batch, steps, width = x.shape
        y = self.folded(x.reshape(batch * steps, width)).reshape(batch, steps, 4)
        return self.turned(y.transpose(0, 1))


@pytest.mark.parametrize("batch", [1, 6])
def test_macs_where_the_batch_is_folded_or_not_the_first_axis(batch):
    found = inventory(Windows(), torch.randn(batch, 10, 3))
    assert [s.macs for s in found.layers] == [10 * 12, 10 * 8]


@pytest.mark.parametrize(("stride", "scheme"), [(1, "channel"), (2, "channel"), (1, "spatial")])
def test_macs_of_factors(stride, scheme):
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, stride=stride), nn.Flatten(), nn.Linear(6 * (8 // stride) ** 2, 5)
    )
    found = inventory(net, torch.randn(1, 4, 8, 8))
    plan = Plan({"0": LayerPlan(rank=2, scheme=scheme), "2": LayerPlan(rank=1)})
    positions, linear = (8 // stride) ** 2, net[2].in_features + 5
    factors = 2 * 4 * 9 + 6 * 2 if scheme == "channel" else 2 * 4 * 3 + 6 * 2 * 3
    assert macs_of(found.layers, plan) == positions * factors + linear


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = self.block

    def forward(self, x):
        return self.again(self.block(self.b(self.a(self.a(x)))))


def test_a_weight_used_in_several_places_is_one_layer_with_all_its_uses():
    found = inventory(Reused(), torch.randn(3, 4))
    tied, block = found.layers
    assert (tied.name, tied.shared_with, tied.macs) == ("a", ("b",), 3 * 16)
    assert (block.name, block.shared_with, block.macs) == ("block.0", ("again.0",), 2 * 16)
    for spec in found.layers:
        assert not spec.factorable
        assert spec.whole_because == f"shared with {spec.shared_with[0]}"
        assert spec.max_rank() == 0
    assert [k.name for k in found.kept] == ["a.bias", "b.bias", "block.0.bias"]


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(13, 8), nn.Parameter(torch.zeros(5, 8))
        self.out = nn.Linear(8, 13, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.embed(tokens) + self.position)


def test_an_embedding_tied_to_a_layer():
    found = inventory(LanguageModel(), torch.zeros(2, 5, dtype=torch.int64))
    (out,) = found.layers
    assert (out.name, out.shared_with, out.shape, out.macs) == ("out", ("embed",), (13, 8), 5 * 13 * 8)
    why = "parameter 'position' of LanguageModel, a matrix of fewer than 256 elements"
    assert reasons(found) == {"position": why}


def test_everything_else_is_kept_with_a_reason():
    net = nn.Sequential(
        nn.Embedding(7, 6, max_norm=1.0),
        nn.LayerNorm(6),
        nn.LSTM(6, 5, batch_first=True),
        *(),
    )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = net, nn.Linear(5, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.up, self.one = nn.ConvTranspose1d(2, 2, 3), nn.Linear(1, 1)
            self.norm = nn.BatchNorm1d(2)

        def forward(self, tokens):
            hidden, _ = self.net[2](self.net[1](self.net[0](tokens)))
            y = self.normed(self.head(hidden)).transpose(1, 2)
            return self.one(self.norm(self.up(y)).mean((1, 2), keepdim=True))

    found = inventory(Model(), torch.zeros(2, 4, dtype=torch.int64))
    assert [s.name for s in found.layers] == ["net.2.weight_ih_l0", "net.2.weight_hh_l0", "head", "up"]
    told = reasons(found)
    assert told["net.0.weight"] == "embedding table that is normalised in each call (max_norm)"
    assert told["net.1.weight"] == "weight of LayerNorm"
    assert told["net.1.bias"] == "bias of LayerNorm"
    assert told["net.2.bias_hh_l0"] == "bias of LSTM"
    assert "parametrized weight" in told["normed.parametrizations.weight.original0"]
    assert told["up.bias"] == "bias of ConvTranspose1d"
    assert told["one.weight"] == "a single weight"
    assert told["norm.running_mean"] == told["norm.num_batches_tracked"] == "buffer"
    assert all(told.values())


def test_old_style_weight_norm_is_kept_with_a_reason():
    net = nn.Sequential(nn.Linear(3, 4), nn.utils.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        net(torch.randn(1, 3))
    found = find_layers(net, lambda m: m(torch.randn(1, 3)))
    assert [s.name for s in found.layers] == ["0"]
    assert reasons(found)["1.weight_v"] == "parameter 'weight_v' of a Linear whose weight is made from it"


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Plain(nn.Linear):
    pass


class Reader(nn.Module):
    """Reads its child's weight by itself."""

    def __init__(self):
        super().__init__()
        self.child, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.other(F.linear(x, self.child.weight.abs(), self.child.bias))


def hooked():
    module = nn.Linear(6, 6)
    module.register_forward_hook(lambda m, args, output: output + m.weight.sum())
    return module


def test_what_can_only_stay_whole_says_why():
    net = nn.Sequential(
        Doubled(6, 6), Plain(6, 6), hooked(), Reader(), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1, groups=2)
    )
    found = inventory(net, torch.randn(2, 6))
    whole = {s.name: s.whole_because for s in found.layers if not s.factorable}
    assert whole == {
        "0": "Doubled has a forward of its own",
        "2": "the module has hooks",
        "3.child": "a parent module reads this weight by itself",
        "5": "grouped convolution",
    }
    assert {s.name for s in found.layers if s.factorable} == {"1", "3.other"}


def test_attention_and_transformer_layers_are_found_and_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(self.attention(x, x, x)[0]))

    found = inventory(Model(), torch.randn(2, 5, 8))
    assert {s.name for s in found.layers if s.seen} == {
        "attention.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "head",
    }  # fmt: skip
    assert [s.name for s in found.layers if s.factorable] == ["head"]
    assert all("parent module reads" in s.whole_because for s in found.layers if s.seen and not s.factorable)
    joined = [s for s in found.layers if not s.seen]
    assert [(s.name, s.kind) for s in joined] == [
        ("attention.in_proj_weight", "attention"),
        ("encoder.self_attn.in_proj_weight", "attention"),
    ]
    assert [s.macs for s in joined] == [5 * 8 * 24] * 2


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), torch.randn(2, 3), "holds BatchNorm1d, ReLU, compressible are"),
        (nn.Identity(), torch.randn(2, 3), "model Identity has no layer to compress: it holds Identity"),
        (nn.Embedding(3, 2, max_norm=1.0), torch.tensor([1]), "holds Embedding"),
        (nn.Linear(3, 2, dtype=torch.complex64), torch.randn(2, 3), "no layer to compress: it holds Linear"),
        (nn.LazyLinear(3), torch.randn(2, 3), "parameter 'weight' is not initialised: run one batch"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_model_without_a_layer_says_what_it_holds(model, inputs, said):
    with pytest.raises(TaskError, match=said) as caught:
        find_layers(model, lambda m: m(inputs))
    assert "\n" not in str(caught.value)


def test_a_layer_that_the_forward_never_uses_has_no_macs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    found = inventory(Model(), torch.randn(2, 3))
    assert [s.macs for s in found.layers] == [9, 0]


def test_the_mode_of_the_model_does_not_matter():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    twin = copy.deepcopy(net).eval()
    inputs = torch.randn(1, 4)
    assert find_layers(net, lambda m: m(inputs)) == find_layers(twin, lambda m: m(inputs))
    assert net.training
    assert net[1].num_batches_tracked == 0


class Adapted(nn.Linear):
    """A linear layer with an adapter of two layers inside, as finetuning adds them."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("model", [nn.Sequential(Adapted(20, 30), nn.ReLU(), nn.Linear(30, 20)), Adapted(20, 30)])
def test_a_layer_with_layers_inside_stays_whole_and_keeps_them(model):
    found = inventory(model, torch.randn(2, 20))
    outer = "0" if isinstance(model, nn.Sequential) else ""
    assert {s.name: s.whole_because for s in found.layers if not s.factorable} == {outer: "it has layers inside"}
    assert {s.name for s in found.layers} >= {f"{outer}.{name}".lstrip(".") for name in ("down", "up")}
