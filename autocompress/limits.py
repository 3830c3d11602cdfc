"""What users write as limits: latencies, drops of the metric, sizes, times, with their units."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autocompress.errors import UsageError


def parse_latency(text: str | float) -> tuple[float, bool]:
    """("0.7x" or 0.7 -> (0.7, True)), ("2ms" -> (0.002, False)). Raises UsageError for anything else."""
    number, unit = quantity(text, {"us": 1e-6, "ms": 1e-3, "s": 1.0, "x": 1.0, "": 1.0})
    if not (math.isfinite(number) and number > 0) or (unit == "" and isinstance(text, str)):
        raise UsageError(
            f"max-latency is {text!r}, allowed: times the float32 model's such as 0.7x, or a time such as 2ms or 150us"
        )
    return number, unit in ("x", "")


def parse_drop(text: str | float) -> tuple[float, bool]:
    """("1%" -> (0.01, True)), (0.01 -> (0.01, False)). Raises UsageError for anything else."""
    raw = str(text).strip()
    percent = raw.endswith("%")
    try:
        number = float(raw.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UsageError(f"max-drop is {text!r}, allowed: a percentage such as 1% or a number such as 0.01, 0 or more")
    return (number / 100, True) if percent else (number, False)


def parse_size(text: str | int) -> int:
    """Bytes from "50KB", "1.5MB", "800B", 800. KB and MB are 1000s, KiB and MiB 1024s."""
    units = {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "b": 1, "": 1}
    size, _ = quantity(text, units)
    if not (math.isfinite(size) and size >= 1):
        raise UsageError(f"max-size is {text!r}, allowed: bytes such as 50KB, 1.5MB or 800")
    return int(size)


def parse_time(text: str | float) -> float:
    """Seconds from "90s", "10m", "2h", "600" or a number. Raises UsageError for anything else."""
    seconds, _ = quantity(text, {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0})
    if not 0 < seconds < math.inf:
        raise UsageError(f"time-budget is {text!r}, allowed: such as 90s, 10m, 2h, more than 0")
    return seconds


def quantity(text: object, units: Mapping[str, float]) -> tuple[float, str]:
    """("2.5 KB", {"kb": 1000}) -> (2500.0, "kb"); NaN where it is no number of one of the units, in lower case."""
    raw = str(text).strip().lower()
    digits = raw.rstrip("".join(units) + " ")
    unit = raw[len(digits) :].strip()
    try:
        return float(digits) * units[unit], unit
    except (ValueError, KeyError):
        return math.nan, unit
