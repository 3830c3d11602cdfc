"""The artifact file: inverse for every kind of tensor, golden files, and every kind of damage told in one line."""

import importlib.util
import json
import math
import struct
import tracemalloc
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.codec import container, header, huffman, leb128, mixed_stream, mixing, plain, rans, tables
from autocompress.codec.container import Archive, Artifact, Coded, Raw, grid_table, pack, unpack
from autocompress.codec.tensors import DTYPES
from autocompress.errors import ArtifactError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the max coder before Hypothesis looks at the clock."""
    pack(Artifact({"x": Coded(np.zeros((2, 2), np.uint16), np.zeros(1, "f4"))}))


@cache
def golden():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(one, other):
    """Equal to the last bit, NaN payloads and signs of zero included."""
    assert list(one.tensors) == list(other.tensors)
    assert one.header == other.header
    for name, a in one.tensors.items():
        b = other.tensors[name]
        assert (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape), name
        if isinstance(a, Coded):
            assert np.array_equal(a.symbols, b.symbols), name
            assert a.table.tobytes() == b.table.tobytes(), name
            assert a.grid == b.grid, name
        else:
            assert a.array.dtype == b.array.dtype, name
            assert np.ascontiguousarray(a.array).tobytes() == np.ascontiguousarray(b.array).tobytes(), name


@pytest.mark.parametrize("effort", container.EFFORTS)
def test_golden_tensors_are_read_for_ever(effort):
    data = (GOLDEN / f"kinds3-{effort}.acz").read_bytes()
    same(unpack(data), golden().kinds())
    assert pack(golden().kinds(), effort) == data  # files are the same on every machine


def test_the_golden_file_of_feeders_is_read_for_ever():
    data = (GOLDEN / "feeder3.acz").read_bytes()
    same(unpack(data), golden().fed())
    assert pack(golden().fed(), "max") == data
    archive = Archive(data)
    fed = [archive._feeder_of(entry) for entry in archive.entries.values()]
    assert fed[0] == 0
    assert sum(distance > 0 for distance in fed) >= 3
    for name in reversed(archive.entries):  # in any order, each with its feeders
        assert np.array_equal(Archive(data).tensor(name).symbols, golden().fed().tensors[name].symbols)


def test_golden_files_are_all_there_and_are_never_written_again(tmp_path, capsys):
    for name in (
        "kinds.acz", "model.acz", "model.json", "kinds3-auto.acz", "kinds3-huffman.acz", "model3.acz", "model3.json",
    ):  # fmt: skip
        assert (GOLDEN / name).stat().st_size > 300, name
    (tmp_path / "x.acz").write_bytes(b"old")
    golden().write(tmp_path / "x.acz", b"new")
    assert (tmp_path / "x.acz").read_bytes() == b"old"
    assert "kept x.acz" in capsys.readouterr().out


def headed(header: bytes, streams: bytes = b"") -> bytes:
    """A file with this header."""
    return struct.pack("<4sII", b"ACZ3", len(header), zlib.crc32(header)) + header + streams


def deflated(value: object) -> bytes:
    machine = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=header._DICTIONARY)
    return machine.compress(json.dumps(value).encode()) + machine.flush()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "has no end"),
        (b"\x01", "no end"),
        (b"\x80\x80", "has no end"),
        (b"\x01\x0b\x00\x00\x00\x00\x00\x00\x00", "kind 11 and dtype 0"),
        (b"\x01\x00\x63\x00\x00\x00\x00\x00\x00", "kind 0 and dtype 99"),
        (b"\x01\x00\x00\x00\x00\x00\x00", "in its table"),
        (b"\xff\xff\xff\xff\xff\xff\x7f" + bytes(20), "damaged"),
        (b"\x01\x00\x00\xff\xff\x7f" + bytes(30), "has shape|damaged"),
        (b"\x00" + deflated([1]), "lists no tensors"),
        (b"\x00" + deflated({"tensors": ["x"]}), "1 names for 0 tensors"),
        (b"\x00" + deflated({"tensors": []})[:-3], "wrong length|damaged"),
        (b"\x00" + deflated({"tensors": []}) + b"more", "wrong length"),
        (b"\x01" + bytes(8) + deflated({"tensors": [5]}), "malformed"),
        (b"\x00" + deflated({"tensors": [], "class": [{}] * 100_000}), "wrong length"),  # 30 MB from 600 bytes
        (b"\x00" + deflated({"tensors": [], "class": json.loads("[" * 300 + "]" * 300)}), "nested more than 200 times"),
    ],
)
def test_a_damaged_table_of_tensors_is_told(head, said):
    refused(headed(head), said)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_to_a_header_with_a_right_checksum_is_refused_or_read(data):
    whole = (GOLDEN / "kinds3-auto.acz").read_bytes()
    _, length, _ = struct.unpack_from("<4sII", whole)
    head = bytearray(whole[12 : 12 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        head[data.draw(st.integers(0, min(length - 1, 200)))] = data.draw(st.integers(0, 255))
    with suppress(ArtifactError):
        unpack(headed(bytes(head), whole[12 + length :]))


def test_a_header_of_nothing_but_repetition_is_read_all_the_same():
    artifact = Artifact({}, {"note": "ab" * 200_000})
    same(unpack(pack(artifact)), artifact)


def test_the_header_of_a_small_net_is_small():
    tree = ["Sequential", [[str(i), layer] for i, layer in enumerate([
        ["Conv2d", {"in_channels": 1, "out_channels": 16, "kernel_size": [3, 3], "padding": [1, 1]}], ["ReLU", {}],
        ["Conv2d", {"in_channels": 16, "out_channels": 32, "kernel_size": [3, 3], "padding": [1, 1]}], ["ReLU", {}],
        ["MaxPool2d", {"kernel_size": 2, "stride": 2}], ["Flatten", {}],
        ["Linear", {"in_features": 512, "out_features": 64}], ["ReLU", {}],
        ["Linear", {"in_features": 64, "out_features": 10}],
    ])]]  # fmt: skip
    plan = {"0": [5, 0.572151], "2": [5, 0.962579], "6": [3, 1.983546], "8": [6, 0.306753]}
    shapes = {"0": (16, 1, 3, 3), "2": (32, 16, 3, 3), "6": (64, 512), "8": (10, 64)}
    tensors = {f"{name}.weight": Coded(np.zeros(shape, np.uint16), np.zeros(1, "f4")) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": Raw(np.zeros(shape[0], "f4"), "float32") for name, shape in shapes.items()}
    data = pack(Artifact(tensors, {"made_by": "0.1.0", "ranks": {}, "plan": plan, "model": tree}))
    assert header.read(data).streams_at < 270


def test_the_shorter_coder_is_taken_and_each_is_read(monkeypatch):
    mask = golden().structured_mask(96, 128)
    coded = Coded(
        (mask * (1 + golden().pattern(mask.size, 7).reshape(mask.shape))).astype(np.uint16), np.zeros(8, "f4")
    )
    artifact = Artifact({"a": coded, "b": Coded(np.zeros((3, 0), np.uint16), np.zeros(1, "f4"))})
    data = {effort: pack(artifact, effort) for effort in container.EFFORTS}
    kinds = {effort: [e.kind for e in header.read(packed).entries] for effort, packed in data.items()}
    assert kinds == {
        "auto": ["coded/max", "coded/fast"], "fast": ["coded/fast"] * 2, "max": ["coded/max"] * 2,
        "huffman": ["coded/huffman"] * 2,
    }  # fmt: skip
    assert len(data["auto"]) <= len(data["max"]) < len(data["fast"]) < len(data["huffman"])
    for packed in data.values():
        same(unpack(packed), artifact)
    monkeypatch.setattr(container, "MOST_MIXED", 0)
    assert pack(artifact) == data["fast"]


def test_a_large_tensor_goes_through_the_max_coder_only_if_it_fills_its_bytes(monkeypatch):
    monkeypatch.setattr(container, "FREE", 1000)
    draw = np.random.default_rng(0)
    full, empty = draw.integers(0, 4, (40, 50)).astype(np.uint16), np.zeros((400, 50), np.uint16)
    empty[3, 4] = 1
    data = pack(Artifact({n: Coded(s, np.arange(4, dtype="f4")) for n, s in (("a", full), ("b", empty))}), "max")
    assert [e.kind for e in header.read(data).entries] == ["coded/max", "coded/fast"]
    assert np.array_equal(unpack(data).tensors["b"].symbols, empty)


@pytest.mark.parametrize("dtype", ["coded", "float32", "bfloat16"])
def test_many_tensors_of_few_bytes_each_are_read_back(dtype, monkeypatch):
    """What the writer leaves to the max coder is what the reader allows all tensors together."""
    monkeypatch.setattr(container, "FREE", 50_000)
    eye = np.eye(400, 50, 49)
    tensor = Coded(eye.astype(np.uint16), np.arange(2, dtype="f4")) if dtype == "coded" else Raw(
        eye.astype("u2" if dtype == "bfloat16" else "f4"), dtype)  # fmt: skip
    for effort in container.EFFORTS:
        artifact = Artifact(dict.fromkeys("abcd", tensor))
        same(unpack(pack(artifact, effort)), artifact)
        ones = Artifact({name: Raw(np.ones((400, 50), "f4"), "float32") for name in "abcd"})
        same(unpack(pack(ones, effort)), ones)


numbers = {name: np.dtype(kind) for name, kind in DTYPES.items()}
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(numbers)), shapes, st.integers(0, 2**32 - 1), st.sampled_from(["dense", "sparse", "bits"])
)
def test_raw_tensors_come_back_bit_by_bit(dtype, shape, seed, kind):
    draw = np.random.default_rng(seed)
    array = np.frombuffer(draw.bytes(math.prod(shape) * numbers[dtype].itemsize), numbers[dtype]).reshape(shape)
    if dtype == "bool":
        array = draw.random(shape) < 0.5
    elif kind != "bits" and dtype != "bfloat16":
        array = np.asarray(draw.normal(0, 3, shape)).astype(numbers[dtype])
    if kind == "sparse":
        array = np.where(draw.random(shape) < 0.9, np.zeros((), array.dtype), array)
    artifact = Artifact({"x": Raw(np.asarray(array), dtype)})
    for effort in ("auto", "fast"):
        same(unpack(pack(artifact, effort)), artifact)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(container.EFFORTS))
def test_coded_tensors_come_back(shape, size, seed, even, effort):
    draw = np.random.default_rng(seed)
    symbols = draw.integers(0, size, shape).astype(np.uint16)
    grid = (float(np.float32(draw.normal())), int(draw.integers(-200, 1)))
    table = grid_table(*grid, size) if even else draw.normal(0, 1, size).astype(np.float32)
    tensor = Coded(symbols, table, "float32", grid if even else None)
    back = unpack(pack(Artifact({"w": tensor}), effort)).tensors["w"]
    same(Artifact({"w": back}), Artifact({"w": tensor}))
    assert back.values().tobytes() == table[symbols].tobytes()


def test_a_table_of_65536_and_a_transposed_array():
    draw = np.random.default_rng(0)
    wide = Coded(np.array([[0, 65535], [3, 3]], np.uint16), draw.normal(0, 1, 65536).astype(np.float32))
    turned = Raw(draw.normal(0, 1, (4, 6)).T, "float64")
    big_endian = Raw(np.arange(5, dtype=">i4"), "int32")
    back = unpack(pack(Artifact({"w": wide, "t": turned, "b": big_endian}))).tensors
    assert np.array_equal(back["w"].values(), wide.values())
    assert np.array_equal(back["t"].array, turned.array)
    assert back["b"].array.tolist() == [0, 1, 2, 3, 4]


def test_a_sparse_tensor_takes_the_sparse_kind():
    draw = np.random.default_rng(0)
    array = np.where(draw.random((200, 300)) < 0.02, draw.normal(0, 1, (200, 300)), 0).astype(np.float32)
    data = pack(Artifact({"x": Raw(array, "float32")}))
    assert header.read(data).entries[0].kind.startswith("sparse/")
    assert len(data) < 4 * np.count_nonzero(array) + 60000 * 0.1415 / 8 * 1.05 + 200  # values, and the mask's entropy


def test_header_and_order_survive():
    names = ["b", "a", "", "ünï.weight", "a.b.0"]
    more = {"model": ["ReLU", {}], "numbers": [1, 2.5, None, True], "text": "naïve\n"}
    artifact = Artifact({name: Raw(np.arange(3.0) + i, "float64") for i, name in enumerate(names)}, more)
    data = pack(artifact)
    same(unpack(data), artifact)
    assert pack(unpack(data)) == data
    assert {e.name: e.shape for e in header.read(data).entries} == dict.fromkeys(names, (3,))


# --- damage ----------------------------------------------------------------------------------


def small():
    draw = np.random.default_rng(7)
    symbols = (draw.integers(0, 5, (9, 20)) * (draw.random((9, 20)) < 0.5)).astype(np.uint16)
    sparse = np.zeros((12, 20), np.float32)
    sparse[2:4, 5:8] = draw.normal(size=(2, 3))
    return Artifact(
        {
            "coded": Coded(symbols, np.arange(5, dtype=np.float32)),
            "grid": Coded(symbols[::-1].copy(), grid_table(0.5, -2, 5), "float32", (0.5, -2)),
            "sparse": Raw(sparse, "float32"),
            "raw": Raw(draw.normal(size=7), "float64"),
            "zeros": Raw(np.zeros(300, np.int64), "int64"),
        },
        {"model": ["Identity", {}]},
    )


def one(shape, stream, kind="coded/fast", dtype="float32"):
    """A file with one tensor, its checksum right."""
    return header.write({}, [("x", kind, dtype, tuple(shape))], [stream]) + stream


def unpacked_or_none(data):
    """None where the file is refused, which is the only error that may come."""
    try:
        return unpack(data)
    except ArtifactError:
        return None


def refused(data, said, limit=60 << 20):
    """One line of ArtifactError that says so, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=said) as caught:
            unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < limit


