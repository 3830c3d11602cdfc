"""The command line: each mistake is one line that names the thing, its value and what is allowed; exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_search import local, one_thread, run_here, write_task  # noqa: F401 (two are fixtures)

import autocompress
from autocompress import cli
from autocompress.codec import container
from autocompress.codec.tensors import Coded
from autocompress.folders import Records
from autocompress.search.study import StudyStore


@pytest.fixture
def work(tmp_path, monkeypatch, one_thread) -> Path:  # noqa: F811
    """An empty folder to work in, with a task file in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTOCOMPRESS_DIR", "AUTOCOMPRESS_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    write_task(tmp_path)
    return tmp_path


@pytest.fixture
def fail(work, capsys):
    """Runs a command that must fail; the one line that it says."""

    def run(code: int, *arguments: str) -> str:
        try:
            given = cli.main(arguments)
        except SystemExit as exited:
            given = exited.code
        said = capsys.readouterr()
        assert given == code, said.err
        lines = said.err.strip().splitlines()
        assert len(lines) == 1, said.err
        assert lines[0].startswith("autocompress: ")
        assert "Traceback" not in said.out + said.err
        return lines[0].removeprefix("autocompress: ")

    return run


@pytest.fixture
def done(work, capsys):
    """Runs a command that must succeed; what it prints."""

    def run(*arguments: str) -> str:
        code = cli.main(arguments)
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


def search(*more: str) -> tuple[str, ...]:
    return ("search", "waves.py:task", "--finetune-epochs", "1", *more)


