"""The command line: parse, call, print.

Exit codes: 0 done, 1 the work failed, 2 the user's mistake, 130 interrupted, 143 an export or bench that SIGTERM ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import autocompress
from autocompress.errors import AutocompressError, UsageError
from autocompress.search.samplers import SAMPLERS

if TYPE_CHECKING:
    from rich.console import Console

    from autocompress.record import StudyRecord

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    _quiet()
    try:
        options = _parsed(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except AutocompressError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except RecursionError:
        return _fail("a file is nested too deeply", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {str(error.filename)!r}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command. What is unknown is told in that command's name."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if not unknown:
        return options
    parser.prog = f"autocompress {options.command}"
    option = unknown[0].partition("=")[0]
    begun = _Parser(add_help=False)
    _new_search_options(begun)
    if options.run is _resume and option in re.findall(r"--[\w-]+", begun.format_help()):
        raise UsageError(
            f"{option} is settled when a study begins: resume STUDY takes --trials, --workers and --time-budget; "
            "for another one, search under a --study name of its own"
        )
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _fail(text: str, code: int) -> int:
    print(f"autocompress: {' '.join(text.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Mistakes on one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message} (see {self.prog} --help)", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="autocompress",
        description="Search rank, bit-width and pruning threshold of every layer of a trained PyTorch model.",
    )
    parser.add_argument("--version", action="version", version=f"autocompress {autocompress.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Command, text: str, *shared: Callable[[argparse.ArgumentParser], None]) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, command=name)
        for option in (*shared, _dir_option):
            option(command)
        return command

    add(
        "search", _search, "Search plans for a task.", _search_options, _goal_options, _new_search_options, _data_option
    )
    resume = add("resume", _resume, "Go on with a study after any stop.", _search_options, _goal_options)
    resume.add_argument("study", metavar="STUDY", nargs="?", help="the study (default: the latest)")
    resume.add_argument("--trials", type=_whole, metavar="N", help="trials of the study in all (default: as before)")
    front = add("front", _front, "Show a study's Pareto front.", _study_argument)
    front.add_argument("--json", action="store_true", help="print it as JSON")
    front.add_argument("--plot", metavar="FILE", help="draw it into FILE (.png or .html)")
    add("sync", _sync, "Write a study to MLflow again.", _study_argument, _tracking_option)
    add("tasks", _tasks, "List the built-in tasks, search spaces and studies.")
    ui = add("ui", _ui, "Open the MLflow UI on a study's front.", _study_argument)
    ui.add_argument("--port", type=_whole, default=5000, metavar="P", help="port on 127.0.0.1 (5000)")
    inspect = add("inspect", _inspect, "Show what a task or an artifact holds.")
    inspect.add_argument("what", metavar="TASK|FILE", help="a task as for search, or a file written by a search")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.add_argument("--space", metavar="FILE|NAME", help="search space to count knobs in")
    inspect.add_argument("--trials", type=_whole, metavar="N", help="trials to estimate for (40)")
    inspect.add_argument("--workers", type=_whole, metavar="W", help="workers to estimate for")
    inspect.add_argument("--finetune-epochs", type=_number, metavar="E", help="finetuning to estimate for")
    _data_option(inspect)
    text = "Cut each layer to the smallest rank within a tolerance, without training."
    add("prune-rank", _prune_rank, text, _prune_rank_options, _data_option)
    data = commands.add_parser("data", help="Get data sets.", description="Get data sets.")
    get = data.add_subparsers(required=True, metavar="get", parser_class=_Parser).add_parser("get", help="get one")
    get.add_argument("name", metavar="NAME", help="mnist or fashion-mnist")
    get.set_defaults(run=_data_get, command="data get")
    _data_option(get)
    text = "Write a plan of the front to a deployment."
    add("export", _export, text, _study_argument, _goal_options, _export_options)
    text = "Measure latency and memory in onnxruntime: of a study's front, or of a file."
    add("bench", _bench, text, _bench_options, _data_option)
    return parser


def _new_search_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", metavar="TASK", help="a built-in name, module:function, or file.py:function")
    command.add_argument("--study", metavar="NAME", help="name of the study (default: made from the task's)")
    command.add_argument("--trials", type=_whole, metavar="N", help="trials of the study in all (40)")
    command.add_argument("--space", metavar="FILE|NAME", help="search space (default: the one called default)")
    command.add_argument("--seed", type=_whole, default=0, metavar="S", help="seed of everything random (0)")
    command.add_argument("--sampler", default="tpe", metavar="NAME", help=f"{', '.join(SAMPLERS)} (tpe)")
    command.add_argument(
        "--inherit", action="store_true", help="trials go on from the states of the front's milder plans"
    )
    command.add_argument(
        "--finetune-epochs",
        type=_number,
        metavar="E",
        help="finetuning of a trial (about 500 steps; continuation: 2000, or what fills --time-budget)",
    )
    _effort_option(command, "auto", "coder of the artifacts")
    known = "whose bytes count: archive, onnx, onnx-int8, executorch or executorch-int8 (archive)"
    command.add_argument("--target", default="archive", metavar="T", help=known)
    known = "make the time of a call of B examples (1) in onnxruntime a third objective"
    command.add_argument("--latency", type=_whole, nargs="?", const=1, metavar="B", help=known)
    known = "like --latency, and plans slower than such as 0.7x (of the float32 model) or 2ms are not feasible"
    command.add_argument("--max-latency", metavar="L", help=known)


def _export_options(command: argparse.ArgumentParser) -> None:
    known = "knee, smallest, fastest, best or trial=N (limits: smallest, else knee)"
    command.add_argument("--pick", default=None, metavar="WHICH", help=known)
    known = "slowest call, such as 0.7x (of the float32 model's) or 2ms"
    command.add_argument("--max-latency", metavar="L", help=known)
    known = "archive, onnx, onnx-int8, torch, executorch, executorch-int8 or mlflow (onnx)"
    command.add_argument("--format", default="onnx", metavar="FORMAT", help=known)
    _effort_option(command, None, "code an archive anew")
    command.add_argument("--register", metavar="NAME", help="register the MLflow model (--format mlflow) as NAME")
    command.add_argument("--alias", metavar="ALIAS", help="let an alias such as champion point to what is registered")
    command.add_argument("-o", "--out", required=True, metavar="DIR", help="folder to write to")


def _bench_options(command: argparse.ArgumentParser) -> None:
    known = "a .onnx file, an archive (with --task), else a study (default: the latest); a file of that name wins"
    command.add_argument("study", metavar="STUDY|FILE", nargs="?", help=known)
    known = "onnx or onnx-int8, of a study or an archive (the study's own, else onnx)"
    command.add_argument("--target", metavar="T", help=known)
    command.add_argument("--batch", type=_whole, nargs="+", metavar="B", help="batch sizes (1 32)")
    command.add_argument("--threads", type=_whole, default=1, metavar="T", help="threads of the runtime (1)")
    command.add_argument("--task", metavar="TASK", help="the task of an archive, as for search")
    command.add_argument("--baseline", metavar="FILE", help="an ONNX file to time in turns with an ONNX file")
    known = "how long a free axis of an ONNX file's inputs is, beside the batch"
    command.add_argument("--dim", type=_length, action="append", default=[], metavar="NAME=N", help=known)
    command.add_argument("--json", action="store_true", help="print the front with latencies, or the file's, as JSON")


def _prune_rank_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", metavar="TASK", help="a task as for search")
    known = "squared error over variance after the activation, such as 1%% or 0.01 (1%%)"
    command.add_argument("--tolerance", default="1%", metavar="T", help=known)
    known = "auto: the error after the activation where one is found; none: before it (auto)"
    command.add_argument("--activation", default="auto", metavar="A", help=known)
    known = "of 2-D convolutions: channel, spatial, tucker, or best, of least error at equal weights (channel)"
    command.add_argument("--scheme", default="channel", metavar="S", help=known)
    command.add_argument("-o", "--out", metavar="FILE", help="write the compressed model to FILE (.acz)")
    command.add_argument("--plan", metavar="FILE", help="write the plan to FILE as JSON")
    command.add_argument("--space", metavar="FILE", help="write a search space that holds these ranks to FILE (.yaml)")
    command.add_argument("--json", action="store_true", help="print the ranks as JSON")
    _effort_option(command, "auto", "coder of the file")


def _study_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", metavar="STUDY", nargs="?", help="the study (default: the latest)")


def _dir_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dir", metavar="DIR", help="records folder (AUTOCOMPRESS_DIR, else ./autocompress_runs)")


def _data_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", metavar="DIR", help="folder of data sets (default: AUTOCOMPRESS_DATA)")


def _tracking_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: SQLite in the records folder)")


def _goal_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-drop", metavar="D", help="how much worse than the baseline, such as 1%% or 0.01")
    command.add_argument("--max-size", metavar="SIZE", help="largest file, such as 50KB")


def _effort_option(command: argparse.ArgumentParser, default: str | None, text: str) -> None:
    known = "auto (the shorter of ours), fast, max or huffman (Deep Compression's format)"
    command.add_argument("--effort", "--coder", metavar="E", default=default, help=f"{text}: {known}")


def _search_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=_whole, metavar="W", help="trials at a time (one a core, 8 at most)")
    command.add_argument("--time-budget", metavar="T", help="stop after such as 10m; finished trials are kept")
    command.add_argument("--address", metavar="RAY", help="a running Ray cluster (default: start one here)")
    _tracking_option(command)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _length(text: str) -> tuple[str, int]:
    name, _, length = text.rpartition("=")
    if not name or not length.isdecimal() or not int(length):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N")
    return name, int(length)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _search(options: argparse.Namespace) -> int:
    from autocompress import api

    _check_goal(options)
    return _run_search(
        options,
        lambda **more: api.search(
            options.task,
            trials=options.trials,
            workers=options.workers,
            name=options.study,
            dir=options.dir,
            seed=options.seed,
            space=options.space,
            sampler=options.sampler,
            time_budget=options.time_budget,
            finetune_epochs=options.finetune_epochs,
            effort=options.effort,
            target=options.target,
            latency=options.latency,
            max_latency=options.max_latency,
            inherit=options.inherit,
            tracking_uri=options.tracking_uri,
            data_dir=options.data_dir,
            address=options.address,
            command=shlex.join(["autocompress", *sys.argv[1:]]),
            **more,
        ),
    )


def _resume(options: argparse.Namespace) -> int:
    from autocompress import api
    from autocompress.folders import Records

    _check_goal(options)
    records = Records.find(options.dir)
    options.study = records.existing(options.study)
    return _run_search(
        options,
        lambda **more: api.resume(
            options.study,
            trials=options.trials,
            workers=options.workers,
            dir=options.dir,
            time_budget=options.time_budget,
            tracking_uri=options.tracking_uri,
            address=options.address,
            **more,
        ),
    )


def _run_search(options: argparse.Namespace, search: Callable[..., Any]) -> int:
    """Search with the board on the terminal; name the best points, how to look and how to export."""
    from autocompress.limits import parse_time
    from autocompress.terminal import Board, coverage_table, preflight_lines

    console = _console()
    names: list[str] = []
    board = Board(console, None if options.time_budget is None else parse_time(options.time_budget))

    def show(name: str, found: Any) -> None:
        names.append(name)
        console.print(coverage_table(found, most=20))
        for line in preflight_lines(name, found):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if found.trials:
            board.__enter__()

    try:
        try:
            with _raised_when_terminated(KeyboardInterrupt):  # before the first trial and after the last one too
                study = search(listener=board, on_preflight=show)
        finally:
            board.__exit__()
    except KeyboardInterrupt:
        folder = f" --dir {shlex.quote(options.dir)}" if options.dir else ""
        how = f"go on with: autocompress resume {names[0]}{folder}" if names else "nothing was started"
        return _fail(f"interrupted; what is finished is kept; {how}", 130)
    record = study.record
    _print_end(console, record, options)
    if not record.front:
        return _fail("no trial gave a result: there is no front", 1)
    if len(record.measured) == 1 and record.count("failed"):
        return _fail("all trials failed but the uncompressed one: nothing was compressed", 1)
    return 0


def _print_end(console: Console, record: StudyRecord, options: argparse.Namespace) -> None:
    from autocompress import report
    from autocompress.record import name_points
    from autocompress.results import pick

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    folder = f" --dir {shlex.quote(options.dir)}" if options.dir else ""
    console.print(report.front_table(record))
    say(report.baseline_text(record))
    failed = [t for t in record.trials if t.state == "failed"]
    if failed:
        say(f"{len(failed)} trials failed; the first: trial {failed[0].number}: {failed[0].error}")
    for name, trial in name_points(record):
        say(f"{name:<9} {report.trial_summary(record, trial)}")
    goal = ""
    max_latency = None if record.timing is None else record.timing.limit
    limits = {"max_drop": options.max_drop, "max_size": options.max_size, "max_latency": max_latency}
    if record.front and any(limits.values()):
        given = {name.replace("_", "-"): value for name, value in limits.items() if value}
        goal = "".join(f" --{name} {shlex.quote(value)}" for name, value in given.items())
        try:
            chosen = pick(record, **limits)
            say(f"goal met  {report.trial_summary(record, chosen)}")
        except UsageError as missed:
            goal = ""
            say(f"goal not met: {missed}")
    say(f"look:     autocompress front {record.study}{folder}   or   autocompress ui {record.study}{folder}")
    say(f"MLflow:   {_link(record, folder)}")
    if record.front:
        way = f"{goal or ' --max-drop 1%'} --format {record.format}"
        say(f"export:   autocompress export {record.study}{folder}{way} -o deploy")


def _front(options: argparse.Namespace) -> int:
    from autocompress import api, report

    study = api.open_study(options.study, dir=options.dir)
    record = study.record
    if options.plot:
        _plot(record, Path(options.plot))
    if options.json:
        print(json.dumps(record.to_front_json(), indent=2))
        return 0
    console = _console()
    console.print(report.front_table(record))
    console.print(report.baseline_text(record), highlight=False, markup=False, soft_wrap=True)
    folder = f" --dir {shlex.quote(options.dir)}" if options.dir else ""
    console.print(f"MLflow: {_link(record, folder)}", highlight=False, markup=False, soft_wrap=True)
    if options.plot:
        console.print(f"drawn: {options.plot}", highlight=False, markup=False)
    return 0


def _link(record: StudyRecord, folder: str) -> str:
    """Where the study's front is in the MLflow UI, and what serves it."""
    from autocompress.tracking.store import home_url, is_http

    if not record.tracking_uri or not record.experiment_id:
        return f"not written yet: autocompress sync {record.study}{folder}"
    url = home_url(record.tracking_uri, record.experiment_id)
    if is_http(record.tracking_uri):
        return url
    return f"http://127.0.0.1:5000{url}   (served by: autocompress ui {record.study}{folder})"