def test_every_truncation_is_refused():
    data = pack(small())
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match=r"truncated|not an autocompress artifact|damaged"):
            unpack(data[:length])
    with pytest.raises(ArtifactError, match="3 bytes follow its last tensor"):
        unpack(data + b"abc")


def test_flipped_bytes_are_refused():
    data = pack(small())
    draw = np.random.default_rng(1)
    for _ in range(2000):
        broken = bytearray(data)
        broken[draw.integers(len(data))] ^= int(draw.integers(1, 256))
        with pytest.raises(ArtifactError):
            unpack(bytes(broken))


def test_damage_behind_right_checksums_is_refused_or_harmless():
    """What a careful forger would do: streams are changed and their checksums mended."""
    told = 0
    for effort in container.EFFORTS:
        data = pack(small(), effort)
        head = header.read(data)
        draw = np.random.default_rng(2)
        for _ in range(700):
            broken = bytearray(data)
            for place in draw.integers(head.streams_at, len(data), draw.integers(1, 4)):
                broken[place] ^= int(draw.integers(1, 256))
            streams = [bytes(broken[e.start : e.start + e.length]) for e in head.entries]
            rows = [(e.name, e.kind, e.dtype, e.shape) for e in head.entries]
            found = unpacked_or_none(b"".join([header.write(head.header, rows, streams), *streams]))
            told += found is None
            assert found is None or {n: t.shape for n, t in found.tensors.items()} == {
                e.name: e.shape for e in head.entries
            }
    assert told > 300


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an autocompress artifact: it starts with b''"),
        (b"PK\x03\x04" + bytes(40), "starts with b'PK"),
        (b"ACZ2" + bytes(40), "starts with b'ACZ2', not b'ACZ3'"),
        (b"ACZ3\xff\xff\xff\xff" + bytes(40), "truncated: its header has 4294967295 bytes"),
        (one([2**48 - 1, 2**12], b"abc"), "asks for 1152921504606842880 elements at 'x', allowed: 1073741824"),
        (one([2**40] * 16, b"abc"), "asks for"),
        (one([4], b""), "damaged at 'x'"),
        (one([4], b"\x04"), "a table of 4 values, way -1, 0 bytes"),
        (one([4], b"\x01\x03"), "a table of 1 values, way 3"),
        (one([4], b"\x02\x00" + bytes(7)), "a table of 2 values, way 0, 7 bytes"),
        (one([4], b"\x02\x01" + bytes(3)), "a table of 2 values, way 1, 3 bytes"),
        (one([4], b"\x02\x02\x09" + bytes(3)), "a table of 2 values, way 2, 3 bytes"),
        (one([0], b"\x80\x80\x04\x02\x02\x01\x00"), "a table of 65536 values, way 2, 2 bytes"),  # 30 ms a tensor
        (one([3], b"\x41\x63\x64\x62\x04\x00", "raw", "bool"), "a bool is neither 0 nor 1"),
        (one([4], b"\x81\x80\x04\x01" + bytes(2 * 65537)), "a table of 65537 values"),
        (one([4], b"\x01\x01\x00\x00"), "damaged at 'x': stream is damaged: a number has no end"),
        (one([4], b"\x00" * 9 + b"\x01", "grid/fast"), "damaged at 'x'"),
        (one([4], struct.pack("<fi", 1.0, 0) + b"\x81\x80\x04", "grid/fast"), "a grid of 65537 values"),
        (one([2], b"", "sparse/fast"), "damaged at 'x'"),
        (one([2], b"", "raw"), "a plain stream is empty"),
        (one([2], b"\x05" + bytes(10), "raw"), "5 planes, allowed: 4"),
        (one([2], b"\x04ab", "raw"), "2 bytes for 4 planes of 2"),
        (one([2], b"\x44ab", "raw"), "damaged"),
        (one([2], b"\x80\x00", "raw"), "its kind does not fit its coder"),
        (one([2], b"\x00", "raw/max"), "its kind does not fit its coder"),
        (one([2], b"\x80\x00", "raw/max", "int64"), "halves of int64"),
        (one([2], b"\x83\x00" + bytes(6), "raw/max"), "more than 16 bits"),
        (one([2**22 + 2**14], bytes(8), "coded/max"), "4210688 symbols of 'x' in few bytes"),
    ],
)
def test_hostile_files_are_refused(data, said):
    refused(data, said)


