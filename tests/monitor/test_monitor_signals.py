"""What the monitor says is so: against closed forms, and where training is stable, at the edge, or lost."""

from __future__ import annotations

import gc
import math
import tracemalloc
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.monitor.budget import DISTURBING, Budget
from tests.monitor.training import Training, Unlimited


class Bowl(nn.Module):
    """``sum h_i w_i^2 / 2`` plus, by the batch, ``w . noise``: all is known."""

    def __init__(self, curvatures: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())
        self.register_buffer("h", curvatures)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.h * self.w.square()).sum() + (noise @ self.w).mean()


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def watched(
    curvatures: Any,
    optimizer: Any,
    *,
    noise: float = 0.0,
    steps: int = 200,
    rows: int = 8,
    start: float = 1.0,
    **more: Any,
) -> dyntune.Monitor:
    """Train a bowl."""
    h = torch.as_tensor(curvatures, dtype=torch.float64)
    model = Bowl(h, torch.full_like(h, start))
    opt = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(0)
    batches = [noise * torch.randn(rows, len(h), generator=generator, dtype=torch.float64) for _ in range(steps)]
    monitor = dyntune.Monitor(model, opt, loss_fn, overhead=0.9, on_error="raise", **more)
    monitor._session.budget = Unlimited(0.9)
    with monitor:
        for batch in monitor.watch(batches):
            loss = model(batch)
            opt.zero_grad()
            loss.backward()
            opt.step()
            monitor.observe(loss)
    return monitor


def regimes(monitor: dyntune.Monitor) -> list[str]:
    return [row.labels["regime"] for row in monitor.run.rows if row.labels]


def sgd(lr: float) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr)


def test_curvature_is_that_of_the_bowl():
    monitor = watched([3.0, 1.0, 0.5], sgd(0.1))
    run = monitor.run
    assert run.series("curvature/lambda_max")[1] == pytest.approx(3.0, rel=1e-2)  # what a proof is to
    assert run.limit("curvature/lambda_max") == pytest.approx(20.0)
    assert run.series("stability/lr_ratio")[1] == pytest.approx(0.15, rel=1e-2)
    assert run.series("curvature/lr_crit")[1] == pytest.approx(2 / 3, rel=1e-2)
    h = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    # the gradient at the start, where the first loss is 9/4
    assert run["train/loss"][0] == pytest.approx(2.25)
    step, norms = run.series("grad/norm")
    decay = [h * (1 - 0.1 * h) ** int(t) for t in step]
    assert norms == pytest.approx([float(g.norm()) for g in decay], rel=1e-6)


def test_the_ratio_counts_coupled_weight_decay():
    monitor = watched([3.0, 1.0, 0.5], lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=2.0))
    assert monitor.run.series("stability/lr_ratio")[1] == pytest.approx(0.1 * (3 + 2) / 2, rel=1e-2)
    assert monitor.run.limit("curvature/lambda_max") == pytest.approx(20.0 - 2.0)


def test_the_cosine_with_the_moment_is_that_of_before_the_step():
    """Noise alone: 0 with the moment of before the step, and 0.44 with that of after it."""
    monitor = watched([1e-9] * 2000, lambda p: torch.optim.Adam(p, lr=1e-6), noise=1.0, steps=250)
    cosines = monitor.run.series("grad/cos_moment")[1]
    assert cosines.size >= 50
    assert abs(cosines.mean()) < 0.02  # 1 / sqrt(2000) for one of them
    assert monitor.run.series("grad/autocorr_raw_lag1")[1][-1] == pytest.approx(0.0, abs=0.05)


def test_the_noise_scale_is_that_of_the_batches():
    """G = h w stays at length 1 (lr 0), and rows have noise of variance 4 in 400 directions."""
    model = [1 / 20.0] * 400
    monitor = watched(model, sgd(0.0), noise=0.2, steps=250, rows=8)
    truth = 400 * 0.2**2 / 1.0
    estimate = monitor.run.series("grad/noise_scale")[1][-1]
    assert estimate == pytest.approx(truth, rel=0.15)  # some 100 steps of noise over signal 2
    raw = monitor.run.series("grad/autocorr_raw_lag1")[1][-1]
    assert raw == pytest.approx(1 / (1 + truth / 8), abs=0.1)
    assert monitor.run.series("grad/autocorr_lag1")[1][-1] == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 1.5, 1.9])
