"""What the driver does with the results of trials, without Ray: files, rows, decisions, who is told."""

import hashlib
import random
import time
from dataclasses import replace

import pytest
from test_study import SPECS, begin, settings

from autocompress.errors import RecordError, UsageError
from autocompress.folders import Records, write_file
from autocompress.plan import Measurement
from autocompress.search.moasha import Decision
from autocompress.search.study import StudyStore
from autocompress.session import Session, Silent, untested
from autocompress.timing import Timing
from autocompress.tracking import Home


class Told(Silent):
    """A tracker and listener that notes what it hears."""

    home = problem = None

    def __init__(self):
        self.logged, self.heard, self.begun = [], [], []

    def log(self, record, trial):
        self.logged.append((record, trial))

    def started(self, job):
        self.begun.append(job.number)

    def ended(self, trial, record):
        self.heard.append((record, trial))


def session(folder, asked=100, direction="maximize", deadline=None, steps=2, timing=None) -> Session:
    records = Records(folder)
    given = replace(settings(direction=direction, steps=steps), timing=timing)
    store = StudyStore.create(records.file("s"), given)
    told = Told()
    return Session(begin(store, asked), records, told, deadline, told)


def rung(number: int, size: int, metric: float, latency: float | None = None) -> Measurement:
    return Measurement(number, float(number), size, metric, 10, 0.1, latency)


def give(made: Session, number: int, *rungs: tuple[float, ...], error=None) -> list[Decision]:
    """A trial's results up to its end, or until it is stopped; each file says what it is."""
    decisions = []
    for index, numbers in enumerate(rungs):
        last = index == len(rungs) - 1
        decisions.append(made.measured(number, rung(index, *numbers), b"%d.%d" % (number, index), last))
        if decisions[-1] is Decision.STOP:
            break
    made.ended(number, error)
    return decisions


def files(made: Session) -> dict[int, bytes]:
    folder = made.records.artifact("s", "x").parent
    return {int(path.stem.removeprefix("trial-")): path.read_bytes() for path in folder.iterdir()}


def test_files_of_the_front_are_kept_and_others_dropped(tmp_path):
    made = session(tmp_path)
    for _ in range(6):
        made.next()
    give(made, 0, (1000, 0.9))
    give(made, 1, (500, 0.8))
    assert set(files(made)) == {0, 1}
    give(made, 2, (400, 0.85))  # better than 1 in both
    assert set(files(made)) == {0, 2}
    give(made, 3, (450, 0.84))  # worse than 2 in both
    assert set(files(made)) == {0, 2}
    give(made, 4, (900, 0.95))  # the baseline is off the front, and stays
    assert set(files(made)) == {0, 2, 4}
    give(made, 5, error="loss is nan")
    assert set(files(made)) == {0, 2, 4}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("direction", "timing"), [("maximize", None), ("minimize", None), ("minimize", Timing())])
def test_the_files_are_always_those_of_the_record(tmp_path, seed, direction, timing):
    """Trials in any order, with ties, at any moment: exactly the front's files and the baseline's are there.

    A search that goes on compares the same values at each rung.
    """
    rng = random.Random(seed)
    made = session(tmp_path, asked=40, direction=direction, timing=timing)

    def numbers():
        two = rng.randint(1, 8), rng.randint(1, 8) / 10
        return two if timing is None else (*two, 2.0 ** rng.randint(-2, 2))

    running, done = [], 0
    while done < 40:
        if len(running) < 4 and (job := made.next()) is not None:
            running.append(job.number)
            continue
        number = running.pop(rng.randrange(len(running)))
        give(made, number, *(numbers() for _ in range(rng.randint(1, 3))))
        done += 1
        record = made.record
        wanted = {t.number for t in record.front} | {t.number for t in record.trials[:1] if t.best}
        assert set(files(made)) == wanted
        for trial in record.trials:
            if trial.number in wanted:
                content = files(made)[trial.number]
                assert content == b"%d.%d" % (trial.number, trial.best.rung)
                assert trial.sha256 == hashlib.sha256(content).hexdigest()
    again = Session(StudyStore.open(made.store.file), made.records, Told())
    assert made._rungs._rungs[1]
    assert again._rungs._rungs == made._rungs._rungs


def test_of_equal_trials_the_first_by_number_is_kept_whichever_ends_first(tmp_path):
    made = session(tmp_path)
    for _ in range(3):
        made.next()
    give(made, 0, (1000, 0.9))
    give(made, 2, (500, 0.9))
    give(made, 1, (500, 0.9))
    assert [t.number for t in made.record.front] == [1]
    assert set(files(made)) == {0, 1}


