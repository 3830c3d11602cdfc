"""Plans with svd and scheme carried out: errors in order, biases mended, files that decode, ranks by tolerance."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autocompress as ac
from autocompress import rank_pruning
from autocompress.cli import main
from autocompress.codec import container
from autocompress.codec.tensors import Artifact
from autocompress.compress import apply, artifact, lowrank, reduced_rank
from autocompress.compress.products import macs_of
from autocompress.errors import ArtifactError, PlanError, SpaceError, UsageError
from autocompress.plan import LayerPlan, Plan, Recipe, check
from autocompress.search.space import ladder
from autocompress.search.space_file import load_space
from autocompress.tasks.task import Task
from autocompress.trial import Budget, Workbench, run_trial


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def make_task(model=None):
    """Images whose neighbouring pixels are alike, as the inputs of real layers are."""
    generator = torch.Generator().manual_seed(1)
    rough = torch.randn(400, 2, 4, 4, generator=generator) + 0.3
    images, labels = F.interpolate(rough, size=(8, 8), mode="bilinear"), torch.arange(400) % 5
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 30), nn.ReLU(), nn.Linear(30, 5),
        )  # fmt: skip
        with torch.no_grad():
            model.train()(images)
            model[1].weight.copy_(torch.rand(12, generator=generator) + 0.5)
    train, val, test = ((images[a:b], labels[a:b]) for a, b in ((0, 200), (200, 300), (300, 400)))
    return Task(model.eval(), train, val, test, F.cross_entropy, accuracy, batch_size=64)


BENCH = Workbench(make_task())
SPECS = {spec.name: spec for spec in BENCH.layers}


def plan_of(**layers):
    given = {name.removeprefix("_"): layer for name, layer in layers.items()}
    return Plan({name: given.get(name, LayerPlan()) for name in SPECS}, Recipe(0.0, 1e-3, 0.0))


def compressed(plan, start=None, bench=BENCH):
    return apply.compress(bench.model, bench.layers, plan, bench.svd, start, factoriser=bench.factoriser)


@pytest.mark.parametrize(("name", "scheme", "rank"), [
    ("0", "channel", 4), ("3", "channel", 6), ("3", "spatial", 6), ("3", "tucker", 6), ("3", "best", 6),
    ("7", "channel", 6),
])  # fmt: skip
def test_each_criterion_is_the_best_at_what_it_is_for(name, scheme, rank):
    spec = SPECS[name]
    plans = {svd: BENCH.factoriser.settled(spec, LayerPlan(rank=rank, scheme=scheme, svd=svd)) for svd in ac_svds()}
    before = {svd: BENCH.factoriser.error(spec, plan, after=False) for svd, plan in plans.items()}
    after = {svd: BENCH.factoriser.error(spec, plan) for svd, plan in plans.items()}
    assert before["activation"] < before["plain"]
    assert after["relu"] <= after["activation"] * 1.02 < after["plain"]
    assert BENCH.factoriser.activation(spec).name == "relu"


def ac_svds():
    return ("plain", "activation", "relu")


@pytest.mark.parametrize("svd", ac_svds())
def test_best_is_the_best_of_three_at_no_more_weights(svd):
    spec, factoriser = SPECS["3"], BENCH.factoriser
    budget = spec.weights(LayerPlan(rank=5))
    best = factoriser.settled(spec, LayerPlan(rank=5, scheme="best", svd=svd))
    linear = "plain" if svd == "plain" else "activation"
    spatial = budget // sum(spec.matrix("spatial"))
    others = [factoriser.settled(spec, LayerPlan(rank=r, scheme=s, svd=linear))
              for s, r in (("channel", 5), ("spatial", spatial), ("tucker", 5))]  # fmt: skip
    assert best.scheme in ("channel", "spatial", "tucker")
    assert best.svd == svd
    least = min(factoriser.linear_error(spec, other) for other in others)
    assert factoriser.linear_error(spec, replace(best, svd=linear)) == least
    assert all(spec.weights(other) <= budget < spec.parameters for other in (best, *others))


def test_statistics_and_svds_are_made_once(monkeypatch):
    calls = []
    made = lowrank.svd
    monkeypatch.setattr(lowrank, "svd", lambda *args: calls.append(args) or made(*args))
    bench = Workbench(make_task())
    gathered = []
    monkeypatch.setattr("autocompress.trial.gather", lambda *a: gathered.append(a) or __import__(
        "autocompress.compress.responses", fromlist=["gather"]).gather(*a))  # fmt: skip
    for rank in (3, 5, 3):
        for svd in ac_svds():
            compressed(plan_of(_3=LayerPlan(rank=rank, svd=svd), _7=LayerPlan(rank=4, svd=svd)), bench=bench)
    assert (len(calls), len(gathered)) == (2, 1)


@pytest.mark.parametrize("name", ["0", "3", "7"])
def test_the_mean_of_the_outputs_is_kept_by_bias_or_batch_normalisation(name):
    images = BENCH.task.train[0]
    position = int(name) + (2 if name == "0" else 1)  # behind the batch normalisation, before the activation

    def mean(module):
        with torch.no_grad():
            return module.eval()[:position](images).transpose(0, 1).flatten(1).mean(dim=1)

    wanted = mean(BENCH.model)
    got = {svd: mean(compressed(plan_of(**{f"_{name}": LayerPlan(rank=2, svd=svd)})).module) for svd in ac_svds()[:2]}
    lost = {svd: float((value - wanted).abs().max()) for svd, value in got.items()}
    assert lost["activation"] < 0.2 * lost["plain"]


TUCKER = plan_of(
    _0=LayerPlan(rank=3, scheme="best", svd="activation", bits=6),
    _3=LayerPlan(rank=6, scheme="tucker", svd="relu", bits=8),
    _7=LayerPlan(rank=5, svd="relu"),
)


def test_a_file_with_three_factors_is_what_was_measured_under_every_runtime(tmp_path):
    (outcome,) = run_trial(BENCH, TUCKER)
    path = tmp_path / "net.acz"
    path.write_bytes(outcome.artifact)
    header = artifact.read(path).header
    settled = BENCH.factoriser.settled(SPECS["3"], TUCKER.layers["3"])
    assert header["ranks"]["3"] == [list(settled.core), "tucker"]
    assert {f"3.{i}.weight" for i in range(3)} | {"3.2.bias"} <= artifact.read(path).tensors.keys()
    images, labels = BENCH.task.val
    model = ac.load(path)
    with torch.no_grad():
        outputs = model(images)
        assert accuracy(outputs, labels) == outcome.measurement.metric_val
        for runtime in ("dense", "auto"):
            assert torch.allclose(ac.load(path, runtime=runtime)(images), outputs, atol=1e-4)
    assert isinstance(ac.load(path, runtime="dense")[3], nn.Conv2d)
    assert outcome.measurement.macs == macs_of(BENCH.layers, compressed(TUCKER).plan)


def test_the_estimate_of_factors_is_near_the_file():
    (outcome,) = run_trial(BENCH, TUCKER)
    assert BENCH.estimate(TUCKER) == pytest.approx(outcome.measurement.size_bytes, rel=0.03)


def test_states_go_on_with_their_factors():
    first = compressed(TUCKER)
    with torch.no_grad():
        for code in first.codes.values():
            code.weights.add_(0.01)
    state = first.state()
    second = compressed(TUCKER, state)
    assert second.codes.keys() == first.codes.keys()
    assert all(torch.equal(second.codes[key].full(), code.full()) for key, code in first.codes.items())
    assert torch.equal(second.module[1].running_mean, first.module[1].running_mean)
    assert torch.equal(second.module[3][2].bias, first.module[3][2].bias)
    other = compressed(replace(TUCKER, layers={**TUCKER.layers, "3": LayerPlan(rank=7, svd="activation")}), state)
    whole = lowrank.multiplied([first.codes[f"3.{i}.weight"].full() for i in range(3)], SPECS["3"].shape, "tucker")
    got = lowrank.multiplied([w.weight.detach() for w in other.module[3]], SPECS["3"].shape, "channel")
    terms = lowrank.factor_weights(SPECS["3"].shape, lowrank.svd(whole), 7, "channel")
    plain = lowrank.product(*terms, SPECS["3"].shape, "channel")
    gram = BENCH.factoriser.inputs["3"].gram.double()
    errors = [reduced_rank.output_error((found - whole).flatten(1), gram) for found in (got, plain)]
    assert 0 < errors[0] < errors[1]


def test_plans_survive_json():
    plan = Plan({"3": LayerPlan(rank=6, scheme="tucker", core=(3, 4), svd="relu")})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Plan.from_json({"layers": {"a": {"rank": 2}}, "recipe": {}}).layers["a"] == LayerPlan(rank=2)


@pytest.mark.parametrize(("layer", "said"), [
    (LayerPlan(svd="ica"), "svd is 'ica', allowed: plain, activation, relu"),
    (LayerPlan(core=(2, 2)), r"core is \(2, 2\), allowed: none without"),
    (LayerPlan(rank=3, scheme="spatial", core=(2, 2)), "core is"),
    (LayerPlan(rank=3, scheme="tucker", core=(13, 2)), r"core is \(13, 2\), allowed: 1 to 12 and 1 to 16"),
    (LayerPlan(rank=3, scheme="tucker", core=(12, 16)), r"core is \(12, 16\), allowed: ranks whose three factors"),
    (LayerPlan(rank=14, scheme="best"), "rank is 14, allowed: 1 to 13, or full"),
])  # fmt: skip
def test_bad_plans_are_refused(layer, said):
    with pytest.raises(PlanError, match=f"layer '3': {said}"):
        check(plan_of(_3=layer), BENCH.layers)


@pytest.mark.parametrize("rank", [
    [[3], "tucker"], [[3, 0], "tucker"], [[3, True], "tucker"], [[13, 2], "tucker"], [3, "tucker"], [[3, 17], "tucker"],
    [[2, 2], "channel"], [[3, 4], "best"], [3, "best"],
], ids=str)  # fmt: skip
def test_damaged_ranks_are_told(tmp_path, rank):
    (outcome,) = run_trial(BENCH, TUCKER)
    whole = container.unpack(outcome.artifact)
    ranks = {**whole.header["ranks"], "3": rank}
    path = tmp_path / "net.acz"
    path.write_bytes(container.pack(Artifact(whole.tensors, {**whole.header, "ranks": ranks})))
    with pytest.raises(ArtifactError, match="'3'"):
        ac.load(path)


def test_finetuning_goes_on_from_such_factors():
    plan = replace(TUCKER, recipe=Recipe(1.0, 1e-3, 0.0))
    outcomes = list(run_trial(BENCH, plan, Budget((0.0, 1.0))))
    assert len(outcomes) == 2
    assert outcomes[1].artifact != outcomes[0].artifact


def test_the_smallest_rank_is_the_first_within_the_tolerance():
    spec = SPECS["3"]
    for svd in ac_svds()[:2]:
        errors = [BENCH.factoriser.error(spec, LayerPlan(rank=r, svd=svd)) for r in range(1, spec.max_rank() + 1)]
        assert errors == sorted(errors, reverse=True)
        for tolerance in (0.5, 0.2, 0.05, errors[-1] / 2):
            within = [r for r, error in enumerate(errors, 1) if error <= tolerance]
            assert BENCH.factoriser.smallest_rank(spec, LayerPlan(rank=1, svd=svd), tolerance) == min(
                within, default=None
            )


def test_rank_pruning_keeps_to_the_tolerance_and_gives_a_space_that_holds_the_ranks():
    report = rank_pruning.prune_ranks(BENCH, 0.1)
    assert [row.layer for row in report.rows] == ["0", "3", "7", "9"]
    for row in report.rows:
        plain, aware, after = row.ranks.values()
        assert (after or 99) <= (aware or 99) <= (plain or 99)
        chosen = report.plan.layers[row.layer]
        assert chosen.rank == after
        if after is not None:
            assert BENCH.factoriser.error(SPECS[row.layer], chosen) <= 0.1
            assert row.weights[1] < row.weights[0] == SPECS[row.layer].parameters
    assert report.rows[3].follows == "(nothing follows)"
    space = load_space(rank_pruning.space_from(report, BENCH.layers), BENCH.layers)
    plan = space.plan({knob.name: knob.low for knob in space.knobs}, 1.0)
    for name, layer in report.plan.layers.items():
        assert plan.layers[name].factorisation == layer.factorisation
    before = rank_pruning.prune_ranks(BENCH, 0.1, activation=False)
    assert list(before.rows[0].ranks) == ["plain", "activation"]
    with pytest.raises(UsageError, match=r"tolerance is 1\.5, allowed"):
        rank_pruning.prune_ranks(BENCH, 1.5)


TASK = """
import sys
sys.path.insert(0, {tests!r})
from test_factors import make_task
def task():
    return make_task()