def test_stable_noisy_training_is_not_called_unstable(ratio):
    """Lag 1 is negative there, for ratios above 1 strongly so."""
    monitor = watched([1.0], sgd(ratio), noise=1.0, steps=300)
    assert not {"edge", "diverging"} & set(regimes(monitor))
    # The square of one noisy parameter is as good as nothing now and then, and what comes after that is called a jump.
    assert [alert for alert in monitor.alerts if alert.kind != "loss-spike"] == []
    assert [alert for alert in monitor.alerts if alert.severity == "critical"] == []
    if ratio >= 0.5:  # -ratio / 2 for noise alone; of 0.05, a few hundred steps see nothing
        assert monitor.run.series("grad/autocorr_raw_lag1")[1][-1] < 0


def test_the_true_edge_is_called_that():
    monitor = watched([1.0], sgd(2.0), steps=200)
    assert regimes(monitor)[-1] == "edge"
    assert monitor.alerts == []  # which is no alarm


def test_divergence_is_called_that():
    monitor = watched([1.0], sgd(2.05), steps=200)
    assert regimes(monitor)[-1] == "diverging"
    assert [alert.kind for alert in monitor.alerts] == ["diverging"]
    assert monitor.alerts[0].severity == "critical"


def test_full_batch_descent_reaches_the_edge_and_is_no_alarm():
    """A network whose sharpness rises to 2 / lr and stays there: Cohen et al. (2021)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    x = torch.randn(40, 4)
    batch = (x, torch.sin(3 * x[:, :1]) * x[:, 1:2])
    opt = torch.optim.SGD(model.parameters(), lr=0.25)
    monitor = dyntune.Monitor(model, opt, criterion=nn.MSELoss(), overhead=0.9, on_error="raise")
    monitor._session.budget = Sparing(0.9)
    with monitor:
        for features, targets in monitor.watch([batch] * 1500):
            loss = nn.functional.mse_loss(model(features), targets)
            opt.zero_grad()
            loss.backward()
            opt.step()
            monitor.observe(loss)
    steps, ratios = monitor.run.series("stability/lr_ratio")
    assert ratios[steps > 1000].mean() == pytest.approx(1.0, abs=0.1)
    assert "diverging" not in regimes(monitor)
    assert monitor.alerts == []


class Sparing(Unlimited):
    """Everything in turn, every twenty steps."""

    interval = 20


def test_what_the_model_is_blind_to_is_recorded():
    training = Training(steps=20)
    with training.monitored(criterion=None) as monitor:
        training.loop()
    blind = {e.detail["signal"]: e.detail["reason"] for e in monitor.run.events if e.name == "blind"}
    assert "no batch is known" in blind["curvature"]
    assert "no gradient scaler" in blind["train/skipped"]


def test_an_ambiguous_loss_makes_curvature_blind_without_an_error():
    training = Training(steps=30)
    with training.monitored(criterion=None, on_error="warn") as monitor:
        loader = [(x, y, x) for x, y in training.batches[:30]]
        for i, batch in enumerate(monitor.watch(loader)):
            training._batch(i, batch[:2], monitor)
    blind = {e.detail["signal"]: e.detail["reason"] for e in monitor.run.events if e.name == "blind"}
    assert "Say which loss is minimised" in blind["curvature"]
    assert monitor.run.series("monitor/errors")[1][-1] == 0


def test_measure_is_proven_and_recorded():
    training = Training(steps=30)
    with training.monitored() as monitor:
        training.loop(monitor)
        found = monitor.measure("largest", "batch", "blocks")
        with pytest.raises(dyntune.errors.InvalidArgumentError, match="choose from"):
            monitor.measure("everything")
    x, y = monitor._measuring.curves._batches[0]
    kept = dyntune.eigenvalues(
        dyntune.preconditioned(dyntune.hessian(training.model, (x, y), criterion=nn.CrossEntropyLoss()), training.opt)
    )
    assert float(found["curvature/lambda_max_preconditioned"]) == pytest.approx(float(kept), rel=0.02)
    blocks = {name for name in found if name.startswith("curvature/block/")}
    assert len(blocks) == len(list(training.model.parameters()))
    assert monitor.run.series("curvature/block/0.weight")[0].tolist() == [29]


def spending(bare: float, hooks: float, burst: float, steps: int = 20_000) -> Budget:
    """A training of steps of `bare` seconds by a clock of its own."""
    budget, now = Budget(0.02), 0.0
    for step in range(steps):
        budget.step_begins(now)
        budget.book("hooks", hooks)
        now += bare + hooks
        if step % 16 == 0 and budget.affords("burst", share=1.0):
            budget.book("burst", burst)
            budget.cost("burst", burst)
            now += burst
    return budget


@pytest.mark.parametrize(("bare", "share"), [(1e-3, 0.05), (3e-3, 0.02), (0.1, 0.02)])
def test_the_budget_is_kept_and_used(bare, share):
    budget = spending(bare, hooks=1e-5, burst=4 * bare)
    # A measurement is taken to cost so many times what its clock says; the first one may be owed.
    taken = (budget.kinds["hooks"] + DISTURBING * budget.kinds["burst"]) / budget.training
    # A tenth is kept back, and another may be unused.
    assert 0.8 * share <= taken <= share + DISTURBING * 4 * bare / budget.training
    assert budget.share <= share


def test_a_burst_that_is_never_affordable_is_made_once():
    budget = spending(1e-3, hooks=1e-4, burst=1e-2)  # hooks alone are above the budget
    assert budget.kinds["burst"] == 1e-2
    assert budget.period("burst", share=1.0) == math.inf


def test_nothing_beyond_the_first_without_a_budget():
    budget = Budget(0.0)
    for step in range(1000):
        budget.step_begins(0.01 * step)
        if budget.affords("burst", share=1.0):
            budget.book("burst", 1e-6)
            budget.cost("burst", 1e-6)
    assert budget.kinds["burst"] == 1e-6


@pytest.mark.slow
def test_memory_is_flat():
    """Columns apart: 12 bytes per number."""
    training = Training(steps=2000)
    with training.monitored() as monitor:
        monitor._session.budget = Sparing(0.9)
        training.loop(monitor)
        gc.collect()
        tracemalloc.start()
        training.loop(monitor)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        rows = len(monitor.run)
        training.losses.clear()
        training.loop(monitor, 6000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        more = len(monitor.run) - rows
    tensors = len([obj for obj in gc.get_objects() if issubclass(type(obj), torch.Tensor)])
    assert tensors < 2000
    # Losses of the test (32 bytes each), and per row a handful of numbers of 12 bytes with spare room.
    assert grown < 6000 * 40 + more * 60 * 12


def test_a_loss_above_all_others_is_looked_at_at_once():
    """Decisions, and with them detectors, come every 64 steps here; a jump is seen within a few."""
    seen: list[tuple[int, int]] = []

    class Sees:
        def update(self, rows: Any) -> Any:
            seen.extend((int(step), now) for step in rows.steps)
            return ()

    model = nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = dyntune.Monitor(model, opt, overhead=0.0, detectors=[Sees()], on_error="raise")
    jump = 999
    for now in range(1100):
        opt.zero_grad()
        model(torch.ones(3, 2)).sum().backward()
        opt.step()
        monitor.observe(1.0 + 0.1 * (now % 7) + 9.0 * (now >= jump))
    monitor.close()
    waited = {step: at - step for step, at in seen}
    assert waited[jump] <= 8
    assert max(waited[step] for step in range(200, jump - 64)) > 16
