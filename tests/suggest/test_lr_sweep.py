"""The sweep: closed forms on quadratics, a real model, pairing, neutrality, processes, kills and what it refuses."""

from __future__ import annotations

import math
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NonFiniteError, RefusedError
from dyntune.objective.objective import Objective
from dyntune.pilot.twin import Training
from dyntune.records import Recommendation, Status
from dyntune.stability.thresholds import threshold
from dyntune.suggest.lr_sweep import sweep_lr
from dyntune.suggest.sweep_training import PairedTraining
from tests.suggest.problems import classification, mlp, same, snapshot
from tests.suggest.sweeps import CE, ONES, SMALL, Bowl, Deadly, own_loss, sweep_until_killed


def sweep(model: nn.Module | None = None, batches: Any = None, **options: Any) -> Recommendation:
    return sweep_lr(
        mlp() if model is None else model,
        classification(8) if batches is None else batches,
        **(SMALL | options),
    )


def paired(model: nn.Module, batches: Any, *, criterion: Any = CE, **options: Any) -> PairedTraining:
    settings: dict[str, Any] = {"num_steps": 40, "warmup_steps": 0, "schedule": "constant", "seed": 0} | options
    training = settings.pop("training", Training("sgd"))
    return PairedTraining(Objective(model, batches, criterion=criterion), None, criterion, training, **settings)


# -- one training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_is_the_users_own_loop(accumulate: int) -> None:
    """Bit for bit: order, warm-up, cosine, and the end judged on the first batches at the last steps."""
    batches = classification(12)
    training = paired(
        mlp(),
        batches,
        training=Training(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), accumulate=accumulate),
        schedule="cosine",
        warmup_steps=5,
    )
    result = training(0.05, 3)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = training.order(3)
    finals = []
    for step in range(40):
        done = (step - 5) / 35
        scale = (step + 1) / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = 0.05 * scale
        optimizer.zero_grad()
        for i in order[step * accumulate : (step + 1) * accumulate]:
            CE(model(batches[i][0]), batches[i][1]).backward()
        for p in model.parameters():
            p.grad /= accumulate  # type: ignore[operator]
        optimizer.step()
        if step + 1 in (38, 39, 40):
            with torch.no_grad():
                finals.append(np.mean([float(CE(model(x), y)) for x, y in batches[:8]]))
    assert result["loss"] == np.mean(finals)
    assert result["steps"] == 40
    assert result["cost"] == pytest.approx(40 * accumulate + 3 * 8 / 3, rel=1e-12)


def test_orders_are_permutations_that_differ_by_epoch_and_seed() -> None:
    training = paired(mlp(), classification(12))
    order = training.order(0)
    assert len(order) == 40
    assert all(sorted(order[start : start + 12]) == list(range(12)) for start in (0, 12, 24))
    assert order[:12] != order[12:24]
    assert order != training.order(1)


def test_pairing_makes_differences_between_rates_less_noisy() -> None:
    """Standard deviation of loss(rate) - loss(rate / sqrt 2) over 12 seeds: the same seed at both, or the next one."""
    training = paired(mlp(extras=True), classification(48, rows=8), num_steps=60)
    one, other = (np.array([training(rate, seed)["loss"] for seed in range(12)]) for rate in (0.1, 0.1 / math.sqrt(2)))
    assert np.std(one - other) < 0.5 * np.std(one - np.roll(other, 1))


def test_a_blow_up_stops_the_training() -> None:
    training = PairedTraining(
        Objective(Bowl((1.0,)), ONES, own_loss),
        own_loss,
        None,
        Training("sgd"),
        num_steps=40,
        warmup_steps=0,
        schedule="constant",
        seed=0,
    )
    # Two rows a step: four steps are a window. The factor is -2 a step, so losses are 1, 4, 16 times the initial one,
    # and 0 + 3 + 15 is beyond 4 + 1, which a last loss of zero would leave above 4.
    assert training.window == 4
    assert training(3.0, 0) == {"loss": math.inf, "steps": 3, "cost": 3.0}


