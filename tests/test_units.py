"""Units that go by a plan's width: which, with which others, held at zero, and left out by an export."""

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_trial import data, fraction
from torch import nn

import autocompress as ac
from autocompress import preflight
from autocompress.codec import container
from autocompress.compress import artifact, order, solve, units
from autocompress.compress.apply import compress
from autocompress.compress.finetune import finetune
from autocompress.compress.products import macs_of
from autocompress.compress.prune import kept_mask
from autocompress.deploy.slim import slimmed
from autocompress.errors import PlanError, SpaceError
from autocompress.plan import LayerPlan, LayerSpec, Plan, Recipe, check, uncompressed
from autocompress.search.lineage import ancestor
from autocompress.search.space import ladder
from autocompress.search.space_file import load_space
from autocompress.trial import Budget, Workbench, run_trial


class Residual(nn.Module):
    """Sums, a depthwise convolution, batch norms, padding, a flattened end; `narrow` stands alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.narrow, self.inner = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hidden, self.head = nn.Linear(8 * 4, 12), nn.Linear(12, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.wide(F.silu(self.inner(self.narrow(y)))))
        y = F.max_pool2d(y + self.depth(y), 2).flatten(1)
        return self.head(torch.relu(self.hidden(y)))


@pytest.fixture(autouse=True)
def _units_keep_their_order_in_files(monkeypatch):
    monkeypatch.setattr(order, "is_tried", lambda tensors, effort: False)


SUM = {"stem", "wide", "depth"}
HALF = dict.fromkeys(("stem", "wide", "depth", "narrow", "hidden"), 0.5)


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 4, 4, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def task_of(model, split=images):
    torch.manual_seed(3)
    made = model()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
    return ac.Task(
        made, split(60, 0), split(40, 1), split(40, 2), F.cross_entropy, fraction, batch_size=20, name="units"
    )


@pytest.fixture(scope="module")
def bench():
    return Workbench(task_of(Residual), "cpu")


RECIPE = Recipe(2.0, 1e-2)


def plan_of(bench, widths, recipe=RECIPE, **options):
    layers = {s.name: LayerPlan(width=widths.get(s.name, 1.0), **options) for s in bench.layers}
    return Plan(layers, recipe)


def weights_of(bench, outcome):
    return artifact.restore(container.unpack(outcome.artifact), bench.task.model).eval()


def last(bench, plan, start=None):
    return list(run_trial(bench, plan, Budget((0.0, 1.0)), start=start))[-1]


def zero_rows(weight):
    return set((weight.flatten(1) == 0).all(1).nonzero().flatten().tolist())


def test_layers_whose_outputs_are_added_or_passed_on_are_one_group(bench):
    groups = {frozenset(group.layers): group for group in bench.units.wiring.groups}
    assert set(groups) == {frozenset(SUM), frozenset({"narrow"}), frozenset({"hidden"}), frozenset({"head"})}
    assert groups[frozenset(SUM)].beside == {"norm.weight", "norm.bias", "wide.bias", "depth.bias"}
    assert groups[frozenset({"narrow"})].beside == {"narrow.bias", "inner.weight", "inner.bias"}
    assert {frozenset(layers) for layers, group in groups.items() if group.why} == {frozenset({"head"})}


@pytest.mark.parametrize("saliency", ["magnitude", "activation", "hessian"])
def test_the_units_of_least_energy_go(bench, saliency):
    """Energies are counted here from the outputs themselves, without moments."""
    model, inputs = bench.model, bench.calibration
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
        for name in HALF
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()

    def energy(name):
        layer, x = model.get_submodule(name), seen[name]
        if saliency == "magnitude":
            return layer.weight.detach().flatten(1).square().sum(1)
        bare = F.linear(x, layer.weight) if isinstance(layer, nn.Linear) else layer._conv_forward(x, layer.weight, None)
        return bare.detach().square().mean([0, *range(2, bare.dim())])

    def scale(norm):
        return norm.weight.detach().square() / (norm.running_var + norm.eps)

    wanted = {"narrow": energy("narrow") * scale(model.inner), "hidden": energy("hidden")}
    parts = [energy("stem") * scale(model.norm), energy("wide"), energy("depth")]
    wanted |= dict.fromkeys(SUM, sum(part / part.sum() for part in parts))
    kept = bench.units.kept(plan_of(bench, HALF, saliency=saliency)).rows
    assert kept.keys() == HALF.keys()
    for name, found in kept.items():
        order = wanted[name].argsort()
        assert set((~found).nonzero().flatten().tolist()) == set(order[: len(order) // 2].tolist()), name


OPTIONS = {
    "floats": {},
    "codebook": {"bits": 3, "threshold": 0.4},
    "grid": {"bits": 4, "quantizer": "uniform"},
    "channels": {"bits": 4, "quantizer": "asymmetric", "granularity": "channel", "rounding": "hessian"},
    "scales": {"bits": 4, "quantizer": "uniform", "granularity": "channel"},
    "hessian": {"bits": 3, "threshold": 0.5, "saliency": "hessian", "rounding": "hessian", "quantizer": "uniform"},
    "activation": {"threshold": 0.5, "saliency": "activation"},
    "half": {"bits": 16, "threshold": 0.3},
}


ONE_SCALE = [name for name in OPTIONS if name not in {"channels", "scales"}]
"""What goes with a price."""


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, Recipe(2.0, 1e-2)) for name in OPTIONS] + [(name, Recipe(2.0, 1e-2, rate=0.5)) for name in ONE_SCALE],
)
def test_units_stay_zero_in_finetuning_and_the_export_leaves_them_out(bench, name, recipe):
    plan = plan_of(bench, HALF, recipe, **OPTIONS[name])
    outcome = last(bench, plan)
    module = weights_of(bench, outcome)
    kept = bench.units.kept(plan)
    for layer, stays in kept.rows.items():
        gone = set((~stays).nonzero().flatten().tolist())
        rows = zero_rows(module.get_submodule(layer).weight)
        assert gone <= rows if plan.layers[layer].threshold or recipe.rate else gone == rows
    for key, stays in kept.beside.items():
        assert not module.get_parameter(key)[~stays].any()
    assert module.norm.bias[kept.beside["norm.bias"]].all()
    small, cut = slimmed(module, {"input": images(2, 9)[0]}, False)
    assert sum(cut.shapes["narrow.weight"][1][:2]) <= 3 + 4
    assert cut.shapes["depth.weight"][1][0] <= 4
    assert cut.macs <= outcome.measurement.macs
    if name == "floats" and not recipe.rate:
        assert cut.macs == outcome.measurement.macs
    x = images(7, 8)[0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), module(x))


@pytest.mark.parametrize("scheme", ["channel", "spatial", "tucker"])
def test_a_factorised_layer_loses_rows_of_its_last_factor(bench, scheme):
    plan = plan_of(bench, {"narrow": 0.5})
    layer = replace(plan.layers["narrow"], rank=2, scheme=scheme, bits=8, svd="activation")
    plan = replace(plan, layers={**plan.layers, "narrow": layer})
    first, later = run_trial(bench, plan, Budget((0.0, 1.0)))
    stays = bench.units.kept(plan).rows["narrow"]
    for outcome in (first, later):
        factors = weights_of(bench, outcome).narrow
        assert zero_rows(factors[-1].weight) == set((~stays).nonzero().flatten().tolist())
        assert not factors[-1].bias[~stays].any()
    _, cut = slimmed(weights_of(bench, later), {"input": images(2, 9)[0]}, False)
    if scheme == "channel":  # the other schemes' shares of weights are not those of their operations
        assert cut.macs == later.measurement.macs
    assert cut.shapes[f"narrow.{len(factors) - 1}.weight"][1][0] == 3


def test_thresholds_prune_among_the_rows_that_stay():
    weight = torch.tensor([[9.0, 9.0], [1.0, 2.0], [0.5, 3.0]])
    rows = torch.tensor([False, True, True])
    assert kept_mask(weight, 1.0, 1.5, rows).tolist() == [[False, False], [False, True], [False, True]]
    assert kept_mask(weight, 9.0, 1.5, rows).sum() == 1  # the largest that stays


def test_a_child_keeps_what_both_keep_and_gets_back_what_its_parent_lost(bench):
    wide, narrow = (plan_of(bench, dict.fromkeys(HALF, width), bits=16) for width in (0.75, 0.5))
    for plan in (wide, narrow):
        parent = last(bench, plan).state()
        for child in (replace(child, recipe=Recipe(0.0)) for child in (wide, narrow)):
            mine = weights_of(bench, last(bench, child, parent))
            both = bench.units.kept(plan).rows["narrow"] & bench.units.kept(child).rows["narrow"]
            back = ~bench.units.kept(plan).rows["narrow"] & bench.units.kept(child).rows["narrow"]
            near = {"rtol": 0.0, "atol": 1e-2 / 8}  # float16, and biases in bfloat16
            torch.testing.assert_close(mine.narrow.weight[both], parent.tensors["narrow.weight"][both], **near)
            torch.testing.assert_close(mine.narrow.weight[back], bench.model.narrow.weight[back], **near)
            torch.testing.assert_close(mine.narrow.bias[back], bench.model.narrow.bias[back], **near)
            assert len(zero_rows(mine.narrow.weight)) == 6 - round(6 * child.layers["narrow"].width)


def test_what_is_solved_for_rows_alone_stands_among_the_others():
    weight = torch.arange(8.0).view(4, 2)
    rows = torch.tensor([False, True, False, True])
    own = solve.Prepared(-weight[rows], weight[rows] > 3, torch.tensor([[0.1], [0.2]]), torch.tensor([[-1.0], [-2.0]]))
    found = solve.among_rows(own, weight, rows)
    assert found.weight.tolist() == [[0, 1], [-2, -3], [4, 5], [-6, -7]]
    assert found.mask.tolist() == [[False, False], [False, False], [False, False], [True, True]]
    assert found.step.flatten().tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2])  # a row that goes has some scale
    assert found.low.flatten().tolist() == [-1, -1, -1, -2]
    shared = solve.among_rows(replace(own, step=torch.tensor(0.3), low=None), weight, rows)
    assert (float(shared.step), shared.low) == (pytest.approx(0.3), None)


def test_a_mask_of_other_units_is_not_gone_on_with(bench):
    """The plan of `stem` stays; its units are others, since that of a layer of its group changes."""

    def plan(saliency):
        made = plan_of(bench, HALF, Recipe(0.0), threshold=0.5, saliency="activation")
        return replace(made, layers=made.layers | {"depth": replace(made.layers["depth"], saliency=saliency)})

    old, new = plan("activation"), plan("magnitude")
    rows = [bench.units.kept(one).rows["stem"] for one in (old, new)]
    assert not torch.equal(*rows)
    module = weights_of(bench, last(bench, new, last(bench, old).state()))
    assert zero_rows(module.stem.weight) == set((~rows[1]).nonzero().flatten().tolist())


def test_units_that_come_back_have_the_models_statistics(bench):
    wide, narrow = (plan_of(bench, dict.fromkeys(HALF, width), bits=16) for width in (0.75, 0.5))
    parent = last(bench, narrow).state()
    back = bench.units.kept(wide).rows["narrow"] & ~bench.units.kept(narrow).rows["narrow"]
    assert back.any()
    made = compress(bench.model, bench.layers, wide, bench.svd, parent, units=bench.units).module
    for name in ("running_mean", "running_var"):
        found = getattr(made.inner, name)
        assert torch.equal(found[back], getattr(bench.model.inner, name)[back])
        assert torch.equal(found[~back], parent.tensors[f"inner.{name}"][~back])


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("recipe", [Recipe(1.0, 1e-2), Recipe(1.0, 1e-2, rate=0.2)], ids=["free", "priced"])
def test_states_of_other_widths_go_on_under_every_option(bench, recipe, rank):
    def plan(width):
        made = plan_of(bench, dict.fromkeys(HALF, width), recipe, bits=5, quantizer="uniform")
        narrow = replace(made.layers["narrow"], rank=rank)
        return replace(made, layers={**made.layers, "narrow": narrow})

    for old, new in ((0.5, 0.75), (0.75, 0.5), (0.5, 0.5), (1.0, 0.5), (0.5, 1.0)):
        parent = last(bench, plan(old)).state()
        module = weights_of(bench, last(bench, plan(new), parent))
        weight = module.narrow.weight if rank is None else module.narrow[-1].weight
        assert len(zero_rows(weight)) == 6 - max(1, round(6 * new))


def test_widths_nest_whatever_comes_first(bench):
    shares = (0.9, 0.7, 0.5, 0.3, 0.01)
    kept = [bench.units.kept(plan_of(bench, dict.fromkeys(HALF, share))).rows for share in shares]
    for name, wider, narrower in ((name, a[name], b[name]) for a, b in pairwise(kept) for name in a):
        assert not (narrower & ~wider).any(), name
    assert all(rows.sum() == 1 for rows in kept[-1].values())


def test_refusals_name_layer_width_and_reason(bench):
    for width in (0, -0.1, 1.01, float("nan"), float("inf"), "0.5", True, None):
        with pytest.raises(PlanError, match=rf"layer 'head': width is {width!r}, allowed: a number above 0 up to 1"):
            check(plan_of(bench, {"head": width}), bench.layers)
    with pytest.raises(PlanError, match=r"layer 'head': width is 0.5, allowed: 1 \(its units are the model's outputs"):
        next(run_trial(bench, plan_of(bench, {"head": 0.5})))
    with pytest.raises(PlanError, match=r"layer 'stem': width is 0.5, allowed: 1, that of layer '\w+', whose outputs"):
        next(run_trial(bench, plan_of(bench, {"stem": 0.5})))
    for width in (0.5, 1.5):  # an estimate refuses what a trial does
        with pytest.raises(PlanError, match=f"layer 'head': width is {width}, allowed: "):
            bench.estimate(plan_of(bench, {"head": width}))
    next(run_trial(bench, plan_of(bench, {"head": 0.9, "stem": 0.99}, Recipe(0.0))))  # all units stay


def test_json_and_old_plans(bench):
    plan = plan_of(bench, HALF, bits=4)
    assert Plan.from_json(plan.to_json()) == plan
    old = {key: value for key, value in LayerPlan(bits=4).to_json().items() if key != "width"}
    assert LayerPlan.from_json(old) == LayerPlan(bits=4, width=1.0)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y if float(y.sum()) > -1 else -y)


class Closed(nn.Module):
    """`gate` is half where its convolution gives nothing, beside padding; what scales `free` has no rule."""

    def __init__(self):
        super().__init__()
        self.gate, self.after = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.factor, self.free = nn.Parameter(torch.ones(16)), nn.Linear(32, 16)
        self.one = nn.Linear(16, 1)

    def forward(self, x):
        y = self.after(torch.sigmoid(self.gate(x.unsqueeze(1)))).flatten(1)
        return torch.cat([self.one(self.free(y) * self.factor), x[:, :3]], 1)


def test_a_model_that_cannot_be_traced_keeps_all_units_and_says_so():
    bench = Workbench(task_of(Untraceable, data), "cpu")
    with pytest.raises(
        PlanError, match=r"layer 'a': width is 0.5, allowed: 1 \(Untraceable cannot be exported by torch"
    ):
        next(run_trial(bench, plan_of(bench, {"a": 0.5})))
    space, whole = preflight.where_cut(
        load_space({"version": 1, "layers": [{"width": [0.4, 1.0]}]}, bench.layers), bench
    )
    assert [layer.width for layer in space.layers] == [1.0, 1.0]
    assert preflight.kept_whole(whole).startswith("all units stay of 'a', 'b': Untraceable cannot be exported")


class Bottleneck(nn.Module):
    """All goes through one unit: without it nothing would be read, and anything could go."""

    def __init__(self):
        super().__init__()
        self.gate, self.after = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.one, self.head = nn.Linear(32, 1), nn.Linear(1, 4)

    def forward(self, x):
        return self.head(self.one(self.after(torch.sigmoid(self.gate(x.unsqueeze(1)))).flatten(1)))


@pytest.mark.parametrize(("model", "whole"), [(Closed, {"gate", "free", "one"}), (Bottleneck, {"gate", "one", "head"})])
def test_units_that_an_export_would_keep_stay(model, whole):
    bench = Workbench(task_of(model, data), "cpu")
    assert {spec.name for spec in bench.layers if bench.units.why(spec)} == whole


class Joined(nn.Module):
    """The outputs of `a` are added to those of two others, side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(torch.cat([self.b(x), self.c(x)], 1) + self.a(x)))


