"""The artifact file: inverse for every kind of tensor, golden files, and every kind of damage told in one line."""

import importlib.util
import json
import math
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.codec import container
from autocompress.codec.container import Artifact, Coded, Raw, grid_table, pack, read_header, unpack
from autocompress.errors import ArtifactError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Compile the max coder before Hypothesis looks at the clock."""
    pack(Artifact({"x": Coded(np.zeros((2, 2), np.uint16), np.zeros(1, "f4"))}))


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


def test_golden_tensors_are_read_for_ever():
    same(unpack((GOLDEN / "kinds.acz").read_bytes()), golden().kinds())


def test_golden_files_are_all_there_and_are_never_written_again(tmp_path, capsys):
    for name in ("kinds.acz", "model.acz", "model.json"):
        assert (GOLDEN / name).stat().st_size > 300, name
    (tmp_path / "x.acz").write_bytes(b"old")
    golden().write(tmp_path / "x.acz", b"new")
    assert (tmp_path / "x.acz").read_bytes() == b"old"
    assert "kept x.acz" in capsys.readouterr().out


def headed(header: bytes, streams: bytes = b"") -> bytes:
    """A file of the second format with this header."""
    return struct.pack("<4sII", b"ACZ2", len(header), zlib.crc32(header)) + header + streams


def deflated(value: object) -> bytes:
    machine = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container._DICTIONARY)
    return machine.compress(json.dumps(value).encode()) + machine.flush()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "has no end"),
        (b"\x01", "no end"),
        (b"\x80\x80", "has no end"),
        (b"\x01\x07\x00\x00\x00\x00\x00\x00\x00", "kind 7 and dtype 0"),
        (b"\x01\x00\x63\x00\x00\x00\x00\x00\x00", "kind 0 and dtype 99"),
        (b"\x01\x00\x00\x00\x00\x00\x00", "in its table"),
        (b"\xff\xff\xff\xff\xff\xff\x7f" + bytes(20), "damaged"),
        (b"\x01\x00\x00\xff\xff\x7f" + bytes(30), "has shape|damaged"),
        (b"\x00" + deflated([1]), "lists no tensors"),
        (b"\x00" + deflated({"tensors": ["x"]}), "1 names for 0 tensors"),
        (b"\x00" + deflated({"tensors": []})[:-3], "wrong length|damaged"),
        (b"\x00" + deflated({"tensors": []}) + b"more", "wrong length"),
        (b"\x01" + bytes(8) + deflated({"tensors": [5]}), "malformed"),
    ],
)
def test_a_damaged_table_of_tensors_is_told(header, said):
    refused(headed(header), said)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_to_a_header_with_a_right_checksum_is_refused_or_read(data):
    whole = pack(golden().kinds())
    _, length, _ = struct.unpack_from("<4sII", whole)
    header = bytearray(whole[12 : 12 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, min(length - 1, 200)))] = data.draw(st.integers(0, 255))
    with suppress(ArtifactError):
        unpack(headed(bytes(header), whole[12 + length :]))


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
    assert read_header(data)["streams_at"] < 270


def test_the_shorter_coder_is_taken_and_both_are_read(monkeypatch):
    mask = golden().structured_mask(96, 128)
    coded = Coded(
        (mask * (1 + golden().pattern(mask.size, 7).reshape(mask.shape))).astype(np.uint16), np.zeros(8, "f4")
    )
    artifact = Artifact({"a": coded, "b": Coded(np.zeros((3, 0), np.uint16), np.zeros(1, "f4"))})
    data = pack(artifact)
    monkeypatch.setattr(container, "MOST_MIXED", 0)
    fast = pack(artifact)
    assert [entry[1] for entry in read_header(fast)["tensors"]] == ["coded", "coded"]
    assert read_header(data)["tensors"][0][1] == "coded/mixed"
    assert len(data) < len(fast)
    same(unpack(fast), artifact)
    with pytest.raises(ArtifactError, match="12288 mixed symbols at 'a', allowed: 0"):
        unpack(data)
    monkeypatch.undo()
    same(unpack(data), artifact)


numbers = {name: np.dtype(kind) for name, kind in container._DTYPES.items()}
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
    same(unpack(pack(artifact)), artifact)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_coded_tensors_come_back(shape, size, seed, even):
    draw = np.random.default_rng(seed)
    symbols = draw.integers(0, size, shape).astype(np.uint16)
    grid = (float(np.float32(draw.normal())), int(draw.integers(-200, 1)))
    table = grid_table(*grid, size) if even else draw.normal(0, 1, size).astype(np.float32)
    tensor = Coded(symbols, table, "float32", grid if even else None)
    back = unpack(pack(Artifact({"w": tensor}))).tensors["w"]
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
    assert read_header(data)["tensors"][0][1] == "sparse"
    assert len(data) < 4 * np.count_nonzero(array) + 60000 * 0.1415 / 8 * 1.05 + 200  # values, and the mask's entropy


def test_header_and_order_survive():
    names = ["b", "a", "", "ünï.weight", "a.b.0"]
    header = {"model": ["ReLU", {}], "numbers": [1, 2.5, None, True], "text": "naïve\n"}
    artifact = Artifact({name: Raw(np.arange(3.0) + i, "float64") for i, name in enumerate(names)}, header)
    data = pack(artifact)
    same(unpack(data), artifact)
    assert pack(unpack(data)) == data
    assert container.shapes(read_header(data)) == dict.fromkeys(names, (3,))


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


def assemble(header, streams=b"", length=None, magic=b"ACZ1"):
    """A file with the right checksum around whatever header it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zlib.compress(text)
    return struct.pack("<4sII", magic, len(packed) if length is None else length, zlib.crc32(packed)) + packed + streams