# mistakes in what is asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "0"), "workers is 0, allowed: 1 or more"),
        (("--workers", "-3"), "workers is -3, allowed: 1 or more"),
        (("--workers", "two"), "--workers: 'two' is not a whole number"),
        (("--trials", "0"), "trials is 0, allowed: 1 to 1000000"),
        (("--trials", "x"), "--trials: 'x' is not a whole number"),
        (("--trials", "2.5"), "--trials: '2.5' is not a whole number"),
        (("--seed", "-1"), "seed is -1, allowed: 0 to"),
        (("--sampler", "foo"), "sampler is 'foo', allowed: tpe, nsga2, nsga3, gp, qmc, random"),
        (("--max-drop", "banana"), "max-drop is 'banana', allowed: a percentage such as 1%"),
        (("--max-drop=-1%",), "max-drop is '-1%', allowed"),
        (("--max-size", "50XB"), "max-size is '50XB', allowed: bytes such as 50KB"),
        (("--max-size", "0"), "max-size is '0', allowed"),
        (("--time-budget=-1",), "time-budget is '-1', allowed: such as 90s, 10m, 2h"),
        (("--time-budget", "soon"), "time-budget is 'soon', allowed"),
        (("--finetune-epochs=-1",), "finetune-epochs is -1.0, allowed: 0 to"),
        (("--finetune-epochs", "nan"), "finetune-epochs is nan, allowed: 0 to"),
        (("--finetune-epochs", "few"), "--finetune-epochs: 'few' is not a number"),
        (("--space", "nothing"), "search space is 'nothing', allowed: a YAML file, or one of continuation, conv"),
        (("--space", "none.yaml"), "search space 'none.yaml': there is no such file"),
        (("--study", "a/b"), "study name is 'a/b', allowed: 1 to 100 letters"),
        (("--study", "a b"), "study name is 'a b', allowed"),
        (("--study", "🎈"), "study name is '🎈', allowed"),
        (("--study", ".."), "study name is '..', allowed"),
        (("--study", ""), "study name is '', allowed"),
        (("--study", "x" * 300), "xxx', allowed: 1 to 100 letters"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_bad_options_of_search(fail, work, options, words):
    assert words in fail(2, *search(*options))
    assert [p.name for p in work.iterdir() if p.suffix != ".py" and p.name != "__pycache__"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("serach",), "invalid choice: 'serach'"),
        (("search",), "TASK"),
        (("search", "digit"), "task is 'digit', allowed: digits, mnist-lenet300"),
        (("search", "none.py:task"), "none.py' does not exist (looked in"),
        (("search", "none.py"), "none.py' does not exist (looked in"),
        (("search", "no_such_module:task"), "no_such_module"),
        (("search", "none.py:task", "--space", "nothing"), "search space is 'nothing', allowed: a YAML file"),
        (("search", "none.py:task", "--study", "a/b"), "study name is 'a/b', allowed"),
        (("inspect", "none.py:task", "--space", "nothing"), "search space is 'nothing', allowed: a YAML file"),
        (("search", "waves.py:tusk"), "tusk"),
        (("front",), "no study in"),
        (("front", "none"), "study 'none' does not exist in"),
        (("front", "../x"), "study name is '../x', allowed"),
        (("resume",), "no study in"),
        (("resume", "none"), "study 'none' does not exist in"),
        (("resume", "none", "--max-drop", "banana"), "max-drop is 'banana'"),
        (("sync", "none"), "study 'none' does not exist in"),
        (("ui", "none"), "study 'none' does not exist in"),
        (("export", "none", "-o", "x"), "study 'none' does not exist in"),
        (("export", "none"), "-o"),
        (("export", "none", "-o", "x", "--effort", "most"), "effort is 'most', allowed: auto, fast, max, huffman"),
        (("export", "none", "-o", "x", "--coder", "gzip"), "effort is 'gzip', allowed: auto, fast, max, huffman"),
        (("search", "waves.py:task", "--effort", "slow"), "effort is 'slow', allowed: auto, fast, max, huffman"),
        (("data", "get", "cifar"), "'cifar'"),
        (("data",), "get"),
        (("inspect", "none.acz"), "file 'none.acz' does not exist"),
        (("inspect", "waves.py:task", "--trials", "0"), "trials is 0"),
        (("inspect", "waves.py:task", "--workers", "0"), "workers is 0"),
    ],
)
def test_bad_commands(fail, arguments, words):
    assert words in fail(2, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def task():\n    return 3\n", ["returned 3, allowed: an autocompress.Task"]),
        ("def task():\n    return None\n", ["returned None, allowed: an autocompress.Task"]),
        ("task = 5\n", ["task"]),
        ("def task():\n    raise ValueError('no luck')\n", ["no luck", "line 2"]),
        ("raise RuntimeError('at once')\n", ["at once", "line 1"]),
        ("def task(:\n", ["line 1"]),
        ("import not_installed_anywhere\n", ["not_installed_anywhere"]),
        ("def task(a, b):\n    return 1\n", ["task", "a"]),
        ("def task():\n    import sys; sys.exit(3)\n", ["bad.py"]),
        ("", ["bad.py", "task"]),
    ],
)
def test_bad_task_files(fail, work, text, words):
    (work / "bad.py").write_text(text)
    for command in ("search", "inspect"):
        line = fail(2, command, "bad.py:task")
        assert "bad.py" in line
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model=nn.Flatten(0), loss=lambda o, t: o.sum(), metric=lambda o, t: 1.0", ["no layer to compress"]),
        ("model=3", ["model is 3, allowed: a torch.nn.Module"]),
        ("direction='up'", ["direction is 'up', allowed: 'maximize' or 'minimize'"]),
        ("train=()", ["train"]),
        ("val=(torch.empty(0, 8), torch.empty(0))", ["val is empty"]),
        ("test=split(2, 7)[0]", ["test"]),
        ("loss=lambda o, t: 1 / 0", ["loss", "division by zero"]),
        ("loss=lambda o, t: o", ["loss", "scalar"]),
        ("loss=lambda o, t: o.sum() * float('nan')", ["loss", "nan"]),
        ("metric=lambda o, t: float('nan')", ["metric", "nan"]),
        ("metric=lambda o, t: 'good'", ["metric", "good"]),
        ("metric=lambda o, t: 1 / 0", ["metric", "division by zero"]),
        ("batch_size=0", ["batch_size is 0, allowed"]),
        ("example_inputs=(torch.zeros(1, 5),)", ["example_inputs", "(1, 5)"]),
    ],
)
def test_tasks_that_do_not_keep_the_contract(fail, work, change, words):
    write_task(work, f"\nimport dataclasses\ndef bad():\n    return dataclasses.replace(task(), {change})\n", "odd.py")
    for command in ("search", "inspect"):
        line = fail(2, command, "odd.py:bad")
        assert all(word in line for word in words), line
    assert not (work / "autocompress_runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nlayers:\n  - bitz: 4\n", ["layers[0]: unknown key 'bitz', allowed", "did you mean 'bits'"]),
        ("version: 1\nlayers:\n  - bits: [4, 12]\n", ["layers[0].bits", "12", "allowed: 1 to 8"]),
        ("version: 1\nlayers:\n  - bits: [6, 2]\n", ["layers[0].bits is [6, 2], allowed: the low end first"]),
        ("version: 1\nlayers:\n  - threshold: -1\n", ["layers[0].threshold is -1, allowed: a number from 0 to 10"]),
        ("version: 1\nlayers:\n  - threshold: high\n", ["layers[0].threshold is 'high', allowed"]),
        ("version: 1\nlayers:\n  - match: conv*\n    bits: 4\n", ["layers[0].match is 'conv*', allowed", "'first'"]),
        ("version: 1\nlayers:\n  - match: first\n    rank: 9\n", ["layers[0].rank is 9, allowed: up to 8"]),
        ("version: 2\nlayers: []\n", ["version is 2, allowed: 1"]),
        ("version: 1\n", ["layers is empty, allowed"]),
        ("- 1\n", ["allowed: a mapping"]),
        ("version: [\n", ["line 2"]),
        ("", ["is empty, allowed: a mapping"]),
    ],
)
def test_bad_search_spaces(fail, work, text, words):
    (work / "space.yaml").write_text(text)
    for command in ("search", "inspect"):
        line = fail(2, command, "waves.py:task", "--space", "space.yaml")
        assert "space.yaml" in line
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "layers: [{bits: 4, quantizer: uniform, granularity: channel}]\nrecipe: {rate: 1}\n",
            ["granularity is 'channel'"],
        ),
        ("layers: [{bits: 4, quantizer: asymmetric}]\nrecipe: {rate: 1}\n", ["quantizer is 'asymmetric'"]),
    ],
)
def test_a_space_none_of_whose_plans_can_work_is_refused_at_once(fail, work, text, words):
    (work / "space.yaml").write_text(f"version: 1\n{text}")
    for command in ("search", "inspect"):
        line = fail(2, command, "waves.py:task", "--space", "space.yaml")
        assert "holds plans that cannot work" in line
        assert all(word in line for word in words), line


