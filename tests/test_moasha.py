"""Successive halving by non-dominated rank, against a ranking by brute force."""

import math
import random

import pytest

from autocompress.search.moasha import Decision, Rungs


def dominated(one, other):
    """Whether `other` is at most `one` everywhere and below it somewhere."""
    return all(b <= a for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def rank(point, points):
    """How often the front has to be taken away until the point is on it."""
    left, taken = set(points), 0
    while any(dominated(point, p) for p in left):
        left -= {p for p in left if not any(dominated(p, q) for q in left)}
        taken += 1
    return taken


def decide(values, eta, grace):
    """What the paper says of the last of the values, given those before it."""
    if len(values) < grace:
        return Decision.CONTINUE
    mine = rank(values[-1], values)
    better = sum(rank(v, values) < mine for v in values)
    return Decision.CONTINUE if mine == 0 or better < math.ceil(len(values) / eta) else Decision.STOP


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("eta", "grace"), [(3.0, 6), (2.0, 1), (4.0, 3)])
def test_each_decision_is_that_of_brute_force(seed, eta, grace):
    rng = random.Random(seed)
    values = [(float(rng.randint(0, 6)), float(rng.randint(0, 6))) for _ in range(40)]  # ties are common
    rungs = Rungs(eta, grace)
    decisions = [rungs.report(number, 1, value) for number, value in enumerate(values)]
    assert decisions == [decide(values[: n + 1], eta, grace) for n in range(len(values))]
    assert {Decision.STOP, Decision.CONTINUE} == set(decisions)


def test_trial_numbers_and_other_rungs_do_not_matter():
    rng = random.Random(7)
    values = [(rng.random(), rng.random()) for _ in range(30)]
    plain, shuffled = Rungs(), Rungs()
    names = rng.sample(range(1000), 30)
    for number, value in enumerate(values):
        shuffled.report(names[number], 2, (rng.random() - 5, rng.random() - 5))
        assert plain.report(number, 1, value) == shuffled.report(names[number], 1, value)


def test_a_member_of_the_front_always_goes_on():
    rungs = Rungs(eta=3.0, grace=1)
    front = [(float(n), float(-n)) for n in range(50)]
    assert {rungs.report(n, 1, value) for n, value in enumerate(front)} == {Decision.CONTINUE}
    assert rungs.report(99, 1, (60.0, 60.0)) is Decision.STOP


def test_nobody_is_stopped_within_the_grace():
    rungs = Rungs(grace=6)
    worse_and_worse = [(float(n), float(n)) for n in range(6)]
    decisions = [rungs.report(n, 1, value) for n, value in enumerate(worse_and_worse)]
    assert decisions == [Decision.CONTINUE] * 5 + [Decision.STOP]


def test_a_trial_that_reports_again_counts_once():
    rungs = Rungs(eta=3.0, grace=3)
    for _ in range(5):
        assert rungs.report(0, 1, (1.0, 1.0)) is Decision.CONTINUE
    assert rungs.report(1, 1, (2.0, 2.0)) is Decision.CONTINUE
    assert rungs.report(2, 1, (3.0, 3.0)) is Decision.STOP
