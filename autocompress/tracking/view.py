"""The saved view: what MLflow's page of the experiment shows when it is opened by our link.

MLflow keeps it in an experiment tag: an envelope of name, times in milliseconds and the
page's state, which is "deflate;" and the base64 of the zlib-compressed JSON. Seen in MLflow 3.17.
"""

from __future__ import annotations

import base64
import json
import statistics
import zlib
from typing import Any

from autocompress.record import StudyRecord
from autocompress.tracking.runs import MEAN_BITS, trial_params

VIEW_ID = "autocompress"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_ID}"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
MOST_KNOBS = 8
"""Axes of the parallel coordinates, beside the mean bit-width and the two metrics: more cannot be read."""
SECTION = "autocompress-front"


def view_path(experiment_id: str) -> str:
    """The link to the view, from the server's root."""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_ID}&compareRunsMode=CHART"


def view_tag(record: StudyRecord, now_ms: int) -> str:
    """The value of the experiment tag that holds the view."""
    raw = json.dumps(view_state(record), separators=(",", ":")).encode()
    state = "deflate;" + base64.b64encode(zlib.compress(raw, 9)).decode()
    return json.dumps({"name": "Pareto front", "createdAt": now_ms, "updatedAt": now_ms, "state": state})


def read_view_tag(tag: str) -> dict[str, Any]:
    """The page's state that a tag holds: the inverse of `view_tag`."""
    compressed = json.loads(tag)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(compressed)))
    return state


def view_state(record: StudyRecord) -> dict[str, Any]:
    """The page's state: trials only, the front's members first, scatters and parallel coordinates."""
    knobs = varied_knobs(record)
    timed = ["latency"] if record.timing is not None else []
    axes = [MEAN_BITS, *knobs] if knobs else []  # trial 0 has no mean_bits and so is not drawn among the others
    columns = [
        *(f"metrics.`{key}`" for key in ("size_bytes", "ratio", "metric_val", "metric_test", *timed)),
        *(f"tags.`{key}`" for key in ("pareto", "autocompress.state")),
        *(f"params.`{key}`" for key in knobs),
    ]
    return {
        "searchFilter": "tags.`autocompress.role` = 'trial'",
        "orderByKey": "tags.`pareto`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": False,
        "viewMaximized": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": False,
        "hideEmptyCharts": False,
        "groupBy": None,
        "groupsExpanded": {},
        "compareRunCharts": _charts(axes, timed),
        "compareRunSections": [
            {
                "uuid": SECTION,
                "name": "Pareto front",
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
                "columns": 2,
                "cardHeight": 400,
            }
        ],
    }


def _charts(axes: list[str], timed: list[str]) -> list[dict[str, Any]]:
    charts = [_scatter("size", "size_bytes", "metric_val"), _scatter("ratio", "ratio", "metric_val")]
    charts += [_scatter(key, key, "metric_val") for key in timed]
    if axes:
        parallel = {
            "selectedParams": axes,
            "selectedMetrics": ["size_bytes", *timed, "metric_val"],
            "showAllRuns": True,
        }
        charts.append(_card("PARALLEL", "knobs") | parallel)
    return charts


def _scatter(name: str, x: str, y: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"}}
    return _card("SCATTER", name) | axes


def _card(kind: str, name: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"autocompress-{name}",
        "metricSectionId": SECTION,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }


def varied_knobs(record: StudyRecord, most: int = MOST_KNOBS) -> list[str]:
    """The parameters that vary most over the measured trials, trial 0 aside, in the plan's order.

    Spread is the standard deviation over the largest value, so that bits, shares of the full rank
    and thresholds compare. A knob that is the same everywhere is none.
    """
    rows = [_numbers(trial_params(record, trial)) for trial in record.measured if trial.number != 0]
    if len(rows) < 2:
        return []
    spread = {key: _spread([row.get(key, 0.0) for row in rows]) for key in rows[0]}
    widest = sorted((key for key in spread if spread[key] > 0), key=lambda key: -spread[key])[:most]
    return [key for key in spread if key in widest]


def _numbers(params: dict[str, str]) -> dict[str, float]:
    words = (".rank", ".precision")
    return {key: float(value) for key, value in params.items() if key != MEAN_BITS and not key.endswith(words)}


def _spread(values: list[float]) -> float:
    largest = max(map(abs, values))
    return statistics.pstdev(values) / largest if largest else 0.0
