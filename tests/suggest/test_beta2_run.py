"""What a beta2 from a record says, on records made by hand and on one of a real training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import dyntune
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.run import Column, Row, Run
from dyntune.records import Estimate, Recommendation, Status
from dyntune.suggest.beta2_rule import Beta2Evidence, beta2_rule, half_life_beta2, path_beta2
from dyntune.suggest.beta2_run import LEAD, suggest_beta2_from_run
from tests.monitor.training import Training

ADAM = {"optimizer/beta1": 0.9, "optimizer/beta2": 0.999}
SHARE = "share of tensors above 2.3"


def settings(step: int = 0, labels: dict[str, str] | None = None, **values: float | None) -> Row:
    named = {f"optimizer/{name.replace('_', '/')}": value for name, value in values.items()}
    return Row(step=step, values=named or ADAM, labels=labels or {})


def look(step: int, **staleness: float) -> Row:
    return Row(step=step, values={f"adam/staleness/{name}": value for name, value in staleness.items()})


def read(*rows: Row, **options: Any) -> Recommendation:
    return suggest_beta2_from_run(Run(rows=rows), **options)


def said(rec: Recommendation, word: str) -> str:
    (found,) = [check for check in rec.checks if word in check]
    return found


def test_the_value_is_the_rules() -> None:
    """Priors and bounds as without a record: nothing that is read moves them."""
    for options in (
        {},
        {"num_steps": 600},
        {"tokens_per_step": 2e5, "num_steps": 9000},
        {"tokens_per_step": 2e5, "half_life": 7e6},
        {"known": (0.95, 0.25), "tokens_per_step": 2e5},
    ):
        tokens = {"tokens": options["half_life"]} if "half_life" in options else {}
        rest = {name: value for name, value in options.items() if name != "half_life"}
        wanted = beta2_rule(Beta2Evidence(present=0.999, beta1=0.9, **rest, **tokens))  # type: ignore[arg-type]
        found = read(settings(), look(3, w=9.0), look(5, w=9.0), **options)
        assert (found.value, found.low, found.high) == (wanted.value, wanted.low, wanted.high)
        assert found.evidence["active bound"] == wanted.evidence["active bound"]
        assert found.cost == 0
        assert found.status is Status.UNCERTAIN
    assert read(settings(), num_steps=10).status is Status.REFUSED


def test_staleness_is_counted_at_the_present_beta2() -> None:
    found = read(
        settings(beta1=0.9, beta2=0.99),
        look(1, a=50.0, b=50.0),  # at another beta2
        settings(4, beta1=0.9, beta2=0.999),
        settings(5, beta1=0.8, beta2=0.999),  # which is no change of beta2
        look(6, a=2.4, b=1.0),
        look(7, a=1.0, b=2.3),
        look(8, a=math.inf),
        look(9, a=math.nan, b=1.0),
    )
    share = found.evidence[SHARE]
    assert isinstance(share, Estimate)
    assert share.value == 2 / 6
    assert share.low < 2 / 6 < share.high
    assert share.status is Status.UNCERTAIN
    assert found.evidence["largest staleness"] == math.inf
    assert "above 2.3 in 33.3%" in said(found, "staleness at 0.999")
    assert "not calibrated" in said(found, "staleness at 0.999")


def test_a_share_of_none_has_an_interval_of_its_looks() -> None:
    """Tensors of a look may all be one, so that 30 looks at four of them are 30 cases."""
    found = read(settings(), *(look(t, a=1.0, b=1.1, c=0.9, d=1.0) for t in range(30))).evidence[SHARE]
    assert isinstance(found, Estimate)
    assert found.value == found.low == 0
    assert found.high == pytest.approx(binomtest(0, 30).proportion_ci(0.95).high, rel=1e-9)


def test_tensors_that_exceed_it_together_count_once() -> None:
    rng = np.random.default_rng(0)
    high = rng.random(200) < 0.1
    apart = rng.random((200, 20)) < 0.1
    names = [f"w{i}" for i in range(20)]
    together = [look(t, **dict.fromkeys(names, 3.0 if h else 1.0)) for t, h in enumerate(high)]
    alone = [look(t, **{n: 3.0 if h else 1.0 for n, h in zip(names, row, strict=True)}) for t, row in enumerate(apart)]
    wide, narrow = (read(settings(), *rows).evidence[SHARE] for rows in (together, alone))
    assert isinstance(wide, Estimate)
    assert isinstance(narrow, Estimate)
    ci = binomtest(int(high.sum()), 200).proportion_ci(0.95)
    # 200 looks instead of 199 degrees of freedom.
    assert (wide.low, wide.high) == pytest.approx((ci.low, ci.high), rel=0.01)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3  # sqrt(20) = 4.5, give or take


def test_below_its_ceiling_the_threshold_says_nothing() -> None:
    found = read(settings(beta1=0.8, beta2=0.8), look(1, w=2.2))
    assert SHARE not in found.evidence
    assert "cannot exceed 2.24" in said(found, "cannot exceed")


def spiking(jumps: set[int], stale: set[int], steps: int = 400) -> list[Row]:
    """A noisy loss of about 1 with jumps to 3, looked at in every tenth step."""
    loss = 1 + 0.05 * np.random.default_rng(1).uniform(-1, 1, steps)
    rows = [settings()]
    for t in range(steps):
        values = {"train/loss": 3.0 if t in jumps else float(loss[t])}
        if t % 10 == 0:
            values["adam/staleness/w"] = 5.0 if t in stale else 1.0
        rows.append(Row(step=t, values=values))
    return rows


def test_spikes_after_high_staleness_are_counted() -> None:
    """Looks at 40, 50, ... 390, 36 of them: those before have fewer than 32 losses before them."""
    found = read(*spiking({101, 208, 309, 330, 15}, {10, 100, 200, 300, 320}))
    # 101 and 208 come 1 and 8 steps later; 309 nine; 330 follows the look at 320 by ten, and none at 330 by none.
    assert said(found, "a spike of the loss").startswith(
        f"a spike of the loss came within {LEAD} steps after 2 of 4 looks above 2.3, and after 0 of 32 others"
    )
    other = read(*spiking({111}, {100}))
    assert "after 0 of 1 looks above 2.3, and after 1 of 35 others" in said(other, "a spike of the loss")
    assert "no look above 2.3" in said(read(*spiking({111}, set())), "look above")


def test_losses_that_are_no_numbers_are_spikes() -> None:
    rows = spiking(set(), {100})
    rows[1 + 104] = Row(step=104, values={"train/loss": math.nan})
    assert "after 1 of 1 looks above 2.3, and after 0 of 35" in said(read(*rows), "a spike of the loss")


def test_losses_that_were_not_recorded_say_nothing() -> None:
    rows = [row for row in spiking({101}, {100}) if row.step != 105]
    assert "no look above 2.3 has the losses" in said(read(*rows), "look above")


@pytest.mark.parametrize(
    ("value", "ends", "wanted"), [(120.0, (90.0, 200.0), "120 (90 .. 200) rows"), (120.0, (), "120 (-inf .. inf) rows")]
)
def test_the_noise_scale_is_passed_on(value: float, ends: tuple[float, ...], wanted: str) -> None:
    interval = dict(zip(("grad/noise_scale.low", "grad/noise_scale.high"), ends, strict=False))
    noisy = Row(step=7, values={"grad/noise_scale": value, **interval})
    columns = {"grad/noise_scale": Column(name="grad/noise_scale", unit="rows", level=0.95)}
    found = suggest_beta2_from_run(Run(rows=(settings(), noisy), columns=columns))
    estimate = found.evidence["gradient noise scale"]
    assert isinstance(estimate, Estimate)
    assert estimate.value == value
    assert estimate.level == (0.95 if ends else None)
    assert wanted in said(found, "gradient noise scale")


def test_a_noise_scale_that_was_refused_keeps_its_reason() -> None:
    row = Row(step=7, values={"grad/noise_scale": None}, status={"grad/noise_scale": ("REFUSED", "no signal")})
    found = read(settings(), row)
    assert "not established: no signal" in said(found, "gradient noise scale")
    assert "not recorded" in said(read(settings()), "gradient noise scale")


def test_other_groups_are_in_the_evidence() -> None:
    """The second group has a beta2 of its own, the third one only another beta1, the fourth what the first one has."""
    row = settings(
        labels={"group/1": "c\nd", "group/2": "e", "group/3": "b"},
        beta1=0.9,
        beta2=0.999,
        beta2_1=0.95,
        beta1_2=0.5,
        eps_3=1e-6,
    )
    rows = (row, look(1, a=1.0, b=5.0, c=1.0, d=1.0, e=7.0), look(2, a=1.0, b=1.0, c=4.0, d=1.0, e=7.0))
    found = read(*rows)
    shares = [found.evidence[name] for name in (SHARE, f"group 1, {SHARE}", f"group 2, {SHARE}")]
    assert [float(share) for share in shares if isinstance(share, Estimate)] == [0.25, 0.25, 1.0]
    assert found.value == 0.999
    assert found.evidence["group 1"] == found.evidence["group 1, present value"] == 0.95
    assert found.evidence["group 2"] == 0.999
    assert "group 3" not in found.evidence
    assert found.evidence["group 1, largest staleness"] == 4.0
    later = read(*rows, settings(3, beta1=0.9, beta2=0.9))
    assert "group 1" not in later.evidence  # it has what the first one has, now


def test_groups_whose_tensors_are_not_all_named_are_not_told_apart() -> None:
    names = "\n".join(f"w{i}" for i in range(64))  # as many as are named
    for labels in ({}, {"group/1": names}):
        row = settings(labels=labels, beta1=0.9, beta2=0.999, beta2_1=0.95)
        found = read(row, look(1, a=5.0, w1=1.0))
        for name in (SHARE, f"group 1, {SHARE}"):
            share = found.evidence[name]
            assert isinstance(share, Estimate)
            assert share.value == 0.5
        assert "tensors of all groups in 1 look, " in said(found, "staleness at")


def test_rmsprop_has_an_alpha() -> None:
    found = read(settings(beta2=0.99))
    assert found.knob == "alpha"
    assert "lowest for beta1" not in found.evidence


def test_what_cannot_be_had_is_said() -> None:
    found = read(settings())
    assert "single coordinates at every step" in said(found, "predicts squared gradients best")
    assert "no tensor was looked at" in said(found, "no tensor was looked at")
    bare = read(settings(), Row(step=1, values={"grad/log_rms/w": -2.0}))
    assert "no second moment" in said(bare, "had no staleness")


def test_short_records_say_so() -> None:
    assert "of 1e3 steps" in said(read(settings(), look(2998, w=1.0)), "memories")
    assert not [check for check in read(settings(), look(2999, w=1.0)).checks if "memories" in check]


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (Row(step=0, values={"optimizer/momentum": 0.9}),),
        (settings(beta1=0.9, beta2=math.nan),),
        (settings(beta1=0.9, beta2=None),),
        (settings(beta1=0.9, beta2=1.0),),
        (settings(beta1=0.9, beta2=0.0),),
        (settings(beta1=math.nan, beta2=0.9),),
        (settings(beta1=1.5, beta2=0.9),),
        (settings(beta1=0.9, beta2=0.9, beta2_1=math.inf),),
    ],
)
def test_records_without_a_beta2_are_refused(rows: tuple[Row, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        read(*rows)


def test_other_things_are_refused() -> None:
    for thing in ("run.jsonl", None, torch.nn.Linear(2, 2)):
        with pytest.raises(InvalidArgumentError, match="load_run"):
            suggest_beta2_from_run(thing)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="tokens_per_step=-1"):
        read(settings(), tokens_per_step=-1)
    with pytest.raises(InvalidArgumentError, match="num_steps"):
        read(settings(), num_steps=0)


def test_hostile_rows() -> None:
    """Steps out of order and far apart, staleness that is none, and names that look like groups."""
    rows = [
        settings(10**12),
        settings(labels={"group/1": ""}, beta1=0.9, beta2=0.999, beta2_1=0.9, **{"beta2_x": 7.0, "beta2_-1": 7.0}),
        look(5, w=-math.inf, v=math.nan),
        look(4, w=math.nan),
        Row(step=10**12, values={"train/loss": None, "grad/noise_scale": -3.0}),
    ]
    found = read(*rows)
    assert found.value == 0.999
    assert isinstance(found.to_dict(), dict)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dyntune.Monitor, Path]:
    """A real training with two groups; everything is looked at in turn."""
    path = tmp_path_factory.mktemp("run") / "run.jsonl"

    def groups(parameters: Any) -> torch.optim.Optimizer:
        weights = list(parameters)
        return torch.optim.AdamW(
            [{"params": weights[:2]}, {"params": weights[2:], "betas": (0.9, 0.95)}], lr=3e-3, betas=(0.9, 0.99)
        )

    training = Training(steps=150, optimizer=groups)
    monitor = training.monitored(log=str(path))
    training.loop(monitor)
    monitor.close()
    return monitor, path


def test_a_real_record(recorded: tuple[dyntune.Monitor, Path]) -> None:
    monitor, path = recorded
    before = path.read_bytes()
    found = dyntune.suggest_beta2_from_run(monitor, num_steps=6000)
    again = dyntune.suggest_beta2_from_run(dyntune.load_run(path), num_steps=6000)
    assert found.to_dict() == again.to_dict()
    assert path.read_bytes() == before
    assert found.value == 0.99
    assert found.evidence["group 1"] == 0.95
    run = monitor.run
    first = {name for name in run.names if name.startswith("adam/staleness/0.")}
    assert len(first) == 2
    seen = np.concatenate([run.series(name)[1] for name in first])
    share = found.evidence[SHARE]
    assert isinstance(share, Estimate)
    assert share.value == pytest.approx((seen > 2.3).mean(), abs=1e-15)
    assert found.evidence["largest staleness"] == seen.max() < math.sqrt(1 / (1 - 0.99))
    assert found.evidence["steps so far"] == 150


def test_tokens_on_a_real_record(recorded: tuple[dyntune.Monitor, Path]) -> None:
    found = dyntune.suggest_beta2_from_run(recorded[0], tokens_per_step=1e5)
    assert found.value == half_life_beta2(1e5)


def test_a_record_of_sgd_is_refused() -> None:
    training = Training(steps=40, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    monitor = training.monitored()
    training.loop(monitor)
    with pytest.raises(InvalidArgumentError, match="no column 'optimizer/beta2'"):
        dyntune.suggest_beta2_from_run(monitor)
    monitor.close()


def test_rmsprop_of_a_real_record() -> None:
    training = Training(steps=40, optimizer=lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.98))
    monitor = training.monitored()
    training.loop(monitor)
    found = dyntune.suggest_beta2_from_run(monitor)
    assert (found.knob, found.value) == ("alpha", 0.98)
    assert SHARE in found.evidence
    monitor.close()


def test_with_the_size_of_the_weights_the_path_decides() -> None:
    """Of the highest learning rate that was recorded; the optimizer's kind was not, so that it is uncertain."""
    rates = [Row(step=step, values={"train/lr": rate}) for step, rate in ((1, 1e-3), (2, 2e-3), (3, 5e-4))]
    rec = read(settings(), *rates, weight_rms=0.05)
    assert rec.value == path_beta2(2e-3, 0.05)
    assert rec.evidence["active bound"] == "path of the weights"
    assert rec.status is Status.UNCERTAIN
    assert read(settings(), *rates).evidence["active bound"] == "present value"
    assert read(settings(), weight_rms=0.05).evidence["active bound"] == "present value"
