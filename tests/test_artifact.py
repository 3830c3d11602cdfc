"""Artifacts and modules: what is written is read as it was, in the right architecture, and nothing is executed."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_trial import task_of
from torch import nn

import autocompress as ac
from autocompress import inspection
from autocompress.codec import container, header
from autocompress.compress import apply, architecture, artifact, lowrank
from autocompress.compress.layers import find_layers
from autocompress.errors import ArtifactError
from autocompress.plan import LayerPlan, Plan, Recipe, uncompressed
from autocompress.trial import Budget, Workbench, run_trial

GOLDEN = Path(__file__).parent / "golden"


def filled(model, seed=0):
    """The model in eval mode, every tensor of its state random, running variances positive."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw).abs() * 0.5 + 0.1 if tensor.dim() == 1 else
                             torch.randn(tensor.shape, generator=draw) * 0.4)  # fmt: skip
            else:
                tensor.fill_(7)
    return model.eval()


def compressed(model, layer_plans, inputs):
    """The model under a plan (names to plans, the rest whole), as bytes and as what it computes."""
    layers = find_layers(model, lambda m: m(inputs)).layers
    plan = Plan({s.name: layer_plans.get(s.name, LayerPlan()) for s in layers})
    state = apply.compress(model, layers, plan, lambda s, k: lowrank.svd(model.get_submodule(s.name).weight, k))
    entries = state.encode()
    carried = {key: artifact.to_tensor(entry).to(model.state_dict().get(key, torch.ones(1)))
               for key, entry in entries.items() if entry.dtype == "bfloat16"}  # fmt: skip
    with torch.no_grad():
        outputs = apply.call_with(state.module, {**state.substitutes(), **carried}, inputs)
    return artifact.write(model, plan, entries, "test"), outputs


class Net(nn.Module):
    """No tree of standard layers."""

    def __init__(self, width=6):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)
        self.register_buffer("offset", torch.zeros(width))

    def forward(self, x):
        return self.second(torch.relu(self.first(x) + self.offset))


