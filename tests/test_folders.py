"""Where records live: names, the latest study, one writer at a time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocompress.errors import AutocompressError, StudyError, UsageError
from autocompress.folders import Records
from autocompress.search.study import artifact_path


def study(records: Records, name: str, age_s: float = 0.0, used_s: float | None = None) -> None:
    """A study's file that is so old, used so long ago."""
    records.folder(name).mkdir(parents=True)
    for file, age in ((records.file(name), age_s), (records.folder(name) / "last-used", used_s)):
        if age is not None:
            file.touch()
            os.utime(file, (time.time() - age,) * 2)


def test_the_folder_is_the_one_given_else_the_variable_else_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOCOMPRESS_DIR", raising=False)
    assert Records.find().root == tmp_path / "autocompress_runs"
    monkeypatch.setenv("AUTOCOMPRESS_DIR", "elsewhere")
    assert Records.find().root == tmp_path / "elsewhere"
    assert Records.find("given").root == tmp_path / "given"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Records.find("~/runs").root == tmp_path / "home" / "runs"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "A-1", "my_study.2", "0", "x" * 100])
def test_names(tmp_path, name):
    assert Records(tmp_path).folder(name) == tmp_path / "studies" / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a b", " a", "a\n", "🎈", "é", "-a", ".a", "x" * 101, "x" * 300],
)
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(UsageError) as error:
        Records(tmp_path).folder(name)
    assert repr(name) in str(error.value)
    assert "allowed: 1 to 100 letters" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_latest_is_the_one_last_used(tmp_path):
    records = Records(tmp_path)
    study(records, "old", age_s=300)
    study(records, "resumed", age_s=500, used_s=100)
    study(records, "new", age_s=50, used_s=200)
    (records.root / "studies" / "empty").mkdir()
    assert records.names() == ["resumed", "new", "old"]
    assert records.existing(None) == "resumed"
    with records.lock("old"):
        assert records.latest() == "resumed"
        records.mark_used("old")
        assert records.latest() == "old"


def test_a_study_that_does_not_exist_is_told_with_those_that_do(tmp_path):
    records = Records(tmp_path)
    with pytest.raises(StudyError, match="no study in"):
        records.existing(None)
    with pytest.raises(StudyError, match=r"'x' does not exist in .*; there is none"):
        records.existing("x")
    study(records, "mine")
    with pytest.raises(StudyError, match=r"'x' does not exist in .*; there are: mine"):
        records.existing("x")
    with pytest.raises(UsageError, match="allowed: 1 to 100"):
        records.existing("../mine")
    assert records.existing("mine") == "mine"


def test_new_names_are_free_and_allowed(tmp_path):
    records = Records(tmp_path)
    assert records.new_name("digits") == "digits-1"
    for name in ("digits-1", "digits-3"):
        study(records, name)
    assert records.new_name("digits") == "digits-2"
    for odd in ("my task/with: signs", "🎈", "", "...", "x" * 300, "-a-"):
        records.folder(records.new_name(odd))
    assert records.new_name("my task/a") == "my-task-a-1"


def test_artifacts_are_where_the_record_says(tmp_path):
    assert Records(tmp_path).artifact("s", "trial-0001.acz") == tmp_path / artifact_path("s", 1)


def test_one_process_holds_a_study_and_lets_go_however_it_ends(tmp_path):
    records = Records(tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from autocompress.folders import Records\n"
            "with Records(Path(sys.argv[1])).lock('s'):\n    print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="study 's' is in use by another process"), records.lock("s"):
            pass
        with records.lock("other"):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with records.lock("s"):
        pass


def test_a_lock_is_let_go_when_its_holder_raises(tmp_path):
    records = Records(tmp_path)
    with pytest.raises(ZeroDivisionError), records.lock("s"):
        raise ZeroDivisionError
    with records.lock("s"):
        pass


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    root = Path(tmp_path, folder)
    if folder.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(AutocompressError) as error, Records(root).lock("s"):
        pass
    assert error.value.exit_code == 2
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_command_names_its_folder_where_it_is_not_found_by_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOCOMPRESS_DIR", raising=False)
    assert Records.find().option == ""
    assert Records.find(tmp_path / "a b").option == f" --dir '{tmp_path}/a b'"
    monkeypatch.setenv("AUTOCOMPRESS_DIR", str(tmp_path / "a b"))
    assert Records.find(tmp_path / "a b").option == ""
