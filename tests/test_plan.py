"""Plans: JSON round trips, rank limits against brute force, and each mistake named in one line."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import PlanError
from autocompress.plan import (
    BIT_WIDTHS,
    PRECISIONS,
    QUANTIZERS,
    SCHEMES,
    LayerPlan,
    LayerSpec,
    Measurement,
    Plan,
    Recipe,
    check,
    uncompressed,
)

FC = LayerSpec("fc", "linear", (10, 20), 200)
CONV = LayerSpec("block.conv", "conv2d", (8, 4, 3, 3), 28800)
DEPTHWISE = LayerSpec("dw", "conv2d", (4, 1, 3, 3), 36, groups=4, factorable=False, whole_because="grouped convolution")
BARE = LayerSpec("", "linear", (3, 2), 6)
SPECS = (FC, CONV, DEPTHWISE)

layer_plans = st.builds(
    LayerPlan,
    rank=st.none() | st.integers(1, 500),
    bits=st.sampled_from(BIT_WIDTHS),
    threshold=st.floats(0, 10),
    scheme=st.sampled_from(SCHEMES),
    quantizer=st.sampled_from(QUANTIZERS),
)
recipes = st.builds(
    Recipe, epochs=st.floats(0, 1e3), learning_rate=st.floats(1e-9, 10), distillation=st.floats(0, 1),
    rate=st.floats(0, 10), precision=st.sampled_from(PRECISIONS), accumulation=st.integers(1, 64),
    infomax=st.floats(0, 9),
)  # fmt: skip
names = st.sampled_from(["", "fc", "block.0.conv", "ä\u2028"])
plans = st.builds(Plan, st.dictionaries(names, layer_plans, max_size=4), recipes)


@given(plans)
def test_a_plan_survives_json_and_its_key_ignores_order(plan):
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    turned = Plan(dict(reversed(plan.layers.items())), plan.recipe)
    assert turned.key() == back.key() == plan.key()


def test_a_recipe_of_an_older_record_has_the_defaults_of_what_it_lacks():
    old = {"epochs": 2.0, "learning_rate": 0.01, "distillation": 0.0}
    assert Plan.from_json({"layers": {}, "recipe": old}).recipe == Recipe(2.0, 0.01, 0.0, 0.0, "float32", 1, 0.0)


@given(plans, plans)
def test_keys_differ_where_plans_do(one, other):
    assert (one.key() == other.key()) == (one == other)


def test_specs_and_measurements_survive_json():
    shared = replace(FC, shared_with=("a", "b.c"), factorable=False, whole_because="shared with a, b.c")
    for spec in (*SPECS, shared, BARE):
        assert LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    measured = Measurement(1, 0.5, 1234, 0.987654321, 42, 0.1)
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.sampled_from(SCHEMES))
def test_max_rank_is_the_largest_with_fewer_weights(shape, scheme):
    kind = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}[len(shape)]
    spec = LayerSpec("x", kind, tuple(shape), 1)
    if scheme not in spec.schemes:
        assert spec.max_rank(scheme) == 0
        return
    rows, columns = spec.matrix(scheme)
    assert rows * columns == math.prod(shape) == spec.parameters
    fewer = [r for r in range(1, rows * columns + 1) if r * (rows + columns) < rows * columns]
    assert spec.max_rank(scheme) == max(fewer, default=0)
    assert spec.max_rank(scheme) < max(2, spec.full_rank(scheme))


def test_only_plain_2d_convolutions_have_several_schemes():
    assert FC.schemes == ("channel",)
    assert CONV.schemes == ("channel", "spatial", "tucker", "best")
    assert CONV.matrix("channel") == (8, 36)
    assert CONV.matrix("spatial") == (12, 24)
    assert DEPTHWISE.schemes == ()
    assert DEPTHWISE.max_rank() == 0


def test_the_uncompressed_plan_is_feasible_for_every_layer():
    plan = uncompressed([*SPECS, BARE])
    check(plan, [*SPECS, BARE])
    assert plan.recipe.epochs == 0
    assert all(layer == LayerPlan() for layer in plan.layers.values())


@pytest.mark.parametrize(("spec", "scheme"), [(FC, "channel"), (CONV, "channel"), (CONV, "spatial")])
def test_every_rank_up_to_the_highest_is_allowed_and_none_above(spec, scheme):
    highest = spec.max_rank(scheme)
    for rank in range(1, highest + 1):
        check(Plan({spec.name: LayerPlan(rank=rank, scheme=scheme)}), [spec])
    for rank in (-1, 0, highest + 1, 2.5, 10**9):
        with pytest.raises(PlanError, match=f"rank is {rank}, allowed: 1 to {highest}, or full"):
            check(Plan({spec.name: LayerPlan(rank=rank, scheme=scheme)}), [spec])


@pytest.mark.parametrize(
    ("spec", "layer", "said"),
    [
        (FC, LayerPlan(bits=9), r"layer 'fc': bits is 9, allowed: 1, 2, .*8, 16, 32"),
        (FC, LayerPlan(bits=0), "bits is 0"),
        (FC, LayerPlan(quantizer="ternary"), "quantizer is 'ternary', allowed: codebook, uniform"),
        (FC, LayerPlan(threshold=-0.1), "threshold is -0.1, allowed: 0 to 10"),
        (FC, LayerPlan(threshold=1e6), "threshold is 1000000.0, allowed: 0 to 10"),
        (FC, LayerPlan(threshold=math.nan), "threshold is nan"),
        (FC, LayerPlan(threshold=math.inf), "threshold is inf"),
        (FC, LayerPlan(rank=2, scheme="spatial"), "scheme is 'spatial', allowed: channel"),
        (CONV, LayerPlan(rank=2, scheme="cp"), "layer 'block.conv': scheme is 'cp', allowed: channel, spatial, tucker"),
        (DEPTHWISE, LayerPlan(rank=1), r"layer 'dw': rank is 1, allowed: full only \(grouped convolution\)"),
        (LayerSpec("t", "linear", (1, 5), 5), LayerPlan(rank=1), r"rank is 1, allowed: full only \(two factors"),
        (BARE, LayerPlan(bits=7.5), "layer 'model': bits is 7.5"),
    ],
)
def test_a_layer_that_cannot_carry_out_its_plan_is_named(spec, layer, said):
    with pytest.raises(PlanError, match=said) as caught:
        check(Plan({spec.name: layer}), [spec])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(epochs=-1), "recipe: epochs is -1, allowed: 0 or more"),
        (Recipe(epochs=math.inf), "epochs is inf"),
        (Recipe(distillation=1.01), "distillation is 1.01, allowed: 0 to 1"),
        (Recipe(precision="half"), "precision is 'half', allowed: float32, bfloat16, float16"),
        (Recipe(accumulation=0), "accumulation is 0, allowed: a whole number, 1 or more"),
        (Recipe(accumulation=1.5), "accumulation is 1.5, allowed: a whole number"),
        (Recipe(infomax=-0.1), "infomax is -0.1, allowed: 0 or more"),
        (Recipe(learning_rate=0), "learning_rate is 0, allowed: above 0"),
        (Recipe(learning_rate=math.nan), "learning_rate is nan"),
    ],
)
def test_a_recipe_out_of_range_is_named(recipe, said):
    with pytest.raises(PlanError, match=said):
        check(Plan({"fc": LayerPlan()}, recipe), [FC])


def test_plans_must_speak_of_exactly_the_layers():
    with pytest.raises(PlanError, match=r"plan has no entry for layer 'block\.conv'"):
        check(Plan({"fc": LayerPlan()}), [FC, CONV])
    with pytest.raises(PlanError, match=r"plan names layer 'fc9', which is not one of \['fc'\]"):
        check(Plan({"fc": LayerPlan(), "fc9": LayerPlan()}), [FC])
