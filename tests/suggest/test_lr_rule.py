"""The pure rule against closed forms, and its statuses."""

import json
import math
from dataclasses import replace

import pytest

from dyntune.records import Estimate, Status
from dyntune.stability.thresholds import Recurrence
from dyntune.suggest.blend import BLEND, INTERVAL, LEVEL
from dyntune.suggest.lr_rule import LREvidence, lr_rule

SGD = Recurrence("sgd", 0.0, 0.1)
MOMENTUM = Recurrence("sgd", 0.9, 0.1)
ADAM = Recurrence("adam", 0.9, 1e-3)


def evidence(**changes: object) -> LREvidence:
    base: dict[str, object] = {
        "pick": 0.1,
        "spacing": 3.0,
        "blow_up": 5.0,
        "batch_curvature": 20.0,
        "batch_curvature_se": 1.0,
        "lambda_max": None,
        "critical": 1.0,
        "initial": 2.3,
        "reached": 1.0,
        "gain_se": 0.01,
        "num_batches": 16,
        "warmup": 3,
        "cost": 180.0,
    }
    return LREvidence(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [(SGD, 2.0), (MOMENTUM, 2.0 * 0.1), (ADAM, 2.0)],
    ids=["sgd", "momentum", "adam"],
)
def test_value_is_the_blend_of_what_was_measured(optimizer: Recurrence, threshold: float) -> None:
    curvature = threshold / 0.06  # stochastic threshold 0.06
    rec = lr_rule(evidence(batch_curvature=curvature, batch_curvature_se=0.05 * curvature), optimizer=optimizer)
    measured = {"pick": 0.1, "blow_up": 5.0, "stochastic": 0.06}
    assert rec.value == pytest.approx(BLEND.value(measured, critical=1.0, adaptive=optimizer is ADAM), rel=1e-12)
    assert rec.status is Status.OK
    assert rec.level == LEVEL
    assert rec.low == pytest.approx(rec.value * 2.0 ** INTERVAL[0], rel=1e-12)
    assert rec.high == pytest.approx(rec.value * 2.0 ** INTERVAL[1], rel=1e-12)


def test_value_stays_below_half_of_what_blew_up() -> None:
    high = evidence(batch_curvature=1e-3, batch_curvature_se=1e-5)
    free, bound = (lr_rule(replace(high, blow_up=blow_up), optimizer=SGD) for blow_up in (None, 0.3))
    assert free.value is not None
    assert free.value > 0.15
    assert bound.value == pytest.approx(0.15, rel=1e-12)
    assert bound.high == 0.3  # nor does the range reach beyond it


def test_measurements_that_lie_far_apart_are_said_to_disagree() -> None:
    for curvature in (1e-3, 1e4):
        rec = lr_rule(evidence(batch_curvature=curvature, batch_curvature_se=0.01 * curvature), optimizer=SGD)
        assert rec.status is Status.UNCERTAIN
        assert "disagree" in rec.reason


def test_scaling_everything_by_c_scales_the_answer() -> None:
    """Loss x c makes curvature c times as large and every SGD rate c times as small."""
    one = lr_rule(evidence(), optimizer=SGD)
    c = 8.0
    scaled = lr_rule(
        evidence(
            pick=0.1 / c,
            blow_up=5.0 / c,
            batch_curvature=20.0 * c,
            batch_curvature_se=1.0 * c,
            initial=2.3 * c,
            reached=1.0 * c,
            gain_se=0.01 * c,
            critical=1.0 / c,
        ),
        optimizer=SGD,
    )
    assert one.value is not None
    assert one.max_stable is not None
    assert scaled.max_stable is not None
    assert scaled.value == pytest.approx(one.value / c, rel=1e-12)
    assert float(scaled.max_stable) == pytest.approx(float(one.max_stable) / c, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "status", "fragment"),
    [
        ({"num_batches": 1, "batch_curvature_se": None}, Status.ONE_BATCH, "one batch"),
        ({"batch_curvature": -3.0}, Status.UNCERTAIN, "says nothing"),
        ({"batch_curvature_se": 11.0}, Status.UNCERTAIN, "says nothing"),
        ({"batch_curvature": None, "batch_curvature_se": None}, Status.UNCERTAIN, "says nothing"),
        ({"batch_curvature": math.nan}, Status.UNCERTAIN, "says nothing"),
        ({"verified": False}, Status.UNCERTAIN, "max_gradients"),
        ({"reached": 2.29, "gain_se": 0.1}, Status.UNCERTAIN, "noise"),
        ({"pick": None, "reached": 2.4}, Status.REFUSED, "lowered the loss"),
        ({"pick": None, "reached": math.inf}, Status.REFUSED, "blew up"),
    ],
)
def test_bad_evidence_has_a_status_and_a_reason(changes: dict[str, object], status: Status, fragment: str) -> None:
    rec = lr_rule(evidence(**changes), optimizer=SGD)
    assert rec.status is status
    assert fragment in rec.reason
    assert (rec.value is None) == (status is Status.REFUSED)
    json.dumps(rec.to_dict(), allow_nan=False)
    assert rec.reason in rec.explain()


def test_max_stable_lies_between_the_value_and_the_blow_up() -> None:
    rec = lr_rule(evidence(), optimizer=SGD)
    assert rec.value is not None
    assert rec.max_stable is not None
    assert rec.value <= rec.max_stable.low <= float(rec.max_stable) <= rec.max_stable.high == 5.0


def test_the_deterministic_threshold_is_an_upper_bound() -> None:
    def rule(lam: float) -> float | None:
        found = Estimate(value=lam, low=lam, high=lam, level=0.999, unit="1", method="test", covers="numerical")
        return lr_rule(evidence(lambda_max=found), optimizer=SGD).value

    free = lr_rule(evidence(), optimizer=SGD).value
    assert rule(1000.0) == pytest.approx(2 / 1000, rel=1e-12)
    assert rule(1.0) == free


def test_deterministic_threshold_uses_the_whole_interval_of_lambda_max() -> None:
    found = Estimate(value=100.0, low=99.0, high=110.0, level=0.999, unit="1", method="test", covers="numerical")
    rec = lr_rule(evidence(lambda_max=found), optimizer=ADAM)
    shown = rec.evidence["deterministic threshold"]
    assert isinstance(shown, Estimate)
    assert shown.value == pytest.approx(0.38)
    assert (shown.low, shown.high) == (pytest.approx(38 / 110), pytest.approx(38 / 99))


def test_warmup_of_adam_follows_beta2_and_the_length_of_training() -> None:
    assert lr_rule(evidence(), optimizer=ADAM).warmup_steps == 3
    assert lr_rule(evidence(num_steps=100_000, beta2=0.999), optimizer=ADAM).warmup_steps == 2000
    assert lr_rule(evidence(num_steps=1000, beta2=0.999), optimizer=ADAM).warmup_steps == 100
    assert lr_rule(evidence(num_steps=1000, beta2=None), optimizer=SGD).warmup_steps == 3
