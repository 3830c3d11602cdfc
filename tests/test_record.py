"""A study as a value: front, limits, sizes and hypervolume against numbers worked out by hand."""

import json
import math
import random
from dataclasses import replace

import pytest

from autocompress.errors import UsageError
from autocompress.limits import parse_drop, parse_size
from autocompress.plan import LayerPlan, LayerSpec, Measurement, Plan, Recipe
from autocompress.record import StudyRecord, TrialRecord, name_points, without_folders

FC = LayerSpec("fc", "linear", (10, 100), 1000)


def trial(number, size=None, metric=None, state="complete", **more):
    best = None if size is None else Measurement(1, 1.0, size, metric, 700 + number, 0.5)
    plan = Plan({"fc": LayerPlan(rank=2, bits=3, threshold=0.5)}, Recipe(2.0, 0.01, 0.25))
    return TrialRecord(number, state, plan, 7, (best,) if best else (), best, **more)


def study(*trials, direction="maximize", **more):
    return StudyRecord("mine", "task.py:task", "accuracy", direction, 3, 4096, (FC,), trials, **more)


# sizes against 4096 bytes: 0, 2, 3, 4, 5 octaves smaller; metrics against 0.8
BASE = trial(0, 4096, 0.80, artifact="mine/0.acz", metric_test=0.79)
TWO, THREE = trial(1, 1024, 0.80), trial(2, 512, 0.72)
WORSE, FOUR, FIVE = trial(3, 600, 0.70), trial(4, 256, 0.40), trial(5, 128, 0.00)
FAILED = trial(6, state="failed", error="loss became nan")
STOPPED = trial(7, 4000, 0.10, state="stopped")
TRIALS = (BASE, TWO, THREE, WORSE, FOUR, FIVE, FAILED, STOPPED)


def test_the_front_and_its_named_points():
    record = study(*TRIALS)
    assert [t.number for t in record.front] == [5, 4, 2, 1]  # rising size; trial 1 beats the equally good trial 0
    assert record.best().number == 1
    assert record.knee().number == 2
    assert [(name, t.number) for name, t in name_points(record)] == [("smallest", 5), ("knee", 2), ("best", 1)]
    assert [(name, t.number) for name, t in name_points(study(BASE))] == [("smallest", 0)]
    assert list(name_points(study())) == []
    shuffled = list(TRIALS)
    random.Random(0).shuffle(shuffled)
    assert {t.number for t in study(*shuffled).front} == {5, 4, 2, 1}


def test_hypervolume_by_hand():
    # rectangles from each point of (octaves saved, relative drop) to (0 octaves, drop 1)
    # drops: trial 1 0, trial 2 0.1, trial 4 0.5, trial 5 1.0 (adds nothing)
    record = study(*TRIALS)
    assert record.hypervolume() == pytest.approx(2 * 1.0 + 1 * 0.9 + 1 * 0.5)
    assert [round(record.hypervolume(n), 9) for n in range(8)] == [0, 2.0, 2.9, 2.9, 3.4, 3.4, 3.4, 3.4]
    assert study(TWO, THREE).hypervolume() == 0  # before trial 0 is measured
    assert study(BASE, trial(1, 128, 0.8)).hypervolume() == pytest.approx(5)  # a lossless 32x
    better = study(BASE, trial(1, 2048, 1.2))
    assert better.hypervolume() == pytest.approx(1.5)  # a gain counts above 1


def test_hypervolume_of_a_minimised_loss():
    base = trial(0, 4096, 0.5)
    record = study(base, trial(1, 1024, 0.6), trial(2, 256, 1.0), direction="minimize")
    assert record.hypervolume() == pytest.approx(2 * 0.8)  # at twice the loss nothing is left
    assert record.drop(record.trials[1]) == pytest.approx(0.1)
    assert [t.number for t in record.front] == [2, 1, 0]
    assert study(trial(0, 4096, 0.0), trial(1, 1024, 0.25), direction="minimize").hypervolume() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("direction", "base", "asked", "limit"),
    [
        ("maximize", 0.8, "1%", 0.01),  # a fraction: a point
        ("maximize", 0.8, " 0.5 % ", 0.005),
        ("maximize", 0.8, 0.02, 0.02),
        ("maximize", 0.8, "0.02", 0.02),
        ("maximize", 80.0, "1%", 0.8),  # not a fraction: of the baseline's value
        ("maximize", -40.0, "10%", 4.0),
        ("minimize", 0.5, "1%", 0.005),  # a loss: of the baseline's value
        ("minimize", 0.5, 0.02, 0.02),
        ("maximize", 0.8, 0, 0.0),
        ("maximize", 0.8, None, None),
    ],
)
def test_what_a_drop_means(direction, base, asked, limit):
    record = study(trial(0, 4096, base), direction=direction)
    assert record.metric_limit(asked) == (None if limit is None else pytest.approx(limit))


def test_points_within_limits_are_exact_at_the_edge():
    record = study(*TRIALS)
    assert [t.number for t in record.within(max_drop=0.08)] == [2, 1]
    assert [t.number for t in record.within(max_drop=0.0799)] == [1]
    assert [t.number for t in record.within(max_size=512)] == [5, 4, 2]
    assert [t.number for t in record.within(max_size=511)] == [5, 4]
    assert record.within(0.08, 511) == ()
    assert [t.number for t in record.within()] == [5, 4, 2, 1]