class Tied(nn.Module):
    """A token embedding and the output layer share their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.mix(self.embed(tokens))))


class Mixed(nn.Module):
    """Layers of several dtypes."""

    def __init__(self):
        super().__init__()
        self.wide, self.brain = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 6, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)

    def forward(self, x):
        return self.brain(self.norm(self.wide(x.double())).bfloat16()).float()


IMAGE, WORDS = torch.linspace(-1, 1, 2 * 4 * 7 * 7).reshape(2, 4, 7, 7), torch.tensor([[1, 5, 10], [0, 2, 2]])
SOUND, FILM = (
    torch.linspace(-1, 1, 2 * 4 * 9).reshape(2, 4, 9),
    torch.linspace(-1, 1, 2 * 2 * 64).reshape(2, 2, 4, 4, 4),
)
ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)

F64, TANH = torch.float64, nn.Tanh()
CASES = {
    "bare linear": (lambda: nn.Linear(4, 3), {"": LayerPlan(bits=3, threshold=0.3)}, ROWS),
    "bare linear in two": (lambda: nn.Linear(40, 30), {"": LayerPlan(rank=4, bits=5)}, torch.ones(2, 40)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5, bias=False)),
               {"0": LayerPlan(rank=2, bits=4), "2": LayerPlan(bits=2, quantizer="uniform")}, ROWS),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6)),
               {"0": LayerPlan(rank=3, threshold=0.5)}, SOUND),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, bias=False)),
               {"0": LayerPlan(rank=2, scheme="spatial", bits=6), "2": LayerPlan(rank=3, bits=16)}, IMAGE),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)),
               {"0": LayerPlan(rank=2, bits=8)}, FILM),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)),
                {"0": LayerPlan(bits=3), "1": LayerPlan(bits=4, threshold=1.0, quantizer="uniform")}, IMAGE),
    "float64": (lambda: nn.Sequential(nn.Linear(4, 9, dtype=F64), nn.BatchNorm1d(9, affine=False, dtype=F64)),
                {}, ROWS.double()),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(4, 9, dtype=torch.bfloat16), nn.Linear(9, 3, dtype=torch.bfloat16)),
                 {"0": LayerPlan(bits=3), "1": LayerPlan(bits=32, threshold=0.5)}, ROWS.bfloat16()),
    "one activation twice": (lambda: nn.Sequential(nn.Linear(4, 9), TANH, nn.Linear(9, 9), TANH),
                             {"0": LayerPlan(bits=1)}, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_tree_of_standard_layers_needs_no_model(case, tmp_path):
    make, plans, inputs = CASES[case]
    model = filled(make())
    data, outputs = compressed(model, plans, inputs)
    (tmp_path / "m.acz").write_bytes(data)
    for loaded in (ac.load(tmp_path / "m.acz"), ac.load(str(tmp_path / "m.acz"), model=make())):
        assert not loaded.training
        with torch.no_grad():
            assert torch.allclose(loaded(inputs), outputs, atol=1e-6)
        for key, tensor in model.state_dict().items():
            if key in loaded.state_dict() and key.removesuffix(".weight").removesuffix("weight") not in plans:
                assert loaded.state_dict()[key].dtype == tensor.dtype
                close = 2**-8 if tensor.dtype == torch.float32 and plans else 0.0  # bfloat16 where bits are few
                assert torch.allclose(loaded.state_dict()[key], tensor, rtol=close, atol=0), key


@pytest.mark.parametrize("make", [Net, Tied, Mixed], ids=lambda m: m.__name__)
def test_any_other_model_is_loaded_into_the_users_own(make, tmp_path):
    model, inputs = filled(make()), WORDS if make is Tied else ROWS
    data, outputs = compressed(model, {"mix": LayerPlan(rank=2), "first": LayerPlan(bits=3, threshold=0.5)}, inputs)
    (tmp_path / "m.acz").write_bytes(data)
    own = make()
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    loaded = ac.load(tmp_path / "m.acz", model=own)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), outputs)
    assert loaded is not own
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())
    with pytest.raises(
        ArtifactError, match=rf"holds the weights of a '{make.__name__}' .* load\(path, model=YourModel"
    ):
        ac.load(tmp_path / "m.acz")


def test_tied_weights_stay_one_tensor(tmp_path):
    model = filled(Tied())
    data, outputs = compressed(model, {"out": LayerPlan(bits=2, threshold=0.5)}, WORDS)
    assert [e.name for e in header.read(data).entries] == [
        "embed.weight",
        "mix.weight",
        "mix.bias",
        "out.bias",
    ]
    (tmp_path / "m.acz").write_bytes(data)
    loaded = ac.load(tmp_path / "m.acz", model=Tied())
    assert loaded.out.weight is loaded.embed.weight
    assert len(loaded.out.weight.unique()) <= 5
    with torch.no_grad():
        assert torch.equal(loaded(WORDS), outputs)


def test_a_tree_that_shares_weights_asks_for_the_model(tmp_path):
    def make():
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    data, outputs = compressed(filled(make()), {"0": LayerPlan(bits=2)}, ROWS)
    (tmp_path / "m.acz").write_bytes(data)
    with pytest.raises(ArtifactError, match="give it as"):
        ac.load(tmp_path / "m.acz")
    loaded = ac.load(tmp_path / "m.acz", model=make())
    assert loaded[2].weight is loaded[0].weight
    with torch.no_grad():
        assert torch.equal(loaded(ROWS), outputs)


@pytest.mark.parametrize("name", ["model", "model3"])
def test_the_golden_model_is_read_for_ever(name):
    sys.path.insert(0, str(GOLDEN))
    try:
        from make import inputs
    finally:
        sys.path.remove(str(GOLDEN))
    model = ac.load(GOLDEN / f"{name}.acz")
    with torch.no_grad():
        outputs = model(inputs())
    wanted = torch.tensor(json.loads((GOLDEN / f"{name}.json").read_text())["outputs"])
    assert torch.allclose(outputs, wanted, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A `Net` whose first layer has two factors."""
    path = tmp_path_factory.mktemp("net") / "net.acz"
    path.write_bytes(compressed(filled(Net(20)), {"first": LayerPlan(rank=2, bits=4)}, ROWS)[0])
    return path