def test_one_hard_batch_is_no_blow_up() -> None:
    """Nine batches of two rows want 1 and one wants -1: its loss rises from 1 to above 3 while the mean falls."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batches = [(torch.ones(2, 1), torch.full((2, 1), target)) for target in [1.0] * 9 + [-1.0]]
    result = paired(model, batches, criterion=nn.MSELoss(), num_steps=100)(0.05, 0)
    assert result["steps"] == 100
    assert result["loss"] < 0.1  # on the first eight batches


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
@pytest.mark.parametrize("factor", [math.sqrt(2), 1.1])
def test_the_onset_on_a_quadratic_is_the_stability_threshold(optimizer: str, factor: float) -> None:
    """The steepest direction begins at a hundredth of the others: at the edge heavy ball first multiplies it by 19.

    (Roots -1 and -0.9: 19 (-1)^n - 18 (-0.9)^n.) From 1 on, that transient alone would double the loss, a blow-up.
    """
    curvatures = (4.0, 1.0, 0.25)
    rec = sweep_lr(
        Bowl(curvatures, first=0.01),
        ONES,
        own_loss,
        optimizer=optimizer,
        num_steps=100,
        start=0.05,
        seeds=1,
        onset_factor=factor,
    )
    momentum = {"momentum": 0.9, "nesterov": True} if optimizer == "nesterov" else {"momentum": 0.9}
    made = torch.optim.SGD([torch.zeros(1)], lr=1.0, **({} if optimizer == "sgd" else momentum))  # type: ignore[arg-type]
    edge = float(threshold(made)) / max(curvatures)
    assert rec.max_stable is not None
    # Just above the edge 100 steps do not suffice to fail: at 1.03 SGD's mode has grown by 1.06^100 = 340, from 0.01.
    assert rec.max_stable.low <= edge * 1.03
    assert edge <= rec.max_stable.high
    assert rec.max_stable.high / rec.max_stable.low <= factor * (1 + 1e-9)
    assert rec.value is not None
    assert rec.value < edge


def test_the_best_rate_on_a_quadratic_is_that_of_the_formula() -> None:
    """Final loss 0.5 sum l (1 - lr l)^(2 T): computed for every rate, with the same tail."""
    curvatures, steps = (4.0, 1.0), 12
    rec = sweep_lr(Bowl(curvatures), ONES, own_loss, optimizer="sgd", num_steps=steps, start=0.05, seeds=1)

    def final(rate: float) -> float:
        ends = [12, round(12 * 0.975), round(12 * 0.95)]
        return float(np.mean([0.5 * sum(c * (1 - rate * c) ** (2 * n) for c in curvatures) for n in set(ends)]))

    rates = 2.0 ** np.linspace(-3, -1, 2001)
    best = min(rates, key=final)
    assert rec.evidence["best rate trained"] == min((2.0 ** (k / 2) for k in range(-8, 2)), key=final)
    assert rec.low <= best <= rec.high
    assert rec.value == pytest.approx(best, rel=0.25)  # the curve has a kink there, which a cubic rounds


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a hundred trainings
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_the_best_rate_of_a_real_model_beats_its_neighbours_on_fresh_orders(optimizer: str) -> None:
    batches = classification(24)
    rec = sweep(mlp(), batches, optimizer=optimizer, num_steps=60, start=None, seeds=3, schedule="cosine")
    assert rec.value is not None
    assert rec.max_stable is not None
    assert rec.low <= rec.value <= rec.high <= rec.max_stable.high
    fresh = paired(mlp(), batches, num_steps=60, warmup_steps=None, schedule="cosine", training=Training(optimizer))

    def mean(rate: float) -> float:
        return float(np.mean([fresh(rate, seed)["loss"] for seed in range(100, 108)]))

    at = mean(rec.value)
    assert at < fresh.initial
    assert at <= min(mean(rec.value / 4), mean(rec.value * 4))
    assert math.isinf(mean(rec.max_stable.high * 4)) or mean(rec.max_stable.high * 4) > (fresh.initial + at) / 2


def test_the_record_says_what_was_done_and_draws_itself() -> None:
    told: list[tuple[str, float, float | None]] = []
    rec = sweep(progress=lambda *stage: told.append(stage))
    assert rec.knob == "learning rate"
    assert rec.level == 0.95 or rec.status is not Status.OK
    assert rec.warmup_steps == 0
    assert rec.series["sweep_lr"] == tuple(sorted(rec.series["sweep_lr"]))
    assert math.inf in rec.series["sweep_loss"]  # the onset was passed
    assert "trainings of 30 steps on 8 batches" in rec.checks[-1]
    assert told[-1][1] == rec.cost
    assert [spent for _, spent, _ in told] == sorted(spent for _, spent, _ in told)
    assert told[-1][2] in rec.series["sweep_lr"]
    assert len(rec.plot().lines) > 0


def test_the_cost_counts_every_pass() -> None:
    calls = {True: 0, False: 0}

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[torch.is_grad_enabled()] += 1
            return self.inner(x)

    rec = sweep(Counting())
    # The check of the first batch builds a graph and takes no gradient: a third. Sums of a few thousand thirds.
    assert rec.cost == pytest.approx(calls[True] - 1 + (calls[False] + 1) / 3, rel=1e-9)


def test_the_users_warm_up_is_taken_and_adams_is_the_usual_one() -> None:
    assert paired(mlp(), classification(4), training=Training("adamw"), warmup_steps=None).warmup_steps == 4
    short = Training(lambda p: torch.optim.AdamW(p, betas=(0.9, 0.5)))
    assert paired(mlp(), classification(4), training=short, warmup_steps=None).warmup_steps == 4
    assert paired(mlp(), classification(4), training=short, warmup_steps=None, num_steps=400).warmup_steps == 4
    assert paired(mlp(), classification(4), warmup_steps=None).warmup_steps == 0
    assert sweep(optimizer="adamw", warmup_steps=7, start=1e-2).warmup_steps == 7


# -- neutrality, seeds -------------------------------------------------------------------------------------------------


def test_nothing_of_the_user_moves_and_the_seed_decides() -> None:
    model = mlp(extras=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = classification(8)
    CE(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    first = sweep(model, batches, optimizer=optimizer, start=1e-2, num_steps=20)
    assert same(before, snapshot(model, optimizer))
    again = sweep(model, batches, optimizer=optimizer, start=1e-2, num_steps=20)
    other = sweep(model, batches, optimizer=optimizer, start=1e-2, num_steps=20, seed=1)
    assert first == again
    assert first.series != other.series


def test_loss_times_four_divides_the_sgd_rate_by_four() -> None:
    """A power of two: every product rounds alike, and the grid has the quarter of each of its rates."""
    one = sweep()
    four = sweep(criterion=None, loss_fn=lambda m, b: 4 * CE(m(b[0]), b[1]), start=SMALL["start"] / 4)
    assert one.value is not None
    assert four.value == pytest.approx(one.value / 4, rel=1e-6)  # the fit's own rounding
    assert four.max_stable is not None
    assert one.max_stable is not None
    assert four.max_stable.low == one.max_stable.low / 4


# -- processes and kills -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_find_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    here = sweep(mlp(extras=True))
    there = sweep(mlp(extras=True), workers=2, storage=tmp_path / "journal.log")
    assert here == there


@pytest.mark.slow
def test_an_optimizer_with_state_goes_along_to_another_process() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    CE(model(classification(1)[0][0]), classification(1)[0][1]).backward()
    optimizer.step()
    here = sweep(model, optimizer=optimizer, start=1e-2)
    assert sweep(model, optimizer=optimizer, start=1e-2, workers=1) == here


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path, journal = tmp_path / "passes", tmp_path / "journal.log"
    whole = sweep(Deadly(tmp_path / "whole", None), storage=tmp_path / "other.log")
    passes = (tmp_path / "whole").stat().st_size
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=sweep_until_killed, args=(path, journal, passes // 2))
    process.start()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    path.unlink()
    resumed = sweep(Deadly(path, None), storage=journal)
    assert resumed == whole
    assert path.stat().st_size < 0.6 * passes  # half of it, and the training that was cut short


def test_recorded_trainings_of_other_parameters_or_settings_do_not_count(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    digests = {
        paired(mlp(), classification(8)).digest,
        paired(mlp(seed=1), classification(8)).digest,
        paired(mlp(), classification(8, seed=1)).digest,
        paired(mlp(), classification(8), num_steps=41).digest,
        paired(mlp(), classification(8), schedule="cosine").digest,
        paired(mlp(), classification(8), training=Training("momentum")).digest,
        paired(mlp(), classification(8), training=Training("sgd", clip_norm=1.0)).digest,
        paired(mlp().eval(), classification(8)).digest,
    }
    assert len(digests) == 8
    assert paired(mlp(), classification(8)).digest in digests


def test_what_cannot_be_sent_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(InvalidArgumentError, match=r"workers=2.*pass workers=0"):
        sweep(criterion=None, loss_fn=lambda m, b: CE(m(b[0]), b[1]), workers=2)


def test_an_optimizer_without_a_stability_threshold_is_swept_from_torchs_default() -> None:
    rec = sweep(optimizer=lambda p: torch.optim.Rprop(p), start=None, num_steps=20)
    assert rec.value is not None
    assert any("began at 1e-03, without a pilot" in check for check in rec.checks)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_steps": 9}, "num_steps=9"),
        ({"schedule": "wsd"}, "schedule='wsd'"),
        ({"warmup_steps": 30}, "warmup_steps=30"),
        ({"start": 0.0}, r"start=0\.0"),
        ({"seeds": 0}, "seeds=0"),
        ({"onset_factor": 1.0}, r"onset_factor=1\.0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"clip_norm": 0.0}, r"clip_norm=0\.0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        sweep(**options)


def test_a_batch_that_is_not_finite_is_named() -> None:
    batches = classification(8)
    batches[5][0][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="batch 5"):
        sweep(batches=batches)


def test_a_trained_model_is_refused_and_strict_raises() -> None:
    bowl = Bowl((1.0,))
    nn.init.zeros_(bowl.weights)
    options: dict[str, Any] = {"criterion": None, "loss_fn": own_loss, "num_steps": 10}
    rec = sweep(bowl, ONES, **options)
    assert rec.status is Status.REFUSED
    assert "no rate lowered the loss" in rec.reason
    with pytest.raises(RefusedError):
        sweep(bowl, ONES, strict=True, **options)


def test_a_loss_that_raises_far_out_is_a_failed_rate_and_said() -> None:
    def touchy(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = own_loss(model, batch)
        if float(loss.detach()) > 1.0:  # the initial one is 0.65, and twice that a blow-up
            raise ValueError("far out")
        return loss

    rec = sweep(Bowl((1.0, 0.3)), ONES, criterion=None, loss_fn=touchy, start=1.0)
    assert rec.status is Status.UNCERTAIN
    assert "ValueError: far out" in rec.reason
    assert rec.value is not None
    assert rec.value < 2.0


def test_one_batch_and_one_order_are_said() -> None:
    assert sweep(batches=classification(1, rows=64)).status in (Status.ONE_BATCH, Status.UNCERTAIN)
    one = sweep(seeds=1)
    assert one.status is Status.UNCERTAIN
    assert "seeds" in one.reason