def _plot(record: StudyRecord, path: Path) -> None:
    from autocompress import report
    from autocompress.folders import writing

    draw = {".png": report.front_png, ".html": report.front_html}.get(path.suffix.lower())
    if draw is None:
        raise UsageError(f"plot is {str(path)!r}, allowed: a file that ends in .png or .html")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"folder {str(path.absolute().parent)!r} of --plot does not exist")
    with writing(path):
        draw(record, path)


def _sync(options: argparse.Namespace) -> int:
    from autocompress import api

    api.sync(options.study, dir=options.dir, tracking_uri=options.tracking_uri)
    folder = f" --dir {shlex.quote(options.dir)}" if options.dir else ""
    print(f"written: {_link(api.open_study(options.study, dir=options.dir).record, folder)}")
    return 0


def _tasks(options: argparse.Namespace) -> int:
    from autocompress.folders import Records
    from autocompress.search.space_file import available
    from autocompress.tasks.builtin import describe

    records = Records.find(options.dir)
    for title, entries in (("tasks", describe()), ("search spaces", available())):
        print(f"{title}:")
        for name, text in entries.items():
            print(f"  {name:<16} {text}")
    print(f"studies in {records.root}:")
    for name in records.names():
        print(f"  {name}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    from autocompress import api, tracking
    from autocompress.folders import Records
    from autocompress.tracking.store import home_url

    record = api.open_study(options.study, dir=options.dir).record
    if not record.tracking_uri or not record.experiment_id:
        folder = f" --dir {shlex.quote(options.dir)}" if options.dir else ""
        raise UsageError(f"study {record.study!r} is not in MLflow yet: run autocompress sync {record.study}{folder}")
    root = Records.find(options.dir).mlflow_artifacts
    path = home_url(record.tracking_uri, record.experiment_id)
    tracking.serve(record.tracking_uri, root, options.port, path, _print_link)
    return 0


def _print_link(link: str) -> None:
    print(f"the front is at {link}   (Ctrl-C ends)", flush=True)


def _inspect(options: argparse.Namespace) -> int:
    from autocompress import inspection

    path = Path(options.what)
    if path.is_file() and path.suffix != ".py":
        for what in ("space", "trials", "workers", "finetune_epochs", "data_dir"):
            if getattr(options, what) is not None:
                raise UsageError(f"--{what.replace('_', '-')} is for a task, and {options.what!r} is a file")
        found = inspection.inspect_file(path)
        if options.json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            console = _console()
            console.print(inspection.file_summary(found), highlight=False, markup=False, soft_wrap=True)
            console.print(inspection.file_table(found))
        return 0
    if path.suffix == ".acz":
        raise UsageError(f"file {options.what!r} does not exist")
    report = inspection.inspect_task(
        options.what,
        space=options.space,
        trials=40 if options.trials is None else options.trials,
        workers=options.workers,
        epochs=options.finetune_epochs,
        data_dir=options.data_dir,
    )
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
        return 0
    from autocompress.terminal import coverage_table, preflight_lines

    console = _console()
    console.print(coverage_table(report))
    for line in preflight_lines("to come", report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _prune_rank(options: argparse.Namespace) -> int:
    from autocompress import api, rank_pruning, report
    from autocompress.folders import write_file
    from autocompress.origins import load_origin, origin_of

    tolerance = rank_pruning.parse_tolerance(options.tolerance)
    if options.activation not in ("auto", "none"):
        raise UsageError(f"activation is {options.activation!r}, allowed: auto, none")
    api.check_effort(options.effort)
    for path in (options.out, options.plan, options.space):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"folder {str(Path(path).absolute().parent)!r} does not exist")
    from autocompress.tasks.checking import check_task
    from autocompress.trial import Workbench

    task = load_origin(origin_of(options.task, options.data_dir))
    check_task(task)
    bench = Workbench(task)
    found = rank_pruning.prune_ranks(
        bench, tolerance, activation=options.activation == "auto", scheme=options.scheme, effort=options.effort
    )
    if options.out:
        write_file(Path(options.out), found.artifact)
    if options.plan:
        write_file(Path(options.plan), f"{json.dumps(found.plan.to_json(), indent=2)}\n".encode())
    if options.space:
        import yaml

        space = rank_pruning.space_from(found, bench.layers)
        write_file(Path(options.space), yaml.safe_dump(space, sort_keys=False).encode())
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    console = _console()
    console.print(rank_pruning.rank_table(found))
    size = f"{report.human_bytes(found.baseline_bytes)} -> {report.human_bytes(len(found.artifact))}"
    print(f"metric on validation {found.metric[0]:.4f} -> {found.metric[1]:.4f}, {size} (32 bits, no finetuning)")
    for what, path in (("file", options.out), ("plan", options.plan)):
        if path:
            print(f"{what}:   {path}")
    if options.space:
        print(f"go on:  autocompress search {shlex.quote(options.task)} --space {shlex.quote(options.space)}")
    return 0


def _data_get(options: argparse.Namespace) -> int:
    from autocompress.tasks import data

    where = data.get(options.name, options.data_dir, lambda text: print(text, file=sys.stderr))
    print(where)
    return 0


def _export(options: argparse.Namespace) -> int:
    from autocompress import api, report
    from autocompress.results import pick

    _check_goal(options)
    if options.effort is not None:
        api.check_effort(options.effort)
    study = api.open_study(options.study, dir=options.dir)
    choice = options.pick or "smallest"
    limits = {"max_drop": options.max_drop, "max_size": options.max_size, "max_latency": options.max_latency}
    if options.pick is None and not any(limits.values()):
        choice = "knee"
    trial = pick(study.record, choice=choice, **limits)
    with _tidy_when_terminated():
        manifest = study.point(trial).export(
            options.out, format=options.format, effort=options.effort, register=options.register, alias=options.alias
        )
    print(f"exported  {report.trial_summary(study.record, trial)}")
    out = Path(options.out)
    if layers := manifest.get("layers"):
        short = sum(layer["form"] in ("static", "dynamic") for layer in layers.values())
        print(f"8 bits    {short} of {len(layers)} layers and sums compute in 8 bits, where it was faster")
    if cut := manifest.get("cut", {}).get("dead_units"):
        macs = f"{report.human_count(manifest['cut']['macs_before'])} -> {report.human_count(manifest['cut']['macs'])}"
        print(f"cut       {cut} of {manifest['cut']['units']} units are dead and are left out: {macs} MACs")
    if timed := manifest["verification"].get("latency"):
        examples = "one example" if timed["batch"] == 1 else f"{timed['batch']} examples"
        where = "one thread of this machine" if timed["threads"] == 1 else "this machine"
        print(
            f"time      {1e3 * timed['seconds']:.3g} ms a call of {examples} on {where}, "
            f"{timed['ratio']:.2f}x of the float32 model's"
        )
    print(
        f"written   {out / manifest['file']}  {report.human_bytes(manifest['size_bytes'])}, checked against the "
        f"artifact on the test set; {out / 'manifest.json'} says how"
    )
    if manifest["size_bytes"] > (archive := manifest["artifact"]["size_bytes"]):
        print(
            f"archive   {report.human_bytes(archive)}: the same plan as --format archive; this file is longer, "
            "since it holds values and graph as its runtime reads them"
        )
    if found := manifest.get("registered"):
        print(f"registered  {found['name']} version {found['version']}; serve it with:")
        uri = shlex.quote(found["tracking_uri"])
        print(f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m {shlex.quote(found['uri'])} --env-manager local")
    return 0


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """SIGTERM inside unwinds as Ctrl-C does, so that what was begun is removed, and ends with exit code 143."""
    try:
        with _raised_when_terminated(_Terminated):
            yield
    except _Terminated:
        raise SystemExit(_fail("terminated", 128 + signal.SIGTERM)) from None


@contextlib.contextmanager
def _raised_when_terminated(problem: type[BaseException]) -> Iterator[None]:
    """SIGTERM inside raises that. Only where nobody else handles it, and on the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: nothing stops the tidying
        raise problem

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _bench(options: argparse.Namespace) -> int:
    from autocompress import api, report
    from autocompress.timing import BATCHES

    if options.batch and len(set(options.batch)) < len(options.batch):
        return _fail(f"--batch is {' '.join(map(str, options.batch))}, allowed: each size once", 2)
    if options.study and Path(options.study).is_file():
        return _bench_file(options)
    if options.study and Path(options.study).suffix in (".onnx", ".acz"):
        raise UsageError(f"file {options.study!r} does not exist")
    for what in ("task", "baseline", "dim", "data_dir"):
        if getattr(options, what):
            raise UsageError(f"--{what.replace('_', '-')} is for a file; a study knows its own")
    with _tidy_when_terminated():
        study = api.bench(
            options.study,
            dir=options.dir,
            target=options.target,
            batches=options.batch or BATCHES,
            threads=options.threads,
        )
    if options.json:
        print(json.dumps(study.record.to_front_json(), indent=1))
        return 0
    console = _console()
    console.print(report.latency_table(study.record))
    print(
        "ms of a call, warm, half the distance of its quartiles, and how many times the float32 model's export takes;\n"
        "memory: what loading the file and one call add to the peak of a fresh process;"
    )
    print(f"in the study's record; in MLflow with: autocompress sync {study.name}")
    return 0


def _bench_file(options: argparse.Namespace) -> int:
    from autocompress import file_bench

    with _tidy_when_terminated():
        found = file_bench.bench_file(
            options.study,
            task=options.task,
            baseline=options.baseline,
            target=options.target,
            batches=options.batch,
            threads=options.threads,
            lengths=dict(options.dim),
            data_dir=options.data_dir,
        )
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
        return 0
    console = _console()
    console.print(file_bench.bench_summary(found), highlight=False, markup=False, soft_wrap=True)
    console.print(file_bench.bench_table(found))
    print("ms of a call, warm, and half the distance of its quartiles;")
    print("memory: what loading the file and one call add to the peak of a fresh process")
    if found.baseline:
        print(f"its: of {found.baseline}, in turns; ratio: how many times its time a call takes")
    return 0


def _check_goal(options: argparse.Namespace) -> None:
    """Mistakes in --max-drop, --max-size and --max-latency show before any work is done."""
    from autocompress.limits import parse_drop, parse_latency, parse_size

    if options.max_drop is not None:
        parse_drop(options.max_drop)
    if options.max_size is not None:
        parse_size(options.max_size)
    if getattr(options, "max_latency", None) is not None:
        parse_latency(options.max_latency)


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _quiet() -> None:
    """Our own warnings on standard error, one line each; other libraries' chatter off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("autocompress: %(message)s"))
    logger = logging.getLogger("autocompress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
