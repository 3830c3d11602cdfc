"""The texts and figures of a study, against numbers computed here."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tracking import BASELINE_BYTES, LAYERS, synthetic_study, upto, with_test_metrics

from autocompress import report
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.record import StudyRecord


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return with_test_metrics(synthetic_study(60))


@pytest.fixture(scope="module")
def files(record: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.name: path for path in report.write_front(record, tmp_path_factory.mktemp("front") / "new")}


def brute_front(record: StudyRecord) -> set[int]:
    points = [(t.number, t.best.size_bytes, t.best.metric_val) for t in record.trials if t.best]
    return {n for n, s, m in points if not any(s2 <= s and m2 >= m and (s2, m2) != (s, m) for _, s2, m2 in points)}


def test_a_plan_under_a_rate_says_so():
    from autocompress.plan import LayerPlan, LayerSpec, Plan, Recipe
    from autocompress.record import StudyRecord

    record = StudyRecord("s", "t", "m", "maximize", 0, 10, layers=(LayerSpec("a", "linear", (2, 3), 6),))
    plan = Plan({"a": LayerPlan(bits=5)}, Recipe(rate=3.912))
    assert report.plan_summary(record, plan) == "5.0 bits, rate 3.9"


def test_csv_equals_json_and_both_hold_the_front(record: StudyRecord, files: dict[str, Path]) -> None:
    points = json.loads(files["front.json"].read_text())["front"]
    assert {point["trial"] for point in points} == brute_front(record)
    with files["front.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(points)
    for row, point in zip(rows, points, strict=True):
        for key in ("trial", "size_bytes", "ratio", "metric_val", "metric_test", "macs"):
            assert float(row.pop(key)) == point[key]
        assert row.pop("artifact") == (point["artifact"] or "")
        assert point["ratio"] == BASELINE_BYTES / point["size_bytes"]
        for layer, plan in point["plan"].items():
            for key, value in plan.items():
                assert row.pop(f"{layer}.{key}") == ("full" if value is None else str(value))
        for key, value in point["recipe"].items():
            assert row.pop(f"recipe.{key}") == str(value)
        assert not row


def test_html_needs_no_network_and_holds_every_point(record: StudyRecord, files: dict[str, Path]) -> None:
    html = files["front.html"].read_text()
    assert not re.search(r"<script[^>]+src=", html)
    call = html[html.rindex("Plotly.newPlot(") :]
    traces, _ = json.JSONDecoder().raw_decode(call[call.index("[") :])
    found = {
        (number, x, y)
        for trace in traces
        if "customdata" in trace
        for number, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True)
    }
    assert found == {(t.number, t.best.size_bytes, t.best.metric_val) for t in record.trials if t.best}
    front = next(trace for trace in traces if trace["name"] == "Pareto front")
    assert set(front["customdata"]) == brute_front(record)
    assert all("fc1: rank" in text for text in front["text"])


def pixels(path: Path, color: str) -> int:
    """How many pixels of the PNG have just that colour."""
    from matplotlib import colors, image

    data = image.imread(path)[..., :3]
    return int((np.abs(data - colors.to_rgb(color)).max(axis=2) < 0.01).sum())


@pytest.mark.parametrize(("trials", "front_size"), [(0, 0), (1, 1), (60, None)])
def test_png_shows_the_front_whatever_its_size(
    record: StudyRecord, tmp_path: Path, trials: int, front_size: int | None
) -> None:
    part = upto(record, trials)
    assert front_size is None or len(part.front) == front_size
    report.front_png(part, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5_000
    assert (pixels(tmp_path / "front.png", report.ORANGE) > 50) == (trials > 0)
    report.front_png(replace(part, trials=()), tmp_path / "empty.png")
    drawn = pixels(tmp_path / "front.png", report.BLUE) - pixels(tmp_path / "empty.png", report.BLUE)
    assert (drawn > 1_000) == (trials > 1)


def test_files_without_a_front_or_html(record: StudyRecord, tmp_path: Path) -> None:
    paths = report.write_front(upto(record, 0), tmp_path, html=False)
    assert [path.name for path in paths] == ["front.json", "front.csv", "front.png"]
    assert paths[1].read_text().startswith("trial,size_bytes,ratio")


def test_description_is_a_short_table_with_both_ends_and_the_knee(record: StudyRecord) -> None:
    text = report.describe(record)
    rows = [line.split("|")[1].split() for line in text.splitlines() if re.match(r"\| \d", line)]
    numbers = [int(row[0]) for row in rows]
    front = [trial.number for trial in record.front]
    assert len(front) > 12, "the fixture's front is longer than the table"
    assert len(numbers) <= 12
    assert numbers == [number for number in front if number in numbers]
    assert {row[1]: int(row[0]) for row in rows if len(row) > 1} == {
        "smallest": front[0],
        "knee": record.knee().number,
        "best": front[-1],
    }
    assert len(text) < 5_000
    assert "autocompress export toy" in text
    assert "No trial has finished yet" in report.describe(upto(record, 0))


def test_description_survives_odd_names(record: StudyRecord) -> None:
    odd = replace(record, metric="top|1 <b>")
    lines = [line for line in report.describe(odd).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<b>" not in report.describe(odd)


def test_front_table_has_a_row_a_point(record: StudyRecord) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.front_table(record))
    lines = console.export_text().splitlines()
    starts = [int(m.group(1)) for line in lines if (m := re.match(r"\s*(\d+)( \w+)?\s+[\d.]+ K?B", line))]
    assert starts == [trial.number for trial in record.front]
    report.front_table(upto(record, 0))


def test_plan_summary_weighs_layers_by_their_parameters() -> None:
    plan = Plan(
        {
            "conv1": LayerPlan(bits=8, threshold=0.0),
            "fc1": LayerPlan(rank=30, bits=2, threshold=1.0),
            "fc2": LayerPlan(rank=None, bits=4, threshold=0.5),
        }
    )
    sizes = {"conv1": 16 * 9, "fc1": 120 * 256, "fc2": 1200}
    total = sum(sizes.values())
    bits = (8 * sizes["conv1"] + 2 * sizes["fc1"] + 4 * sizes["fc2"]) / total
    rank = (sizes["conv1"] + sizes["fc1"] * 30 / 120 + sizes["fc2"]) / total
    threshold = (sizes["fc1"] + 0.5 * sizes["fc2"]) / total
    record = replace(synthetic_study(1), layers=LAYERS)
    assert report.plan_summary(record, plan) == f"{bits:.1f} bits, rank {100 * rank:.0f} %, < {threshold:.1f} std"
    assert report.plan_summary(replace(record, layers=()), plan) == ""
    short = Plan({name: LayerPlan(activation_bits=8 if name == "fc1" else 32) for name in sizes}, Recipe())
    inputs = (8 * sizes["fc1"] + 32 * (total - sizes["fc1"])) / total
    assert report.plan_summary(record, short) == f"32.0 bits, inputs {inputs:.1f} bits"
    narrow = Plan({name: LayerPlan(width=0.5 if name == "fc1" else 1.0) for name in sizes}, Recipe())
    width = (0.5 * sizes["fc1"] + (total - sizes["fc1"])) / total
    assert report.plan_summary(record, narrow) == f"32.0 bits, width {100 * width:.0f} %"
    recipe = Recipe(rate=0.25, infomax=0.1, precision="bfloat16")
    assert report.plan_summary(record, replace(plan, recipe=recipe)).endswith(", rate 0.25, infomax 0.1, bfloat16")
    assert report.plan_summary(record, record.trials[0].plan) == "uncompressed"


def test_trial_summary(record: StudyRecord) -> None:
    failed = next(trial for trial in record.trials if trial.state == "failed")
    assert report.trial_summary(record, failed) == f"trial {failed.number}: failed: loss became NaN at rung 1"
    trial = record.trials[3]
    assert trial.best is not None
    change = trial.best.metric_val - 0.978
    assert f"accuracy {trial.best.metric_val:.4f} ({change:+.4f})" in report.trial_summary(record, trial)
    assert f"({BASELINE_BYTES / trial.best.size_bytes:.1f}x)" in report.trial_summary(record, trial)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (9_994, "9.99 KB"),
        (9_996, "10.0 KB"),
        (99_960, "100 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (1_720_000, "1.72 MB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert report.human_bytes(size) == text