class OneBias(nn.Module):
    """`a` and `b` have units of their own, and one bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class Foreign(nn.Module):
    """What is added to the outputs of `a` comes from a weight that is no layer's."""

    def __init__(self):
        super().__init__()
        self.a, self.free, self.head = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.a(x) + F.linear(x, self.free)))


@pytest.mark.parametrize(
    ("model", "layers", "why"),
    [
        (Joined, {"a"}, "its outputs are added to a concatenation"),
        (OneBias, {"a", "b"}, "a bias or a normalisation is used in several places"),
        (Foreign, {"a"}, "its units are also those of a weight that is no layer's"),
    ],
)
def test_units_stay_whose_company_no_plan_can_take(model, layers, why):
    bench = Workbench(task_of(model, data), "cpu")
    assert {spec.name for spec in bench.layers if bench.units.why(spec) == why} == layers


class Twins(nn.Module):
    """One weight in two places, `again` and `twin`, whose biases are their own."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.twin = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.twin.weight, self.head = self.again.weight, nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.relu(self.twin(torch.relu(self.again(torch.relu(self.first(x)))))))


def test_a_shared_weight_loses_the_units_of_all_its_places():
    bench = Workbench(task_of(Twins, data), "cpu")
    assert {group.layers: group.size for group in bench.units.wiring.groups if not group.why} == {
        ("first", "again"): 12
    }
    outcome = last(bench, plan_of(bench, {"first": 0.5, "again": 0.5}))
    module = weights_of(bench, outcome)
    stays = bench.units.kept(plan_of(bench, {"first": 0.5, "again": 0.5})).rows["again"]
    assert not any(layer.bias[~stays].any() for layer in (module.first, module.again, module.twin))
    _, cut = slimmed(module, {"input": data(2, 0)[0]}, False)
    assert cut.macs == outcome.measurement.macs


class Joined(nn.Module):
    """Outputs of two layers and inputs side by side, flattened images among them, and once more beside another's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.after, self.c = nn.Conv2d(6 + 4 + 2, 8, 1), nn.Linear(8 * 16 + 6 * 16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        a = torch.relu(self.a(x))
        y = torch.relu(self.after(torch.cat([a, torch.relu(self.b(x)), x], 1)))
        return self.head(torch.relu(self.c(torch.cat([y.flatten(1), a.flatten(1)], 1))))


