"""suggest_schedule: what every step's rate is, against closed forms, torch's own schedulers and real training."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import json
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR, StepLR

import dyntune
from dyntune import Schedule, Status
from dyntune.demo.data import english
from dyntune.demo.model import CharTransformer, loss_fn
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from tests.plots.records import recommendation
from tests.suggest.problems import classification, mlp, same, snapshot

EPS = 2.0**-52
PEAK = 3e-3
SHAPES = ("constant", "linear", "cosine", "wsd")
CE = nn.CrossEntropyLoss()
SUBJECT = {"model", "batches", "loss_fn"}


def of(**options: Any) -> Schedule:
    """At a recommendation by hand: peak 3e-3, 20 steps of warm-up."""
    lr = options.pop("lr", None) or recommendation(**options.pop("changed", {}))
    return Schedule.of(lr, **({"num_steps": 200} | options))


def refused() -> dyntune.Recommendation:
    return recommendation(
        value=None,
        low=0.0,
        high=math.inf,
        status=Status.REFUSED,
        reason="all blew up",
        max_stable=None,
        warmup_steps=None,
    )


def sgd(*rates: float | torch.Tensor) -> torch.optim.SGD:
    """One parameter per group, with a gradient, so that it can step."""
    groups = []
    for rate in rates:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.zeros(2)
        groups.append({"params": [p], "lr": rate})
    return torch.optim.SGD(groups)


def driven(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int, *, group: int = 0) -> list[float]:
    """The rate with which each of the next optimizer steps is made."""
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.optimizer.param_groups[group]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


# -- the rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("num_steps", [8, 9, 100, 1001])
@pytest.mark.parametrize(
    ("shape", "final"), [("constant", None), *itertools.product(SHAPES[1:], [None, 0.1, 1 / 3, 1.0])]
)
def test_first_rate_peak_last_rate_and_range(shape: Any, warmup: int, num_steps: int, final: float | None) -> None:
    s = of(num_steps=num_steps, schedule=shape, warmup_steps=warmup, final=final)
    factors = [s.factor(t) for t in range(num_steps)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] == 1 / (warmup + 1)
    assert factors.index(1.0) == warmup  # the first at the peak
    assert all(a < b for a, b in itertools.pairwise(factors[: warmup + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[warmup:]))
    assert s.factor(num_steps) == s.factor(10 * num_steps) == s.final
    if s.final < 1:  # one short of the end: not spent at zero
        assert s.final < factors[-1]
    assert [s.rate(t) for t in range(num_steps)] == [PEAK * f for f in factors]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_forms(shape: Any) -> None:
    """W = 20, N = 200, final 0.1, step 65: a quarter of the way down; "wsd" is half-way down at step 180."""
    s = of(schedule=shape, final=None if shape == "constant" else 0.1)
    at = {
        "constant": (65, 1.0),
        "linear": (65, 0.775),
        "cosine": (65, 0.1 + 0.45 * (1 + math.sqrt(0.5))),
        "wsd": (180, 0.55),
    }
    step, expected = at[shape]
    assert s.factor(step) == pytest.approx(expected, rel=4 * EPS)  # four roundings
    assert s.factor(9) == pytest.approx(10 / 21, rel=EPS)


def test_wsd_is_stable_until_its_last_fifth() -> None:
    s = of(schedule="wsd")
    assert s.decay_steps == 40
    assert [t for t in range(200) if s.factor(t) == 1] == list(range(20, 161))
    assert s.factor(199) == pytest.approx(1 / 40, rel=40 * EPS)  # 1 - 39/40 cancels
    assert of(schedule="wsd", decay_steps=20).factor(190) == pytest.approx(0.5, rel=EPS)


def test_wsd_without_room_for_a_stable_phase_is_linear() -> None:
    wsd, linear = (of(num_steps=24, schedule=shape) for shape in ("wsd", "linear"))
    assert wsd.decay_steps == 4
    assert [wsd.factor(t) for t in range(30)] == [linear.factor(t) for t in range(30)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_does_not_depend_on_the_scale_of_the_peak_or_of_time(shape: Any) -> None:
    """Four times the peak is four times every rate; a decay twice as long takes twice as long to every factor."""
    one, four = of(schedule=shape), of(schedule=shape, changed={"value": 4 * PEAK, "high": 1.0})
    assert [four.rate(t) for t in range(200)] == [4 * one.rate(t) for t in range(200)]
    short, long = (of(schedule=shape, num_steps=n, warmup_steps=0) for n in (100, 200))
    assert [short.factor(t) for t in range(100)] == [long.factor(2 * t) for t in range(100)]


def reference(optimizer: torch.optim.Optimizer, s: Schedule) -> SequentialLR:
    """The same schedule of torch's own parts."""
    warmup = LinearLR(optimizer, start_factor=1 / (s.warmup_steps + 1), total_iters=s.warmup_steps)
    parts: list[Any] = [warmup]
    marks = [s.warmup_steps]
    if s.shape in ("constant", "wsd"):
        parts.append(ConstantLR(optimizer, factor=1.0, total_iters=0))
    if s.shape == "wsd":
        marks.append(s.num_steps - s.decay_steps)
    if s.shape == "cosine":
        parts.append(CosineAnnealingLR(optimizer, T_max=s.decay_steps, eta_min=PEAK * s.final))
    elif s.shape != "constant":
        parts.append(LinearLR(optimizer, start_factor=1.0, end_factor=s.final, total_iters=s.decay_steps))
    return SequentialLR(optimizer, parts, milestones=marks)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [None, 0.1])
