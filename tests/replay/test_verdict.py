"""Rises, their limit, agreement and batches that stand out, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dyntune.replay.changes import UNCHANGED, Change, Drop
from dyntune.replay.replaying import Replayed
from dyntune.replay.verdict import Judge, agreement, outliers, rises

STEPS = tuple(range(100, 132))


def replayed(losses: list[float], *, change: Change = UNCHANGED, norms: list[float] | None = None) -> Replayed:
    return Replayed(change, STEPS, tuple(losses), tuple(norms or [1.0] * len(losses)), {})


def calm(seed: int = 0) -> list[float]:
    return (1 + 0.1 * np.random.default_rng(seed).standard_normal(len(STEPS))).tolist()


def test_rise_is_paired() -> None:
    """A constant added to every loss is the rise, whatever the batches' own losses are."""
    start = replayed(calm())
    judge = Judge.of(start, [])
    assert judge is not None
    assert judge.tail == STEPS[-8:]
    # A median of eight of sd 0.1 has a standard error of 0.044; three of them, to the spread of one sample's MAD.
    assert 0.05 < judge.margin < 0.3
    assert judge.rise(replayed([x + 0.25 for x in start.losses])) == pytest.approx(0.25, rel=1e-12)
    assert judge.rise(replayed([math.nan] * 32)) == math.inf
    assert not judge.harmed(start)


def test_history_widens_the_margin() -> None:
    """A run whose loss has risen by 2 over as many steps before may do so again."""
    judge = Judge.of(replayed(calm()), [1.0] * 40 + [3.0] * 40)
    assert judge is not None
    assert judge.margin == 2.0


def test_averting_undoes_half() -> None:
    """Below the margin and by at least half: to come back by a hair is luck."""
    start = replayed(calm())
    judge = Judge.of(start, [0.0] * 40 + [1.0] * 40)
    assert judge is not None

    def risen(by: float) -> Replayed:
        return replayed([x + by for x in start.losses])

    assert judge.harmed(risen(1.1))
    assert judge.averts(risen(0.5), risen(1.1))
    assert not judge.averts(risen(0.9), risen(1.1))
    assert not judge.averts(risen(1.2), risen(10.0))


def test_steps_left_out_do_not_count() -> None:
    """Neither those whose batches stand out nor those that a change drops."""
    losses = calm()
    judge = Judge.of(replayed(losses), [], without=frozenset({131, 130}))
    assert judge is not None
    assert judge.tail == STEPS[-10:-2]
    dropped = replayed([*losses[:-3], math.nan, *losses[-2:]], change=Drop(frozenset({129})))
    assert judge.rise(dropped) == 0.0


def test_too_few_steps() -> None:
    """Without four ordinary steps in the second half there is nothing to judge by."""
    assert Judge.of(replayed(calm()), [], without=frozenset(STEPS[14:])) is None


def test_rises_are_those_of_medians() -> None:
    """Of a staircase; unknown losses are passed over."""
    assert rises([1.0, 1.0, 1.0, 4.0, 4.0, 4.0], length=3, apart=3) == [3.0]
    assert rises([1.0, 2.0], length=3, apart=1) == []
    assert rises([1.0, math.nan, 1.0, 1.0, 5.0, 5.0], length=1, apart=4) == [4.0]


def test_outliers_by_loss_and_by_gradient() -> None:
    """The worst first; of equal batches none."""
    losses, norms = calm(), [float(x) for x in np.random.default_rng(1).uniform(1, 2, 32)]
    losses[3], losses[20], norms[9] = 1e3, math.inf, 1e6
    assert outliers(replayed(losses, norms=norms)) == [120, 103, 109]
    assert outliers(replayed([1.0] * 32)) == []
    assert outliers(replayed([math.nan] * 32, norms=[math.nan] * 32)) == []


def test_outliers_may_be_the_most_of_a_window() -> None:
    """Losses before the window say what is usual; of too few of them nothing is said."""
    losses = [*calm()[:8], *[9.0] * 24]
    assert len(outliers(replayed(losses), calm(1))) == 24
    assert outliers(replayed(losses), calm(1)[:8]) == []


def test_agreement() -> None:
    """Zero only bit for bit; losses not told are passed over, and one not finite agrees with another."""
    ours = replayed([2.0, 1.0, math.nan])
    assert agreement(ours, [2.0, 1.0, math.nan]) == 0.0
    assert agreement(ours, [2.0, 1.25, math.nan]) == 0.2
    assert agreement(replayed([2.0, 1.0]), [2.0, math.nan]) == 0.0
    assert agreement(replayed([2.0, math.inf]), [2.0, 5.0]) == math.inf
    assert math.isnan(agreement(replayed([2.0]), [math.nan]))
