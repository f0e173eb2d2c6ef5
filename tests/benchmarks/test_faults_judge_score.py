"""Scores of alarms by hand, and of an oracle, a detector that is silent and one that is never."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from benchmarks.faults.alarm import Alarm
from benchmarks.faults.score import (
    MERGED,
    Judged,
    advantage,
    budget,
    by_family,
    clustered_ratio,
    detection,
    false_alarms,
    figures,
    lead_time,
    leads,
    merged,
    named,
    poisson_rate,
    ranked_causes,
    rate_of,
)
from dyntune.monitor.alerts import Cause

POINT, RULE = ("d", 0.0), ("rule", 6.0)
STEPS, ONSET = 1200, 500


def _fault(
    alarms=(), *, rule=(), name="f", cell="lr-high/mlp", cause=Cause.LR_TOO_HIGH, severity="severe", onset=ONSET
):
    said = {POINT: tuple(alarms), RULE: tuple(Alarm(time, "loss spike") for time in rule)}
    return Judged(name, "faults", cell, STEPS, str(cause), severity, onset, said)


def _healthy(alarms=(), *, cell="plain/mlp", steps=8000):
    return Judged("h", "healthy", cell, steps, None, None, None, {POINT: tuple(alarms), RULE: ()})


def _at(*times, severity="critical", causes=(), kind="k"):
    return [Alarm(time, kind, severity, tuple(causes)) for time in times]


# -- which alarms count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "onset", "kept"),
    [
        ([0, 199, 200, 399, 400], None, [0, 200, 400]),
        ([10, 209, 210], None, [10, 210]),
        ([450, 499, 500, 510], 500, [450, 500]),  # one that goes on over the onset counts anew
        ([300, 100], None, [100, 300]),
        ([], None, []),
    ],
)
def test_repetitions_are_one_alarm(times, onset, kept):
    assert [alarm.time for alarm in merged(_at(*times), onset)] == kept


def test_only_the_same_kind_and_severity_is_a_repetition():
    some = [*_at(1), *_at(2, kind="other"), *_at(3, severity="warning"), *_at(4)]
    assert [alarm.time for alarm in merged(some, None)] == [1, 2, 3]


def test_a_warning_detects_only_where_warnings_are_counted():
    run = _fault(_at(600, severity="warning"))
    assert detection([run], POINT, "critical")["count"] == 0
    assert detection([run], POINT, "warning")["count"] == 1
    run = _healthy(_at(600, severity="warning"))
    assert false_alarms([run], POINT, "critical")["count"] == 0
    assert false_alarms([run], POINT, "warning")["count"] == 1


@pytest.mark.parametrize(("time", "detected", "before"), [(499, 0, 1), (500, 1, 0), (1199, 1, 0)])
def test_alarms_before_the_onset_are_false(time, detected, before):
    found = figures([_fault(_at(time))], POINT, "critical", RULE)
    assert (found["detection"]["severe"]["count"], found["before_onset"]) == (detected, before)


# -- causes -----------------------------------------------------------------------------------------------------------


def test_causes_are_ranked_as_a_user_meets_them():
    high, low, dead, bad = Cause.LR_TOO_HIGH, Cause.LR_TOO_LOW, Cause.DEAD_UNITS, Cause.BAD_BATCH
    alarms = [*_at(100, causes=[bad]), *_at(700, causes=[dead, high]), *_at(600, causes=[low, dead])]
    assert ranked_causes(_fault(alarms), POINT, "critical") == [low, dead, high]
    runs = [_fault(alarms, cause=cause) for cause in (low, dead, high, bad)]
    assert named(runs, POINT, "critical", within=1)["rate"] == 0.25
    assert named(runs, POINT, "critical", within=2)["rate"] == 0.5
    assert named(runs, POINT, "critical", within=3)["rate"] == 0.75


def test_a_run_without_an_alarm_names_no_cause_and_is_left_out_of_the_detected():
    runs = [_fault(_at(600, causes=[Cause.LR_TOO_HIGH])), _fault()]
    found = figures(runs, POINT, "critical", RULE)
    assert found["top_1"]["severe"]["rate"] == 0.5
    assert found["top_1_of_detected"]["severe"] | {"low": 0} == found["top_3_of_detected"]["severe"] | {"low": 0}
    assert (found["top_1_of_detected"]["severe"]["count"], found["top_1_of_detected"]["severe"]["of"]) == (1, 1)
    assert found["top_1_of_detected"]["mild"] is None


# -- lead times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "rule", "lead"),
    [
        ([550], [600], 50),
        ([600], [550], -50),
        ([510], [1000], MERGED),
        ([1000], [510], -MERGED),
        ([], [600], -MERGED),
        ([1100], [], MERGED),
        ([], [], None),
        ([100], [600], -MERGED),  # a false alarm before the onset is no detection
        ([550], [100, 560], 10),  # nor is the rule's
    ],
)
def test_lead_time(ours, rule, lead):
    assert lead_time(_fault(_at(*ours), rule=rule), POINT, "critical", RULE) == lead


def test_median_lead_time_counts_what_is_censored():
    leads_of = [([550], [560]), ([550], [570]), ([550], [580]), ([], [600]), ([600], []), ([], [])]
    runs = [_fault(_at(*a), rule=b, cell=f"x/{i}") for i, (a, b) in enumerate(leads_of)]
    found = leads(runs, POINT, "critical", RULE)
    assert found["median"] == 20  # of -200, 10, 20, 30, 200
    assert (found["runs"], found["neither"], found["missed"], found["rule_silent"]) == (5, 1, 1, 1)
    assert found["cell_low"] <= 10
    assert 30 <= found["cell_high"] <= 200
    assert leads([_fault()], POINT, "critical", RULE) is None


def test_sudden_faults_are_those_of_a_cause_and_not_mild():
    runs = [
        _fault(_at(550), rule=[560]),
        _fault(_at(550), rule=[600], severity="mild"),
        _fault(_at(550), rule=[700], cause=Cause.WRONG_LABELS),
    ]
    found = figures(runs, POINT, "critical", RULE)["lead"]
    assert (found["sudden"]["runs"], found["sudden"]["median"]) == (1, 10)
    assert "lead" not in figures(runs, POINT, "critical", None)


# -- rates and intervals ----------------------------------------------------------------------------------------------


def test_no_alarm_in_many_steps_is_the_rule_of_three():
    found = poisson_rate(0, 1_000_000)
    assert (found["rate"], found["low"]) == (0, 0)
    assert found["upper"] == pytest.approx(-math.log(0.05) / 10)  # 3.0 / 1,000,000 steps, per 100,000
    assert found["high"] == pytest.approx(-math.log(0.025) / 10)


def test_four_alarms_in_a_million_steps_are_below_one_in_a_hundred_thousand_and_five_are_not():
    assert poisson_rate(4, 1_000_000)["upper"] == pytest.approx(0.9154, abs=1e-4)  # chi2(10) at 95%: 18.307 / 2
    assert poisson_rate(5, 1_000_000)["upper"] > 1


def test_an_exact_poisson_interval_covers():
    rng = np.random.default_rng(0)
    for mean in (0.5, 3.0, 20.0):
        counts = rng.poisson(mean, 2000)
        table = {int(k): poisson_rate(int(k), 1000, per=1000) for k in np.unique(counts)}
        covered = np.mean([table[int(k)]["low"] <= mean <= table[int(k)]["high"] for k in counts])
        assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 2000)  # 3 sd; exact intervals cover at least so often


def test_false_alarms_per_steps():
    runs = [_healthy(_at(1, 300, 4000)), _healthy(cell="b/mlp"), _healthy(_at(5), cell="b/mlp", steps=4000)]
    found = false_alarms(runs, POINT, "critical")
    assert (found["count"], found["steps"], found["rate"]) == (4, 20_000, 20.0)
    assert (found["runs"], found["runs_with_one"]) == (3, 2)
    # Two cells of 37.5 and 8.33 per 100,000: a resample is one of them, or both.
    assert found["cell_low"] == pytest.approx(100_000 / 12_000)
    assert found["cell_high"] == pytest.approx(37.5)
    assert false_alarms([], POINT, "critical") is None


def test_a_bootstrap_over_cells_is_wider_than_one_over_runs():
    # Ten cells of ten runs that agree among themselves: as if there were ten runs.
    hit = [cell % 2 == 0 for cell in range(10) for _ in range(10)]
    together = rate_of(hit, [str(cell) for cell in range(10) for _ in range(10)])
    apart = rate_of(hit, [str(i) for i in range(100)])
    assert together["rate"] == apart["rate"] == 0.5
    sd = (apart["cell_high"] - apart["cell_low"]) / (2 * 1.96)
    assert sd == pytest.approx(0.05, rel=0.1)  # sqrt(0.25 / 100); 2,000 resamples know a quantile to some percent
    wider = (together["cell_high"] - together["cell_low"]) / (apart["cell_high"] - apart["cell_low"])
    assert wider == pytest.approx(math.sqrt(10), rel=0.15)  # quantiles of ten cells are multiples of 0.1


def test_a_ratio_weighs_cells_by_their_size():
    assert clustered_ratio([1, 3], [10, 30], ["a", "b"]) == pytest.approx((0.1, 0.1))
    assert rate_of([], []) is None


# -- detectors of which everything is known ---------------------------------------------------------------------------


def _benchmark(answer, quiet):
    """30 faults in 6 cells, 4 healthy runs; `answer(cause)` and `quiet`: alarms of faulty and of healthy runs."""
    causes = (Cause.LR_TOO_HIGH, Cause.DEAD_UNITS, Cause.BAD_BATCH)
    runs = [
        _fault(answer(cause), rule=[600], cell=f"{cause.name}/{arch}", cause=cause, severity=severity, name=f"{seed}")
        for cause in causes
        for arch in ("mlp", "gru")
        for severity, seeds in (("severe", 3), ("medium", 2))
        for seed in range(seeds)
    ]
    return runs + [_healthy(quiet, cell=f"plain/{i}") for i in range(4)]


def test_an_oracle():
    found = figures(_benchmark(lambda cause: _at(ONSET, causes=[cause]), []), POINT, "critical", RULE)
    for level in ("severe", "medium"):
        for name in ("detection", "top_1", "top_3", "top_1_of_detected"):
            assert found[name][level]["rate"] == 1
        assert found["lead"][level]["median"] == 100
    assert found["healthy"]["count"] == 0
    assert found["healthy"]["upper"] == pytest.approx(100_000 * 2.9957 / 32_000, rel=1e-4)


def test_a_silent_detector():
    runs = _benchmark(lambda _: [], [])
    found = figures(runs, POINT, "critical", RULE)
    assert found["detection"]["severe"]["rate"] == found["top_3"]["severe"]["rate"] == 0
    assert found["top_1_of_detected"]["severe"] is None
    assert found["lead"]["severe"]["median"] == -MERGED
    assert (found["healthy"]["count"], found["before_onset"], budget(runs, POINT, "warning")) == (0, 0, 0)


def test_a_detector_that_is_never_silent():
    faulty, healthy = merged(_at(*range(STEPS)), ONSET), merged(_at(*range(8000)), None)
    runs = _benchmark(lambda _: faulty, healthy)
    found = figures(runs, POINT, "critical", RULE)
    assert found["detection"]["severe"]["rate"] == 1
    assert found["lead"]["severe"]["median"] == 100
    assert (found["healthy"]["count"], found["healthy"]["rate"]) == (4 * 40, 100_000 / MERGED)
    assert found["before_onset"] == 30 * 3  # at 0, 200 and 400
    assert budget(runs, POINT, "critical") == 4 * 40 + 30 * (3 + 4)  # and at 500, 700, 900 and 1,100


def test_by_family_and_advantage():
    runs = [
        _fault(_at(600, causes=[Cause.LR_TOO_HIGH]), rule=[600]),
        _fault(_at(600, causes=[Cause.LR_TOO_LOW, Cause.LR_TOO_HIGH]), cell="lr-high/gru"),
        _fault(severity="mild", rule=[700]),
    ]
    assert by_family(runs, POINT, "critical") == {
        "lr-high": {
            "severe": {"runs": 2, "detected": 2, "top_1": 1, "top_3": 2},
            "mild": {"runs": 1, "detected": 0, "top_1": 0, "top_3": 0},
        }
    }
    gain = advantage(runs, POINT, "critical", RULE, level="severe")
    assert (gain["gain"], gain["cell_low"], gain["cell_high"]) == (0.5, 0.0, 1.0)