def test_equals_torchs_own_schedulers(shape: Any, final: float | None) -> None:
    final = None if shape == "constant" else final
    s = of(schedule=shape, final=final)
    torchs = driven(reference(sgd(PEAK), s), s.num_steps + 1)
    ours = driven(s.scheduler(sgd(PEAK)), s.num_steps + 1)
    # torch multiplies from step to step: two roundings of a number below the peak at each of them, which add up.
    assert ours == pytest.approx(torchs, rel=0, abs=2 * s.num_steps * EPS * PEAK)


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_peak_warm_up_status_and_reason_are_the_recommendations() -> None:
    lr = recommendation(status=Status.ONE_BATCH, reason="one batch")
    s = of(lr=lr)
    assert (s.lr, s.peak, s.warmup_steps, s.status, s.reason) == (lr, PEAK, 20, Status.ONE_BATCH, "one batch")


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (2, 1), (10, 1), (20, 2), (21, 20), (22, 20)])
def test_a_training_shorter_than_the_warm_up_is_said(num_steps: int, warmup: int) -> None:
    s = of(num_steps=num_steps)
    assert s.warmup_steps == warmup
    assert max(s.rate(t) for t in range(num_steps)) == PEAK
    if num_steps > 20:
        assert (s.status, s.reason) == (Status.OK, "")
    else:
        assert s.status is Status.UNCERTAIN
        assert f"num_steps={num_steps} does not outlast" in s.reason
        worse = of(num_steps=num_steps, changed={"status": Status.ONE_BATCH, "reason": "one"})
        assert worse.status is Status.ONE_BATCH
        assert worse.reason.startswith("one; num_steps=")


