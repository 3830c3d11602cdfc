"""Files of the first format are read for ever, and damaged ones refused; nothing writes it any more."""

import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from test_container import golden, refused, same

from autocompress.codec.container import unpack
from autocompress.errors import ArtifactError

GOLDEN = Path(__file__).parent / "golden"
ZEROS = bytes.fromhex("0000010001000000")
"""Sixteen zeros of two symbols."""
FOUR = bytes.fromhex("0000030001dd00ffffffd935b737")
"""[[0, 3], [1, 2]] of four symbols."""


def test_golden_tensors_are_read_for_ever():
    same(unpack((GOLDEN / "kinds.acz").read_bytes()), golden().kinds())


def assemble(header, streams=b"", length=None, magic=b"ACZ1"):
    """A file with the right checksum around whatever header it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = zlib.compress(text)
    return struct.pack("<4sII", magic, len(packed) if length is None else length, zlib.crc32(packed)) + packed + streams


def one(shape, stream, kind="coded", dtype="float32", length=None):
    """A file with one tensor, its checksum right."""
    length = len(stream) if length is None else length
    return assemble({"tensors": [["x", kind, dtype, shape, length, zlib.crc32(stream)]]}, stream)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an autocompress artifact: it starts with b''"),
        (b"PK\x03\x04" + bytes(40), "starts with b'PK"),
        (assemble({"tensors": []}, magic=b"ACZ9"), "starts with b'ACZ9', not b'ACZ3'"),
        (assemble({"tensors": []}, length=2**32 - 1), "truncated: its header has 4294967295 bytes"),
        (assemble(b"[]"), "its header lists no tensors"),
        (assemble(b"\xff\xfe"), "its header is no JSON"),
        (assemble(b"{"), "its header is no JSON"),
        (assemble(b"[" * 60_000), "its header is no JSON"),
        (assemble(b"[" * 200_000), "its header has the wrong length"),
        (assemble({"tensors": [["x", "raw", "float32", [], True, 0]]}), "length True"),
        (one([4], b"abc", length=10**4000), "damaged: 'x' has shape"),
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


@pytest.mark.parametrize("last", [b"\xff\xff", b"\xff\x01"])
def test_a_few_bytes_cannot_ask_for_long_work(last):
    """Every symbol under the mask, and two symbols that may be."""
    stream = struct.pack("<Hff", 1, 0.0, 0.0) + struct.pack("<HHB", 0, 1, 1) + b"\xff" + last
    refused(one([1 << 22], stream), "0 bytes cannot hold 4194304 symbols")


def test_nothing_takes_no_memory():
    stream = struct.pack("<Hf", 0, 1.0) + bytes.fromhex("0000000001ff")
    tracemalloc.start()
    try:
        assert unpack(one([0, 1 << 26], stream)).tensors["x"].shape == (0, 1 << 26)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


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
    mask = ZEROS
    refused(one([16], struct.pack("<I", len(mask)) + mask + b"\1" + bomb, "sparse"), "wrong length")


def test_a_symbol_outside_its_table_is_refused():
    stream = FOUR
    table = struct.pack("<H3f", 2, 0.0, 1.0, 2.0)
    refused(one([2, 2], table + stream), "symbol 3 of a table of 3")
    refused(one([2, 2], struct.pack("<fiH", 1.0, -1, 2) + stream, "grid"), "symbol 3 of a table of 3")
