"""suggest_architecture: effects that are known, combinations that cannot be built, and what is told."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dyntune import suggest_architecture
from dyntune.errors import InvalidArgumentError
from dyntune.suggest.architecture import Architectures, _effects
from dyntune.suggest.variants import Found
from tests.suggest.test_suggest_heads import CE, data


class Scaled(nn.Module):
    """A linear model whose input, and with it the inverse of its critical rate, is scaled."""

    def __init__(self, scale: float, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width} is odd")
        self.scale = scale
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(96, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.scale * x)


def suggest(knobs: Any = None, factory: Any = Scaled, **options: Any) -> Architectures:
    given = {"criterion": CE, "optimizer": "momentum", "seeds": 2, "probe_steps": 20, "max_gradients": 150} | options
    return suggest_architecture(factory, knobs or {"scale": [1.0, 8.0], "width": [8, 16]}, data(), **given)


def test_a_table_and_the_effect_of_each_knob() -> None:
    found = suggest()
    assert [row.name for row in found.table] == [f"scale={s}, width={w}" for s in (1.0, 8.0) for w in (8, 16)]
    for row in found.table:
        assert row.parameters == sum(p.numel() for p in Scaled(**row.choice).parameters())
        assert 0 < float(row.lr) < float(row.critical_lr)
        assert row.flops
        assert row.saved_bytes
    # Larger inputs, lower critical rates.
    assert float(found.effects["scale"]["1.0"]) > 1.5 > 1 > float(found.effects["scale"]["8.0"])
    assert float(found.effects["scale"]["1.0"]) * float(found.effects["scale"]["8.0"]) == pytest.approx(1.0)
    assert set(found.verdicts) == {"scale", "width"}
    json.dumps(found.to_dict())
    assert "scale: critical rate over the mean" in found.explain()
    assert not found.skipped


def test_combinations_that_cannot_be_built_are_left_out() -> None:
    found = suggest({"scale": [1.0], "width": [7, 8]}, seeds=1)
    assert [row.choice["width"] for row in found.table] == [8]
    assert found.skipped == {"scale=1.0, width=7": "ValueError: width=7 is odd"}
    assert "not built: scale=1.0, width=7" in found.explain()
    with pytest.raises(InvalidArgumentError, match="width=7 is odd, and no other"):
        suggest({"scale": [1.0], "width": [7]})


def test_bad_input() -> None:
    for knobs, match in (
        ({"width": []}, "one value or more"),
        ({"width": "8"}, "one value or more"),
        ({"width": list(range(2, 200))}, "198 combinations"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            suggest(knobs)
    with pytest.raises(InvalidArgumentError, match="knobs is empty"):
        suggest_architecture(Scaled, {}, data(), criterion=CE)
    with pytest.raises(InvalidArgumentError, match="every architecture has its own"):
        suggest(optimizer=torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(InvalidArgumentError, match="returned a int"):
        suggest(factory=lambda **_: 3)


def test_effects_add_up_also_where_combinations_are_missing() -> None:
    """Critical rates that are products: the parts come back, whatever combinations are left out."""
    rng = np.random.default_rng(0)
    one, other = {"a": -3.0, "b": 0.0, "c": 3.0}, {1: 2.0, 2: -2.0}
    choices = [{"one": o, "other": k} for o in one for k in other][:-1]
    seeds = rng.standard_normal(3)
    found = [Found(max_stable=[2 ** (one[c["one"]] + other[c["other"]] + s) for s in seeds]) for c in choices]
    effects, verdicts = _effects(choices, found, 1.25)
    for knob, parts in (("one", one), ("other", other)):
        for value, part in parts.items():
            assert math.log2(float(effects[knob][str(value)])) == pytest.approx(part, abs=1e-9)
    assert verdicts == {"one": "different", "other": "different"}
    found[0].max_stable[0] = math.nan  # a choice without a critical rate is left out
    assert float(_effects(choices, found, 1.25)[0]["other"]["1"]) == pytest.approx(4.0)
