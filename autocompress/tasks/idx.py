"""IDX files, the format of MNIST and its kin: read whole, checked before memory is taken.

Two zero bytes, a type byte (8: unsigned bytes, the only one here), the number of dimensions, each
dimension as a big-endian 32-bit integer, then the values in C order.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from autocompress.errors import TaskError

if TYPE_CHECKING:
    import numpy as np

_MOST_BYTES = 2**30
_UNREADABLE = (OSError, EOFError, zlib.error)  # gzip.BadGzipFile is an OSError


def read(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """The file's values as a writable uint8 array of `shape`, in which None allows any length.

    `path` is a plain file, or a gzip file if its name ends in .gz. Raises TaskError, naming the
    file, where it is not an IDX file of unsigned bytes, has another shape, or another length
    than its header promises.
    """
    import numpy as np

    try:
        with open_plain(path) as file:
            found = _header(file, path)
            if len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found, strict=True)):
                raise TaskError(f"{path}: shape is {_by(found)}, allowed: {_by(shape)}")
            promised = math.prod(found)
            if promised > _MOST_BYTES:
                raise TaskError(f"{path}: the header promises {promised} bytes, allowed: up to {_MOST_BYTES}")
            content = file.read(promised + 1)
    except _UNREADABLE as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    if len(content) != promised:
        held = f"{len(content)}" if len(content) < promised else "more"
        raise TaskError(f"{path} is damaged: its header promises {promised} bytes ({_by(found)}), it holds {held}")
    return np.frombuffer(content, np.uint8).reshape(found).copy()


def write(file: IO[bytes], array: np.ndarray) -> None:
    """Write a uint8 array as an IDX file."""
    file.write(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape))
    file.write(array.tobytes())


def content_sha256(path: Path) -> str:
    """The SHA-256, 64 hex digits, of the file's content after gunzip. Raises TaskError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_plain(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except _UNREADABLE as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def open_plain(path: Path) -> IO[bytes]:
    """The file opened for reading its content, gunzipped on the way if its name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]  # an IO[bytes] in all but name
    return path.open("rb")


def _header(file: IO[bytes], path: Path) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08":
        raise TaskError(f"{path} is not an IDX file of unsigned bytes: it begins with {magic.hex(' ')!r}")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise TaskError(f"{path} is damaged: it ends within its header")
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))


def _by(shape: tuple[int | None, ...]) -> str:
    return " x ".join("N" if size is None else str(size) for size in shape) or "no dimension"
