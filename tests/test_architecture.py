"""The layers of docs/design.md: who may import whom, which libraries, and how fast the package comes up."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import autocompress

PACKAGE = Path(__file__).parents[1] / "autocompress"
LEVELS = (
    {"errors"},
    {"plan"},
    {"limits"},
    {"pareto", "timing"},
    {"record"},
    {"codec"},
    {"compress"},
    {"tasks"},
    {"search"},
    {"trial"},
    {"tracking"},
    {"engine"},
    {"deploy"},
    {"report"},
)
"""Parts, the lowest first; whatever is not here is on top of all: api, cli and what they are made of."""
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
TOP = len(LEVELS)
HOMES = {"mlflow": {"tracking"}, "ray": {"engine"}, "optuna": {"search"}}
"""The only parts that may import a library."""
PURE = {"errors", "plan", "limits", "pareto", "timing", "record"}
WITHOUT_TORCH = {*PURE, "codec", "search", "tracking", "report", "folders", "terminal", "cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """errors, plan, codec, ...: the first name under the package; "" for its __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of each import at any depth, those for type checkers left out."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            below: list[ast.AST] = list(node.orelse)
        else:
            below = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for child in below:
            yield from walk(child)

    return list(walk(nodes(path)[0]))


def names(path: Path) -> list[str]:
    return [name for _, name in imports(path)]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def level_of(part: str) -> int:
    return LEVEL.get(part, TOP)


def test_every_level_is_there_and_the_command_line_on_top():
    parts = {part_of(path) for path in FILES}
    assert set(LEVEL) < parts
    assert level_of("cli") == level_of("api") == TOP
    assert len(FILES) > 40


def test_a_file_imports_only_from_its_own_level_or_below():
    wrong = []
    for path in FILES:
        for line, name in imports(path):
            head, part, *_ = f"{name}..".split(".")
            used = head == "autocompress" and part not in ("", "__version__") and part_of(path)
            if used and level_of(part) > level_of(part_of(path)):
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_of_deploy_need_each_other():
    """Not at the top nor inside functions, nor in a ring of several."""
    files = {f"autocompress.deploy.{path.stem}": path for path in FILES if part_of(path) == "deploy"}
    needs = {name: {used for full in names(path) for used in (full, full.rpartition(".")[0]) if used in files}
             for name, path in files.items()}  # fmt: skip
    assert "autocompress.deploy.recorder" in needs["autocompress.deploy.export"]

    def reached(name, seen):
        for used in needs[name] - seen:
            seen.add(used)
            reached(used, seen)
        return seen

    assert [name for name in files if name in reached(name, set())] == []


def test_the_packages_own_name_is_used_for_its_version_alone():
    """`import autocompress` would let any file reach any other through the lazy names."""
    wrong = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "autocompress":
                wrong += [f"{where(path, node.lineno)} uses autocompress.{node.attr}"] * (node.attr != "__version__")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library):
    users = {part_of(path) for path in FILES if any(n.split(".")[0] == library for n in names(path))}
    assert users == HOMES[library]


def test_the_lower_parts_are_pure_and_decisions_know_no_torch():
    wrong = []
    for path in FILES:
        for line, name in imports(path):
            top = name.split(".")[0]
            pure = part_of(path) in PURE and top not in sys.stdlib_module_names | {"autocompress", "numpy"}
            if pure or (part_of(path) in WITHOUT_TORCH and top == "torch"):
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_unpickled():
    """Pickles only cross from the driver to its own workers (engine) and between it and the process that writes
    MLflow (tracking/process); NumPy's own files hold none unless asked."""
    pickles, calls = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, {"torch.load", "eval", "exec"}
    channels = {PACKAGE / "engine.py", PACKAGE / "tracking" / "process.py"}
    wrong = []
    for path in FILES:
        for line, name in imports(path):
            if name.split(".")[0] in pickles and path not in channels:
                wrong.append(f"{where(path, line)} imports {name}")
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                wrong.append(f"{where(path, node.lineno)} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{where(path, node.value.lineno)} allows pickles")
    assert not wrong, "\n".join(wrong)


def run(code: str) -> tuple[str, float]:
    """What a fresh process prints, and its seconds from start to end."""
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    began = time.perf_counter()
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return told.stdout, time.perf_counter() - began


HEAVY = "{'torch', 'ray', 'mlflow', 'optuna', 'numpy', 'onnx', 'plotly', 'matplotlib', 'sklearn'}"
LOADED = f"; print(sorted({HEAVY} & set(sys.modules)))"


def test_importing_the_package_is_fast_and_loads_nothing_heavy():
    code = "import sys, time; t = time.perf_counter(); import autocompress; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(3):
        first, loaded = run(code + LOADED)[0].splitlines()
        assert loaded == "[]"
        seconds.append(float(first))
    assert min(seconds) < 0.2


def test_help_is_fast():
    code = "import sys; from autocompress.cli import main; sys.exit(main(['--help']))"
    seconds = []
    for _ in range(3):
        text, took = run(code)
        assert "usage: autocompress" in text
        seconds.append(took)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("plan", []), ("errors", []), ("pareto", ["numpy"]), ("record", ["numpy"]), ("codec.container", ["numpy"]),
        ("search.space", []), ("report", []), ("tasks.task", []), ("tasks.builtin", []), ("tasks.nets", []),
    ],
)  # fmt: skip
def test_parts_that_are_light_stay_light(module, allowed):
    loaded = run(f"import sys, autocompress.{module}{LOADED}")[0].strip()
    assert set(ast.literal_eval(loaded)) <= {*allowed, "numpy"}


def test_the_public_names_are_all_there():
    assert set(autocompress.__all__) == {"__version__", *autocompress._HOMES} == set(dir(autocompress))
    for name, module in autocompress._HOMES.items():
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        kinds = ast.FunctionDef | ast.ClassDef
        assert name in {node.name for node in nodes(path) if isinstance(node, kinds)}, name
    with pytest.raises(AttributeError, match="module 'autocompress' has no attribute 'nothing'"):
        _ = autocompress.nothing
