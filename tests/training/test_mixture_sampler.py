"""MixtureSampler: unbiased, whole shares in every batch, resumable, the same from workers."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from dyntune.errors import InvalidArgumentError
from dyntune.suggest.mixture import suggest_mixture
from dyntune.training.mixture_sampler import IndexedMixture, MixtureSampler

SIZES, SHARES, WEIGHTS = (50, 20, 7), (0.5, 0.3, 0.2), (0.7, 0.2, 0.1)


def sampler_of(**changes: Any) -> MixtureSampler:
    given_: dict[str, Any] = {"batch_size": 16, "weights": WEIGHTS, "num_samples": 160} | changes
    return MixtureSampler(given_.pop("sizes", SIZES), given_.pop("mixture", SHARES), **given_)


@settings(max_examples=100, deadline=None)
@given(
    raw=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
)
def test_every_batch_has_its_share_of_each_source(raw: list[float], batch_size: int, seed: int) -> None:
    """Systematic sampling: the share times the batch, rounded down or up; 1e-9 for shares that are whole up to it."""
    shares = [x / sum(raw) for x in raw]
    sampler = MixtureSampler([5] * len(raw), shares, batch_size=batch_size, seed=seed)
    for _ in range(5):
        counts = np.bincount(sampler.sources_of(sampler.next_batch()).numpy(), minlength=len(raw))
        exact = np.array(sampler.proportions) * batch_size
        assert counts.sum() == batch_size
        assert (counts >= np.floor(exact - 1e-9)).all()
        assert (counts <= np.ceil(exact + 1e-9)).all()


@pytest.mark.parametrize("sampling", ["stratified", "multinomial"])
@pytest.mark.parametrize("shares", [SHARES, (0.02, 0.9, 0.08)])
def test_weighted_means_are_unbiased(sampling: Any, shares: tuple[float, ...]) -> None:
    """1000 batches, within four standard errors; with sources that have a row in some batches only, too."""
    values = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [1.0] * 50 + [-4.0] * 20 + [9.0] * 7
    )
    sampler = sampler_of(mixture=shares, sampling=sampling)
    truth = sum(w * float(part.mean()) for w, part in zip(WEIGHTS, values.split(SIZES), strict=True))
    found = []
    for _ in range(1000):
        batch = sampler.next_batch()
        found.append(float((sampler.importance(batch) * values[batch]).mean()))
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / math.sqrt(len(found))


def test_shares_are_kept_over_a_run() -> None:
    """1000 batches of 16: each count is within one of p B, so the mean within 4 * 0.5 / sqrt(1000) / 16."""
    sampler = sampler_of()
    seen = Counter(int(s) for _ in range(1000) for s in sampler.sources_of(sampler.next_batch()))
    assert [seen[i] / 16000 for i in range(3)] == pytest.approx(SHARES, abs=0.004)


def test_rows_come_once_before_any_comes_again() -> None:
    sampler = sampler_of(sizes=(8, 8), mixture=(0.5, 0.5), weights=(0.5, 0.5), batch_size=4)
    drawn = [i for _ in range(4) for i in sampler.next_batch()]
    assert sorted(drawn) == list(range(16))
    again = [i for _ in range(4) for i in sampler.next_batch()]
    assert sorted(again) == list(range(16))
    assert again != drawn


def test_loaders_with_and_without_workers_draw_the_same() -> None:
    rows = torch.arange(sum(SIZES)).float()
    data = IndexedMixture([TensorDataset(part) for part in rows.split(SIZES)])
    assert len(data) == 77

    def run(workers: int) -> list[tuple[list[int], list[float]]]:
        sampler = sampler_of(seed=3)
        loader = DataLoader(data, batch_size=16, sampler=sampler, num_workers=workers)
        out = []
        for (values,), indices in loader:
            assert values.tolist() == indices.tolist()
            out.append((indices.tolist(), sampler.importance(indices).tolist()))
        return out

    state = torch.get_rng_state()
    alone = run(0)
    assert len(alone) == 10
    assert run(2) == alone
    # A DataLoader draws its base seed from the global state; the sampler itself leaves that alone.
    torch.set_rng_state(state)
    list(sampler_of(seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_keeps_the_weights_it_was_drawn_with() -> None:
    sampler = sampler_of(sampling="multinomial")
    batch = sampler.next_batch()
    before = sampler.importance(batch)
    sampler.update((0.1, 0.1, 0.8))
    assert torch.equal(sampler.importance(batch), before)
    after = sampler.next_batch()
    expected = torch.tensor([w / p for w, p in zip(WEIGHTS, (0.1, 0.1, 0.8), strict=True)])
    assert sampler.importance(torch.tensor(after)) == pytest.approx(expected[sampler.sources_of(after)].tolist())


def test_resumed_where_it_was() -> None:
    one, other = sampler_of(seed=5), sampler_of(seed=9)
    for _ in range(7):
        one.next_batch()
    one.update((0.2, 0.2, 0.6))
    one.next_batch()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [other.next_batch() for _ in range(9)] == [one.next_batch() for _ in range(9)]
    assert other.proportions == one.proportions
    with pytest.raises(InvalidArgumentError, match="3 sources"):
        MixtureSampler([3, 3], [0.5, 0.5], batch_size=2).load_state_dict(one.state_dict())


def test_lengths_and_seeds() -> None:
    assert len(sampler_of(num_samples=17)) == 32
    assert len(list(sampler_of(num_samples=17))) == 32
    assert len(sampler_of(num_samples=None)) == 80
    assert list(sampler_of(seed=1)) != list(sampler_of(seed=2))
    assert list(sampler_of(seed=1)) == list(sampler_of(seed=1))
    default = MixtureSampler([TensorDataset(torch.zeros(n)) for n in (30, 10)], [0.5, 0.5], batch_size=4)
    assert default.weights == (0.75, 0.25)


def test_takes_what_suggest_mixture_found() -> None:
    rng = torch.Generator().manual_seed(0)
    x, noise = torch.randn(40, 2, generator=rng), torch.randn(40, 1, generator=rng)
    found = suggest_mixture(
        [(x, 0.1 * noise), (x, 5 * noise)],
        weights=[0.75, 0.25],
        sampling="multinomial",
        model=torch.nn.Linear(2, 1),
        criterion=torch.nn.MSELoss(),
    )
    sampler = MixtureSampler([40, 40], found, batch_size=8)
    assert sampler.proportions == pytest.approx(found.proportions)
    assert (sampler.weights, sampler.sampling) == (found.weights, "multinomial")
    zero = suggest_mixture(
        [(0 * x, 0 * noise)] * 2, model=torch.nn.Linear(2, 1, bias=False), criterion=torch.nn.MSELoss()
    )
    with pytest.raises(InvalidArgumentError, match="refused"):
        sampler.update(zero)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": (50, 0, 7)}, "every source has a row"),
        ({"sizes": ()}, "every source has a row"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"weights": (0.5, 0.5, 0.5)}, "add up to 1.5"),
        ({"weights": (0.5, 0.5)}, "one for each of the 3"),
        ({"mixture": (0.5, 0.5, 0.5)}, "add up"),
        ({"mixture": (0.5, 0.2, 0.2)}, "shares add up to one"),
        ({"mixture": (math.nan, 0.5, 0.5)}, "share"),
        ({"mixture": (0.5, 0.5, 0.0)}, "source 2 has weight"),
        ({"sampling": "random"}, "sampling"),
    ],
)
def test_input_that_is_none(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        sampler_of(**changes)


@pytest.mark.parametrize("indices", [[], [77], [-1], [[1, 2]]])
def test_indices_of_no_source(indices: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="indices"):
        sampler_of().importance(indices)


def test_a_source_without_weight_may_have_no_share() -> None:
    sampler = sampler_of(mixture=(0.5, 0.5, 0.0), weights=(0.5, 0.5, 0.0))
    batch = sampler.next_batch()
    assert set(sampler.sources_of(batch).tolist()) == {0, 1}
    assert sampler.importance(batch).mean() == pytest.approx(1.0)
