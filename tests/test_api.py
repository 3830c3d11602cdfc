"""The Python API without a search: choosing points, parsing, where a task comes from."""

import subprocess
import sys
from pathlib import Path

import pytest

import autocompress as ac
from autocompress.errors import UsageError
from autocompress.limits import parse_time
from autocompress.origins import origin_of
from autocompress.plan import LayerPlan, LayerSpec, Measurement, Plan, Recipe
from autocompress.record import StudyRecord, TrialRecord
from autocompress.results import pick
from autocompress.tasks.checking import check_task

SPEC = LayerSpec("fc", "linear", (10, 20), 200)


def trial(number: int, size: int, metric: float, **more) -> TrialRecord:
    m = Measurement(0, 1.0, size, metric, 200, 1.0)
    return TrialRecord(
        number, "complete", Plan({"fc": LayerPlan(bits=4)}, Recipe()), 0, (m,), m, artifact=f"t{number}", **more
    )


def study(*trials: TrialRecord, direction: str = "maximize") -> StudyRecord:
    return StudyRecord("s", "t", "accuracy", direction, 0, 10_000, layers=(SPEC,), trials=trials)


RECORD = study(
    trial(0, 9000, 0.95), trial(1, 1000, 0.945), trial(2, 400, 0.93), trial(3, 100, 0.80), trial(4, 500, 0.90)
)


def test_front_leaves_out_dominated_trials():
    assert [t.number for t in RECORD.front] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("limits", "choice", "expected"),
    [
        ({"max_drop": "1%"}, "smallest", 1),
        ({"max_drop": "2%"}, "smallest", 2),
        ({"max_drop": 0.2}, "smallest", 3),
        ({"max_size": "1KB"}, "best", 1),
        ({"max_size": "999"}, "best", 2),
        ({"max_size": 999, "max_drop": "50%"}, "smallest", 3),
        ({}, "best", 0),
        ({}, "trial=2", 2),
    ],
)
def test_pick(limits, choice, expected):
    assert pick(RECORD, choice=choice, **limits).number == expected


def test_percentage_is_relative_for_a_loss():
    record = study(trial(0, 9000, 4.0), trial(1, 500, 4.03), trial(2, 300, 4.2), direction="minimize")
    assert pick(record, max_drop="1%").number == 1
    assert pick(record, max_drop=0.01).number == 0


def test_unmet_goal_names_the_nearest_point():
    with pytest.raises(UsageError, match=r"no plan is within max-size 50B; the nearest is trial 3: 100 B"):
        pick(RECORD, max_size="50B")


@pytest.mark.parametrize("choice", ["trial=4", "trial=x", "middle"])
def test_bad_picks(choice):
    with pytest.raises(UsageError, match="pick is"):
        pick(RECORD, choice=choice)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("45", 45), (1.5, 1.5)])
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["-1", "0", "ten", "nan", "inf", "", "10d"])
def test_bad_times(text):
    with pytest.raises(UsageError, match="time-budget is"):
        parse_time(text)


def test_origin_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    origin = origin_of("sub/my.py:task", "data")
    assert origin["task"] == f"{tmp_path}/sub/my.py:task"
    assert origin["data_dir"] == str(tmp_path / "data")
    assert origin_of("digits", None)["task"] == "digits"
    assert origin_of("package.module:task", None)["task"] == "package.module:task"


def test_readme_task_is_a_task(tmp_path):
    """The README's task file loads, and its names are what the contract says."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(b.split("```")[0] for b in text.split("```python\n")[1:] if b.startswith("# my_task.py"))
    file = tmp_path / "my_task.py"
    file.write_text(block)
    task = ac.load_task(f"{file}:task")
    check_task(task)
    assert (task.name, task.direction) == ("regression", "minimize")


def test_search_is_callable_whatever_was_imported_before():
    """The package `autocompress.search` and the function have one name."""
    code = (
        "import autocompress as ac, autocompress.search.study, autocompress.search as s\n"
        "for call in (ac.search, s):\n"
        "    try: call('no-such-task')\n"
        "    except ac.AutocompressError as error: print('no-such-task' in str(error))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"]
