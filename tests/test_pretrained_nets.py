"""The nets of `scripts/pretrained_nets.py`, without their weights, against torch's own modules and by hand."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def nets():
    path = Path(__file__).parents[1] / "scripts" / "pretrained_nets.py"
    spec = importlib.util.spec_from_file_location("pretrained_nets", path)
    sys.modules["pretrained_nets"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pretrained_nets"]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield


def test_two_linear_lstms_are_torchs_in_both_directions(nets):
    ours, theirs = nets.BiLstm(8), nn.LSTM(8, 8, bidirectional=True, batch_first=True)
    for direction, suffix in ((ours.there, "l0"), (ours.back, "l0_reverse")):
        for part, side in ((direction.input, "ih"), (direction.hidden, "hh")):
            part.weight.copy_(getattr(theirs, f"weight_{side}_{suffix}"))
            part.bias.copy_(getattr(theirs, f"bias_{side}_{suffix}"))
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(ours(x), ours.linear(theirs(x)[0]))


def test_tensors_of_a_crnn_go_where_their_names_say(nets):
    """A file's order, with an LSTM's four tensors as torch has them, each filled with a number of its own."""
    reference = nets.crnn_model.__globals__["nn"].LSTM(256, 256, bidirectional=True)
    plain = [(1, 32, 3), (32, 64, 3), (64, 128, 3), (128, 128, 3)]
    weights = {}
    for k, (inner, outer, size) in enumerate(plain):
        weights |= {f"c{k}.weight": torch.zeros(outer, inner, size, size), f"c{k}.bias": torch.zeros(outer)}
    for k, inner in enumerate((128, 256)):
        weights[f"n{k}"] = torch.zeros(256, inner, 3, 3)
        norm = nn.BatchNorm2d(256).state_dict()
        weights |= {f"n{k}.{name}": tensor for name, tensor in norm.items()}
    weights |= {"last.weight": torch.zeros(256, 256, 2, 2), "last.bias": torch.zeros(256)}
    number = 0
    for block in (0, 1):
        for name, tensor in reference.state_dict().items():
            number += 1
            weights[f"SequenceModeling.{block}.rnn.{name}"] = torch.full_like(tensor, number)
        weights |= {f"b{block}.weight": torch.zeros(256, 512), f"b{block}.bias": torch.zeros(256)}
    weights |= {"p.weight": torch.zeros(97, 256), "p.bias": torch.zeros(97)}
    model = nets.crnn_model(weights)
    blocks = [module for module in model if isinstance(module, nets.BiLstm)]
    names = list(reference.state_dict())
    for k, block in enumerate(blocks):
        for direction, suffix in ((block.there, "l0"), (block.back, "l0_reverse")):
            for part, side in ((direction.input, "ih"), (direction.hidden, "hh")):
                for what in ("weight", "bias"):
                    expected = 8 * k + names.index(f"{what}_{side}_{suffix}") + 1
                    assert (getattr(part, what) == expected).all()
    assert model(torch.zeros(2, 1, 64, 80)).shape == (2, 19, 97)


def test_a_bert_layer_is_torchs(nets):
    ours = nets.BertLayer(12, 3, 20).eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", 1e-12, batch_first=True).eval()
    attention = theirs.self_attn
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in (ours.query, ours.key, ours.value)]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in (ours.query, ours.key, ours.value)]))
    pairs = [(ours.out, attention.out_proj), (ours.up, theirs.linear1), (ours.down, theirs.linear2)]
    for mine, other in [*pairs, (ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2)]:
        other.load_state_dict(mine.state_dict())
    x, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    seen = mask[..., None].expand(2, 5, 12)
    torch.testing.assert_close(ours(x, mask)[seen], theirs(x, src_key_padding_mask=~mask)[seen])


def test_a_llama_goes_on_from_keys_and_values_as_from_all_tokens(nets):
    model = nets.Llama(50, 16, 2, 24, 3).eval()
    tokens = torch.randint(0, 50, (2, 9))
    whole, past = model(tokens), [[] for _ in model.layers]
    for k in range(9):
        torch.testing.assert_close(model(tokens[:, k : k + 1], k, past)[:, 0], whole[:, k])


def test_rotary_positions_turn_pairs_by_their_angles(nets):
    x, turn = torch.randn(5, 6, dtype=torch.double), torch.rand(5, 3, dtype=torch.double)
    pairs = torch.view_as_complex(x.view(5, 3, 2)) * torch.polar(torch.ones_like(turn), turn)
    torch.testing.assert_close(nets.turned(x, turn), torch.view_as_real(pairs).flatten(1))


def test_same_padding_halves_even_sizes(nets):
    for kernel in (3, 5):
        for stride in (1, 2):
            parts = nn.Sequential(*nets.padded(2, 4, kernel, stride, same=True))
            assert parts(torch.zeros(1, 2, 8, 8)).shape == (1, 4, 8 // stride, 8 // stride)


def test_words_are_cut_into_the_longest_known_pieces(nets):
    vocabulary = {
        name: k for k, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", ",", "cafe"])
    }
    assert nets.wordpieces("Unaffable, café zzz", vocabulary, 9) == [2, 4, 5, 6, 7, 8, 1, 3, 0]
    assert nets.wordpieces("cafe cafe cafe cafe", vocabulary, 4) == [2, 8, 8, 3]


def test_a_probe_gives_what_the_regression_gives(nets, tmp_path, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    x = torch.randn(60, 5) * torch.arange(1, 6) + 3
    y = (x[:, 0] > 3).long() + (x[:, 4] > 3).long()
    model = nets.probed(nn.Sequential(nn.Identity(), nn.Linear(5, 9)), "toy", x, y, 0.5)
    scaled = ((x - x.mean(0)) / x.std(0)).double().numpy()
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(scaled, y.numpy()).predict_proba(scaled)
    torch.testing.assert_close(model(x).softmax(1).double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-3)
    again = nets.probed(nn.Sequential(nn.Identity(), nn.Linear(5, 9)), "toy", x * 0, y, 0.5)
    assert torch.equal(again[1].weight, model[1].weight)


def test_words_are_read_as_ctc_says(nets):
    read = torch.tensor([[0, 3, 3, 0, 3, 5], [4, 4, 0, 0, 0, 0]])
    outputs = nn.functional.one_hot(read, 6).float()
    assert nets.exact_match(outputs, torch.tensor([[3, 3, 5], [4, 0, 0]])) == 1.0
    assert nets.exact_match(outputs, torch.tensor([[3, 5, 0], [4, 0, 0]])) == 0.5


def test_a_tone_has_the_pitch_of_its_class(nets):
    """Against the period at which the sound is most like itself."""
    sounds, classes = nets.tones(30, 0)
    torch.testing.assert_close(sounds.mean(1), torch.zeros(30), atol=1e-5, rtol=0)
    right = 0
    for sound, k in zip(sounds, classes.tolist(), strict=True):
        period = 16000 / (10 * 2 ** ((20 * k + 1997.3794) / 1200))
        spectrum = torch.fft.rfft(sound, 4096).abs().square()
        alike = torch.fft.irfft(spectrum)[:1024]
        lag = round(period)
        around = alike[max(8, lag - 2) : lag + 3].max()
        right += bool(around >= 0.9 * (1 - period / 1024) * alike[0])
    assert right >= 28


def test_perplexity_is_the_exponential_of_the_mean_loss(nets):
    outputs, targets = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    each = [-math.log(outputs[i, j].softmax(0)[targets[i, j]]) for i in range(3) for j in range(4)]
    assert nets.perplexity(outputs, targets) == pytest.approx(math.exp(sum(each) / 12), rel=1e-5)