def test_memory_that_is_not_there_is_told(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(plain, "decode", full)
    refused(one([2], b"\x00", "raw"), "'x' asks for more memory than there is")


@pytest.mark.parametrize(("kept", "most"), [(0, 1.1), (8, 2.1)])
def test_plain_tensors_are_decoded_in_place(kept, most):
    size = 1 << 20
    stream = bytes([kept]) + bytes(kept * size)
    tracemalloc.start()
    try:
        plain.decode(stream, "float64", size)
        assert tracemalloc.get_traced_memory()[1] < most * 8 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(0, 1 << 40), (0, 1 << 30), (1 << 30, 1), (1, 1 << 30), (2, 1 << 29)])
@pytest.mark.parametrize("kind", [k for k in header.KINDS if not k.endswith("/huffman")])
def test_no_memory_is_taken_for_shapes_that_few_bytes_do_not_fill(kind, shape):
    for stream in (b"", b"\1\1\0\0", b"\1\0\0\0\0\0\0\0\0" + bytes(40), b"\x44" * 40, b"\x81" * 40, b"\xff" * 40):
        tracemalloc.start()
        try:
            unpacked_or_none(one(shape, stream, kind))
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_all_tensors_together_are_limited():
    stream = b"\4" + bytes(4 * 600)
    data = header.write({}, [(name, "raw", "float32", (600,)) for name in "ab"], [stream] * 2) + stream * 2
    assert len(unpack(data, max_elements=1200).tensors) == 2
    with pytest.raises(ArtifactError, match="asks for 1200 elements at 'b', allowed: 1199"):
        unpack(data, max_elements=1199)
    twice = header.write({}, [("a", "raw", "float32", (600,))] * 2, [stream] * 2) + stream * 2
    refused(twice, "it holds 'a' twice")


