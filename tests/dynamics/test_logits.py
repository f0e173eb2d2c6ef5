"""Output logits against float64, and drift with an interval that covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, ttest_ind, ttest_rel
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError, RefusedError
from dyntune.records import Status
from tests.objective.zoo import made, rows

EPS = torch.finfo(torch.float32).eps
X = rows(40, 6)


def model(seed: int = 0, gain: float = 3.0) -> nn.Module:
    found = made(lambda: nn.Linear(6, 9), seed)
    with torch.no_grad():
        found.weight.mul_(gain)
    return found


class Fixed(nn.Module):
    """Outputs what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_definitions():
    net = model()
    found = dyntune.output_logits(net, [(X[:15], X[:15]), (X[15:], X[15:])])
    z = net.double()(X.double()).detach()
    log_z, entropy = z.logsumexp(-1), torch.distributions.Categorical(logits=z).entropy()
    assert float(found.log_z) == pytest.approx(float(log_z.mean()), rel=10 * EPS)
    assert float(found.entropy) == pytest.approx(float(entropy.mean()), rel=10 * EPS)
    assert found.log_z_spread == pytest.approx(float(log_z.std()), rel=100 * EPS)
    assert found.z_loss == pytest.approx(float((log_z**2).mean()), rel=100 * EPS)
    assert found.max_abs_logit == pytest.approx(float(z.abs().max()), rel=10 * EPS)
    half = 2.0226909 * float(log_z.std()) / math.sqrt(40)  # Student t, 39 degrees, 97.5%
    assert found.log_z.high - found.log_z.value == pytest.approx(half, rel=1e-5)
    assert (found.classes, found.positions) == (9, 40)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_large_logits_cost_the_entropy_no_digits(shift):
    """A common shift leaves the entropy alone; powers of two keep the logits exact."""
    z = (X * 64).round() / 64
    found = dyntune.output_logits(Fixed(), z + 2.0**13 * np.sign(shift))
    truth = torch.distributions.Categorical(logits=z.double()).entropy().mean()
    assert float(found.entropy) == pytest.approx(float(truth), rel=10 * EPS)
    assert float(found.log_z) == pytest.approx(float(z.double().logsumexp(-1).mean()) + 2.0**13 * np.sign(shift))


def test_shapes_of_language_models_and_images():
    z = rows(4, 5, 7)
    positions = dyntune.output_logits(Fixed(), z)
    assert (positions.classes, positions.positions) == (7, 20)
    assert dyntune.output_logits(Fixed(), z, dim=1).classes == 5
    image = dyntune.output_logits(Fixed(), rows(2, 3, 4, 5))
    assert (image.classes, image.positions) == (3, 40)
    with pytest.raises(InvalidArgumentError, match=r"dim=-1 is to hold the logits of two classes"):
        dyntune.output_logits(Fixed(), rows(4, 1))
    with pytest.raises(InvalidArgumentError, match=r"dim=5"):
        dyntune.output_logits(Fixed(), z, dim=5)


class Padded(Fixed):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_padding_is_left_out_and_rows_count_alike():
    z, keep = rows(3, 5, 7), torch.ones(3, 5, dtype=torch.long)
    keep[0, 1:] = 0
    z[0, 1:] = 1e6
    found = dyntune.output_logits(Padded(), {"x": z, "attention_mask": keep})
    log_z = z.double().logsumexp(-1)
    means = [float(log_z[0, 0]), float(log_z[1].mean()), float(log_z[2].mean())]
    assert float(found.log_z) == pytest.approx(np.mean(means), rel=10 * EPS)
    assert found.positions == 11
    assert found.max_abs_logit < 100
    with pytest.raises(InvalidArgumentError, match="no position counts"):
        dyntune.output_logits(Padded(), {"x": z, "attention_mask": 0 * keep})


def test_blocks_do_not_matter(monkeypatch):
    z = rows(6, 50, 7)
    whole = dyntune.output_logits(Fixed(), z)
    monkeypatch.setattr("dyntune.dynamics.logits.BLOCK", 20)
    parts = dyntune.output_logits(Fixed(), z)
    assert parts == whole


def test_drift_on_the_same_rows_is_paired():
    early, late = model(), model(gain=3.3)
    then, now = (dyntune.output_logits(net, X) for net in (early, late))
    a, b = (net.double()(X.double()).detach().logsumexp(-1).numpy() for net in (late, early))
    interval = ttest_rel(a, b).confidence_interval(0.95)
    drift = now.drift(then)["log_z"]
    assert float(drift) == pytest.approx((a - b).mean(), rel=1e-4)
    assert (drift.low, drift.high) == pytest.approx((interval.low, interval.high), rel=1e-4)
    assert "same rows" in drift.method
    assert all(float(d) == 0.0 for d in then.drift(then).values())


def test_drift_on_other_rows_is_welchs():
    other = rows(25, 6, seed=9)
    then, now = dyntune.output_logits(model(), X), dyntune.output_logits(model(gain=3.3), other)
    a = model(gain=3.3).double()(other.double()).detach().logsumexp(-1).numpy()
    b = model().double()(X.double()).detach().logsumexp(-1).numpy()
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    drift = now.drift(then)["log_z"]
    assert (drift.low, drift.high) == pytest.approx((interval.low, interval.high), rel=1e-4)
    assert "other rows" in drift.method


def test_the_interval_covers_as_often_as_it_says():
    """200 draws of 20 rows; the mean over 20,000 rows is the truth to a hundredth of an interval."""
    net = model()
    truth = float(dyntune.output_logits(net, rows(20_000, 6, seed=1)).log_z)
    hits = sum(truth in dyntune.output_logits(net, rows(20, 6, seed=100 + s)).log_z for s in range(200))
    assert binom.cdf(hits, 200, 0.95) > 1e-3
    assert binom.sf(hits - 1, 200, 0.95) > 1e-3


def test_one_row_and_infinite_logits_say_so():
    one = dyntune.output_logits(model(), X[:1])
    assert one.log_z.status is Status.UNCERTAIN
    assert (one.log_z.low, one.log_z.high) == (-math.inf, math.inf)
    broken = dyntune.output_logits(model(gain=math.nan), X)
    assert broken.log_z.status is Status.REFUSED
    assert math.isnan(broken.max_abs_logit)
    with pytest.raises(RefusedError):
        float(broken.drift(one)["entropy"])


def test_other_classes_do_not_compare():
    with pytest.raises(InvalidArgumentError, match="9 classes now and of 6 earlier"):
        dyntune.output_logits(model(), X).drift(dyntune.output_logits(Fixed(), X))
