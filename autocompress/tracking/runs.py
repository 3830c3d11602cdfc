"""What MLflow holds of a study, as values: the tags, parameters and metrics of each run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.plan import FLOAT_BITS, LayerPlan, LayerSpec, Measurement
from autocompress.record import StudyRecord, TrialRecord

SETTLED = ("complete", "stopped", "failed")
MEAN_BITS = "mean_bits"
TAG_LIMIT = 5000
"""Longest tag value, in characters, that every MLflow server takes."""


@dataclass(frozen=True)
class Point:
    """One value of a metric, `seconds` after its run began."""

    key: str
    value: float
    step: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run as MLflow should show it."""

    name: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    points: tuple[Point, ...] = ()

    @property
    def latest(self) -> dict[str, float]:
        """What MLflow shows for each metric: the value at the highest step."""
        return {point.key: point.value for point in sorted(self.points, key=lambda point: point.step)}


def trial_run(record: StudyRecord, trial: TrialRecord, on_front: bool) -> Run:
    """The run of a settled trial."""
    tags = {
        "autocompress.study": record.study,
        "autocompress.role": "trial",
        "autocompress.trial": str(trial.number),
        "autocompress.state": trial.state,
        "autocompress.origin": trial.origin,
        "pareto": str(on_front).lower(),
    }
    if trial.parent is not None:
        tags["autocompress.parent"] = str(trial.parent)
    if trial.error is not None:
        tags["autocompress.error"] = cut(trial.error)
    return Run(
        name=f"trial {trial.number}",
        status="FAILED" if trial.state == "failed" else "FINISHED",
        tags=tags,
        params=trial_params(record, trial),
        points=trial_points(record, trial),
    )


def trial_params(record: StudyRecord, trial: TrialRecord) -> dict[str, str]:
    """LAYER.rank (or "full"), LAYER.bits and LAYER.threshold of each layer, and the recipe.

    Where a layer can be factored, LAYER.rank_share says the same as LAYER.rank in numbers alone
    (1.0 is full): MLflow's parallel coordinates drop every run whose value is a word among
    numbers. `mean_bits` is the mean bit-width of the weights. Trial 0, which would stretch every
    axis, has neither and so stays out of that chart.
    """
    specs = {spec.name: spec for spec in record.layers}
    params: dict[str, str] = {}
    for name, key in layer_keys(trial.plan.layers).items():
        layer = trial.plan.layers[name]
        params[f"{key}.rank"] = "full" if layer.rank is None else str(layer.rank)
        params[f"{key}.bits"] = str(layer.bits)
        params[f"{key}.threshold"] = str(layer.threshold)
        if layer.width < LayerPlan.width:
            params[f"{key}.width"] = f"{layer.width:.4g}"
        if layer.activation_bits < FLOAT_BITS:
            params[f"{key}.activation_bits"] = str(layer.activation_bits)
        if trial.number != 0 and name in specs and (share := rank_share(specs[name], layer)) is not None:
            params[f"{key}.rank_share"] = f"{share:.4g}"
    if trial.number != 0 and trial.plan.layers and trial.plan.layers.keys() <= specs.keys():
        params[MEAN_BITS] = f"{mean_bits(specs, trial.plan.layers):.4g}"
    return params | {f"recipe.{key}": str(value) for key, value in trial.plan.recipe.to_json().items()}


def mean_bits(specs: Mapping[str, LayerSpec], layers: Mapping[str, LayerPlan]) -> float:
    """The layers' bit-widths, weighted by their parameters."""
    total = sum(specs[name].parameters for name in layers)
    return sum(specs[name].parameters * layer.bits for name, layer in layers.items()) / total


def rank_share(spec: LayerSpec, layer: LayerPlan) -> float | None:
    """The rank over the full rank, 1 for a whole layer; None where the layer cannot be factored."""
    if layer.scheme not in spec.schemes:
        return None
    return 1.0 if layer.rank is None else layer.rank / spec.full_rank(layer.scheme)