def one(shape, stream, kind="coded", dtype="float32", length=None):
    """A file with one tensor, its checksum right."""
    length = len(stream) if length is None else length
    return assemble({"tensors": [["x", kind, dtype, shape, length, zlib.crc32(stream)]]}, stream)


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
    data = pack(small())
    header = read_header(data)
    at = header.pop("streams_at")
    draw = np.random.default_rng(2)
    shapes_wanted = container.shapes(header)
    told = 0
    for _ in range(1500):
        broken = bytearray(data[at:])
        for place in draw.integers(0, len(broken), draw.integers(1, 4)):
            broken[place] ^= int(draw.integers(1, 256))
        position, entries = 0, []
        for name, kind, dtype, shape, length, _ in header["tensors"]:
            entries.append([name, kind, dtype, shape, length, zlib.crc32(broken[position : position + length])])
            position += length
        found = unpacked_or_none(assemble(header | {"tensors": entries}, bytes(broken)))
        told += found is None
        assert found is None or {name: t.shape for name, t in found.tensors.items()} == shapes_wanted
    assert told > 300


def test_headers_with_odd_values_are_refused():
    data = pack(small())
    header = read_header(data)
    streams = data[header.pop("streams_at") :]
    odd = [None, True, -1, 0, 1, 10**30, 1.5, "x", "", [], {}, [1], "sparse", "raw", "int8", [9, 20], [3, 60], [2**40]]
    for row in range(len(header["tensors"])):
        for column in range(6):
            for value in odd:
                entries = json.loads(json.dumps(header["tensors"]))
                entries[row][column] = value
                found = unpacked_or_none(assemble(header | {"tensors": entries}, streams))
                assert found is None or len(found.tensors) == len(entries)
    for tensors in (None, 3, {}, "x", [[]], [None], [["a"]], [["x", "raw", "float32", [], 0, 0, 0]]):
        refused(assemble({"tensors": tensors}), "damaged: (its header lists no tensors|an entry of its tensor list)")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an autocompress artifact: it starts with b''"),
        (b"PK\x03\x04" + bytes(40), "starts with b'PK"),
        (assemble({"tensors": []}, magic=b"ACZ9"), "starts with b'ACZ9', not b'ACZ2'"),
        (assemble({"tensors": []}, length=2**32 - 1), "truncated: its header has 4294967295 bytes"),
        (assemble(b"[]"), "its header lists no tensors"),
        (assemble(b"\xff\xfe"), "its header is no JSON"),
        (assemble(b"{"), "its header is no JSON"),
        (assemble(b"[" * 200_000), "its header is no JSON"),
        (one([3], b"", "pickle"), "'x' is of unknown kind 'pickle'"),
        (one([3], b"", "raw", "object"), "'x' has unknown dtype 'object'"),
        (one([3], b"", "raw", "float8"), "'x' has unknown dtype 'float8'"),
        (one([2**60], b"abc"), r"'x' has shape \[1152921504606846976\]"),
        (one([2**31, 2**29], b"abc"), "asks for 1152921504606846976 elements at 'x', allowed: 1073741824"),
        (one([2**40] * 16, b"abc"), "asks for"),
        (one([1] * 17, b"abc"), "has shape"),
        (one([-1, -1], b"abc"), "has shape"),
        (one([4], b"abc", length=-3), "length -3"),
        (one([4], b"abc", length=2**50), "truncated: 'x' has 1125899906842624 bytes, 3 are there"),
        (one([4], b""), "damaged at 'x'"),
        (one([2], struct.pack("<H", 65535)), "damaged at 'x'"),
        (one([2], struct.pack("<Hf", 0, 1.0)), "stream is damaged"),
        (one([2], b"", "sparse"), "damaged at 'x'"),
        (one([2], b"\x02ab", "raw"), "raw stream starts with b'\\\\x02'"),
        (one([2], b"\x00ab", "raw"), "2 bytes for 2 elements of float32"),
        (one([2], b"\x01ab", "raw"), "damaged"),
    ],
)
def test_hostile_files_are_refused(data, said):
    refused(data, said)