def test_nearest_misses_by_the_least():
    record = study(*TRIALS)
    assert record.nearest(max_size=100).number == 5
    assert record.nearest(max_drop=0.0).number == 1
    # trial 2 misses the size by 512 / 500 - 1 = 2 %; trial 4 the drop by 0.4 / 0.1 - 1 = 300 %
    assert record.nearest(0.1, 500).number == 2
    # misses of size plus drop: trial 2 156 + 0 %, trial 4 28 + 3 %, trial 5 0 + 105 %
    assert record.nearest(0.39, 200).number == 4
    met = record.within(0.5, 300)
    assert record.nearest(0.5, 300) in met


def test_a_password_is_not_told():
    for uri, told in (
        ("postgresql://me:secret@db:5432/runs?x=1", "postgresql://db:5432/runs?x=1"),
        ("http://me@host:5000", "http://host:5000"),
        ("sqlite:///runs/a@b/mlflow.db", "sqlite:///runs/a@b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ):
        assert study(tracking_uri=uri).to_front_json()["tracking_uri"] == told


def test_a_drop_needs_a_baseline():
    for ask in (lambda r: r.drop(TWO), lambda r: r.metric_limit("1%"), lambda r: r.within(max_drop=0.1)):
        with pytest.raises(UsageError, match="study 'mine' has no result of trial 0, from which a drop is measured"):
            ask(study(TWO))
    assert study(TWO).metric_limit(0.1) == 0.1


def test_an_empty_front_says_so():
    record = study(FAILED)
    for ask in (record.knee, record.best, record.nearest):
        with pytest.raises(UsageError, match="study 'mine' has no finished trial yet"):
            ask()
    assert record.baseline is None
    assert record.hypervolume() == 0


@pytest.mark.parametrize(("text", "size"), [
    ("50KB", 50_000), ("1.5MB", 1_500_000), ("800B", 800), ("800", 800), (800, 800), ("4 kib", 4096), ("2MiB", 2 << 20),
    ("1GB", 10**9), ("0.5kb", 500), ("1e3", 1000),
])  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "KB", "banana", "-5KB", "0", "0.2", "nan", "inf", "5 apples", "5KBB", "5TB", "1,5MB"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match=r"max-size is .*, allowed: bytes such as 50KB, 1.5MB or 800"):
        parse_size(text)


def test_drops():
    assert parse_drop("1%") == (0.01, True)
    assert parse_drop(0.01) == (0.01, False)
    assert parse_drop("0") == (0.0, False)
    for text in ("banana", "", "%", "-1%", "nan", "inf%", "1%%", -0.1, math.nan):
        with pytest.raises(UsageError, match=r"max-drop is .*, allowed: a percentage such as 1% or a number"):
            parse_drop(text)


def test_the_front_as_json_keeps_the_contract():
    record = study(*TRIALS, tracking_uri="sqlite:///x", run_id="abc")
    told = json.loads(json.dumps(record.to_front_json(), allow_nan=False))
    assert set(told) == {
        "study", "task", "metric", "direction", "seed", "trials", "baseline", "hypervolume", "tracking_uri", "run_id",
        "front",
    }  # fmt: skip
    assert told["trials"] == {"complete": 6, "stopped": 1, "failed": 1}
    assert told["baseline"] == {"size_bytes": 4096, "metric_val": 0.80, "metric_test": 0.79}
    assert told["hypervolume"] == pytest.approx(3.4)
    assert (told["study"], told["task"], told["seed"], told["direction"]) == ("mine", "task.py:task", 3, "maximize")
    point = told["front"][2]
    assert set(point) == {
        "trial", "size_bytes", "ratio", "metric_val", "metric_test", "macs", "artifact", "plan", "recipe",
    }  # fmt: skip
    assert (point["trial"], point["size_bytes"], point["ratio"], point["macs"]) == (2, 512, 8.0, 702)
    assert {k: point["plan"]["fc"][k] for k in ("rank", "bits", "threshold")} == {
        "rank": 2,
        "bits": 3,
        "threshold": 0.5,
    }
    assert point["recipe"].items() >= {"epochs": 2.0, "learning_rate": 0.01, "distillation": 0.25}.items()
    bare = TrialRecord(0, "complete", Plan({"": LayerPlan()}), 0, BASE.measurements, BASE.best)
    assert list(study(bare).to_front_json()["front"][0]["plan"]) == ["model"]
    child = study(BASE, replace(TRIALS[2], parent=0), target="onnx").to_front_json()
    assert child["target"] == "onnx"
    assert {point["trial"]: point.get("parent") for point in child["front"]} == {2: 0, 0: None}
    empty = study().to_front_json()
    assert empty["baseline"] == {"size_bytes": 4096, "metric_val": None, "metric_test": None}
    assert empty["front"] == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("autocompress search digits --max-drop 1%", "autocompress search digits --max-drop 1%"),
        ("autocompress search /home/me/my.py:task", "autocompress search my.py:task"),
        ("autocompress search digits --dir=../me/runs/", "autocompress search digits --dir=runs"),
        ("autocompress search '~/a b/my.py'", "autocompress search my.py"),
        ("autocompress search digits --tracking-uri http://host:5000/m", "autocompress search digits --tracking-uri m"),
        ("autocompress.search('it/s')", "autocompress.search('it/s')"),
    ],
)
def test_a_command_is_told_without_folders(command, told):
    assert without_folders(command) == told