def test_a_bare_number_is_a_peak_without_evidence() -> None:
    s = Schedule.of(0.5, num_steps=10)
    assert (s.peak, s.warmup_steps, s.status) == (0.5, 0, Status.UNCERTAIN)
    assert "nothing was measured" in str(s)
    assert Schedule.of(0.5, num_steps=10, warmup_steps=3).rate(0) == 0.125


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 10.5}, "num_steps=10.5"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"final": -0.1}, "final=-0.1"),
        ({"final": 1.1}, "final=1.1"),
        ({"final": math.nan}, "final=nan"),
        ({"final": 0.1, "schedule": "constant"}, "does not decay"),
        ({"warmup_steps": 200}, "warmup_steps=200"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay_steps": 10}, "only 'wsd'"),
        ({"decay_steps": 0, "schedule": "wsd"}, "decay_steps=0"),
        ({"decay_steps": 181, "schedule": "wsd"}, "decay_steps=181"),
        ({"lr": 0.0}, "peak=0.0"),
        ({"lr": math.nan}, "peak=nan"),
        ({"lr": math.inf}, "peak=inf"),
        ({"changed": {"knob": "beta2"}}, "beta2"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], fragment: str) -> None:
    if "lr" in options:
        with pytest.raises(InvalidArgumentError, match=re.escape(fragment)):
            Schedule.of(options["lr"], num_steps=200)
        return
    with pytest.raises(InvalidArgumentError, match=re.escape(fragment)):
        of(**options)


def test_a_record_cannot_be_replaced_by_one_that_contradicts_itself() -> None:
    s = of()
    for changed in (
        {"decay_steps": 100},
        {"warmup_steps": 30},
        {"shape": "constant"},
        {"final": 2.0},
        {"num_steps": 20},
    ):
        with pytest.raises(InvalidArgumentError):
            dataclasses.replace(s, **changed)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="step=-1"):
        s.factor(-1)


def test_a_refused_rate_is_a_refused_schedule() -> None:
    s = of(lr=refused())
    optimizer = sgd(0.7)
    assert s.status is Status.REFUSED
    assert s.peak is None
    assert "refused. all blew up" in str(s)
    assert "all blew up" in s.explain()
    assert s.to_dict()["peak"] is None
    for use in (lambda: s.scheduler(optimizer), lambda: s.rate(0), s.require):
        with pytest.raises(RefusedError, match="all blew up") as caught:
            use()
        assert caught.value.partial is s
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert "initial_lr" not in optimizer.param_groups[0]


def test_require() -> None:
    s = of()
    assert s.require() is s
    with pytest.raises(NotConvergedError, match="does not outlast") as caught:
        of(num_steps=5).require()
    assert isinstance(caught.value.partial, Schedule)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_words_numbers_and_sources() -> None:
    assert str(of()) == "up to 3e-3 after 20 steps of warm-up, cosine to 0 over 200 steps"
    assert str(of(schedule="constant", warmup_steps=0)) == "up to 3e-3, constant for 200 steps"
    wsd = of(schedule="wsd", final=0.1)
    assert str(wsd).endswith("stable, linear to 0.1 of it in the last 40 of 200 steps")
    assert str(of(num_steps=5)).endswith("not tried]")
    text = wsd.explain()
    for step in (0, 20, 160, 199):
        assert re.search(rf"^step {step} \(.*\): {dyntune.records.short_number(wsd.rate(step))}$", text, re.MULTILINE)
    assert "2405.18392" in text
    assert "1706.02677" in text
    assert text.endswith(wsd.lr.explain())
    assert "1706.02677" not in of(warmup_steps=0).explain()


def test_json_and_html() -> None:
    s = of(schedule="wsd")
    data = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert data.pop("lr") == s.lr.to_dict()
    assert data == {
        "peak": PEAK,
        "num_steps": 200,
        "warmup_steps": 20,
        "decay_steps": 40,
        "shape": "wsd",
        "final": 0.0,
        "status": "OK",
        "reason": "",
    }
    again = Schedule.of(
        data["peak"],
        **{key: data[key] for key in ("num_steps", "warmup_steps", "decay_steps", "final")},
        schedule="wsd",
    )
    assert [again.rate(t) for t in range(200)] == [s.rate(t) for t in range(200)]
    hostile = of(changed={"status": Status.UNCERTAIN, "reason": "<script>"})
    assert "<script>" not in hostile._repr_html_()
    assert pickle.loads(pickle.dumps(s)) == s


# -- the scheduler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_has_exactly_its_rate(shape: Any) -> None:
    s = of(schedule=shape)
    assert driven(s.scheduler(sgd(123.0)), 220) == [s.rate(t) for t in range(220)]


