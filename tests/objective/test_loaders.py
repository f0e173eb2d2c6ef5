"""A DataLoader or other re-iterable: drawn from once, frozen, and without a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import dyntune
from dyntune.errors import BatchError, EmptyBatchError
from dyntune.objective.batches import freeze_batches
from dyntune.objective.objective import Objective
from tests.objective.zoo import rows

DATA = TensorDataset(rows(50, 2), torch.arange(50) % 3)
CPU = torch.device("cpu")


class Counting:
    """A re-iterable that says how often it was started and drawn from."""

    def __init__(self, length: int = 30) -> None:
        self.length, self.started, self.drawn = length, 0, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.started += 1
        for index in range(self.length):
            self.drawn += 1
            yield rows(4, 2, seed=index), torch.arange(4) % 3


def frozen(batches, num_batches=16):
    return freeze_batches(batches, num_batches=num_batches, device=CPU)


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (16, 16), (30, 30), (99, 30), ("all", 30)])
def test_num_batches_of_a_fresh_iterator(number, expected):
    loader = Counting()
    assert len(frozen(loader, number)) == expected
    assert (loader.started, loader.drawn) == (1, expected)


def test_the_default_is_sixteen():
    assert Objective(nn.Linear(2, 3), Counting(), criterion=nn.CrossEntropyLoss()).describe()["num_batches"] == 16


def test_a_loader_is_drawn_from_once_however_much_is_measured():
    loader = Counting(3)
    operator = dyntune.hessian(nn.Linear(2, 3), loader, criterion=nn.CrossEntropyLoss())
    dyntune.eigenvalues(operator)
    operator.objective.loss()
    assert (loader.started, loader.drawn) == (1, 3)


def test_products_see_the_same_rows_although_the_loader_shuffles():
    loader = DataLoader(DATA, batch_size=8, shuffle=True)
    operator = dyntune.hessian(nn.Linear(2, 3), loader, criterion=nn.CrossEntropyLoss(), num_batches=2)
    assert torch.equal(operator.to_dense(), operator.to_dense())


def test_a_sequence_by_getitem_alone_is_re_iterable():
    class Old:
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index == 3:
                raise IndexError
            return rows(4, 2, seed=index), torch.arange(4) % 3

    assert len(frozen(Old(), "all")) == 3


def test_random_numbers_are_put_back():
    class Augmenting:
        def __iter__(self) -> Iterator[torch.Tensor]:
            for _ in range(3):
                yield torch.rand(4, 2) + random.random() + np.random.rand()

    outcomes = []
    for measured in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if measured:
            frozen(Augmenting())
        outcomes.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert outcomes[0] == outcomes[1]


def draws(loader: DataLoader) -> list[int]:
    """Order of an epoch, by the rows' first entry."""
    return [round(1e6 * float(x)) for batch in loader for x in batch[0][:, 0]]


def shuffling(own: str) -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    if own == "global":
        return DataLoader(DATA, batch_size=8, shuffle=True)
    if own == "loader":
        return DataLoader(DATA, batch_size=8, shuffle=True, generator=generator)
    if own == "sampler":
        return DataLoader(DATA, batch_size=8, sampler=RandomSampler(DATA, generator=generator))
    batches = torch.utils.data.BatchSampler(RandomSampler(DATA, generator=generator), 8, drop_last=False)
    return DataLoader(DATA, batch_sampler=batches)


@pytest.mark.parametrize("own", ["global", "loader", "sampler", "batch sampler"])
def test_the_next_epoch_is_the_one_that_would_have_been(own):
    orders = []
    for measured in (False, True):
        torch.manual_seed(0)
        loader = shuffling(own)
        if measured:
            frozen(loader, 3)
        orders.append(draws(loader))
    assert orders[0] == orders[1]


def test_an_epoch_under_way_goes_on():
    """Measuring in the middle of the user's own loop over the same loader."""
    orders = []
    for measured in (False, True):
        torch.manual_seed(0)
        loader, order = DataLoader(DATA, batch_size=8, shuffle=True), []
        for index, (x, _) in enumerate(loader):
            if measured and index == 2:
                frozen(loader, 3)
            order.append(x[0, 0].item())
        orders.append(order)
    assert orders[0] == orders[1]


def test_an_iterator_that_a_loader_keeps_is_not_reset():
    """With persistent workers a DataLoader hands out one iterator again and again."""

    class Persistent(DataLoader):
        _iterator = None

        def __iter__(self):
            if self._iterator is None:
                self._iterator = super()._get_iterator()
            else:
                self._iterator._reset(self)
            return self._iterator

    loader = Persistent(DATA, batch_size=10)
    under_way = iter(loader)
    first = next(under_way)
    assert len(frozen(loader, 2)) == 2
    assert loader._iterator is under_way
    rest = list(under_way)
    assert len(rest) == 4
    assert not torch.equal(rest[0][0], first[0])


def test_batches_made_by_an_iterable_dataset():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for index in range(3):
                yield rows(4, 2, seed=index), torch.arange(4) % 3

    assert len(frozen(Stream())) == 3
    assert len(frozen(DataLoader(Stream(), batch_size=None))) == 3


def test_a_dataset_of_single_examples_is_refused_with_the_line_to_write():
    with pytest.raises(
        BatchError, match=r"a Dataset \(TensorDataset\).*batches = DataLoader\(dataset, batch_size=64\)"
    ):
        frozen(DATA)


@pytest.mark.parametrize("empty", [Counting(0), DataLoader(TensorDataset(torch.zeros(0, 2)), batch_size=4)])
def test_an_empty_loader_is_refused(empty):
    with pytest.raises(EmptyBatchError, match=r"batches is empty.*DataLoader that yields at least one"):
        frozen(empty)