def trial_points(record: StudyRecord, trial: TrialRecord) -> tuple[Point, ...]:
    """Every measurement at its rung, and after them the one that counts, where it is not the last.

    MLflow shows the value of the highest step, so a best rung that is not the last one is
    written again one step later. Values that are not finite are left out.
    """
    measured = trial.measurements or ((trial.best,) if trial.best else ())
    points = [point for m in measured for point in _measurement_points(record, m, m.rung, m.seconds)]
    last = measured[-1].rung if measured else 0
    if trial.best is not None and trial.best != measured[-1]:
        last += 1
        points += _measurement_points(record, trial.best, last, measured[-1].seconds)
    points.append(Point("seconds", trial.seconds, last, trial.seconds))
    if trial.metric_test is not None:
        points.append(Point("metric_test", trial.metric_test, last, trial.seconds))
    for latency in trial.latencies:
        name = f"{latency.target.replace('-', '_')}_batch_{latency.batch}"
        name += f"_threads_{latency.threads}" if latency.threads > 1 else ""
        values = {"ms": 1e3 * latency.median, "over_float32": latency.ratio}
        points += [Point(f"latency_{name}_{key}", value, last, trial.seconds) for key, value in values.items()]
    return tuple(point for point in points if math.isfinite(point.value))


def _measurement_points(record: StudyRecord, m: Measurement, step: int, seconds: float) -> list[Point]:
    values = {
        "size_bytes": float(m.size_bytes),
        "ratio": record.baseline_bytes / m.size_bytes,
        "metric_val": m.metric_val,
        "macs": float(m.macs),
        **({"latency": m.latency} if m.latency is not None else {}),
    }
    return [Point(key, value, step, seconds) for key, value in values.items()]


def study_tags(record: StudyRecord) -> dict[str, str]:
    """The parent run's tags; `asked` and `workers` are here too since a resume may change them."""
    return {
        "autocompress.study": record.study,
        "autocompress.role": "study",
        "autocompress.id": study_id(record),
        "autocompress.asked": str(record.asked),
        "autocompress.workers": str(record.workers),
        "autocompress.command": cut(record.command),
        "autocompress.versions": cut(json.dumps(dict(record.versions), sort_keys=True)),
    }


def study_params(record: StudyRecord) -> dict[str, str]:
    """The parent run's parameters: what was asked when the study began."""
    keys = ("task", "metric", "direction", "sampler", "target", "seed", "workers", "asked")
    return {key: cut(str(getattr(record, key))) for key in keys}


def study_settings(record: StudyRecord) -> dict[str, Any]:
    """The study without its trials, as plain JSON: the artifact study.json."""
    keys = ("study", "task", "metric", "direction", "seed", "sampler", "target", "workers", "asked")
    timing = {} if record.timing is None else {"latency": record.timing.to_json()}
    return {key: getattr(record, key) for key in (*keys, "command", "created")} | {
        **timing,
        "baseline_bytes": record.baseline_bytes,
        "versions": dict(record.versions),
        "fingerprint": dict(record.fingerprint),
        "layers": [spec.to_json() for spec in record.layers],
    }


def study_id(record: StudyRecord) -> str:
    """What tells a study from another of the same name on a shared server."""
    return hashlib.sha256(f"{record.study}|{record.seed}|{record.created}".encode()).hexdigest()[:16]


def layer_keys(layers: Mapping[str, LayerPlan]) -> dict[str, str]:
    """How each layer is called in MLflow: its name as it is, or "model" for a bare layer.

    MLflow takes only letters, digits and "_-.: /" in a key, and at most 250 of them. In a name
    with anything else (or a slash, which servers read as a path, or over 200 characters) what
    is not allowed becomes "_", and a short hash of the name is added, so that two layers never
    share a key.
    """
    return {name: _layer_key(name or "model") for name in layers}


def _layer_key(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9_.: -]", "_", name)[:200]
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def cut(text: str, limit: int = TAG_LIMIT) -> str:
    """The text, or its beginning with a mark where it is longer than a tag can hold."""
    return text if len(text) <= limit else text[: limit - 2] + " …"