"""


def test_prune_rank_as_a_command(tmp_path, capsys):
    from pathlib import Path

    file = tmp_path / "net.py"
    file.write_text(TASK.format(tests=str(Path(__file__).parent)))
    outs = {what: str(tmp_path / f"out.{what}") for what in ("acz", "json", "yaml")}
    arguments = ["prune-rank", f"{file}:task", "--scheme", "best", "--tolerance", "10%", "-o", outs["acz"]]
    assert main([*arguments, "--plan", outs["json"], "--space", outs["yaml"]]) == 0
    said = capsys.readouterr().out
    assert "after activation" in said
    assert f"--space {outs['yaml']}" in said
    plan = Plan.from_json(json.loads(Path(outs["json"]).read_text()))
    assert load_space(outs["yaml"], BENCH.layers).layers[1].rank == plan.layers["3"].rank
    assert ac.load(outs["acz"])(BENCH.task.val[0]).shape == (100, 5)
    for wrong, allowed in (
        (["--tolerance", "0"], "above 0"),
        (["--activation", "some"], "auto, none"),
        (["--scheme", "cp"], "channel, spatial, tucker, best"),
        (["-o", "/nowhere/x"], "/nowhere"),
    ):
        assert main(["prune-rank", f"{file}:task", *wrong]) == 2
        assert allowed in capsys.readouterr().err


def test_a_space_names_svd_and_scheme():
    rules = [{"match": "*", "rank": 0.5, "svd": "relu", "scheme": "tucker"}]
    space = load_space({"version": 1, "layers": rules}, BENCH.layers)
    assert {layer.svd for layer in space.layers} == {"relu"}
    assert [layer.scheme for layer in space.layers] == ["tucker", "tucker", "channel", "channel"]
    plain = load_space({"version": 1, "layers": [{"match": "*", "rank": 0.5}]}, BENCH.layers)
    assert space.fingerprint() != plain.fingerprint()
    with pytest.raises(SpaceError, match="svd is 'pca', allowed: plain, activation, relu"):
        load_space({"version": 1, "layers": [{"match": "*", "svd": "pca"}]}, BENCH.layers)


def test_a_tolerance_means_the_smallest_measured_rank_within_it():
    low, high = 0.01, 0.5
    tolerance = {"tolerance": [low, high], "log": True}
    rules = [{"match": "*", "rank": tolerance, "svd": "activation"}, {"match": "3", "bits": [2, 6]}]
    source = {"version": 1, "layers": rules, "recipe": {"learning_rate": 1e-3}}
    space = load_space(source, BENCH.layers, BENCH.rank_errors)
    assert [k.name for k in space.knobs] == ["0.rank", "3.rank", "3.bits", "7.rank", "9.rank"]
    assert all(k.kind == "float" and k.log for k in space.knobs if k.name.endswith("rank"))
    middle = {k.name: k.at(0.5) for k in space.knobs}
    plan = space.plan(middle, 1.0)
    check(plan, BENCH.layers)
    for name, layer in plan.layers.items():
        measured = BENCH.rank_errors(SPECS[name], "channel", "activation")
        assert measured[0][0] == 1
        assert measured[-1][0] == SPECS[name].max_rank()
        within = [rank for rank, error in measured if error <= middle[f"{name}.rank"]]
        assert layer.rank == min(within, default=None)
        if layer.rank is not None:
            assert BENCH.factoriser.error(SPECS[name], layer) <= middle[f"{name}.rank"]
    assert space.plan(space.params_for(plan), 1.0).layers == plan.layers
    ranks = [space.plan({**middle, "3.rank": t}, 1.0).layers["3"].rank or 99 for t in (low, 0.1, 0.2, high)]
    assert ranks == sorted(ranks, reverse=True)
    steps = ladder(space, BENCH.layers, 4)
    sizes = [sum(s.weights(space.plan(p, 1.0).layers[s.name]) for s in BENCH.layers) for p in steps]
    assert sizes == sorted(sizes, reverse=True)
    again = load_space(space.source, BENCH.layers, BENCH.rank_errors)
    assert again.fingerprint() == space.fingerprint()
    fixed = load_space({"version": 1, "layers": [{"rank": {"tolerance": 0.3}}]}, BENCH.layers, BENCH.rank_errors)
    assert not [k for k in fixed.knobs if k.name.endswith("rank")]
    assert fixed.layers[1].rank == min(r for r, e in BENCH.rank_errors(SPECS["3"], "channel", "plain") if e <= 0.3)


def test_a_group_shares_a_tolerance_and_not_a_rank():
    rules = [{"match": ["3", "7"], "rank": {"tolerance": [0.01, 0.5]}, "svd": "activation", "group": "all"}]
    space = load_space({"version": 1, "layers": rules}, BENCH.layers, BENCH.rank_errors)
    plan = space.plan({k.name: 0.1 if k.name == "all.rank" else k.low for k in space.knobs}, 1.0)
    assert plan.layers["3"].rank != plan.layers["7"].rank
    assert space.plan(space.params_for(plan), 1.0).layers == plan.layers


@pytest.mark.parametrize(("rank", "said"), [
    ({"tolerance": 0}, r"rank\.tolerance is 0, allowed: a number above 0 to 1"),
    ({"tolerance": [0.1, 2.0]}, r"tolerance\[1\] is 2.0"),
    ({"tolerance": 0.1, "log": 3}, "log is 3, allowed: true or false"),
    ({"tolerance": 0.1, "low": 3}, "unknown key 'low', allowed: tolerance, log"),
])  # fmt: skip
def test_bad_tolerances_are_refused(rank, said):
    with pytest.raises(SpaceError, match=said):
        load_space({"version": 1, "layers": [{"rank": rank}]}, BENCH.layers, BENCH.rank_errors)
    with pytest.raises(SpaceError, match="where there is no task to measure"):
        load_space({"version": 1, "layers": [{"rank": {"tolerance": 0.1}}]}, BENCH.layers)


class Joined(nn.Module):
    """Two layers before one normalisation, or with one bias."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 12, bias=not norm), nn.Linear(12, 12, bias=not norm)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        if not norm:
            self.b.bias = self.a.bias

    def forward(self, x):
        return torch.relu(self.norm(self.a(x))) + torch.relu(self.norm(self.b(x)))


