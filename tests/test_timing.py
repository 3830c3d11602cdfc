"""Latency as the third objective: limits, fronts, hypervolumes, what Optuna is told, and a search from end to end."""

import json
import math
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_search import local, one_thread, write_task  # noqa: F401 (fixtures)
from test_cli import done, fail, work  # noqa: F401 (fixtures)
from test_pareto import beats
from test_record import BASE, TRIALS, study, trial
from test_study import begin, settings
from test_trial import task_of

from autocompress import api, report
from autocompress.deploy.target import check_target
from autocompress.errors import StudyError, UsageError
from autocompress.folders import Records
from autocompress.limits import parse_latency
from autocompress.plan import LayerSpec, Measurement
from autocompress.record import Latency, fastest_of, name_points
from autocompress.results import pick
from autocompress.search.samplers import OPTUNA
from autocompress.search.space_file import load_space
from autocompress.search.study import Settings, StudyStore
from autocompress.timing import STEPS_PER_OCTAVE, Timing, ratio_of, step
from autocompress.tracking.runs import trial_run
from autocompress.tracking.view import view_state
from autocompress.trial import Workbench


def timed(given, latency):
    best = replace(given.best, latency=latency)
    return replace(given, best=best, measurements=(best,))


TIMING = Timing(1, baseline=0.004)
SLOW_BASE = timed(BASE, 1.0)
# 4096 bytes at 0.8 is the baseline; sizes are 2, 3 and 1 octaves smaller
FAST, SMALL, SLOWER = (
    timed(trial(1, 1024, 0.80), 0.5),
    timed(trial(2, 512, 0.72), 1.0),
    timed(trial(3, 2048, 0.80), 0.98),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7x", (0.7, True)),
        (0.5, (0.5, True)),
        ("2ms", (0.002, False)),
        ("150us", (1.5e-4, False)),
        ("1 S", (1, False)),
    ],
)
def test_limits_are_ratios_or_times(text, expected):
    number, relative = parse_latency(text)
    assert number == pytest.approx(expected[0])
    assert relative == expected[1]


@pytest.mark.parametrize("text", ["0.7", "fast", "", "0x", "-1ms", "nanx", "infs", "2m", "1xs", math.nan, 0, "1e999s"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(UsageError, match=r"max-latency is .*, allowed: times the float32 model's such as 0.7x"):
        parse_latency(text)


def test_a_time_is_compared_with_the_baseline():
    assert ratio_of("2ms", 0.004) == pytest.approx(0.5)
    assert ratio_of("0.7x", 0.004) == pytest.approx(0.7)
    assert Timing(8, limit="1ms").measured(0.004) == Timing(8, limit="1ms", baseline=0.004)
    assert Timing(8, limit="1ms").measured(0.004).most == 0.25
    assert Timing(1, limit="0.7x").measured(0.004).most == 0.7
    assert Timing(1).measured(0.1).most is Timing(8, limit="1ms").most is None
    for timing in (TIMING, Timing(8, 2, "1ms").measured(0.004)):
        assert Timing.from_json(json.loads(json.dumps(timing.to_json()))) == timing


@given(st.floats(1e-4, 1e3), st.floats(0.98, 1.02))
def test_noise_moves_a_latency_by_one_step_at_most(ratio, noise):
    assert step(ratio) * STEPS_PER_OCTAVE == round(step(ratio) * STEPS_PER_OCTAVE)
    assert abs(step(ratio) - math.log2(ratio)) <= 0.5 / STEPS_PER_OCTAVE + 1e-9
    assert abs(step(ratio * noise) - step(ratio)) <= 1 / STEPS_PER_OCTAVE


def test_a_front_of_three_objectives():
    record = study(SLOW_BASE, FAST, SMALL, SLOWER, timing=TIMING)
    assert [t.number for t in record.front] == [2, 1]  # trial 3 is no faster than noise tells, and larger than trial 1
    flat = replace(record, timing=None)
    assert [t.number for t in flat.front] == [2, 1]
    slow = study(SLOW_BASE, timed(FAST, 2.0), SMALL, timing=TIMING)
    assert [t.number for t in slow.front] == [2, 1, 0]  # the baseline is faster than trial 1
    assert slow.best().number == 1  # the smaller one of equal metrics
    assert fastest_of(slow, slow.front).number == 2
    named = [(name, t.number) for name, t in name_points(record)]
    assert named == [("smallest", 2), ("knee", 1)] or named == [("smallest", 2), ("best", 1)]


points = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(-3, 3)), min_size=1, max_size=8)


