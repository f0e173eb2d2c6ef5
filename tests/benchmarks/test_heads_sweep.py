"""The brute force over heads: equal weights for all counts, hot models, failures and the search for their rate."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.heads import sweep
from benchmarks.heads.model import HOT
from benchmarks.heads.training import Run, failed, train
from benchmarks.heads.workloads import HEADS, Cell, Group, groups
from benchmarks.lr.search import Runs, Store

SMALL = Group(64, 2, 32, "sqrt", "adamw")


def test_weights_are_the_same_for_every_count() -> None:
    for scaling in ("sqrt", "inverse", "qknorm"):
        models = [Cell(dataclasses.replace(SMALL, scaling=scaling), h).new_model(0) for h in (1, 4)]
        one, other = (dict(m.named_parameters()) for m in models)
        shared = [name for name in one if one[name].shape == other[name].shape]
        assert set(one) - set(shared) == {n for n in one if "q_norm" in n or "k_norm" in n}
        assert all(torch.equal(one[name], other[name]) for name in shared)


def test_hot_models_are_hot() -> None:
    for heads in (1, 16):
        cell = Cell(dataclasses.replace(SMALL, scaling="hot"), heads)
        assert cell.new_model(0).largest_logit(cell.data().x[:16]) == pytest.approx(HOT, rel=1e-3)
        plain = Cell(SMALL, heads)
        assert plain.new_model(0).largest_logit(plain.data().x[:16]) < 10


def test_scalings_are_what_they_say() -> None:
    """Logits at 1 / d_h are those at 1 / sqrt(d_h) over sqrt(d_h)."""
    x = Cell(SMALL, 4).data().x[:16]
    plain, inverse = (
        Cell(dataclasses.replace(SMALL, scaling=s), 4).new_model(0).blocks[0].attention for s in ("sqrt", "inverse")
    )
    h = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert plain.largest_logit(h) == pytest.approx(4 * inverse.largest_logit(h), rel=1e-5)
    assert x.shape == (16, 32)


def test_a_training_is_repeatable_and_sees_the_same_batches_at_every_count() -> None:
    one, again, other = (train(Cell(SMALL, h, steps=5), 1e-3, 0) for h in (2, 2, 4))
    assert one == again
    assert one.initial == pytest.approx(other.initial, abs=0.05)
    assert all(
        torch.equal(a[0], b[0])
        for a, b, _ in zip(Cell(SMALL, 1).batches(3), Cell(SMALL, 8).batches(3), range(3), strict=False)
    )


def test_a_rate_that_is_far_too_high_fails() -> None:
    cell = Cell(dataclasses.replace(SMALL, optimizer="momentum"), 2, steps=20, warmup=2)
    good, bad = train(cell, 0.03, 0), train(cell, 30.0, 0)
    assert good.final < good.initial
    assert not failed(good, good.final)
    assert failed(bad, good.final)
    assert bad.final == math.inf
    assert bad.steps < 20


@pytest.mark.parametrize("edge", [-11.3, -3.0, 4.6])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_the_search_finds_a_known_edge(tmp_path: Path, edge: float, optimizer: Any) -> None:
    """Loss falls towards the edge, and beyond it nothing is gained."""

    def trained(cell: Cell, lr: float, seed: int) -> Run:
        k = 4 * math.log2(lr)
        return Run(4.0, 2.0 + 0.02 * abs(k - edge + 6) if k < edge else 4.0, 2.0, 150, 1.0)

    cell = Cell(dataclasses.replace(SMALL, optimizer=optimizer), 1)
    store = Store(tmp_path / "runs.jsonl", Run)  # type: ignore[type-var]
    runs = Runs(cell, store, train=trained)  # type: ignore[arg-type]
    found = sweep.walk(runs, 0)
    assert found is not None
    assert edge <= found <= edge + sweep.FINEST
    grid = [k for k, _ in runs.known if k % 4 == 0]
    assert min(runs.known.values(), key=lambda r: r.final).final < 2.1  # the best is inside
    assert max(grid) >= edge + 4 - 1e-9  # and one above the first that fails
    # killed and begun again: nothing is trained twice
    again = Runs(cell, Store(tmp_path / "runs.jsonl", Run), train=trained)  # type: ignore[arg-type, type-var]
    before = dict(again.known)
    assert sweep.walk(again, 0) == found
    assert again.known == before


def test_halves_share_everything_but_cells() -> None:
    tune, test = groups(half="tune"), groups(half="test")
    assert len(tune) == len(test) == 32
    assert not set(tune) & set(test)
    for name in ("width", "depth", "context", "scaling", "optimizer"):
        assert {getattr(g, name) for g in tune} == {getattr(g, name) for g in test}
    assert len({Cell(g, h).digest() for g in groups() for h in HEADS}) == 64 * 5