def test_ratios_between_groups_are_kept() -> None:
    s = of()
    optimizer = sgd(0.1, 0.01, 0.4)
    scheduler = s.scheduler(optimizer)
    for t in range(200):
        first, second, third = (group["lr"] for group in optimizer.param_groups)
        assert first == s.rate(t)
        # The ratio of two rounded numbers, times the rate: three roundings.
        assert second == pytest.approx(0.1 * first, rel=3 * EPS)
        assert third == pytest.approx(4 * first, rel=3 * EPS)
        optimizer.step()
        scheduler.step()


def test_a_group_that_is_not_trained_stays_so() -> None:
    optimizer = sgd(0.1, 0.0)
    assert set(driven(of().scheduler(optimizer), 50, group=1)) == {0.0}


def test_ratios_to_a_first_group_without_a_rate_are_refused() -> None:
    optimizer = sgd(0.0, 0.1)
    with pytest.raises(InvalidArgumentError, match=re.escape("lr=[0.0, 0.1]")):
        of().scheduler(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert driven(of().scheduler(sgd(0.0)), 1) == [of().rate(0)]  # a single group needs no ratio


def test_a_rate_held_as_a_tensor_is_filled_in_place() -> None:
    """What a captured graph or compiled step reads is the tensor that the optimizer was built with."""
    s = of()
    rates = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)]
    optimizer = sgd(*rates)
    held = [group["lr"] for group in optimizer.param_groups]
    scheduler = s.scheduler(optimizer)
    assert driven(scheduler, 210) == [s.rate(t) for t in range(210)]
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, held, strict=True))
    assert float(held[1]) == 0.5 * float(held[0])