def test_a_folder_that_cannot_be_written(fail, work):
    (work / "file").write_text("in the way")
    line = fail(2, *search("--dir", "file"))
    assert str(work / "file") in line
    assert "records folder" in line


def test_data_that_is_missing_names_the_command_that_gets_it(fail, work):
    line = fail(2, "search", "mnist-lenet300", "--data-dir", str(work / "empty"))
    assert "autocompress data get mnist" in line
    assert str(work / "empty") in line


# a study that is there


@pytest.fixture
def study(work, local, capsys, monkeypatch, session_folder) -> Path:  # noqa: F811
    """A finished study of five trials called mine: searched once, laid out anew for each test in the same place."""
    place, kept = session_folder / "study", session_folder / "study as found"
    if not kept.exists():
        place.mkdir()
        write_task(place)
        monkeypatch.chdir(place)
        assert cli.main(search("--study", "mine", "--trials", "5", "--space", "quantize_only")) == 0
        capsys.readouterr()
        shutil.copytree(place, kept)
    monkeypatch.chdir(kept)
    shutil.rmtree(place)
    shutil.copytree(kept, place)
    monkeypatch.chdir(place)
    return place


def test_front_json_keeps_the_contract(study, done):
    shown = json.loads(done("front", "--json"))
    assert list(shown) == [
        *("study", "task", "metric", "direction", "seed", "trials", "baseline", "hypervolume"),
        *("tracking_uri", "run_id", "front"),
    ]
    assert (shown["study"], shown["task"], shown["metric"], shown["seed"]) == ("mine", "waves", "error", 0)
    assert shown["direction"] == "minimize"
    assert sum(shown["trials"].values()) == 5
    sizes = [point["size_bytes"] for point in shown["front"]]
    assert sizes == sorted(sizes)
    for point in shown["front"]:
        assert (study / "autocompress_runs" / point["artifact"]).stat().st_size == point["size_bytes"]
        assert point["ratio"] == pytest.approx(shown["baseline"]["size_bytes"] / point["size_bytes"])