@pytest.mark.parametrize("widths", [{"a": 0.5}, {"a": 0.5, "b": 0.25, "after": 0.75}, {"after": 0.5}])
def test_macs_of_what_reads_a_concatenation_of_narrowed_layers(widths):
    bench = Workbench(task_of(Joined), "cpu")
    plan = plan_of(bench, widths, Recipe(0.0))
    outcome = last(bench, plan)
    _, cut = slimmed(weights_of(bench, outcome), {"input": images(2, 9)[0]}, False)
    assert cut.macs == outcome.measurement.macs < sum(spec.macs for spec in bench.layers)


def test_a_space_gives_layers_that_share_units_one_width(bench):
    layers = [{"width": [0.4, 1.0]}, {"match": "wide", "width": [0.5, 0.9]}, {"match": "narrow", "bits": [4, 8]}]
    space, whole = preflight.where_cut(load_space({"version": 1, "layers": layers}, bench.layers), bench)
    assert list(whole) == ["head"]
    knobs = {knob.name: (knob.low, knob.high) for knob in space.knobs if knob.name.endswith("width")}
    assert knobs == {"stem.width": (0.5, 1.0), "narrow.width": (0.4, 1.0), "hidden.width": (0.4, 1.0)}
    plans = [space.plan(params, 1.0) for params in ladder(space, bench.layers, 3)]
    for plan in plans:
        check(plan, bench.layers)
        bench.units.check(plan)
        assert space.plan(space.params_for(plan), 1.0) == plan
    widths = [plan.layers["hidden"].width for plan in plans]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 1.0
    plain = load_space({"version": 1, "layers": [{"bits": [2, 4]}]}, bench.layers)
    assert preflight.where_cut(plain, bench) == (plain, {})


