"""Continuation: chains that rise, branches off the front, resumed as if never stopped; and whose state is handed on."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_search import local, one_thread, write_task  # noqa: F401

from autocompress import api, preflight
from autocompress.errors import SpaceError
from autocompress.plan import LayerPlan, LayerSpec, Plan, Recipe
from autocompress.search import continuation
from autocompress.search.continuation import RATE, STEPS, Seen, check_continuable, following, steps_within
from autocompress.search.lineage import ancestor
from autocompress.search.space_file import load_space

SPECS = (LayerSpec("a", "linear", (20, 30), 600), LayerSpec("b", "linear", (10, 20), 200))
SPACE = load_space("continuation", SPECS)
RATES = next(k for k in SPACE.knobs if k.name == RATE)


def seen(number, parent, params, *, running=False, useful=True, state=True, position=None):
    return Seen(number, parent, params, running, useful, state, -float(number) if position is None else position)


def simulate(count, chains=2, useful=lambda step: True, seed=0):
    """Trials that finish in the order in which they began, `chains` of them at a time."""
    trials, running = [], []
    for number in range(1, count + 1):
        step = following([*trials, *running], SPACE, chains, seed, number)
        running.append(seen(number, step.parent, step.params, running=True, state=False))
        if len(running) == chains:
            done = running.pop(0)
            trials.append(seen(done.number, done.parent, done.params, useful=useful(done)))
    return [*trials, *running]


def test_each_chain_rises_from_the_lowest_price_to_the_highest():
    trials = {t.number: t for t in simulate(2 * STEPS)}
    roots = [t for t in trials.values() if t.parent is None]
    assert [t.number for t in roots] == [1, 2]
    for root in roots:
        chain = [root]
        while following_one := [t for t in trials.values() if t.parent == chain[-1].number]:
            chain.append(following_one[0])
        rates = [t.params[RATE] for t in chain]
        assert rates[0] == RATES.low
        assert rates[-1] == pytest.approx(RATES.high)
        assert len(chain) == STEPS
        ratios = [b / a for a, b in itertools.pairwise(rates)]
        assert max(ratios) == pytest.approx(min(ratios))
        others = [{k: v for k, v in t.params.items() if k != RATE} for t in chain]
        assert all(o == others[0] for o in others)


def test_many_workers_still_reach_all_prices():
    """Workers that have nothing to go on from begin somewhere between the lowest and the highest price."""
    running = []
    for number in range(1, 24):
        step = following(running, SPACE, continuation.chains_within(23, 32), 0, number)
        running.append(seen(number, step.parent, step.params, running=True, state=False))
    rates = sorted(t.params[RATE] for t in running)
    assert rates[:7] == [RATES.low] * 7
    assert all(b / a < 1.5 for a, b in itertools.pairwise(rates[6:]))
    assert rates[-1] > RATES.high / 1.5


@pytest.mark.parametrize(("trials", "workers", "chains"), [(24, 2, 2), (24, 32, 8), (2, 4, 1), (1, 1, 1)])
def test_chains_are_long_enough_to_rise(trials, workers, chains):
    assert continuation.chains_within(trials, workers) == chains
    assert continuation.chains_within(trials, workers, timed=True) == max(chains, min(2, max(1, trials // 3)))


def test_the_newest_chain_goes_on_first():
    low = {k.name: k.at(0.5) for k in SPACE.knobs} | {RATE: RATES.low}
    ends = [seen(1, None, low), seen(2, None, low), seen(3, 1, low | {RATE: 0.2})]
    assert following(ends, SPACE, 2, 0, 4).parent == 3


def test_branches_vary_the_recipe():
    high = {k.name: k.at(0.5) for k in SPACE.knobs} | {RATE: RATES.high}
    trials = [seen(1, None, high), seen(2, None, high)]
    step = following(trials, SPACE, 2, 0, 3)
    assert step.parent is not None
    assert any(step.params[k.name] != high[k.name] for k in SPACE.knobs if k.name not in {RATE})


def test_chains_differ_in_their_settings():
    first, second = simulate(2)
    assert first.params != second.params


def test_a_chain_that_fell_behind_is_dropped_for_a_branch_off_the_front():
    trials = [
        seen(1, None, {**mild(), RATE: 0.3}),
        seen(2, 1, {**mild(), RATE: 0.5}),
        seen(3, 2, {**mild(), RATE: 0.9}, useful=False),
    ]
    step = following(trials, SPACE, 1, 0, 4)
    assert step.parent == 2 or step.parent == 1
    assert step.params[RATE] <= 0.5


def test_a_branch_begins_below_the_widest_gap_that_the_fewest_branched_into():
    top = {**mild(), RATE: RATES.high}
    trials = [
        seen(1, None, {**mild(), RATE: 1.0}, position=9.0),
        seen(2, 1, top, position=5.0),
        seen(3, 2, top, position=4.9),
        seen(4, 2, top, position=4.8),
        seen(5, 2, top, position=3.0),
    ]
    assert following(trials, SPACE, 1, 0, 6).parent == 5  # 3.0 to 4.8, no children; 5.0 to 9.0 has three
    trials.append(seen(6, 5, top, running=True, state=False))
    assert following(trials, SPACE, 1, 0, 7).parent == 2
    trials += [seen(7, 2, top, position=8.9), seen(8, 7, top, useful=False)]
    assert following(trials, SPACE, 1, 0, 9).parent == 5  # 5.0 to 8.9 has four children now


def test_branches_do_not_gather_at_the_end_of_the_front():
    """Each branch that lands beside its parent makes the gap there small."""
    top = {**mild(), RATE: RATES.high}
    trials = [seen(k, k - 1 or None, top, position=10.0 - k) for k in range(1, 9)]
    parents = []
    for number in range(9, 17):
        step = following(trials, SPACE, 1, 0, number)
        parents.append(step.parent)
        beside = next(t for t in trials if t.number == step.parent).position
        trials.append(seen(number, step.parent, top, position=beside + 0.01))
    assert len(set(parents)) >= 7


@pytest.mark.parametrize(
    ("baseline", "compressed", "limit"),
    [
        (-0.9, [-0.85, -0.3], -0.81),  # an accuracy, as it is minimised
        (-0.02, [-0.019], -0.018),  # a correlation
        (-5.0, [-4.9], -4.5),  # a negative log-likelihood of densities, or a score beyond 1
        (0.1, [0.09, 0.2], 0.15),  # an error
        (1200.0, [1210.0], 1815.0),  # a log-likelihood that was maximised
        (1e-6, [], 1.5e-6),
        (1e-6, [3e-4, 1e-4], 1.5e-4),  # an error next to zero, which no compressed model keeps
        (0.0, [1e-4], 1.5e-4),
    ],
)
def test_what_is_useful_follows_the_metrics_sign_and_scale(baseline, compressed, limit):
    assert continuation.worst_useful(baseline, compressed) == pytest.approx(limit)
    for scale in (1e-3, 1e3):
        scaled = continuation.worst_useful(scale * baseline, [scale * m for m in compressed])
        assert scaled == pytest.approx(scale * limit)


def test_only_members_with_a_state_are_gone_on_from():
    trials = [seen(1, None, {**mild(), RATE: 1.0}, state=False), seen(2, None, {**mild(), RATE: 2.0}, running=True)]
    assert following(trials, SPACE, 1, 0, 3).parent is None


def test_what_failed_is_not_tried_again():
    trials = [failed(1, None, _root := following([], SPACE, 2, 0, 1).params)]
    second = following(trials, SPACE, 2, 0, 2)
    assert second.parent is None
    assert second.params != _root
    trials.append(seen(2, None, second.params))
    third = following(trials, SPACE, 2, 0, 3)
    assert third.parent == 2
    trials.append(failed(3, 2, third.params))
    assert following(trials, SPACE, 2, 0, 4).params[RATE] <= second.params[RATE]  # a branch, and no further step


def test_when_all_fail_every_trial_begins_anew_elsewhere():
    trials = []
    for number in range(1, 8):
        step = following(trials, SPACE, 2, 0, number)
        assert step.parent is None
        assert step.params not in [t.params for t in trials]
        trials.append(failed(number, None, step.params))


def test_a_branch_is_near_its_parent_and_never_pays_more():
    parent = seen(1, None, {**mild(), RATE: RATES.high}, position=1.0)
    for number in range(2, 30):
        step = following([parent, seen(number - 1, 1, parent.params, useful=False)], SPACE, 1, 0, number)
        assert step.parent == 1
        assert RATES.high / (RATES.high / RATES.low) ** (1 / (STEPS - 1)) <= step.params[RATE] <= RATES.high
        layers = {k: v for k, v in step.params.items() if not k.startswith("recipe.")}
        assert layers == {k: v for k, v in parent.params.items() if not k.startswith("recipe.")}


def failed(number, parent, params):
    return seen(number, parent, params, useful=False, state=False)


def mild():
    return {k.name: k.at(0.5) for k in SPACE.knobs}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 60), st.data())
def test_whatever_happens_parameters_are_in_range_and_follow_from_the_trials(seed, chains, count, data):
    fates = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    trials = simulate(count, chains, lambda t: fates[t.number - 1], seed)
    for trial in trials:
        SPACE.plan(trial.params, 1.0)  # raises where a value is out of range
        assert trial.parent is None or trial.parent < trial.number
    assert trials == simulate(count, chains, lambda t: fates[t.number - 1], seed)


@pytest.mark.parametrize("recipe", [{}, {"rate": 1.0}, {"rate": [0.1, 1.0]}])
def test_a_space_without_a_range_of_prices_is_refused(recipe):
    space = load_space({"version": 1, "layers": [{"bits": 4}], "recipe": recipe}, SPECS)
    with pytest.raises(SpaceError, match=r"recipe.rate is .*, allowed with sampler 'continuation'"):
        check_continuable(space)


def plan(a, b, rate=0.0):
    return Plan({"a": LayerPlan(*a), "b": LayerPlan(*b)}, Recipe(rate=rate))


def test_the_ancestor_is_the_nearest_plan_of_no_lower_ranks():
    members = {
        1: plan((None, 8, 0.0), (None, 8, 0.0)),
        2: plan((None, 5, 0.5), (None, 8, 0.0)),
        3: plan((None, 3, 0.5), (None, 8, 0.0)),
        4: plan((10, 5, 0.5), (None, 8, 0.0)),
    }
    assert ancestor(plan((None, 4, 1.0), (None, 8, 0.0)), members, SPECS) == 2
    assert ancestor(plan((8, 4, 1.0), (None, 8, 0.0)), members, SPECS) == 4
    assert ancestor(plan((None, 8, 0.0), (None, 4, 0.0)), members, SPECS) == 1
    assert ancestor(plan((12, 5, 0.5), (None, 8, 0.0)), members, SPECS) == 2  # no rank comes back
    assert ancestor(plan((None, 3, 0.2), (None, 8, 0.0)), members, SPECS) == 3  # a threshold may


def test_the_ancestor_pays_no_more_than_the_plan():
    members = {n: plan((None, 5, 0.0), (None, 5, 0.0), rate) for n, rate in ((1, 0.5), (2, 1.0), (3, 4.0))}
    assert ancestor(plan((None, 5, 0.0), (None, 5, 0.0), 2.0), members, SPECS) == 2


def searched(tmp_path, trials, **more):
    options = {"finetune_epochs": 2.0, **more}
    return api.search(f"{write_task(tmp_path)}:task", trials=trials, dir=tmp_path / "runs", seed=1, **options)


def states(tmp_path, study):
    return {int(p.stem[6:]) for p in (tmp_path / "runs" / "studies" / study / "states").glob("*.safetensors")}


def test_a_search_by_continuation_keeps_the_fronts_states_and_names_parents(tmp_path, local, one_thread):  # noqa: F811
    record = searched(tmp_path, 12, sampler="continuation", workers=2).record
    parents = {t.number: t.parent for t in record.trials}
    assert parents[0] is parents[1] is parents[2] is None
    assert sum(p is not None for p in parents.values()) >= 8
    front = {t.number for t in record.front}
    assert states(tmp_path, record.study) == front - {0}
    assert len(front) >= 2
    for trial in record.trials[1:]:
        assert len(trial.measurements) == 1
        assert trial.best == trial.measurements[-1]


def test_resumed_it_proposes_what_it_would_have(tmp_path, local, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr(continuation, "steps_within", lambda *_: STEPS)  # as if as many trials had been asked for
    monkeypatch.setattr(continuation, "chains_within", lambda *_, **__: 2)
    whole = searched(tmp_path, 9, sampler="continuation", workers=2, name="whole").record
    searched(tmp_path, 5, sampler="continuation", workers=2, name="parts")
    parts = api.resume("parts", trials=9, dir=tmp_path / "runs").record
    assert [(t.plan, t.parent, t.seed, t.best.size_bytes) for t in parts.trials] == [
        (t.plan, t.parent, t.seed, t.best.size_bytes) for t in whole.trials
    ]


def test_any_sampler_can_hand_states_on(tmp_path, local, one_thread):  # noqa: F811
    record = searched(tmp_path, 20, space="mlp", inherit=True).record
    plans = {t.number: t.plan for t in record.trials}
    heirs = [t for t in record.trials if t.parent is not None and t.origin == "sampler"]
    assert heirs
    for heir in heirs:
        assert ancestor(heir.plan, {heir.parent: plans[heir.parent]}, record.layers) == heir.parent
    assert all(t.parent is None for t in searched(tmp_path, 12, space="mlp").record.trials)


def test_a_trial_whose_parents_state_is_lost_fails_and_the_search_goes_on(tmp_path, local, one_thread, monkeypatch):  # noqa: F811
    """A state's folder was deleted while the process was down that had begun trial 3."""
    from autocompress.session import Session

    def killed(*_):
        raise KeyboardInterrupt

    searched(tmp_path, 3, sampler="continuation", workers=1, name="lost")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "_state_of", killed)
        with pytest.raises(KeyboardInterrupt):
            api.resume("lost", trials=6, dir=tmp_path / "runs")
    for file in (tmp_path / "runs" / "studies" / "lost" / "states").iterdir():
        file.unlink()
    *_, trial, after, last = api.resume("lost", trials=6, dir=tmp_path / "runs").record.trials
    assert (trial.number, trial.state, trial.parent) == (3, "failed", 2)
    assert trial.error.startswith("the state of trial 2 cannot be read from")
    assert (after.state, after.parent) == ("complete", None)
    assert (last.state, last.parent) == ("complete", 4)