def test_the_front_as_table_and_figures(study, done, fail):
    text = done("front", "mine", "--plot", "a.png")
    assert "autocompress sync mine" in text  # nothing was told to MLflow here
    assert (study / "a.png").read_bytes().startswith(b"\x89PNG")
    done("front", "--plot", "a.HTML", "--json")
    assert "<html" in (study / "a.HTML").read_text()[:200].lower()
    assert "plot is 'x.gif', allowed: a file that ends in .png or .html" in fail(2, "front", "--plot", "x.gif")
    assert "none" in fail(2, "front", "--plot", "none/x.png")
    assert sorted(p.name for p in study.glob("*.gif")) == []


def test_a_full_disk_names_the_file(study, fail):
    Path("full.png").symlink_to("/dev/full")
    assert fail(1, "front", "--plot", "full.png") == "file 'full.png' cannot be written: No space left on device"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--space", "prune_only"), "exists with another space"),
        (("--seed", "1"), "seed"),
        (("--finetune-epochs", "2"), "finetune-epochs"),
        (("--sampler", "random"), "sampler"),
    ],
)
def test_an_occupied_name_with_other_settings(study, fail, change, words):
    before = StudyStore.open(study / "autocompress_runs/studies/mine/study.db").record()
    line = fail(2, *search("--study", "mine", "--trials", "9", "--space", "quantize_only", *change))
    assert "study 'mine' exists" in line
    assert words in line
    assert StudyStore.open(study / "autocompress_runs/studies/mine/study.db").record() == before


@pytest.mark.parametrize("option", [("--max-latency", "0.7x"), ("--seed=3",), ("--inherit",), ("--study", "mine")])
def test_resume_says_what_it_can_change(fail, option):
    line = fail(2, "resume", "mine", *option)
    assert line.startswith(f"{option[0].partition('=')[0]} is settled when a study begins: resume STUDY takes --trials")


def test_an_unknown_option_is_told_in_its_commands_name(fail):
    assert fail(2, "front", "--best") == "unrecognized arguments: --best (see autocompress front --help)"
    assert "(see autocompress data get --help)" in fail(2, "data", "get", "mnist", "--now")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("model=Net()", "model"),
        ("train=split(7, 512)", "data"),
        ("val=split(7, 256)", "data"),
        ("test=split(7, 256)", "data"),
        ("metric=lambda o, t: float((o - t).square().mean())", "metric"),
        ("direction='maximize'", "metric"),
    ],
)
def test_a_resume_on_something_else_is_refused(study, fail, change, what):
    write_task(
        study, f"\nimport dataclasses\nold = task\ndef task():\n    return dataclasses.replace(old(), {change})\n"
    )
    line = fail(2, "resume", "mine", "--trials", "9")
    assert "study 'mine' exists with another" in line
    assert what in line


def test_more_trials_go_on_from_those_there(study, done):
    records = Records(study / "autocompress_runs")
    before = StudyStore.open(records.file("mine")).record()
    done("resume", "--trials", "8")
    after = StudyStore.open(records.file("mine")).record()
    assert [t.number for t in after.trials] == list(range(8))
    strip = [(t.plan, t.best, t.state, t.seconds) for t in before.trials]
    assert [(t.plan, t.best, t.state, t.seconds) for t in after.trials[:5]] == strip
    assert len({t.plan.key() for t in after.trials}) == 8
    assert done(*search("--study", "mine", "--trials", "8", "--space", "quantize_only"))
    assert len(StudyStore.open(records.file("mine")).record().trials) == 8


def test_bad_numbers_for_a_resume(study, fail):
    for arguments, words in (
        (("--trials", "0"), "trials is 0"),
        (("--workers", "0"), "workers is 0"),
        (("--time-budget", "never"), "time-budget is 'never'"),
    ):
        assert words in fail(2, "resume", "mine", *arguments)


def test_bad_picks_and_formats(study, fail):
    for arguments, words in (
        (("--pick", "middle"), "pick is 'middle', allowed: knee, smallest, fastest, best, trial=N"),
        (("--pick", "trial=99"), "pick is 'trial=99', allowed: trials on the front: 0"),
        (("--format", "tflite"), "'tflite'"),
        (("--max-size", "1"), "no plan is within max-size 1; the nearest is trial"),
        (("--max-drop", "banana"), "max-drop is 'banana'"),
        (("--format", "onnx", "--effort", "fast"), "only the format archive can be coded anew"),
    ):
        assert words in fail(2, "export", "mine", "-o", "out", *arguments)
    assert not (study / "out").exists()
    line = fail(2, "ui", "mine", "--port", "0")
    assert "port" in line or "autocompress sync mine" in line


