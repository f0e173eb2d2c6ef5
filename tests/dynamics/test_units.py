"""Dead units against counts by hand, for modules and functions, dense and convolutional."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError, UnreadableModelError
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows

X = rows(20, 6)


def truth(h: torch.Tensor, tau: float = 0.025) -> float:
    """Share of dormant units of activations with the units in the last dimension, in float64."""
    score = h.detach().double().abs().flatten(0, -2).mean(0)
    return float((score <= tau * score.mean()).double().mean())


def two(activation: nn.Module) -> nn.Module:
    """One hidden layer of 10 units, three of them far below zero."""
    model = made(lambda: nn.Sequential(nn.Linear(6, 10), activation, nn.Linear(10, 2)))
    with torch.no_grad():
        model[0].bias[[1, 4, 7]] = -60.0
    return model


KINDS = [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Mish(), nn.ReLU6(), nn.Hardswish(), nn.Softplus()]


@pytest.mark.parametrize("activation", KINDS, ids=repr)
def test_units_that_are_pushed_below_zero_are_silent_and_dormant(activation):
    model = two(activation)
    found = dyntune.dead_units(model, X)
    assert list(found) == ["1"]
    assert found["1"].silent_units == (1, 4, 7)
    assert found["1"].silent == pytest.approx(0.3)
    assert found["1"].dormant == truth(model[:2](X)) == pytest.approx(0.3)
    assert found["1"].saturated is None
    assert (found["1"].units, found["1"].rows) == (10, 20)


@pytest.mark.parametrize("activation", [nn.ELU(), nn.LeakyReLU(), nn.PReLU(), nn.SELU()], ids=repr)
def test_units_that_are_silent_need_not_be_dormant(activation):
    model = two(activation)
    found = dyntune.dead_units(model, X)["1"]
    assert found.silent_units == (1, 4, 7)
    assert found.dormant == truth(model[:2](X)) == 0.0


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.9, 3.0])
def test_the_score_is_relative_to_the_layers_mean(tau):
    model = two(nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0.1, 2.0, 10)[:, None])
    assert dyntune.dead_units(model, X, tau=tau)["1"].dormant == truth(model[:2](X), tau)
    assert truth(model[:2](X), 0.9) not in (truth(model[:2](X), 0.1), 1.0)


def test_scaling_the_inputs_of_a_relu_changes_nothing():
    model, scaled = two(nn.ReLU()), two(nn.ReLU())
    with torch.no_grad():
        scaled[0].weight.mul_(64.0)
        scaled[0].bias.mul_(64.0)
    assert dyntune.dead_units(model, X, tau=0.7) == dyntune.dead_units(scaled, X, tau=0.7)


@pytest.mark.parametrize(("activation", "edge"), [(nn.Tanh(), math.atanh(0.995)), (nn.Sigmoid(), None)])
def test_saturation_is_a_slope_below_a_hundredth_of_the_largest(activation, edge):
    model = made(lambda: nn.Sequential(nn.Linear(6, 10), activation))
    with torch.no_grad():
        model[0].weight.mul_(6.0)
    z = model[0](X).detach().double()
    # 4 s (1 - s) = 1 / cosh^2(z / 2), and 1 - tanh^2 = 1 / cosh^2
    slope = 1 / torch.cosh(z if edge else z / 2) ** 2
    found = dyntune.dead_units(model, X)["1"]
    assert found.saturated == pytest.approx(float((slope <= 0.01).double().mean()), abs=1 / z.numel())
    assert 0.05 < found.saturated < 0.95
    assert found.silent is None


@pytest.mark.parametrize("count", [1, 10, 300])
def test_the_bound_is_the_exact_one_sided_binomial(count):
    found = dyntune.dead_units(two(nn.ReLU()), rows(count, 6))["1"]
    exact = binomtest(0, count, alternative="less").proportion_ci(0.95).high
    assert found.activity_bound == pytest.approx(exact, rel=1e-12)
    assert found.activity_bound <= 3 / count


def test_the_bound_holds_as_often_as_it_says():
    """Silence on n rows of a unit that is active at exactly the bound happens in one case of twenty."""
    n = 30
    bound = dyntune.dead_units(two(nn.ReLU()), rows(n, 6))["1"].activity_bound
    draws = torch.rand(20_000, n, generator=torch.Generator().manual_seed(0)) < bound
    silent = int((~draws.any(1)).sum())
    assert binomtest(silent, 20_000, 0.05).pvalue > 1e-3


class Functions(nn.Module):
    """A convolution with a norm, a residual sum, two activations in one module, and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix, self.out = (
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4),
            nn.Linear(4, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.conv(x)))
        self.kept = [h.transpose(1, 2)]
        h = F.gelu(self.mix(h.transpose(1, 2)))
        self.kept.append(h)
        return torch.tanh(self.out(h).mean(1))


