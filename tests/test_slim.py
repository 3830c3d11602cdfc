"""Dead units are cut out and the function stays; what is not understood keeps its units."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.compress import dead_units
from autocompress.deploy.slim import slimmed

IMAGES = (3, 8, 8)


def checked(net, shape, *, batch=7, tolerance=1e-5):
    """What was cut, after comparing the outputs on another batch size."""
    torch.manual_seed(1)
    net.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small, cut = slimmed(net, {"input": torch.randn(2, *shape)}, False)
    sizes = {key: tuple(value.shape) for key, value in small.state_dict().items()}
    assert all(sizes[key] == after for key, (_, after) in cut.shapes.items())
    biases = {f"{key.rpartition('.')[0]}.bias" for key in before}  # a shared layer may need two
    assert {key.removesuffix("_0") for key in sizes} <= before.keys() | biases
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x = torch.randn(batch, *shape)
    with torch.no_grad():
        wanted, found = net(x), small(x)
    assert (wanted - found).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))
    return cut


def kill(layer, rows=(), columns=(), bias=None):
    """Zero rows and columns of a layer's weight; `bias` fills the rows' biases."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0
        if len(columns):
            layer.weight[:, list(columns)] = 0
        if bias is not None:
            layer.bias[list(rows)] = bias


class Residual(nn.Module):
    """Convolutions with a sum, depthwise too, normalised, pooled and flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8 * 16, 10)
        self.mix = nn.Sequential(nn.Linear(10, 20), nn.ReLU(inplace=True), nn.Linear(20, 10))

    def forward(self, x):
        y = torch.relu(self.norm(self.a(x)))
        y = F.max_pool2d(y + self.depth(self.b(y)), 2)
        y = self.head(y.view(y.size(0), -1))
        return y + self.mix(y)


def trained_like(net, seed=0):
    """Random statistics, scales and biases."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
    return net


def test_a_chain_loses_unread_and_constant_units():
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    kill(net[0], rows=[0, 1], bias=1.5)  # a constant that the next bias takes
    kill(net[2], columns=[4])  # nobody reads unit 4 of the first layer
    kill(net[4], columns=[2, 3, 7])
    cut = checked(net, (6,))
    assert (cut.units, cut.of_units) == (3 + 3, 17)
    assert cut.shapes["0.weight"] == ((9, 6), (6, 6))
    assert cut.shapes["2.weight"] == ((8, 9), (5, 6))
    assert (cut.of_macs, cut.macs) == (54 + 72 + 24, 36 + 30 + 15)


def test_macs_of_layers_that_keep_their_units_count_too():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(12, 2, 2, 2), nn.Flatten(),
        nn.Linear(128, 5),
    )  # fmt: skip
    kill(net[0], rows=[1])
    cut = checked(net, IMAGES)
    assert cut.of_macs == 36 * 8 * 27 + 16 * 12 * 2 * 9 + 16 * 12 * 2 * 4 + 128 * 5


def test_weights_that_stay_are_bit_equal():
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    kill(net[2], columns=[1, 4])
    small, _ = slimmed(net.eval(), {"input": torch.randn(2, 6)}, False)
    kept = [0, 2, 3, 5, 6, 7, 8]
    state, whole = small.state_dict(), net.state_dict()
    assert torch.equal(state["0.weight"], whole["0.weight"][kept])
    assert torch.equal(state["0.bias"], whole["0.bias"][kept])
    assert torch.equal(state["2.weight"], whole["2.weight"][:, kept])
    assert torch.equal(state["2.bias"], whole["2.bias"])


def test_a_dead_unit_takes_those_that_fed_only_it():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[4], columns=[0])  # unit 0 of the second layer is not read ...
    with torch.no_grad():
        net[2].weight[1:, 3] = 0  # ... and alone reads unit 3 of the first
    assert checked(net, (5,)).shapes["0.weight"] == ((6, 5), (5, 5))


def test_constants_go_through_several_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    kill(net[0], rows=[1, 2])
    with torch.no_grad():
        net[2].weight[3, [0, 3]] = 0  # unit 3 sees constants alone, and is one
    assert checked(net, (4,)).shapes["2.weight"] == ((5, 4), (4, 2))


