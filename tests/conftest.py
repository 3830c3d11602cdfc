"""One thread for torch: the tests' tensors are small, and two threads on two busy cores only wait for each other.

What libraries do anew each time, with the same result, is done once: an export lists torch's operators, two thirds of
opening a study are the loading of Optuna's old migrations.
"""

import gc
import os
import sys
from functools import cache, wraps
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def _but_for_env(load):
    """The loader of Alembic's files; env.py is run each time, since that is what migrates."""
    once = cache(load)
    return wraps(load)(lambda name, path: (load if Path(path).name == "env.py" else once)(name, path))


ONCE = {
    ("torch._export.utils", "_materialize_cpp_cia_ops"): cache,
    ("alembic.util.pyfiles", "load_module_py"): _but_for_env,
}
"""Functions that are replaced as soon as a test has imported their module, and with what."""


def pytest_runtest_setup():
    for module, name in [key for key in ONCE if key[0] in sys.modules]:
        function, made = getattr(sys.modules[module], name), ONCE.pop((module, name))
        for holder in [m for m in list(sys.modules.values()) if m and vars(m).get(name) is function]:
            setattr(holder, name, made(function))


@pytest.fixture(scope="module", autouse=True)
def _lasting_objects_are_not_searched_for_garbage():
    """A million objects of libraries, up to a second each time, and exports call for it often."""
    gc.set_threshold(10_000, 10, 10)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """One folder for what modules share, made once and found by `functools.cache`."""
    return tmp_path_factory.mktemp("session")
