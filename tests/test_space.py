"""Search spaces: every parameter gives a feasible plan, ladders rise, and each mistake is named in one line."""

import json
import math
import pickle
import re
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import SpaceError
from autocompress.plan import LayerSpec, Plan, Recipe, check
from autocompress.search.space import ladder
from autocompress.search.space_file import available, load_space, space_folder

SHIPPED = [
    "continuation", "conv", "deep_compression", "default", "fast", "lowrank_only", "mlp", "prune_only", "quantize_only",
]  # fmt: skip


def linear(name, rows, columns, **more):
    return LayerSpec(name, "linear", (rows, columns), rows * columns, **more)


def depthwise(name, channels):
    shape = (channels, 1, 3, 3)
    return LayerSpec(name, "conv2d", shape, 9, groups=channels, factorable=False, whole_because="grouped convolution")


MLP = [linear("fc1", 300, 784), linear("fc2", 100, 300), linear("fc3", 10, 100)]
LENET5 = [
    LayerSpec("conv1", "conv2d", (20, 1, 5, 5), 288000),
    LayerSpec("conv2", "conv2d", (50, 20, 5, 5), 1600000),
    linear("fc1", 500, 800),
    linear("fc2", 10, 500),
]
MODELS = {
    "mlp": MLP,
    "lenet5": LENET5,
    "bare": [linear("", 10, 64)],
    "depthwise": [depthwise("dw", 16), LayerSpec("pw", "conv2d", (32, 16, 1, 1), 512), linear("head", 1, 32)],
    "only depthwise": [depthwise("0", 8)],
    "conv1d": [LayerSpec("0", "conv1d", (16, 2, 7), 224), LayerSpec("1.10", "conv1d", (32, 16, 3), 1536)],
    "deep": [LayerSpec(f"b{i}.conv", "conv2d", (64, 64, 3, 3), 36864) for i in range(40)],
}


@st.composite
def models(draw):
    kinds = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
    specs = []
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(sorted(kinds)))
        sides = [draw(st.integers(1, 5)) for _ in range(kinds[kind])]
        shape = (draw(st.integers(1, 60)), draw(st.integers(1, 60)), *sides)
        whole = draw(st.booleans()) and draw(st.booleans())
        specs.append(LayerSpec(f"layer{index}", kind, shape, math.prod(shape), factorable=not whole))
    return specs


FRACTIONS = st.floats(0.01, 1.0).map(lambda x: round(x, 3))


def ends(values):
    pair = st.tuples(values, values).map(sorted)
    return st.one_of(values, pair, pair.map(lambda p: {"low": p[0], "high": p[1]}))


@st.composite
def documents(draw):
    rule = st.fixed_dictionaries(
        {"rank": ends(FRACTIONS), "bits": ends(st.integers(1, 8)), "threshold": ends(st.floats(0, 3))},
        optional={
            "scheme": st.sampled_from(["channel", "spatial"]),
            "quantizer": st.sampled_from(["codebook", "uniform"]),
            "group": st.just("all"),
        },
    )
    layers = [{"match": "*", **draw(rule)}]
    if "group" not in layers[0] and draw(st.booleans()):
        kind = draw(st.sampled_from(["linear", "conv", "conv2d"]))
        layers.append({"kind": kind, "rank": draw(ends(FRACTIONS)), "bits": draw(ends(st.integers(1, 8)))})
    return {"version": 1, "layers": layers}


def document(*layers, **more):
    return {"version": 1, "layers": list(layers), **more}


def drawn(space, data):
    return {
        k.name: data.draw(st.integers(k.low, k.high) if k.kind == "int" else st.floats(k.low, k.high))
        for k in space.knobs
    }


@settings(max_examples=150, deadline=None)
@given(st.data(), models(), documents())
def test_any_parameters_give_a_feasible_plan_and_come_back_from_it(data, specs, source):
    space = load_space(source, specs)
    params = drawn(space, data)
    plan = space.plan(params, default_epochs=1.5)
    check(plan, specs)
    assert plan.recipe.epochs == 1.5
    back = space.params_for(plan)
    assert set(back) == set(params)
    assert space.plan(back, default_epochs=1.5) == plan
    assert space.clip(params) == params


