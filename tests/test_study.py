"""The study on disk: proposals, results, crashes, samplers, and what Optuna itself reads of it."""

import errno
import json
import os
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from autocompress.errors import AutocompressError, StudyError, UsageError
from autocompress.plan import LayerSpec, Measurement
from autocompress.search.disk import disk_errors
from autocompress.search.samplers import OPTUNA
from autocompress.search.space import ladder
from autocompress.search.space_file import load_space
from autocompress.search.study import Settings, StudyStore

SPECS = (
    LayerSpec("fc1", "linear", (24, 32), 768),
    LayerSpec("fc2", "linear", (24, 24), 576),
    LayerSpec("fc3", "linear", (10, 24), 240),
)
TINY = {"version": 1, "layers": [{"bits": [2, 4]}], "recipe": {"learning_rate": 1e-3}}  # 3 knobs, 27 plans

QUICK = [sampler for sampler in OPTUNA if sampler != "gp"]
SLOW = pytest.param("gp", marks=pytest.mark.slow)  # it loads torch and scipy, and takes a second a trial


def settings(direction="maximize", sampler="random", space="default", seed=0, steps=4) -> Settings:
    return Settings(
        study="s",
        task="t",
        metric="accuracy",
        direction=direction,
        seed=seed,
        sampler=sampler,
        baseline_bytes=6500,
        layers=SPECS,
        space=dict(load_space(space, SPECS).source),
        fingerprint={"model": "abc", "space": "def"},
        epochs=2.0,
        rungs=(0.0, 0.25, 1.0),
        steps=steps,
        command="autocompress search t",
        created="2026-01-02T03:04:05+0000",
        versions={"torch": "2"},
        origin={"task": "t"},
    )


def begin(store: StudyStore, asked: int, workers: int = 2) -> StudyStore:
    space = load_space(store.settings.space, SPECS)
    store.begin(space, ladder(space, SPECS, store.settings.steps), asked, workers)
    return store


def create(folder: Path, asked: int = 12, **more) -> StudyStore:
    return begin(StudyStore.create(folder / "study.db", settings(**more)), asked)


def reopened(store: StudyStore) -> StudyStore:
    return StudyStore.open(store.file)


def measure(plan, number: int, sign: float = 1.0) -> list[Measurement]:
    """Made-up rungs that follow from the plan; the second one is the best."""
    bits = sum(layer.bits for layer in plan.layers.values()) / len(plan.layers)
    kept = sum((layer.rank or 24) / (1 + layer.threshold) for layer in plan.layers.values())
    size = round(200 + 20 * bits + kept)
    metric = 0.9 - 0.3 / bits - 0.2 / kept
    drops = (0.05, 0.0, 0.01)
    return [Measurement(r, r / 2, size + 9 - r, sign * (metric - drop), 1584, 0.1 * r) for r, drop in enumerate(drops)]


def run(store: StudyStore, trials: int = 1000) -> list[int]:
    """Propose and finish up to so many trials; every fifth fails."""
    done = []
    while len(done) < trials and (proposal := store.propose()) is not None:
        number = proposal.number
        if number % 5 == 4:
            store.finish(number, [], state="failed", error="loss is nan", seconds=0.5)
        else:
            state = "stopped" if number % 5 == 3 else "complete"
            sign = 1.0 if store.settings.direction == "maximize" else -1.0
            store.finish(number, measure(proposal.plan, number, sign), state=state, sha256=f"{number:x}", seconds=1.5)
        done.append(number)
    return done


# proposals


def test_trial_0_changes_nothing_then_comes_the_ladder_then_the_sampler(tmp_path):
    store = create(tmp_path, 9)
    proposals = [store.propose() for _ in range(9)]
    assert [p.number for p in proposals] == list(range(9))
    assert [p.origin for p in proposals] == ["baseline"] + ["ladder"] * 4 + ["sampler"] * 4
    first = proposals[0].plan
    assert first.recipe.epochs == 0
    assert all((la.rank, la.bits, la.threshold) == (None, 32, 0.0) for la in first.layers.values())
    assert proposals[5].plan.recipe.epochs == 2.0  # what the settings say where the space does not
    assert store.propose() is None


