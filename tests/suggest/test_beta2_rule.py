"""The pure rule of beta2: its parts against their formulas, the bounds, and what it says of itself."""

from __future__ import annotations

import json
import math

import pytest

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Estimate, Status
from dyntune.suggest.beta2_rule import (
    PATH,
    TOLERANCE,
    Beta2Evidence,
    batch_transfer,
    beta2_rule,
    half_life,
    half_life_beta2,
    horizon,
    momentum_floor,
    path_beta2,
    refresh_beta2,
    spike_limit,
)


def measured(value: float | None) -> Estimate:
    return Estimate(
        value=value,
        low=-math.inf if value is None else value - 0.01,
        high=math.inf if value is None else value + 0.01,
        level=None if value is None else 0.95,
        unit="beta2",
        method="by hand",
        covers="sampling",
        status=Status.REFUSED if value is None else Status.OK,
        reason="too short" if value is None else "",
    )


def evidence(**changes: object) -> Beta2Evidence:
    base: dict[str, object] = {"present": 0.999, "beta1": 0.9, "num_steps": 10_000}
    return Beta2Evidence(**(base | changes))  # type: ignore[arg-type]


BOUND = {"best": measured(0.98), "admitted": (0.9, 0.99), "scored": 5000}


def test_parts_are_their_formulas() -> None:
    assert half_life_beta2(5e6, tokens=1e7) == pytest.approx(0.5**0.5, rel=1e-15)
    assert half_life(half_life_beta2(1e4)) * 1e4 == pytest.approx(1e7, rel=1e-9)
    assert half_life(0.999) == pytest.approx(692.8, abs=0.05)  # the reference's table has 693
    assert batch_transfer(0.99, ratio=2.0) == pytest.approx(0.9801, rel=1e-15)
    assert refresh_beta2(20_000) == pytest.approx(0.95)
    assert horizon(300) == pytest.approx(0.99)
    assert horizon(3) is None
    assert momentum_floor(0.9) > 0.81
    assert momentum_floor(0.9) == pytest.approx(0.81, abs=0.01 * 0.19 + 1e-12)
    assert spike_limit(0.9) == pytest.approx(0.99)
    assert (1 - 0.9) / math.sqrt(1 - spike_limit(0.9, amplification=3.16)) == pytest.approx(3.16)


def test_half_life_in_samples_is_kept_by_batch_transfer() -> None:
    for ratio in (1 / 512, 0.5, 1.0, 8.0):
        moved = batch_transfer(0.95, ratio=ratio)
        assert half_life(moved) * ratio == pytest.approx(half_life(0.95), rel=1e-9)
        assert batch_transfer(moved, ratio=1 / ratio) == pytest.approx(0.95, rel=1e-12)


def test_without_a_prior_the_present_value_is_kept_and_said_to_be() -> None:
    rec = beta2_rule(evidence())
    assert rec.value == 0.999
    assert rec.evidence["active bound"] == "present value"
    assert "present one is kept" in rec.reason
    assert rec.status is Status.UNCERTAIN
    assert (rec.low, rec.high) == (0.95, horizon(10_000))


def test_order_of_what_is_known_beforehand() -> None:
    rec = beta2_rule(evidence(tokens_per_step=4e5))
    assert rec.value == half_life_beta2(4e5)
    assert rec.evidence["active bound"] == "half-life in tokens"
    assert rec.evidence["half-life, in tokens"] == pytest.approx(1e7, rel=1e-9)
    rec = beta2_rule(evidence(tokens_per_step=4e5, known=(0.98, 0.5)))
    assert rec.value == batch_transfer(0.98, ratio=0.5)
    assert rec.evidence["half-life in tokens"] == half_life_beta2(4e5)  # still shown


def test_the_length_of_training_bounds_the_memory() -> None:
    rec = beta2_rule(evidence(num_steps=300))
    assert rec.value == pytest.approx(0.99)
    assert rec.high == rec.value
    assert rec.evidence["active bound"] == "a third of the training"
    assert beta2_rule(evidence(num_steps=None)).value == 0.999


def test_beta1_bounds_from_below() -> None:
    rec = beta2_rule(evidence(tokens_per_step=8e6))  # half-life alone: 0.57
    assert rec.value == momentum_floor(0.9)
    assert rec.value is not None
    assert math.sqrt(rec.value) > 0.9
    assert rec.evidence["active bound"] == "beta1 < sqrt(beta2)"
    assert rec.low == rec.value
    assert beta2_rule(evidence(tokens_per_step=8e6, beta1=None)).value == half_life_beta2(8e6)  # RMSprop