def test_a_capturable_adam_keeps_its_tensor() -> None:
    s, lr = of(), torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=lr, capturable=True)  # steps on a GPU only
    s.scheduler(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.dtype == torch.float32
    assert float(lr) == float(torch.tensor(s.rate(0)))  # rounded once


def test_fused_adamw_with_a_tensor_makes_the_steps_that_a_number_makes() -> None:
    s = of(num_steps=30)
    ends = []
    for lr in (1.0, torch.tensor(1.0)):
        p = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([p], lr=lr, fused=True)
        scheduler = s.scheduler(optimizer)
        for _ in range(30):
            p.grad = p.detach() - 3
            optimizer.step()
            scheduler.step()
        ends.append(p.detach())
    # A float32 rate is off by 2^-24 of itself; 30 steps move by at most 30 times the peak.
    torch.testing.assert_close(*ends, rtol=0, atol=30 * PEAK * 2**-24 + 30 * 2**-23)


def test_an_earlier_scheduler_is_taken_over_with_the_ratios_of_its_peaks() -> None:
    """In mid-warm-up from zero the present rates have no ratio; those at its start have."""
    s = of()
    optimizer = sgd(0.1, 0.01)
    LambdaLR(optimizer, lambda t: t / 100)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    scheduler = s.scheduler(optimizer)
    assert scheduler.base_lrs == [PEAK, pytest.approx(0.1 * PEAK, rel=3 * EPS)]
    assert driven(scheduler, 200) == [s.rate(t) for t in range(200)]
    # One that lowered one group only: its peaks count, not where it was.
    stepped = sgd(0.1, 0.01)
    LambdaLR(stepped, [lambda t: 1.0, lambda t: 0.5])
    assert s.scheduler(stepped).base_lrs[1] == pytest.approx(0.1 * PEAK, rel=3 * EPS)


def test_two_schedulers_made_in_turn_agree() -> None:
    optimizer = sgd(0.1, 0.01)
    first = of().scheduler(optimizer)
    driven(first, 30)
    rates = driven(of(schedule="linear").scheduler(optimizer), 200, group=1)
    assert rates == driven(of(schedule="linear").scheduler(sgd(0.1, 0.01)), 200, group=1)


@pytest.mark.parametrize("steps", [1, 20, 21, 199, 200])
def test_resuming_from_saved_states(steps: int) -> None:
    s = of(final=0.1)
    optimizer = sgd(0.1, 0.01)
    scheduler = s.scheduler(optimizer)
    driven(scheduler, steps)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    rest = [driven(scheduler, 1)[0] for _ in range(210 - steps)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain types only
    fresh = sgd(1.0, 1.0)
    resumed = s.scheduler(fresh)
    fresh.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    assert resumed.last_epoch == steps
    assert driven(resumed, 210 - steps) == rest == [s.rate(t) for t in range(steps, 210)]
    assert fresh.param_groups[1]["initial_lr"] == pytest.approx(0.1 * PEAK, rel=3 * EPS)


@pytest.mark.parametrize("done", [0, 1, 20, 150, 200])
def test_going_on_without_a_saved_scheduler(done: int) -> None:
    s = of()
    optimizer = sgd(0.1, 0.01)
    driven(s.scheduler(optimizer), done)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = sgd(1.0, 1.0)
    fresh.load_state_dict(state)  # brings initial_lr, and with it the ratios
    scheduler = s.scheduler(fresh, done=done)
    assert fresh.param_groups[1]["lr"] == optimizer.param_groups[1]["lr"]
    assert driven(scheduler, 10) == [s.rate(t) for t in range(done, done + 10)]


def test_scheduler_rejects_what_it_cannot_drive() -> None:
    with pytest.raises(InvalidArgumentError, match="list"):
        of().scheduler([nn.Parameter(torch.ones(1))])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="done=-1"):
        of().scheduler(sgd(0.1), done=-1)


def test_goes_together_with_torchs_other_schedulers() -> None:
    """Chained, as torch's schedulers may be: ours sets the rate, another one multiplies it."""
    s = of(schedule="constant", warmup_steps=0)
    optimizer = sgd(0.1)
    scheduler = s.scheduler(optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    after = StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    after.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * PEAK
    assert pickle.loads(pickle.dumps(scheduler.state_dict()))["last_epoch"] == 1


# -- measured ---------------------------------------------------------------------------------------------------------


def suggest(model: nn.Module, batches: Any = None, **options: Any) -> Schedule:
    options = {"criterion": CE, "max_gradients": 60, "num_steps": 300} | options
    return dyntune.suggest_schedule(model, classification() if batches is None else batches, **options)


def test_it_is_suggest_lr_and_the_rule() -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "num_steps": 300, "seed": 3, "clip_norm": 1.0, "max_gradients": 100}
    found = suggest(mlp(extras=True), schedule="wsd", final=0.1, **options)
    lr = dyntune.suggest_lr(mlp(extras=True), classification(), criterion=CE, schedule="wsd", **options)
    assert found.lr.to_dict() == lr.to_dict()
    assert found.to_dict() == Schedule.of(lr, num_steps=300, schedule="wsd", final=0.1).to_dict()
    assert any("wsd" in check for check in found.lr.checks)


def test_every_argument_reaches_suggest_lr(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(*args: Any, **options: Any) -> dyntune.Recommendation:
        seen.append((args, options))
        return recommendation()

    monkeypatch.setattr("dyntune.suggest.schedule.suggest_lr", spy)
    model, batches = mlp(), classification(2)
    options = {
        "criterion": CE,
        "optimizer": "momentum",
        "num_steps": 50,
        "schedule": "linear",
        "clip_norm": 0.5,
        "accumulate": 2,
        "autocast": torch.bfloat16,
        "method": "forward",
        "max_gradients": 123,
        "workers": 2,
        "storage": "journal",
        "seed": 4,
        "progress": lambda *_: None,
    }
    assert dyntune.suggest_schedule(model, batches, loss_fn, **options, final=0.1) == of(  # type: ignore[arg-type]
        num_steps=50, schedule="linear", final=0.1
    )
    # strict is left to the schedule, whose status can be worse than the rate's.
    assert seen == [((model, batches, loss_fn), options)]
    assert options.keys() | {"strict"} == inspect.signature(dyntune.suggest_lr).parameters.keys() - SUBJECT


def test_nothing_of_the_user_moves_until_the_scheduler_is_made() -> None:
    model = mlp(extras=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = snapshot(model, optimizer)
    found = suggest(model, optimizer=optimizer)
    found.explain(), found.to_dict(), found.rate(0)
    assert same(before, snapshot(model, optimizer))
    found.scheduler(optimizer)
    assert optimizer.param_groups[0]["lr"] == found.rate(0)


def test_an_optimizer_whose_ratios_an_earlier_schedule_changed_is_refused_before_anything_is_measured() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError("measured")

    model = mlp()
    body, head = list(model[0].parameters()), list(model[2].parameters())
    optimizer = torch.optim.SGD([{"params": body, "lr": 1.0}, {"params": head, "lr": 0.25}])
    earlier = LambdaLR(optimizer, [lambda t: 0.0 if t == 0 else 1 / 3] * 2)  # present rates [0, 0]: no ratio
    with pytest.raises(InvalidArgumentError, match="initial_lr"):
        suggest(model, optimizer=optimizer, criterion=None, loss_fn=loss_fn)
    optimizer.step()
    earlier.step()  # a third of both: the ratio is there again
    found = suggest(model, optimizer=optimizer)
    assert found.scheduler(optimizer).base_lrs == [found.peak, 0.25 * found.rate(found.warmup_steps)]
    unknown = torch.optim.SGD([{"params": body, "lr": 0.0}, {"params": head, "lr": 0.25}])
    with pytest.raises(InvalidArgumentError, match="not defined"):
        suggest(model, optimizer=unknown, criterion=None, loss_fn=loss_fn)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"schedule": "step"}, {"final": 2.0}], ids=str)