@pytest.mark.parametrize("sampler", QUICK)
def test_no_plan_is_proposed_twice_until_a_small_space_is_spent(tmp_path, sampler):
    store = create(tmp_path, 500, sampler=sampler, space=TINY)
    assert run(store) == list(range(28))  # 27 plans and the uncompressed model
    plans = [t.plan.key() for t in store.record().trials]
    assert len(set(plans)) == 28
    assert store.propose() is None
    again = begin(reopened(store), 500)
    assert again.propose() is None


def test_trials_that_run_at_the_same_time_differ(tmp_path):
    store = create(tmp_path, 500, space=TINY)
    proposals = []
    while (proposal := store.propose()) is not None:
        proposals.append(proposal)
    assert len({p.plan.key() for p in proposals}) == len(proposals) == 28


def test_quantize_only_with_one_layer_ends(tmp_path):
    space = {"version": 1, "layers": [{"match": "fc1", "bits": [2, 8]}], "recipe": {"learning_rate": 1e-3}}
    store = create(tmp_path, 100, space=space)
    run(store)
    assert sorted(t.plan.layers["fc1"].bits for t in store.record().trials) == [2, 3, 4, 5, 6, 7, 8, 32]


def test_a_space_without_a_knob_gives_its_one_plan(tmp_path):
    space = {"version": 1, "layers": [{"bits": 4}], "recipe": {"learning_rate": 1e-3}}
    store = create(tmp_path, 10, space=space)
    assert run(store) == [0, 1]


def test_seeds_decide(tmp_path):
    def keys(folder, seed):
        store = create(tmp_path / folder, 10, seed=seed)
        run(store)
        return [t.plan.key() for t in store.record().trials], [t.seed for t in store.record().trials]

    assert keys("a", 3) == keys("b", 3)
    assert keys("c", 4)[0][5:] != keys("a2", 3)[0][5:]
    assert len(set(keys("d", 3)[1])) == 10


# what is kept


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_reopened_study_has_an_equal_record(tmp_path, direction):
    store = create(tmp_path, direction=direction)
    run(store)
    store.note_tests({0: 0.91, 2: 0.88})
    store.note_tracking("sqlite:///x.db", "1", "abc")
    record = store.record()
    assert reopened(store).record() == record
    assert reopened(store).settings == store.settings
    assert (record.asked, record.workers, record.run_id) == (12, 2, "abc")
    assert record.trials[2].metric_test == 0.88
    assert [t.state for t in record.trials[:5]] == ["complete", "complete", "complete", "stopped", "failed"]
    assert record.trials[4].error == "loss is nan"


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1.0), ("minimize", -1.0)])
def test_the_best_rung_counts(tmp_path, direction, sign):
    store = create(tmp_path, direction=direction)
    rungs = [
        Measurement(0, 0.0, 900, sign * 0.5, 1, 0.1),
        Measurement(1, 0.5, 800, sign * 0.8, 1, 0.2),
        Measurement(2, 1.0, 700, sign * 0.8, 1, 0.3),  # as good, and smaller
        Measurement(3, 2.0, 600, sign * 0.7, 1, 0.4),
    ]
    number = store.propose().number
    assert store.finish(number, rungs, state="complete").best == rungs[2]
    assert reopened(store).record().trials[0].best == rungs[2]
    assert reopened(store).record().trials[0].measurements == tuple(rungs)
    assert optuna_study(store).trials[0].values == [700.0, sign * 0.8]


def test_artifacts_are_named_for_the_front_and_the_baseline_only(tmp_path):
    store = create(tmp_path, 20)
    run(store)
    record = store.record()
    assert {t.number for t in record.trials if t.artifact} == {t.number for t in record.front} | {0}


def test_a_trial_without_a_measurement_can_only_have_failed(tmp_path):
    store = create(tmp_path)
    with pytest.raises(ValueError, match="without a measurement"):
        store.finish(store.propose().number, [], state="complete")


# crashes