@pytest.mark.parametrize("value", [0, 1.5, "0.5", [0.4, float("nan")], True])
def test_bad_widths_of_a_space_are_named(bench, value):
    with pytest.raises(SpaceError, match=r"layers\[0\].width"):
        load_space({"version": 1, "layers": [{"width": value}]}, bench.layers)


def test_the_fast_space_is_for_a_sweep_of_prices(bench):
    space, _ = preflight.where_cut(load_space("fast", bench.layers), bench)
    assert {"stem.width", "narrow.width", "hidden.width", "recipe.rate"} <= {knob.name for knob in space.knobs}
    assert preflight.check_space(space, bench) is None


def test_bytes_and_macs_of_less_width(bench):
    whole, half = (plan_of(bench, dict.fromkeys(HALF, width), Recipe(0.0), bits=8) for width in (1.0, 0.5))
    sizes = [next(run_trial(bench, plan)).measurement.size_bytes for plan in (whole, half)]
    estimates = [bench.estimate(plan) for plan in (whole, half)]
    assert (estimates[0] - estimates[1]) / (sizes[0] - sizes[1]) == pytest.approx(1.0, abs=0.3)
    rows_alone = macs_of(bench.layers, half)
    assert macs_of(bench.layers, half, bench.units.read(half)) < rows_alone < macs_of(bench.layers, whole)
    assert macs_of(bench.layers, uncompressed(bench.layers)) == sum(spec.macs for spec in bench.layers)


