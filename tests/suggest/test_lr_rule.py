"""The pure rule against closed forms, and its statuses."""

import json
import math
from dataclasses import replace

import pytest

from dyntune.records import Status
from dyntune.stability.thresholds import Recurrence
from dyntune.suggest.blend import LEVEL, ONSET, ONSET_INTERVAL, ONSET_LEVEL, VALUE, VALUE_INTERVAL
from dyntune.suggest.lr_rule import LREvidence, lr_rule

SGD = Recurrence("sgd", 0.0, 0.1)
MOMENTUM = Recurrence("sgd", 0.9, 0.1)
ADAM = Recurrence("adam", 0.9, 1e-3)


def evidence(**changes: object) -> LREvidence:
    base: dict[str, object] = {
        "rates": (0.01, 0.04, 0.16, 0.64),
        "losses": (1.8, 1.0, 1.8, math.inf),  # symmetric about 0.04: the parabola's minimum is there
        "blow_up": 5.0,
        "tried": 6.0,
        "critical": 1.0,
        "initial": 2.3,
        "gain_se": 0.01,
        "num_batches": 16,
        "warmup": 3,
        "cost": 180.0,
    }
    return LREvidence(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
def test_value_and_max_stable_are_blends_of_what_was_measured(optimizer: Recurrence) -> None:
    rec = lr_rule(evidence(), optimizer=optimizer)
    adaptive = optimizer is ADAM
    rates = {"vertex": 0.04, "critical": 1.0, "blow_up": 5.0, "usual": 2.0**-8 if adaptive else 1 / 2.3}
    momentum = 0.9 if optimizer is MOMENTUM else 0.0
    value = VALUE.value(rates, adaptive=adaptive, momentum=momentum)
    onset = ONSET.value(rates, adaptive=adaptive, momentum=momentum)
    assert rec.value == pytest.approx(value, rel=1e-12)
    assert rec.status is Status.OK
    assert rec.level == LEVEL
    assert rec.low == pytest.approx(value * 2.0 ** VALUE_INTERVAL[0], rel=1e-12)
    assert rec.high == pytest.approx(value * 2.0 ** VALUE_INTERVAL[1], rel=1e-12)
    assert rec.max_stable is not None
    assert rec.max_stable.value == pytest.approx(max(onset, value), rel=1e-12)
    assert rec.max_stable.level == ONSET_LEVEL
    assert rec.max_stable.low == pytest.approx(onset * 2.0 ** ONSET_INTERVAL[0], rel=1e-12)


def test_value_stays_below_half_of_what_blew_up() -> None:
    free, bound = (lr_rule(evidence(blow_up=blow_up), optimizer=SGD) for blow_up in (None, 0.05))
    assert free.value is not None
    assert free.value > 0.025
    assert bound.value == pytest.approx(0.025, rel=1e-12)
    assert bound.high == 0.05  # nor does the range reach beyond it


def test_value_stays_at_what_short_runs_survived() -> None:
    """The other parts of the blend would lead higher: here by the usual rate of a small loss."""
    small = evidence(losses=(0.0018, 0.0012, 0.001, math.inf), initial=0.0023, gain_se=0.0, critical=8.0)
    rec = lr_rule(small, optimizer=SGD)
    assert rec.value == 0.16
    assert lr_rule(replace(small, losses=(0.0018, 0.0012, 0.001, 0.0012)), optimizer=SGD).value > 0.16


def test_without_a_blow_up_the_highest_rate_tried_stands_in_for_it() -> None:
    stable = [lr_rule(evidence(blow_up=None, tried=tried), optimizer=SGD).max_stable for tried in (4.0, 8.0)]
    seen = lr_rule(evidence(blow_up=4.0), optimizer=SGD).max_stable
    assert stable[0] == seen
    assert float(stable[1]) == pytest.approx(float(stable[0]) * 2.0 ** ONSET.weights["blow_up"], rel=1e-12)


def test_scaling_everything_by_c_scales_the_answer() -> None:
    """Loss x c makes every SGD rate c times as small."""
    one, c = evidence(), 8.0
    scaled = replace(
        one,
        rates=tuple(rate / c for rate in one.rates),
        losses=tuple(loss * c for loss in one.losses),
        blow_up=5.0 / c,
        tried=6.0 / c,
        critical=1.0 / c,
        initial=2.3 * c,
        gain_se=0.01 * c,
    )
    first, second = (lr_rule(e, optimizer=MOMENTUM) for e in (one, scaled))
    assert second.value == pytest.approx(first.value / c, rel=1e-12)
    assert float(second.max_stable) == pytest.approx(float(first.max_stable) / c, rel=1e-12)


def test_a_loss_below_zero_has_no_scale_of_its_own() -> None:
    """There the critical rate stands in for the usual one, and the answer does not depend on the loss's zero."""
    shifted = [
        lr_rule(evidence(losses=tuple(x - shift for x in evidence().losses), initial=2.3 - shift), optimizer=SGD)
        for shift in (10.0, 20.0)
    ]
    assert shifted[0].value == pytest.approx(shifted[1].value, rel=1e-9)  # differences of losses near 20
    rates = {"vertex": 0.04, "critical": 1.0, "usual": 1.0}
    assert shifted[0].value == pytest.approx(VALUE.value(rates, adaptive=False, momentum=0.0), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "status", "fragment"),
    [
        ({"num_batches": 1}, Status.ONE_BATCH, "one batch"),
        ({"verified": False}, Status.UNCERTAIN, "max_gradients"),
        ({"losses": (2.31, 2.29, 2.3, math.inf), "gain_se": 0.1}, Status.UNCERTAIN, "noise"),
        ({"losses": (2.4, 2.33, 2.6, math.inf), "gain_se": 0.1}, Status.REFUSED, "lowered the loss"),
        ({"losses": (1.0, 1.1, 1.8, math.inf)}, Status.UNCERTAIN, "lowest rate"),
        ({"losses": (2.4, 2.5, 2.6, math.inf)}, Status.REFUSED, "lowered the loss"),
        ({"losses": (2.3, 2.3, 2.3, 2.3), "gain_se": 0.0}, Status.REFUSED, "lowered the loss"),
        ({"losses": (math.inf,) * 4}, Status.REFUSED, "blew up"),
    ],
)
def test_bad_evidence_has_a_status_and_a_reason(changes: dict[str, object], status: Status, fragment: str) -> None:
    rec = lr_rule(evidence(**changes), optimizer=SGD)
    assert rec.status is status
    assert fragment in rec.reason
    assert (rec.value is None) == (status is Status.REFUSED)
    json.dumps(rec.to_dict(), allow_nan=False)
    assert rec.reason in rec.explain()


def test_max_stable_is_never_below_the_value() -> None:
    rec = lr_rule(evidence(blow_up=None, tried=0.02, critical=0.01), optimizer=SGD)
    assert rec.value is not None
    assert rec.max_stable is not None
    assert rec.value <= float(rec.max_stable)
    assert rec.max_stable.low <= float(rec.max_stable) <= rec.max_stable.high


def test_warmup_of_adam_follows_beta2_and_the_length_of_training() -> None:
    assert lr_rule(evidence(), optimizer=ADAM).warmup_steps == 3
    assert lr_rule(evidence(num_steps=100_000, beta2=0.999), optimizer=ADAM).warmup_steps == 2000
    assert lr_rule(evidence(num_steps=1000, beta2=0.999), optimizer=ADAM).warmup_steps == 100
    assert lr_rule(evidence(num_steps=1000, beta2=None), optimizer=SGD).warmup_steps == 3