def test_trials_of_a_dead_process_are_proposed_again_under_their_numbers(tmp_path):
    store = create(tmp_path, 12)
    run(store, 5)
    lost = [store.propose() for _ in range(3)]
    kept = {t.number: t for t in store.record().trials if t.state != "running"}
    again = begin(reopened(store), 12)
    assert [again.propose() for _ in range(3)] == lost
    for proposal in lost[::-1]:  # they may end in any order
        again.finish(proposal.number, measure(proposal.plan, 1), state="complete", sha256="x")
    assert run(again) == list(range(8, 12))
    record = reopened(again).record()
    assert [t.number for t in record.trials] == list(range(12))
    assert not record.count("running")
    assert all(record.trials[n] == t for n, t in kept.items() if t.artifact is None)
    assert len({t.plan.key() for t in record.trials}) == 12


@pytest.mark.parametrize("sampler", [*QUICK, SLOW])
def test_a_sampler_learns_from_trials_before_the_crash(tmp_path, sampler):
    store = create(tmp_path, 9, sampler=sampler, space=TINY if sampler == "gp" else "default")
    run(store, 6)
    lost = store.propose()
    again = begin(reopened(store), 9)
    found = again.propose()
    assert found == lost
    again.finish(found.number, measure(found.plan, 1), state="complete")
    told = again._memory.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    record = again.record()
    assert sorted(t.values for t in told) == sorted(
        [float(t.best.size_bytes), t.best.metric_val] for t in record.measured
    )
    assert run(again) == [7, 8]


def test_a_creation_that_was_cut_short_leaves_no_study(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", die)
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path)
    assert not (tmp_path / "study.db").exists()
    assert run(create(tmp_path, 3)) == [0, 1, 2]


# samplers and Optuna


def optuna_study(store: StudyStore) -> optuna.Study:
    return optuna.load_study(study_name="study", storage=f"sqlite:///{store.file}")


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("sampler", [*QUICK, SLOW])
def test_every_sampler_works(tmp_path, sampler, direction):
    space = {"version": 1, "layers": [{"bits": [2, 8], "threshold": [0.0, 2.0]}]} if sampler == "gp" else "default"
    store = create(tmp_path, 15, sampler=sampler, direction=direction, space=space, steps=9 if sampler == "gp" else 4)
    assert run(store) == list(range(15))
    assert len({t.plan.key() for t in store.record().trials}) == 15


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_optuna_reads_the_study(tmp_path, direction):
    store = create(tmp_path, 20, sampler="nsga2", direction=direction)
    run(store)
    running = begin(reopened(store), 21).propose()
    study, record = optuna_study(store), store.record()
    assert [d.name for d in study.directions] == ["MINIMIZE", direction.upper()]
    assert [t.number for t in study.trials] == list(range(21))
    states = {"complete": "COMPLETE", "stopped": "COMPLETE", "failed": "FAIL"}
    for mine, theirs in zip(record.trials, study.trials, strict=False):
        assert theirs.state.name == states[mine.state]
        assert theirs.values == (None if mine.best is None else [mine.best.size_bytes, mine.best.metric_val])
        assert theirs.datetime_start <= theirs.datetime_complete
        assert theirs.user_attrs["plan"] == mine.plan.to_json()
    assert (study.trials[20].state.name, study.trials[20].user_attrs["plan"]) == ("RUNNING", running.plan.to_json())
    assert {t.number for t in study.best_trials} >= {t.number for t in record.front}
    assert {tuple(t.values) for t in study.best_trials} == {
        (t.best.size_bytes, t.best.metric_val) for t in record.front
    }


def test_parameters_in_the_study_mean_its_plans(tmp_path):
    store = create(tmp_path, 15, sampler="tpe")
    run(store)
    space = load_space("default", SPECS)
    trials = optuna_study(store).trials
    assert all(t.distributions == space.distributions() for t in trials)
    assert all(space.plan(t.params, 2.0).to_json() == t.user_attrs["plan"] for t in trials[1:])