@given(points)
def test_the_front_is_what_nothing_beats(given_points):
    trials = [
        timed(trial(n, 256 * size, metric / 10), 2.0**speed) for n, (size, metric, speed) in enumerate(given_points)
    ]
    record = study(*trials, timing=TIMING)
    keys = [(size, -metric, speed) for size, metric, speed in given_points]
    wanted = {key for key in keys if not any(beats(other, key) for other in keys)}
    found = [keys[t.number] for t in record.front]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_hypervolume_by_hand():
    # boxes up to (0 octaves smaller, drop 1, twice as slow)
    assert study(SLOW_BASE, timed(trial(1, 128, 0.8), 1.0), timing=TIMING).hypervolume() == pytest.approx(5)
    assert study(SLOW_BASE, timed(trial(1, 128, 0.8), 0.5), timing=TIMING).hypervolume() == pytest.approx(10)
    assert study(SLOW_BASE, timed(trial(1, 128, 0.8), 2.0), timing=TIMING).hypervolume() == 0
    both = study(SLOW_BASE, FAST, SMALL, timing=TIMING)
    assert both.hypervolume() == pytest.approx(2 * 1.0 * 2 + 1 * 0.9 * 1)


def test_limits_choose():
    record = study(SLOW_BASE, FAST, SMALL, timing=TIMING)
    assert pick(record, max_latency="0.6x").number == 1
    assert pick(record, max_latency="2ms").number == 1  # half of 4 ms
    assert pick(record, max_latency="5ms").number == 2
    assert pick(record, choice="fastest").number == 1
    assert pick(record, choice="fastest", max_size=600).number == 2
    with pytest.raises(UsageError, match=r"no plan is within max-latency 1ms; the nearest is trial 1: .*latency 0.50x"):
        pick(record, max_latency="1ms")
    with pytest.raises(UsageError, match=r"allowed with max-drop, max-size and max-latency"):
        pick(record, choice="trial=1", max_latency="1x")


def test_where_nothing_was_timed_a_limit_says_what_to_do():
    record = study(*TRIALS)
    for wanted in ({"max_latency": "0.7x"}, {"choice": "fastest"}):
        with pytest.raises(UsageError, match=r"has no latencies.*autocompress bench mine"):
            pick(record, **wanted)
    benched = replace(TRIALS[1], latencies=(Latency("onnx", 1, 1, 0.001, 0.001, 0.001, 0.002, 0.5, 900),))
    record = study(TRIALS[0], benched, *TRIALS[2:])
    assert pick(record, max_latency="0.6x").number == pick(record, max_latency="1.1ms").number == 1
    assert pick(record, choice="fastest").number == 1
    assert pick(replace(record, target="executorch"), max_latency="1.1ms").number == 1  # `bench` times its ONNX file


def test_the_latest_measurement_counts_where_it_is_of_the_same_call():
    later = Latency("onnx", 1, 1, 0.001, 0.001, 0.001, 0.002, 0.6, 900)
    record = study(SLOW_BASE, replace(FAST, latencies=(later,)), timing=TIMING)
    assert record.latency(record.trials[1]) == 0.6
    others = replace(later, batch=32), replace(later, threads=2), replace(later, target="onnx-int8")
    other = replace(FAST, latencies=others)
    assert study(SLOW_BASE, other, timing=TIMING).latency(other) == 0.5
    assert study(SLOW_BASE, other, timing=TIMING, target="onnx-int8").latency(other) == 0.6


def test_what_is_dominated_when_all_are_timed_together_leaves_the_front():
    """By the trials 1 is a step faster than 4, which is smaller and better; timed beside each other it is slower."""
    better = timed(trial(4, 900, 0.81), 0.53)
    record = study(SLOW_BASE, FAST, better, timing=TIMING)
    assert [t.number for t in record.front] == [4, 1]
    assert step(0.5) < step(0.53)

    def again(given, ratio):
        return replace(given, latencies=(Latency("onnx", 1, 1, 0.001, 0.001, 0.001, 0.002, ratio, 900),))

    for ratio, left in ((0.56, [4]), (0.529, [4]), (0.48, [4, 1])):
        together = study(SLOW_BASE, again(FAST, ratio), again(better, 0.53), timing=TIMING)
        assert [t.number for t in together.front] == left
        assert together.hypervolume() == record.hypervolume()
        assert together.knee().number in left


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.floats(0.3, 1.2), st.floats(0.3, 1.2)), max_size=8))
def test_each_member_of_a_front_is_beaten_by_none_as_it_is_shown(drawn):
    trials = [
        replace(
            timed(trial(number, 100 * size, 0.5 + metric / 10), first),
            latencies=(Latency("onnx", 1, 1, 0.001, 0.001, 0.001, 0.002, again, 900),),
        )
        for number, (size, metric, first, again) in enumerate(drawn, start=1)
    ]
    record = study(SLOW_BASE, *trials, timing=TIMING)
    shown = [(t.best.size_bytes, -t.best.metric_val, record.latency(t)) for t in record.front]
    assert shown
    for a, b in permutations(shown, 2):
        assert not all(x <= y for x, y in zip(a, b, strict=True))