def test_the_nearest_state_is_one_of_no_less_width(bench):
    members = {n: plan_of(bench, dict.fromkeys(HALF, width)) for n, width in ((1, 0.4), (2, 0.8), (3, 1.0))}
    assert ancestor(plan_of(bench, dict.fromkeys(HALF, 0.6)), members, bench.layers) == 2
    assert ancestor(plan_of(bench, dict.fromkeys(HALF, 0.45)), members, bench.layers) == 2  # 0.4 is nearer
    assert ancestor(plan_of(bench, {}), members, bench.layers) == 3


def test_many_units_are_kept_in_blocks_or_all():
    def kept(size, width):
        return LayerSpec("a", "linear", (size, 3), 3 * size).units(LayerPlan(width=width))

    assert [kept(20, width) for width in (1.0, 0.95, 0.85, 0.7, 0.5, 0.01)] == [20, 20, 16, 16, 8, 8]
    assert [kept(64, width) for width in (1.0, 0.9, 0.75, 0.5, 0.1)] == [64, 56, 48, 32, 8]
    assert [kept(15, width) for width in (1.0, 0.5, 0.01)] == [15, 8, 1]
    assert all(kept(size, 1.0) == size for size in range(1, 70))


def test_energies_in_parts_and_groups_are_those_of_whole_moments():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(1))  # two groups of inputs
    gram = torch.einsum("ngi,ngj->gij", rows, rows) / 50
    found = units.energies(weight, units.Statistics(gram, rows.mean(0), 50))
    outputs = torch.einsum("ngi,gri->ngr", rows, weight.view(2, 3, 4)).flatten(1)
    torch.testing.assert_close(found, outputs.square().mean(0).double(), rtol=1e-4, atol=1e-5)


def test_finetuning_of_ones_own_holds_units_too(bench):
    def own(model, feed, loss, recipe, rungs):
        yield from finetune(model, feed, loss, recipe, rungs)

    other = Workbench(replace(bench.task, finetune=own), "cpu")
    module = weights_of(other, last(other, plan_of(other, HALF, bits=8)))
    assert len(zero_rows(module.narrow.weight)) == 3


def test_the_benchmarks_plans_are_widths_by_pattern(bench, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    widths_of = importlib.import_module("bench_width").widths_of
    assert widths_of("0.5", bench) == HALF | {"head": 1.0}
    assert {n: w for n, w in widths_of("*=0.9,n*=0.75,head=0.5", bench).items() if w != 0.9} == {
        "narrow": 0.75,
        "head": 1.0,
    }
