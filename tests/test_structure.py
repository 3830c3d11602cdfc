"""Tensors found and mapped in nested outputs; distillation over all of them."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
from test_finetune import divergence, scores
from test_trial import data, fraction
from torch import nn
from torch.nn import functional as F

import autocompress as ac
from autocompress.compress import apply, finetune
from autocompress.compress.structure import float_tensors, map_tensors
from autocompress.errors import TrialFailed
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    scores: torch.Tensor
    name: str
    more: object = None


A, B, C = torch.ones(2), torch.arange(3), torch.zeros(1, 2)
NESTED = {"x": [A, B], "y": Pair(C, None), "z": Frozen(A + 1, "name", (C + 2,))}


def test_float_tensors_come_in_order():
    found = [t.flatten()[0].item() for t in float_tensors(NESTED)]
    assert found == [1.0, 0.0, 2.0, 2.0]  # the whole numbers are left out
    assert list(float_tensors(Frozen)) == list(float_tensors("text")) == []


def test_mapping_keeps_kinds_and_leaves_the_original():
    mapped = map_tensors(OrderedDict(NESTED), lambda t: t + 10)
    assert [t.flatten()[0].item() for t in float_tensors(mapped)] == [11.0, 10.0, 12.0, 12.0]
    assert (type(mapped), type(mapped["y"]), mapped["z"].name) == (OrderedDict, Pair, "name")
    assert mapped["x"][1].tolist() == [10, 11, 12]
    assert [t.flatten()[0].item() for t in float_tensors(NESTED)] == [1.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "wrap", [lambda *both: both, lambda a, b: {"a": a, "rest": [b]}, lambda a, b: Frozen(a, "", b)]
)
def test_the_distance_is_the_mean_over_the_tensors(wrap):
    outputs, guide = scores(6, 4)
    more, other = scores(6, 7, 3, seed=1)
    targets = torch.zeros(6, dtype=torch.int64)
    found = finetune._objective(
        wrap(torch.tensor(outputs), torch.tensor(more)), targets, (torch.tensor(guide), torch.tensor(other)), None, 1.0
    )  # fmt: skip
    assert found.item() == pytest.approx((divergence(outputs, guide) + ((more - other) ** 2).mean()) / 2)


def test_what_only_training_gives_is_left_out():
    outputs, guide = (torch.tensor(s) for s in scores(6, 4))
    both = finetune._distance((outputs, outputs + 1), guide, None)
    assert both == finetune._distance(outputs, guide, None)


def test_outputs_that_do_not_match_are_named():
    with pytest.raises(TrialFailed, match=r"tensor 1 of the outputs has shape \[3\], the uncompressed model's \[4\]"):
        finetune._distance([torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(4)], None)
    with pytest.raises(TrialFailed, match="distillation needs float tensors in the model's outputs, which are a str"):
        finetune._distance("text", "text", None)


class Two(nn.Module):
    """Class scores and features, in a dictionary."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        features = torch.relu(self.body(x))
        return {"scores": self.head(features), "features": features}


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 150

    def __getitem__(self, i):
        x, y = data(150, 0)
        return x[i], y[i]


def task(train):
    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # scores that tell classes apart
    return ac.Task(
        model, train, data(60, 1), data(60, 2), lambda outputs, y: F.cross_entropy(outputs["scores"], y),
        lambda outputs, y: fraction(outputs["scores"], y), batch_size=50,
    )  # fmt: skip


@pytest.mark.parametrize("train", [data(150, 0), Examples()], ids=["kept", "computed"])
def test_guides_of_a_dictionary_of_outputs(train):
    bench = Workbench(task(train), "cpu")
    assert (bench._guides is None) == isinstance(train, Examples)
    count = 0
    for x, _, guide in bench.feed(0, True).epoch(0):
        for mine, wanted in zip(float_tensors(guide), bench.model(x).values(), strict=True):
            torch.testing.assert_close(mine, wanted)
            count += 1
    assert count == 2 * 3


def test_distillation_alone_learns_from_every_output_without_the_loss():
    def loss(outputs, targets):
        raise AssertionError("the loss is not wanted at a distillation of 1")

    bench = Workbench(replace(task(data(150, 0)), loss=loss), "cpu")
    x, y = data(60, 1)

    def distances(outcome):
        state = apply.compress(bench.model, bench.layers, plan, bench.svd, outcome.state())
        with torch.no_grad():
            outputs = apply.call_with(state.module.eval(), state.substitutes(), x)
            pairs = zip(outputs.values(), bench.model(x).values(), strict=True)
            return [finetune.distillation_loss(*pair, y) for pair in pairs]

    plan = Plan({"body": LayerPlan(bits=1), "head": LayerPlan(bits=1)}, Recipe(20, 1e-2, 1.0))
    found = [distances(outcome) for outcome in run_trial(bench, plan, Budget((0.0, 1.0)))]
    before, after = ([x.item() for x in rung] for rung in found)
    assert sum(after) < 0.9 * sum(before)