def test_it_is_shown(tmp_path):
    record = study(SLOW_BASE, FAST, SMALL, timing=TIMING)
    data = record.to_front_json()
    assert data["latency"]["baseline"] == 0.004
    assert [point["latency"] for point in data["front"]] == [1.0, 0.5]
    assert "4 ms a call of 1" in report.baseline_text(record)
    assert "latency 0.50x" in report.trial_summary(record, FAST)
    assert "0.50x" in report.describe(record)
    assert "--format onnx -o" in report.describe(record)
    assert "--format onnx-int8 -o" in report.describe(replace(record, target="onnx-int8"))
    files = report.write_front(record, tmp_path)
    assert [file.stat().st_size > 0 for file in files] == [True] * 4
    assert "latency" in files[1].read_text().splitlines()[0].split(",")
    assert "time over float32's" in files[3].read_text()
    assert trial_run(record, FAST, True).latest["latency"] == 0.5
    assert "metrics.`latency`" in view_state(record)["selectedColumns"]
    plain = study(*TRIALS)
    assert "latency" not in json.dumps(plain.to_front_json())
    assert "metrics.`latency`" not in view_state(plain)["selectedColumns"]


def test_old_measurements_have_none_and_new_ones_come_back():
    old = {"rung": 1, "epoch": 2.0, "size_bytes": 10, "metric_val": 0.5, "macs": 3, "seconds": 1.0}
    assert Measurement.from_json(old).latency is None
    assert Measurement.from_json(old).to_json() == old
    new = replace(Measurement.from_json(old), latency=0.25)
    assert Measurement.from_json(json.loads(json.dumps(new.to_json()))) == new