def test_bombs_are_not_inflated():
    bomb = plain.deflate(bytes(64 << 20), 1)
    refused(one([8], b"\x44" + bomb, "raw"), "a deflated part has the wrong length")
    refused(one([0], b"\x44" + bomb, "raw"), "a deflated part has the wrong length")
    refused(headed(b"\0" + deflated({"tensors": [], "x": " " * (64 << 20)})), "wrong length")
    refused(one([1], b"\x48" + plain.deflate(bytes(8), 1) + b"more", "raw", "float64"), "wrong length")
    mask = rans.encode(np.zeros(16, int))
    refused(one([16], leb128.write(len(mask)) + mask + b"\x44" + bomb, "sparse/fast"), "wrong length")


@pytest.mark.parametrize("coder", ["fast", "max", "huffman"])
def test_a_symbol_outside_its_table_is_refused(coder):
    encode = {"fast": rans.encode, "max": mixed_stream.encode, "huffman": huffman.encode}[coder]
    stream = encode(np.array([[0, 3], [1, 2]]))
    table = tables.encode(np.arange(3, dtype=np.float32), mixed=False)
    refused(one([2, 2], table + stream, f"coded/{coder}"), "symbol 3 of a table of 3")
    refused(one([2, 2], struct.pack("<fi", 1.0, -1) + b"\3" + stream, f"grid/{coder}"), "symbol 3 of a table of 3")


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", container.EFFORTS)
def test_parts_make_up_the_tensor(effort, monkeypatch):
    monkeypatch.setattr(rans, "BLOCK", 64)
    artifact = small()
    archive = Archive(pack(artifact, effort))
    for name, tensor in artifact.tensors.items():
        whole = tensor.values() if isinstance(tensor, Coded) else tensor.array
        parts = archive.parts(name)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == whole.size
        got = np.concatenate([part.values() for part in parts[::-1]][::-1])
        assert got.dtype == whole.dtype
        assert got.tobytes() == whole.tobytes()
    assert len(archive.parts("coded")) == (3 if effort == "fast" else 1)