def test_no_room_between_the_bounds_is_refused() -> None:
    rec = beta2_rule(evidence(num_steps=12))
    assert rec.value is None
    assert "lower beta1" in rec.reason
    with pytest.raises(RefusedError):
        float(rec)
    assert beta2_rule(evidence(num_steps=3, beta1=None)).value is None


def test_an_identified_prediction_is_a_bound_and_not_the_answer() -> None:
    rec = beta2_rule(evidence(**BOUND))
    assert rec.value == 0.99  # the end of the range, not 0.98
    assert rec.evidence["active bound"] == "prediction of squared gradients"
    assert rec.high == 0.99
    assert rec.low == 0.95
    inside = beta2_rule(evidence(**BOUND, tokens_per_step=6e5))
    assert inside.value == half_life_beta2(6e5)  # 0.959: within the range, untouched


def test_a_prediction_that_is_not_identified_bounds_nothing() -> None:
    rec = beta2_rule(evidence(**(BOUND | {"best": measured(None)})))
    assert rec.value == 0.999
    assert "too short" in str(rec.evidence["predicts squared gradients best"])


def test_bounds_win_over_the_prediction() -> None:
    rec = beta2_rule(evidence(best=measured(0.9995), admitted=(0.9993, 0.9999), num_steps=300))
    assert rec.value == pytest.approx(0.99)
    assert any("the bounds hold" in check for check in rec.checks)


def test_insensitive_takes_proof_and_enough_steps() -> None:
    flat = {"best": measured(0.98), "admitted": (0.8, 0.9999), "sure": (0.8, 0.9999)}
    rec = beta2_rule(evidence(**flat, scored=40_000))
    assert rec.evidence["active bound"] == "insensitive"
    assert rec.value == 0.999
    assert "adds nothing" in rec.reason
    # Of 1000 steps a memory of 3000 says nothing, and a range that is merely not excluded is no proof.
    assert beta2_rule(evidence(**flat, scored=1000)).evidence["active bound"] == "present value"
    unsure = flat | {"sure": (0.95, 0.99)}
    assert beta2_rule(evidence(**unsure, scored=40_000)).evidence["active bound"] == "present value"
    # A training of 1000 steps has no use for more than 0.997: 1000 measured ones speak for it all.
    assert beta2_rule(evidence(**flat, scored=1000, num_steps=1000, present=0.99)).evidence["active bound"] == (
        "insensitive"
    )


def test_the_toy_network_keeps_its_best_value() -> None:
    """Section 5.2 of the notes: best prediction 0.98 to 0.99, 0.9999 within 0.04 to 0.10 nats, and best in the loss."""
    assert TOLERANCE >= 0.10
    rec = beta2_rule(
        evidence(present=0.9999, best=measured(0.985), admitted=(0.9, 0.9999), scored=1400, num_steps=40_000)
    )
    assert rec.value == 0.9999


def test_tied_betas_follow_the_length_of_training() -> None:
    rec = beta2_rule(evidence(present=0.9, beta1=0.9, num_steps=20_000))
    assert rec.value == pytest.approx(0.95)
    assert rec.evidence["active bound"] == "1000 refreshes"
    assert any("for both" in check for check in rec.checks)
    assert beta2_rule(evidence(present=0.9, beta1=0.9, num_steps=900)).value == 0.9


def test_warnings_change_nothing() -> None:
    rec = beta2_rule(evidence())
    assert "3.2 learning rates" in " ".join(rec.checks)
    assert not any("learning rates" in check for check in beta2_rule(evidence(present=0.95)).checks)
    rare = beta2_rule(evidence(hit_rate=1e-4))
    assert rare.value == rec.value
    assert any("gone when the next one comes" in check for check in rare.checks)
    assert not any("gone when" in check for check in beta2_rule(evidence(hit_rate=0.1)).checks)


def test_longer_trainings_and_larger_batches_move_the_value_one_way() -> None:
    by_steps = [beta2_rule(evidence(num_steps=n)).value or 0 for n in (30, 100, 300, 1000, 10_000)]
    assert by_steps == sorted(by_steps)
    by_tokens = [beta2_rule(evidence(tokens_per_step=n)).value or 0 for n in (1e3, 1e4, 1e5, 1e6, 1e7)]
    assert by_tokens == sorted(by_tokens, reverse=True)
    assert len(set(by_tokens)) >= 4


