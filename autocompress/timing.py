"""The time of a call as an objective: what is timed, a limit as a ratio, and what noise hides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from autocompress.limits import parse_latency

FORMATS = ("onnx", "onnx-int8")
"""What onnxruntime runs, and so can be timed."""
BATCHES = (1, 32)
"""Examples of the calls that `bench` times unless told otherwise."""
STEPS_PER_OCTAVE = 16
"""Latencies that round to the same step, 4.4 % wide, are equals on a front: closer ones are told apart by noise."""


@dataclass(frozen=True)
class Timing:
    """What is timed in each trial: a call of `batch` examples on `threads` threads, beside the float32 model's export.

    `limit` is what a user allows at most, as `parse_latency` reads it. When a study begins it is `measured`: `baseline`
    is then that export's median, in seconds.
    """

    batch: int = 1
    threads: int = 1
    limit: str | None = None
    baseline: float = 0.0

    @property
    def most(self) -> float | None:
        """The largest feasible ratio to the baseline; None without a limit, and before it is measured."""
        return ratio_of(self.limit, self.baseline) if self.limit is not None and self.baseline else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"most": self.most}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Timing | None:
        return None if value is None else cls(**{name: given for name, given in value.items() if name != "most"})

    def measured(self, baseline: float) -> Timing:
        """With these seconds of the float32 model's export."""
        return replace(self, baseline=baseline)

    def __str__(self) -> str:
        most = "" if self.limit is None else f", at most {self.limit}"
        return f"batch {self.batch}{most}"


def timed_format(target: str) -> str:
    """The format whose file is timed where a search aims at the target: its own if it can be, else ONNX."""
    return target if target in FORMATS else "onnx"


def step(ratio: float) -> float:
    """The ratio's logarithm in octaves, to the nearest of `STEPS_PER_OCTAVE`: what a front compares."""
    return round(math.log2(ratio) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE


def ratio_of(limit: str | float, baseline: float) -> float:
    """A limit ("0.7x", "2ms") over a baseline in seconds. Raises UsageError as `parse_latency`."""
    number, relative = parse_latency(limit)
    return number if relative else number / baseline