@settings(max_examples=150, deadline=None)
@given(models(), documents(), st.integers(1, 9))
def test_ladder_rises_and_every_rung_is_feasible_and_new(specs, source, steps):
    space = load_space(source, specs)
    rungs = ladder(space, specs, steps)
    assert 1 <= len(rungs) <= steps
    plans = [space.plan(rung, default_epochs=1.0) for rung in rungs]
    for plan in plans:
        check(plan, specs)
    for mild, strong in pairwise(plans):
        assert mild.key() != strong.key()
        for name in mild.layers:
            one, two = mild.layers[name], strong.layers[name]
            assert two.bits <= one.bits
            assert two.threshold >= one.threshold
            assert (two.rank or math.inf) <= (one.rank or math.inf)


@settings(max_examples=60, deadline=None)
@given(models(), documents())
def test_combinations_counts_what_enumeration_finds(specs, source):
    for rule in source["layers"]:
        rule["threshold"] = 0.5
        rule["bits"] = rule["bits"] if isinstance(rule["bits"], int) else [2, 3]
    space = load_space(source | {"recipe": {"learning_rate": 0.001}}, specs[:2])
    ranges = [range(knob.low, knob.high + 1) for knob in space.knobs]
    if math.prod(map(len, ranges)) > 3000:
        return
    names = [knob.name for knob in space.knobs]
    plans = {space.plan(dict(zip(names, values, strict=True)), 1.0).key() for values in product(*ranges)}
    assert space.combinations() == space.size() == len(plans)


def test_size_is_infinite_with_a_float_knob():
    space = load_space(document({"bits": [2, 4], "threshold": [0.0, 1.0]}), MLP)
    assert space.size() == math.inf
    assert space.combinations() == 27


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [None, *SHIPPED])
def test_shipped_spaces_fit_any_model(name, model):
    specs = MODELS[model]
    space = load_space(name, specs)
    assert space.name == (name or "default")
    plans = [space.plan(rung, default_epochs=1.0) for rung in ladder(space, specs, 6)]
    for plan in plans:
        check(plan, specs)
    assert set(plans[0].layers) == {spec.name for spec in specs}
    assert json.loads(json.dumps(space.source)) == space.source
    assert load_space(space.source, specs).fingerprint() == space.fingerprint()
    assert pickle.loads(pickle.dumps(space)).knobs == space.knobs


def test_shipped_spaces_are_listed_with_their_descriptions():
    assert sorted(available()) == SHIPPED
    assert all(available().values())
    assert (space_folder() / "default.yaml").is_file()


def test_only_spaces_touch_nothing_else():
    def options(name):
        space = load_space(name, LENET5)
        plans = [space.plan(rung, 1.0) for rung in ladder(space, LENET5, 5)]
        layers = [layer for plan in plans for layer in plan.layers.values()]
        return (
            len({layer.rank for layer in layers}) > 1,
            len({layer.bits for layer in layers}) > 1,
            len({layer.threshold for layer in layers}) > 1,
        )

    assert options("lowrank_only") == (True, False, False)
    assert options("quantize_only") == (False, True, False)
    assert options("prune_only") == (False, False, True)


def test_default_ranges_press_large_layers_and_spare_small_ones():
    knobs = {knob.name: knob for knob in load_space(None, MLP).knobs}
    assert (knobs["fc1.rank"].low, knobs["fc1.rank"].high) == (120, 300)
    assert (knobs["fc1.bits"].low, knobs["fc1.bits"].high) == (2, 5)
    assert knobs["fc3.threshold"].high < knobs["fc1.threshold"].high / 2
    assert "fc3.rank" not in knobs
    assert (knobs["recipe.learning_rate"].low, knobs["recipe.learning_rate"].log) == (1e-3, True)
    assert (knobs["recipe.rate"].low, knobs["recipe.rate"].high, knobs["recipe.rate"].log) == (0.3, 12, True)