def test_never_better_than_uncertain() -> None:
    for changes in ({}, BOUND, {"tokens_per_step": 1e5}, {"known": (0.99, 1.0)}):
        rec = beta2_rule(evidence(**changes))
        assert rec.status is Status.UNCERTAIN
        assert "not been judged" in rec.reason
        with pytest.raises(NotConvergedError):
            rec.require()


def test_factors_close_to_one_are_shown_as_what_they_are() -> None:
    assert str(beta2_rule(evidence(present=0.9999, num_steps=40_000))).startswith("0.9999 (0.95 .. 0.9999)")


def test_it_goes_through_json() -> None:
    for rec in (beta2_rule(evidence(**BOUND)), beta2_rule(evidence(num_steps=5))):
        assert json.loads(json.dumps(rec.to_dict(), allow_nan=False))["knob"] == "beta2"
        assert "half-life" in rec.explain()


@pytest.mark.parametrize(
    "changes",
    [
        {"present": 1.0},
        {"present": 0.0},
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"num_steps": 0},
        {"num_steps": -3},
        {"tokens_per_step": 0.0},
        {"tokens_per_step": math.nan},
        {"tokens_per_step": 1e3, "tokens": -1.0},
        {"known": (1.5, 1.0)},
        {"known": (0.99, 0.0)},
    ],
)
def test_numbers_outside_their_range(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        beta2_rule(evidence(**changes))


KNOWN_PATH = {"optimizer": "AdamW", "lr": 2e-3, "weight_rms": 0.05}


def test_the_path_is_its_formula() -> None:
    for lr, rms in ((1e-3, 0.02), (0.3, 1.0), (1e-5, 3.0)):
        beta2 = path_beta2(lr, rms)
        assert lr / (1 - beta2) == pytest.approx(PATH * rms, rel=1e-9)
    assert path_beta2(30.0, 1.0) == 0.0  # farther in one step
    for bad in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(InvalidArgumentError):
            path_beta2(*bad)


def test_the_path_decides_and_is_judged() -> None:
    rec = beta2_rule(evidence(**KNOWN_PATH))
    assert rec.value == path_beta2(2e-3, 0.05)
    assert rec.evidence["active bound"] == "path of the weights"
    assert rec.status is Status.OK
    assert (rec.low, rec.high) == (path_beta2(2e-3, 0.05, path=PATH / 2), path_beta2(2e-3, 0.05, path=2 * PATH))
    assert rec.evidence["learning rate over RMS of the weights"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"optimizer": "NAdam"}, "NAdam"),
        ({"beta1": 0.95}, "beta1 = 0.9"),
        ({"lr": 0.1}, "judged at"),
        ({"lr": 1e-4}, "judged at"),
        ({"known": (0.98, 1.0)}, "known value"),
        ({"tokens_per_step": 1e6}, "half-life"),
        ({"beta1": 0.999}, "1000 refreshes"),
    ],
)
def test_what_was_not_judged_is_uncertain(changes: dict[str, object], word: str) -> None:
    rec = beta2_rule(evidence(**(KNOWN_PATH | changes)))
    assert rec.status is Status.UNCERTAIN
    assert word in rec.reason


def test_the_shorter_memory_of_path_and_tokens() -> None:
    path = path_beta2(2e-3, 0.05)
    assert beta2_rule(evidence(**KNOWN_PATH, tokens_per_step=10.0)).value == path
    rec = beta2_rule(evidence(**KNOWN_PATH, tokens_per_step=1e6))
    assert rec.value == half_life_beta2(1e6) < path
    assert rec.evidence["path of the weights"] == path  # still shown


def test_a_path_longer_than_the_training_is_cut_and_judged() -> None:
    rec = beta2_rule(evidence(**KNOWN_PATH, num_steps=600))
    assert (rec.value, rec.high) == (0.995, 0.995)
    assert rec.evidence["active bound"] == "a third of the training"
    assert rec.status is Status.OK
    assert rec.low == 0.995  # half of the path is cut, too


def test_without_a_learning_rate_or_weights_there_is_no_path() -> None:
    for changes in ({"lr": None}, {"weight_rms": None}, {"lr": 0.0}, {"weight_rms": 0.0}):
        rec = beta2_rule(evidence(**(KNOWN_PATH | changes)))
        assert rec.value == 0.999
        assert "path of the weights" not in rec.evidence
        assert rec.status is Status.UNCERTAIN
