"""Where the package keeps what it can make or bring again: trained base models and data sets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: `AUTOCOMPRESS_CACHE`, else `$XDG_CACHE_HOME/autocompress`, else `~/.cache/autocompress`."""
    if own := os.environ.get("AUTOCOMPRESS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "autocompress"


def data_roots(data_dir: str | Path | None = None) -> tuple[Path, ...]:
    """The folders in which data is looked for, first come first.

    `data_dir` alone where it is given, else `AUTOCOMPRESS_DATA` alone, else `data` in the cache
    folder and then `./data`.
    """
    chosen = data_dir or os.environ.get("AUTOCOMPRESS_DATA")
    if chosen:
        return (Path(chosen).expanduser(),)
    return cache_root() / "data", Path("data")


def data_root(data_dir: str | Path | None = None) -> Path:
    """The folder into which new data goes: the first of `data_roots`."""
    return data_roots(data_dir)[0]