def test_bad_arguments_are_found_before_anything_is_measured(options: dict[str, Any]) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError("measured")

    with pytest.raises(InvalidArgumentError):
        suggest(mlp(), criterion=None, loss_fn=loss_fn, **options)


def test_strict_and_refused() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    options: dict[str, Any] = {"criterion": None, "loss_fn": lambda m, b: (m(b[0]) ** 2).mean() + 1.0}
    found = suggest(model, [(torch.eye(3),)] * 4, **options)
    assert found.status is Status.REFUSED
    with pytest.raises(RefusedError):
        found.scheduler(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RefusedError) as caught:
        suggest(model, [(torch.eye(3),)] * 4, strict=True, **options)
    assert isinstance(caught.value.partial, Schedule)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, s: Schedule, batches: Any, loss: Any) -> list[float]:
    """As a user does; checks every step's rate on the way."""
    scheduler = s.scheduler(optimizer)
    losses = []
    for step in range(s.num_steps):
        assert optimizer.param_groups[0]["lr"] == s.rate(step)
        value = loss(model, batches[step % len(batches)])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(value.detach()))
    return losses


def check(losses: list[float]) -> None:
    """Not a blow-up (twice the initial loss at any step), and better than it was."""
    assert all(math.isfinite(x) for x in losses)
    assert max(losses) < 2 * losses[0]
    assert sum(losses[-20:]) / 20 < 0.8 * losses[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_model_trains_under_it(shape: Any) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    batches = classification(64)
    s = suggest(model, batches, optimizer=optimizer, num_steps=150, schedule=shape, max_gradients=200)
    check(train(model, optimizer, s, batches, lambda m, b: CE(m(b[0]), b[1])))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_the_demos_transformer_trains_under_it(name: str) -> None:
    text = english()
    batches = text.batches(text.train, 300, size=16, length=32, seed=1)
    model = CharTransformer(len(text.characters), width=32, length=32)
    s = dyntune.suggest_schedule(model, batches, loss_fn, optimizer=name, num_steps=300)
    kinds: dict[str, Any] = {"momentum": lambda p: torch.optim.SGD(p, momentum=0.9), "adamw": torch.optim.AdamW}
    check(train(model, kinds[name](model.parameters()), s, batches, loss_fn))