def test_a_damaged_state_fails_the_trial_that_needs_it_and_the_chain_branches_off(tmp_path, local, one_thread):  # noqa: F811
    searched(tmp_path, 4, sampler="continuation", workers=1, name="damaged")
    file = tmp_path / "runs" / "studies" / "damaged" / "states" / "trial-0003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    record = api.resume("damaged", trials=7, dir=tmp_path / "runs").record
    assert (record.trials[4].state, record.trials[4].parent) == ("failed", 3)
    assert record.trials[4].error.startswith("the state of trial 3 is damaged: ")
    assert [t.state for t in record.trials if t.number > 3 and t.parent != 3] == ["complete"]


def test_a_stray_file_among_the_states_is_no_state(tmp_path, local, one_thread):  # noqa: F811
    searched(tmp_path, 3, sampler="continuation", workers=1, name="stray")
    (tmp_path / "runs" / "studies" / "stray" / "states" / "trial-copy.safetensors").write_bytes(b"")
    record = api.resume("stray", trials=5, dir=tmp_path / "runs").record
    assert [t.state for t in record.trials] == ["complete"] * 5


def test_a_time_budget_decides_how_long_trials_finetune(tmp_path, local, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr(preflight, "filling", lambda *_, seconds, trials, **__: (trials, seconds / 30))
    options = {"sampler": "continuation", "workers": 1, "finetune_epochs": None}
    fills = searched(tmp_path, 2, name="fills", time_budget="1m", **options).record
    assert {t.plan.recipe.epochs for t in fills.trials[1:]} == {2.0}
    again = searched(tmp_path, 3, name="fills", time_budget="2m", **options).record  # as it was begun
    assert {t.plan.recipe.epochs for t in again.trials[1:]} == {2.0}
    assert len(again.trials) == 3


def test_a_time_budget_decides_how_many_trials_there_are(tmp_path, local, one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr(preflight, "filling", lambda *_, trials, free, **__: (4 if free else trials, 1.0))
    options = {"sampler": "continuation", "workers": 1, "finetune_epochs": None, "time_budget": "1m"}
    assert len(searched(tmp_path, None, name="fills", **options).record.trials) == 4
    assert len(searched(tmp_path, None, name="fills", **options).record.trials) == 4  # as it was begun
    assert len(searched(tmp_path, 3, name="asked", **options).record.trials) == 3


@pytest.mark.parametrize(("trials", "chains", "steps"), [(24, 2, 12), (100, 2, 12), (7, 2, 3), (26, 8, 3), (10, 1, 10)])
def test_few_trials_reach_the_highest_price_too(trials, chains, steps):
    assert steps_within(trials, chains) == steps


def test_a_short_chain_goes_from_the_lowest_price_to_the_highest(tmp_path, local, one_thread):  # noqa: F811
    record = searched(tmp_path, 5, sampler="continuation", workers=1).record
    prices = [t.plan.recipe.rate for t in record.trials[1:]]
    assert prices == pytest.approx([0.1 * 250 ** (i / 3) for i in range(4)])


@pytest.mark.parametrize(("expected", "chains"), [(3, 1), (5, 2), (9, 2), (13, 3), (25, 2)])
def test_chains_reach_the_highest_price_in_the_trials_that_time_allows(expected, chains):
    """Of trials 1 to expected - 1, with one that was expected from the second on, when the first has told its time."""
    trials, running = [], []
    for number in range(1, expected):
        step = following([*trials, *running], SPACE, chains, 0, number, expected=expected if number > chains else None)
        running.append(seen(number, step.parent, step.params, running=True, state=False))
        if len(running) == chains:
            done = running.pop(0)
            trials.append(seen(done.number, done.parent, done.params))
    highest = max(t.params[RATE] for t in [*trials, *running])
    assert highest == pytest.approx(RATES.high)


def test_time_that_suffices_changes_no_step():
    low = {**mild(), RATE: RATES.low}
    trials = [seen(1, None, low), seen(2, None, low)]
    usual = following(trials, SPACE, 2, 0, 3)
    assert following(trials, SPACE, 2, 0, 3, expected=2 * STEPS + 1) == usual
    short = following(trials, SPACE, 2, 0, 3, expected=2 * STEPS - 1)
    assert short.params[RATE] > usual.params[RATE]
    assert following(trials, SPACE, 2, 0, 3, expected=0).params[RATE] == pytest.approx(RATES.high)


def test_the_price_rises_in_double_steps_while_nothing_is_lost():
    low = {**mild(), RATE: 0.5}
    usual = following([seen(1, None, low)], SPACE, 1, 0, 2).params[RATE] / 0.5
    lossless = replace(seen(1, None, low), lossless=True)
    assert following([lossless], SPACE, 1, 0, 2).params[RATE] == pytest.approx(0.5 * usual**2)
    high = replace(lossless, params={**low, RATE: RATES.high / usual})
    assert following([high], SPACE, 1, 0, 2).params[RATE] == pytest.approx(RATES.high)


@pytest.mark.parametrize(
    ("baseline", "worst"),
    [(-0.9, -0.8991), (-0.5, -0.4995), (0.2, 0.201), (0.0, 0.0)],  # a score, a correlation, a loss, one of zero
)
def test_what_counts_as_no_loss(baseline, worst):
    useful = continuation.worst_useful(baseline, [])
    assert continuation.worst_lossless(baseline, useful) == pytest.approx(worst)