def test_a_sum_loses_what_both_sides_lack():
    net = trained_like(Residual())
    kill(net.a, rows=[2, 3, 4])
    with torch.no_grad():
        net.norm.bias[[2, 3]] = -9.0  # relu makes zeros of them; channel 4 stays at some other constant
        net.norm.weight[[2, 3]] = 0.1
    kill(net.b, rows=[2, 3])
    kill(net.depth, rows=[2], bias=0.7)
    cut = checked(net, IMAGES)
    assert cut.shapes["a.weight"][1][0] == 6
    assert cut.shapes["depth.weight"] == ((8, 1, 3, 3), (6, 1, 3, 3))
    assert cut.shapes["head.weight"] == ((10, 128), (10, 96))


def test_a_sum_keeps_what_one_side_has():
    net = trained_like(Residual())
    kill(net.b, rows=[2, 3])
    kill(net.depth, rows=[2, 3])
    cut = checked(net, IMAGES)
    assert cut.units == 0
    assert cut.shapes == {}


def test_a_constant_beside_padding_stays():
    """A border of zeros sees less of it: no bias can stand for it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))
    kill(net[0], rows=[0, 1])
    with torch.no_grad():
        net[0].bias[:2] = torch.tensor([1.0, -1.0])  # after relu: 1 and 0
    assert checked(net, IMAGES).shapes["0.weight"] == ((4, 3, 3, 3), (3, 3, 3, 3))
    net[2].padding = (0, 0)
    assert checked(net, IMAGES).shapes["0.weight"] == ((4, 3, 3, 3), (2, 3, 3, 3))


@pytest.mark.parametrize(("pool", "kept"), [
    (nn.AvgPool2d(3, 2, padding=1), 3), (nn.AvgPool2d(2), 2), (nn.MaxPool2d(3, 2, padding=1), 2),
    (nn.AdaptiveAvgPool2d(2), 2), (nn.Dropout(0.5), 2),
])  # fmt: skip
def test_pools_hand_constants_on(pool, kept):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 5, 1), nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(1, *IMAGES))
    kill(net[0], rows=[0, 1])
    with torch.no_grad():
        net[0].bias[:2] = torch.tensor([1.0, 0.0])
    assert checked(net, IMAGES).shapes["0.weight"][1][0] == kept


class Squeeze(nn.Module):
    """Squeeze and excitation, a mean over places, a permutation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        y = F.silu(self.a(x))
        y = y * torch.sigmoid(self.b(y.mean((2, 3), keepdim=True)))
        return self.head(y.mean(dim=[2, 3]))


def test_gates_and_means():
    net = Squeeze()
    kill(net.a, rows=[1, 2])
    with torch.no_grad():
        net.a.bias[1:3] = 0
    assert checked(net, IMAGES).shapes["head.weight"] == ((2, 8), (2, 6))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_the_hidden_units_of_a_transformer():
    net = Transformer()
    net.layer.train()  # the fused kernel of eval mode hides its layers
    kill(net.layer.linear1, rows=[0, 5, 6])
    kill(net.layer.linear2, columns=[9])
    net.eval()
    cut = checked(net, (5, 8))
    if cut.shapes:  # where torch exports the fused kernel nothing is cut
        assert cut.shapes["layer.linear1.weight"] == ((16, 8), (12, 8))


