"""Reading attention, units, logits and alignment off a model that has all of them, cut short at any call."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.neutrality.faults import ERRORS, SITES
from tests.neutrality.measurements import MEASUREMENTS, Subject
from tests.neutrality.test_faults import DATA, check, step
from tests.objective.zoo import made

NAMES = ["attention_statistics", "dead_units", "output_logits", "spectral_alignment"]


class PlainSiLU(nn.Module):
    """An activation of several operations, as libraries write them: its ``forward`` is replaced while reading."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Looks(nn.Module):
    """Attention, a composed activation, dropout, and a buffer that the forward pass writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 2, 4, dropout=0.2, batch_first=True, activation=PlainSiLU())
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.layer(x.view(-1, 2, 2)).flatten(1)))


def subject() -> Subject:
    model = made(Looks).train()
    found = Subject(model, DATA, torch.optim.AdamW(model.parameters(), lr=1e-2), {"criterion": nn.CrossEntropyLoss()})
    step(found, 0)
    return found


def test_the_subject_has_everything():
    for name in NAMES:
        assert not isinstance(MEASUREMENTS[name](subject()), str), name
    assert MEASUREMENTS["dead_units"](subject())["layer.activation"].kind == "PlainSiLU"


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", NAMES)
def test_at_some_calls(name, site):
    errors = itertools.cycle(ERRORS)
    assert check(lambda s, fuse: MEASUREMENTS[name](s), site, errors, 6, build=subject) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", NAMES)
def test_at_sixty_calls(name, site):
    errors = itertools.cycle(ERRORS)
    assert check(lambda s, fuse: MEASUREMENTS[name](s), site, errors, 60, build=subject) >= 30