@pytest.mark.parametrize("norm", [True, False])
def test_a_mean_that_two_layers_share_is_not_mended_for_one(norm):
    x = torch.randn(600, 12) + 3
    y = torch.randint(0, 12, (600,))
    task = Task(Joined(norm).eval(), (x, y), (x, y), (x, y), F.cross_entropy, accuracy, batch_size=64)
    bench = Workbench(task)
    assert not any(bench.factoriser.shifts(spec) for spec in bench.layers)
    plan = Plan({"a": LayerPlan(rank=3, svd="activation"), "b": LayerPlan()}, Recipe(0.0, 1e-3, 0.0))
    module = apply.compress(bench.model, bench.layers, plan, bench.svd, factoriser=bench.factoriser).module
    key = "norm.running_mean" if norm else "b.bias"
    assert torch.equal(module.state_dict()[key], bench.model.state_dict()[key])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_never_vary_leave_finite_factors(value):
    x, y = torch.full((300, 8), value), torch.randint(0, 4, (300,))
    task = Task(nn.Sequential(nn.Linear(8, 20)).eval(), (x, y), (x, y), (x, y), F.cross_entropy, accuracy)
    bench = Workbench(task)
    plan = Plan({"0": LayerPlan(rank=3, svd="activation")}, Recipe(0.0, 1e-3, 0.0))
    model = apply.compress(bench.model, bench.layers, plan, bench.svd, factoriser=bench.factoriser).module
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    torch.testing.assert_close(model(x), bench.model(x), rtol=1e-3, atol=1e-3)