class Renamed(Net):
    def __init__(self):
        super().__init__(20)
        self.third = self.second
        del self.second


class Wider(Net):
    def __init__(self):
        super().__init__(20)
        self.second = nn.Linear(20, 4)


class Deeper(Net):
    def __init__(self):
        super().__init__(20)
        self.first = nn.Linear(5, 20)


class Longer(Net):
    def __init__(self):
        super().__init__(20)
        self.more = nn.Linear(2, 3)


class Convolved(Net):
    def __init__(self):
        super().__init__(20)
        self.first = nn.Bilinear(4, 4, 20)


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 20), nn.Linear(20, 3)
        self.register_buffer("offset", torch.zeros(20))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Net(21), r"'offset' has shape \[20\] in .*, \[21\] in the given model"),
        (Wider(), r"'second\.weight' has shape \[3, 20\] in .*, \[4, 20\] in the given model"),
        (Deeper(), r"'first\.0\.weight' has shape \[2, 4\] in .*, \[2, 5\] in the given model"),
        (Renamed(), r"holds 'second\.weight', which the given model does not have"),
        (Longer(), r"the given model has 'more\.weight' of shape \[3, 2\], .* does not"),
        (Convolved(), r"layer 'first' is a Bilinear in the given model, .* has two factors"),
        (Narrow(), r"layer 'first' has rank 2 in .*, 1 is full in the given model"),
        (nn.Linear(4, 3), r"has a layer 'first', which the given model does not have"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_wrong_architecture_is_refused_by_name_and_shape(file, wrong, said):
    with pytest.raises(ArtifactError, match=said) as caught:
        ac.load(file, model=wrong)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path, file):
    with pytest.raises(ArtifactError, match=r"artifact '.*none\.acz' cannot be read: No such file"):
        ac.load(tmp_path / "none.acz")
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        ac.load(tmp_path)
    cut = tmp_path / "cut.acz"
    for length in (0, 3, 11, 40, file.stat().st_size - 1):
        cut.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ArtifactError, match=f"{re.escape(str(cut))}: .*(truncated|not an autocompress artifact)"):
            ac.load(cut, model=Net(20))


def forge(path, header, streams=b""):
    packed = zlib.compress(json.dumps(header).encode())
    path.write_bytes(struct.pack("<4sII", b"ACZ1", len(packed), zlib.crc32(packed)) + packed + streams)
    return path