@pytest.mark.parametrize("sampler", [*(s for s in OPTUNA if s != "gp"), pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_take_three_objectives_and_the_limit(tmp_path, sampler):
    timing = Timing(1, limit="0.5x").measured(0.01)
    made = begin(StudyStore.create(tmp_path / "s.db", replace(settings(sampler=sampler), timing=timing)), 14)
    while (proposal := made.propose()) is not None:
        bits = sum(layer.bits for layer in proposal.plan.layers.values())
        latency = 1.0 if proposal.number == 0 else 0.1 + bits / 20
        found = Measurement(2, 1.0, 100 * bits, 0.5 + bits / 1000, 7, 0.1, latency)
        made.finish(proposal.number, [found], state="complete")
    record = StudyStore.open(made.file).record()
    assert record.timing == timing
    loaded = optuna.load_study(study_name="study", storage=f"sqlite:///{made.file}")
    assert [d.name for d in loaded.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    for told, mine in zip(loaded.trials, record.trials, strict=True):
        assert told.values == [mine.best.size_bytes, mine.best.metric_val, mine.best.latency]
        assert told.constraints == {"latency": pytest.approx(mine.best.latency - 0.5)}
    again = begin(StudyStore.open(made.file), 16)
    again.propose()  # what is there is given to a sampler again
    for store in (made, again):
        told = [trial for trial in store._memory.trials if trial.values]
        assert len(told) == 14
        assert all(trial.constraints == {"latency": trial.values[2] - 0.5} for trial in told)


def test_settings_come_back(tmp_path):
    for timing in (None, TIMING):
        given = replace(settings(), timing=timing)
        assert Settings.from_json(json.loads(json.dumps(given.to_json()))) == given
    before = settings().to_json()
    del before["timing"]  # of a study begun earlier
    assert Settings.from_json(before).timing is None


def test_targets_that_cannot_be_timed_are_refused():
    with pytest.raises(UsageError, match="latency is an objective and the target 'executorch'"):
        check_target("executorch", timing=Timing())
    with pytest.raises(UsageError, match="batch is 0, allowed: 1 to"):
        check_target("onnx", timing=Timing(0))
    check_target("archive", timing=Timing(32))


def test_what_is_asked_for_is_what_is_timed():
    assert api._timing(None, None) is None
    assert api._timing(32, None) == Timing(32)
    assert api._timing(None, 0.7) == api._timing(1, "0.7x") == Timing(limit="0.7x")
    assert api._timing(8, "2ms") == Timing(8, limit="2ms")
    with pytest.raises(UsageError, match="max-latency is 'quick'"):
        api._timing(None, "quick")


def test_a_study_goes_on_with_its_own_latency():
    old = replace(settings(), timing=Timing(8, limit="2ms").measured(0.01))
    api._same_study(old, replace(old, timing=Timing(8, limit="2ms").measured(0.02)))  # measured when it began
    for timing, said in ((Timing(8, limit="3ms"), "at most 3ms"), (Timing(1, limit="2ms"), "batch 1"), (None, "none")):
        with pytest.raises(StudyError, match=rf"exists with latency batch 8, at most 2ms, not .*{said}"):
            api._same_study(old, replace(old, timing=timing, fingerprint={**old.fingerprint, "space": "its default"}))


def test_a_study_of_other_layers_is_told_by_them():
    """The space's fingerprint differs too, though its file is the same."""
    one, two = (LayerSpec(name, "linear", (4, 3), 12) for name in ("0", "2"))
    old = replace(settings(), layers=(one,))
    api._same_study(old, old)
    with pytest.raises(StudyError, match=r"has 1 layers, the model now 2: another version"):
        api._same_study(old, replace(old, layers=(one, two), fingerprint={**old.fingerprint, "space": "another"}))


def test_the_space_that_is_searched_for_time():
    bench = Workbench(task_of())

    def named(space=None, target="onnx", along=False, timed=True):
        return api._space(space, bench, target, along=along, timed=timed).source

    def read(name):
        return load_space(name, bench.layers, bench.rank_errors).source

    assert named() == read("fast")
    assert named(timed=False) == read("default")
    assert named("prune_only") == read("prune_only")
    assert named(along=True) == read("continuation")


def test_latencies_are_kept_before_what_says_that_a_trial_is_measured(monkeypatch, tmp_path):
    """Of a search that is killed in between, `resume` measures both again."""
    record = study(SLOW_BASE, replace(FAST, artifact="mine/1.acz"), timing=TIMING)
    monkeypatch.setattr(api, "records_of", lambda records, store: record)
    kept = []
    store = SimpleNamespace(note_latencies=lambda found: kept.append(("latencies", found)), note_tests=kept.append)

    def tested(task, files, *, decided, untested):
        return dict.fromkeys(untested, 0.5), {n: (str(files[n]),) for n in files}

    aim = SimpleNamespace(tested=tested, timing=TIMING, format="onnx")
    api._measure_front(store, Records(tmp_path), None, None, aim)
    assert kept == [("latencies", {1: (str(Records(tmp_path).root / "mine/1.acz"),)}), {1: 0.5}]


def test_mistakes_show_at_once(fail, work):  # noqa: F811
    write_task(work)
    for options in (["--max-latency", "quick"], ["--latency", "0"], ["--latency", "-3"], ["--latency", "x"]):
        said = fail(2, "search", "waves.py:task", *options)
        assert "Traceback" not in said
        assert "allowed" in said or "whole number" in said
    assert "max-latency is '3'" in fail(2, "export", "--max-latency", "3", "-o", "out")


@pytest.mark.slow
def test_a_search_for_speed(work, local, done, fail):  # noqa: F811
    write_task(work)
    begun = ["search", "waves.py:task", "--study", "waves", "--trials", "4", "--finetune-epochs", "0.2"]
    text = done(*begun, "--max-latency", "20x")
    assert "latency" in text
    assert "ms a call of 1" in text
    assert "goal met" in text
    assert "--max-latency 20x" in text
    front = json.loads(done("front", "waves", "--json"))
    assert front["latency"]["most"] == 20
    assert all(point["latency"] > 0 for point in front["front"])
    assert all(point["latencies"] for point in front["front"] if point["trial"])
    assert "exists with latency batch 1, at most 20x, not none" in fail(2, *begun)
    done("resume", "waves", "--trials", "5")
    done("export", "waves", "--pick", "fastest", "-o", "out")
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["recorded"]["latency"] > 0