def test_all_tensors_together_are_limited():
    stream = b"\0" + bytes(4 * 600)
    entry = ["raw", "float32", [600], len(stream), zlib.crc32(stream)]
    data = assemble({"tensors": [["a", *entry], ["b", *entry]]}, stream * 2)
    assert len(unpack(data, max_elements=1200).tensors) == 2
    with pytest.raises(ArtifactError, match="asks for 1200 elements at 'b', allowed: 1199"):
        unpack(data, max_elements=1199)
    twice = assemble({"tensors": [["a", *entry], ["a", *entry]]}, stream * 2)
    refused(twice, "it holds 'a' twice")


def test_bombs_are_not_inflated():
    bomb = zlib.compress(bytes(64 << 20), 1)
    refused(one([8], b"\1" + bomb, "raw"), "a deflated part has the wrong length")
    refused(one([0], b"\1" + bomb, "raw"), "a deflated part has the wrong length")
    packed = zlib.compress(b'{"tensors": [], "x": "' + b" " * (64 << 20), 1)
    refused(struct.pack("<4sII", b"ACZ1", len(packed), zlib.crc32(packed)) + packed, "wrong length")
    more = zlib.compress(bytes(8)) + b"more"
    refused(one([1], b"\1" + more, "raw", "float64"), "wrong length")
    mask = container.entropy.encode(np.zeros(16, int), 2)
    refused(one([16], struct.pack("<I", len(mask)) + mask + b"\1" + bomb, "sparse"), "wrong length")


def test_a_symbol_outside_its_table_is_refused():
    stream = container.entropy.encode(np.array([[0, 3], [1, 2]]), 4)
    table = struct.pack("<H3f", 2, 0.0, 1.0, 2.0)
    refused(one([2, 2], table + stream), "symbol 3 of a table of 3")
    refused(one([2, 2], struct.pack("<fiH", 1.0, -1, 2) + stream, "grid"), "symbol 3 of a table of 3")