def test_ladder_is_milder_at_the_ends_and_for_small_layers():
    specs = [
        linear("in", 30, 30),
        linear("a", 40, 40),
        linear("tiny", 3, 3),
        linear("b", 40, 40),
        linear("out", 30, 30),
    ]
    space = load_space(document({"bits": [2, 6], "threshold": [0.0, 2.0], "rank": [0.2, 1.0]}), specs)
    last = space.plan(ladder(space, specs, 3)[-1], 1.0).layers
    assert [last[s.name].threshold for s in specs] == [1.5, 2.0, 1.0, 2.0, 1.5]
    assert [last[s.name].bits for s in specs] == [3, 2, 4, 2, 3]
    assert all(layer.rank is None for layer in last.values())
    assert ladder(space, specs, 1) == [ladder(space, specs, 3)[1]]


def test_last_matching_rule_that_sets_an_option_wins():
    space = load_space(
        document(
            {"match": "*", "bits": 4, "threshold": 1.0},
            {"match": "conv*", "bits": 6},
            {"match": ["conv2", "fc2"], "threshold": 0.25},
            {"position": ["first", "last"], "quantizer": "uniform"},
            {"match": "fc?", "kind": "conv", "bits": 1},
        ),
        LENET5,
    )
    plan = space.plan(space.params_for(_any_plan(space)), 1.0)
    assert [plan.layers[s.name].bits for s in LENET5] == [6, 6, 4, 4]
    assert [plan.layers[s.name].threshold for s in LENET5] == [1.0, 0.25, 1.0, 0.25]
    assert [plan.layers[s.name].quantizer for s in LENET5] == ["uniform", "codebook", "codebook", "uniform"]


def _any_plan(space) -> Plan:
    return space.plan({knob.name: knob.low for knob in space.knobs}, 1.0)


def test_layers_of_a_group_share_knobs_and_ranks_are_per_cent_of_each():
    recipe = {"learning_rate": 0.001}
    space = load_space(
        document({"match": "fc[12]", "group": "body", "rank": [0.1, 1.0], "bits": [2, 5]}, recipe=recipe), MLP
    )
    assert [(k.name, k.low, k.high) for k in space.knobs] == [("body.rank", 10, 100), ("body.bits", 2, 5)]
    layers = space.plan({"body.rank": 20, "body.bits": 3}, 1.0).layers
    assert [(layers[n].rank, layers[n].bits) for n in ("fc1", "fc2", "fc3")] == [(60, 3), (20, 3), (None, 32)]
    assert space.plan({"body.rank": 74, "body.bits": 3}, 1.0).layers["fc1"].rank is None  # 222 > 216: larger than whole
    assert space.plan({"body.rank": 72, "body.bits": 3}, 1.0).layers["fc1"].rank == 216


def test_absolute_ranks_spatial_scheme_and_its_fallback():
    space = load_space(
        document({"match": "*", "scheme": "spatial", "rank": [2, "full"]}, {"match": "fc2", "rank": 3}), LENET5
    )
    knobs = {k.name: (k.low, k.high) for k in space.knobs}
    assert knobs["conv2.rank"] == (2, 100)  # (20 * 5) x (50 * 5)
    assert knobs["fc1.rank"] == (2, 500)
    layers = space.plan({k.name: k.low for k in space.knobs}, 1.0).layers
    assert (layers["conv2"].scheme, layers["fc1"].scheme) == ("spatial", "channel")
    assert layers["fc2"].rank == 3


def test_no_rank_knob_where_the_whole_range_means_whole():
    space = load_space(document({"match": "*", "rank": [0.9, 1.0]}, recipe={"learning_rate": 0.001}), MLP)
    assert [k.name for k in space.knobs] == ["fc3.rank"]  # 9..10 of 10; two factors of 9 hold 990 of 1,000 weights


def test_shared_weights_answer_to_each_of_their_names():
    tied = [linear("embed", 50, 20, shared_with=("head",), factorable=False, whole_because="shared weight")]
    space = load_space(document({"match": "head", "bits": 4}), tied)
    assert _any_plan(space).layers["embed"].bits == 4