def test_channels_of_convolutions_and_features_of_linear_layers():
    model = made(Functions)
    with torch.no_grad():
        model.norm.bias[2] = -90.0
        model.mix.bias[5] = -90.0
    x = rows(12, 2, 9)
    found = dyntune.dead_units(model, x, tau=0.8)
    assert list(found) == ["", "#2", "#3"]
    assert [found[name].kind for name in found] == ["relu", "gelu", "tanh"]
    assert [found[name].units for name in found] == [4, 8, 3]
    assert [found[name].rows for name in found] == [12, 12, 12]  # positions are not more rows
    assert found[""].silent_units == (2,)
    assert found["#2"].silent_units == (5,)
    model(x)
    assert [found[name].dormant for name in ("", "#2")] == [truth(h, 0.8) for h in model.kept]


def test_images_have_channels():
    model = made(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4), nn.ReLU()))
    with torch.no_grad():
        model[0].bias[3] = -90.0
    found = dyntune.dead_units(model, rows(6, 3, 6, 6))
    assert (found["1"].units, found["1"].silent_units, found["4"].units) == (5, (3,), 4)


def test_batches_add_up():
    model = two(nn.ReLU())
    parts = [(X[:3], X[:3]), (X[3:], X[3:])]
    assert dyntune.dead_units(model, parts, tau=0.7) == dyntune.dead_units(model, X, tau=0.7)


def test_composed_activations_of_transformers_are_one():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = made(lambda: GPT2LMHeadModel(config)).eval()
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[11] = -9.0
    before = snapshot(model)
    found = dyntune.dead_units(model, {"input_ids": tokens})
    assert changes(before, snapshot(model)) == []
    assert list(found) == ["transformer.h.0.mlp.act"]
    assert found["transformer.h.0.mlp.act"].kind == "NewGELUActivation"
    assert (found["transformer.h.0.mlp.act"].units, found["transformer.h.0.mlp.act"].silent_units) == (64, (11,))


def test_compiled_models_give_the_same():
    model = made(Functions)
    compiled = torch.compile(model, backend="eager")
    assert dyntune.dead_units(compiled, rows(12, 2, 9)) == dyntune.dead_units(model, rows(12, 2, 9))


def test_nothing_to_see_is_refused():
    with pytest.raises(UnreadableModelError, match="no activation was seen"):
        dyntune.dead_units(nn.Linear(6, 2), X)
    with pytest.raises(InvalidArgumentError, match="tau=-1"):
        dyntune.dead_units(two(nn.ReLU()), X, tau=-1)


def test_activations_that_are_not_finite_give_nan():
    model = two(nn.ReLU())
    nn.init.constant_(model[0].weight, math.nan)
    found = dyntune.dead_units(model, X)["1"]
    assert math.isnan(found.dormant)
    assert found.to_dict()["dormant"] is None


def test_a_forward_pass_that_writes_to_a_parameter_is_refused_without_harm():
    model = made(lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2), nn.ReLU()))
    before = snapshot(model)
    with pytest.raises(InvalidArgumentError, match=r"writes to parameter '0\.weight'"):
        dyntune.dead_units(model, torch.arange(5))
    assert changes(before, snapshot(model)) == []