def test_the_file_is_that_of_the_best_rung(tmp_path):
    made = session(tmp_path)
    made.next()
    give(made, 0, (1000, 0.7), (990, 0.9), (980, 0.8))
    assert files(made) == {0: b"0.1"}
    assert made.record.trials[0].best.rung == 1


def test_the_file_is_there_before_the_row(tmp_path, monkeypatch):
    """A kill between the two leaves a file too many, never a row without its file."""
    made = session(tmp_path)
    made.next()

    def killed(*_, **__):
        assert files(made) == {0: b"0.0"}
        raise KeyboardInterrupt

    monkeypatch.setattr(made.store, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        give(made, 0, (1000, 0.9))
    again = begin(StudyStore.open(made.store.file), 100)
    assert again.record().count("running") == 1
    assert again.propose().number == 0


def test_the_row_is_there_before_older_files_go(tmp_path, monkeypatch):
    made = session(tmp_path)
    for _ in range(3):
        made.next()
    give(made, 0, (1000, 0.9))
    give(made, 1, (500, 0.8))

    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(made, "drop_artifacts", killed)
        with pytest.raises(KeyboardInterrupt):
            give(made, 2, (400, 0.85))
    assert set(files(made)) == {0, 1, 2}
    record = StudyStore.open(made.store.file).record()
    assert [t.number for t in record.front] == [2, 0]


def test_a_state_stays_while_a_trial_runs_that_goes_on_from_it(tmp_path):
    """Also when the parent left the front, and after a kill."""
    made = session(tmp_path)
    for _ in range(3):
        made.next()

    def finish(number, size, metric):
        made.measured(number, rung(0, size, metric), b"file", True, b"state %d" % number)
        made.ended(number, None)

    def states():
        return {int(path.stem[6:]) for path in made.records.state("s", 0).parent.iterdir()}

    finish(0, 1000, 0.9)
    finish(1, 500, 0.8)
    assert states() == {1}  # the baseline has none
    made.store._trials[2] = replace(made.store._trials[2], parent=1)
    made._record = None
    made.next()
    finish(3, 400, 0.85)
    assert states() == {1, 3}
    del made._running[2]  # as after a kill: it is running in the record alone
    made.drop_artifacts()
    assert states() == {1, 3}
    made.store.finish(2, [], state="failed", error="killed")
    made._record = None
    made.drop_artifacts()
    assert states() == {3}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "trial-0001.acz"
    write_file(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RecordError, match=r"file '.*/a/trial-0001\.acz' cannot be written: No space left on device$"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


# who goes on


def test_plans_of_the_ladder_are_never_stopped_and_sampled_ones_are(tmp_path):
    made = session(tmp_path, steps=4)
    jobs = [made.next() for _ in range(30)]
    origins = {t.number: t.origin for t in made.record.trials}
    sizes = {job.number: 200 - job.number for job in jobs}  # given last to first: each is worse than those before
    decisions = {n: give(made, n, (sizes[n], 0.5), (sizes[n], 0.5), (90, 0.4)) for n in sorted(sizes, reverse=True)}
    stopped = {number for number, given in decisions.items() if Decision.STOP in given}
    assert {origins[n] for n in stopped} == {"sampler"}
    assert len(stopped) > 10
    record = made.record
    assert {t.number for t in record.trials if t.state == "stopped"} == stopped
    assert all(len(given) == 2 for n, given in decisions.items() if n in stopped)  # not at rung 0
    assert all(record.trials[n].best.size_bytes == sizes[n] for n in stopped)


def test_a_stopped_trial_that_may_be_on_the_front_keeps_its_file(tmp_path):
    made = session(tmp_path, deadline=time.monotonic() + 1000)
    for _ in range(2):
        made.next()
    give(made, 0, (1000, 0.9))
    made.deadline = time.monotonic() - 1
    assert give(made, 1, (500, 0.8), (480, 0.85)) == [Decision.STOP]
    assert set(files(made)) == {0, 1}
    assert made.record.trials[1].state == "stopped"


def test_after_the_deadline_nothing_begins_and_running_trials_end_at_their_next_rung(tmp_path):
    made = session(tmp_path, deadline=time.monotonic() + 1000)
    assert made.next().number == 0
    made.deadline = time.monotonic() - 1
    assert made.next() is None
    assert give(made, 0, (1000, 0.9), (900, 0.9), (800, 0.9)) == [Decision.STOP]
    assert made.record.trials[0].state == "stopped"
    assert made.record.asked == 100


def test_there_is_always_time_for_the_baseline(tmp_path):
    made = session(tmp_path, deadline=time.monotonic() - 1)
    assert made.next().number == 0
    assert made.next() is None
    give(made, 0, (1000, 0.9))
    assert made.next() is None
    assert made.record.baseline is not None


def test_a_last_rung_after_the_deadline_is_complete(tmp_path):
    made = session(tmp_path, deadline=time.monotonic() + 1000)
    made.next()
    made.deadline = time.monotonic() - 1
    assert give(made, 0, (1000, 0.9)) == [Decision.CONTINUE]
    assert made.record.trials[0].state == "complete"


# failures, and who is told


def test_failed_trials_say_why_and_keep_nothing(tmp_path):
    made = session(tmp_path)
    for _ in range(3):
        made.next()
    give(made, 0, (1000, 0.9), error="trial 0: loss is nan")
    give(made, 1)
    trials = made.record.trials
    assert [t.state for t in trials] == ["failed", "failed", "running"]
    assert trials[0].error == "trial 0: loss is nan"
    assert trials[1].error == "the worker gave no result"
    assert not made.records.artifact("s", "x").parent.exists()
    assert made.record.front == ()


def test_tracker_and_listener_hear_of_each_trial_once_with_the_record_of_that_moment(tmp_path):
    made = session(tmp_path, asked=5)
    while (job := made.next()) is not None:
        give(made, job.number, (1000 - job.number, 0.5))
    told = made.listener
    assert told.begun == [0, 1, 2, 3, 4]
    for heard in (told.logged, told.heard):
        assert [trial.number for _, trial in heard] == [0, 1, 2, 3, 4]
        for record, trial in heard:
            assert record.trials[trial.number] == trial
            assert record.count("complete") == trial.number + 1
            assert record.count("running") == 0


def test_where_mlflow_shows_the_study_is_noted_on_disk(tmp_path):
    made = session(tmp_path)
    made.homes.put(Home("sqlite:///x.db", "3", "abc", "#/experiments/3"))
    made.next()
    for record in (made.record, StudyStore.open(made.store.file).record()):
        assert (record.tracking_uri, record.experiment_id, record.run_id) == ("sqlite:///x.db", "3", "abc")


def test_test_metrics_are_measured_once_for_the_front_and_the_baseline(tmp_path):
    made = session(tmp_path, asked=4)
    for number, result in enumerate([(1000, 0.9), (500, 0.8), (400, 0.85), (300, 0.95)]):
        made.next()
        give(made, number, result)
    assert [t.number for t in untested(made.store.record())] == [0, 3]
    made.store.note_tests({3: 0.5})
    assert [t.number for t in untested(made.store.record())] == [0]
    made.store.note_tests({0: 0.5})
    assert untested(made.store.record()) == ()


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    """The study's rows cannot be written: one clear error, which the engine passes on."""
    made = session(tmp_path)
    made.next()
    made.store._engine.dispose()
    made.store.file.write_bytes(b"broken" * 1000)
    for more in ("-wal", "-shm"):
        made.store.file.with_name(made.store.file.name + more).unlink(missing_ok=True)
    with pytest.raises(UsageError) as error:
        give(made, 0, (1000, 0.9))
    assert "study.db" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_layers_of_the_study_are_those_of_the_task(tmp_path):
    assert session(tmp_path).record.layers == SPECS


def test_how_many_trials_there_will_be(tmp_path, monkeypatch):
    """By the seconds that complete trials told of themselves, two at a time; those of starting workers do not count."""
    clock = [1000.0]
    monkeypatch.setattr("autocompress.session.time.monotonic", lambda: clock[0])
    made = session(tmp_path, deadline=1100.0)
    given = []
    propose = made.store.propose
    monkeypatch.setattr(made.store, "propose", lambda states, expected: given.append(expected) or propose(states))
    for _ in range(5):
        made.next()
    give(made, 0, (1000, 0.9))
    clock[0] = 1040.0  # what workers took to start
    give(made, 1, error="loss is nan")
    made.next()
    assert given == [None] * 6  # neither the uncompressed model nor a failure tells how long a trial takes
    made.measured(2, replace(rung(0, 500, 0.8), seconds=4.0), b"", True)
    made.ended(2, None)
    made.measured(3, replace(rung(0, 400, 0.7), seconds=8.0), b"", True)
    made.ended(3, None)
    made.next()
    assert given[-1] == 6 + 2 * 60 / 6
    clock[0] = 1099.0
    made.next()
    assert given[-1] == 7 + 1
    made.deadline = None
    made.next()
    assert given[-1] is None
