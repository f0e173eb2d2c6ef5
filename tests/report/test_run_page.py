"""The page of a run, as text; tests/report/test_chromium.py has it in a browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dyntune.monitor.run import BadLine, Column, Event, Row, Run
from dyntune.monitor.verdict import State
from dyntune.report import RunPage, render, run_page, write
from dyntune.report.axis import Axis, axis_of, round_numbers
from dyntune.report.chart import Series, chart, steps_axis
from dyntune.report.envelope import envelope
from dyntune.report.strips import SHOWN
from tests.plots.records import HOSTILE
from tests.report.reading import Reading
from tests.report.runs import HOSTILE_NAMES, NAMES, monitored

ROOT = Path(__file__).resolve().parents[2]


def read(run: Run) -> Reading:
    return Reading(render(run_page(run)))


def assert_harmless(page: str) -> Reading:
    """One script, known by its hash; no handler, nothing to load, identifiers unique."""
    reading = Reading(page)
    assert reading.tags.count("script") == 2  # the other one is data
    assert not {"iframe", "object", "embed", "link", "base", "form", "img", "foreignobject", "use"} & set(reading.tags)
    for _, name, value in reading.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            assert re.fullmatch(r"#alert-\d+", value), value
        if name == "style":
            assert re.fullmatch(r"(top|left):\d+(\.\d+)?%", value), value
    ids = reading.values("id")
    assert len(ids) == len(set(ids))
    (policy,) = [value for value in reading.values("content") if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "url(" not in re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    return reading


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_and_texts_change_no_element(name):
    hostile = render(run_page(monitored("diverging", words=name or "harmless", names=(name,)), title=name))
    plain = render(run_page(monitored("diverging", words="harmless", names=("w",)), title="harmless"))
    reading = assert_harmless(hostile)
    assert reading.tags == Reading(plain).tags
    shown = " ".join("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name).split())
    assert shown[:40] in reading.text


def test_the_verdict_comes_first():
    for kind, sign in (("healthy", "✓"), ("edge", "≈"), ("diverging", "▲")):
        run = monitored(kind)
        page = run_page(run)
        text = Reading(render(page)).text
        body = text[text.index("run.jsonl Steps") :]
        assert body.index(page.verdict.sentence) < body.index("How far from the edge?")
        assert sign in body


def test_the_chart_of_the_ratio_names_its_thresholds():
    page = run_page(monitored("edge"))
    assert [line.name for line in page.edge.lines] == [
        "deterministic (full batch)",
        "stochastic (small batches)",
        "along the step",
    ]
    assert [level.text for level in page.edge.levels] == ["threshold"]
    assert not page.edge.log
    assert "times as large" in run_page(monitored("healthy")).edge_note


def test_alerts_have_evidence_and_advice_and_alike_ones_are_counted():
    page = run_page(monitored("diverging"))
    first, second = page.alerts
    assert first.when == "Step 456"
    assert "ratio: 1.31" in first.evidence
    assert "loss above start: yes" in first.evidence
    assert first.advice == "Go back to a checkpoint and lower the learning rate."
    assert second.when == "Step 570, 2 times up to step 576"
    assert first.place == pytest.approx(100 * 456 / 599, abs=0.01)
    assert run_page(monitored("edge")).quiet == "No alert was raised."


def test_what_an_alert_knows_of_its_cause_is_told():
    detail = {
        "kind": "loss-level",
        "text": "no",
        "advice": "Lower it.",
        "causes": ["lr too high", "bad batches"],
        "where": ["a.weight"],
        "since": 7,
        "recommender": "dyntune.suggest_lr",
    }
    (alert,) = run_page(Run(rows=(), events=(Event(name="alert", step=9, detail=detail),))).alerts
    assert alert.evidence == ("likely cause: lr too high; bad batches", "where: a.weight", "since step: 7")
    assert alert.advice == "Lower it. dyntune.suggest_lr measures a better value."
    for odd in ({}, "x", 3, [None, {"a": 1}], None, 0):
        more = dict.fromkeys(("causes", "where", "since", "recommender"), odd)
        render(run_page(Run(rows=(), events=(Event(name="alert", step=9, detail=more),))))


def test_more_alerts_than_can_be_read_are_counted():
    events = tuple(Event(name="alert", step=i, detail={"kind": str(i)}) for i in range(50))
    page = run_page(Run(rows=[Row(step=0, values={"train/loss": 1.0})], events=events))
    assert len(page.alerts) == 20
    assert "30 more" in page.quiet
    assert page.steps == (0.0, 49.0)


def test_alert_details_of_any_form_are_shown():
    for evidence in ("words", ["a", 2], {"a": [1, {"b": math.nan}]}, None, 3.5):
        event = Event(name="alert", step=None, detail={"evidence": evidence})
        page = run_page(Run(rows=(), events=(event,)))
        assert page.alerts[0].when == "No step in particular"
        render(page)


def test_cost_and_blind_spots_are_said():
    page = run_page(monitored("edge"))
    assert page.cost[0] == "The monitor took 1.2 % of training time, of 2 % allowed (within the budget)."
    assert page.blind == (("grad/noise_scale", "no batch could be cut in two"),)
    spent = Run(rows=[Row(step=0, values={"monitor/overhead": 0.05})], provenance={"overhead": 0.02})
    assert "above the budget" in run_page(spent).cost[0]
    assert "not recorded" in run_page(Run(rows=())).cost[0]


def test_errors_of_the_monitor_are_counted():
    error = Event(name="error", step=1, detail={"where": "burst", "error": "ValueError", "message": "no"})
    page = run_page(Run(rows=(), events=(error, error)))
    assert page.failures == ("burst: ValueError: no (2 times)",)


def test_what_is_missing_from_the_record_is_said():
    run = Run(
        rows=[Row(step=0, values={"train/loss": 1.0})],
        quarantined=(BadLine(3, "not JSON", "x"),),
        gaps=2,
        torn=1,
        lost=5,
        attempts=2,
        world=4,
        missing=(2, 3),
        unreadable={"run.rank2.jsonl": "<b>"},
    )
    text = read(run).text
    for part in ("1 bad lines", "2 places", "5 records could not", "rank 2, 3", "rank 0 of 4", "2 attempts", "<b>"):
        assert part in text


def test_tensors_come_worst_first():
    page = run_page(monitored("edge"))
    staleness = page.strips[0]
    worst = [float(strip.worst.split(" ")[0]) for strip in staleness.strips]
    assert worst == sorted(worst, reverse=True)
    assert {strip.tensor for strip in staleness.strips} == set(NAMES)
    assert all(any(strip.shades) for strip in staleness.strips)


def inside(values: dict[str, tuple[float, ...]]) -> Run:
    """One row each ten steps."""
    count = max(map(len, values.values()))
    return Run(rows=[Row(step=10 * i, values={k: v[i] for k, v in values.items() if i < len(v)}) for i in range(count)])


@pytest.mark.parametrize(
    ("prefix", "series", "order", "worst"),
    [
        ("activation/log_rms/", {"a": (1.0, 1.2), "b": (-3.0, -9.0)}, ["b", "a"], "-9 (step 10)"),
        ("units/dead/", {"a": (0.1, 0.0), "b": (0.0, 0.4)}, ["b", "a"], "0.4 (step 10)"),
        ("units/saturated/", {"a": (0.9, 0.0), "b": (0.0, 0.4)}, ["a", "b"], "0.9 (step 0)"),
        ("attention/max_logit/", {"a": (3.0, 4.0), "b": (80.0, 7.0)}, ["b", "a"], "80 (step 0)"),
        ("attention/entropy/", {"a": (0.9, 0.2), "a/0": (0.8, 0.1)}, ["a/0", "a"], "0.1 (step 10)"),
        ("alignment/", {"a.weight": (0.6, 0.5), "b.weight": (0.5, 0.99)}, ["b.weight", "a.weight"], "0.99 (step 10)"),
    ],
)
def test_the_inside_of_the_network_is_shown_layer_by_layer(prefix, series, order, worst):
    run = inside({f"{prefix}{name}": values for name, values in series.items()} | {"attention/max_logit": (80.0, 7.0)})
    page = run_page(run)
    (signal,) = page.strips
    assert [strip.tensor for strip in signal.strips] == order
    assert signal.strips[0].worst == worst
    assert [row[0] for row in page.others.rows] == ["attention/max_logit"]
    assert f"{signal.title} by {signal.of}" in Reading(render(page)).text


def boxes(path: str) -> list[tuple[float, float]]:
    """Begin and end of each cell of a path."""
    return sorted((float(x), float(x) + float(w)) for x, w in re.findall(r"M([\d.]+) 0h([\d.]+)", path))


def test_cells_of_irregular_measurements_neither_overlap_nor_bridge_what_was_not_measured():
    steps = (0, 30, 60, 65, 90, 120, 400, 430, 600)
    run = Run(rows=[Row(step=s, values={"grad/log_rms/a": -float(i)}) for i, s in enumerate(steps)])
    (strip,) = run_page(run).strips[0].strips
    cells = sorted(box for path in strip.shades for box in boxes(path))
    assert len(cells) == len(steps)
    round_off = 0.1  # paths have four digits, of up to 1000
    apart = [b[0] - a[1] for a, b in itertools.pairwise(cells)]
    assert min(apart) > -round_off
    assert [i for i, gap in enumerate(apart) if gap > round_off] == [5, 7]  # after steps 120 and 430
    assert cells[-1][1] <= 1000 + round_off


def test_a_tensor_that_is_not_finite_comes_before_all_others():
    values = {"adam/staleness/a": 9.0, "adam/staleness/b": math.inf, "adam/staleness/c": None}
    page = run_page(Run(rows=[Row(step=0, values=values), Row(step=1, values={"adam/staleness/b": 1.0})]))
    strips = page.strips[0].strips
    assert [strip.tensor for strip in strips] == ["b", "a", "c"]
    assert strips[0].broken
    assert not strips[1].broken
    assert strips[2].last == "none"


def test_of_a_thousand_tensors_the_worst_are_shown():
    names = tuple(f"layer.{i}" for i in range(1000))
    values = {f"adam/staleness/{name}": float(i) for i, name in enumerate(names)}
    page = run_page(Run(rows=[Row(step=0, values=values)]))
    assert len(page.strips[0].strips) == SHOWN
    assert page.strips[0].strips[0].tensor == "layer.999"
    assert page.strips[0].more == 1000 - SHOWN


def test_unknown_columns_are_listed():
    run = Run(
        rows=[Row(step=0, values={"rl/entropy": 1.5, "train/loss": 1.0})],
        columns={"rl/entropy": Column(name="rl/entropy", unit="nats")},
    )
    page = run_page(run)
    assert page.others.rows == (("rl/entropy", "1", "1.5", "1.5", "1.5", "1.5", "nats"),)


@pytest.mark.parametrize(
    "rows",
    [
        (),
        [Row(step=5, values={})],
        [Row(step=5, values={"train/loss": math.nan})],
        [Row(step=5, values={"train/loss": None, "stability/lr_ratio": None})],
        [Row(step=5, values={"stability/lr_ratio": math.inf, "grad/norm": -math.inf})],
        [Row(step=5, values={"train/loss": 1e308}), Row(step=4, values={"train/loss": -1e308})],
        [Row(step=5, values={"train/loss": 5e-324}), Row(step=6, values={"train/loss": 1e-310})],
        [Row(step=2**62, values={"train/loss": 1.0}), Row(step=0, values={"train/loss": 1.0})],
        [Row(step=3, values={"train/loss": 2.0}), Row(step=3, values={"train/loss": 1.0})],
        [Row(step=i, values={"stability/lr_ratio": 1.0, "stability/lr_ratio.high": math.inf}) for i in range(3)],
        [Row(step=0, values={"lambda_max": 3.0, "lambda_max.limit": 4.0, "loss": 1.0})],
        [Row(step=i, values={"train/lr": 0.1, **{f"train/lr/{k}": 0.1 * k for k in range(1, 9)}}) for i in range(3)],
        [Row(step=0, values={"train/loss": 1.0}, labels={"regime": "no such thing"})],
    ],
)
def test_little_or_odd_data_is_shown(rows):
    html = render(run_page(Run(rows=rows)))
    assert_harmless(html)
    assert "nan%" not in html
    for path in re.findall(r' d="([^"]*)"', html):
        assert re.fullmatch(r"[MLHVhvZz0-9. -]*", path), path
    numbers = json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))
    assert numbers["range"][0] < numbers["range"][1]


def test_a_long_run_stays_small_and_keeps_its_spikes():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(200_000)
    noise[123_456] = 50.0
    run = Run(rows=[Row(step=i, values={"train/loss": v}) for i, v in enumerate((noise + 10).tolist())])
    page = run_page(run)
    html = render(page)
    assert len(html) < 150_000
    assert max(high for high in page.charts[0].hover[0]["high"]) == pytest.approx(60.0)
    assert "shaded" in page.charts[0].note


def test_envelope_bounds_every_value_and_its_middle_is_the_median():
    rng = np.random.default_rng(1)
    values = rng.standard_cauchy(5_003)
    values[::7] = np.nan
    found = envelope(np.arange(5_003), values, bins=50)
    edges = np.linspace(0, 5_002, 51)
    for i in range(50):
        within = (np.arange(5_003) >= edges[i]) & ((np.arange(5_003) < edges[i + 1]) | (i == 49))
        part = values[within][np.isfinite(values[within])]
        assert (found.low[i], found.middle[i], found.high[i]) == (part.min(), np.median(part), part.max())
    assert found.missing.size == 50


def test_envelope_leaves_short_series_and_gaps_in_long_ones():
    short = envelope(np.array([3, 1]), np.array([2.0, np.inf]))
    assert short.steps.tolist() == [1.0, 3.0]
    assert np.isnan(short.middle[0])
    assert short.missing.tolist() == [1.0]
    apart = envelope(np.concatenate([np.arange(500), np.arange(10**6, 10**6 + 500)]), np.ones(1000), bins=100)
    assert apart.steps.size == 2  # no bin is invented for what lies between


def test_the_line_breaks_where_nothing_is_known():
    found = envelope(np.arange(5), np.array([1.0, 2.0, np.nan, 3.0, np.nan]))
    line = chart("t", [Series(name="s", points=found)], steps=steps_axis(found.steps)).lines[0]
    assert line.path.count("M") == 1  # two points; the third one is alone and a dot
    assert line.dots.count("M") == 3
    assert line.crosses == (50.0, 100.0)


def test_places_are_right():
    axis = Axis(0.0, 10.0)
    assert axis.place(np.array([0.0, 5.0, 20.0])).tolist() == [0.0, 0.5, 1.0]
    assert Axis(1.0, 100.0, log=True).place(np.array([10.0])).tolist() == [0.5]
    points = envelope(np.array([0, 10]), np.array([0.0, 10.0]))
    line = chart("t", [Series(name="s", points=points)], steps=Axis(0.0, 10.0)).lines[0]
    top = round(200 * (1 - 10 / axis_of(points.middle).high), 1)
    assert line.path == f"M0 200L1000 {top:g}"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-12, 3e-12), (-1e300, 1e300), (5, 5)])
def test_round_numbers_are_few(low, high):
    found = round_numbers(low, high, 5)
    assert 1 <= len(found) <= 8
    assert all(math.isfinite(number) for number in found)


def test_the_same_run_gives_the_same_bytes_in_another_process():
    program = (
        "import hashlib; from dyntune.report import render, run_page; from tests.report.runs import monitored; "
        "print(hashlib.sha256(render(run_page(monitored('diverging'))).encode()).hexdigest())"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # texts hash differently there than here
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    here = render(run_page(monitored("diverging"))).encode()
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_the_policy_names_the_script_that_is_there():
    html = render(run_page(monitored("edge")))
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html


def test_data_cannot_end_its_script():
    html = render(run_page(monitored("edge", words=HOSTILE)))
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1)
    assert not set("<>&") & set(data)
    charts = json.loads(data)["charts"]
    assert charts[0][0]["name"] == "deterministic (full batch)"
    assert charts[2][1]["name"] == f"group {HOSTILE}"


def test_write_takes_both_kinds_of_pages(tmp_path):
    page = run_page(monitored("edge"))
    assert isinstance(page, RunPage)
    assert page.verdict.state is State.EDGE
    assert write(page, tmp_path / "run.html").read_text(encoding="utf-8") == render(page)