def test_bare_layer_is_called_model():
    space = load_space(document({"match": "model", "bits": [2, 4]}), [linear("", 10, 64)])
    assert space.knobs[0].name == "model.bits"
    assert set(_any_plan(space).layers) == {""}


def test_recipe_defaults_and_epochs_left_to_the_search():
    space = load_space(document({"bits": 4}, recipe={"epochs": [0.5, 2], "distillation": 0}), MLP)
    knobs = {k.name: (k.low, k.high, k.log) for k in space.knobs}
    assert knobs == {"recipe.epochs": (0.5, 2.0, False), "recipe.learning_rate": (3e-4, 3e-3, True)}
    recipe = space.plan({"recipe.epochs": 1.25, "recipe.learning_rate": 1e-3}, default_epochs=9.0).recipe
    assert (recipe.epochs, recipe.learning_rate, recipe.distillation) == (1.25, 1e-3, 0.0)


def test_a_recipes_precision_accumulation_and_infomax():
    recipe = {"epochs": 1, "precision": "bfloat16", "accumulation": 4, "infomax": {"low": 0.01, "high": 1, "log": True}}
    space = load_space(document({"bits": 4}, recipe=recipe), MLP)
    assert [k.name for k in space.knobs] == ["recipe.learning_rate", "recipe.infomax"]
    plan = space.plan({"recipe.learning_rate": 1e-3, "recipe.infomax": 0.1}, default_epochs=9.0)
    assert plan.recipe == Recipe(1, 1e-3, 0.5, 0.0, "bfloat16", 4, 0.1)
    check(plan, MLP)
    plain = load_space(document({"bits": 4}, recipe={"epochs": 1}), MLP)
    assert plain.plan({"recipe.learning_rate": 1e-3}, default_epochs=9.0).recipe == Recipe(1, 1e-3, 0.5)
    assert plain.fingerprint() != space.fingerprint()


def test_optuna_distributions_hold_the_same_ranges():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = load_space(None, LENET5)
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask(space.distributions())
        check(space.plan(trial.params, 1.0), LENET5)
    assert {name: (d.low, d.high, d.log) for name, d in space.distributions().items()} == {
        k.name: (k.low, k.high, k.log) for k in space.knobs
    }


def test_fingerprints_of_studies_on_disk_stay():
    """The value is that of commit 497ab50, before there were rates, InfoMax, svd and tolerances."""
    recipe = {"learning_rate": {"low": 3e-4, "high": 3e-3, "log": True}, "distillation": 0.5}
    source = {"version": 1, "layers": [{"rank": [0.4, 1.0], "bits": [3, 6], "threshold": [0.2, 2.0]}], "recipe": recipe}
    specs = [LayerSpec("fc1", "linear", (24, 32), 768), LayerSpec("fc2", "linear", (10, 24), 240)]
    for more in ({}, {"rate": 0}, {"infomax": 0.0}):
        assert load_space({**source, "recipe": recipe | more}, specs).fingerprint() == "af88591c29128d5b"
    assert load_space({**source, "recipe": recipe | {"rate": 0.5}}, specs).fingerprint() != "af88591c29128d5b"


def test_fingerprint_follows_meaning_not_text():
    base = document({"match": "*", "bits": [2, 5]})
    same = document({"match": ["fc*"], "bits": {"low": 2, "high": 5}}, description="other words")
    marks = [load_space(d, MLP).fingerprint() for d in (base, same)]
    assert marks[0] == marks[1]
    assert len(marks[0]) == 16
    others = [
        document({"bits": [2, 6]}),
        document({"bits": [2, 5], "threshold": 0.5}),
        document({"bits": [2, 5], "quantizer": "uniform"}),
        document({"bits": [2, 5]}, recipe={"distillation": 0.4}),
        document({"bits": [2, 5], "group": "all"}),
    ]
    assert len({marks[0], *(load_space(d, MLP).fingerprint() for d in others)}) == 6


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"fc1.bits": 9}, ["'fc1.bits'", "9", "a whole number from 2 to 5"]),
        ({"fc1.bits": 2.5}, ["'fc1.bits'", "2.5", "whole number"]),
        ({"fc1.bits": math.nan}, ["'fc1.bits'", "nan", "2 to 5"]),
        ({"fc1.bit": 3}, ["'fc1.bit'", "fc1.bits"]),
        ({"fc1.bits": None}, ["lack 'fc1.bits'"]),
    ],
)
def test_wrong_parameters_are_named(change, fragments):
    space = load_space(document({"match": "*", "bits": [2, 5]}, recipe={"learning_rate": 0.001}), MLP)
    params = {"fc1.bits": 3, "fc2.bits": 3, "fc3.bits": 3} | change
    with pytest.raises(SpaceError) as caught:
        space.plan({k: v for k, v in params.items() if v is not None}, 1.0)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_clip_moves_into_range():
    space = load_space(
        document({"match": "fc1", "bits": [2, 5], "threshold": [0.5, 1]}, recipe={"learning_rate": 1.0}), MLP
    )
    assert space.clip({"fc1.bits": 7.2, "fc1.threshold": -1}) == {"fc1.bits": 5, "fc1.threshold": 0.5}


