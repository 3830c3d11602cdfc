"""A model under any plan is what comes back from its file: every kind of layer, dtype, shape, bit-width and coder."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.codec import container
from autocompress.codec.tensors import Artifact, Coded
from autocompress.compress import apply, artifact, lowrank
from autocompress.compress.layers import find_layers
from autocompress.errors import TaskError
from autocompress.plan import BIT_WIDTHS, LayerPlan, Plan

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile both coders before Hypothesis looks at the clock."""
    container.pack(Artifact({"x": Coded(np.eye(9, dtype=np.uint16), np.arange(2, dtype="f4"))}))


class Words(nn.Module):
    """An embedding, an attention-like pair of layers, a norm; the output layer is tied or not."""

    def __init__(self, words, width, tied):
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(words, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.out = nn.Linear(width, words, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.arange(3))

    def forward(self, tokens):
        return self.out(self.mix(self.norm(self.embed(tokens))))


class One(nn.Module):
    """A layer in the user's own module, beside a parameter of one element and an empty one."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale, self.none = layer, nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))

    def forward(self, x):
        return self.layer(x) * self.scale


def conv(axes, norm):
    def make(draw):
        groups = draw(st.sampled_from([1, 1, 2]))
        inputs, outputs = (groups * draw(st.integers(1, 4)) for _ in range(2))
        kernel = draw(st.sampled_from([1, 3]))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](inputs, outputs, kernel, groups=groups, padding=kernel // 2)
        return nn.Sequential(layer, norm(outputs), nn.ReLU()), torch.ones(2, inputs, *[3] * axes)

    return make


def linear(wrap):
    def make(draw):
        inputs, outputs = draw(st.sampled_from([(1, 1), (1, 9), (9, 1), (7, 5), (40, 3)]))
        return wrap(nn.Linear(inputs, outputs, bias=draw(st.booleans()))), torch.ones(2, inputs)

    return make


def words(draw):
    return Words(draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.booleans())), torch.zeros(
        1, 2, dtype=torch.long
    )


KINDS = {
    "bare linear": linear(lambda layer: layer),
    "linear": linear(lambda layer: nn.Sequential(layer, nn.Tanh())),
    "own module": linear(One),
    "conv1d": conv(1, nn.BatchNorm1d),
    "conv2d": conv(2, lambda n: nn.GroupNorm(1, n)),
    "conv3d": conv(3, nn.BatchNorm3d),
    "words": words,
}


@st.composite
def compressed(draw, kind):
    """A model, and it under a plan."""
    model, inputs = KINDS[kind](draw)
    dtype, values = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["normal", "one value", "zero", "two values"]))
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_({"normal": drawn, "one value": 0.37 + 0 * drawn, "zero": 0 * drawn,
                              "two values": 0.25 * drawn.sign()}[values])  # fmt: skip
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    try:
        layers = find_layers(model, lambda m: m(inputs)).layers
    except TaskError:  # all of it is carried as it is
        layers = ()
    plans = {}
    for spec in layers:
        ranked = values == "normal" and spec.schemes and draw(st.booleans())
        plans[spec.name] = LayerPlan(
            rank=1 if ranked else None, bits=draw(st.sampled_from(BIT_WIDTHS)),
            threshold=draw(st.sampled_from([0.0, 0.0, 0.7, 99.0])), scheme=spec.schemes[-1] if ranked else "channel",
            quantizer=draw(st.sampled_from(["codebook", "uniform"])),
        )  # fmt: skip
    plan = Plan(plans)
    return model, apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_as_it_was_measured(kind, tmp_path):
    @settings(max_examples=60, deadline=None)
    @given(compressed(kind), st.sampled_from(container.EFFORTS))
    def check(made, effort):
        model, state = made
        entries = state.encode()
        (tmp_path / "x.acz").write_bytes(artifact.write(model, state.plan, entries, "test", effort))
        loaded = artifact.load(tmp_path / "x.acz", model)
        found, measured = artifact.unique_state(loaded), state.substitutes()
        assert list(found) == list(entries)
        for key, tensor in found.items():
            exact = artifact.to_tensor(entries[key]).to(tensor.dtype)
            assert torch.equal(exact.nan_to_num(), tensor.nan_to_num()), key
            if key in measured:
                close = {torch.float32: 0.0, torch.float64: 1e-6}.get(
                    tensor.dtype, 2**-7
                )  # the codes' step has 24 bits
                assert torch.allclose(tensor, measured[key], rtol=close, atol=close), key
        for one, other in ((a, b) for a in state.aliases for b in [state.aliases[a]]):
            assert loaded.get_parameter(one) is loaded.get_parameter(other)

    check()


SHAPES = [(), (0,), (1,), (0, 7), (7, 0), (1, 1), (1, 300), (300, 1), (30, 10), (4, 3, 5, 5), (2, 1, 3, 3, 3)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 16), st.sampled_from(["any", "rest", "one", "few"]), st.integers(0, 99),
    st.sampled_from(container.EFFORTS), st.booleans(),
)  # fmt: skip
def test_alphabets_of_up_to_16_bits_come_back(shape, bits, kind, seed, effort, short):
    draw = np.random.default_rng(seed)
    symbols = draw.integers(0, 1 << bits, shape)
    if kind in ("rest", "one"):
        symbols = np.full(shape, 0 if kind == "rest" else (1 << bits) - 1)
    elif kind == "few":
        symbols = np.where(draw.random(shape) < 0.1, symbols, (1 << bits) // 2)
    table = np.sort(draw.normal(size=1 << bits)).astype(np.float32)
    if short:
        table = (table.view(np.uint32) & 0xFFFF0000).view(np.float32)
    coded = Coded(symbols.astype(np.uint16), table)
    back = container.unpack(container.pack(Artifact({"x": coded}), effort)).tensors["x"]
    assert back.symbols.shape == shape
    assert back.table.tobytes() == table.tobytes()
    assert np.array_equal(back.symbols, symbols)
    assert math.prod(shape) == back.values().size