@pytest.mark.parametrize(
    "tree",
    [
        ["os.system", {"command": "touch pwned"}],
        ["Linear", {"in_features": 2, "out_features": 2, "__class__": "os.system"}],
        ["Sequential", [["0", ["subprocess.Popen", {}]]]],
        ["Sequential", [["a.b", ["ReLU", {}]]]],
        ["Sequential", [["forward", ["ReLU", {}]]]],
        ["Sequential", [["", ["ReLU", {}]]]],
        ["Sequential", [["x"]]],
        ["Module", {}],
        ["LazyLinear", {"out_features": 3}],
        ["RNN", {"input_size": 1, "hidden_size": 1}],
        ["Linear", {"in_features": "os", "out_features": 2}],
        ["Linear", {"in_features": -1, "out_features": 2}],
        ["Linear", {"in_features": 10**10, "out_features": 10**10}],
        ["Linear", {"in_features": 2**20, "out_features": 2**20}],
        ["Linear", {}],
        ["Linear", {"in_features": 2, "out_features": 2, "dtype": {}}],
        ["Linear", {"in_features": int("9" * 4000), "out_features": 2}],
        ["Linear", {"in_features": 2, "out_features": 2, "x\ny" * 100_000: 1}],
        ["Sequential", [["0", ["ReLU", {}]]] * 4097],
        ["Conv2d", {"in_channels": 1, "out_channels": 1, "kernel_size": [[1, 2], 3]}],
        ["Dropout", {"p": 5}],
        [["Linear"], {}],
        {"Linear": {}},
        None,
        "Linear",
        7,
    ],
    ids=lambda t: str(t)[:50],
)
def test_a_hostile_architecture_is_refused_and_nothing_happens(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded_before = set(sys.modules)
    with pytest.raises(ArtifactError, match=r"damaged|asks for") as caught:
        ac.load(forge(tmp_path / "x.acz", {"tensors": [], "model": tree}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1100
    assert os.listdir() == ["x.acz"]
    assert set(sys.modules) - loaded_before <= {"subprocess"}


def test_a_deep_architecture_is_refused(tmp_path):
    tree = ["ReLU", {}]
    for _ in range(200):
        tree = ["Sequential", [["0", tree]]]
    with pytest.raises(ArtifactError, match="damaged"):
        ac.load(forge(tmp_path / "x.acz", {"tensors": [], "model": tree}))


@pytest.mark.parametrize("ranks", [[], 3, {"0": 2}, {"0": [0, "channel"]}, {"0": [2, "os"]}, {"0": [2.5, "channel"]},
                                   {"0": [10**9, "channel"]}, {"0": [2, "spatial"]}, {"9": [2, "channel"]},
                                   {"1": [1, "channel"]}, {"0": [True, "channel"]},
                                   {"0": [9, "channel"], "0.0": [9, "channel"]},
                                   {"2": [1, "channel"]}])  # fmt: skip
def test_hostile_ranks_are_refused(ranks, tmp_path):
    odd = ["Conv1d", {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": "x"}]
    tree = [
        "Sequential",
        [["0", ["Linear", {"in_features": 3000, "out_features": 3000}]], ["1", ["ReLU", {}]], ["2", odd]],
    ]
    with pytest.raises(ArtifactError) as caught:
        ac.load(forge(tmp_path / "x.acz", {"tensors": [], "model": tree, "ranks": ranks}))
    assert "\n" not in str(caught.value)


def test_a_factor_is_no_layer_that_may_have_factors(tmp_path):
    """Else 500 bytes ask for a tree of any depth."""
    ranks = {".".join(["0"] * depth): [4, "channel"] for depth in range(150)}
    tree = ["Linear", {"in_features": 4, "out_features": 4}]
    with pytest.raises(ArtifactError, match="has a layer '0', which the given model does not have"):
        ac.load(forge(tmp_path / "x.acz", {"tensors": [], "model": tree, "ranks": ranks}))


def test_a_model_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\nstack")

    data, _ = compressed(filled(nn.Linear(4, 3)), {}, ROWS)
    (tmp_path / "x.acz").write_bytes(data)
    monkeypatch.setattr(nn.Module, "to_empty", full)
    with pytest.raises(ArtifactError, match="it asks for more memory than there is"):
        ac.load(tmp_path / "x.acz")


def test_shapes_are_checked_before_a_tensor_is_decoded(tmp_path):
    """A few bytes stand for 400 MB: refused for its shape in no memory, by tree and by model."""
    stream = bytes.fromhex("0000010001000000")  # one zero
    stream = struct.pack("<Hff", 1, 0.0, 1.0) + stream
    entry = ["weight", "coded", "float32", [10_000, 10_000], len(stream), zlib.crc32(stream)]
    tree = ["Linear", {"in_features": 5, "out_features": 5, "bias": False}]
    path = forge(tmp_path / "x.acz", {"tensors": [entry], "model": tree}, stream)
    for model in (None, nn.Linear(5, 5, bias=False)):
        tracemalloc.start()
        try:
            with pytest.raises(ArtifactError, match=r"'weight' has shape \[10000, 10000\] in .*, \[5, 5\]"):
                ac.load(path, model=model)
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()


def test_loading_draws_nothing_random_and_keeps_the_callers_model_trainable(file):
    own = Net(20).train()
    before = torch.get_rng_state()
    loaded = ac.load(file, model=own)
    assert torch.equal(torch.get_rng_state(), before)
    assert own.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_file_is_loaded_in_a_process_that_never_saw_the_model(tmp_path):
    model = filled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(150, 5)))
    data, _ = compressed(model, {"0": LayerPlan(rank=2, bits=4), "3": LayerPlan(bits=3, threshold=1)}, IMAGE)
    (tmp_path / "m.acz").write_bytes(data)
    with torch.no_grad():
        torch.save({"x": IMAGE, "y": artifact.restore(container.unpack(data))(IMAGE)}, tmp_path / "io.pt")
    code = """
import sys, pickle, torch
io = torch.load("io.pt", weights_only=True)
def no(*a, **k): raise SystemExit("a pickle was loaded")
pickle.loads = pickle.load = pickle.Unpickler = torch.load = no
import autocompress
with torch.no_grad():
    assert torch.equal(autocompress.load("m.acz")(io["x"]), io["y"])
assert not {"ray", "mlflow", "optuna"} & set(sys.modules)
"""
    where = {**os.environ, "PYTHONPATH": str(Path(ac.__file__).parents[1])}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=where, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr


# --- architectures ---------------------------------------------------------------------------


LAYERS = [
    *((layer, ROWS) for layer in (
        nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Identity(), nn.Dropout(0.3), nn.AlphaDropout(0.3),
        nn.Sequential(),
        nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.CELU(0.5), nn.SELU(), nn.GELU("tanh"),
        nn.SiLU(), nn.Mish(), nn.Softplus(2.0, 3.0), nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish(),
        nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4), nn.Softmax(dim=1), nn.LogSoftmax(dim=0),
    )),
    *((layer, SOUND) for layer in (
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"),
        nn.BatchNorm1d(4, eps=1e-3, momentum=None), nn.MaxPool1d(3, 2, 1),
        nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool1d(4), nn.AdaptiveMaxPool1d(4), nn.Dropout1d(0.3), nn.ZeroPad1d(2), nn.Unflatten(1, (2, 2)),
        nn.PReLU(4, init=0.1),
    )),
    *((layer, IMAGE) for layer in (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect", groups=4),
        nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=0.3), nn.GroupNorm(2, 4, eps=1e-2),
        nn.GroupNorm(4, 4, affine=False), nn.LayerNorm(7, eps=1e-2), nn.LayerNorm((7, 7), bias=False),
        nn.LayerNorm([4, 7, 7], elementwise_affine=False), nn.MaxPool2d((3, 2), stride=1, dilation=2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, ceil_mode=True), nn.AdaptiveAvgPool2d((None, 3)), nn.AdaptiveMaxPool2d((2, 3)),
        nn.Dropout2d(0.3, inplace=True), nn.ZeroPad2d((1, 2, 0, 1)), nn.Flatten(), nn.Flatten(2, 3),
        nn.Unflatten(1, torch.Size([4, 1])), nn.PixelShuffle(2), nn.Upsample((9, 11)),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    )),
    *((layer, FILM) for layer in (
        nn.Conv3d(2, 4, (1, 2, 3), padding=1), nn.BatchNorm3d(2, track_running_stats=False), nn.MaxPool3d(2),
        nn.AvgPool3d((1, 2, 2)), nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d((1, 2, 2)), nn.Dropout3d(0.3),
        nn.ZeroPad3d(1),
    )),
    (nn.Linear(4, 3, dtype=torch.float64), ROWS.double()),
    (nn.Linear(4, 3, dtype=torch.float16), ROWS.half()),
    (nn.PReLU(dtype=torch.float64), ROWS.double()),
    (nn.LayerNorm(4, dtype=torch.bfloat16), ROWS.bfloat16()),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda v: str(v)[:60] if isinstance(v, nn.Module) else "")
def test_build_is_the_inverse_of_describe(layer, inputs):
    model = filled(nn.Sequential(nn.Identity(), nn.Sequential(layer)))
    tree = architecture.describe(model)
    assert tree is not None
    built = architecture.build(json.loads(json.dumps(tree)))
    assert architecture.describe(built) == tree
    built = built.to_empty(device="cpu").eval()
    built.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(built(inputs.clone()), model(inputs.clone()))


def test_every_layer_of_the_list_is_tried_above():
    assert {type(layer).__name__ for layer, _ in LAYERS} - {"Sequential"} == set(architecture._ARGUMENTS)


class OwnLinear(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def with_buffer():
    layer = nn.Linear(4, 3)
    layer.register_buffer("mask", torch.ones(3))
    return layer


def with_forward():
    layer = nn.Tanh()
    layer.forward = torch.sin
    return layer


def with_two_dtypes():
    layer = nn.Linear(4, 3)
    layer.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    return layer


@pytest.mark.parametrize(
    "make",
    [
        Net, lambda: OwnLinear(4, 3), hooked, with_buffer, with_forward, with_two_dtypes,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: nn.Linear(4, 3, dtype=torch.complex64),
        lambda: nn.MaxPool2d(2, return_indices=True),
        lambda: nn.AvgPool2d(2, divisor_override=3),
        lambda: nn.Upsample(scale_factor=1.5, recompute_scale_factor=True),
        lambda: nn.Embedding(3, 4), lambda: nn.LSTM(3, 4), lambda: nn.ConvTranspose2d(1, 1, 2),
    ],
    ids=lambda make: getattr(make, "__name__", None),
)  # fmt: skip
def test_what_would_not_be_built_the_same_has_no_description(make):
    assert architecture.describe(make()) is None
    assert architecture.describe(nn.Sequential(nn.ReLU(), nn.Sequential(make()))) is None


def test_a_model_whose_tree_has_no_description_still_loads(tmp_path):
    model = filled(nn.Sequential(nn.Linear(4, 6), with_forward(), hooked().__class__(6, 2)))
    plan = uncompressed(find_layers(model, lambda m: m(ROWS)).layers)
    data = artifact.write(model, plan, {k: artifact.raw_tensor(t) for k, t in model.state_dict().items()}, "test")
    (tmp_path / "m.acz").write_bytes(data)
    with torch.no_grad():
        assert torch.equal(ac.load(tmp_path / "m.acz", model=model)(ROWS), model(ROWS))


def test_inspection_shows_names_of_any_kind(tmp_path):
    names = ["[/b]", "[red]x", "\ud800", "\x1b[31m", "a\nb", "grün"]
    entries = [[name, "raw", "float32", [1], 5, zlib.crc32(b"\0" * 5)] for name in names]
    path = forge(tmp_path / "x.acz", {"tensors": entries}, b"\0" * 5 * len(names))
    console = Console(file=io.StringIO(), width=100)
    console.print(inspection.file_table(inspection.inspect_file(path)))
    shown = [line.split()[0] for line in console.file.getvalue().splitlines()]
    assert shown == ["tensor", "[/b]", "[red]x", "\\ud800", "\\x1b[31m", "a\\nb", "grün", "(header)", "(all)"]


def test_a_parameter_in_another_order_of_memory_is_filled():
    """As the transpose of another one is: its values are not told in the order in which they lie."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 5)
            self.turned = nn.Parameter(torch.randn(4, 5).t())

        def forward(self, x):
            return self.first(x) @ self.turned

    torch.manual_seed(0)
    model = Turned().eval()
    assert not model.turned.is_contiguous()
    task = task_of(lambda: model, train=(torch.randn(40, 6), torch.randint(0, 4, (40,))),
                   val=(torch.randn(20, 6), torch.randint(0, 4, (20,))))  # fmt: skip
    (outcome,) = run_trial(Workbench(task, "cpu"), Plan({"first": LayerPlan(bits=32)}, Recipe(0.0)), Budget((1.0,)))
    found = artifact.restore(container.unpack(outcome.artifact), Turned())
    assert torch.equal(found.turned, model.turned)