RULES = "version: 1\nlayers:\n"
MISTAKES = {
    "syntax": ("version: 1\nlayers: [\n", ["line 3", "column"]),
    "tab": ("version: 1\n\tlayers: 1\n", ["line 2", "column 1"]),
    "star without quotes": (RULES + "  - match: *fc\n", ["line 3, column 12", '"*fc"']),
    "lone star": (RULES + "  - match: *\n", ["line 3"]),
    "alias": ("version: &a 1\nlayers: [*a]\n", ["alias *a", "line 2"]),
    "python tag": ("!!python/object/apply:os.getcwd []\n", ["line 1", "python/object"]),
    "two documents": ("version: 1\n---\nversion: 1\n", ["line 2"]),
    "control character": ("version: 1\x07\n", ["is not YAML"]),
    "not text": (b"version: 1\xff\n", ["byte 10", "UTF-8"]),
    "duplicate key": (RULES + "  - match: fc1\n    bits: 3\n    bits: 4\n", ["line 5", "'bits'", "twice"]),
    "duplicate top key": ("version: 1\nversion: 1\n", ["line 2", "'version'", "twice"]),
    "deep": ("[" * 2_000, ["too deeply"]),
    "huge number": (RULES + "  - bits: " + "9" * 5000, ["is not YAML", "digit"]),
    "too large": ("#" * 1_000_001, ["1,000,000 bytes"]),
    "empty file": ("", ["is empty", "mapping", "version, description, layers, recipe"]),
    "a list": ("- 1\n", ["[1]", "mapping"]),
    "no version": ("layers: [{bits: 3}]\n", ["version is missing", "allowed: 1"]),
    "version 2": ("version: 2\nlayers: [{bits: 3}]\n", ["version is 2", "allowed: 1"]),
    "version true": ("version: true\nlayers: [{bits: 3}]\n", ["version is True", "allowed: 1"]),
    "unknown top key": ("version: 1\nlayer: []\n", ["unknown key 'layer'", "did you mean 'layers'?"]),
    "description": ("version: 1\ndescription: 3\nlayers: [{bits: 3}]\n", ["description is 3", "text"]),
    "no layers": ("version: 1\n", ["layers is empty", "list of one or more rules"]),
    "empty layers": ("version: 1\nlayers: []\n", ["layers is []", "one or more rules"]),
    "layers a mapping": ("version: 1\nlayers: {fc1: 3}\n", ["layers is {'fc1': 3}", "list"]),
    "rule a number": (RULES + "  - 3\n", ["layers[0] is 3", "mapping", "threshold"]),
    "unknown key": (RULES + "  - bits: 3\n  - {match: fc1, tresh: 1}\n", ["layers[1]", "'tresh'", "'threshold'?"]),
    "sets nothing": (RULES + "  - match: fc1\n", ["layers[0] sets nothing", "rank, bits, threshold"]),
    "no such layer": (RULES + "  - {match: conv*, bits: 3}\n", ["layers[0].match is 'conv*'", "'fc1', 'fc2', 'fc3'"]),
    "one of a list": (RULES + "  - {match: [fc1, fc9], bits: 3}\n", ["layers[0].match[1] is 'fc9'", "did you mean"]),
    "match empty list": (RULES + "  - {match: [], bits: 3}\n", ["layers[0].match is []"]),
    "match a mapping": (RULES + "  - {match: {a: 1}, bits: 3}\n", ["layers[0].match is {'a':", "pattern"]),
    "match null": (RULES + "  - {match: , bits: 3}\n", ["layers[0].match is empty", "pattern"]),
    "kind": (RULES + "  - {kind: lin, bits: 3}\n", ["layers[0].kind is 'lin'", "conv1d", "did you mean 'linear'?"]),
    "kind in list": (RULES + "  - {kind: [conv, x], bits: 3}\n", ["layers[0].kind[1] is 'x'"]),
    "position": (RULES + "  - {position: 1, bits: 3}\n", ["layers[0].position is 1", "first, middle, last"]),
    "size": (RULES + "  - {size: big, bits: 3}\n", ["layers[0].size is 'big'", "small, large"]),
    "bits 9": (RULES + "  - bits: 9\n", ["layers[0].bits is 9", "1 to 8, 16, 32"]),
    "bits 0": (RULES + "  - bits: 0\n", ["layers[0].bits is 0", "1 to 8"]),
    "bits true": (RULES + "  - bits: true\n", ["layers[0].bits is True", "1 to 8"]),
    "bits float": (RULES + "  - bits: 4.0\n", ["layers[0].bits is 4.0"]),
    "bits text": (RULES + "  - bits: four\n", ["layers[0].bits is 'four'"]),
    "bits null": (RULES + "  - bits:\n", ["layers[0].bits is empty"]),
    "bits to 16": (RULES + "  - bits: [4, 16]\n", ["layers[0].bits is [4, 16]", "within 1 to 8"]),
    "bits end": (RULES + "  - bits: [0, 4]\n", ["layers[0].bits[0] is 0"]),
    "bits reversed": (RULES + "  - bits: [6, 2]\n", ["layers[0].bits is [6, 2]", "low end first"]),
    "three ends": (RULES + "  - bits: [1, 2, 3]\n", ["layers[0].bits is [1, 2, 3]", "[low, high]"]),
    "no high": (RULES + "  - bits: {low: 2}\n", ["layers[0].bits", "high is missing"]),
    "range key": (RULES + "  - bits: {low: 2, hihg: 3}\n", ["layers[0].bits", "'hihg'", "'high'?"]),
    "log text": (RULES + "  - bits: {low: 2, high: 3, log: yes}\n", ["layers[0].bits.log is 'yes'", "true or false"]),
    "log from 0": (RULES + "  - threshold: {low: 0, high: 3, log: true}\n", ["layers[0].threshold", "above 0"]),
    "rank 0": (RULES + "  - rank: 0\n", ["layers[0].rank is 0", "from 1 up", "full"]),
    "rank 0.0": (RULES + "  - rank: 0.0\n", ["layers[0].rank is 0.0", "above 0"]),
    "rank 1.5": (RULES + "  - rank: [0.5, 1.5]\n", ["layers[0].rank[1] is 1.5", "up to 1.0"]),
    "rank true": (RULES + "  - rank: true\n", ["layers[0].rank is True"]),
    "rank word": (RULES + "  - rank: half\n", ["layers[0].rank is 'half'", "full"]),
    "rank mixed": (RULES + "  - rank: [0.25, 1]\n", ["layers[0].rank is [0.25, 1]", "1.0"]),
    "rank reversed": (RULES + "  - rank: [full, 0.5]\n", ["layers[0].rank is ['full', 0.5]", "low end first"]),
    "rank above full": (RULES + "  - rank: [2, 50]\n", ["layers[0].rank is [2, 50]", "up to 10", "'fc3'", "full rank"]),
    "threshold below 0": (RULES + "  - threshold: -0.5\n", ["layers[0].threshold is -0.5", "from 0 to 10"]),
    "threshold nan": (RULES + "  - threshold: .nan\n", ["layers[0].threshold is nan"]),
    "threshold inf": (RULES + "  - threshold: [0, .inf]\n", ["layers[0].threshold[1] is inf"]),
    "threshold overflow": (RULES + "  - threshold: 1e999\n", ["layers[0].threshold is inf"]),
    "threshold true": (RULES + "  - threshold: true\n", ["layers[0].threshold is True"]),
    "quantizer": (RULES + "  - quantizer: kmeans\n", ["layers[0].quantizer is 'kmeans'", "codebook, uniform"]),
    "scheme": (RULES + "  - scheme: [channel]\n", ["layers[0].scheme is ['channel']", "channel, spatial"]),
    "scheme of linear": (
        RULES + "  - {match: fc1, scheme: spatial}\n",
        ["layers[0].scheme", "'fc1' (linear)", "channel"],
    ),
    "group blank": (RULES + "  - {group: ' ', bits: 3}\n", ["layers[0].group is ' '", "null"]),
    "group clash": (RULES + "  - {group: fc2, bits: 3}\n", ["layers[0].group is 'fc2'", "no layer"]),
    "group absolute": (RULES + "  - {group: all, rank: [2, 8]}\n", ["layers[0].rank is [2, 8]", "fractions", "'all'"]),
    "group unlike": (
        RULES + "  - {group: all, bits: [2, 5]}\n  - {match: fc3, bits: 8}\n",
        ["group 'all'", "different bits", "'fc1' [2, 5]", "'fc3' 8"],
    ),
    "recipe": ("version: 1\nlayers: [{bits: 3}]\nrecipe: 3\n", ["recipe is 3", "epochs, learning_rate, distillation"]),
    "precision": (
        "version: 1\nlayers: [{bits: 3}]\nrecipe: {precision: bfloat61}\n",
        ["recipe.precision is 'bfloat61'", "float32, bfloat16, float16", "did you mean 'bfloat16'"],
    ),
    "accumulation": (
        "version: 1\nlayers: [{bits: 3}]\nrecipe: {accumulation: [1, 4]}\n",
        ["recipe.accumulation is [1, 4]", "a whole number from 1 up"],
    ),
    "infomax": ("version: 1\nlayers: [{bits: 3}]\nrecipe: {infomax: -1}\n", ["recipe.infomax is -1", "from 0 up"]),
    "recipe key": ("version: 1\nlayers: [{bits: 3}]\nrecipe: {lr: 1}\n", ["recipe: unknown key 'lr'", "learning_rate"]),
    "rate 0": (
        "version: 1\nlayers: [{bits: 3}]\nrecipe: {learning_rate: 0}\n",
        ["recipe.learning_rate is 0", "above 0"],
    ),
    "epochs": ("version: 1\nlayers: [{bits: 3}]\nrecipe: {epochs: -1}\n", ["recipe.epochs is -1", "from 0 up"]),
    "distillation": (
        "version: 1\nlayers: [{bits: 3}]\nrecipe: {distillation: {low: 0, high: 2}}\n",
        ["recipe.distillation.high is 2", "0 to 1"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line_naming_file_key_value_and_what_is_allowed(mistake, tmp_path):
    text, fragments = MISTAKES[mistake]
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpaceError) as caught:
        load_space(path, MLP)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert [f for f in fragments if f not in message] == [], message


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        ("quantise_only", ["'quantise_only'", "did you mean 'quantize_only'?", "lowrank_only"]),
        ("nowhere/mine.yaml", ["nowhere/mine.yaml", "no such file"]),
        ("mine.yml", ["mine.yml", "no such file"]),
        (".", ["cannot be read"]),
        ({"version": 1, "layers": [{"bits": True}]}, ["search space: layers[0].bits is True"]),
        ({"version": 1, "layers": [{"match": 0, "bits": 3}]}, ["layers[0].match is 0", "pattern"]),
        ({1: 1}, ["unknown key 1"]),
    ],
)
def test_wrong_sources_are_named(source, fragments):
    with pytest.raises(SpaceError) as caught:
        load_space(source, MLP)
    assert [f for f in fragments if f not in str(caught.value)] == [], str(caught.value)


