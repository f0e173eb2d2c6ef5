"""The verdict on runs whose state is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dyntune.dynamics.edge import Regime
from dyntune.monitor.ratios import nearest_ratio, stability_ratios
from dyntune.monitor.run import Event, Row, Run
from dyntune.monitor.verdict import State, verdict
from tests.report.runs import monitored


def run(*values: dict[str, float | None], events: tuple[Event, ...] = (), regimes: dict[int, str] | None = None) -> Run:
    regimes = regimes or {}
    rows = [
        Row(step=step, values=v, labels={"regime": regimes[step], "regime_reason": "seen"} if step in regimes else {})
        for step, v in enumerate(values)
    ]
    return Run(rows=rows, events=events)


def losses(*numbers: float) -> list[dict[str, float | None]]:
    return [{"train/loss": number} for number in numbers]


def diverging_at(step: int, **more: object) -> Event:
    detail = {"kind": "diverging", "severity": "critical", "text": "it grows", "advice": "lower it"}
    return Event(name="alert", step=step, detail=detail | more)


@pytest.mark.parametrize(
    ("kind", "state"), [("healthy", State.STABLE), ("edge", State.EDGE), ("diverging", State.DIVERGING)]
)
def test_whole_runs(kind, state):
    assert verdict(monitored(kind)).state is state


@pytest.mark.parametrize(
    ("regime", "state"),
    [
        ("smooth", State.STABLE),
        ("stationary_noise", State.STABLE),
        ("damped", State.STABLE),
        ("edge", State.EDGE),
        ("diverging", State.DIVERGING),
    ],
)
def test_the_latest_regime_decides(regime, state):
    found = verdict(run(*losses(2.0, 1.0, 1.0), regimes={0: "smooth", 1: "diverging", 2: regime}))
    assert found.state is state
    assert found.step == 2
    assert any("seen" in line for line in found.evidence)


def test_every_regime_has_its_words():
    for regime in Regime:
        found = verdict(run({"train/loss": 1.0}, regimes={0: regime.name.lower()}))
        assert found.sentence.endswith(".")


def test_a_ratio_alone_is_never_divergence():
    for ratio in (0.1, 0.99, 1.0, 1.5, 40.0):
        for last in (1.0, 3.0):
            values = [*losses(*[2.0] * 20), *losses(*[last] * 20), {"stability/lr_ratio": ratio}]
            assert verdict(run(*values)).state is not State.DIVERGING
    edge = verdict(run({"train/loss": 2.0}, {"train/loss": 1.0, "stability/lr_ratio": 1.0}))
    assert edge.state is State.EDGE
    assert "healthy" in edge.sentence


def test_a_ratio_above_one_with_a_loss_above_its_start_is_left_open():
    found = verdict(run({"train/loss": 1.0}, {"train/loss": 2.0, "stability/lr_ratio": 1.2}))
    assert found.state is State.UNDETERMINED
    assert "does not tell the edge from divergence" in found.sentence


def test_an_interval_decides_with_its_upper_end():
    wide = {"stability/lr_ratio": 0.8, "stability/lr_ratio.low": 0.5, "stability/lr_ratio.high": 1.3}
    assert verdict(run(wide)).state is State.UNDETERMINED
    narrow = wide | {"stability/lr_ratio.high": 0.9}
    assert verdict(run(narrow)).state is State.STABLE


def test_a_loss_that_is_not_finite_to_the_end_is_divergence():
    found = verdict(run(*losses(2.0, 1.0, math.nan, math.inf), regimes={1: "edge"}))
    assert found.state is State.DIVERGING
    assert found.step == 2
    assert "since step 2" in found.sentence
    assert verdict(run(*losses(2.0, math.nan, 1.0), regimes={2: "smooth"})).state is State.STABLE


def test_a_gradient_that_is_not_finite_stands_in_for_a_loss_that_was_not_recorded():
    found = verdict(run({"grad/norm": 1.0}, {"grad/norm": math.nan}))
    assert found.state is State.DIVERGING
    assert "gradient" in found.sentence


def test_going_back_means_before_the_first_sign():
    values = losses(2.0, 1.0, 1.0, 2.0, 3.0, math.nan)
    found = verdict(run(*values, regimes={1: "edge", 3: "diverging", 4: "diverging"}))
    assert "before step 3" in found.advice[0]
    early = verdict(run(*values, events=(diverging_at(2),), regimes={1: "edge", 3: "diverging"}))
    assert "before step 2" in early.advice[0]
    over = verdict(run(*values, events=(diverging_at(2),), regimes={4: "edge"}))  # it had recovered
    assert "before step 5" in over.advice[0]


def test_an_alert_after_the_latest_regime_counts_one_before_it_does_not():
    values = losses(2.0, 1.0, 3.0, 3.0)
    after = verdict(run(*values, events=(diverging_at(3, text="above \x1b[31m"),), regimes={1: "edge"}))
    assert after.state is State.DIVERGING
    assert after.step == 3
    assert verdict(run(*values, events=(diverging_at(1),), regimes={2: "edge"})).state is State.EDGE


def test_evidence_of_the_first_half_does_not_speak_for_the_end():
    assert verdict(run(*losses(*[1.0] * 11), regimes={5: "smooth"})).state is State.STABLE
    found = verdict(run(*losses(*[1.0] * 11), regimes={4: "smooth"}))
    assert found.state is State.UNDETERMINED
    assert "6 steps" in found.sentence
    assert found.evidence[0].startswith("At that time: Stable")
    late = losses(*[1.0] * 11)
    late[9] |= {"stability/lr_ratio": 0.5}
    assert verdict(run(*late, regimes={4: "edge"})).sentence.startswith("Stable: the learning rate is at 0.5")
    broken = verdict(run(*losses(1.0, *[math.nan] * 9), regimes={0: "smooth"}))
    assert broken.state is State.DIVERGING


def test_an_alert_of_an_attempt_that_was_given_up_does_not_count():
    values = losses(2.0, 1.0)
    resumed = Run(rows=run(*values).rows, events=(diverging_at(1),), attempts=2)
    assert verdict(resumed).state is State.UNDETERMINED


def test_nothing_measured_says_what_is_missing():
    blind = Event(name="blind", step=None, detail={"signal": "curvature", "reason": "no loss function was given"})
    found = verdict(run(*losses(2.0, 1.0), events=(blind,)))
    assert found.state is State.UNDETERMINED
    assert "No loss function was given." in found.evidence
    assert verdict(Run(rows=())).state is State.UNDETERMINED


def test_the_critical_rate_is_said_with_the_rate_when_it_diverged():
    measured = {"train/loss": 2.0, "train/lr": 0.05, "curvature/lr_crit": 0.1}
    raised = {"train/loss": math.inf, "train/lr": 3.0}
    later = {"train/loss": math.nan, "train/lr": 0.01, "curvature/lr_crit": 9.0}
    found = verdict(run({"train/loss": 1.0}, measured, raised, later))
    assert found.advice[-1] == (
        "At the curvature of step 1 the edge is at a learning rate of 0.1; the rate was 3 at step 2."
    )


def test_ratios_come_from_limits_where_no_column_is_one():
    values = {"preconditioned": 19.0, "preconditioned.limit": 38.0, "preconditioned.low": 9.5, "batch": 3.0}
    (ratio,) = stability_ratios(run(values))
    assert (ratio.kind, ratio.values.tolist(), ratio.low.tolist()) == ("deterministic", [0.5], [0.25])
    assert np.isnan(ratio.high).all()


def test_the_threshold_that_is_met_first_counts_and_the_step_only_by_itself():
    both = {"stability/lr_ratio": 0.5, "stability/batch_ratio": 0.8}
    along = {"stability/step_curvature": 1.8, "stability/step_curvature.limit": 2.0}
    assert nearest_ratio(stability_ratios(run(both | along))).kind == "stochastic"
    assert nearest_ratio(stability_ratios(run(along))).kind == "along the step"
    assert nearest_ratio(stability_ratios(run({"stability/lr_ratio": None}))) is None


def test_a_ratio_of_long_ago_does_not_count_beside_a_new_one():
    values = [{"train/loss": 1.0}, {"stability/lr_ratio": 2.0}, {"train/loss": 1.0}, {"stability/batch_ratio": 0.1}]
    assert nearest_ratio(stability_ratios(run(*values))).kind == "stochastic"
    assert nearest_ratio(stability_ratios(run(*values[1:]))).kind == "stochastic"
    assert nearest_ratio(stability_ratios(run(values[0], values[0], values[1], values[3]))).kind == "deterministic"


def test_a_limit_that_is_not_positive_gives_no_ratio():
    (ratio,) = stability_ratios(run({"lambda_max": 3.0, "lambda_max.limit": 0.0}))
    assert ratio.last is None


@pytest.mark.parametrize("kind", ["diverging", "diverged", "loss-rose"])
def test_a_critical_alert_of_divergence_is_the_verdict(kind):
    values = [{"train/loss": 2.0 - 0.1 * i, "stability/lr_ratio": 0.5} for i in range(10)]
    assert verdict(run(*values, events=(diverging_at(8, kind=kind),))).state is State.DIVERGING
    assert verdict(run(*values, events=(diverging_at(8, kind="loss-spike"),))).state is State.STABLE


def test_below_the_edge_with_a_loss_above_its_start_is_not_called_stable():
    values = [*losses(*[2.0] * 20), *losses(*[320.0] * 20), {"stability/lr_ratio": 0.78}]
    found = verdict(run(*values))
    assert found.state is State.UNDETERMINED
    assert "above its start" in found.sentence