class Odd(nn.Module):
    """One of several things without a rule between two layers."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.what = nn.Linear(6, 6), nn.Linear(6, 2), what
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        y = self.a(x)
        if self.what == "batches":
            y = torch.cat([y, x], 0)
        elif self.what == "softmax":
            y = y.softmax(1)
        elif self.what == "norm":
            y = self.norm(y)
        elif self.what == "roll":
            y = y.roll(1, 1)
        elif self.what == "changed":
            z = y + 1
            y.relu_()
            y = y * z
        elif self.what == "output":
            return self.b(y), y
        return self.b(y)


@pytest.mark.parametrize("what", ["batches", "softmax", "norm", "roll", "changed"])
def test_what_is_not_understood_keeps_its_units(what):
    net = Odd(what)
    kill(net.a, rows=[0, 1])
    kill(net.b, columns=[3])
    assert checked(net, (6,)).units == 0


def test_outputs_keep_their_units():
    net = Odd("output").eval()
    kill(net.a, rows=[0, 1])
    small, cut = slimmed(net, {"input": torch.randn(2, 6)}, False)
    x = torch.randn(3, 6)
    assert cut.units == 0
    assert torch.equal(small(x)[1], net(x)[1])


def test_a_layer_along_another_axis_reads_all_units():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Linear(6, 5))
    kill(net[2], columns=[1])
    cut = checked(net, IMAGES)
    assert cut.shapes == {"0.weight": ((4, 3, 3, 3), (3, 3, 3, 3)), "2.weight": ((4, 4, 1, 1), (4, 3, 1, 1))}


class Joined(nn.Module):
    """Two layers' units and the input's side by side, normalised and read by one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.norm, self.c = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1)

    def forward(self, x):
        return self.c(torch.relu(self.norm(torch.cat([self.a(x), self.b(x), x], dim=1))))


def test_a_concatenation_loses_what_its_parts_lose():
    net = trained_like(Joined())
    kill(net.a, rows=[1, 2], bias=0.7)  # constants, read
    kill(net.c, columns=[6, 10])  # unit 2 of b, and one of the input's, which stays
    cut = checked(net, IMAGES)
    assert (cut.units, cut.of_units) == (3, 9)  # the output's six are fixed
    assert cut.shapes["a.weight"][1][0] == 2
    assert cut.shapes["b.weight"][1][0] == 4
    assert cut.shapes["c.weight"] == ((6, 12, 1, 1), (6, 9, 1, 1))


