"""A short run of scripts/fuzz_artifact.py: damaged files end in an ArtifactError or the right model."""

import importlib.util
import sys
from pathlib import Path
from random import Random

import pytest

from autocompress.codec import container, jit
from autocompress.errors import ArtifactError

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_artifact.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_artifact", SCRIPT)
    module = sys.modules["fuzz_artifact"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.few_elements():
        yield module
    del sys.modules["fuzz_artifact"]


def test_honest_files_are_read_and_are_the_same_after_they_were_taken_apart(fuzz, tmp_path):
    for sample in fuzz.corpus():
        assert not list(fuzz.faults(fuzz.Damaged(sample.data, sample, False), tmp_path / "x.acz")), sample.name
        again = fuzz.assemble(fuzz.take_apart(sample.data))
        assert fuzz.fingerprint(container.unpack(again)) == fuzz.fingerprint(container.unpack(sample.data))
    kinds = {kind for s in fuzz.corpus() for kind in (e.kind for e in container.Archive(s.data).entries.values())}
    assert kinds >= {f"{kind}/{coder}" for kind in ("sparse", "coded", "grid") for coder in ("fast", "max")}
    assert kinds >= {"raw", "raw/max", "sparse", "coded", "grid"}  # those of the first format too


def test_damaged_files_are_refused_or_right(fuzz, tmp_path):
    samples, told = fuzz.small_corpus(), []
    for number in range(160):
        found = fuzz.damage(Random(f"suite {number}"), samples)
        told += [(number, found.sample.name, text) for text in fuzz.faults(found, tmp_path / "x.acz")]
    assert not told


SHAPES = [(), (0,), (1,), (1, 9), (9, 1), (3, 5), (0, 4), (2, 3, 2, 2), (17,)]


def outcome(fuzz, data):
    try:
        return fuzz.fingerprint(container.unpack(data))
    except ArtifactError as error:
        return str(error)


def test_no_stream_makes_a_kernel_look_outside_its_arrays(fuzz):
    """Streams that nobody wrote, decoded by plain Python with every index checked: the same comes out."""
    read = 0
    for number in range(100):
        draw = Random(f"made {number}")
        data = fuzz.made_file(draw, draw.choice(SHAPES))
        with fuzz.kernels_called(fuzz.guarded):
            careful = outcome(fuzz, data)
        assert careful == outcome(fuzz, data), number
        read += not isinstance(careful, str)
    assert read > 10


def test_an_index_outside_is_noticed(fuzz):
    @jit.kernel
    def beyond(values: "Int64s", at: "Int") -> "Int":  # noqa: F821
        return values[at]

    with fuzz.kernels_called(fuzz.guarded):
        for at in (-1, 3):
            with pytest.raises(IndexError, match=f"element {at} of 3"):
                beyond(fuzz.np.zeros(3, "i8"), at)
