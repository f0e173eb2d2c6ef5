"""What the list of scenarios promises, and that each one says what it means."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks.lr import data
from benchmarks.lr.scenario import OPTIMIZERS, Scenario
from benchmarks.lr.scenarios import SCENARIOS, TEST, TUNE, select

PLAIN = Scenario("plain", "digits/mlp-relu", "tune", "adam", steps=100, warmup=10, schedule="cosine")


def test_halves_share_no_family():
    families = {half: {s.family for s in select(half=half)} for half in ("tune", "test")}
    assert not families["tune"] & families["test"]
    assert len(families["test"]) >= 12
    assert len(select(half="test")) >= 60
    assert 40 <= len(select(half="tune")) <= 50


def test_names_and_definitions_are_unique():
    assert len(SCENARIOS) == sum(len(family.rows) for family in (*TUNE, *TEST))
    assert len({scenario.digest() for scenario in SCENARIOS.values()}) == len(SCENARIOS)


@pytest.mark.parametrize("half", ["tune", "test"])
def test_each_half_has_every_optimizer_and_a_third_of_long_runs(half):
    scenarios = select(half=half)
    assert {s.optimizer for s in scenarios} == set(OPTIMIZERS)
    long = [s for s in scenarios if s.steps >= 4000]
    assert 3 * len(long) >= len(scenarios)
    assert all(s.schedule == "cosine" for s in long)
    assert {s.half for s in scenarios} == {half}


def test_cold_scenarios_differ_from_their_pair_by_the_warm_up_alone():
    cold = [s for s in SCENARIOS.values() if s.name.endswith("-cold")]
    assert len(cold) >= 8
    for scenario in cold:
        pair = SCENARIOS[scenario.name.removesuffix("-cold")]
        assert pair.warmup > 0
        assert dataclasses.replace(pair, name=scenario.name, warmup=0) == scenario


def test_digest_follows_the_definition_and_not_the_name():
    digest = PLAIN.digest()
    assert dataclasses.replace(PLAIN, name="another", half="test").digest() == digest
    for change in ({"steps": 101}, {"width": 33}, {"label_noise": 0.1}, {"family": "mnist/mlp-relu"}):
        assert dataclasses.replace(PLAIN, **change).digest() != digest


def test_schedule_warms_up_to_the_peak_and_decays_to_zero():
    factors = [PLAIN.factor(step) for step in range(100)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert max(factors) == factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 1e-3
    assert dataclasses.replace(PLAIN, schedule="linear").factor(55) == pytest.approx(0.5)
    assert dataclasses.replace(PLAIN, schedule="constant").factor(99) == 1.0


def test_groups_keep_their_ratios():
    scenario = dataclasses.replace(PLAIN, groups=(("4.*", 10.0),))
    model = scenario.new_model(0)
    first, second = scenario.new_optimizer(model, 0.01).param_groups
    assert (first["lr"], second["lr"]) == (0.01, 0.1)
    assert [p is q for p, q in zip(second["params"], model[4].parameters(), strict=True)] == [True, True]
    assert sum(len(group["params"]) for group in (first, second)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="empty"):
        dataclasses.replace(PLAIN, groups=(("nothing.*", 10.0),)).new_optimizer(model, 0.01)


def test_optimizer_settings_arrive():
    model = PLAIN.new_model(0)
    nesterov = dataclasses.replace(PLAIN, optimizer="nesterov", weight_decay=0.1).new_optimizer(model, 0.01)
    assert isinstance(nesterov, torch.optim.SGD)
    assert (nesterov.defaults["momentum"], nesterov.defaults["nesterov"]) == (0.9, True)
    assert nesterov.defaults["weight_decay"] == 0.1
    adamw = dataclasses.replace(PLAIN, optimizer="adamw", betas=(0.9, 0.95)).new_optimizer(model, 0.01)
    assert adamw.defaults["betas"] == (0.9, 0.95)


def test_scales_do_what_they_say():
    plain, batch = PLAIN.new_model(0), next(iter(PLAIN.loader(0)))
    scaled = dataclasses.replace(PLAIN, init_scale=2.0).new_model(0)
    assert torch.equal(scaled[0].weight, 2 * plain[0].weight)
    assert torch.equal(scaled[0].bias, plain[0].bias)
    loss = PLAIN.loss_fn(plain, batch)
    assert torch.equal(dataclasses.replace(PLAIN, loss_scale=4.0).loss_fn(plain, batch), 4 * loss)
    # A multiplier stores other weights for the same function, up to rounding.
    other = dataclasses.replace(PLAIN, model=(("multiplier", 0.25),)).new_model(0)
    assert torch.equal(other[0].weight, 4 * plain[0].weight)
    torch.testing.assert_close(other(batch[0]), plain(batch[0]))


def test_label_noise_is_the_same_every_time_and_spares_validation():
    clean, noisy = PLAIN.data(), dataclasses.replace(PLAIN, label_noise=0.3).data()
    changed = (clean.y != noisy.y).float().mean()
    assert 0.2 < changed < 0.3  # three in ten are redrawn, one in ten of those to what it was
    assert torch.equal(clean.y_val, noisy.y_val)
    assert dataclasses.replace(PLAIN, label_noise=0.3).data() is noisy


def test_loader_gives_every_row_once_an_epoch_in_the_seeds_order():
    loader, again = PLAIN.loader(3), PLAIN.loader(3)
    epochs = [[torch.cat([x for x, _ in source]) for _ in range(2)] for source in (loader, again)]
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert len(epochs[0][0]) == len(loader) * PLAIN.batch


def test_a_new_model_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    model = PLAIN.new_model(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(model.parameters(), PLAIN.new_model(5).parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_lora_starts_as_the_model_it_is_put_on_and_trains_little():
    scenario = SCENARIOS["mnist8/lora-mlp:sgd"]
    lora = dataclasses.replace(scenario, fresh_head=False).new_model(0)
    plain = dataclasses.replace(scenario, fresh_head=False, lora=None).new_model(0)
    x = scenario.data().x[:8]
    assert torch.equal(lora(x), plain(x))
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert trained == sum(4 * (m.in_features + m.out_features) for m in plain if isinstance(m, torch.nn.Linear))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_gives_a_gradient_to_all_that_it_trains(name):
    scenario = SCENARIOS[name]
    model = scenario.new_model(0)
    optimizer = scenario.new_optimizer(model, 1e-3)
    for _ in range(2):  # LoRA's first factor has no gradient at the first step
        scenario.loss_fn(model, next(iter(scenario.loader(0)))).backward()
        optimizer.step()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in parameters)


def test_a_derived_file_is_made_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    made = []

    def write(path):
        made.append(path)
        assert not (tmp_path / "cache" / "file.txt").exists()
        path.write_text("whole")

    for _ in range(2):
        assert data.cached("file.txt", write).read_text() == "whole"
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["file.txt"]