def test_rows_are_those_that_optuna_writes(tmp_path):
    """The same trials told to Optuna through its own functions: all tables hold the same."""
    store = create(tmp_path, 15, sampler="nsga2")
    run(store)
    mine = optuna_study(store)
    other = optuna.create_study(
        study_name="study", storage=f"sqlite:///{tmp_path}/other.db", directions=["minimize", "maximize"]
    )
    other.add_trials(mine.trials)
    tables = {"trials": "number, state", "trial_values": "trial_id, objective, value, value_type"}
    tables["trial_params"] = "trial_id, param_name, param_value, distribution_json"
    tables["trial_user_attributes"] = tables["trial_system_attributes"] = "trial_id, key, value_json"
    for table, columns in tables.items():
        rows = []
        for file in (store.file, tmp_path / "other.db"):
            with sqlite3.connect(file) as connection:
                rows.append(sorted(connection.execute(f"SELECT {columns} FROM {table}").fetchall()))
        assert rows[0] == rows[1]
        assert rows[0]


def test_a_study_of_optuna_goes_on_from_plain_optuna(tmp_path):
    """What the samplers of a plain study make of ours: `ask` works on the file as it is."""
    store = create(tmp_path, 15)
    run(store)
    trial = optuna_study(store).ask(load_space("default", SPECS).distributions())
    assert trial.params.keys() == load_space("default", SPECS).distributions().keys()


# files that are no study


def one_line(error: pytest.ExceptionInfo) -> str:
    assert isinstance(error.value, AutocompressError)
    assert error.value.exit_code == 2
    text = str(error.value)
    assert "\n" not in text
    return text


def test_an_occupied_file_is_not_overwritten(tmp_path):
    run(create(tmp_path, 3))
    with pytest.raises(StudyError, match="exists already"):
        create(tmp_path)
    assert len(StudyStore.open(tmp_path / "study.db").record().trials) == 3


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(StudyError, match="no study in"):
        StudyStore.open(tmp_path / "study.db")
    assert not list(tmp_path.iterdir())


def test_a_foreign_sqlite_file_is_refused_and_left_as_it_was(tmp_path):
    file = tmp_path / "study.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    before = file.read_bytes()
    with pytest.raises(StudyError) as error:
        StudyStore.open(file)
    assert str(file) in one_line(error)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["study", "other"])