def test_a_damaged_artifact_is_refused(study, done, fail):
    shown = json.loads(done("front", "--json"))
    path = study / "autocompress_runs" / shown["front"][0]["artifact"]
    assert "tensor" in done("inspect", str(path))
    for option in ("--trials", "--workers", "--finetune-epochs", "--space", "--data-dir"):
        assert f"{option} is for a task, and {str(path)!r} is a file" in fail(2, "inspect", str(path), option, "40")
    whole = path.read_bytes()
    for name, data in {
        "cut.acz": whole[: len(whole) // 2],
        "empty.acz": b"",
        "flipped.acz": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "other.acz": b"PK\x03\x04" + whole,
        "long.acz": whole + b"x",
    }.items():
        (study / name).write_bytes(data)
        assert name in fail(1, "inspect", name)


def test_an_artifact_that_was_damaged_is_not_exported(study, done, fail):
    shown = json.loads(done("front", "--json"))
    path = study / "autocompress_runs" / shown["front"][0]["artifact"]
    path.write_bytes(path.read_bytes()[:-9])
    line = fail(
        1, "export", "mine", "--pick", f"trial={shown['front'][0]['trial']}", "--format", "archive", "-o", "out"
    )
    assert path.name in line


def test_exports_that_fail_leave_nothing(study, done, fail, monkeypatch):
    """A damaged artifact, a folder that cannot be written, a weight that is not the artifact's."""
    shown = json.loads(done("front", "--json"))
    path = study / "autocompress_runs" / shown["front"][0]["artifact"]
    arguments = ("export", "mine", "--pick", f"trial={shown['front'][0]['trial']}", "-o")
    before = {file for file in study.rglob("*") if "autocompress_runs" not in file.parts}
    assert "cannot write to folder '/proc/1/out'" in fail(1, *arguments, "/proc/1/out", "--format", "archive")
    whole = container.unpack(path.read_bytes())
    name = next(name for name, tensor in whole.tensors.items() if isinstance(tensor, Coded))
    whole.tensors[name].table[0] += 1
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda _, target: Path(target).write_bytes(container.pack(whole)))
        line = fail(1, *arguments, "out/deep", "--format", "archive")
    assert "model.acz does not compute what the artifact does" in line
    path.write_bytes(path.read_bytes()[:-9])
    for fmt in ("onnx", "torch", "archive"):
        assert path.name in fail(1, *arguments, "out", "--format", fmt)
    assert {file for file in study.rglob("*") if "autocompress_runs" not in file.parts} == before