def test_a_damaged_stream_is_told_when_it_is_read_and_the_others_are_not_touched():
    data = bytearray(pack(small()))
    entry = Archive(bytes(data)).entries["grid"]
    data[entry.start] ^= 1
    archive = Archive(bytes(data))
    assert np.array_equal(archive.tensor("raw").array, small().tensors["raw"].array)
    with pytest.raises(ArtifactError, match="the checksum of 'grid' is wrong"):
        archive.tensor("grid")
    with pytest.raises(ArtifactError, match="the checksum of 'grid' is wrong"):
        archive.parts("grid")[0].values()


def test_an_unknown_effort_is_refused():
    with pytest.raises(ValueError, match="effort is 'slow', allowed: auto, fast, max"):
        pack(small(), "slow")


# --- tables and plain tensors ----------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 70), st.sampled_from(["float32", "bfloat16", "bits", "rising"]))
def test_tables_come_back_bit_by_bit(seed, size, kind):
    draw = np.random.default_rng(seed)
    table = draw.normal(0, 1, size).astype(np.float32)
    if kind != "float32":
        table = (table.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if kind == "bits":
        table = (draw.integers(0, 1 << 16, size).astype(np.uint32) << 16).view(np.float32)
    if kind == "rising":
        table = np.sort(table)
    for mixed in (False, True):
        data = tables.encode(table, mixed)
        back, end = tables.decode(b"ab" + data + b"cd", 2)
        assert back.tobytes() == table.tobytes()
        assert end == 2 + len(data)
        with pytest.raises(ArtifactError):
            tables.decode(data[:-1], 0)


def test_short_floats_take_short_streams():
    draw = np.random.default_rng(5)
    rising = (np.sort(draw.normal(0, 0.1, 64)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert len(tables.encode(rising, mixed=True)) < 70
    assert len(tables.encode(rising, mixed=False)) == 2 * 64 + 2
    biases = (draw.normal(0, 0.1, 64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert len(plain.encode(biases, "bfloat16", mixed=True)) < 100
    assert len(plain.encode(np.array([469, 3]), "int64")) == 5
    wide = biases.astype(np.uint32) << 16
    assert len(plain.encode(wide.view(np.float32), "float32", mixed=True)) < 100


# --- where the bytes are ---------------------------------------------------------------------


@pytest.mark.parametrize("effort", container.EFFORTS)
def test_the_shares_of_a_stream_add_up(effort):
    draw = np.random.default_rng(9)
    mask = draw.random((60, 80)) < 0.1 * draw.beta(0.3, 0.4, (60, 1)) * 4
    symbols = (mask * draw.integers(1, 9, mask.shape)).astype(np.uint16)
    tensors = {
        "coded": Coded(symbols, draw.normal(0, 1, 9).astype(np.float32)),
        "dense": Coded(draw.integers(0, 9, (60, 80)).astype(np.uint16), np.arange(9, dtype="f4")),
        "grid": Coded(symbols, grid_table(0.5, 0, 9), "float32", (0.5, 0)),
        "sparse": Raw(np.where(mask, draw.normal(0, 1, mask.shape), 0).astype(np.float32), "float32"),
        "raw": Raw(draw.normal(0, 1, 50).astype(np.float32), "float32"),
        "none": Coded(np.zeros((0, 4), np.uint16), np.zeros(1, "f4")),
    }
    archive = Archive(pack(Artifact(tensors), effort))
    entropy = float(-sum(p * np.log2(p) for p in (mask.mean(), 1 - mask.mean())) * mask.size / 8)
    for name, entry in archive.entries.items():
        sizes = archive.sizes(name, archive.tensor(name))
        assert min(sizes.mask, sizes.codes, sizes.table) >= 0, name
        assert sizes.mask + sizes.codes + sizes.table == entry.length, name
        if name in ("coded", "grid", "sparse"):
            assert 0.4 * entropy < sizes.mask < 1.6 * entropy + 60, name
            assert sizes.codes > (2.9 / 8 if name != "sparse" else 3) * np.count_nonzero(mask), name
    assert archive.sizes("coded", archive.tensor("coded")).table > 4 * 9
    assert archive.sizes("raw", archive.tensor("raw")).codes == archive.entries["raw"].length


def test_a_part_goes_into_an_array_of_its_own_size_alone():
    archive = Archive(pack(small(), "fast"))
    for array in (np.empty(179, np.float32), np.empty(181, np.float32), np.empty(180, np.float64)):
        with pytest.raises(ValueError, match=r"for 180 float32 values"):
            archive.parts("coded")[0].into(array)


def test_forged_symbols_are_refused_part_by_part():
    """No block's symbols are looked up in a table that is too short for them."""
    data = one([40, 30], tables.encode(np.arange(3, dtype="f4"), False) + rans.encode(np.full((40, 30), 3)))
    with pytest.raises(ArtifactError, match="symbol 3 of a table of 3"):
        Archive(data).parts("x")[0].values()


def test_a_table_keeps_the_sign_of_zero():
    table = np.array([-1.0, -0.0, 0.0, 1.0], np.float32)
    assert tables.decode(tables.encode(table, True), 0)[0].tobytes() == table.tobytes()


@pytest.mark.parametrize(
    ("levels", "lag", "group", "checksum"),
    [
        (lambda p: p(3 * 9000, 97).reshape(3, 9000) % 7 // 4, 5, 1, 2077471559),  # more columns than contexts
        (lambda p: p(2 * 2500, 89).reshape(2, 2500) % 5 // 3, 50, 2500, 4038212252),  # a large kernel
        (lambda p: np.full((20_000, 1), 65536), 0, 1, 1203610895),  # sums of magnitudes that stop growing
        (lambda p: p(700 * 50, 83).reshape(700, 50) % 11 // 8, 0, 1, 985314213),  # counts that stop growing
    ],
)
def test_large_regimes_of_the_max_coder_stay_as_they_are(levels, lag, group, checksum):
    matrix = levels(golden().pattern)
    data = mixing.encode(matrix, lag, group)
    assert np.array_equal(mixing.decode(data, matrix.shape, lag, group), matrix)
    assert zlib.crc32(data) == checksum