def test_a_study_of_somebody_else_is_refused(tmp_path, name):
    optuna.create_study(study_name=name, storage=f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(StudyError) as error:
        StudyStore.open(tmp_path / "study.db")
    assert "study.db" in one_line(error)


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, "half"])
def test_a_corrupt_file_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "study.db"
    if content == "half":
        store = create(tmp_path)
        run(store)
        store._engine.dispose()
        raw = file.read_bytes()
        rng = random.Random(0)
        content = raw[:4096] + rng.randbytes(len(raw) - 4096)
    file.write_bytes(content)
    with pytest.raises(StudyError) as error:
        StudyStore.open(file)
    assert str(file) in one_line(error)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AutocompressError) as error:
        create(tmp_path / "file" / "s")
    assert "file" in one_line(error)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Refused by the system, as for an ordinary user; root, who runs this too, may write anywhere."""

    def refuse(path: Path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AutocompressError) as error:
        create(tmp_path / "closed" / "s")
    assert "Permission denied" in one_line(error)
    assert str(tmp_path / "closed" / "s") in one_line(error)


def test_a_path_may_hold_anything(tmp_path):
    folder = tmp_path / "50% {of} it? #1 & ünï 🎈"
    store = create(folder, 3)
    run(store)
    assert (folder / "study.db").is_file()
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert len(reopened(store).record().trials) == 3


def test_an_unknown_sampler_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"sampler is 'foo', allowed: tpe, nsga2"):
        create(tmp_path, sampler="foo")


def test_a_study_from_before_rates_and_states_goes_on(tmp_path):
    """Its JSON lacks what came later, in settings and in plans."""
    store = create(tmp_path, 8, space="mlp")
    run(store, 6)
    assert store.propose().number == 6
    with sqlite3.connect(store.file) as connection:
        for kind, key in (("study", "autocompress"), ("trial", "plan")):
            table, column = f"{kind}_user_attributes", f"{kind}_user_attribute_id"
            rows = connection.execute(f"SELECT {column}, value_json FROM {table} WHERE key = ?", (key,)).fetchall()
            for row, text in rows:
                value = json.loads(text)
                for name in ("inherit", "sweep", "rate", "infomax", "precision", "accumulation"):
                    value.get("recipe", value).pop(name, None)
                connection.execute(f"UPDATE {table} SET value_json = ? WHERE {column} = ?", (json.dumps(value), row))
    connection.close()
    before = store.record()
    again = begin(reopened(store), 8)
    assert again.record().trials == before.trials
    assert not again.settings.inherit
    assert run(again) == [6, 7]


@pytest.mark.parametrize("failed", [False, True])
def test_continuation_goes_on_while_the_baseline_runs_and_after_it_failed(tmp_path, failed):
    store = create(tmp_path, 8, sampler="continuation", space="continuation", steps=0)
    assert [store.propose().number for _ in range(3)] == [0, 1, 2]
    if failed:
        store.finish(0, [], state="failed", error="the worker process died")
    store.finish(1, [Measurement(0, 2.0, 900, 0.9, 10, 0.1)], state="complete", sha256="1")
    proposal = store.propose(states=[1])
    assert (proposal.number, proposal.parent) == (3, 1)


@pytest.mark.parametrize(("sampler", "all_of_them"), [("continuation", 40), ("tpe", 13)])
def test_a_sweep_rises_faster_only_where_time_ends_before_it(tmp_path, sampler, all_of_them):
    def price(expected):
        folder = tmp_path / str(expected)
        folder.mkdir()
        made = replace(settings(sampler=sampler, space="continuation", steps=0), chains=1, chain=12, sweep=12)
        store = begin(StudyStore.create(folder / "study.db", made), 40)
        store.propose(), store.propose()
        store.finish(1, [Measurement(0, 2.0, 900, 0.9, 10, 0.1)], state="complete", sha256="1")
        return store.propose(states=[1], expected=expected).plan.recipe.rate

    usual = price(None)
    assert price(all_of_them) == price(10 * all_of_them) == usual
    assert price(6) > 2 * usual
    assert price(2) == pytest.approx(25)


@pytest.mark.parametrize(
    ("direction", "baseline", "metric", "double"),
    [
        ("maximize", 0.95, 0.95, True),
        ("maximize", 0.95, 0.9491, True),
        ("maximize", 0.95, 0.9489, False),
        ("minimize", 0.2, 0.19, True),
        ("minimize", 0.2, 0.2009, True),
        ("minimize", 0.2, 0.2011, False),
        ("maximize", None, 0.95, False),
    ],
)
def test_a_chain_that_lost_nothing_takes_a_double_step(tmp_path, direction, baseline, metric, double):
    made = settings(direction, sampler="continuation", space="continuation", steps=0)
    store = begin(StudyStore.create(tmp_path / "study.db", replace(made, chains=1, chain=12)), 40)
    store.propose(), store.propose()
    if baseline is None:
        store.finish(0, [], state="failed", error="the worker process died")
    else:
        store.finish(0, [Measurement(0, 0.0, 6500, baseline, 10, 0.1)], state="complete", sha256="0")
    store.finish(1, [Measurement(0, 2.0, 900, metric, 10, 0.1)], state="complete", sha256="1")
    rate = store.propose(states=[1]).plan.recipe.rate
    assert rate == pytest.approx(0.1 * 250 ** ((2 if double else 1) / 11))


def test_a_study_on_a_disk_that_is_read_only_is_shown(tmp_path, monkeypatch):
    """As SQLite refuses it there: neither the file nor those beside it can be made or locked."""
    file = tmp_path / "study.db"
    StudyStore.create(file, settings())._engine.dispose()
    opened, found = sqlite3.connect, []

    def refuse(address, *rest, **more):
        found.append(str(address))
        if "immutable=1" not in str(address):
            raise sqlite3.OperationalError("unable to open database file")
        return opened(address, *rest, **more)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    assert StudyStore.open(file).settings == settings()
    assert any("immutable" not in address for address in found)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("study.db", "the file may not be read by this user"),
        ("", "folder '.*' may not be written by this user"),
        ("none", "cannot be used: attempt to write a readonly database$"),
    ],
)
def test_what_may_not_be_written_is_named(tmp_path, monkeypatch, refused, said):
    file = tmp_path / "study.db"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / refused)
    with pytest.raises(StudyError, match=said), disk_errors(file):
        raise sqlite3.OperationalError("attempt to write a readonly database")