class Dense(nn.Module):
    """As in DenseNet: each layer reads all before it; the last concatenation is added to a layer, flattened, read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.d, self.head = nn.Conv2d(12, 12, 1), nn.Linear(12 * 64, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.cat([x, torch.relu(self.b(x))], 1)
        x = torch.cat([x, torch.relu(self.c(x))], 1)
        return self.head((x + torch.relu(self.d(x))).flatten(1))


def test_concatenations_of_concatenations_lose_a_unit_together():
    net = trained_like(Dense())
    for layer, rows in ((net.a, [1]), (net.c, [0, 3]), (net.d, [1, 2, 8])):
        kill(layer, rows=rows, bias=-1.0)  # relu makes a zero of it
    cut = checked(net, IMAGES)
    assert cut.shapes["a.weight"][1] == (3, 3, 3, 3)  # unit 1 of the sum; 2 lives on in a
    assert cut.shapes["b.weight"][1] == (4, 3, 1, 1)
    assert cut.shapes["c.weight"][1] == (3, 7, 1, 1)  # unit 8 of the sum; 11 lives on in d
    assert cut.shapes["d.weight"][1] == (10, 10, 1, 1)
    assert cut.shapes["head.weight"][1] == (5, 640)


class Mixed(nn.Module):
    """Features flattened from places beside features of a linear layer, in a sum of concatenations; an axis mixed."""

    def __init__(self):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(192, 6)
        self.head, self.odd = nn.Linear(22, 3), nn.Linear(6, 22)

    def forward(self, x):
        side = torch.relu(self.side(x.flatten(1)))
        y = torch.cat((torch.relu(self.conv(x)).flatten(1), side), -1)
        return self.head(y * torch.sigmoid(self.odd(side)))


def test_units_of_several_indices_beside_single_ones():
    net = Mixed()
    kill(net.conv, rows=[2], bias=-1.0)
    kill(net.head, columns=[0, 1, 2, 3, 4, 20])  # all of unit 0, one of unit 1; unit 4 of side, which odd reads
    kill(net.odd, columns=[4])
    cut = checked(net, IMAGES)
    assert cut.shapes["conv.weight"][1][0] == 2
    assert cut.shapes["side.weight"] == ((6, 192), (5, 192))
    assert cut.shapes["head.weight"] == ((3, 22), (3, 13))
    assert cut.shapes["odd.weight"] == ((22, 6), (13, 5))


@settings(max_examples=12, deadline=None)
@given(dead=st.floats(0, 0.95), seed=st.integers(0, 10_000), kind=st.sampled_from([Joined, Dense, Mixed]))
def test_any_sparse_concatenation(dead, seed, kind):
    net = trained_like(kind(), seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.mul_(torch.rand_like(layer.weight) > dead)
                layer.weight[torch.rand(len(layer.weight)) < dead / 2] = 0
                layer.bias.mul_(torch.rand_like(layer.bias) > 0.5)
    checked(net, IMAGES)


class Shared(nn.Module):
    def __init__(self, embedded):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.embedded = embedded

    def forward(self, x):
        y = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
        if self.embedded:
            y = y + F.embedding((x[:, 0] > 0).long(), self.twice.weight)
        return self.last(y)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_shared_weight_is_cut_alike_everywhere(embedded):
    net = Shared(embedded)
    kill(net.twice, rows=[1], columns=[1])
    kill(net.first, rows=[1])
    kill(net.last, columns=[1])
    for layer in (net.twice, net.first):
        with torch.no_grad():
            layer.bias[1] = 0
    shapes = {name.removesuffix("_1"): pair for name, pair in checked(net, (6,)).shapes.items()}
    assert shapes.get("twice.weight") == (None if embedded else ((6, 6), (5, 5)))


def test_a_shared_weight_whose_uses_differ_keeps_the_unit():
    net = Shared(False)
    kill(net.first, rows=[1])  # dead after the first layer alone
    assert checked(net, (6,)).units == 0


def test_a_layer_of_dead_units_keeps_one():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    kill(net[0], rows=range(5), bias=0.3)
    cut = checked(net, (4,))
    assert cut.shapes["0.weight"] == ((5, 4), (1, 4))


@pytest.mark.parametrize("name", sorted(dead_units.POINTWISE - {"add", "sub", "rsub", "mul", "div", "to"}))
def test_pointwise_operators_keep_what_is_unknown(name):
    """The analysis runs them on NaN where values are unknown: none may make a number of it."""
    arguments = {
        "clamp": (-1.0, 1.0), "clamp_max": (1.0,), "clamp_min": (0.0,), "dropout": (0.5, False), "threshold": (0.1, 0.0)
    }  # fmt: skip
    operator = getattr(torch.ops.aten, name)
    for length in (1, 2, 8, 33):  # vectorised and not
        out = operator(torch.full((length,), math.nan, dtype=torch.float64), *arguments.get(name, ()))
        assert out.isnan().all()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    dead=st.floats(0, 0.9),
    seed=st.integers(0, 10_000),
    convolution=st.booleans(),
)
def test_any_sparse_chain(sizes, dead, seed, convolution):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for k, (few, many) in enumerate(itertools.pairwise(sizes)):
        padding = int(torch.randint(0, 2, (1,), generator=generator))
        layer = nn.Conv2d(few, many, 3, padding=padding) if convolution else nn.Linear(few, many)
        with torch.no_grad():
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) > dead)
            layer.weight[torch.rand(many, generator=generator) < dead / 2] = 0
            layer.bias.mul_(torch.rand(many, generator=generator) > 0.5)
        parts += [layer, (nn.ReLU, nn.Sigmoid, nn.Identity)[k % 3]()]
    checked(nn.Sequential(*parts), (sizes[0], 12, 12) if convolution else (sizes[0],))


class Counted(nn.Module):
    """Whole numbers between two layers, of which one is always zero."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.first(x).to(torch.int64).float())


def test_whole_numbers_are_not_taken_for_constants():
    net = Counted()
    kill(net.first, rows=[3])
    checked(net, (8,))


def test_an_average_with_a_divisor_of_its_own_changes_constants():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(6, 3, 1)).eval()
    kill(net[0], rows=[1, 4], bias=0.7)
    checked(net, (2, 9, 9))