def test_model_without_layers_and_a_rank_for_a_layer_that_must_stay_whole():
    with pytest.raises(SpaceError, match="no layer to compress"):
        load_space(None, [])
    with pytest.raises(
        SpaceError, match=r"layers\[0\].rank is 0.5, allowed: full for layer 'dw' \(grouped convolution\)"
    ):
        load_space(document({"match": "dw", "rank": 0.5}), MODELS["depthwise"])


def test_at_most_ten_layers_are_listed():
    with pytest.raises(SpaceError, match=r"'b9.conv' and 30 more"):
        load_space(document({"match": "nothing", "bits": 3}), MODELS["deep"])


def test_yaml_scalars_mean_what_users_write(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\nlayers:\n  - {match: 0, bits: 3}\n  - {match: [1.10], bits: 5}\nrecipe: {learning_rate: 3e-4}\n"
    )
    plan = _any_plan(load_space(path, MODELS["conv1d"]))
    assert [layer.bits for layer in plan.layers.values()] == [3, 5]
    assert plan.recipe.learning_rate == 3e-4


def test_the_examples_of_the_docs_load(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "search-spaces.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 2
    path = tmp_path / "my_space.yaml"
    knobs = []
    for example in examples:
        path.write_text(example)
        knobs.append([knob.name for knob in load_space(path, LENET5).knobs])
    assert "conv1.rank" not in knobs[0]
    assert {"conv1.threshold", "conv2.rank", "conv2.bits", "fc1.rank", "fc2.threshold"} < set(knobs[0])
    assert knobs[1][:5] == ["features.rank", "features.bits", "features.threshold", "head.bits", "head.threshold"]
    path.write_text(examples[0].replace("[4, 6]", "9"))
    with pytest.raises(SpaceError) as caught:
        load_space(path, LENET5)
    assert str(caught.value).replace(f"{tmp_path}/", "") in page


def test_module_loads_no_heavy_library():
    code = (
        "import sys, autocompress.search.space_file as s; s.available();"
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_activation_bits_are_places_among_the_choices_to_a_sampler():
    layers = [{"bits": [2, 5], "activation_bits": [4, 32]}, {"match": "fc3", "activation_bits": 8}]
    space = load_space({"version": 1, "layers": layers}, MLP)
    knobs = {knob.name: knob for knob in space.knobs}
    assert (knobs["fc1.activation_bits"].low, knobs["fc1.activation_bits"].high) == (0, 2)
    assert "fc3.activation_bits" not in knobs
    params = {name: knob.low for name, knob in knobs.items()} | {"fc2.activation_bits": 2}
    plan = space.plan(params, 1.0)
    assert [plan.layers[name].activation_bits for name in ("fc1", "fc2", "fc3")] == [4, 32, 8]
    check(plan, MLP)
    assert space.params_for(plan) == params


def test_a_ladder_goes_from_wide_to_narrow_activations():
    space = load_space({"version": 1, "layers": [{"activation_bits": [4, 32]}]}, MLP)
    plans = [space.plan(params, 1.0) for params in ladder(space, MLP, 3)]
    assert [plan.layers["fc1"].activation_bits for plan in plans] == [32, 8, 4]


def test_a_space_without_activation_bits_keeps_its_fingerprint():
    plain, told, other = (
        load_space({"version": 1, "layers": [{"bits": [2, 4]} | more]}, MLP).fingerprint()
        for more in ({}, {"activation_bits": 32}, {"activation_bits": [8, 32]})
    )
    assert plain == told != other
    old = {"version": 1, "layers": [{"bits": 4, "rank": [0.2, 1.0]}]}
    assert load_space(old, MLP).fingerprint() == "d4917bc596269f04"  # before there were any of the later options


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (7, r"layers\[0\].activation_bits is 7, allowed: 4, 8, 32, or a range"),
        ([8, 4], "allowed: the low end first"),
        ([8, 16], r"activation_bits\[1\] is 16, allowed: 4, 8, 32"),
    ],
)
def test_bad_activation_bits_are_named(value, said):
    with pytest.raises(SpaceError, match=said):
        load_space({"version": 1, "layers": [{"activation_bits": value}]}, MLP)
