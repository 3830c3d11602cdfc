"""Mixed precision and gradient accumulation: against float32, and against one batch of all."""

import math

import pytest
import torch
from test_finetune import X, Y, compress, feed, state_equal
from torch import nn
from torch.nn import functional as F

from autocompress.compress import finetune
from autocompress.compress.finetune import Feed
from autocompress.errors import PlanError, TrialFailed
from autocompress.plan import LayerPlan, Recipe

TWO = (LayerPlan(rank=3, bits=4, threshold=0.4), LayerPlan(bits=3, quantizer="uniform"))


def plain():
    """No batch normalisation, which sees how batches are cut."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 4))


def losses(recipe, model=plain, **more):
    """The loss of each batch, and the model after."""
    seen, compressed = [], compress(*TWO, model=model())

    def loss(outputs, targets):
        assert outputs.dtype == torch.float32
        seen.append(F.cross_entropy(outputs, targets))
        return seen[-1]

    list(finetune.finetune(compressed, feed(**more), loss, recipe, [recipe.epochs]))
    return torch.stack(seen).detach(), compressed


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_small_batches_in_one_step_equal_a_large_batch(rate):
    one, many = compress(*TWO, model=plain()), compress(*TWO, model=plain())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))

    def cut(size):
        return Feed(lambda i: ((X[r], Y[r], None) for r in order.roll(i * 16).split(size)), 64 // size)

    list(finetune.finetune(one, cut(16), F.cross_entropy, Recipe(3.0, 1e-3, 0.0, rate), [3.0]))
    list(finetune.finetune(many, cut(4), F.cross_entropy, Recipe(3.0, 1e-3, 0.0, rate, accumulation=4), [3.0]))
    start, a, b = (m.state().tensors for m in (compress(*TWO, model=plain()), one, many))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5)
    assert (a["2.weight"] - start["2.weight"]).abs().max() > 5e-3  # it went somewhere


@pytest.mark.parametrize(("epochs", "accumulation", "batches"), [(2.0, 4, 16), (1.0, 3, 9), (0.1, 8, 8), (0.5, 1, 4)])
def test_a_schedule_counts_steps_of_the_optimiser(epochs, accumulation, batches):
    seen, _ = losses(Recipe(epochs, 1e-3, 0.0, accumulation=accumulation))
    assert len(seen) == batches  # of 8 an epoch


def test_bfloat16_follows_float32():
    exact, one = losses(Recipe(10.0, 1e-2, 0.0))
    short, other = losses(Recipe(10.0, 1e-2, 0.0, precision="bfloat16"))
    assert not torch.equal(exact, short)
    assert exact[-8:].mean() < 0.75 * exact[:8].mean()
    curves = [x.view(-1, 8).mean(1) for x in (exact, short)]
    torch.testing.assert_close(*curves, rtol=0.05, atol=0.03)
    for model in (one, other):
        assert {t.dtype for t in model.state().tensors.values() if t.is_floating_point()} == {
            torch.float32,
            torch.float64,  # the unit of thresholds
        }


def test_only_the_model_runs_at_a_low_precision():
    kinds = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            kinds.append((self.weight.dtype, out.dtype))
            return out

    torch.manual_seed(0)
    net = nn.Sequential(Spy(10, 8), nn.ReLU(), Spy(8, 4))
    compressed = compress(LayerPlan(bits=4), LayerPlan(bits=4), model=net)
    kinds.clear()
    list(finetune.finetune(compressed, feed(), F.cross_entropy, Recipe(0.1, precision="bfloat16"), [0.1]))
    assert set(kinds) == {(torch.float32, torch.bfloat16)}


def test_float16_is_refused_by_name_where_there_is_no_cuda():
    with pytest.raises(PlanError, match=r"precision is 'float16' on device 'cpu', allowed there: float32, bfloat16"):
        losses(Recipe(1.0, precision="float16"))


@pytest.mark.filterwarnings("error")
def test_scaled_gradients_give_the_same_steps_and_the_rate_is_added_unscaled(monkeypatch):
    """float16's scaler, here around float32: powers of two change no gradient that is not too small or too large."""
    recipe = Recipe(2.0, 1e-3, 0.0, 0.01, accumulation=2)
    _, plainly = losses(recipe)
    monkeypatch.setattr(finetune, "_scaler", lambda precision, device: torch.amp.GradScaler("cpu", init_scale=2.0**12))
    _, scaled = losses(recipe)
    assert state_equal(plainly, scaled)


def test_a_step_whose_scaled_gradients_overflow_is_left_out(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    monkeypatch.setattr(finetune, "_scaler", lambda precision, device: scaler)
    model = compress(*TWO, model=plain())

    def loss(outputs, targets):
        return 256 * F.cross_entropy(outputs, targets)

    list(finetune.finetune(model, feed(), loss, Recipe(4.0, 1e-3, 0.0), [4.0]))
    assert 2.0**90 < scaler.get_scale() < 2.0**127
    assert all(torch.isfinite(t).all() for t in model.state().tensors.values())


@pytest.mark.parametrize("bad", [0, 9, 13, 31])
def test_losses_looked_at_now_and_then_still_name_the_step(monkeypatch, bad):
    monkeypatch.setattr(finetune._Watch, "__init__", lambda self, total, device: vars(self).update(
        total=total, every=finetune.WATCHED, seen=[]))  # fmt: skip
    seen = 0

    def loss(outputs, targets):
        nonlocal seen
        seen += 1
        return F.cross_entropy(outputs, targets) * (math.nan if seen == bad + 1 else 1)

    compressed = compress(LayerPlan(bits=4, quantizer="uniform"), LayerPlan(bits=3), model=plain())
    with pytest.raises(TrialFailed, match=f"loss became nan at step {bad} of 32"):
        list(finetune.finetune(compressed, feed(), loss, Recipe(4.0, 1e-3, 0.0, 0.01), [4.0]))
    assert bad < seen <= bad + finetune.WATCHED