def test_a_manifest_names_no_folder_of_this_machine(work, local, done, monkeypatch):  # noqa: F811
    asked = [*search("--trials", "1", "--space", "quantize_only"), f"--dir={work}/my runs", "--tracking-uri"]
    asked += [f"sqlite:///{work}/m.db"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/autocompress", *asked])
    done(*asked)
    done("export", "--dir", f"{work}/my runs", "--pick", "best", "--format", "archive", "-o", "out")
    text = (work / "out" / "manifest.json").read_text()
    command = json.loads(text)["recorded"]["command"]
    wanted = "autocompress search waves.py:task --finetune-epochs 1 --trials 1 --space quantize_only"
    assert command == f"{wanted} '--dir=my runs' --tracking-uri m.db"
    for leak in (str(work), str(Path.home()), sys.prefix):
        assert leak not in text


def test_a_damaged_study_is_told(study, fail):
    for more in ("-wal", "-shm"):
        (study / f"autocompress_runs/studies/mine/study.db{more}").unlink(missing_ok=True)
    (study / "autocompress_runs/studies/mine/study.db").write_bytes(b"gone" * 500)
    for command in ("front", "resume", "sync", "ui"):
        assert "study.db" in fail(2, command, "mine")


def test_a_goal_that_no_plan_meets_names_the_nearest_and_keeps_the_front(work, local, done):  # noqa: F811
    text = done(*search("--study", "g", "--trials", "3", "--max-size", "10B"))
    assert "goal not met: no plan is within max-size 10B; the nearest is trial" in text
    assert "autocompress front g" in text
    assert json.loads(done("front", "g", "--json"))["front"]


def test_trials_that_fail_are_told_and_the_search_goes_on(work, local, done, monkeypatch):  # noqa: F811
    def sometimes(task, ledger, *more, **options):
        given = ledger.next

        class Ledger:
            next = staticmethod(given)
            measured = ledger.measured

            def ended(self, number, error):
                ledger.ended(number, "loss is nan" if number == 2 else error)

        run_here(task, Ledger(), *more, **options)

    monkeypatch.setattr("autocompress.engine.run", sometimes)
    text = done(*search("--study", "f", "--trials", "4"))
    assert re.search(r"trial +2 failed: loss is nan", text)
    assert json.loads(done("front", "f", "--json"))["trials"] == {"complete": 3, "stopped": 0, "failed": 1}


def test_a_search_in_which_nothing_works_has_failed(work, local, monkeypatch, capsys):  # noqa: F811
    def never(task, ledger, *_, **__):
        while (job := ledger.next()) is not None:
            ledger.ended(job.number, "no luck")

    monkeypatch.setattr("autocompress.engine.run", never)
    assert cli.main(search("--trials", "3")) == 1
    assert "autocompress: no trial gave a result" in capsys.readouterr().err


def test_a_search_that_compresses_nothing_has_failed(work, local, monkeypatch, capsys):  # noqa: F811
    def only_the_first(task, ledger, *more, **options):
        class Ledger:
            next, measured = ledger.next, ledger.measured

            def ended(self, number, error):
                ledger.ended(number, "no luck" if number else error)

        run_here(task, Ledger(), *more, **options)

    monkeypatch.setattr("autocompress.engine.run", only_the_first)
    assert cli.main(search("--trials", "3")) == 1
    assert "autocompress: all trials failed but the uncompressed one" in capsys.readouterr().err


def test_an_interrupted_search_prints_how_to_go_on(work, local, monkeypatch, fail, done):  # noqa: F811
    def interrupted(task, ledger, *more, **options):
        class Ledger:
            measured, ended = ledger.measured, ledger.ended

            def next(self):
                job = ledger.next()
                if job.number == 3:
                    raise KeyboardInterrupt
                return job

        run_here(task, Ledger(), *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr("autocompress.engine.run", interrupted)
        line = fail(130, *search("--study", "i", "--trials", "6", "--dir", "my runs"))
    command = line.rpartition("go on with: ")[2]
    assert command == "autocompress resume i --dir 'my runs'"
    done("resume", "i", "--dir", "my runs")
    shown = json.loads(done("front", "i", "--dir", "my runs", "--json"))
    assert shown["trials"]["complete"] + shown["trials"]["stopped"] == 6


def test_two_searches_on_one_study(study, fail):
    with Records(study / "autocompress_runs").lock("mine"):
        assert "study 'mine' is in use by another process" in fail(2, "resume", "mine", "--trials", "9")
        assert "study 'mine' is in use" in fail(2, *search("--study", "mine", "--space", "quantize_only"))


def test_lists(study, done):
    text = done("tasks")
    for word in ("digits", "fashion-lenet5", "quantize_only", "mine"):
        assert re.search(rf"^  {word}\b", text, re.MULTILINE)


# the process


def test_version_and_help():
    def run(*arguments):
        command = [sys.executable, "-m", "autocompress.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert run("--version").stdout == f"autocompress {autocompress.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("search", "resume", "front", "sync", "tasks", "ui", "inspect", "data", "export"):
        assert f" {command} " in shown.stdout
    assert run("nonsense").returncode == 2


def test_a_reader_that_goes_away_is_no_error(work):
    command = f"{sys.executable} -m autocompress.cli tasks | head -1"
    shown = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ,
    )
    assert shown.stderr == ""


@pytest.mark.parametrize(("given", "seconds"), [((), None), (("--time-budget", "2m"), 120.0)])
def test_the_board_knows_the_time_budget(work, monkeypatch, given, seconds):
    from autocompress import terminal

    class Noted(Exception):
        pass

    def board(_, budget):
        raise Noted(budget)

    monkeypatch.setattr(terminal, "Board", board)
    with pytest.raises(Noted) as noted:
        cli.main(search(*given))
    assert noted.value.args == (seconds,)
